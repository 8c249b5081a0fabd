"""Operations with a forward of one step."""

from .activation import GEGLU, GELU, ReGLU, ReLU, SiLU, SwiGLU
from .layer_norm import LayerNorm
from .rmsnorm import RMSNorm

__all__ = ["GEGLU", "GELU", "LayerNorm", "RMSNorm", "ReGLU", "ReLU", "SiLU", "SwiGLU"]
