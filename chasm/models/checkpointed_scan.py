"""The selective scan in plain PyTorch with little memory.

A custom autograd function keeps the state only every C steps (C close to the square root of the
number of steps) and recomputes the states in between when gradients are asked for. Work goes
chunk by chunk of time through a few buffers that are reused, with the channels as the innermost
axis, where every operation is contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_BLOCK = 2**17
"""Numbers in the state of a block of rows: half a megabyte of float32, which fits a CPU's cache."""


def checkpointed_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Scan with states recomputed in the backward pass; shapes as in `selective_scan`.

    Fastest when `u`, `delta` and `z` are transposed views of (batch, time, channels) tensors, as
    a linear layer gives them. A sequence of one step is not scanned at all.
    """
    if u.shape[2] == 1:
        return _single_step(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    result: Tensor = _CheckpointedScan.apply(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return result


def _single_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """Scan one step from the zero state: y = delta * u * <B, C>."""
    dtype = _accumulation_dtype(u)
    with torch.autocast(u.device.type, enabled=False):
        x, step = u.to(dtype), delta.to(dtype)
        if delta_bias is not None:
            step = step + delta_bias.to(dtype)[:, None]
        if delta_softplus:
            step = F.softplus(step)
        y = step * x * (B.to(dtype) * C.to(dtype)).sum(1, keepdim=True)
        y = y + 0 * A.to(dtype).sum()  # A acts from the second step; its gradient is 0, not None
        if D is not None:
            y = y + D.to(dtype)[:, None] * x
        if z is not None:
            y = y * F.silu(z.to(dtype))
    return y.to(u.dtype)


def _accumulation_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


class _Sequence(NamedTuple):
    """Inputs of a scan, for all of the batch or a few rows of it."""

    u: Tensor
    delta: Tensor
    At: Tensor  # (states, channels)
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    softplus: bool

    def rows(self, part: slice) -> _Sequence:
        z = None if self.z is None else self.z[part]
        u, delta, B, C = self.u[part], self.delta[part], self.B[part], self.C[part]
        return self._replace(u=u, delta=delta, B=B, C=C, z=z)


class _Chunk:
    """A few steps of some rows, time first, in the accumulation dtype."""

    def __init__(self, x: _Sequence, part: slice) -> None:
        dtype = x.At.dtype
        self.u = _time_first(x.u, part, dtype)  # (steps, rows, channels)
        step = _time_first(x.delta, part, dtype)
        step = step if x.bias is None else step + x.bias.to(dtype)
        self.step = F.softplus(step) if x.softplus else step
        self.drive = self.step * self.u
        self.B = _time_first(x.B, part, dtype)  # (steps, rows, states)
        self.C = _time_first(x.C, part, dtype)
        self.z = None if x.z is None else _time_first(x.z, part, dtype)

    def by_step(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Give step (rows, 1, channels), B (rows, states, 1), drive and C (rows, 1, .)."""
        columns = self.step.unsqueeze(2), self.B.unsqueeze(3), self.drive.unsqueeze(2)
        return zip(*columns, self.C.unsqueeze(2), strict=True)


class _Gradients(NamedTuple):
    """Gradients of a scan, for all of the batch or a few rows of it."""

    u: Tensor
    delta: Tensor
    At: Tensor  # (rows, states, channels), summed over time only
    B: Tensor
    C: Tensor
    D: Tensor  # (rows, channels)
    z: Tensor | None
    bias: Tensor  # (rows, channels)

    def rows(self, part: slice) -> _Gradients:
        z = None if self.z is None else self.z[part]
        return _Gradients(
            self.u[part],
            self.delta[part],
            self.At[part],
            self.B[part],
            self.C[part],
            self.D[part],
            z,
            self.bias[part],
        )


def _time_first(values: Tensor, part: slice, dtype: torch.dtype) -> Tensor:
    return values[:, :, part].permute(2, 0, 1).to(dtype).contiguous()


def _time_last(values: Tensor) -> Tensor:
    return values.permute(1, 2, 0)


def _parts(n_steps: int) -> list[slice]:
    """Cut time where states are kept."""
    length = max(1, math.isqrt(n_steps))
    return [slice(t, min(t + length, n_steps)) for t in range(0, n_steps, length)]


class _CheckpointedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        bias: Tensor | None,
        softplus: bool,
    ) -> Tensor:
        At = A.to(_accumulation_dtype(u)).T.contiguous()
        x = _Sequence(u, delta, At, B, C, D, z, bias, softplus)
        out = torch.empty_like(u)
        n_kept = len(_parts(u.shape[2])) if any(ctx.needs_input_grad) else 0
        kept = At.new_empty(len(u), n_kept, *At.shape)
        _over_rows(lambda rows: _scan(x.rows(rows), out[rows], kept[rows]), At, len(u))
        if n_kept:
            ctx.softplus = softplus
            ctx.save_for_backward(u, delta, A, B, C, D, z, bias, kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, z, bias, kept = ctx.saved_tensors
        At = A.to(kept.dtype).T.contiguous()
        x = _Sequence(u, delta, At, B, C, D, z, bias, ctx.softplus)
        empty = torch.empty_like
        by_channel = At.new_zeros(2, len(u), len(A))
        g = _Gradients(
            u=empty(u),
            delta=empty(delta),
            At=At.new_zeros(len(u), *At.shape),
            B=empty(B),
            C=empty(C),
            D=by_channel[0],
            z=None if z is None else empty(z),
            bias=by_channel[1],
        )
        _over_rows(
            lambda rows: _scan_back(x.rows(rows), kept[rows], grad[rows], g.rows(rows)),
            At,
            len(u),
        )
        grad_A = g.At.sum(0).T.to(A.dtype)
        grad_D = None if D is None else g.D.sum(0).to(D.dtype)
        grad_bias = None if bias is None else g.bias.sum(0).to(bias.dtype)
        return g.u, g.delta, grad_A, g.B, g.C, grad_D, g.z, grad_bias, None


def _over_rows(work: Callable[[slice], None], At: Tensor, batch: int) -> None:
    """Call `work` for blocks of the batch: small on a CPU, for its cache; all rows elsewhere."""
    size = max(1, _BLOCK // At.numel()) if At.device.type == "cpu" else batch
    with torch.no_grad(), torch.autocast(At.device.type, enabled=False):
        for first in range(0, batch, size):
            work(slice(first, first + size))


def _scan(x: _Sequence, out: Tensor, kept: Tensor) -> None:
    """Fill `out` (rows, channels, time) and `kept` (rows, parts, states, channels)."""
    rate = x.At * math.log2(math.e)
    state = x.At.new_zeros(len(x.u), *x.At.shape)
    decay = torch.empty_like(state)
    for number, part in enumerate(_parts(x.u.shape[2])):
        if kept.shape[1]:
            kept[:, number] = state
        chunk = _Chunk(x, part)
        y = torch.empty_like(chunk.u)
        rows = y.unsqueeze(2).unbind()
        for (step, B, drive, C), row in zip(chunk.by_step(), rows, strict=True):
            torch.mul(step, rate, out=decay).exp2_()
            state.mul_(decay).addcmul_(B, drive)
            torch.bmm(C, state, out=row)
        if x.D is not None:
            y.addcmul_(chunk.u, x.D.to(y.dtype))
        if chunk.z is not None:
            y.mul_(F.silu(chunk.z))
        out[:, :, part] = _time_last(y)


def _scan_back(x: _Sequence, kept: Tensor, grad: Tensor, g: _Gradients) -> None:
    """Fill the gradients `g` of a few rows, chunk by chunk from the last."""
    parts = _parts(x.u.shape[2])
    rate = x.At * math.log2(math.e)
    longest = parts[0].stop
    states = kept.new_empty(longest + 1, len(kept), *x.At.shape)
    decays = torch.empty_like(states[1:])
    carry = torch.zeros_like(states[0])
    for number, part in reversed(list(enumerate(parts))):
        chunk = _Chunk(x, part)
        states[0] = kept[:, number]
        _recompute(chunk, rate, states, decays)
        dy = _through_gate(x, chunk, states, _time_first(grad, part, kept.dtype), g, part)
        ddrive, dstep = _through_states(x, chunk, states, decays, dy, carry, g, part)
        dstep.addcmul_(ddrive, chunk.u)
        du = ddrive.mul_(chunk.step)
        if x.D is not None:
            g.D.add_((dy * chunk.u).sum(0))
            du.addcmul_(dy, x.D.to(dy.dtype))
        if x.softplus:  # its derivative is sigmoid(raw) = 1 - exp(-softplus(raw))
            dstep.mul_(torch.expm1(-chunk.step).neg_())
        g.bias.add_(dstep.sum(0))
        g.u[:, :, part] = _time_last(du)
        g.delta[:, :, part] = _time_last(dstep)


def _recompute(chunk: _Chunk, rate: Tensor, states: Tensor, decays: Tensor) -> None:
    """Fill decays[t] and states[t + 1] from states[0]."""
    before, *after = states.unbind()
    for (step, B, drive, _), decay, state in zip(
        chunk.by_step(), decays.unbind(), after, strict=False
    ):
        torch.mul(step, rate, out=decay).exp2_()
        torch.mul(before, decay, out=state).addcmul_(B, drive)
        before = state


def _through_gate(
    x: _Sequence, chunk: _Chunk, states: Tensor, grad: Tensor, g: _Gradients, part: slice
) -> Tensor:
    """Give the gradient of the ungated output (steps, rows, channels); fill that of z."""
    if chunk.z is None or g.z is None:
        return grad
    after = states[1 : len(grad) + 1]
    y = torch.matmul(chunk.C.unsqueeze(2), after).squeeze(2)
    if x.D is not None:
        y.addcmul_(chunk.u, x.D.to(y.dtype))
    gate = torch.sigmoid(chunk.z)
    silu = gate * chunk.z
    slope = torch.addcmul(gate, silu, 1 - gate)
    g.z[:, :, part] = _time_last(y.mul_(grad).mul_(slope))
    return silu.mul_(grad)


def _through_states(
    x: _Sequence,
    chunk: _Chunk,
    states: Tensor,
    decays: Tensor,
    dy: Tensor,
    carry: Tensor,
    g: _Gradients,
    part: slice,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence backward; give the gradients of drive and, through A, of step.

    `carry`, the gradient of the state (rows, states, channels), is left as it is before the
    first step. Products with the transposed state avoid a slow case of bmm.
    """
    dB, dC = torch.empty_like(chunk.B), torch.empty_like(chunk.C)
    ddrive, dstep = torch.empty_like(chunk.u), torch.empty_like(chunk.u)
    work = torch.empty_like(carry)
    inputs = list(chunk.by_step())
    views = [values.unsqueeze(2).unbind() for values in (dy, dB, dC, ddrive)]
    for t in reversed(range(len(dy))):
        step, B, drive, C = inputs[t]
        dy_t, dB_t, dC_t, ddrive_t = (view[t] for view in views)
        carry.addcmul_(C.mT, dy_t)
        torch.bmm(dy_t, states[t + 1].mT, out=dC_t)
        torch.bmm(drive, carry.mT, out=dB_t)
        torch.bmm(B.mT, carry, out=ddrive_t)
        carry.mul_(decays[t])
        torch.mul(carry, states[t], out=work)
        g.At.addcmul_(work, step)
        torch.sum(work.mul_(x.At), 1, out=dstep[t])
    g.B[:, :, part] = _time_last(dB)
    g.C[:, :, part] = _time_last(dC)
    return ddrive, dstep
