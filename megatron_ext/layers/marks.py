"""Marks on parameters: attributes that megatron-core reads off them, and that torch's own type does not have."""

from typing import Protocol, cast

import torch


class Marked(Protocol):
    """A parameter with the marks that we set."""

    tensor_model_parallel: bool  # tensor ranks hold different parts, so that the gradient's norm counts each of them
    sequence_parallel: bool  # each tensor rank sees its own tokens only, so that gradients are summed over the ranks


def marks(parameter: torch.Tensor) -> Marked:
    """Return the parameter itself, with the marks that may be set on it."""
    return cast(Marked, parameter)  # torch's stubs know no attributes but a tensor's own
