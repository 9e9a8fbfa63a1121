"""Parts of Stage 2 that end in voxels: holistic heads, the residual decoder, the amplitude."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chasm.errors import ConfigError
from chasm.models.readout import SpatialReadout
from chasm.parcellation import Parcellation


class DenseHead(nn.Module):
    """Flattened tokens to voxels through one hidden layer (CHASMBrain's holistic head).

    Linear, LayerNorm, GELU, dropout, Linear. With 128 tokens of width 384, 4096 hidden units and
    15,724 voxels these two matrices hold 266 of Stage 2's 275 million parameters.

    Parameters
    ----------
    n_tokens, d_model
        Tokens and their width.
    n_voxels
        Outputs.
    d_hidden
        Width of the hidden layer.
    dropout
        On the hidden layer.
    bias
        Whether the first matrix has a bias; the LayerNorm after it has one anyway.
    """

    def __init__(
        self,
        n_tokens: int,
        d_model: int,
        n_voxels: int,
        d_hidden: int,
        dropout: float,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(n_tokens * d_model, d_hidden, bias=bias),
            nn.LayerNorm(d_hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(d_hidden, n_voxels),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (images, tokens, d_model) to (images, voxels)."""
        voxels: Tensor = self.layers(tokens.flatten(1))
        return voxels


def holistic_head(
    kind: str,
    n_tokens: int,
    d_model: int,
    n_voxels: int,
    d_hidden: int,
    rank: int,
    dropout: float,
) -> nn.Module:
    """Make the head that reads every voxel from all query tokens.

    Parameters
    ----------
    kind
        "dense": `DenseHead` (paper); "low_rank": the same with `rank` hidden units and no first
        bias; "query": `SpatialReadout`, where every voxel has its own weights over tokens and
        over channels, tokens + d_model + 1 numbers per voxel.
    n_tokens, d_model
        Query tokens and their width.
    n_voxels
        Outputs.
    d_hidden, rank
        Hidden units of the dense and of the low-rank head.
    dropout
        Inside the head.

    Raises
    ------
    ConfigError
        If `kind` is none of these.
    """
    if kind == "dense":
        return DenseHead(n_tokens, d_model, n_voxels, d_hidden, dropout)
    if kind == "low_rank":
        return DenseHead(n_tokens, d_model, n_voxels, rank, dropout, bias=False)
    if kind == "query":
        return SpatialReadout(d_model, n_tokens, n_voxels, dropout)
    raise ConfigError("model:head", f"found {kind!r}", "Use one of: dense, low_rank, query, none.")


class ResidualDecoder(nn.Module):
    """Parcel tokens to voxels: the value of the voxel's parcel plus what the token says.

    One MLP (Linear, LayerNorm, GELU, dropout, Linear), the same for all parcels, gives each
    token as many numbers as the largest parcel has voxels; smaller parcels use the first ones.
    Voxels without a parcel come from a linear map of the visual token.

    With `mix`, a voxel starts from the value of its parcel too, but has its own trained weights
    over all parcels: voxels of one parcel differ, and a voxel is like others elsewhere.

    Parameters
    ----------
    parcellation
        Which parcel each voxel belongs to.
    d_model, d_hidden
        Width of a token and of the hidden layer.
    dropout
        On the hidden layer.
    mix
        Whether voxels have weights over parcels (not in the paper).
    """

    place: Tensor
    """(voxels,), where each voxel stands in [parcels x largest size, voxels without a parcel]."""

    def __init__(
        self,
        parcellation: Parcellation,
        d_model: int,
        d_hidden: int,
        dropout: float,
        mix: bool = False,
    ) -> None:
        super().__init__()
        place, largest, outside = voxel_places(parcellation)
        self.register_buffer("place", place)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, d_hidden),
            nn.LayerNorm(d_hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(d_hidden, largest),
        )
        self.outside = nn.Linear(d_model, outside) if outside else None
        self.mixing = nn.Linear(parcellation.n_parcels, parcellation.n_voxels) if mix else None
        if self.mixing is not None:
            own = torch.eye(parcellation.n_parcels, device=parcellation.labels.device)
            with torch.no_grad():
                self.mixing.weight.copy_(parcellation.expand(own).T)
            nn.init.zeros_(self.mixing.bias)

    def forward(self, visual: Tensor, tokens: Tensor, parcels: Tensor) -> Tensor:
        """Predict voxels.

        Parameters
        ----------
        visual
            (images, d_model), the visual token.
        tokens
            (images, parcels, d_model).
        parcels
            (images, parcels), predicted parcel values.

        Returns
        -------
        Tensor
            (images, voxels), in the order of the voxels.
        """
        values = self.mlp(tokens)
        if self.mixing is None:
            values = parcels.unsqueeze(-1) + values
        values = values.flatten(1)
        if self.outside is not None:
            values = torch.cat([values, self.outside(visual)], dim=1)
        voxels: Tensor = values[:, self.place]
        return voxels if self.mixing is None else voxels + self.mixing(parcels)


def voxel_places(parcellation: Parcellation) -> tuple[Tensor, int, int]:
    """Lay voxels out parcel by parcel, each padded to the largest, then those without a parcel.

    Returns
    -------
    place
        (voxels,), int64: position of each voxel in that layout. Voxels of a parcel keep their
        order.
    largest
        Voxels of the largest parcel.
    outside
        Voxels without a parcel.
    """
    labels, sizes = parcellation.labels, parcellation.sizes
    largest = int(sizes.max())
    order = torch.argsort(labels, stable=True)
    outside = int((labels < 0).sum())
    lone, members = order[:outside], order[outside:]
    rank = torch.arange(len(members), device=labels.device)
    rank = rank - (sizes.cumsum(0) - sizes)[labels[members]]
    place = torch.empty_like(labels)
    place[members] = labels[members] * largest + rank
    place[lone] = len(sizes) * largest + torch.arange(outside, device=labels.device)
    return place, largest, outside


class Amplitude(nn.Module):
    """A factor per image for all voxels: sigmoid(MLP(visual token)) times a learned bound.

    The MLP is Linear, GELU, Linear.

    Parameters
    ----------
    d_model, d_hidden
        Width of the token and of the hidden layer.
    bound
        Initial value of the learned bound; at the start the factor is near half of it.
    """

    def __init__(self, d_model: int, d_hidden: int, bound: float) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(d_model, d_hidden), nn.GELU(), nn.Linear(d_hidden, 1))
        self.bound = nn.Parameter(torch.tensor(bound))

    def forward(self, visual: Tensor) -> Tensor:
        """Map (images, d_model) to (images, 1)."""
        factor: Tensor = self.mlp(visual).sigmoid() * self.bound
        return factor
