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

_ROWS = 32  # for which a layout is chosen; any other number of rows was as fast, but for 1, whose layout is slow for all


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

    def of(self, weight: torch.nn.Parameter) -> torch.Tensor:
        """Return the pack of a weight [out, in]; a new one where the weight was written to since, or put elsewhere."""
        held = self._held.get(id(weight))
        if held is None or held.version != weight._version or held.address != weight.data_ptr():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
            held = self._held[id(weight)] = _Pack(weight, weight._version, weight.data_ptr(), packed)
        return held.packed

    def drop(self) -> None:
        """Give back the memory of all packs."""
        self._held.clear()


_packs: Packs | None = None  # of the pass that is being made


@contextlib.contextmanager
def using(packs: Packs) -> Iterator[None]:
    """Have the linear layers of a pass without gradients multiply by `packs`, where this machine can."""
    global _packs
    _packs = packs
    try:
        yield
    finally:
        _packs = None


def in_rollout(x: torch.Tensor) -> bool:
    """Return whether x, float32 on CPU, belongs to a pass that is `using` packs: one without gradients, of few rows."""
    return _packs is not None and x.dtype == torch.float32 and x.device.type == "cpu"


def _has_packs(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether x [..., in] can be multiplied by a pack of this weight.

    A tensor that is no parameter was made for this product alone (layers/mxfp4.py), and a pack would be, too.
    """
    return (
        not torch.is_grad_enabled()
        and isinstance(weight, torch.nn.Parameter)
        and weight.is_contiguous()
        and x.numel() > 0
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _has_bf16()))
        and x.dtype == weight.dtype
        and torch.backends.mkldnn.is_available()
    )


def _has_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def of(linear: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return megatron-core's function `linear`, made to multiply by packs while a pass is `using` them.

    Where the CPU has no instructions for bfloat16 it takes it as fp32.
    """

    @functools.wraps(linear)  # with its attributes, which it looks for under its name
    def multiplied(
        input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *args: Any, **named: Any
    ) -> torch.Tensor:
        if _packs is not None and not args and not named["sequence_parallel"] and _has_packs(input, weight):
            out = torch.ops.mkldnn._linear_pointwise(input, _packs.of(weight), None, "none", [], "")
            return out if bias is None else out.add_(bias)  # rounded before, as in training
        if input.dtype != torch.bfloat16 or _has_bf16():
            return linear(input, weight, bias, *args, **named)
        bias = None if bias is None else bias.float()
        return linear(input.float(), weight.float(), bias, *args, **named).to(input.dtype)

    return multiplied
