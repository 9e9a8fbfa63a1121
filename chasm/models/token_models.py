"""The models that the dual-stream encoder is compared with: one sequence [CLS tokens ; patches].

They differ only in what passes between tokens: nothing (MLP), a recurrence (GRU, LSTM), a
selective scan (one-stream Mamba) or attention (Transformer). Embedding and readout are the same.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from chasm.errors import ConfigError
from chasm.models.checks import check_choice, check_sizes
from chasm.models.cuda_packages import Block
from chasm.models.mamba import Direction, mamba_blocks
from chasm.models.readout import Readout
from chasm.models.sequence import SequenceEncoder


class MLPEncoder(SequenceEncoder):
    """Every token by itself: residual blocks of LayerNorm, Linear, GELU, Linear.

    Parameters
    ----------
    cls_width, n_cls, patch_width, n_patches, n_parcels
        Sizes of the data, see `ParcelEncoder`.
    d_model, d_head, token_noise, readout
        See `SequenceEncoder`.
    layers
        Residual blocks.
    d_feedforward
        Hidden width of a block.
    dropout
        Of the residual branches and of the readout.

    Raises
    ------
    ConfigError
        If a size is below 1 or `readout` is unknown.
    """

    title = "MLP"

    def __init__(
        self,
        cls_width: int,
        n_cls: int,
        patch_width: int,
        n_patches: int,
        n_parcels: int,
        d_model: int = 512,
        layers: int = 2,
        d_feedforward: int = 2048,
        d_head: int = 256,
        dropout: float = 0.0,
        token_noise: float = 0.1,
        readout: Readout = "pooled",
    ) -> None:
        super().__init__(
            cls_width, n_cls, patch_width, n_patches, n_parcels,
            d_model, d_head, dropout, token_noise, readout,
        )  # fmt: skip
        check_sizes(layers=layers, d_feedforward=d_feedforward)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(d_model),
                nn.Linear(d_model, d_feedforward),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(d_feedforward, d_model),
                nn.Dropout(dropout),
            )
            for _ in range(layers)
        )

    def mix(self, tokens: Tensor) -> Tensor:
        """Map (images, tokens, d_model) to the same shape."""
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return tokens


class RecurrentEncoder(SequenceEncoder):
    """A GRU or an LSTM along the sequence, from the CLS tokens through the patches.

    Parameters
    ----------
    cls_width, n_cls, patch_width, n_patches, n_parcels
        Sizes of the data, see `ParcelEncoder`.
    cell
        "gru" or "lstm".
    d_model, d_head, token_noise, readout
        See `SequenceEncoder`; `d_model` is also the width of the state.
    layers
        Recurrent layers.
    dropout
        Between recurrent layers and in the readout.

    Raises
    ------
    ConfigError
        If a size is below 1, or `cell` or `readout` is unknown.
    """

    def __init__(
        self,
        cls_width: int,
        n_cls: int,
        patch_width: int,
        n_patches: int,
        n_parcels: int,
        cell: Literal["gru", "lstm"] = "gru",
        d_model: int = 512,
        layers: int = 2,
        d_head: int = 256,
        dropout: float = 0.0,
        token_noise: float = 0.1,
        readout: Readout = "pooled",
    ) -> None:
        super().__init__(
            cls_width, n_cls, patch_width, n_patches, n_parcels,
            d_model, d_head, dropout, token_noise, readout,
        )  # fmt: skip
        check_choice("cell", cell, ("gru", "lstm"))
        check_sizes(layers=layers)
        self.title = cell.upper()
        kind = nn.GRU if cell == "gru" else nn.LSTM
        between = dropout if layers > 1 else 0.0
        self.recurrence = kind(d_model, d_model, layers, batch_first=True, dropout=between)

    def mix(self, tokens: Tensor) -> Tensor:
        """Map (images, tokens, d_model) to the states of the last layer, same shape."""
        states: Tensor = self.recurrence(tokens)[0]
        return states


class OneStreamMamba(SequenceEncoder):
    """Residual Mamba blocks over the joint sequence: the dual-stream encoder without its streams.

    Parameters
    ----------
    cls_width, n_cls, patch_width, n_patches, n_parcels
        Sizes of the data, see `ParcelEncoder`.
    d_model, d_head, token_noise, readout
        See `SequenceEncoder`.
    blocks
        Residual Mamba blocks.
    d_state, d_conv, expand
        Of the Mamba layers.
    dropout
        Of the residual branches and of the readout.
    direction
        "forward", or "alternate": every second block runs backward.
    block_norm
        Whether blocks have a LayerNorm before the Mamba layer.
    residual_clamp
        Largest magnitude of a residual branch, or None.
    full_precision
        Whether Mamba layers run in float32 under autocast.
    scan
        Back end of the scan.
    block, headdim
        Layer of the blocks, "mamba" or "mamba2", and channels per head of the latter (None: by
        `chasm.models.mamba2.default_headdim`).

    Raises
    ------
    ConfigError
        If a size is below 1, or `readout` or `direction` is unknown.
    """

    title = "one-stream Mamba"

    def __init__(
        self,
        cls_width: int,
        n_cls: int,
        patch_width: int,
        n_patches: int,
        n_parcels: int,
        d_model: int = 512,
        blocks: int = 6,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        d_head: int = 256,
        dropout: float = 0.0,
        token_noise: float = 0.1,
        readout: Readout = "pooled",
        direction: Direction = "forward",
        block_norm: bool = False,
        residual_clamp: float | None = None,
        full_precision: bool = True,
        scan: str = "auto",
        block: Block = "mamba",
        headdim: int | None = None,
    ) -> None:
        super().__init__(
            cls_width, n_cls, patch_width, n_patches, n_parcels,
            d_model, d_head, dropout, token_noise, readout,
        )  # fmt: skip
        check_sizes(blocks=blocks, d_state=d_state, d_conv=d_conv, expand=expand)
        if block == "mamba2":
            self.title = f"{self.title} (Mamba-2)"
        self.blocks = nn.Sequential(
            *mamba_blocks(
                blocks,
                d_model,
                direction=direction,
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
        )

    def mix(self, tokens: Tensor) -> Tensor:
        """Map (images, tokens, d_model) to the same shape."""
        mixed: Tensor = self.blocks(tokens)
        return mixed


class TransformerEncoder(SequenceEncoder):
    """Self-attention over the joint sequence (torch's layers, norm first, GELU).

    The defaults have 20.2 million parameters at the paper's sizes (768-wide tokens, 524 parcels);
    the paper's Transformer has 19.8 million, its shape is not published.

    Parameters
    ----------
    cls_width, n_cls, patch_width, n_patches, n_parcels
        Sizes of the data, see `ParcelEncoder`.
    d_model, d_head, token_noise, readout
        See `SequenceEncoder`.
    layers, heads
        Layers, and attention heads of each.
    d_feedforward
        Hidden width of a layer.
    dropout
        Of attention, of the residual branches and of the readout.

    Raises
    ------
    ConfigError
        If a size is below 1, `heads` does not divide `d_model`, or `readout` is unknown.
    """

    title = "Transformer"

    def __init__(
        self,
        cls_width: int,
        n_cls: int,
        patch_width: int,
        n_patches: int,
        n_parcels: int,
        d_model: int = 512,
        layers: int = 6,
        heads: int = 8,
        d_feedforward: int = 2048,
        d_head: int = 256,
        dropout: float = 0.0,
        token_noise: float = 0.1,
        readout: Readout = "pooled",
    ) -> None:
        super().__init__(
            cls_width, n_cls, patch_width, n_patches, n_parcels,
            d_model, d_head, dropout, token_noise, readout,
        )  # fmt: skip
        check_sizes(layers=layers, heads=heads, d_feedforward=d_feedforward)
        if d_model % heads:
            raise ConfigError(
                "model:heads", f"{heads} heads for a width of {d_model}", "Use a divisor of it."
            )
        layer = nn.TransformerEncoderLayer(
            d_model, heads, d_feedforward, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.attention = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def mix(self, tokens: Tensor) -> Tensor:
        """Map (images, tokens, d_model) to the same shape."""
        mixed: Tensor = self.attention(tokens)
        return mixed
