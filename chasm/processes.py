"""Processes that train together: which one this is, and what they tell each other.

Everything here is the identity, or 1, where one process trains alone. Otherwise every process has
to call the same functions in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
"""Variables in which torchrun, SLURM and Lightning number processes and nodes, from 0."""

PATIENCE = timedelta(hours=3)
"""How long processes wait for each other: the first one solves a closed form for all."""


def n_processes() -> int:
    """Count the processes that train together now."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the first of the processes that train together now, or the only one."""
    return n_processes() == 1 or dist.get_rank() == 0


def will_be_first() -> bool:
    """Whether this is the first of several processes, also before they have found each other."""
    if n_processes() > 1:
        return is_first()
    return all(int(os.environ.get(name) or 0) == 0 for name in RANKS)


def gather(rows: Tensor) -> Tensor:
    """Stack the rows of all processes, in the order of the processes.

    Gradients flow back to the process that a row came from, summed over the processes.

    Parameters
    ----------
    rows
        (own rows, ...), floating or integer; the number may differ between processes.

    Returns
    -------
    Tensor
        (all rows, ...).
    """
    if n_processes() == 1:
        return rows
    counts, own = _counts(len(rows)), dist.get_rank()
    before, after = sum(counts[:own]), sum(counts[own + 1 :])
    width = rows.shape[1:]
    padded = torch.cat([rows.new_zeros(before, *width), rows, rows.new_zeros(after, *width)])
    found: Tensor = _Sum.apply(padded)
    return found


def n_cores() -> int:
    """Count the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_rows(rows: Tensor) -> slice:
    """Say which rows of what `gather` gives are this process's own."""
    if n_processes() == 1:
        return slice(0, len(rows))
    counts, own = _counts(len(rows)), dist.get_rank()
    start = sum(counts[:own])
    return slice(start, start + counts[own])


def weigh(loss: Tensor, n: int) -> Tensor:
    """Weigh a mean over this process's `n` images, so that gradients are of the mean over all.

    DDP takes the plain mean of the processes' gradients, whatever each has seen.
    """
    if n_processes() == 1:
        return loss
    total = torch.full((), float(n), device=loss.device)
    dist.all_reduce(total)  # stays on the device: nobody waits to read it
    return loss * (n * n_processes() / total)


def any_of(value: bool) -> bool:
    """Whether `value` holds in any process."""
    if n_processes() == 1:
        return value
    return bool(sum(_counts(int(value))))


def take_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors, in place, by what they are in the first process."""
    if n_processes() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)


def wait_for_all() -> None:
    """Go on when every process is here."""
    if n_processes() > 1:
        dist.barrier()


def part_ways() -> None:
    """End what the processes have together; from here on each is alone."""
    if n_processes() > 1:
        wait_for_all()
        _host_groups.clear()
        dist.destroy_process_group()


class _Sum(torch.autograd.Function):
    """Sum over processes, of values and, backward, of gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


_host_groups: dict[Any, Any] = {}


def _host_group() -> Any:
    """All processes, speaking from main memory: no process waits for what its device is at."""
    if dist.get_backend() == "gloo":
        return None
    world = dist.group.WORLD
    if world not in _host_groups:
        _host_groups.clear()  # of processes that have parted
        _host_groups[world] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _host_groups[world]


def _counts(own: int) -> list[int]:
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    counts[dist.get_rank()] = own
    dist.all_reduce(counts, group=_host_group())
    return counts.tolist()
