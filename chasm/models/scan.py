"""The selective scan of Mamba and its back ends.

For every channel d and state n of a batch element (Gu and Dao 2023, equations 2 and 4)

    h[t] = exp(delta[t] * A) * h[t-1] + delta[t] * B[t] * u[t],    y[t] = sum_n C[t] * h[t]

followed by the skip ``y + D * u`` and the gate ``y * silu(z)``. All back ends give the same
numbers; they differ in speed and memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from chasm.models.cuda_packages import explain, mamba1_kernel, optional_module
from chasm.models.scan_arguments import ScanArguments, accumulation_dtype
from chasm.models.scan_choice import anywhere, choose, first_available
from chasm.models.scan_ops import differentiable_scan

log = logging.getLogger(__name__)


class Backend(NamedTuple):
    """A scan, where it can run and what it needs for that."""

    scan: Callable[[ScanArguments], Tensor]
    available: Callable[[torch.device], bool]
    needs: str


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Run the selective state-space recurrence along the last axis.

    States and sums are kept in float32 when the inputs are narrower, in float64 when `u` is.

    Parameters
    ----------
    u
        (batch, channels, time), input.
    delta
        (batch, channels, time), step sizes.
    A
        (channels, states), negative for a decaying memory.
    B, C
        (batch, states, time), input and output maps.
    D
        (channels,), skip connection, or None.
    z
        (batch, channels, time), gate, or None.
    delta_bias
        (channels,), added to `delta`, or None.
    delta_softplus
        Whether softplus is applied to the step sizes, after the bias.
    backend
        "mamba_ssm" (CUDA), "numba" (CPU), "torch" (any device), "reference" (any device, slow) or
        "auto": the environment variable CHASM_SCAN when set, else the first of these that can run.

    Returns
    -------
    Tensor
        (batch, channels, time), dtype of `u`.

    Raises
    ------
    ConfigError
        If the back end is unknown or cannot run on the device of `u`.
    ValueError
        If shapes do not agree.
    """
    _check_shapes(u, delta, A, B, C, D, z, delta_bias)
    name = resolve_backend(u.device, backend)
    x = ScanArguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if u.shape[2] == 1 and name != "reference":
        return single_step(x)
    return BACKENDS[name].scan(x)


@torch.compiler.assume_constant_result
def resolve_backend(device: torch.device, backend: str = "auto") -> str:
    """Name the back end that will run on `device`.

    Raises
    ------
    ConfigError
        If it is unknown or cannot run there.
    """
    available = {name: found.available for name, found in BACKENDS.items()}

    def refusal(name: str) -> tuple[str, str]:
        remedy = f'Use "auto": {explain_backend(device, first_available(device, available))}.'
        return f"it needs {BACKENDS[name].needs}", remedy

    backend = choose(device, backend, available, refusal)
    _say_once(device.type, backend)
    return backend


def reference_scan(
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
    """Loop over time with every state materialised; autograd differentiates it.

    Slow and large (batch * channels * time * states numbers several times over); the others are
    checked against it. Shapes as in `selective_scan`.
    """
    dtype = accumulation_dtype(u)
    with torch.autocast(u.device.type, enabled=False):
        x, step = u.to(dtype), delta.to(dtype)
        if delta_bias is not None:
            step = step + delta_bias.to(dtype)[:, None]
        if delta_softplus:
            step = F.softplus(step)
        decay = torch.exp(torch.einsum("bdt,dn->bdtn", step, A.to(dtype)))
        drive = torch.einsum("bdt,bnt->bdtn", step * x, B.to(dtype))
        state = torch.zeros_like(drive[:, :, 0])
        outputs = []
        # unbind, because the gradient of indexing would fill the whole array at every step
        steps = zip(decay.unbind(2), drive.unbind(2), C.to(dtype).unbind(2), strict=True)
        for decay_t, drive_t, C_t in steps:
            state = decay_t * state + drive_t
            outputs.append(torch.einsum("bdn,bn->bd", state, C_t))
        y = torch.stack(outputs, dim=2)
        if D is not None:
            y = y + D.to(dtype)[:, None] * x
        if z is not None:
            y = y * F.silu(z.to(dtype))
    return y.to(u.dtype)


def single_step(x: ScanArguments) -> Tensor:
    """Scan one step from the zero state, in closed form: y = delta * u * <B, C>."""
    dtype = accumulation_dtype(x.u)
    with torch.autocast(x.u.device.type, enabled=False):
        u, step = x.u.to(dtype), x.delta.to(dtype)
        if x.delta_bias is not None:
            step = step + x.delta_bias.to(dtype)[:, None]
        if x.delta_softplus:
            step = F.softplus(step)
        y = step * u * (x.B.to(dtype) * x.C.to(dtype)).sum(1, keepdim=True)
        y = y + 0 * x.A.to(dtype).sum()  # A acts from the second step; its gradient is 0, not None
        if x.D is not None:
            y = y + x.D.to(dtype)[:, None] * u
        if x.z is not None:
            y = y * F.silu(x.z.to(dtype))
    return y.to(x.u.dtype)


def _mamba_ssm_scan(x: ScanArguments) -> Tensor:
    interface = mamba1_kernel()
    assert interface is not None, "resolve_backend checks this"
    return interface.selective_scan_fn(*x)


def _has_mamba_ssm(device: torch.device) -> bool:
    return device.type == "cuda" and mamba1_kernel() is not None


def _has_numba(device: torch.device) -> bool:
    return device.type == "cpu" and optional_module("numba") is not None


BACKENDS: dict[str, Backend] = {
    "mamba_ssm": Backend(_mamba_ssm_scan, _has_mamba_ssm, "CUDA and mamba_ssm's Mamba-1 kernel"),
    "numba": Backend(
        lambda x: differentiable_scan(x, "numba"), _has_numba, "a CPU and the package numba"
    ),
    "torch": Backend(lambda x: differentiable_scan(x, "torch"), anywhere, "nothing"),
    "reference": Backend(lambda x: reference_scan(*x), anywhere, "nothing"),
}
"""Back ends by name; "auto" is the first that is available."""


@cache
def _say_once(device: str, backend: str) -> None:
    log.info("selective scan: %s", explain_backend(torch.device(device), backend))


def explain_backend(device: torch.device, backend: str) -> str:
    """Say in one line which back end runs on a device, and why."""
    if device.type == "cpu" and backend == "torch":
        why = "was chosen" if _has_numba(device) else "runs: numba is not installed"
        return f"the torch scan {why}"
    return explain(device, backend)


def _check_shapes(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError(
            f"u {tuple(u.shape)} must be (batch, channels, time) and A {tuple(A.shape)} "
            "(channels, states)"
        )
    batch, channels, time = u.shape
    states = A.shape[1]
    expected = {
        "delta": (delta, (batch, channels, time)),
        "A": (A, (channels, states)),
        "B": (B, (batch, states, time)),
        "C": (C, (batch, states, time)),
        "D": (D, (channels,)),
        "z": (z, (batch, channels, time)),
        "delta_bias": (delta_bias, (channels,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
