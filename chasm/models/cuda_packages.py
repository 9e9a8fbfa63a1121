"""What is installed of mamba_ssm and causal_conv1d, the optional CUDA kernels, and what it can do.

mamba_ssm has a compiled kernel for the selective scan of Mamba (``selective_scan_cuda``), which
its wheels leave out unless they are built with MAMBA_KEEP_CUDA_BUILD=TRUE, and Triton kernels for
Mamba-2, which need no build. causal_conv1d adds the convolution of the fused Mamba layer.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, Literal

import torch

Block = Literal["mamba", "mamba2"]
"""Of a residual block: Mamba's selective scan, or Mamba-2's state-space duality."""

INTERFACE = "mamba_ssm.ops.selective_scan_interface"
SSD = "mamba_ssm.ops.triton.ssd_combined"
COMPILED = "selective_scan_cuda"

BUILD = "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation --no-cache-dir mamba-ssm"
"""Command that builds mamba_ssm with its Mamba-1 kernel."""

INSTALL = 'pip install "chasm-fmri[cuda]"'


@cache
def optional_module(name: str) -> Any | None:
    """Import a module of an optional package once; None if it is not installed or not built."""
    found = _attempt(name)
    return None if isinstance(found, Exception) else found


def mamba1_kernel() -> Any | None:
    """Give mamba_ssm's interface to its selective scan where the compiled kernel is there too."""
    return None if optional_module(COMPILED) is None else optional_module(INTERFACE)


def mamba1_layer() -> Any | None:
    """Give ``mamba_inner_fn``, the fused Mamba layer, which also needs causal_conv1d."""
    if optional_module("causal_conv1d") is None:
        return None
    return getattr(mamba1_kernel(), "mamba_inner_fn", None)


def mamba2_kernel() -> Any | None:
    """Give ``mamba_chunk_scan_combined``, the Triton kernels of Mamba-2."""
    return getattr(optional_module(SSD), "mamba_chunk_scan_combined", None)


def explain(device: torch.device, backend: str = "torch", block: Block = "mamba") -> str:
    """Say in one line which back end runs on a device, and why.

    Parameters
    ----------
    device
        Where the scan runs.
    backend
        What runs there.
    block
        Whose scan.
    """
    kernel = mamba1_kernel if block == "mamba" else mamba2_kernel
    scan = "scan" if block == "mamba" else "Mamba-2 scan"
    if backend == "mamba_ssm":
        if block == "mamba2" or mamba1_layer() is not None:
            return f"mamba_ssm and CUDA are there, so its {scan} kernel runs"
        return f"mamba_ssm's {scan} kernel runs, without the fused layer: {_state('causal_conv1d')}"
    if backend == "reference":
        return f"the reference {scan} was chosen"
    if device.type != "cuda":
        return f"mamba_ssm's kernels need CUDA, so the {backend} {scan} runs on {device.type}"
    if kernel() is not None:
        return f"the {backend} {scan} was chosen, though mamba_ssm's kernel could run"
    return f"{_missing(block)}, so the {backend} {scan} runs"


def _missing(block: Block) -> str:
    """Say why mamba_ssm's kernel of a block cannot run on CUDA."""
    package = _attempt("mamba_ssm")
    unbuilt = isinstance(package, ModuleNotFoundError) and package.name == COMPILED
    if isinstance(package, Exception) and not unbuilt:
        return _state("mamba_ssm")
    if block == "mamba2" and not unbuilt:
        return _state(SSD)
    compiled = _attempt(COMPILED)
    if isinstance(compiled, ModuleNotFoundError) and compiled.name == COMPILED:
        return f"mamba_ssm is installed without its Mamba-1 kernel (build it with {BUILD})"
    return _state(COMPILED if isinstance(compiled, Exception) else INTERFACE)


def _state(name: str) -> str:
    """Say that a module is installed, is not, or why it cannot be imported."""
    found = _attempt(name)
    if not isinstance(found, Exception):
        return f"{name} is installed"
    package = name.partition(".")[0]
    if isinstance(found, ModuleNotFoundError) and found.name == package:
        return f"{package} is not installed ({INSTALL})"
    lines = str(found).strip().splitlines()
    return f"{name} cannot be imported ({lines[0] if lines else type(found).__name__})"


def _attempt(name: str) -> Any:
    """Import a module, or give what its import raised (Triton raises more than ImportError)."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return error
