"""The closed-form partner of a network: banded ridge on the flattened tokens, as a module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from chasm.errors import ConfigError
from chasm.models.sites import Site


class SpacePath(nn.Module):
    """Features of one space to units, directly or through `rank` components that units share.

    Parameters
    ----------
    n_features, n_units
        Inputs and outputs.
    rank
        Components; None, or not fewer than features, for a direct map.
    """

    def __init__(self, n_features: int, n_units: int, rank: int | None) -> None:
        super().__init__()
        direct = rank is None or rank >= n_features
        self.projection = nn.Linear(n_features, n_units if rank is None or direct else rank)
        self.readout = None if rank is None or direct else nn.Linear(rank, n_units, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map (images, features) to (images, units)."""
        projected: Tensor = self.projection(features)
        return projected if self.readout is None else self.readout(projected)


class RidgeHead(nn.Module):
    """Linear prediction from feature spaces, with weights that are solved, not trained.

    Each space's part is centred on the train images, so that the prediction is
    ``bias + the sum of the parts`` with `bias` the train mean of the responses.

    Parameters
    ----------
    n_features
        Features of each space, by its name.
    n_units
        Parcels or voxels.
    rank
        Units read at most this many principal components of each space, which they share;
        None reads the features themselves.

    Attributes
    ----------
    fitted : bool tensor, whether weights were put in (part of the state dict).

    Raises
    ------
    ConfigError
        `rank` is below 1.
    """

    fitted: Tensor
    bias: Tensor

    def __init__(self, n_features: Mapping[str, int], n_units: int, rank: int | None) -> None:
        super().__init__()
        if rank is not None and rank < 1:
            raise ConfigError("model.linear_rank", f"found {rank}", "Use 1 or more, or null.")
        self.rank = rank
        for name, count in n_features.items():
            self.add_module(name, SpacePath(count, n_units, rank))
        self.bias = nn.Parameter(torch.zeros(n_units))
        self.register_buffer("fitted", torch.tensor(False))
        self.requires_grad_(False)

    @property
    def n_weights(self) -> int:
        """Numbers that were solved: weights, and an intercept for every unit."""
        return self.bias.numel() + sum(
            layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear)
        )

    def part(self, space: str, features: Tensor) -> Tensor:
        """Give the (images, units) share of a space from (images, ..., its features)."""
        # Folded means are large next to what is left after them: never in half precision.
        with torch.autocast(features.device.type, enabled=False):
            share: Tensor = self.get_submodule(space)(features.flatten(1).to(self.bias.dtype))
        return share

    def from_features(self, features: Mapping[str, Tensor]) -> Tensor:
        """Predict (images, units) from the (images, features) of each space."""
        predicted = self.bias
        for space, values in features.items():
            predicted = predicted + self.part(space, values)
        return predicted


class LinearPath(RidgeHead):
    """A `RidgeHead` on the flattened tokens as the backbone gives them.

    The scaling of the tokens is folded into the weights.

    Parameters
    ----------
    n_cls_features, n_patch_features
        Length of the flattened tokens of each space.
    n_units
        Parcels or voxels.
    rank
        See `RidgeHead`. 256 patches of width 768 are 196,608 features: with 15,724 voxels that
        is 3.1 G weights, and 217 M at rank 1024.
    name
        Beginning of the names of its two sites.
    """

    def __init__(
        self,
        n_cls_features: int,
        n_patch_features: int,
        n_units: int,
        rank: int | None = None,
        name: str = "linear",
    ) -> None:
        super().__init__({"cls": n_cls_features, "patches": n_patch_features}, n_units, rank)
        self.cls_site = Site(f"{name}.cls", "global")
        self.patches_site = Site(f"{name}.patches", "local")

    def parts(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Give each space's share of the prediction.

        Parameters
        ----------
        cls, patches
            (images, n_cls, cls_width) and (images, n_patches, patch_width), as the backbone
            gives them, not scaled.

        Returns
        -------
        tuple of Tensor
            Two (images, units).
        """
        return self.part("cls", cls), self.part("patches", patches)

    def forward(self, cls: Tensor, patches: Tensor) -> Tensor:
        """Predict (images, units); see `parts` for the tokens."""
        return self.from_streams(self.streams(cls, patches))

    def streams(self, cls: Tensor, patches: Tensor) -> dict[str, Tensor]:
        """Give `parts` by the names of their sites."""
        of_cls, of_patches = self.parts(cls, patches)
        return {self.cls_site.name: of_cls, self.patches_site.name: of_patches}

    def from_streams(self, streams: Mapping[str, Tensor]) -> Tensor:
        """Predict (images, units) from what `streams` gave."""
        of_cls = self.cls_site(streams[self.cls_site.name])
        return self.bias + of_cls + self.patches_site(streams[self.patches_site.name])


def best_share(target: Tensor, network: Tensor, linear: Tensor) -> Tensor:
    """Weight of the linear prediction that has the least squared error against a target.

    The minimum of ``|target - (1 - s) network - s linear|^2`` over 0 <= s <= 1, in float64.

    Parameters
    ----------
    target, network, linear
        (images, units).

    Returns
    -------
    Tensor
        Scalar; 0 where both predictions are the same.
    """
    difference = (linear - network).double()
    power = difference.square().sum()
    if power == 0:
        return power
    return ((target - network).double() * difference).sum().div(power).clamp(0, 1)
