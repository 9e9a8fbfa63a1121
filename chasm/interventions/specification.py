"""What an intervention is: one site, one operation; from and to plain YAML values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, fields
from typing import Any

from torch import nn

from chasm.errors import ConfigError
from chasm.models.sites import Stream, sites_of

OPERATIONS = {
    "mean": "its mean over train images",
    "zero": "zeros",
    "resample": "the same tensor of another image, given as donors",
    "optimal": "the constant that minimises the train loss",
    "noise": "Gaussian noise with the mean and variance of each element over train images",
    "route_swap": "the other kind of token: the mean patch for CLS, the last CLS for patches",
    "shuffle_space": "itself with its positions permuted",
    "residualise": "patches without what CLS predicts linearly of them",
    "clean": "its value without interventions, given as clean",
    "value": "a tensor, given as donors",
}
"""Operations by name, and what the tensor is replaced by."""

INPUTS = ("features.cls", "features.patches")
"""Sites of the tokens that a model is given."""

_SITES = {"route_swap": INPUTS, "residualise": INPUTS[1:]}


@dataclass(frozen=True)
class Intervention:
    """Replace the tensor that passes one site.

    Parameters
    ----------
    site
        Name of the site, see `chasm.models.sites`.
    operation
        One of `OPERATIONS`.
    tokens
        Positions on axis 1 that are replaced, e.g. one CLS layer; None for all.
    seed
        Of ``noise``, ``shuffle_space`` and, between tokens of unequal widths, ``route_swap``.
    where
        File and field that errors name.

    Raises
    ------
    ConfigError
        If the operation is unknown or does not apply to the site or to single tokens, or another
        value cannot be used.
    """

    site: str
    operation: str
    tokens: tuple[int, ...] | None = None
    seed: int = 0
    where: InitVar[str] = "intervention"

    def __post_init__(self, where: str) -> None:
        if not isinstance(self.site, str):
            raise ConfigError(f"{where}.site", f"found {self.site!r}", "Give the name of a site.")
        if not isinstance(self.operation, str) or self.operation not in OPERATIONS:
            listed = ", ".join(OPERATIONS)
            raise ConfigError(
                f"{where}.operation", f"found {self.operation!r}", f"Use one of: {listed}."
            )
        allowed = _SITES.get(self.operation, (self.site,))
        if self.site not in allowed:
            raise ConfigError(
                f"{where}.site",
                f"{self.operation} does not apply to {self.site}",
                f"Use {' or '.join(allowed)}.",
            )
        if not _is_index(self.seed):
            raise ConfigError(f"{where}.seed", f"found {self.seed!r}", "Use a whole number >= 0.")
        if self.tokens is not None:
            self._check_tokens(where)

    def _check_tokens(self, where: str) -> None:
        remedy = "List different positions >= 0, e.g. [0], or leave it out."
        if isinstance(self.tokens, list):
            object.__setattr__(self, "tokens", tuple(self.tokens))
        if not isinstance(self.tokens, tuple) or not all(map(_is_index, self.tokens)):
            raise ConfigError(f"{where}.tokens", f"found {self.tokens!r}", remedy)
        if not self.tokens or len(set(self.tokens)) < len(self.tokens):
            raise ConfigError(f"{where}.tokens", f"found {list(self.tokens)}", remedy)
        if self.operation == "shuffle_space":
            raise ConfigError(
                f"{where}.tokens", f"found {list(self.tokens)}", "All positions take part: drop it."
            )

    @classmethod
    def from_dict(cls, raw: object, where: str = "intervention") -> Intervention:
        """Read an intervention from plain values.

        Parameters
        ----------
        raw
            E.g. ``{"site": "local.out", "operation": "mean"}``, as YAML gives it.
        where
            File and field that errors name, e.g. ``cls.yaml:conditions.layer_3[0]``.

        Raises
        ------
        ConfigError
            As the class; also where a key is unknown or missing.
        """
        names = [field.name for field in fields(cls)]
        listed = ", ".join(names)
        if not isinstance(raw, Mapping):
            raise ConfigError(where, f"found {raw!r}", f"Give a mapping of {listed}.")
        for key in raw:
            if key not in names:
                raise ConfigError(f"{where}.{key}", "no such key", f"Use keys out of {listed}.")
        for key in ("site", "operation"):
            if key not in raw:
                raise ConfigError(f"{where}.{key}", "it is missing", "Give a name.")
        return cls(**raw, where=where)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values that `from_dict` reads; keys that hold their default are left out."""
        found: dict[str, Any] = {"site": self.site, "operation": self.operation}
        if self.tokens is not None:
            found["tokens"] = list(self.tokens)
        return found | ({"seed": self.seed} if self.seed else {})


def on_stream(
    module: nn.Module, stream: Stream, operation: str, seed: int = 0
) -> tuple[Intervention, ...]:
    """Apply one operation to a whole stream: to all of its sites in a model.

    Raises
    ------
    ConfigError
        If the model has no such site, or the operation does not apply.
    """
    found = [name for name, site in sites_of(module).items() if site.stream == stream]
    if not found:
        raise ConfigError(
            f"intervention:{stream} stream",
            f"{type(module).__name__} has no site of it",
            "Use a model with two streams.",
        )
    return tuple(Intervention(name, operation, seed=seed) for name in found)


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
