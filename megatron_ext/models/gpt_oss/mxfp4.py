"""How a gpt-oss file stores an expert's matrix as MXFP4: `X_blocks` and `X_scales` (layers/mxfp4.py has the format).

A matrix is stored [out, in]: megatron-core's orientation, while the bfloat16 parameter of transformers is [in, out].
Both are square in the released models, so what decides is which of the two a file has.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_ext.layers.mxfp4 import BLOCK, dequantised, quantised
from megatron_ext.models.layouts import Shape, Stored


@dataclass(frozen=True)
class Quantised(Stored):
    """Lays out a matrix [out, in] as blocks and scales, which are made of it with the format's rounding."""

    hf_dtype = "uint8"

    def hf_shapes(self) -> list[Shape]:
        ((*rows, columns),) = self.inner.hf_shapes()
        return [(*rows, columns // BLOCK, BLOCK // 2), (*rows, columns // BLOCK)]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        blocks, scales = tensors
        return self.inner.join([dequantised(blocks, scales)])

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        (matrix,) = self.inner.split(whole)
        return list(quantised(matrix))
