"""What every kernel of the selective scan is given, and what it gives back."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class ScanArguments(NamedTuple):
    """Arguments of `chasm.models.scan.selective_scan`."""

    u: Tensor
    """(batch, channels, time)."""
    delta: Tensor
    """(batch, channels, time)."""
    A: Tensor
    """(channels, states)."""
    B: Tensor
    """(batch, states, time)."""
    C: Tensor
    """(batch, states, time)."""
    D: Tensor | None
    """(channels,)."""
    z: Tensor | None
    """(batch, channels, time)."""
    delta_bias: Tensor | None
    """(channels,)."""
    delta_softplus: bool


class ScanGradients(NamedTuple):
    """Gradients of a scan by its arguments, in their shapes and dtypes."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None


class ScanKernel(Protocol):
    """A scan with a backward pass of its own; no autograd, no autocast."""

    def forward(self, x: ScanArguments, keep: bool) -> tuple[Tensor, Tensor]:
        """Scan.

        Returns
        -------
        y
            (batch, channels, time), dtype of `u`, channels side by side in memory.
        kept
            (batch, parts of time, states, channels), the state before each part, in the
            accumulation dtype; no parts unless `keep`.
        """

    def backward(self, x: ScanArguments, kept: Tensor, grad: Tensor) -> ScanGradients:
        """Give the gradients of sum(grad * y)."""


def accumulation_dtype(u: Tensor) -> torch.dtype:
    """Give float64 for float64 inputs, float32 for all others."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def part_length(n_steps: int) -> int:
    """Give the steps between two states that are kept: near the square root of all steps."""
    return max(1, math.isqrt(n_steps))


def n_parts(n_steps: int) -> int:
    """Count the parts that time is cut into."""
    return -(-n_steps // part_length(n_steps))


def empty_sequence(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Make a (batch, width, time) tensor whose widths lie side by side in memory."""
    batch, width, time = like.shape
    return like.new_empty(batch, time, width, dtype=dtype).mT
