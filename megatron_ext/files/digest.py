"""A digest that names a set of weights, whatever the layout of the ranks that hold them.

A tensor's sum is Σ bits · A(row) · B(column) mod 2^64: `bits` are an element's raw bits read as a signed integer, the
row counts all dimensions but the last of the whole tensor, and A and B are odd pseudo-random numbers. It adds up over
shards, any changed, swapped or moved element changes it (a multilinear hash: Carter & Wegman 1979), and it costs one
multiplication an element, so that conversion and checkpoints can afford it for every tensor. It does not withstand
somebody who forges weights: seals have SHA-256 for that.
"""

import hashlib
from collections.abc import Mapping

import torch

Shape = tuple[int, ...]

CHUNK = 1 << 17  # elements at a time: the temporary stays in cache
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_ROW, _COLUMN = 0x243F6A8885A308D3, 0x13198A2E03707344  # first digits of π: two unrelated sequences


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN, _MIX1, _MIX2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _odd(index: torch.Tensor, sequence: int) -> torch.Tensor:
    """Return splitmix64 (Steele, Lea, Flood 2014) of `index`, made odd. int64 wraps; torch shifts arithmetically:
    masks.
    """
    x = (index ^ sequence) + _GOLDEN
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX2
    return (x ^ ((x >> 31) & ((1 << 33) - 1))) | 1


def tensor_sum(data: torch.Tensor, offset: Shape, shape: Shape) -> torch.Tensor:
    """Return the sum, int64 [], of `data`, which begins at `offset` of a whole tensor of `shape`, all of the same
    length.
    """
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    if data.numel() == 0:
        return total
    if not shape:
        data, offset, shape = data.reshape(1), (0,), (1,)
    row = torch.zeros((), dtype=torch.int64, device=data.device)
    for size, start, whole in zip(data.shape[:-1], offset, shape):
        row = (row[..., None] * whole) + torch.arange(start, start + size, device=data.device)
    row = _odd(row.reshape(-1), _ROW)
    column = _odd(torch.arange(offset[-1], offset[-1] + data.shape[-1], device=data.device), _COLUMN)
    bits = data.detach().reshape(-1, data.shape[-1]).view(_BITS[data.element_size()])
    step = min(max(1, CHUNK // data.shape[-1]), len(bits))
    temporary = torch.empty((step, data.shape[-1]), dtype=torch.int64, device=data.device)
    for first in range(0, len(bits), step):
        part = bits[first : first + step]
        wide = temporary[: len(part)].copy_(part)
        total += (wide.mul_(column).sum(1) * row[first : first + step]).sum()
    return total


def combined(tensors: Mapping[str, tuple[str, Shape, int]]) -> str:
    """Return SHA-256 over the sorted lines "key dtype shape sum" of {key: (dtype, shape, sum)}."""
    hashed = hashlib.sha256()
    for key in sorted(tensors):
        dtype, shape, total = tensors[key]
        hashed.update(f"{key} {dtype} {list(shape)} {total % (1 << 64):016x}\n".encode())
    return hashed.hexdigest()
