"""Activations: names only (`use_te_activation_func` is off)."""

from transformer_engine.pytorch.ops.op import BasicOperation
from transformer_engine.stand_in import not_here


class _ActivationOperation(BasicOperation):
    def __init__(self, *, cache_quantized_input=False):
        super().__init__()
        not_here(f"ops.{type(self).__name__}")


class GELU(_ActivationOperation):
    pass


class GEGLU(_ActivationOperation):
    pass


class ReLU(_ActivationOperation):
    pass


class ReGLU(_ActivationOperation):
    pass


class SiLU(_ActivationOperation):
    pass


class SwiGLU(_ActivationOperation):
    pass
