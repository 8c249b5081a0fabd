"""Operations that can be fused. megatron-core fuses an MLP of them where `use_transformer_engine_op_fuser` is on."""

from .basic import GEGLU, GELU, LayerNorm, ReGLU, ReLU, RMSNorm, SiLU, SwiGLU
from .op import FusibleOperation
from .sequential import Sequential

__all__ = [
    "GEGLU",
    "GELU",
    "FusibleOperation",
    "LayerNorm",
    "RMSNorm",
    "ReGLU",
    "ReLU",
    "Sequential",
    "SiLU",
    "SwiGLU",
]
