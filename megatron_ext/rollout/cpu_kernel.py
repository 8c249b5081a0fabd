"""Attention over blocks where they lie, on CPU."""

import functools
from collections.abc import Callable
from typing import Any

import llvmlite.ir
import numpy
from numba import types
from numba.extending import intrinsic, overload

from data_tools.base.compiled import compiled

_LOG2_E, _HALF = numpy.float32(1.44269504), numpy.float32(0.5)
_LEAST = numpy.float32(-104)  # below the logarithm of the least float32
_LN2_HIGH, _LN2_LOW = numpy.float32(0.693359375), numpy.float32(-2.12194440e-4)
_EXP = tuple(numpy.float32(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2,
                                        1.6666665459e-1, 5.0000001201e-1))  # fmt: skip


@intrinsic
def _of_bits(typing: Any, bits: Any) -> Any:
    """Return the float32 of these 32 bits. numba gives the first argument."""
    wanted = llvmlite.ir.FloatType()
    return types.float32(types.uint32), lambda _, builder, __, args: builder.bitcast(args[0], wanted)


def _read(held: Any) -> float:
    """Return a number of the cache as float32.

    NumPy knows no bfloat16, which comes as its bits: the upper half of a float32.
    """
    raise NotImplementedError


@overload(_read, inline="always")
def _compiled_read(held):  # type: ignore[no-untyped-def, unused-ignore]  # numba compares it with the lambdas
    """Return what numba compiles for `_read` of this type."""
    if held == types.uint16:
        # numba gives the first argument of an intrinsic itself.
        return lambda held: _of_bits(numpy.uint32(held) << numpy.uint32(16))  # type: ignore[call-arg]
    return lambda held: held


@compiled(fastmath={"nsz", "contract"}, nogil=True, error_model="numpy")
def _exp(x: Any) -> Any:
    """Return e^x of a float32 x up to 0, within 2^-23 of itself, and 0 where it has no normal float32; NaN of NaN.

    Many at once, which the C library's function is not: e^x = 2^n e^r with r = x - n ln 2, whose polynomial is Cephes'
    (expf.c), ln 2 in two parts.
    """
    x = _LEAST if x < _LEAST else x  # and not `max`, which may lose a NaN
    n = numpy.floor(x * _LOG2_E + _HALF)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = _EXP[0]
    for k in range(1, 6):
        p = p * r + _EXP[k]
    exponent = max(numpy.int32(n) + numpy.int32(127), numpy.int32(0))
    power = _read(numpy.uint16(exponent << numpy.int32(7)))  # 2^n, by its bits as bfloat16
    return (p * r * r + r + numpy.float32(1)) * power


@functools.cache
def in_place(share: int, d: int, size: int) -> Callable[..., None]:
    """Return a kernel that is compiled for `share` query heads a group, heads of size `d`, and blocks of `size` tokens.

    kernel(query, keys, values, table, positions, scale, window, sinks, out): query and out float32 [n, heads, d], keys
    and values [blocks, size, groups, d], table int64 [n, most], positions int64 [n], window 0 for none, sinks float32
    [heads] or [0]. A document's numbers depend on no other's.
    """

    @compiled(fastmath={"reassoc", "nsz", "contract"}, nogil=True, error_model="numpy")
    def kernel(
        query: Any, keys: Any, values: Any, table: Any, positions: Any, scale: Any, window: Any, sinks: Any, out: Any
    ) -> None:
        heads, groups = query.shape[1], keys.shape[2]
        weights = numpy.empty((positions.max() + 1, heads), numpy.float32)
        top, total = numpy.empty(heads, numpy.float32), numpy.empty(heads, numpy.float32)
        mixed = numpy.empty((heads, d), numpy.float32)
        for i in range(len(query)):
            stop = positions[i] + 1
            start = max(0, stop - window) if window else 0
            for h in range(heads):
                top[h] = sinks[h] if len(sinks) else numpy.float32(-numpy.inf)
            for t in range(start, stop):  # in the order of memory: a token's groups lie side by side
                block, place = table[i, t // size], t % size
                for g in range(groups):
                    for h in range(g * share, (g + 1) * share):
                        product = numpy.float32(0)
                        for c in range(d):
                            product += query[i, h, c] * _read(keys[block, place, g, c])
                        weights[t, h] = product * numpy.float32(scale)
                for h in range(heads):
                    top[h] = max(top[h], weights[t, h])
            for h in range(heads):
                total[h] = _exp(sinks[h] - top[h]) if len(sinks) else numpy.float32(0)
            for t in range(start, stop):
                for h in range(heads):  # side by side, so that many are computed at once
                    weights[t, h] = _exp(weights[t, h] - top[h])
                    total[h] += weights[t, h]
            mixed[:] = 0
            for t in range(start, stop):
                block, place = table[i, t // size], t % size
                for g in range(groups):
                    for h in range(g * share, (g + 1) * share):
                        weight = weights[t, h]
                        for c in range(d):
                            mixed[h, c] += weight * _read(values[block, place, g, c])
            for h in range(heads):
                for c in range(d):
                    out[i, h, c] = mixed[h, c] / total[h]

    return kernel
