"""Attention by one of three kernels."""

from .dot_product_attention import DotProductAttention

__all__ = ["DotProductAttention"]
