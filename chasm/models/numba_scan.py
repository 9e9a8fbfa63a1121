"""The selective scan on a CPU, compiled by Numba.

Work is cut into tasks of one batch element and some of its channels, which threads share. What a
task sums for others (gradients of A, B, C, D and the bias) has a place of its own, so that results
do not depend on the number of threads.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, types
from torch import Tensor

from chasm.models.numba_kernels import LANES, LOG2_E, OPTIONS, backward, forward
from chasm.models.scan_arguments import (
    ScanArguments,
    ScanGradients,
    accumulation_dtype,
    n_parts,
    part_length,
)

log = logging.getLogger(__name__)

_KINDS = {torch.float32: np.float32, torch.float64: np.float64}
_TASKS = 16
"""At least so many tasks, where there are channels enough."""


class NumbaScan:
    """The compiled scan as a `ScanKernel`, for tensors on the CPU."""

    def forward(self, x: ScanArguments, keep: bool) -> tuple[Tensor, Tensor]:
        """Scan; see `ScanKernel.forward`."""
        batch, channels, n_steps = x.u.shape
        dtype, states = accumulation_dtype(x.u), x.A.shape[1]
        y = _empty(batch, n_steps, channels, dtype=dtype).mT
        kept = _empty(batch, n_parts(n_steps) if keep else 0, states, channels, dtype=dtype)
        kernel, inputs = compiled("forward", dtype), _inputs(x, dtype)
        rows = y.mT.numpy(), kept.numpy(), part_length(n_steps)

        def scan(b: int, first: int, last: int) -> None:
            kernel(*inputs, *rows, b, first, last)

        _share(scan, batch, channels)
        return y.to(x.u.dtype), kept

    def backward(self, x: ScanArguments, kept: Tensor, grad: Tensor) -> ScanGradients:
        """Give the gradients; see `ScanKernel.backward`."""
        batch, channels, n_steps = x.u.shape
        dtype, states = kept.dtype, x.A.shape[1]
        du, ddelta = (_empty(batch, n_steps, channels, dtype=dtype).mT for _ in range(2))
        dz = _empty(*((1, 1, 1) if x.z is None else (batch, n_steps, channels)), dtype=dtype).mT
        # Small sums by NumPy: threads of torch would go on spinning while ours work.
        groups, kind = _groups(batch, channels), _KINDS[dtype]
        dB, dC = np.zeros((2, groups, batch, n_steps, states), kind)
        dA = np.zeros((batch, states, channels), kind)
        dD, dbias = np.zeros((2, batch, channels), kind)
        kernel, inputs = compiled("backward", dtype), _inputs(x, dtype)
        fixed = _rows(grad, dtype), kept.numpy(), part_length(n_steps)
        rows, last_rows = (du.mT.numpy(), ddelta.mT.numpy()), dz.mT.numpy()

        def scan_back(b: int, first: int, last: int) -> None:
            group = first // _group_width(batch, channels)
            places = dA[b], dB[group, b], dC[group, b], dD[b], dbias[b]
            kernel(*inputs, *fixed, *rows, *places, last_rows, b, first, last)

        _share(scan_back, batch, channels)
        return ScanGradients(
            du.to(x.u.dtype),
            ddelta.to(x.delta.dtype),
            _total(dA).T.contiguous().to(x.A.dtype),
            _total(dB).mT.to(x.B.dtype),
            _total(dC).mT.to(x.C.dtype),
            None if x.D is None else _total(dD).to(x.D.dtype),
            None if x.z is None else dz.to(x.z.dtype),
            None if x.delta_bias is None else _total(dbias).to(x.delta_bias.dtype),
        )


@cache
def compiled(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """Compile a kernel for one dtype, or read it from Numba's cache.

    Parameters
    ----------
    name
        "forward" or "backward".
    dtype
        float32 or float64.
    """
    number: Any = {torch.float32: types.float32, torch.float64: types.float64}[dtype]
    sequence, matrix, vector = number[:, :, :], number[:, ::1], number[::1]
    kept, index, flag = number[:, :, :, ::1], types.intp, types.boolean
    five = (sequence, sequence, matrix, sequence, sequence)
    inputs = (*five, vector, vector, sequence, flag, flag)
    place = (index, index, index)
    function: Any = {"forward": forward, "backward": backward}[name]
    if name == "forward":
        signature = types.void(*inputs, sequence, kept, index, *place)
    else:
        sums = (matrix, matrix, matrix, vector, vector)
        signature = types.void(
            *inputs, sequence, kept, index, sequence, sequence, *sums, sequence, *place
        )
    started = time.perf_counter()
    try:
        kernel: Any = njit(signature, cache=True, **OPTIONS)(function)
    except RuntimeError:  # no folder that Numba can write to
        kernel = njit(signature, **OPTIONS)(function)
    seconds = time.perf_counter() - started
    if seconds > 1:
        log.info("compiled the scan (%s) for this CPU in %.0f s, once", name, seconds)
    return cast(Callable[..., None], kernel)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Make a tensor of NumPy's memory, for which it asks for huge pages where the system has them.

    A page that is touched first costs more than what the kernel writes into it.
    """
    return torch.from_numpy(np.empty(shape, _KINDS[dtype]))


def _total(parts: npt.NDArray[Any]) -> Tensor:
    """Sum over the first axis."""
    return torch.from_numpy(parts[0] if len(parts) == 1 else parts.sum(0))


def _array(values: Tensor, dtype: torch.dtype) -> npt.NDArray[Any]:
    """Give (batch, width, time) as a (batch, time, width) array of the accumulation dtype."""
    array: npt.NDArray[Any] = values.detach().to(dtype).mT.numpy()
    return array


def _rows(values: Tensor, dtype: torch.dtype) -> npt.NDArray[Any]:
    """Give an array as `_array` does, with the channels of a step side by side."""
    array = _array(values, dtype)
    return array if array.strides[2] == array.itemsize else np.ascontiguousarray(array)


def _inputs(x: ScanArguments, dtype: torch.dtype) -> tuple[Any, ...]:
    """Give what both kernels get first; zeros stand for what is not there."""
    none = torch.zeros(x.u.shape[1], dtype=dtype)
    skip, bias = (none if v is None else v.detach().to(dtype) for v in (x.D, x.delta_bias))
    rate = (x.A.detach().to(dtype).T * LOG2_E).contiguous()
    u, delta, z = (_rows(values, dtype) for values in (x.u, x.delta, x.u if x.z is None else x.z))
    B, C = _array(x.B, dtype), _array(x.C, dtype)
    skips = skip.contiguous().numpy(), bias.contiguous().numpy()
    return u, delta, rate.numpy(), B, C, *skips, z, x.delta_softplus, x.z is not None


def _group_width(batch: int, channels: int) -> int:
    """Channels of a task; depends on sizes alone, so that sums do not depend on the machine."""
    groups = min(-(-_TASKS // batch), -(-channels // LANES))
    return -(-channels // (groups * LANES)) * LANES


def _groups(batch: int, channels: int) -> int:
    return -(-channels // _group_width(batch, channels))


def _share(work: Callable[[int, int, int], None], batch: int, channels: int) -> None:
    """Call `work(b, first, last)` for every task, in as many threads as torch uses."""
    width = _group_width(batch, channels)
    tasks = [
        (b, first, min(first + width, channels))
        for b in range(batch)
        for first in range(0, channels, width)
    ]
    count = min(torch.get_num_threads(), len(tasks))
    left = deque(tasks)

    def go() -> None:
        while True:
            try:
                task = left.popleft()  # not a fixed share: any thread may be held up
            except IndexError:
                return
            work(*task)

    # This thread works, too; to submit single tasks would take longer than small ones do.
    others = [_threads(count - 1, os.getpid()).submit(go) for _ in range(1, count)]
    go()
    for other in others:
        other.result()


@cache
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """Make threads, once for each process: they do not survive a fork."""
    return ThreadPoolExecutor(count, thread_name_prefix="scan")
