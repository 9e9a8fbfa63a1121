"""The selective scan of Mamba and its back ends.

For every channel d and state n of a batch element (Gu and Dao 2023, equations 2 and 4)

    h[t] = exp(delta[t] * A) * h[t-1] + delta[t] * B[t] * u[t],    y[t] = sum_n C[t] * h[t]

followed by the skip ``y + D * u`` and the gate ``y * silu(z)``. All back ends give the same
numbers; they differ in speed and memory.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from chasm.errors import ConfigError
from chasm.models.checkpointed_scan import checkpointed_scan

ENVIRONMENT = "CHASM_SCAN"
"""Environment variable that replaces the back end "auto"."""


class ScanFunction(Protocol):
    """A back end: the arguments of `selective_scan`, without the choice of the back end."""

    def __call__(
        self,
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
        """Scan; shapes as in `selective_scan`."""


class Backend(NamedTuple):
    """A scan and where it can run."""

    scan: ScanFunction
    available: Callable[[torch.device], bool]


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
        "auto", "reference", "torch" or "mamba_ssm". "auto" is the environment variable
        CHASM_SCAN when set, else mamba_ssm's kernel where it can run, else "torch".

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
    scan = BACKENDS[resolve_backend(u.device, backend)].scan
    return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def resolve_backend(device: torch.device, backend: str = "auto") -> str:
    """Name the back end that will run on `device`.

    Raises
    ------
    ConfigError
        If it is unknown or cannot run there.
    """
    where = "scan:backend"
    if backend == "auto" and os.environ.get(ENVIRONMENT):
        where, backend = ENVIRONMENT, os.environ[ENVIRONMENT]
    if backend == "auto":
        return "mamba_ssm" if BACKENDS["mamba_ssm"].available(device) else "torch"
    if backend not in BACKENDS:
        names = ", ".join(["auto", *BACKENDS])
        raise ConfigError(where, f"found {backend!r}, expected one of {names}", "Choose one.")
    if not BACKENDS[backend].available(device):
        raise ConfigError(
            where,
            f"{backend!r} cannot run on {device}: it needs CUDA and the installed package",
            'Use "auto", or install the extra: pip install "chasm-fmri[cuda]".',
        )
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
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
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


@cache
def optional_module(name: str) -> Any | None:
    """Import a module of an optional package once; None if it is not installed or not built."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):
        return None


def _kernel_available(device: torch.device) -> bool:
    interface = "mamba_ssm.ops.selective_scan_interface"
    return device.type == "cuda" and optional_module(interface) is not None


def _kernel_scan(
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
    interface = optional_module("mamba_ssm.ops.selective_scan_interface")
    assert interface is not None, "resolve_backend checks this"
    return interface.selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def _anywhere(_: torch.device) -> bool:
    return True


BACKENDS: dict[str, Backend] = {
    "reference": Backend(reference_scan, _anywhere),
    "torch": Backend(checkpointed_scan, _anywhere),
    "mamba_ssm": Backend(_kernel_scan, _kernel_available),
}
"""Back ends by name."""


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
