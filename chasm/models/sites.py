"""Named places in a model where an intervention can replace a tensor."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

Stream = Literal["global", "local"]


class Site(nn.Module):
    """Pass a tensor on unchanged; a forward hook on this module can replace it.

    A site has no parameters, so it leaves state dicts as they are.

    Parameters
    ----------
    name
        E.g. ``local.out``; once per model.
    stream
        Stream whose whole contribution to what follows passes here, or at other sites of the
        same stream; None where both streams pass, and at the model's inputs.
    """

    def __init__(self, name: str, stream: Stream | None = None) -> None:
        super().__init__()
        self.name, self.stream = name, stream

    def forward(self, value: Tensor) -> Tensor:
        """Return the tensor, (images, ...)."""
        return value

    def extra_repr(self) -> str:
        """Show the name."""
        return self.name


def sites_of(module: nn.Module) -> dict[str, Site]:
    """List the sites of a model by name; of equal names the outermost, whose inputs are its own."""
    found: dict[str, Site] = {}
    for part in module.modules():
        if isinstance(part, Site):
            found.setdefault(part.name, part)
    return found
