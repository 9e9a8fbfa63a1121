"""The short causal convolution of Mamba layers and the activation after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_BLOCK = 2**21
"""Numbers in a block of rows on the CPU: eight megabytes of float32."""


def causal_convolution(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve every channel with its own taps and apply SiLU; the last tap is the token itself.

    Only the inputs are kept for the backward pass, which convolves again; both go through the
    batch in blocks of rows.

    Parameters
    ----------
    u
        (batch, tokens, channels).
    weight
        (channels, 1, taps), as of ``nn.Conv1d``.
    bias
        (channels,), or None.

    Returns
    -------
    Tensor
        (batch, tokens, channels), in the wider dtype of `u` and `weight`.
    """
    if torch.compiler.is_compiling():  # which fuses these steps itself
        return F.silu(_convolve(u, weight, bias))
    y: Tensor = _CausalConvolution.apply(u, weight, bias)
    return y


def at_least_float32(v: Tensor) -> Tensor:
    """Give float16 and bfloat16 as float32, the others as they are."""
    return v.to(torch.promote_types(v.dtype, torch.float32))


class _CausalConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(u, weight, bias)
        y = torch.empty(u.shape, dtype=torch.promote_types(u.dtype, weight.dtype), device=u.device)
        for rows, out in zip(_blocks(u), _blocks(y), strict=True):
            out.copy_(F.silu(_convolve(rows, weight, bias), inplace=True))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        u, weight, bias = ctx.saved_tensors
        taps = weight[:, 0].mT.contiguous()
        d_u = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        d_taps, d_bias = torch.zeros_like(taps), torch.zeros_like(taps[0])
        for rows, out, g in zip(_blocks(u), _blocks(d_u), _blocks(grad), strict=True):
            g = torch.ops.aten.silu_backward(g, _convolve(rows, weight, bias))
            d_bias += g.sum((0, 1))
            d_taps[-1] += (g * rows).sum((0, 1))
            d_rows = g * taps[-1]
            for lag in range(1, min(len(taps), u.shape[1])):
                later = g[:, lag:]
                d_taps[-1 - lag] += (later * rows[:, :-lag]).sum((0, 1))
                d_rows[:, :-lag].addcmul_(later, taps[-1 - lag])
            out.copy_(d_rows)
        return d_u, d_taps.mT.unsqueeze(1), None if bias is None else d_bias


def _convolve(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve, tap by tap."""
    taps = weight[:, 0].mT.contiguous()
    y = u * taps[-1] if bias is None else torch.addcmul(bias, u, taps[-1])
    for lag in range(1, min(len(taps), u.shape[1])):
        y[:, lag:].addcmul_(u[:, :-lag], taps[-1 - lag])
    return y


def _blocks(v: Tensor) -> tuple[Tensor, ...]:
    """Split rows of the batch; a GPU takes all of them at once."""
    if v.device.type != "cpu":
        return (v,)
    return v.split(max(1, _BLOCK // v[0].numel()))
