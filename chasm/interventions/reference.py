"""What operations need to know of the train images: moments per site, constants, linear maps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class TokenScatter(NamedTuple):
    """Moments of one vector per image, over train images; float64."""

    mean: Tensor
    """(width,)."""
    covariance: Tensor
    """(width, width)."""


class LinearMap(NamedTuple):
    """Patches from CLS: ``patches_mean + (cls - cls_mean) @ weights``; float32."""

    cls_mean: Tensor
    """(features,), of the flattened CLS tokens."""
    weights: Tensor
    """(features, patches * width)."""


@dataclass
class Reference:
    """Statistics of train images, in plain tensors.

    Attributes
    ----------
    mean, variance
        Site to the mean and variance of each element of one image's tensor, float32.
    optimal
        Site to a constant, shaped as the site's mean; see `chasm.interventions.fit_optimal`.
    sources
        Site of tokens to the moments of the vector that ``route_swap`` takes from it; see
        `swap_source`.
    patches_from_cls
        What ``residualise`` subtracts; see `chasm.interventions.fit_patches_from_cls`.
    """

    mean: dict[str, Tensor] = field(default_factory=dict)
    variance: dict[str, Tensor] = field(default_factory=dict)
    optimal: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, TokenScatter] = field(default_factory=dict)
    patches_from_cls: LinearMap | None = None


def swap_source(site: str, tokens: Tensor) -> Tensor:
    """Give the vector (images, width) that ``route_swap`` takes from tokens (images, n, width).

    That is the last CLS token, of the layer that the patches come from, or the mean patch.
    """
    return tokens[:, -1] if site == "features.cls" else tokens.mean(1)


class Moments:
    """Mean and variance of each element over images, batch by batch in float64 (Chan et al.).

    Attributes
    ----------
    n : images seen.
    mean : (...), of the elements.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self._power = torch.zeros((), dtype=torch.float64)

    def update(self, values: Tensor) -> None:
        """Take (images, ...) in."""
        values = values.detach().to("cpu", torch.float64)
        mean = values.mean(0)
        shift, share = mean - self.mean, len(values) / (self.n + len(values))
        power = self.power_of(values - mean) + self.power_of(shift[None]) * (self.n * share)
        self._power = self._power + power
        self.mean = self.mean + shift * share
        self.n += len(values)

    def power_of(self, centred: Tensor) -> Tensor:
        """Sum of squares over the first axis."""
        return centred.square().sum(0)

    @property
    def variance(self) -> Tensor:
        """(...), divided by the number of images."""
        return self._power / self.n


class Covariance(Moments):
    """The same with all covariances between the elements of a vector."""

    def power_of(self, centred: Tensor) -> Tensor:
        """Sum of outer products over the first axis, (width, width)."""
        return centred.T @ centred
