"""A kind of tensor of low precision: no tensor of the rehearsal is one."""

from transformer_engine.pytorch.quantized_tensor import QuantizedTensor


class MXFP8Tensor(QuantizedTensor):
    pass
