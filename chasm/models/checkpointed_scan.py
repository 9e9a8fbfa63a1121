"""The selective scan in plain PyTorch with little memory.

The state is kept only every C steps (C close to the square root of the number of steps); those in
between are recomputed when gradients are asked for. Work goes chunk by chunk of time through a few
buffers that are reused, with the channels as the innermost axis, where every operation is
contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from chasm.models.scan_arguments import (
    ScanArguments,
    ScanGradients,
    accumulation_dtype,
    empty_sequence,
    n_parts,
    part_length,
)

_BLOCK = 2**18
"""Numbers in the state of a block of rows: a megabyte of float32, which fits a CPU's caches."""


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
    length = part_length(n_steps)
    return [slice(t, min(t + length, n_steps)) for t in range(0, n_steps, length)]


class CheckpointedScan:
    """The scan in plain PyTorch as a `ScanKernel`, on any device.

    Fastest when `u`, `delta` and `z` are transposed views of (batch, time, channels) tensors, as
    a linear layer gives them.
    """

    def forward(self, x: ScanArguments, keep: bool) -> tuple[Tensor, Tensor]:
        """Scan; see `ScanKernel.forward`."""
        sequence = _sequence(x)
        At, batch = sequence.At, len(x.u)
        out = empty_sequence(x.u)
        kept = At.new_empty(batch, n_parts(x.u.shape[2]) if keep else 0, *At.shape)
        _over_rows(lambda rows: _scan(sequence.rows(rows), out[rows], kept[rows]), At, batch)
        return out, kept

    def backward(self, x: ScanArguments, kept: Tensor, grad: Tensor) -> ScanGradients:
        """Give the gradients; see `ScanKernel.backward`."""
        sequence = _sequence(x)
        At, batch = sequence.At, len(x.u)
        of_D, of_bias = At.new_zeros(2, batch, len(x.A))
        g = _Gradients(
            u=empty_sequence(x.u),
            delta=empty_sequence(x.delta),
            At=At.new_zeros(batch, *At.shape),
            B=empty_sequence(x.B),
            C=empty_sequence(x.C),
            D=of_D,
            z=None if x.z is None else empty_sequence(x.z),
            bias=of_bias,
        )
        _over_rows(
            lambda rows: _scan_back(sequence.rows(rows), kept[rows], grad[rows], g.rows(rows)),
            At,
            batch,
        )
        return ScanGradients(
            g.u,
            g.delta,
            g.At.sum(0).T.to(x.A.dtype).contiguous(),
            g.B,
            g.C,
            None if x.D is None else g.D.sum(0).to(x.D.dtype),
            g.z,
            None if x.delta_bias is None else g.bias.sum(0).to(x.delta_bias.dtype),
        )


def _sequence(x: ScanArguments) -> _Sequence:
    At = x.A.to(accumulation_dtype(x.u)).T.contiguous()
    return _Sequence(x.u, x.delta, At, x.B, x.C, x.D, x.z, x.delta_bias, x.delta_softplus)


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
