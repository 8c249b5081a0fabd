"""Linear layers on CPU: what device.py puts in the place of megatron-core's, which multiplies by torch.matmul.

While a rollout lasts its weights stay as they are, and each step multiplies few rows by all of them. oneDNN then takes
a weight that was laid out for it once, a pack, in about half the time of matmul, whose rows it also rounds alike
whatever their number (but for a single one). A pack is as large as its weight. `Packs` belong to a rollout: they are
made by the first step that meets a weight, used within `using` alone, and dropped where the rollout ends, so that
training never sees one.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

# For which a layout is chosen; any other number of rows was as fast, but for 1, whose layout is slow for all.
_ROWS = 32


class _Pack(NamedTuple):
    """A weight in oneDNN's layout, and what tells whether it is still that weight."""

    weight: torch.Tensor  # held, so that no other gets its identity
    version: int
    address: int
    packed: torch.Tensor


class Packs:
    """The weights of one rollout in oneDNN's layout."""

    def __init__(self) -> None:
        self._held: dict[int, _Pack] = {}

    def __len__(self) -> int:
        return len(self._held)

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        """Return x W^T [..., out] of x [..., in] and the pack of a weight W [out, in], None where it can have none.

        A weight that was written to since, or put elsewhere, gets a new pack.
        """
        held = self._held.get(id(weight))
        if held is None or held.version != weight._version or held.address != weight.data_ptr():
            if not _can_pack(weight):
                return None
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
            held = self._held[id(weight)] = _Pack(weight, weight._version, weight.data_ptr(), packed)
        if x.dtype != weight.dtype or not x.numel():
            return None
        return _multiply(x, held.packed, None, "none", [], "")

    def drop(self) -> None:
        """Give back the memory of all packs."""
        self._held.clear()


def _can_pack(weight: torch.Tensor) -> bool:
    """Return whether a weight can have a pack, and one that is used again.

    A tensor that is no parameter was made for one product (layers/mxfp4.py).
    """
    return (
        isinstance(weight, torch.nn.Parameter)
        and weight.is_contiguous()
        and torch.backends.mkldnn.is_available()
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _has_bf16()))
    )


def _has_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


# A build of torch without oneDNN has no such operation, and must still be able to import this.
_multiply: Any = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None
_packs: Packs | None = None  # of the pass that is being made


@contextlib.contextmanager
def using(packs: Packs) -> Iterator[None]:
    """Have the linear layers of a pass, one without gradients, multiply by `packs` where this machine can."""
    global _packs
    _packs = packs
    try:
        yield
    finally:
        _packs = None


def in_rollout(x: torch.Tensor) -> bool:
    """Return whether x, float32 on CPU, belongs to a pass that is `using` packs: one without gradients, of few rows."""
    return _packs is not None and x.dtype == torch.float32 and x.device.type == "cpu"


def is_heard(module: torch.nn.Module) -> bool:
    """Return whether somebody hung hooks on a module or put another function in its place, which only a call of the
    module runs: one call of compiled code for it and its neighbours does not.
    """
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def of(linear: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return megatron-core's function `linear`, made to multiply by packs while a pass is `using` them.

    Where the CPU has no instructions for bfloat16 it takes it as fp32.
    """

    @functools.wraps(linear)  # with its attributes, which it looks for under its name
    def multiplied(
        input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *args: Any, **named: Any
    ) -> torch.Tensor:
        if _packs is not None and not args and not named["sequence_parallel"]:
            out = _packs.product(input, weight)
            if out is not None:
                return out if bias is None else out.add_(bias)  # rounded before, as in training
        if input.dtype != torch.bfloat16 or _has_bf16():
            return linear(input, weight, bias, *args, **named)
        bias = None if bias is None else bias.float()
        return linear(input.float(), weight.float(), bias, *args, **named).to(input.dtype)

    return multiplied


def passing(region: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return megatron-core's function `region`, made to give what it is given where a rollout's rank has no partner.

    It is an autograd function, whose call costs as much as a small operation.
    """

    @functools.wraps(region)
    def passed(input_: torch.Tensor, group: Any = None) -> torch.Tensor:
        alone = _packs is not None and group is not None and group.size() == 1
        return input_ if alone else region(input_, group=group)

    return passed
