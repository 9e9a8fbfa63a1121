"""Kernels of the selective scan for a CPU, compiled by Numba, with all that they call.

A kernel goes through time with a few channels of one batch element side by side: their states
stay in the first cache, and every inner loop is one over channels that the compiler turns into
vector instructions. The state is kept every few steps; the backward pass recomputes those in
between. Kernels are compiled once per machine and then read from Numba's cache on disk, which
looks at this file alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

LANES = 64
"""Channels side by side, at most: what the backward pass needs of them fits a second cache."""
_LINE = 16
"""Channels in a line of a cache (64 bytes of float32)."""
_FAST = {"contract", "reassoc", "nsz", "arcp"}
"""Floating-point freedoms: fused products, sums in any order; NaN and infinity stay."""
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": _FAST}

_ONE = np.float32(1)
LOG2_E, _LN_2 = math.log2(math.e), math.log(2)
_LOWEST = np.float32(-126)
_ROUND = np.float32(1.5 * 2**23 + 127)
"""Added to a number, leaves its whole part plus an exponent's bias in the lowest bits."""
_HIGHEST = _ROUND + np.float32(128)
_E1, _E2, _E3, _E4, _E5 = (
    np.float32(c) for c in (0.69314698, 0.24022242, 0.055507337, 0.0096715128, 0.0013264727)
)
"""2 ** f - 1 on [-.5, .5]; the largest relative error is as small as five terms allow (9e-8)."""
_L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (np.float32(2 / (2 * k + 1)) for k in range(8))


# mypy: disable-error-code="call-arg"
# (An intrinsic's first parameter, the typing context, is not given by those who call it.)


@intrinsic
def _plus(_: Any, x: Any, y: Any) -> Any:
    """Add two float32 as written; sums in any order would undo a rounding."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments, flags=("contract",))

    return types.float32(types.float32, types.float32), generate


@intrinsic
def _two_to(_: Any, rounded: Any) -> Any:
    """2 ** whole of what adding `_ROUND` gave: its lowest bits become the exponent's."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        return builder.bitcast(builder.shl(bits, word(23)), ir.FloatType())

    return types.float32(types.float32), generate


@intrinsic
def _place(_: Any, array: Any, b: Any, t: Any, d: Any) -> Any:
    """Point at a number of a three-dimensional array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, (array, *index) = signature.args[0], arguments
        found = context.make_array(kind)(context, builder, array)
        return cgutils.get_item_pointer(context, builder, kind, found, index)

    return types.CPointer(array.dtype)(array, types.intp, types.intp, types.intp), generate


@intrinsic
def _prefetch(_: Any, place: Any) -> Any:
    """Have what lies at a place brought to the second cache."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(call, [builder.bitcast(arguments[0], byte), word(0), word(2), word(1)])
        return context.get_dummy_value()

    return types.none(place), generate


@intrinsic
def _stack(_: Any, like: Any, count: Any) -> Any:
    """Take room for `count` numbers of an array's dtype on the stack, until the kernel ends.

    The compiler knows that nothing else points there, and leaves out its checks for that.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = context.get_data_type(signature.args[0].dtype)
        return builder.alloca(number, size=arguments[1])

    return types.CPointer(like.dtype)(like, types.intp), generate


def _exp2(x: Any) -> Any:
    """2 ** x."""
    return 2.0**x


def _exp2_narrow(x: Any) -> Any:
    """Join a polynomial on [-.5, .5] and an exponent, within 2e-7; vectorises."""
    x = _LOWEST if x < _LOWEST else x
    rounded: Any = _plus(x, _ROUND)
    rounded = _HIGHEST if rounded > _HIGHEST else rounded
    f = x - _plus(rounded, -_ROUND)
    p = (((_E5 * f + _E4) * f + _E3) * f + _E2) * f + _E1
    return (p * f + _ONE) * _two_to(rounded)


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
def _ahead(arrays: Any, b: int, start: int, count: int, first: int, width: int) -> None:
    """Have a few channels of some steps, needed soon, brought to the second cache.

    They lie too far apart for the processor to foresee.
    """
    for values in arrays:
        for k in range(count):
            for i in range(0, width, _LINE):
                _prefetch(_place(values, b, start + k, first + i))


@njit
def _load(values: Any, b: int, start: int, count: int, first: int, width: int, rows: Any) -> None:
    """Take a few channels of some steps; channels lie side by side."""
    for k in range(count):
        row, source = rows[k], carray(_place(values, b, start + k, first), (width,))
        for i in range(width):
            row[i] = source[i]


@njit
def _store(rows: Any, values: Any, b: int, start: int, count: int, first: int, width: int) -> None:
    for k in range(count):
        row, target = rows[k], carray(_place(values, b, start + k, first), (width,))
        for i in range(width):
            target[i] = row[i]


@njit
def _step_sizes(raw: Any, step: Any, width: int, softplus: bool) -> None:
    """Give the step sizes of a row of `delta` plus bias."""
    number = raw.dtype.type
    if softplus:
        for i in range(width):
            small = _exp2(-abs(raw[i]) * number(LOG2_E))
            step[i] = max(raw[i], number(0)) + _log1p(small)
    else:
        for i in range(width):
            step[i] = raw[i]


@njit
def _steps_and_slopes(raw: Any, step: Any, width: int, softplus: bool) -> None:
    """Give the step sizes of a row of `delta` plus bias, which makes way for their derivative."""
    number = raw.dtype.type
    if softplus:
        for i in range(width):
            small = _exp2(-abs(raw[i]) * number(LOG2_E))
            share = number(1) / (number(1) + small)
            step[i] = max(raw[i], number(0)) + _log1p(small)
            raw[i] = share if raw[i] >= number(0) else small * share
    else:
        for i in range(width):
            step[i] = raw[i]
            raw[i] = number(1)


@njit
def _sigmoid(row: Any, result: Any, width: int) -> None:
    number = row.dtype.type
    for i in range(width):
        small = _exp2(-abs(row[i]) * number(LOG2_E))
        share = number(1) / (number(1) + small)
        result[i] = share if row[i] >= number(0) else small * share


def forward(
    u: Any, delta: Any, rate: Any, B: Any, C: Any, D: Any, bias: Any, z: Any,
    softplus: bool, gated: bool, y: Any, kept: Any, length: int, b: int, first: int, last: int,
) -> None:  # fmt: skip
    """Scan channels first..last of one batch element; sequences are (batch, time, channels)."""
    n_states, n_steps = rate.shape[0], u.shape[1]
    keep = kept.shape[1] > 0
    states = carray(_stack(rate, n_states * LANES), (n_states, LANES))
    rates = carray(_stack(rate, n_states * LANES), (n_states, LANES))
    tiles = np.empty((4, length, LANES), rate.dtype)
    xs, raws, gates, totals = tiles[0], tiles[1], tiles[2], tiles[3]
    step = carray(_stack(rate, LANES), (LANES,))
    drive = carray(_stack(rate, LANES), (LANES,))
    share = carray(_stack(rate, LANES), (LANES,))
    for d in range(first, last, LANES):
        width = min(LANES, last - d)
        states[:] = rate.dtype.type(0)
        rates[:, :width] = rate[:, d : d + width]
        skip, offset = D[d : d + width], bias[d : d + width]
        for start in range(0, n_steps, length):
            count = min(length, n_steps - start)
            if keep:
                for n in range(n_states):
                    state, target = states[n], kept[b, start // length, n, d : d + width]
                    for i in range(width):
                        target[i] = state[i]
            _load(u, b, start, count, d, width, xs)
            _load(delta, b, start, count, d, width, raws)
            if gated:
                _load(z, b, start, count, d, width, gates)
            after = start + length
            _ahead((u, delta, z, y), b, after, min(length, n_steps - after), d, width)
            for k in range(count):
                x, raw, gate, total = xs[k], raws[k], gates[k], totals[k]
                for i in range(width):
                    raw[i] += offset[i]
                    total[i] = skip[i] * x[i]
                _step_sizes(raw, step, width, softplus)
                for i in range(width):
                    drive[i] = step[i] * x[i]
                for n in range(n_states):
                    into, out = B[b, start + k, n], C[b, start + k, n]
                    slow, state = rates[n], states[n]
                    for i in range(width):
                        now = _exp2(step[i] * slow[i]) * state[i] + into * drive[i]
                        state[i] = now
                        total[i] += out * now
                if gated:
                    _sigmoid(gate, share, width)
                    for i in range(width):
                        total[i] *= gate[i] * share[i]
            _store(totals, y, b, start, count, d, width)


def backward(
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
    states = np.empty((length + 1, n_states, LANES), rate.dtype)
    decays = np.empty((length, n_states, LANES), rate.dtype)
    tiles = np.empty((5, length, LANES), rate.dtype)
    xs, raws, steps, gates, grads = tiles[0], tiles[1], tiles[2], tiles[3], tiles[4]
    rates = carray(_stack(rate, n_states * LANES), (n_states, LANES))
    carry = carray(_stack(rate, n_states * LANES), (n_states, LANES))
    sums = carray(_stack(rate, n_states * LANES), (n_states, LANES))
    share = carray(_stack(rate, LANES), (LANES,))
    dstep = carray(_stack(rate, LANES), (LANES,))
    ddrive = carray(_stack(rate, LANES), (LANES,))
    total = carray(_stack(rate, LANES), (LANES,))
    own = carray(_stack(rate, LANES), (LANES,))
    slope = carray(_stack(rate, LANES), (LANES,))
    for d in range(first, last, LANES):
        width = min(LANES, last - d)
        carry[:] = zero
        sums[:] = zero
        rates[:, :width] = rate[:, d : d + width]
        skip, offset = D[d : d + width], bias[d : d + width]
        of_skip, of_offset = dD[d : d + width], dbias[d : d + width]
        for part in range((n_steps - 1) // length, -1, -1):
            start = part * length
            count = min(length, n_steps - start)
            for n in range(n_states):
                before, source = states[0, n], kept[b, part, n, d : d + width]
                for i in range(width):
                    before[i] = source[i]
            _load(u, b, start, count, d, width, xs)
            _load(delta, b, start, count, d, width, raws)
            _load(grad, b, start, count, d, width, grads)
            if gated:
                _load(z, b, start, count, d, width, gates)
            if part > 0:
                _ahead((u, delta, z, grad, du, ddelta), b, start - length, length, d, width)
                if gated:
                    _ahead((dz,), b, start - length, length, d, width)
            for k in range(count):
                x, raw, step = xs[k], raws[k], steps[k]
                for i in range(width):
                    raw[i] += offset[i]
                _steps_and_slopes(raw, step, width, softplus)
                for i in range(width):
                    own[i] = step[i] * x[i]
                for n in range(n_states):
                    into = B[b, start + k, n]
                    slow, decay = rates[n], decays[k, n]
                    before, after = states[k, n], states[k + 1, n]
                    for i in range(width):
                        now = _exp2(step[i] * slow[i])
                        decay[i] = now
                        after[i] = now * before[i] + into * own[i]
            for k in range(count - 1, -1, -1):
                t = start + k
                x, raw, step, gate, dy = xs[k], raws[k], steps[k], gates[k], grads[k]
                if gated:
                    for i in range(width):
                        total[i] = skip[i] * x[i]
                    for n in range(n_states):
                        out, after = C[b, t, n], states[k + 1, n]
                        for i in range(width):
                            total[i] += out * after[i]
                    _sigmoid(gate, share, width)
                    for i in range(width):
                        slope[i] = share[i] * (one + gate[i] * (one - share[i]))
                        slope[i] *= total[i] * dy[i]
                        dy[i] *= gate[i] * share[i]
                        gate[i] = slope[i]
                for i in range(width):
                    own[i] = step[i] * x[i]
                    dstep[i] = zero
                    ddrive[i] = zero
                for n in range(n_states):
                    into, out = B[b, t, n], C[b, t, n]
                    slow, decay, back, of_rate = rates[n], decays[k, n], carry[n], sums[n]
                    before, after = states[k, n], states[k + 1, n]
                    of_into, of_out = zero, zero
                    for i in range(width):
                        of_out += dy[i] * after[i]
                        now = back[i] + out * dy[i]
                        of_into += own[i] * now
                        ddrive[i] += into * now
                        now *= decay[i]
                        back[i] = now
                        through = now * before[i]
                        of_rate[i] += through * step[i]
                        dstep[i] += through * slow[i]
                    dB[t, n] += of_into
                    dC[t, n] += of_out
                for i in range(width):
                    dstep[i] = dstep[i] * ln_2 + ddrive[i] * x[i]
                    of_skip[i] += dy[i] * x[i]
                    x[i] = ddrive[i] * step[i] + skip[i] * dy[i]
                    raw[i] *= dstep[i]
                    of_offset[i] += raw[i]
            # The inputs of a step have made way for their gradients.
            _store(xs, du, b, start, count, d, width)
            _store(raws, ddelta, b, start, count, d, width)
            if gated:
                _store(gates, dz, b, start, count, d, width)
        dA[:, d : d + width] += sums[:, :width]
