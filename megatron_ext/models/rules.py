"""How weights move between a Hugging Face checkpoint and megatron-core, as data.

A family lists `Rule`s, one for each mcore parameter. Import, export, expected names, expected shapes and the random
start all read that one list, so the two directions cannot drift apart.

A layout knows one parameter: the shapes of its Hugging Face tensors, how they join into mcore's whole tensor (as at
tensor degree 1, without vocabulary padding), how they come apart again, and which part a tensor rank holds. Sources:
reference/megatron.md 1.2 and 1.5. `join` and `split` copy values and never compute, so a round trip is exact.
"""

from dataclasses import dataclass
from typing import Protocol, Sequence

import torch

from megatron_ext.parallel import padded_rows

Shape = tuple[int, ...]


class Layout(Protocol):
    def hf_shapes(self) -> list[Shape]:
        """Shapes of the Hugging Face tensors, in the rule's order."""

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Hugging Face tensors -> mcore's whole tensor."""

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """The inverse of `join`."""

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        """What tensor rank `rank` of `tensor` holds."""


@dataclass(frozen=True)
class Replicated:
    """Norms: every tensor rank holds all of it."""

    shape: Shape

    def hf_shapes(self) -> list[Shape]:
        return [self.shape]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return tensors[0]

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [whole]

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        return whole


@dataclass(frozen=True)
class Row(Replicated):
    """Row-parallel matrices (attention output, MLP down): dimension 1 over tensor ranks."""

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        return whole.chunk(tensor, dim=1)[rank]


@dataclass(frozen=True)
class Vocabulary(Replicated):
    """Embedding and output matrices [rows, h]: rows over tensor ranks, zeros after the last real row."""

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        padding = padded_rows(whole.size(0), tensor) - whole.size(0)
        if padding:
            whole = torch.cat([whole, whole.new_zeros((padding, *whole.shape[1:]))])
        return whole.chunk(tensor, dim=0)[rank]


@dataclass(frozen=True)
class QueryKeyValue:
    """q, k, v projections, weights [rows, h] or biases [rows].

    mcore's rows go by KV group: the group's query heads, its key head, its value head. Groups over tensor ranks.
    """

    heads: int
    groups: int
    head_dim: int
    columns: int | None  # None for a bias

    def _tail(self) -> Shape:
        return () if self.columns is None else (self.columns,)

    def hf_shapes(self) -> list[Shape]:
        return [(heads * self.head_dim, *self._tail()) for heads in (self.heads, self.groups, self.groups)]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        by_group = [t.reshape(self.groups, -1, self.head_dim, *self._tail()) for t in tensors]  # [g, r | 1 | 1, d, ...]
        return torch.cat(by_group, dim=1).reshape(-1, *self._tail())

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        each = self.heads // self.groups
        by_group = whole.reshape(self.groups, each + 2, self.head_dim, *self._tail())
        return [part.reshape(-1, *self._tail()) for part in by_group.split([each, 1, 1], dim=1)]

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        return whole.chunk(tensor, dim=0)[rank]


@dataclass(frozen=True)
class GateUp:
    """Gate and up projections [ffn, h] stacked. A tensor rank holds [its gate rows; its up rows]."""

    ffn: int
    hidden: int

    def hf_shapes(self) -> list[Shape]:
        return [(self.ffn, self.hidden)] * 2

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(tensors))

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return list(whole.chunk(2))

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        return torch.cat([half.chunk(tensor)[rank] for half in whole.chunk(2)])


@dataclass(frozen=True)
class Rule:
    """One mcore parameter. `te_name` is its name where Transformer Engine fuses the norm into the next layer."""

    name: str
    hf_names: tuple[str, ...]
    layout: Layout
    te_name: str = ""


def hf_shapes(rules: Sequence[Rule]) -> dict[str, Shape]:
    """Name -> shape of every tensor of the Hugging Face checkpoint."""
    return {name: shape for rule in rules for name, shape in zip(rule.hf_names, rule.layout.hf_shapes())}


def parameter(parameters: dict[str, torch.nn.Parameter], rule: Rule) -> torch.nn.Parameter:
    """The model's parameter of this rule, whichever layer spec built the model."""
    return parameters[rule.name if rule.name in parameters else rule.te_name]
