"""Context managers that hook a model's sites: replace what passes, or write it down."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from chasm.errors import ConfigError
from chasm.interventions.operations import Given, replacement
from chasm.interventions.reference import Reference
from chasm.interventions.specification import Intervention
from chasm.models.sites import Site, sites_of


@contextmanager
def intervene(
    module: nn.Module,
    interventions: Sequence[Intervention],
    reference: Reference | None = None,
    *,
    batch: Mapping[str, Any] | None = None,
    clean: Mapping[str, Tensor] | None = None,
    donors: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Replace what passes sites of a model, as long as the context lasts.

    Two interventions on one site act one after the other, and so does a context inside another.

    Parameters
    ----------
    module
        Model that has the sites.
    interventions
        What to do; none is allowed.
    reference
        Statistics of train images, see `chasm.interventions.collect`.
    batch
        The batch that will pass: ``noise`` and ``shuffle_space`` need its ``image_id``,
        ``route_swap`` and ``residualise`` its tokens.
    clean
        This batch's values without interventions, by site, for ``clean``.
    donors
        This batch's values to put in, by site, for ``resample`` and ``value``.

    Raises
    ------
    ConfigError
        If the model has no such site, an operation lacks what it needs, or the context ends
        without error and nothing passed a site in it, so that an intervention had no effect.
    """
    given = Given(reference or Reference(), batch or {}, clean or {}, donors or {})
    waiting = {intervention.site for intervention in interventions}
    sites = _sites(module, waiting)

    def hook_of(intervention: Intervention) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(site: nn.Module, inputs: Any, value: Tensor) -> Tensor:
            waiting.discard(intervention.site)
            return replacement(value, intervention, given)

        return hook

    with ExitStack() as stack:
        for intervention in interventions:
            handle = sites[intervention.site].register_forward_hook(hook_of(intervention))
            stack.callback(handle.remove)
        yield
    if waiting:
        raise ConfigError(
            f"intervention:{min(waiting)}",
            "nothing passed this site",
            "Run the half of the model that has it: features.* are in streams(batch), all other "
            "sites in from_streams(streams).",
        )


@contextmanager
def record(module: nn.Module, sites: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Write down what passes sites of a model, as long as the context lasts.

    Inside `intervene` this is what was put in, outside of it what was there.

    Parameters
    ----------
    module
        Model that has the sites.
    sites
        Their names.

    Yields
    ------
    dict
        Site to the tensor (images, ...) of the latest pass, without gradients.

    Raises
    ------
    ConfigError
        If the model has no such site.
    """
    found = _sites(module, sites)
    values: dict[str, Tensor] = {}

    def hook(site: nn.Module, inputs: Any, value: Tensor) -> None:
        assert isinstance(site, Site)
        values[site.name] = value.detach()

    with ExitStack() as stack:
        for name in found:
            stack.callback(found[name].register_forward_hook(hook).remove)
        yield values


def _sites(module: nn.Module, names: Collection[str]) -> dict[str, Site]:
    """Find sites by name; a ConfigError lists those that the model has."""
    have = sites_of(module)
    for name in sorted(names):
        if name not in have:
            listed = ", ".join(have) or "none"
            raise ConfigError(
                f"intervention:{name}",
                f"{type(module).__name__} has no such site",
                f"Its sites: {listed}.",
            )
    return {name: have[name] for name in dict.fromkeys(names)}
