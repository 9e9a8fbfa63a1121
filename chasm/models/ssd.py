"""State-space duality: the scan of Mamba-2 as matrix products (Dao and Gu 2024).

Every head h has one decay for all of its channels p and states n,

    s[t] = exp(dt[t] * A) * s[t-1] + dt[t] * x[t] B[t]',    y[t] = s[t] C[t] + D * x[t]

which, within a chunk of time, is the product of a lower-triangular matrix with x, and between
chunks passes through one state. All back ends give the same numbers; mamba_ssm's Triton kernels
may multiply float32 in TF32.
"""

from __future__ import annotations

import logging
import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from chasm.models.cuda_packages import explain, mamba2_kernel
from chasm.models.scan_arguments import accumulation_dtype
from chasm.models.scan_choice import Available, anywhere, choose

log = logging.getLogger(__name__)

UNLIMITED = (0.0, math.inf)
"""Range of step sizes that leaves them as they are."""

_CHUNK = 64
"""Longest chunk of the plain form: longer ones cost more, and give the same numbers."""

_BLOCK = 2**21
"""Numbers in the largest array of a block of rows: eight megabytes of float32."""


def _has_triton_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and mamba2_kernel() is not None


_BACKENDS: dict[str, Available] = {
    "mamba_ssm": _has_triton_kernels,
    "numba": anywhere,  # has no scan of its own here: "torch"
    "torch": anywhere,
    "reference": anywhere,
}


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = UNLIMITED,
    chunk_size: int = 256,
    backend: str = "auto",
) -> Tensor:
    """Run Mamba-2's recurrence along time, from the zero state.

    The step size is ``clamp(softplus(dt + dt_bias), *dt_limit)``. States and sums are kept in
    float32 when the inputs are narrower, in float64 when `x` is.

    Parameters
    ----------
    x
        (batch, time, heads, head width), input.
    dt
        (batch, time, heads), step sizes before the softplus.
    A
        (heads,), negative for a decaying memory.
    B, C
        (batch, time, groups, states), input and output maps; heads in the same group share them.
    D
        (heads,) or (heads, head width), skip connection, or None.
    dt_bias
        (heads,), added to `dt`, or None.
    dt_limit
        Range of the step sizes.
    chunk_size
        Steps per chunk of mamba_ssm's kernel, and at most of the plain form's.
    backend
        "auto", "mamba_ssm" (Triton, CUDA), "torch" (matrix products) or "reference" (a loop).
        "auto" is the environment variable CHASM_SCAN when set, else mamba_ssm's kernel where it
        can run, else "torch". "numba", a back end of the selective scan alone, is "torch" here.

    Returns
    -------
    Tensor
        (batch, time, heads, head width), dtype of `x`.

    Raises
    ------
    ConfigError
        If the back end is unknown or cannot run on the device of `x`.
    ValueError
        If shapes do not agree.
    """
    _check_shapes(x, dt, A, B, C, D, dt_bias)
    name = resolve_backend(x.device, backend, x.dtype)
    if name == "mamba_ssm":
        kernel = mamba2_kernel()
        assert kernel is not None, "resolve_backend checks this"
        found: Tensor = kernel(
            x, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, dt_softplus=True, dt_limit=dt_limit
        )
        return found
    step = step_sizes(dt, dt_bias, dt_limit, accumulation_dtype(x))
    y = (
        reference_ssd(x, step, A, B, C)
        if name == "reference"
        else chunked_ssd(x, step, A, B, C, min(chunk_size, _CHUNK))
    )
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]).to(y.dtype) * x
    return y.to(x.dtype)


@torch.compiler.assume_constant_result
def resolve_backend(
    device: torch.device, backend: str = "auto", dtype: torch.dtype = torch.float32
) -> str:
    """Name the back end that will run; "auto" is "torch" for float64, which Triton cannot do.

    Raises
    ------
    ConfigError
        If it is unknown or cannot run there.
    """

    def refusal(_: str) -> tuple[str, str]:
        return explain(device, block="mamba2").partition(", so ")[0], 'Use "auto".'

    first = ("numba", "mamba_ssm") if dtype == torch.float64 else ("mamba_ssm", "numba")
    available = {name: _BACKENDS[name] for name in (*first, "torch", "reference")}
    name = choose(device, backend, available, refusal)
    name = "torch" if name == "numba" else name
    _say_once(device.type, name)
    return name


@cache
def _say_once(device: str, backend: str) -> None:
    log.info("Mamba-2: %s", explain(torch.device(device), backend, "mamba2"))


def step_sizes(
    dt: Tensor, dt_bias: Tensor | None, dt_limit: tuple[float, float], dtype: torch.dtype
) -> Tensor:
    """Give ``clamp(softplus(dt + dt_bias), *dt_limit)`` as `dtype`."""
    step = dt.to(dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    step = F.softplus(step)
    return step if dt_limit == UNLIMITED else step.clamp(*dt_limit)


def reference_ssd(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Loop over time; autograd differentiates it. The others are checked against it.

    Parameters
    ----------
    x, A, B, C
        See `ssd`.
    step
        (batch, time, heads), step sizes.

    Returns
    -------
    Tensor
        (batch, time, heads, head width), dtype of `step`.
    """
    dtype, heads = step.dtype, x.shape[2]
    with torch.autocast(x.device.type, enabled=False):
        B, C = (v.to(dtype).repeat_interleave(heads // v.shape[2], dim=2) for v in (B, C))
        decay = torch.exp(step * A.to(dtype))
        drive = step.unsqueeze(-1) * x.to(dtype)
        state = torch.zeros_like(drive[:, 0]).unsqueeze(-1)
        outputs = []
        for decay_t, drive_t, B_t, C_t in zip(
            *(v.unbind(1) for v in (decay, drive, B, C)), strict=True
        ):
            state = decay_t[..., None, None] * state + drive_t[..., None] * B_t[:, :, None]
            outputs.append((state * C_t[:, :, None]).sum(-1))
        return torch.stack(outputs, dim=1)


def chunked_ssd(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int = _CHUNK
) -> Tensor:
    """Multiply matrices chunk by chunk of time; time grows linearly with the sequence.

    Rows of the batch go through it in blocks, and only the inputs are kept for the backward pass,
    which computes a block again: beside inputs, output and their gradients, about ten arrays of
    `_BLOCK` numbers (80 MB of float32) exist at a time, whatever the batch; more only where one
    row alone has more. A compiled graph has one block.

    Parameters
    ----------
    x, A, B, C
        See `ssd`.
    step
        (batch, time, heads), step sizes.
    chunk_size
        Steps per chunk; the last chunk may be shorter.

    Returns
    -------
    Tensor
        (batch, time, heads, head width), dtype of `step`.
    """
    time, heads, width = x.shape[1:]
    chunk = min(chunk_size, time)
    per_step = heads * max(chunk, width, width * B.shape[3] // chunk)
    rows = max(1, _BLOCK // (time * per_step))
    if rows >= len(x) or torch.compiler.is_compiling():
        return _recomputed(x, step, A, B, C, chunk)
    parts = zip(*(v.split(rows) for v in (x, step, B, C)), strict=True)
    return torch.cat([_recomputed(x, step, A, B, C, chunk) for x, step, B, C in parts])


def _recomputed(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
    if not torch.is_grad_enabled():
        return _multiply(x, step, A, B, C, chunk)
    y: Tensor = checkpoint(
        _multiply, x, step, A, B, C, chunk, use_reentrant=False, preserve_rng_state=False
    )
    return y


def _multiply(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
    """Do it for a block of rows, with these axes: row, chunk, head or group, step of the chunk."""
    dtype, time = step.dtype, x.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        drive = _chunks(step.unsqueeze(-1) * x.to(dtype), chunk).transpose(2, 3)
        B, C = (_chunks(v.to(dtype), chunk).transpose(2, 3) for v in (B, C))
        log_decay = _chunks(step * A.to(dtype), chunk).mT
        decay = _decay(log_decay)
        products = (C @ B.mT).repeat_interleave(drive.shape[2] // B.shape[2], dim=2)
        y = (products * decay) @ drive
        if y.shape[1] > 1:
            y = y + _from_earlier_chunks(drive, log_decay, decay, B, C)
        return y.transpose(2, 3).flatten(1, 2)[:, :time]


def _chunks(v: Tensor, chunk: int) -> Tensor:
    """Cut axis 1 into (chunks, steps); zeros after its end, which change and drive no state."""
    padding = -v.shape[1] % chunk
    return F.pad(v, (0, 0) * (v.ndim - 2) + (0, padding)).unflatten(1, (-1, chunk))


def _decay(log_decay: Tensor) -> Tensor:
    """Give what is left of every step's input at every later step of its chunk.

    The exponents are sums over the steps in between, not differences of sums from the start,
    whose rounding would grow with the chunk; above the diagonal they are masked before the
    exponential, where they could overflow.

    Parameters
    ----------
    log_decay
        (..., steps).

    Returns
    -------
    Tensor
        (..., steps, steps), exp(sum of log_decay from column + 1 to row), 0 above the diagonal.
    """
    steps = log_decay.shape[-1]
    below = torch.ones(steps, steps, dtype=torch.bool, device=log_decay.device).tril(-1)
    sums = log_decay.unsqueeze(-1).masked_fill(~below, 0).cumsum(-2)
    future = torch.ones_like(below).triu(1)
    return sums.masked_fill(future, -math.inf).exp()


def _from_earlier_chunks(
    drive: Tensor, log_decay: Tensor, decay: Tensor, B: Tensor, C: Tensor
) -> Tensor:
    """Give what the states at the starts of the chunks add to the output.

    Heads of a group lie side by side, so that each product is one large matrix.
    """
    groups = B.shape[2]
    since_start = log_decay.cumsum(-1).exp()
    kept = drive * decay[..., -1, :, None]
    added = B.mT @ _side_by_side(kept, groups)  # row, chunk, group, state, (head, width)
    whole = since_start[..., -1].unflatten(2, (groups, -1)).unsqueeze(3).unsqueeze(-1)
    state = torch.zeros_like(added[:, 0])
    states = [state]
    width = drive.shape[-1]
    for added_t, whole_t in zip(added[:, :-1].unbind(1), whole[:, :-1].unbind(1), strict=True):
        state = (whole_t * state.unflatten(-1, (-1, width))).flatten(-2) + added_t
        states.append(state)
    read = (C @ torch.stack(states, 1)).unflatten(-1, (-1, width))
    return read.transpose(3, 4).flatten(2, 3) * since_start.unsqueeze(-1)


def _side_by_side(v: Tensor, groups: int) -> Tensor:
    """Make (row, chunk, group, step, (head, width)) of (row, chunk, head, step, width)."""
    return v.unflatten(2, (groups, -1)).transpose(3, 4).flatten(4)


def _check_shapes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
) -> None:
    if x.ndim != 4 or B.ndim != 4:
        raise ValueError(
            f"x {tuple(x.shape)} must be (batch, time, heads, head width) and B "
            f"{tuple(B.shape)} (batch, time, groups, states)"
        )
    batch, time, heads, width = x.shape
    groups, states = B.shape[2:]
    if heads % groups:
        raise ValueError(f"{groups} groups do not divide {heads} heads")
    expected: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "dt": (dt, [(batch, time, heads)]),
        "A": (A, [(heads,)]),
        "B": (B, [(batch, time, groups, states)]),
        "C": (C, [(batch, time, groups, states)]),
        "D": (D, [(heads,), (heads, width)]),
        "dt_bias": (dt_bias, [(heads,)]),
    }
    for name, (tensor, shapes) in expected.items():
        if tensor is not None and tuple(tensor.shape) not in shapes:
            listed = " or ".join(map(str, shapes))
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {listed}")
