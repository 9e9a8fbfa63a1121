"""What replaces the tensor at a site: one function per operation.

Whatever is drawn at random depends on the site, the seed and the image alone, so that neither the
batches nor the device change a result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from chasm.errors import ConfigError
from chasm.interventions.reference import Reference, TokenScatter, swap_source
from chasm.interventions.specification import INPUTS, Intervention

T = TypeVar("T")

_DUST = 1e-12
"""Variance, relative to the largest one, below which a channel is taken as constant."""


@dataclass(frozen=True)
class Given:
    """What operations may use beside the tensor that passes.

    Attributes
    ----------
    reference
        Statistics of the train images.
    batch
        The batch that passes: its tokens and ``image_id``, (images,).
    clean, donors
        Site to (images, ...) tensors for this batch; one image's tensor serves all.
    """

    reference: Reference = field(default_factory=Reference)
    batch: Mapping[str, Any] = field(default_factory=dict)
    clean: Mapping[str, Tensor] = field(default_factory=dict)
    donors: Mapping[str, Tensor] = field(default_factory=dict)


def replacement(value: Tensor, intervention: Intervention, given: Given) -> Tensor:
    """Compute what is passed on in place of a tensor.

    Parameters
    ----------
    value
        (images, ...), what arrives at the site.
    intervention
        Which operation, on which positions of axis 1.
    given
        Reference, batch, clean and donor values.

    Returns
    -------
    Tensor
        Of the same shape, dtype and device.

    Raises
    ------
    ConfigError
        If something that the operation needs was not given, or a shape does not fit.
    """
    made = _MAKERS[intervention.operation](value, intervention, given).to(value)
    if made.shape not in (value.shape, (1, *value.shape[1:])):
        raise ConfigError(
            f"intervention:{intervention.site}",
            f"{intervention.operation} gives {tuple(made.shape)}, the tensor there is "
            f"{tuple(value.shape)}",
            "Collect, record or give values of this model and this batch.",
        )
    made = made.expand_as(value)
    if intervention.tokens is None:
        return made
    if value.ndim < 2 or max(intervention.tokens) >= value.shape[1]:
        raise ConfigError(
            f"intervention:{intervention.site}.tokens",
            f"found {list(intervention.tokens)}, the tensor there is {tuple(value.shape)}",
            "Name positions of its axis 1.",
        )
    mixed = value.clone()
    mixed[:, intervention.tokens] = made[:, intervention.tokens]
    return mixed


def derangements(n_images: int, n_donors: int, seed: int = 0) -> Tensor:
    """Draw donors for ``resample`` and interchange: no image is its own.

    An image's donors are all different, and every image is as often a donor as any other: images
    in random order, turned by different random numbers of places.

    Parameters
    ----------
    n_images, n_donors
        Images, and donors of each.
    seed
        Of the order and the turns.

    Returns
    -------
    Tensor
        (donors, images) int64, positions of images.

    Raises
    ------
    ConfigError
        If there are not more images than donors.
    """
    if not 1 <= n_donors < n_images:
        raise ConfigError(
            "donors", f"{n_donors} for each of {n_images} images", "Use 1 to one less than images."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n_images, generator=generator)
    turns = 1 + torch.randperm(n_images - 1, generator=generator)[:n_donors]
    donors = torch.empty(n_donors, n_images, dtype=torch.int64)
    places = (torch.arange(n_images) + turns[:, None]) % n_images
    donors[:, order] = order[places]
    return donors


# The operations, each (value, intervention, given) -> (images or 1, ...).


def _mean(value: Tensor, intervention: Intervention, given: Given) -> Tensor:
    return _statistic(given.reference.mean, intervention)[None]


def _zero(value: Tensor, intervention: Intervention, given: Given) -> Tensor:
    return torch.zeros_like(value)


def _optimal(value: Tensor, intervention: Intervention, given: Given) -> Tensor:
    remedy = "Fit it first: chasm.interventions.fit_optimal."
    return _take(given.reference.optimal, intervention, "no optimal constant", remedy)[None]


def _clean(value: Tensor, intervention: Intervention, given: Given) -> Tensor:
    return _take(given.clean, intervention, "no clean value", "Record it and give it as clean.")


def _donor(value: Tensor, intervention: Intervention, given: Given) -> Tensor:
    return _take(given.donors, intervention, "no values to put in", "Give them as donors.")


def _noise(value: Tensor, intervention: Intervention, given: Given) -> Tensor:
    """Draw from the Gaussian of the train images; its expected squared norm is theirs, too."""
    mean = _statistic(given.reference.mean, intervention)
    std = _statistic(given.reference.variance, intervention).sqrt()
    drawn = [torch.randn(mean.shape, generator=g) for g in _generators(value, intervention, given)]
    return mean.to(value) + std.to(value) * torch.stack(drawn).to(value)


def _shuffle_space(value: Tensor, intervention: Intervention, given: Given) -> Tensor:
    if value.ndim < 3:
        raise ConfigError(
            f"intervention:{intervention.site}",
            f"the tensor there is {tuple(value.shape)} and has no positions",
            "Shuffle features.patches.",
        )
    n = value.shape[1]
    orders = [torch.randperm(n, generator=g) for g in _generators(value, intervention, given)]
    index = torch.stack(orders).to(value.device)
    return value[torch.arange(len(value), device=value.device)[:, None], index]


def _route_swap(value: Tensor, intervention: Intervention, given: Given) -> Tensor:
    """Repeat the other kind of token: as it is between equal widths, else projected.

    The projection is random and fixed by the seed. The source is standardised by train
    statistics before it, and the result is brought to each element's train mean and standard
    deviation at this site.
    """
    other = INPUTS[1 - INPUTS.index(intervention.site)]
    source = swap_source(other, _tokens(other, intervention, given)).to(value)
    n, width = value.shape[1:]
    if source.shape[-1] != width:
        remedy = "Collect features.cls and features.patches."
        scatter = _take(
            given.reference.sources, intervention, f"no moments of {other}", remedy, other
        )
        generator = _generator(intervention.site, intervention.seed)
        source = _projected(source, scatter, width, generator)[:, None]
        std = _statistic(given.reference.variance, intervention).sqrt()
        return _statistic(given.reference.mean, intervention).to(value) + std.to(value) * source
    return source[:, None].expand(-1, n, -1)


def _projected(
    source: Tensor, scatter: TokenScatter, width: int, generator: torch.Generator
) -> Tensor:
    """Project (images, any) to (images, width), each channel of unit variance over train images."""
    variance = scatter.covariance.diagonal()
    inverse = torch.where(variance > _DUST * variance.max(), variance.rsqrt(), 0.0)
    weights = inverse[:, None] * torch.randn(
        len(inverse), width, generator=generator, dtype=inverse.dtype
    )
    power = ((scatter.covariance @ weights) * weights).sum(0)
    weights /= power.clamp_min(torch.finfo(power.dtype).tiny).sqrt()
    return (source - scatter.mean.to(source)) @ weights.to(source)


def _residualise(value: Tensor, intervention: Intervention, given: Given) -> Tensor:
    """Subtract from the patches what CLS predicts of their deviation from the train mean."""
    linear = given.reference.patches_from_cls
    if linear is None:
        raise ConfigError(
            f"intervention:{intervention.site}",
            "no linear map from CLS to patches",
            "Fit it first: chasm.interventions.fit_patches_from_cls.",
        )
    cls = _tokens("features.cls", intervention, given).flatten(1).to(value)
    predicted = (cls - linear.cls_mean.to(value)) @ linear.weights.to(value)
    return value - predicted.view_as(value)


_MAKERS: dict[str, Callable[[Tensor, Intervention, Given], Tensor]] = {
    "mean": _mean,
    "zero": _zero,
    "resample": _donor,
    "optimal": _optimal,
    "noise": _noise,
    "route_swap": _route_swap,
    "shuffle_space": _shuffle_space,
    "residualise": _residualise,
    "clean": _clean,
    "value": _donor,
}


def _take(
    values: Mapping[str, T],
    intervention: Intervention,
    problem: str,
    remedy: str,
    name: str | None = None,
) -> T:
    """Look up what the operation needs, for its site or another name."""
    found = values.get(name or intervention.site)
    if found is None:
        where = f"intervention:{intervention.site}"
        raise ConfigError(where, f"{intervention.operation}, but {problem} is given", remedy)
    return found


def _statistic(values: Mapping[str, Tensor], intervention: Intervention) -> Tensor:
    remedy = f"Collect {intervention.site}: chasm.interventions.collect."
    return _take(values, intervention, "no statistics of train images", remedy)


def _tokens(site: str, intervention: Intervention, given: Given) -> Tensor:
    key = site.removeprefix("features.")
    tokens: Tensor = _take(
        given.batch, intervention, f"no batch with {key!r}", "Give the batch.", key
    )
    return tokens


def _generators(value: Tensor, intervention: Intervention, given: Given) -> list[torch.Generator]:
    """One source of random numbers per image of the batch."""
    ids = _take(
        given.batch, intervention, "no batch with 'image_id'", "Give the batch.", "image_id"
    )
    if len(ids) != len(value):
        raise ConfigError(
            f"intervention:{intervention.site}",
            f"the batch has {len(ids)} image_id, {len(value)} images pass",
            "Give the batch that passes.",
        )
    return [_generator(intervention.site, intervention.seed, image) for image in ids.tolist()]


def _generator(*key: object) -> torch.Generator:
    number = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(number, "little"))
