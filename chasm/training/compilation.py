"""torch.compile of networks when a fit begins; never of what a checkpoint is loaded into."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils._triton import has_triton

from chasm.errors import ConfigError

log = logging.getLogger(__name__)

BACKEND = "inductor"
"""Of torch.compile."""


def compile_networks(networks: Iterable[nn.Module | None], device: torch.device) -> None:
    """Compile what networks do when they are called, in place; the names of weights stay.

    The first steps wait for the compiler, which keeps what it made for later runs on this machine.

    Parameters
    ----------
    networks
        Those that are called in a training step; None is left out.
    device
        Where they are trained.

    Raises
    ------
    ConfigError
        There is no compiler for this device.
    """
    check_compiler(device)
    for network in networks:
        if network is not None:
            log.info("compiling %s: the first steps take longer", type(network).__name__)
            network.compile(backend=BACKEND)


def check_compiler(device: torch.device) -> None:
    """Refuse to compile without a compiler: of C++ on a CPU, Triton (and it) on CUDA.

    Raises
    ------
    ConfigError
        Names what is missing.
    """
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "cl"]
    if BACKEND == "inductor" and not any(map(shutil.which, names)):
        raise ConfigError(
            "model.compile",
            f"torch.compile needs a C++ compiler, and there is no {' or '.join(names)}",
            "Install one (e.g. apt install g++; CXX names it), or set model.compile to false.",
        )
    if BACKEND == "inductor" and device.type == "cuda" and not has_triton():
        raise ConfigError(
            "model.compile",
            "torch.compile needs Triton and a GPU that it supports, which is not there",
            "Install it (pip install triton), or set model.compile to false.",
        )
