"""RMSNorm over the last dimensions."""

import torch
import torch.nn.functional as F

from transformer_engine.pytorch.ops.op import BasicOperation


class RMSNorm(BasicOperation):
    def __init__(self, normalized_shape, *, eps=1e-5, device=None, dtype=None, zero_centered_gamma=False, sm_margin=0):
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        weight = torch.empty(shape, device="cuda" if device is None else device, dtype=dtype)
        self.register_parameter("weight", torch.nn.Parameter(weight))
        self.reset_parameters()

    def reset_parameters(self):
        (torch.nn.init.zeros_ if self.zero_centered_gamma else torch.nn.init.ones_)(self.weight)

    def forward(self, input_):
        weight_dims, input_dims = tuple(self.weight.size()), tuple(input_.size())
        if len(input_dims) < len(weight_dims) or input_dims[-len(weight_dims) :] != weight_dims:
            raise ValueError(
                f"Input tensor (shape={input_dims}) and weight tensor (shape={weight_dims}) are not compatible"
            )
        weight = self.weight + 1 if self.zero_centered_gamma else self.weight
        return F.rms_norm(input_.contiguous(), weight_dims, weight, self.eps)
