"""The old place of Float8Tensor."""

from .tensor.float8_tensor import Float8Tensor

__all__ = ["Float8Tensor"]
