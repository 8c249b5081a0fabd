"""Tensors of low precision: no tensor of the rehearsal is one."""


class QuantizedTensorStorage:
    pass


class QuantizedTensor(QuantizedTensorStorage):
    pass
