"""Operations that can be fused. megatron-core fuses an MLP of them where `use_transformer_engine_op_fuser` is on."""

from .basic import LayerNorm, RMSNorm
from .op import FusibleOperation

__all__ = ["FusibleOperation", "LayerNorm", "RMSNorm"]
