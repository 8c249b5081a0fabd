"""MXFP4, the format of the released gpt-oss experts: 4-bit floats in blocks of 32 that share a power of two.

`X_blocks` uint8 [..., blocks, 16] holds two E2M1 values a byte, the low nibble first; `X_scales` uint8 [..., blocks]
the exponent, biased by 127. A matrix is stored [out, in]: megatron-core's orientation, while the bfloat16 parameter of
transformers is [in, out]. Both are square in the released models, so what decides is which of the two a file has.
The format is that of OCP Microscaling Formats (MX), version 1.0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from megatron_ext.models.layouts import Shape, Stored

BLOCK = 32  # values that share a scale
BIAS = 127
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@cache
def _pairs(dtype: torch.dtype) -> torch.Tensor:
    """Return [256, 2]: the two values of each byte."""
    byte = torch.arange(256)
    return torch.tensor(E2M1, dtype=dtype)[torch.stack([byte & 15, byte >> 4], dim=-1)]


def dequantised(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Make values [..., 32 n] of blocks uint8 [..., n, 16] and scales uint8 [..., n], bit for bit those of
    transformers.
    """
    values = _pairs(dtype)[blocks.int()].flatten(-2)  # [..., n, 32]
    return torch.ldexp(values, scales.int()[..., None] - BIAS).to(dtype).flatten(-2)


@dataclass(frozen=True)
class Quantised(Stored):
    """Reads a layout whose only matrix [out, in] comes as blocks and scales. It goes out unquantised, by the
    plain layout.
    """

    def hf_shapes(self) -> list[Shape]:
        ((*rows, columns),) = self.inner.hf_shapes()
        return [(*rows, columns // BLOCK, BLOCK // 2), (*rows, columns // BLOCK)]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        blocks, scales = tensors
        return self.inner.join([dequantised(blocks, scales)])

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        raise NotImplementedError("experts are exported in the model's dtype, not as MXFP4")
