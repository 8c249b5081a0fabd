"""Small operations of a rollout's pass on CPU, each one call of compiled code in place of several of torch.

A step has few tokens, and its norms and rotations cost what their calls cost: as torch's operations they were a tenth
of a decode step. float32 only, without gradients; `megatron_ext.cpu_linear.using` says when.
"""

from typing import Any

import numpy
import torch

from data_tools.base.compiled import compiled


@compiled(fastmath={"reassoc", "nsz", "contract"}, nogil=True, error_model="numpy")
def _rms_norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    for i in range(len(x)):
        squares = numpy.float32(0)
        for c in range(x.shape[1]):
            squares += x[i, c] * x[i, c]
        scale = numpy.float32(1) / numpy.sqrt(squares / numpy.float32(x.shape[1]) + numpy.float32(eps))
        for c in range(x.shape[1]):
            out[i, c] = x[i, c] * scale * weight[c]


@compiled(fastmath={"nsz", "contract"}, nogil=True, error_model="numpy")
def _turn(x: Any, cos: Any, sin: Any, out: Any) -> None:
    half = cos.shape[1]
    for i in range(len(x)):
        for h in range(x.shape[1]):
            for c in range(half):
                a, b = x[i, h, c], x[i, h, half + c]
                out[i, h, c] = a * cos[i, c] - b * sin[i, c]
                out[i, h, half + c] = b * cos[i, c] + a * sin[i, c]
            for c in range(2 * half, x.shape[2]):
                out[i, h, c] = x[i, h, c]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return what torch.nn.functional.rms_norm does over the last dimension of x [..., h], weight [h]."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.reshape(-1, x.size(-1))
    _rms_norm(rows.numpy(), weight.detach().numpy(), eps, out.view(rows.shape).numpy())
    return out


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x [T, heads, d] turned by rotary positions, cos and sin [T, 1, half] (layers/attention.py)."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _turn(x.contiguous().numpy(), cos.squeeze(1).numpy(), sin.squeeze(1).numpy(), out.numpy())
    return out
