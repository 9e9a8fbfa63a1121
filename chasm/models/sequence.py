"""CLS and patch tokens as one sequence: what the models over it have in common."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from chasm.models.checks import check_choice, check_sizes
from chasm.models.encoder import ParcelEncoder, Stage1Output, normalised
from chasm.models.readout import Readout, SpatialReadout


class TokenSequence(nn.Module):
    """CLS and patch tokens as one sequence of one width.

    A Linear for each kind, plus learned positions, then LayerNorm.

    Parameters
    ----------
    cls_width, n_cls, patch_width, n_patches
        Widths and numbers of the two kinds of tokens.
    d_model
        Width of the sequence.
    """

    def __init__(
        self, cls_width: int, n_cls: int, patch_width: int, n_patches: int, d_model: int
    ) -> None:
        super().__init__()
        self.cls = nn.Linear(cls_width, d_model)
        self.patches = nn.Linear(patch_width, d_model)
        self.position = nn.Parameter(torch.empty(n_cls + n_patches, d_model))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, cls: Tensor, patches: Tensor) -> Tensor:
        """Map (images, n_cls, .) and (images, n_patches, .) to (images, tokens, d_model)."""
        return self.norm(torch.cat([self.cls(cls), self.patches(patches)], 1) + self.position)


class SequenceReadout(nn.Module):
    """Tokens of the sequence to parcels.

    Parameters
    ----------
    n_cls, n_patches
        Tokens of each kind, CLS tokens first.
    n_parcels
        Outputs.
    d_model, d_hidden
        Width of a token and of the hidden layer.
    dropout
        Before the last layer.
    kind
        "pooled": the mean CLS token beside the mean patch, LayerNorm, Linear, GELU, Linear;
        "spatial": a `SpatialReadout` of the patches plus LayerNorm and Linear of the mean CLS
        token.
    """

    def __init__(
        self,
        n_cls: int,
        n_patches: int,
        n_parcels: int,
        d_model: int,
        d_hidden: int,
        dropout: float,
        kind: Readout,
    ) -> None:
        super().__init__()
        self.n_cls, self.kind = n_cls, kind
        if kind == "spatial":
            self.patches = SpatialReadout(d_model, n_patches, n_parcels, dropout)
            self.cls = nn.Sequential(
                nn.LayerNorm(d_model), nn.Dropout(dropout), nn.Linear(d_model, n_parcels)
            )
            return
        self.head = nn.Sequential(
            nn.LayerNorm(2 * d_model),
            nn.Linear(2 * d_model, d_hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(d_hidden, n_parcels),
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Map (images, tokens, d_model) to the mean patch (images, d_model) and the parcels."""
        cls, patches = tokens[:, : self.n_cls].mean(1), tokens[:, self.n_cls :]
        pooled = patches.mean(1)
        if self.kind == "spatial":
            return pooled, self.cls(cls) + self.patches(patches)
        return pooled, self.head(torch.cat([cls, pooled], dim=-1))


class SequenceEncoder(ParcelEncoder):
    """Base of the models over the joint sequence: embed, `mix`, read out.

    Parameters
    ----------
    cls_width, n_cls, patch_width, n_patches, n_parcels
        Sizes of the data, see `ParcelEncoder`.
    d_model, d_head
        Width of the tokens and of the hidden layer of the pooled readout.
    dropout
        Of the readout.
    token_noise
        Standard deviation of Gaussian noise on the scaled tokens in training.
    readout
        "pooled" or "spatial", see `SequenceReadout`.

    Raises
    ------
    ConfigError
        If a size is below 1 or `readout` is unknown.
    """

    def __init__(
        self,
        cls_width: int,
        n_cls: int,
        patch_width: int,
        n_patches: int,
        n_parcels: int,
        d_model: int,
        d_head: int,
        dropout: float,
        token_noise: float,
        readout: Readout,
    ) -> None:
        super().__init__(cls_width, n_cls, patch_width, n_patches, n_parcels, token_noise)
        check_sizes(d_model=d_model, d_head=d_head)
        check_choice("readout", readout, ("pooled", "spatial"))
        self.embedding = TokenSequence(cls_width, n_cls, patch_width, n_patches, d_model)
        self.readout = SequenceReadout(
            n_cls, n_patches, n_parcels, d_model, d_head, dropout, readout
        )

    def mix(self, tokens: Tensor) -> Tensor:
        """Map (images, tokens, d_model) to the same shape."""
        raise NotImplementedError

    head_names = ("readout",)

    def backbone(self, streams: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give the mixed tokens."""
        scaled = self.scaled(streams["features.cls"], streams["features.patches"])
        return {"tokens": self.mix(self.embedding(*scaled))}

    def read_out(self, backbone: Mapping[str, Tensor]) -> Stage1Output:
        """Predict a batch from the mixed tokens."""
        features, parcels = self.readout(backbone["tokens"])
        return Stage1Output(parcels, local_features=features)

    def features_of(self, backbone: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give the mean CLS token, and the patches or, with a pooled readout, their mean."""
        tokens, n_cls = backbone["tokens"], self.readout.n_cls
        cls, patches = tokens[:, :n_cls].mean(1), tokens[:, n_cls:]
        local = patches if self.readout.kind == "spatial" else patches.mean(1)
        return {"global": normalised(cls), "local": normalised(local)}
