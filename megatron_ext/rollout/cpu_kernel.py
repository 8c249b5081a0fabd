"""Attention over blocks where they lie, on CPU."""

import functools
from collections.abc import Callable
from typing import Any

import llvmlite.ir
import numpy
from numba import types
from numba.extending import intrinsic, overload

from data_tools.base.compiled import compiled


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
        for i in range(len(query)):
            stop = positions[i] + 1
            start = max(0, stop - window) if window else 0
            for t in range(start, stop):  # in the order of memory: a token's groups lie side by side
                block, place = table[i, t // size], t % size
                for g in range(groups):
                    for h in range(g * share, (g + 1) * share):
                        product = numpy.float32(0)
                        for c in range(d):
                            product += query[i, h, c] * _read(keys[block, place, g, c])
                        weights[t, h] = product * numpy.float32(scale)
            for h in range(heads):
                top = sinks[h] if len(sinks) else weights[start, h]
                for t in range(start, stop):
                    top = max(top, weights[t, h])
                total = numpy.exp(sinks[h] - top) if len(sinks) else numpy.float32(0)
                for t in range(start, stop):
                    weights[t, h] = numpy.exp(weights[t, h] - top)
                    total += weights[t, h]
                for t in range(start, stop):
                    weights[t, h] /= total
            out[i] = 0
            for t in range(start, stop):
                block, place = table[i, t // size], t % size
                for g in range(groups):
                    for h in range(g * share, (g + 1) * share):
                        weight = weights[t, h]
                        for c in range(d):
                            out[i, h, c] += weight * _read(values[block, place, g, c])

    return kernel
