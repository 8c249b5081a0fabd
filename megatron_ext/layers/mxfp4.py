"""MXFP4, the format of the released gpt-oss experts: 4-bit floats in blocks of 32 that share a power of two.

`blocks` uint8 [..., n, 16] holds two E2M1 values a byte, the low nibble first; `scales` uint8 [..., n] the exponent of
each block, biased by 127. A matrix is [out, in], blocks lie along its rows. The format is that of OCP Microscaling
Formats (MX), version 1.0. No megatron-core here: folders are converted without it.
"""

from functools import cache

import torch

from megatron_ext.parallel.calibration import TILE
from megatron_ext.parallel.shape import MXFP4_BLOCK as BLOCK

BIAS = 127
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
LARGEST_EXPONENT = 2  # of an E2M1 value: 4 and 6 are 2 ** 2 times 1 and 1.5
HIGHEST = 125  # of a scale under which all values are finite in bfloat16


@cache
def _pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return [256, 2]: the two values of each byte."""
    byte = torch.arange(256)
    return torch.tensor(E2M1, dtype=dtype)[torch.stack([byte & 15, byte >> 4], dim=-1)].to(device)


@cache
def _limits(device: torch.device) -> torch.Tensor:
    """Return fp32 [7]: what a magnitude must exceed to become the next E2M1 value, halves going to even mantissas."""
    values = torch.tensor(E2M1[:8])
    middles = (values[:-1] + values[1:]) / 2
    middles[1::2] = torch.nextafter(middles[1::2], torch.zeros(()))  # there the larger neighbour is the even one
    return middles.to(device)


def dequantised(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Make values [..., 32 n] of blocks uint8 [..., n, 16] and scales uint8 [..., n], bit for bit those of
    transformers.
    """
    values = _pairs(dtype, blocks.device)[blocks.int()].flatten(-2)  # [..., n, 32]
    return torch.ldexp(values, scales.int()[..., None] - BIAS).to(dtype).flatten(-2)


def quantised(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Make (blocks uint8 [..., n, 16], scales uint8 [..., n]) of finite values [..., 32 n], rounded to nearest.

    A block takes the scale of the format's own rule, under which its largest magnitude m is from 4 to below 8 and what
    is above 6 becomes 6, or the next larger scale where that errs less in squares. So each value x errs by at most
    max(|x| / 4, m / 8), where no scale is at its lowest; what is made of blocks and scales comes back as it was, and
    equal numbers always have the same bytes. Signs of zeros stay.

    Raises ValueError for values that are not finite, or that are no whole blocks.
    """
    if values.shape[-1] % BLOCK:
        raise ValueError(f"{values.shape[-1]} values a row are no whole blocks of {BLOCK}")
    x = values.float().unflatten(-1, (-1, BLOCK))  # [..., n, 32]
    largest = x.abs().amax(-1)
    if not torch.isfinite(largest).all():
        raise ValueError("has values that are not finite")
    exponents = torch.frexp(largest).exponent - 1 - LARGEST_EXPONENT  # floor(log2 m) - 2
    low = torch.where(largest > 0, exponents, -BIAS).clamp(min=-BIAS)
    codes, error = _rounded(x, low)
    high = (low + 1).clamp(max=HIGHEST)
    further, error_above = _rounded(x, high)
    better = 4 * error_above < error
    codes = torch.where(better[..., None], further, codes)
    scales = (torch.where(better, high, low) + BIAS).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales


def _rounded(x: torch.Tensor, exponents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (nibbles uint8 [..., n, 32], sum of squared errors [..., n], each divided by its scale) of x [..., n, 32]
    under exponents [..., n]."""
    scaled = torch.ldexp(x, -exponents[..., None])
    codes = torch.bucketize(scaled.abs(), _limits(x.device)).to(torch.uint8)
    rounded = torch.tensor(E2M1[:8], device=x.device)[codes.int()]
    return codes | torch.signbit(x).to(torch.uint8) << 3, (scaled.abs() - rounded).square().sum(-1)


# ---------------------------------------------------------------- blocks and scales of a matrix in one tensor


def packed_room(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return zeros uint8 [out, in / 32, 17] for a matrix [out, in]: 16 bytes of a block, and its scale."""
    rows, columns = shape
    return torch.zeros(rows, columns // BLOCK, BLOCK // 2 + 1, dtype=torch.uint8, device=device)


def packed(values: torch.Tensor) -> torch.Tensor:
    """Return values [out, in] as uint8 [out, in / 32, 17]."""
    blocks, scales = quantised(values)
    return torch.cat([blocks, scales[..., None]], dim=-1)


def unpacked(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix [out, in] of uint8 [out, in / 32, 17], made in tiles of rows: of TILE values there is, besides,
    what their making takes."""
    rows = max(1, TILE // (packed.shape[1] * BLOCK))
    tiles = [dequantised(tile[..., :-1], tile[..., -1], dtype) for tile in packed.split(rows)]
    return torch.cat(tiles) if len(tiles) > 1 else tiles[0]
