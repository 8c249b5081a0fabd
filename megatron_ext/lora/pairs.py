"""The two small matrices beside each adapted one, as rules (models/layouts.py).

mcore fuses what Hugging Face keeps apart: q, k and v projections, gate and up. An adapter follows the fused matrix:
A stacks the A of each part, [parts * rank, in]; B [out, rank] has the fused matrix's own order of rows, so that each
row belongs to one part. `spread` over parts * rank columns, zero but at its own part's, they make B @ A the change of
the fused matrix. With that, a layout for A and one for B follow from the matrix's layout,
and sharding, joining and names on a rank are those of the weights.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from data_tools.mistake import Problem, UserMistake
from megatron_ext.lora.peft_config import PeftAdapter
from megatron_ext.lora.settings import EXPERTS, ROUTER, ROUTERS, LoraConfig, chosen, targets_of
from megatron_ext.models.layouts import (
    HfTensor,
    Layout,
    Parts,
    QueryKeyValue,
    Replicated,
    Row,
    Rule,
    Stacked,
    Transposed,
    hf_name,
)
from megatron_ext.models.registry import Family


class ReplicatedStack(Stacked):
    """The A of several parts: every tensor rank holds all of them."""

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        return whole

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return shards[0]


@dataclass(frozen=True)
class Pair:
    """A and B of `matrix`. Their `hf` are the matrix's Hugging Face tensors: those that are adapted for A, all for
    B, of which `parts` says whether they are."""

    matrix: Rule
    parts: tuple[bool, ...]
    a: Rule
    b: Rule
    as_parameter: bool = False  # PEFT takes the module's name for that of experts: it reaches it by the parameter's

    @property
    def shared(self) -> str:
        """Return how tensor ranks share the matrix: by "rows", by "columns", or not at all ("")."""
        layout = _plain(self.matrix.layout)
        return "columns" if isinstance(layout, Row) else "" if type(layout) is Replicated else "rows"

    def owners(self) -> torch.Tensor | None:
        """Return bool [out, parts]: whether a row of the whole matrix belongs to an adapted part; None where there is
        one part and it has all rows."""
        if self.parts == (True,):
            return None
        rows, numbers = _rows_only(self.matrix.layout), itertools.count()
        values = [torch.full(shape, next(numbers) if own else -1) for shape, own in zip(rows.hf_shapes(), self.parts)]
        return rows.join(values)[:, None] == torch.arange(sum(self.parts))

    def change(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """Return what the whole factors add to the whole matrix, fp32 [out, in]."""
        return spread(b.float(), self.owners()) @ (a.float() * scale)


def spread(b: torch.Tensor, owners: torch.Tensor | None) -> torch.Tensor:
    """Return B [out, rank] as [out, parts * rank]: each row at the columns of its part, zero elsewhere."""
    return b if owners is None else (b[:, None, :] * owners[..., None]).flatten(1)


def _plain(layout: Layout) -> Layout:
    """Return the layout in mcore's orientation."""
    return layout.inner if isinstance(layout, Transposed) else layout


def _rows_only(layout: Layout) -> Layout:
    """Return the layout of a vector that has one number for each row."""
    layout = _plain(layout)
    if isinstance(layout, QueryKeyValue):
        return replace(layout, columns=None)
    return replace(layout, tail=()) if isinstance(layout, Parts) else Replicated(layout.shape[:1])


def _b_layout(layout: Layout, rank: int) -> Layout:
    """Return the layout of B [out, rank] beside a matrix of this layout, in mcore's orientation."""
    if isinstance(layout, QueryKeyValue):
        return replace(layout, columns=rank)
    if isinstance(layout, Parts):
        return replace(layout, tail=(rank,))
    shape = (layout.shape[0], rank)
    if not isinstance(layout, Replicated):
        raise TypeError(f"no layout of an adapter follows from {layout}")
    return Replicated(shape) if isinstance(layout, Row) else replace(layout, shape=shape)


def _a_layout(layout: Layout, rank: int, parts: int) -> Layout:
    """Return the layout of A [parts * rank, in] beside a matrix of this layout."""
    shape = (rank, layout.shape[1])
    if isinstance(layout, Row):
        return Row(shape)
    return ReplicatedStack((rank,) * parts, shape[1:]) if parts > 1 else Replicated(shape)


def target_of(tensor: HfTensor, rule: Rule) -> str:
    """Return the target name of a Hugging Face tensor; "" where it is no matrix that can be adapted."""
    if rule.experts:
        return EXPERTS if rule.name.endswith(".weight") else ""
    module, _, kind = hf_name(tensor).rpartition(".")
    name = module.rpartition(".")[2]
    if kind != "weight" or len(rule.layout.shape) != 2:
        return ""
    return ROUTER if name in ROUTERS else name


def pairs(family: Family, dims: Any, config: LoraConfig) -> list[Pair]:
    """Return every adapted matrix of the model, in the order of its rules. Hugging Face names are those of
    transformers' modules, whatever a checkpoint calls its tensors."""
    targets = chosen(config, family.config.shape(dims))
    taken, adapted = getattr(family.mapping, "names_of_experts", lambda _: ())(dims), []
    for rule in family.mapping.rules(dims, getattr(family.mapping, "MODULE_NAMES", ())):
        parts = tuple(target_of(tensor, rule) in targets for tensor in rule.hf)
        if any(parts):
            named = not rule.experts and target_of(rule.hf[0], rule) in taken
            adapted.append(replace(_pair(rule, parts, config.rank), as_parameter=named))
    return adapted


def reached(family: Family, dims: Any, adapter: PeftAdapter) -> tuple[LoraConfig, frozenset[HfTensor]]:
    """Return which matrices of the model a PEFT folder adapts: as our settings, and as Hugging Face's tensors.

    Ours reach a target in every layer. Where the folder has it in some, the others have factors that are 0, and stay 0
    when they are trained: the gradient of each is a product with the other. Targets that are not of the model are
    among the settings all the same, so that `settings.check` names them.
    """
    shape = family.config.shape(dims)
    everything = replace(adapter.config, targets=targets_of(shape))
    matrices = [
        (tensor, target_of(tensor, pair.matrix)) for pair in pairs(family, dims, everything) for tensor in pair.a.hf
    ]
    adapted = {tensor: target for tensor, target in matrices if adapter.reaches(hf_name(tensor), target)}
    names = set(adapted.values())
    if not isinstance(adapter.modules, str):
        names |= {name.rpartition(".")[2] for name in adapter.modules}
    for name in adapter.parameters:
        if not any(hf_name(tensor) == name or hf_name(tensor).endswith(f".{name}") for tensor in adapted):
            said = f"target_parameters has {name!r}, which is no matrix of this model"
            raise UserMistake(Problem(adapter.where, said))
    return replace(adapter.config, targets=sorted(names)), frozenset(adapted)


def _pair(rule: Rule, parts: tuple[bool, ...], rank: int) -> Pair:
    layout, stem = _plain(rule.layout), rule.name.removesuffix(".weight")
    adapted = tuple(tensor for tensor, wanted in zip(rule.hf, parts) if wanted)
    a = Rule(f"{stem}.lora_A", adapted, _a_layout(layout, rank, len(adapted)), experts=rule.experts)
    b = Rule(f"{stem}.lora_B", rule.hf, _b_layout(layout, rank), experts=rule.experts)
    return Pair(rule, parts, a, b)
