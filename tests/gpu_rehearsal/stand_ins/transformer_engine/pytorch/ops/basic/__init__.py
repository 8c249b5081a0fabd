"""Operations with a forward of one step."""

from .layer_norm import LayerNorm
from .rmsnorm import RMSNorm

__all__ = ["LayerNorm", "RMSNorm"]
