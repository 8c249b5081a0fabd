"""Functions of many tensors at once."""

import torch


class MultiTensorApply:
    def __init__(self, chunk_size):
        self.chunk_size = chunk_size

    def __call__(self, op, noop_flag_buffer, tensor_lists, *args):
        return op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)


multi_tensor_applier = MultiTensorApply(2048 * 32)


def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor=False):
    """Return the norm fp32 [1] over all tensors, and the norm of each [n] where it is asked for."""
    norms = torch.stack([tensor.float().norm() for tensor in tensor_lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else torch.zeros(0)


def multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale):
    """Write each tensor of the first list times `scale` into its place in the second."""
    for source, target in zip(*tensor_lists):
        target.copy_(source * scale)
