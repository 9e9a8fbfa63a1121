"""The scan's kernels as operators of torch: with autograd, under torch.compile, in DDP.

``torch.ops.chasm.selective_scan`` gives the output and the states that its backward operator needs;
both have a fake kernel, so that torch.compile knows their shapes without looking inside.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from chasm.models.scan_arguments import (
    ScanArguments,
    ScanKernel,
    accumulation_dtype,
    empty_sequence,
    n_parts,
)

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, bool delta_softplus"
)


@cache
def kernel(name: str) -> ScanKernel:
    """Give the kernel "numba" or "torch"; numba is imported when it is first asked for."""
    if name == "numba":
        from chasm.models.numba_scan import NumbaScan

        return NumbaScan()
    from chasm.models.checkpointed_scan import CheckpointedScan

    return CheckpointedScan()


def differentiable_scan(x: ScanArguments, name: str) -> Tensor:
    """Scan by a kernel, recorded by autograd: (batch, channels, time), dtype of `u`."""
    tensors = (value for value in x if isinstance(value, Tensor))
    keep = torch.is_grad_enabled() and any(value.requires_grad for value in tensors)
    y, _ = torch.ops.chasm.selective_scan(*x, name, keep)
    return y


@torch.library.custom_op(
    "chasm::selective_scan",
    mutates_args=(),
    schema=f"({_INPUTS}, str kernel, bool keep) -> (Tensor, Tensor)",
)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, name, keep = arguments
    return kernel(name).forward(ScanArguments(*inputs), keep)


@_forward.register_fake
def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, keep = ScanArguments(*arguments[:9]), arguments[10]
    batch, channels, n_steps = x.u.shape
    shape = (batch, n_parts(n_steps) if keep else 0, x.A.shape[1], channels)
    return empty_sequence(x.u), x.u.new_empty(shape, dtype=accumulation_dtype(x.u))


@torch.library.custom_op(
    "chasm::selective_scan_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, str kernel, Tensor kept, Tensor grad) -> Tensor[]",
)
def _backward(*arguments: Any) -> list[Tensor]:
    *inputs, name, kept, grad = arguments
    found = kernel(name).backward(ScanArguments(*inputs), kept, grad)
    return [value for value in found if value is not None]


@_backward.register_fake
def _fake_backward(*arguments: Any) -> list[Tensor]:
    inputs: tuple[Tensor | None, ...] = arguments[:8]
    return [
        empty_sequence(value) if value.ndim == 3 else value.new_empty(value.shape)
        for value in inputs
        if value is not None
    ]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, ctx.kernel, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for it would take as much memory again
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    *tensors, kept = ctx.saved_tensors
    found = iter(
        torch.ops.chasm.selective_scan_backward(*tensors, ctx.softplus, ctx.kernel, kept, grad)
    )
    by_input = (None if value is None else next(found) for value in tensors)
    return *by_input, None, None, None


_forward.register_autograd(_differentiate, setup_context=_remember)
