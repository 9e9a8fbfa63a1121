"""Kernels of the selective scan for a CPU, compiled by Numba, with all that they call.

A kernel goes through time with a few channels of one batch element side by side: their states
stay in the first cache, and every inner loop is one over channels that the compiler turns into
vector instructions. The state is kept every few steps; the backward pass recomputes those in
between. Kernels are compiled once per machine and then read from Numba's cache on disk, which
looks at this file alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

log = logging.getLogger(__name__)

LANES = 64
"""Channels side by side, at most: what the backward pass needs of them fits a second cache."""
_FAST = {"contract", "reassoc", "nsz", "arcp"}
"""Floating-point freedoms: fused products, sums in any order; NaN and infinity stay."""
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": _FAST}

_ONE = np.float32(1)
_LOWEST, _HIGHEST = np.float32(-126), np.float32(128)
LOG2_E, _LN_2 = math.log2(math.e), math.log(2)
_E1, _E2, _E3, _E4, _E5, _E6 = (
    np.float32(math.log(2) ** k / math.factorial(k)) for k in range(1, 7)
)
_L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (np.float32(2 / (2 * k + 1)) for k in range(8))


@intrinsic
def _nearest(_: Any, x: Any) -> Any:
    """Round a float32 to the nearest whole number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name = "llvm.nearbyint"
        return builder.call(builder.module.declare_intrinsic(name, [ir.FloatType()]), arguments)

    return types.float32(types.float32), generate


@intrinsic
def _two_to(_: Any, whole: Any) -> Any:
    """2 ** whole for a whole float32 in [-126, 128], by setting the exponent's bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        exponent = builder.add(builder.fptosi(arguments[0], word), word(127))
        return builder.bitcast(builder.shl(exponent, word(23)), ir.FloatType())

    return types.float32(types.float32), generate


def _exp2(x: Any) -> Any:
    """2 ** x."""
    return 2.0**x


def _exp2_narrow(x: Any) -> Any:
    """Taylor's polynomial on [-.5, .5] and an exponent, within 2e-7; vectorises."""
    x = _LOWEST if x < _LOWEST else x
    x = _HIGHEST if x > _HIGHEST else x
    whole: Any = _nearest(x)  # type: ignore[call-arg]
    f = x - whole
    p = (((_E6 * f + _E5) * f + _E4) * f + _E3) * f + _E2
    return ((p * f + _E1) * f + _ONE) * _two_to(whole)


def _log1p(x: Any) -> Any:
    """log(1 + x) for x in [0, 1]."""
    return math.log1p(x)


def _log1p_narrow(x: Any) -> Any:
    """2 atanh(s) with s = x / (2 + x), at most 1/3, within 2e-7; vectorises."""
    s = x / (_ONE + _ONE + x)
    q = s * s
    high = ((_L8 * q + _L7) * q + _L6) * q + _L5
    return s * ((((high * q + _L4) * q + _L3) * q + _L2) * q + _L1)


@overload(_exp2)
def _choose_exp2(x: Any) -> Any:
    return _exp2_narrow if x is types.float32 else _exp2


@overload(_log1p)
def _choose_log1p(x: Any) -> Any:
    return _log1p_narrow if x is types.float32 else _log1p


@njit
def _load(values: Any, b: int, t: int, first: int, width: int, row: Any) -> None:
    """Take a few channels of one step."""
    for i in range(width):
        row[i] = values[b, t, first + i]


@njit
def _store(row: Any, values: Any, b: int, t: int, first: int, width: int) -> None:
    for i in range(width):
        values[b, t, first + i] = row[i]


@njit
def _step_sizes(raw: Any, step: Any, softplus: bool) -> None:
    """Give the step sizes of a row of `delta` plus bias."""
    number = raw.dtype.type
    if softplus:
        for i in range(raw.size):
            small = _exp2(-abs(raw[i]) * number(LOG2_E))
            step[i] = max(raw[i], number(0)) + _log1p(small)
    else:
        for i in range(raw.size):
            step[i] = raw[i]


@njit
def _sigmoid(row: Any, result: Any) -> None:
    number = row.dtype.type
    for i in range(row.size):
        small = _exp2(-abs(row[i]) * number(LOG2_E))
        share = number(1) / (number(1) + small)
        result[i] = share if row[i] >= number(0) else small * share


def _forward(
    u: Any, delta: Any, rate: Any, B: Any, C: Any, D: Any, bias: Any, z: Any,
    softplus: bool, gated: bool, y: Any, kept: Any, length: int, b: int, first: int, last: int,
) -> None:  # fmt: skip
    """Scan channels first..last of one batch element; sequences are (batch, time, channels)."""
    number = rate.dtype.type
    n_states, n_steps = rate.shape[0], u.shape[1]
    keep = kept.shape[1] > 0
    states = np.empty((n_states, LANES), rate.dtype)
    rates = np.zeros((n_states, LANES), rate.dtype)
    rows = np.zeros((9, LANES), rate.dtype)
    x, raw, step, drive, total, gate, share = (
        rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6]
    )  # fmt: skip
    biases, skip = rows[7], rows[8]
    for d in range(first, last, LANES):
        width = min(LANES, last - d)
        rows[:] = number(0)
        states[:] = number(0)
        for i in range(width):
            biases[i], skip[i] = bias[d + i], D[d + i]
            for n in range(n_states):
                rates[n, i] = rate[n, d + i]
        for t in range(n_steps):
            if keep and t % length == 0:
                for n in range(n_states):
                    for i in range(width):
                        kept[b, t // length, n, d + i] = states[n, i]
            _load(u, b, t, d, width, x)
            _load(delta, b, t, d, width, raw)
            for i in range(width):
                raw[i] += biases[i]
            _step_sizes(raw, step, softplus)
            for i in range(width):
                drive[i] = step[i] * x[i]
                total[i] = skip[i] * x[i]
            for n in range(n_states):
                into, out = B[b, t, n], C[b, t, n]
                for i in range(width):
                    state = _exp2(step[i] * rates[n, i]) * states[n, i] + into * drive[i]
                    states[n, i] = state
                    total[i] += out * state
            if gated:
                _load(z, b, t, d, width, gate)
                _sigmoid(gate, share)
                for i in range(width):
                    total[i] *= gate[i] * share[i]
            _store(total, y, b, t, d, width)


def _backward(
    u: Any, delta: Any, rate: Any, B: Any, C: Any, D: Any, bias: Any, z: Any,
    softplus: bool, gated: bool, grad: Any, kept: Any, length: int,
    du: Any, ddelta: Any, dA: Any, dB: Any, dC: Any, dD: Any, dbias: Any, dz: Any,
    b: int, first: int, last: int,
) -> None:  # fmt: skip
    """Go back through channels first..last of one batch element.

    What is found is added to `dA` (states, channels), `dD`, `dbias` (channels,), `dB` and `dC`
    (time, states).
    """
    number = rate.dtype.type
    zero, one, ln_2 = number(0), number(1), number(_LN_2)
    n_states, n_steps = rate.shape[0], u.shape[1]
    states = np.zeros((length + 1, n_states, LANES), rate.dtype)
    decays = np.zeros((length, n_states, LANES), rate.dtype)
    rates = np.zeros((n_states, LANES), rate.dtype)
    carry = np.zeros((n_states, LANES), rate.dtype)
    sums = np.zeros((n_states, LANES), rate.dtype)
    steps = np.zeros((length, 3, LANES), rate.dtype)
    rows = np.zeros((13, LANES), rate.dtype)
    biases, skip, gate, share, dy, dstep, ddrive, total, dskip, dbiases, slope, own, through = (
        rows[0], rows[1], rows[2], rows[3], rows[4], rows[5],
        rows[6], rows[7], rows[8], rows[9], rows[10], rows[11], rows[12],
    )  # fmt: skip
    for d in range(first, last, LANES):
        width = min(LANES, last - d)
        rows[:] = zero
        steps[:] = zero
        rates[:] = zero
        carry[:] = zero
        sums[:] = zero
        states[0] = zero
        for i in range(width):
            biases[i], skip[i] = bias[d + i], D[d + i]
            for n in range(n_states):
                rates[n, i] = rate[n, d + i]
        for part in range((n_steps - 1) // length, -1, -1):
            start = part * length
            count = min(length, n_steps - start)
            for n in range(n_states):
                for i in range(width):
                    states[0, n, i] = kept[b, part, n, d + i]
            for k in range(count):
                x, raw, step = steps[k, 0], steps[k, 1], steps[k, 2]
                _load(u, b, start + k, d, width, x)
                _load(delta, b, start + k, d, width, raw)
                for i in range(width):
                    raw[i] += biases[i]
                _step_sizes(raw, step, softplus)
                for i in range(width):
                    own[i] = step[i] * x[i]
                for n in range(n_states):
                    into = B[b, start + k, n]
                    for i in range(width):
                        decay = _exp2(step[i] * rates[n, i])
                        decays[k, n, i] = decay
                        states[k + 1, n, i] = decay * states[k, n, i] + into * own[i]
            for k in range(count - 1, -1, -1):
                t = start + k
                x, raw, step = steps[k, 0], steps[k, 1], steps[k, 2]
                _load(grad, b, t, d, width, dy)
                if gated:
                    for i in range(width):
                        total[i] = skip[i] * x[i]
                    for n in range(n_states):
                        out = C[b, t, n]
                        for i in range(width):
                            total[i] += out * states[k + 1, n, i]
                    _load(z, b, t, d, width, gate)
                    _sigmoid(gate, share)
                    for i in range(width):
                        slope[i] = share[i] * (one + gate[i] * (one - share[i]))
                        slope[i] *= total[i] * dy[i]
                        dy[i] *= gate[i] * share[i]
                    _store(slope, dz, b, t, d, width)
                for i in range(width):
                    own[i] = step[i] * x[i]
                    dstep[i] = zero
                    ddrive[i] = zero
                for n in range(n_states):
                    into, out = B[b, t, n], C[b, t, n]
                    of_into, of_out = zero, zero
                    for i in range(width):
                        of_out += dy[i] * states[k + 1, n, i]
                    for i in range(width):
                        now = carry[n, i] + out * dy[i]
                        carry[n, i] = now
                        of_into += own[i] * now
                        ddrive[i] += into * now
                    for i in range(width):
                        now = carry[n, i] * decays[k, n, i]
                        carry[n, i] = now
                        through[i] = now * states[k, n, i]
                    for i in range(width):
                        sums[n, i] += through[i] * step[i]
                        dstep[i] += through[i] * rates[n, i]
                    dB[t, n] += of_into
                    dC[t, n] += of_out
                for i in range(width):
                    dstep[i] = dstep[i] * ln_2 + ddrive[i] * x[i]
                    ddrive[i] = ddrive[i] * step[i] + skip[i] * dy[i]
                    dskip[i] += dy[i] * x[i]
                if softplus:
                    _sigmoid(raw, share)
                    for i in range(width):
                        dstep[i] *= share[i]
                for i in range(width):
                    dbiases[i] += dstep[i]
                _store(ddrive, du, b, t, d, width)
                _store(dstep, ddelta, b, t, d, width)
        for i in range(width):
            dD[d + i] += dskip[i]
            dbias[d + i] += dbiases[i]
            for n in range(n_states):
                dA[n, d + i] += sums[n, i]


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
    inputs = (sequence, sequence, matrix, sequence, sequence, vector, vector, sequence, flag, flag)
    place = (index, index, index)
    function: Any = {"forward": _forward, "backward": _backward}[name]
    if name == "forward":
        signature = types.void(*inputs, sequence, kept, index, *place)
    else:
        sums = (matrix, matrix, matrix, vector, vector)
        signature = types.void(
            *inputs, sequence, kept, index, sequence, sequence, *sums, sequence, *place
        )
    started = time.perf_counter()
    try:
        kernel: Any = njit(signature, cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no folder that Numba can write to
        kernel = njit(signature, **_OPTIONS)(function)
    seconds = time.perf_counter() - started
    if seconds > 1:
        log.info("compiled the scan (%s) for this CPU in %.0f s, once", name, seconds)
    return cast(Callable[..., None], kernel)
