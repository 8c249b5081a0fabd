"""Small operations of a rollout's pass on CPU, each one call of compiled code in place of several of torch.

A step has few tokens, and its norms, rotations and activations cost what their calls cost: they are float32 only,
without gradients, and `megatron_ext.cpu_linear.using` says when. Attention goes over a cache's blocks where they lie.
All are in this file, by which compiled code is known: one that calls another has its code within.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.ir
import numpy
import torch
from numba import types
from numba.extending import intrinsic, overload

from data_tools.base.compiled import compiled

_LOG2_E, _HALF = numpy.float32(1.44269504), numpy.float32(0.5)
_LEAST = numpy.float32(-104)  # below the logarithm of the least float32
_LN2_HIGH, _LN2_LOW = numpy.float32(0.693359375), numpy.float32(-2.12194440e-4)
_EXP = tuple(numpy.float32(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2,
                                        1.6666665459e-1, 5.0000001201e-1))  # fmt: skip

_NONE = numpy.empty(0, numpy.float32)


@intrinsic
def _of_bits(typing: Any, bits: Any) -> Any:
    """Return the float32 of these 32 bits. numba gives the first argument."""
    wanted = llvmlite.ir.FloatType()
    return types.float32(types.uint32), lambda _, builder, __, args: builder.bitcast(args[0], wanted)


def read(held: Any) -> float:
    """Return a number of the cache as float32.

    NumPy knows no bfloat16, which comes as its bits: the upper half of a float32.
    """
    raise NotImplementedError


@overload(read, inline="always")
def _compiled_read(held):  # type: ignore[no-untyped-def, unused-ignore]  # numba compares it with the lambdas
    """Return what numba compiles for `read` of this type."""
    if held == types.uint16:
        # numba gives the first argument of an intrinsic itself.
        return lambda held: _of_bits(numpy.uint32(held) << numpy.uint32(16))  # type: ignore[call-arg]
    return lambda held: held


@compiled(fastmath={"nsz", "contract"}, nogil=True, error_model="numpy")
def exp(x: Any) -> Any:
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
    power = read(numpy.uint16(exponent << numpy.int32(7)))  # 2^n, by its bits as bfloat16
    return (p * r * r + r + numpy.float32(1)) * power


@compiled(fastmath={"reassoc", "nsz", "contract"}, nogil=True, error_model="numpy")
def _rms_norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    for i in range(len(x)):
        squares = numpy.float32(0)
        for c in range(x.shape[1]):
            squares += x[i, c] * x[i, c]
        scale = numpy.float32(1) / numpy.sqrt(squares / numpy.float32(x.shape[1]) + numpy.float32(eps))
        for c in range(x.shape[1]):
            out[i, c] = x[i, c] * scale * weight[c]


@compiled(fastmath={"reassoc", "nsz", "contract"}, nogil=True, error_model="numpy")
def _heads(
    mixed: Any, cos: Any, sin: Any, of_query: Any, query_eps: Any, of_key: Any, key_eps: Any, query: Any, key: Any,
    value: Any,
) -> None:  # fmt: skip
    # In one piece and by single numbers: parts of arrays took five times as long to compile, and twice to run.
    share, d, half = mixed.shape[2] - 2, mixed.shape[3], cos.shape[1]
    for i in range(len(mixed)):
        for g in range(mixed.shape[1]):
            for j in range(share + 2):
                if j < share:
                    out, place, weight, eps = query, g * share + j, of_query, query_eps
                elif j == share:
                    out, place, weight, eps = key, g, of_key, key_eps
                else:
                    out, place, weight, eps = value, g, of_key[:0], 0.0
                if len(weight):
                    squares = numpy.float32(0)
                    for c in range(d):
                        squares += mixed[i, g, j, c] * mixed[i, g, j, c]
                    scale = numpy.float32(1) / numpy.sqrt(squares / numpy.float32(d) + numpy.float32(eps))
                    for c in range(d):
                        out[i, place, c] = mixed[i, g, j, c] * scale * weight[c]
                else:
                    for c in range(d):
                        out[i, place, c] = mixed[i, g, j, c]
                for c in range(half if j <= share else 0):
                    a, b = out[i, place, c], out[i, place, half + c]
                    out[i, place, c] = a * cos[i, c] - b * sin[i, c]
                    out[i, place, half + c] = b * cos[i, c] + a * sin[i, c]


@compiled(fastmath={"nsz", "contract"}, nogil=True, error_model="numpy")
def _swiglu(x: Any, out: Any) -> None:
    width = out.shape[1]
    for i in range(len(x)):
        for c in range(width):
            gate = x[i, c]
            power = exp(-abs(gate))
            above = numpy.float32(1) if gate >= 0 else power
            out[i, c] = gate * above / (numpy.float32(1) + power) * x[i, width + c]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return what torch.nn.functional.rms_norm does over the last dimension of x [..., h], weight [h]."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.reshape(-1, x.size(-1))
    _rms_norm(rows.numpy(), weight.detach().numpy(), eps, out.view(rows.shape).numpy())
    return out


def heads(
    mixed: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: Sequence[tuple[torch.Tensor | None, float]] = ((None, 0.0), (None, 0.0)),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query [T, groups * share, d], key and value [T, groups, d], of which `mixed` [T, groups, share + 2, d] has
    a group's side by side; query and key turned by rotary positions, cos and sin [T, 1, half] (layers/attention.py).

    `norms` are a weight [d] and an epsilon of queries, and of keys: with a weight these are normalised before.
    """
    tokens, groups, parts, d = mixed.shape
    query, key, value = (mixed.new_empty(tokens, groups * n, d) for n in (parts - 2, 1, 1))
    (of_query, query_eps), (of_key, key_eps) = ((_plain(weight), eps) for weight, eps in norms)
    _heads(
        mixed.numpy(), cos.squeeze(1).numpy(), sin.squeeze(1).numpy(), of_query, query_eps, of_key, key_eps,
        query.numpy(), key.numpy(), value.numpy(),
    )  # fmt: skip
    return query, key, value


def _plain(weight: torch.Tensor | None) -> numpy.ndarray:
    return _NONE if weight is None else weight.detach().numpy()


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """Return silu(a) b [..., n] of x [..., 2 n], a before b."""
    out = x.new_empty(*x.shape[:-1], x.size(-1) // 2)
    _swiglu(x.reshape(-1, x.size(-1)).numpy(), out.view(-1, out.size(-1)).numpy())
    return out


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
                            product += query[i, h, c] * read(keys[block, place, g, c])
                        weights[t, h] = product * numpy.float32(scale)
                for h in range(heads):
                    top[h] = max(top[h], weights[t, h])
            for h in range(heads):
                total[h] = exp(sinks[h] - top[h]) if len(sinks) else numpy.float32(0)
            for t in range(start, stop):
                for h in range(heads):  # side by side, so that many are computed at once
                    weights[t, h] = exp(weights[t, h] - top[h])
                    total[h] += weights[t, h]
            mixed[:] = 0
            for t in range(start, stop):
                block, place = table[i, t // size], t % size
                for g in range(groups):
                    for h in range(g * share, (g + 1) * share):
                        weight = weights[t, h]
                        for c in range(d):
                            mixed[h, c] += weight * read(values[block, place, g, c])
            for h in range(heads):
                for c in range(d):
                    out[i, h, c] = mixed[h, c] / total[h]

    return kernel
