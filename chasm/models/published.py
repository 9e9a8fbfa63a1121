"""Stage 1 with the wiring of the published code, where it differs from the paper's text."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chasm.models.cuda_packages import Block
from chasm.models.stage1 import DualStreamEncoder


class PublishedEncoder(DualStreamEncoder):
    """Stage 1 as CHASMBrain's code computes it (``model/hierarchical_v3_1.py``).

    The text leaves open what the gate and the contrastive head see of the local stream. In the
    code it is not the mean token but the hidden layer of its head (half of `d_model`): the gate
    sees it padded with zeros to `d_model`, the contrastive head sees it beside the global
    features. Hidden widths follow their inputs and branches are clamped to +-10.

    Parameters
    ----------
    cls_width, n_cls, patch_width, n_patches, n_parcels
        See `chasm.models.encoder.ParcelEncoder`; the published code has one CLS token.
    d_model, global_blocks, local_blocks, d_state, d_conv, expand
        See `DualStreamEncoder`.
    dropout, token_noise, d_embedding, full_precision, scan, block, headdim
        See `DualStreamEncoder`; the defaults are those of the published configuration.

    Raises
    ------
    ConfigError
        If a size is below 1.
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
        dropout: float = 0.4,
        token_noise: float = 0.1,
        d_embedding: int = 256,
        full_precision: bool = True,
        scan: str = "auto",
        block: Block = "mamba",
        headdim: int | None = None,
    ) -> None:
        super().__init__(
            cls_width,
            n_cls,
            patch_width,
            n_patches,
            n_parcels,
            d_model=d_model,
            global_blocks=global_blocks,
            local_blocks=local_blocks,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dropout=dropout,
            token_noise=token_noise,
            residual_clamp=10.0,
            full_precision=full_precision,
            d_head=d_model // 2,
            d_gate=d_model,
            d_embedding=d_embedding,
            scan=scan,
            block=block,
            headdim=headdim,
        )
        self.contrastive.visual = _projection(d_model + d_model // 2, d_embedding)
        self.contrastive.response = _projection(n_parcels, d_embedding)

    def fuse(self, global_features: Tensor, local_features: Tensor) -> tuple[Tensor, Tensor]:
        """Give the gate and the visual embedding; see `DualStreamEncoder.fuse`."""
        norm, linear, gelu, *_ = self.local_stream.head.children()
        hidden = gelu(linear(norm(local_features)))
        padding = local_features.shape[-1] - hidden.shape[-1]
        gate = self.gate_site(self.gate(global_features, F.pad(hidden, (0, padding))))
        return gate, self.contrastive.visual(torch.cat([global_features, hidden], dim=-1))


def _projection(width: int, d_embedding: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, d_embedding),
        nn.LayerNorm(d_embedding),
    )
