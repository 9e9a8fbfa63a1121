"""Choosing among back ends of a scan, the same way for Mamba and Mamba-2."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch

from chasm.errors import ConfigError

ENVIRONMENT = "CHASM_SCAN"
"""Environment variable that replaces the back end "auto"."""

Available = Callable[[torch.device], bool]


def anywhere(_: torch.device) -> bool:
    """Say yes: a back end that runs on any device."""
    return True


def first_available(device: torch.device, available: Mapping[str, Available]) -> str:
    """Name the back end that runs when none is asked for."""
    return next(name for name, can_run in available.items() if can_run(device))


def choose(
    device: torch.device,
    backend: str,
    available: Mapping[str, Available],
    refusal: Callable[[str], tuple[str, str]],
) -> str:
    """Name the back end that will run.

    Parameters
    ----------
    device
        Where.
    backend
        What was asked for; "auto" is the environment variable CHASM_SCAN when set, else the first
        that can run.
    available
        Whether each can run, in order of preference.
    refusal
        Why one cannot run there, and the remedy.

    Raises
    ------
    ConfigError
        If it is unknown or cannot run there.
    """
    where = "scan:backend"
    if backend == "auto" and os.environ.get(ENVIRONMENT):
        where, backend = ENVIRONMENT, os.environ[ENVIRONMENT]
    if backend == "auto":
        return first_available(device, available)
    if backend not in available:
        names = ", ".join(["auto", *available])
        raise ConfigError(where, f"found {backend!r}, expected one of {names}", "Choose one.")
    if not available[backend](device):
        why, remedy = refusal(backend)
        raise ConfigError(where, f"{backend!r} cannot run on {device}: {why}", remedy)
    return backend
