"""A factorised spatial readout: where each parcel looks, and what it looks for."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Readout = Literal["pooled", "spatial"]
"""Mean over the patches, or a `SpatialReadout` of them."""


class SpatialReadout(nn.Module):
    """Read every parcel from all tokens with weights that factor into place and feature.

    Parcel k is ``sum_p where[k, p] * (what[k] . norm(token[p])) + bias[k]``. Averaging tokens,
    as the paper's head does, forgets where in the image something was; areas with small
    receptive fields need it. The factorisation keeps the count at patches + width per parcel
    (Klindt et al. 2017, "Neural system identification for large populations").

    Parameters
    ----------
    d_model
        Width of a token.
    n_patches
        Tokens, in raster order.
    n_parcels
        Outputs.
    dropout
        On the normalised tokens.
    """

    def __init__(self, d_model: int, n_patches: int, n_parcels: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.where = nn.Parameter(torch.full((n_parcels, n_patches), 1.0 / n_patches))
        self.what = nn.Linear(d_model, n_parcels, bias=False)
        self.bias = nn.Parameter(torch.zeros(n_parcels))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (images, patches, d_model) to (images, parcels)."""
        drive = self.what(self.dropout(self.norm(tokens)))
        return (drive * self.where.T).sum(1) + self.bias
