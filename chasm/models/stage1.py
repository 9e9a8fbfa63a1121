"""Stage 1: tokens of an image to parcel responses through a global and a local Mamba stream."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from chasm.models.checks import check_choice, check_sizes
from chasm.models.cuda_packages import Block
from chasm.models.encoder import ParcelEncoder, Stage1Output, normalised
from chasm.models.mamba import Direction, ResidualMamba, mamba_blocks
from chasm.models.readout import Readout, SpatialReadout
from chasm.models.sites import Site

GateKind = Literal["image", "parcel"]


class GlobalStream(nn.Module):
    """CLS tokens to parcels: the "what" route.

    Linear, LayerNorm, residual Mamba blocks over the CLS tokens (one per backbone layer, in the
    backbone's order), mean over them, then LayerNorm and Linear.

    Parameters
    ----------
    width
        Width of a CLS token.
    n_parcels
        Outputs.
    d_model
        Width inside.
    blocks
        Residual Mamba blocks, used in order.
    dropout
        Before the head.
    """

    def __init__(
        self, width: int, n_parcels: int, d_model: int, blocks: list[ResidualMamba], dropout: float
    ) -> None:
        super().__init__()
        self.projection = nn.Linear(width, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(
            nn.LayerNorm(d_model), nn.Dropout(dropout), nn.Linear(d_model, n_parcels)
        )

    def forward(self, cls: Tensor) -> Tensor:
        """Map (images, layers, width) to the (images, d_model) that the head reads."""
        features: Tensor = self.blocks(self.norm(self.projection(cls))).mean(1)
        return features


class LocalStream(nn.Module):
    """Patch tokens to parcels: the "where" route.

    Linear, learned position embedding, LayerNorm, residual Mamba blocks over the patches in
    raster order, then the readout: mean over patches, LayerNorm, Linear, GELU and Linear, or a
    `SpatialReadout`.

    Parameters
    ----------
    width
        Width of a patch token.
    n_patches
        Patches, in raster order.
    n_parcels
        Outputs.
    d_model, d_hidden
        Width inside and in the head.
    blocks
        Residual Mamba blocks, used in order.
    dropout
        In the head.
    readout
        "pooled" or "spatial".
    """

    def __init__(
        self,
        width: int,
        n_patches: int,
        n_parcels: int,
        d_model: int,
        d_hidden: int,
        blocks: list[ResidualMamba],
        dropout: float,
        readout: Readout,
    ) -> None:
        super().__init__()
        self.projection = nn.Linear(width, d_model)
        self.position = nn.Parameter(torch.empty(n_patches, d_model))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.norm = nn.LayerNorm(d_model)
        self.blocks = nn.Sequential(*blocks)
        self.readout = readout
        if readout == "spatial":
            self.head: nn.Module = SpatialReadout(d_model, n_patches, n_parcels, dropout)
            return
        self.head = nn.Sequential(
            nn.LayerNorm(d_model),
            nn.Linear(d_model, d_hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(d_hidden, n_parcels),
        )

    def forward(self, patches: Tensor) -> Tensor:
        """Map (images, patches, width) to what the head reads.

        Returns
        -------
        Tensor
            (images, d_model), or with a spatial readout (images, patches, d_model).
        """
        tokens: Tensor = self.blocks(self.norm(self.projection(patches) + self.position))
        return tokens if self.readout == "spatial" else tokens.mean(1)

    def pool(self, features: Tensor) -> Tensor:
        """Pool what the head reads to (images, d_model)."""
        return features.mean(1) if self.readout == "spatial" else features


class FusionGate(nn.Module):
    """Shares of the two streams from their pooled features.

    Parameters
    ----------
    d_model
        Width of each stream's features.
    n_gates
        1 for a gate per image (CHASMBrain), or the number of parcels.
    d_hidden
        Width of the hidden layer.
    """

    def __init__(self, d_model: int, n_gates: int, d_hidden: int) -> None:
        super().__init__()
        self.n_gates = n_gates
        self.mlp = nn.Sequential(
            nn.Linear(2 * d_model, d_hidden), nn.GELU(), nn.Linear(d_hidden, 2 * n_gates)
        )

    def forward(self, global_features: Tensor, local_features: Tensor) -> Tensor:
        """Map two (images, d_model) to (images, gates, 2): global and local share, sum 1."""
        logits = self.mlp(torch.cat([global_features, local_features], dim=-1))
        return logits.unflatten(-1, (self.n_gates, 2)).softmax(-1)


class ContrastiveHeads(nn.Module):
    """Projections of visual features and of parcel vectors to one space.

    Each is Linear, GELU, Linear, LayerNorm.

    Parameters
    ----------
    d_model
        Width of the visual features.
    n_parcels
        Length of a parcel vector.
    d_hidden, d_embedding
        Width of the hidden layer and of the common space.
    """

    def __init__(self, d_model: int, n_parcels: int, d_hidden: int, d_embedding: int) -> None:
        super().__init__()
        self.visual = _projection(d_model, d_hidden, d_embedding)
        self.response = _projection(n_parcels, d_hidden, d_embedding)


class DualStreamEncoder(ParcelEncoder):
    """Predict parcel responses from CLS and patch tokens (CHASMBrain, Stage 1).

    The defaults are the paper's sizes; a recipe gives the options that its code sets (dropout,
    clamp). Sizes that depend on the data come first and have no default.

    Parameters
    ----------
    cls_width, n_cls
        Width and number of CLS tokens per image (one per backbone layer).
    patch_width, n_patches
        Width and number of patch tokens per image.
    n_parcels
        Parcels to predict.
    d_model
        Width of both streams.
    global_blocks, local_blocks
        Residual Mamba blocks of each stream.
    d_state, d_conv, expand
        Of the Mamba layers.
    dropout
        Of the residual branches and the heads.
    token_noise
        Standard deviation of Gaussian noise on the scaled tokens in training.
    gate
        "image": one gate per image (paper); "parcel": one per image and parcel.
    direction
        Of the local stream: "forward" through the raster (paper), or "alternate": every second
        block runs backward.
    readout
        Of the local stream: "pooled" over patches (paper), or "spatial": every parcel has its
        own weights over patches.
    block_norm
        Whether blocks have a LayerNorm before the Mamba layer (not in the paper).
    residual_clamp
        Largest magnitude of a residual branch, or None.
    full_precision
        Whether Mamba layers run in float32 under autocast.
    d_head, d_gate, d_contrast, d_embedding
        Hidden width of the local head, the gate and the contrastive heads; their output width.
    scan
        Back end of the scan.
    block, headdim
        Layer of the blocks, "mamba" or "mamba2", and channels per head of the latter (None: by
        `chasm.models.mamba2.default_headdim`).

    Raises
    ------
    ConfigError
        If a size is below 1, or `gate` or `direction` is unknown.
    """

    def __init__(
        self,
        cls_width: int,
        n_cls: int,
        patch_width: int,
        n_patches: int,
        n_parcels: int,
        d_model: int = 512,
        global_blocks: int = 2,
        local_blocks: int = 4,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dropout: float = 0.0,
        token_noise: float = 0.1,
        gate: GateKind = "image",
        direction: Direction = "forward",
        readout: Readout = "pooled",
        block_norm: bool = False,
        residual_clamp: float | None = None,
        full_precision: bool = True,
        d_head: int = 256,
        d_gate: int = 512,
        d_contrast: int = 512,
        d_embedding: int = 256,
        scan: str = "auto",
        block: Block = "mamba",
        headdim: int | None = None,
    ) -> None:
        super().__init__(cls_width, n_cls, patch_width, n_patches, n_parcels, token_noise)
        check_sizes(d_model=d_model)
        check_choice("gate", gate, ("image", "parcel"))
        check_choice("readout", readout, ("pooled", "spatial"))
        blocks = partial(
            mamba_blocks,
            d_model=d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dropout=dropout,
            norm=block_norm,
            clamp=residual_clamp,
            full_precision=full_precision,
            scan=scan,
            block=block,
            headdim=headdim,
        )
        self.global_stream = GlobalStream(
            cls_width, n_parcels, d_model, blocks(global_blocks), dropout
        )
        self.local_stream = LocalStream(
            patch_width,
            n_patches,
            n_parcels,
            d_model,
            d_head,
            blocks(local_blocks, direction=direction),
            dropout,
            readout,
        )
        self.gate = FusionGate(d_model, 1 if gate == "image" else n_parcels, d_gate)
        self.global_site = Site("global.out", "global")
        self.local_site = Site("local.out", "local")
        self.gate_site = Site("gate")
        self.contrastive = ContrastiveHeads(d_model, n_parcels, d_contrast, d_embedding)
        own = ("global_stream.head", "local_stream.head", "contrastive.response")
        self.head_names = own if gate == "image" else (*own, "gate")
        if block == "mamba2":
            self.title = f"{self.title} (Mamba-2)"

    separable = True

    def forward(self, cls: Tensor, patches: Tensor) -> Stage1Output:
        """Predict a batch; see `ParcelEncoder.forward`.

        Returns
        -------
        Stage1Output
            The prediction ``gate[..., 0] * global + gate[..., 1] * local`` and its parts.
        """
        cls, patches = self.scaled(cls, patches)
        # Stream by stream: the order in which dropout draws is part of what a seed gives.
        global_part = self._global_part(self.global_site(self.global_stream(cls)))
        local_part = self._local_part(self.local_site(self.local_stream(patches)))
        return self._fused(global_part, local_part)

    def streams(self, cls: Tensor, patches: Tensor) -> dict[str, Tensor]:
        """Give what each stream's head reads; see `ParcelEncoder.streams`."""
        cls, patches = self.scaled(cls, patches)
        return {"global.out": self.global_stream(cls), "local.out": self.local_stream(patches)}

    def backbone(self, streams: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Let the two streams pass their sites."""
        return {
            "global": self.global_site(streams["global.out"]),
            "local": self.local_site(streams["local.out"]),
        }

    def read_out(self, backbone: Mapping[str, Tensor]) -> Stage1Output:
        """Predict a batch from the two streams; see `forward`."""
        return self._fused(
            self._global_part(backbone["global"]), self._local_part(backbone["local"])
        )

    def features_of(self, backbone: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give both streams; with a spatial readout, every patch of the local one."""
        return {name: normalised(backbone[name]) for name in ("global", "local")}

    def _global_part(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features, self.global_stream.head(features)

    def _local_part(self, read: Tensor) -> tuple[Tensor, Tensor]:
        return self.local_stream.pool(read), self.local_stream.head(read)

    def _fused(
        self, global_part: tuple[Tensor, Tensor], local_part: tuple[Tensor, Tensor]
    ) -> Stage1Output:
        """Fuse the features (images, d_model) and parcels (images, parcels) of both streams."""
        global_features, global_parcels = global_part
        local_features, local_parcels = local_part
        gate, visual = self.fuse(global_features, local_features)
        return Stage1Output(
            gate[..., 0] * global_parcels + gate[..., 1] * local_parcels,
            global_parcels,
            local_parcels,
            gate,
            global_features,
            local_features,
            visual,
        )

    def fuse(self, global_features: Tensor, local_features: Tensor) -> tuple[Tensor, Tensor]:
        """Give the gate and the visual embedding of two (images, d_model)."""
        gate = self.gate_site(self.gate(global_features, local_features))
        share = gate.mean(1)
        fused = share[:, :1] * global_features + share[:, 1:] * local_features
        return gate, self.contrastive.visual(fused)

    def embed_parcels(self, parcels: Tensor) -> Tensor:
        """Embed true parcel vectors (images, parcels) as (images, d_embedding)."""
        embedding: Tensor = self.contrastive.response(parcels)
        return embedding


def _projection(width: int, d_hidden: int, d_embedding: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, d_hidden),
        nn.GELU(),
        nn.Linear(d_hidden, d_embedding),
        nn.LayerNorm(d_embedding),
    )
