"""How weights move between a Hugging Face checkpoint and megatron-core, as data.

A family lists `Rule`s, one for each mcore parameter and persistent buffer. Import, export, expected names, expected
shapes, distributed-checkpoint keys and the random start all read that one list, so the directions cannot drift apart.

A layout knows one tensor: the shapes of its Hugging Face tensors, how they join into mcore's whole tensor (as at
tensor degree 1, without vocabulary padding), how they come apart again, and which part a tensor rank holds. Sources:
reference/megatron.md 1.2 to 1.5. Layouts copy values and never compute, so a round trip is exact.

Names count layers and experts over the whole model: `decoder.layers.7.mlp.experts.12.linear_fc1.weight`. Which of
them a rank holds, and what it calls them, is answered in one place, `placed`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_ext.models.registry import stages
from megatron_ext.parallel.plan import padded_rows

Shape = tuple[int, ...]
Start = Callable[[Shape, torch.Generator], torch.Tensor]


class Layout(Protocol):
    @property
    def shape(self) -> Shape:
        """The shape of mcore's whole tensor."""

    def hf_shapes(self) -> list[Shape]:
        """Shapes of the Hugging Face tensors, in the rule's order."""

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Hugging Face tensors -> mcore's whole tensor."""

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """The inverse of `join`."""

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        """What tensor rank `rank` of `tensor` holds."""

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The inverse of `shard`, from all tensor ranks."""

    def stored(self) -> list[tuple[str, int]]:
        """(suffix, rows) of each tensor that a distributed checkpoint keeps of it; [("", rows)] where it keeps one."""


@dataclass(frozen=True)
class Replicated:
    """Norms, routers, biases of row-parallel matrices: every tensor rank holds all of it."""

    shape: Shape

    def hf_shapes(self) -> list[Shape]:
        return [self.shape]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return tensors[0]

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [whole]

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        return whole

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return shards[0]

    def stored(self) -> list[tuple[str, int]]:
        return [("", self.shape[0])]


@dataclass(frozen=True)
class Column(Replicated):
    """Column-parallel matrices and their biases, one value a head: dimension 0 over tensor ranks."""

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        return whole.chunk(tensor)[rank]

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(shards))


@dataclass(frozen=True)
class Row(Replicated):
    """Row-parallel matrices (attention output, MLP down): dimension 1 over tensor ranks."""

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        return whole.chunk(tensor, dim=1)[rank]

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(shards), dim=1)


@dataclass(frozen=True)
class Vocabulary(Column):
    """Embedding and output matrices [rows, h]: rows over tensor ranks, zeros after the last real row."""

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        padding = padded_rows(whole.size(0), tensor) - whole.size(0)
        if padding:
            whole = torch.cat([whole, whole.new_zeros((padding, *whole.shape[1:]))])
        return whole.chunk(tensor)[rank]

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(shards))[: self.shape[0]]


@dataclass(frozen=True)
class QueryKeyValue:
    """q, k, v projections, weights [rows, h] or biases [rows].

    mcore's rows go by KV group: the group's query heads, its key head, its value head. Groups over tensor ranks.
    """

    heads: int
    groups: int
    head_dim: int
    columns: int | None  # None for a bias
    turns_backwards: bool = False  # rotary positions by minus mcore's angle: the halves of query and key heads change

    @property
    def shape(self) -> Shape:
        return ((self.heads + 2 * self.groups) * self.head_dim, *self._tail())

    def _tail(self) -> Shape:
        return () if self.columns is None else (self.columns,)

    def hf_shapes(self) -> list[Shape]:
        return [(heads * self.head_dim, *self._tail()) for heads in (self.heads, self.groups, self.groups)]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        by_group = [t.reshape(self.groups, -1, self.head_dim, *self._tail()) for t in tensors]  # [g, r | 1 | 1, d, ...]
        return torch.cat(self._turned(by_group), dim=1).reshape(-1, *self._tail())

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        each = self.heads // self.groups
        by_group = whole.reshape(self.groups, each + 2, self.head_dim, *self._tail())
        return [part.reshape(-1, *self._tail()) for part in self._turned(by_group.split([each, 1, 1], dim=1))]

    def _turned(self, by_group: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """q, k, v with the halves of each q and k head exchanged, where the rotation is backwards. Its own inverse."""
        query, key, value = by_group
        if not self.turns_backwards:
            return [query, key, value]
        return [query.roll(self.head_dim // 2, dims=2), key.roll(self.head_dim // 2, dims=2), value]

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        return whole.chunk(tensor)[rank]

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(shards))

    def stored(self) -> list[tuple[str, int]]:
        return [("", self.shape[0])]


@dataclass(frozen=True)
class Parts:
    """Parts stacked along dimension 0, each sharded by itself: a tensor rank has [its rows of part 0; of part 1; ...].

    Mamba's in_proj (z, x, B, C, dt) and conv1d (x, B, C): one Hugging Face tensor, and `keys` names the tensors that
    a distributed checkpoint keeps of it. Subclasses take their parts from elsewhere.
    """

    rows: tuple[int, ...]
    tail: Shape = ()  # the other dimensions
    keys: tuple[str, ...] = ()

    @property
    def shape(self) -> Shape:
        return (sum(self.rows), *self.tail)

    def hf_shapes(self) -> list[Shape]:
        return [self.shape]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return tensors[0]

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [whole]

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        return torch.cat([part.chunk(tensor)[rank] for part in whole.split(self.rows)])

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        local = [rows // len(shards) for rows in self.rows]
        by_part = zip(*(shard.split(local) for shard in shards))
        return torch.cat([shard for part in by_part for shard in part])

    def stored(self) -> list[tuple[str, int]]:
        return [(f".{key}", rows) for key, rows in zip(self.keys, self.rows)] or [("", self.shape[0])]


@dataclass(frozen=True)
class Stacked(Parts):
    """Each part is a Hugging Face tensor: gate and up projections."""

    def hf_shapes(self) -> list[Shape]:
        return [(rows, *self.tail) for rows in self.rows]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(tensors))

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return list(whole.split(self.rows))


@dataclass(frozen=True)
class Interleaved(Parts):
    """One Hugging Face tensor whose rows take turns: gate, up, gate, up, ... (gpt-oss). `rows` are equal."""

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensors[0][i :: len(self.rows)] for i in range(len(self.rows))])

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack(whole.split(self.rows), dim=1).flatten(0, 1)]


def gate_up(ffn: int, hidden: int) -> Stacked:
    """Gate and up projections [ffn, h]. A tensor rank holds [its gate rows; its up rows]."""
    return Stacked((ffn, ffn), (hidden,))


@dataclass(frozen=True)
class Stored:
    """`of`, for mcore and its checkpoints; subclasses say how Hugging Face stores it otherwise."""

    of: Layout

    @property
    def shape(self) -> Shape:
        return self.of.shape

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        return self.of.shard(whole, tensor, rank)

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.of.unshard(shards)

    def stored(self) -> list[tuple[str, int]]:
        return self.of.stored()


@dataclass(frozen=True)
class Transposed(Stored):
    """`of`, from Hugging Face tensors that are stored [in, out]."""

    def hf_shapes(self) -> list[Shape]:
        return [(*shape[:-2], shape[-1], shape[-2]) for shape in self.of.hf_shapes()]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.of.join([tensor.mT for tensor in tensors])

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.mT for tensor in self.of.split(whole)]


@dataclass(frozen=True)
class Entry:
    """Entry `index` of a Hugging Face tensor [count, ...] that stacks experts."""

    name: str
    index: int
    count: int


HfTensor = str | Entry


@dataclass(frozen=True)
class Rule:
    """One mcore parameter or persistent buffer.

    `te_name` is its name where Transformer Engine fuses the norm into the next layer; distributed checkpoints use
    that one. `experts` is the number of experts in the model, of which the name gives one. `dtype` is set where mcore
    keeps another one than the model's (float32 router buffers). `start` makes a Hugging Face tensor of a random model;
    without it matrices are normal, biases 0, other vectors 1.
    """

    name: str
    hf: tuple[HfTensor, ...]
    layout: Layout
    te_name: str = ""
    experts: int = 0
    dtype: str = ""
    start: Start | None = None


def hf_name(tensor: HfTensor) -> str:
    return tensor if isinstance(tensor, str) else tensor.name


def hf_rules(rules: Sequence[Rule]) -> dict[str, list[tuple[Rule, int]]]:
    """Hugging Face name -> (rule, position in rule.hf) of its only tensor, or of each entry of a stack in order."""
    found: dict[str, list[tuple[Rule, int]]] = {}
    for rule in rules:
        for position, tensor in enumerate(rule.hf):
            found.setdefault(hf_name(tensor), []).append((rule, position))
    return found


def hf_shapes(rules: Sequence[Rule]) -> dict[str, Shape]:
    """Name -> shape of every tensor of the Hugging Face checkpoint."""
    shapes: dict[str, Shape] = {}
    for rule in rules:
        for tensor, shape in zip(rule.hf, rule.layout.hf_shapes()):
            shapes[hf_name(tensor)] = shape if isinstance(tensor, str) else (tensor.count, *shape)
    return shapes


def is_copy(name: str, dims: Any) -> bool:
    """Tensors that some files carry though the model does not need them: a copy of the tied output, rotary buffers."""
    return (dims.tied and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq")


INITIAL_STD = 0.02  # transformers' initializer_range


def default_start(name: str) -> Start:
    """How a Hugging Face tensor of a random model starts where its rule does not say."""

    def start(shape: Shape, generator: torch.Generator) -> torch.Tensor:
        if name.endswith("bias"):
            return torch.zeros(shape)
        return torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0, INITIAL_STD, generator=generator)

    return start


# ---------------------------------------------------------------- names on a rank

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.(.+)|(.+\.(?:weight|bias))(\d+))$")


def _whole_model_name(name: str, chunk: torch.nn.Module) -> str:
    """The name in rules of what this rank calls `name`: pipeline stages renumber layers, expert ranks experts."""
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"  # the last stage's copy of a tied embedding
    found = _LAYER.match(name)
    if not found:
        return name
    layer = chunk.decoder.layers[int(found[1])]
    rest = name[found.end() :]
    if expert := _EXPERT.match(rest):
        index = layer.mlp.local_expert_indices[int(expert[1] or expert[4])]
        rest = f"mlp.experts.{index}.{expert[2] or expert[3]}"
    return f"decoder.layers.{layer.layer_number - 1}.{rest}"  # mcore counts layers from 1, over all stages


def placed(model: torch.nn.Module | list[torch.nn.Module], rules: Sequence[Rule]) -> list[tuple[Rule, torch.Tensor]]:
    """This rank's parameters and persistent buffers, each with its rule.

    `model` is one model chunk or, with virtual pipeline stages, several. RuntimeError names what no rule covers.
    """
    by_name = {rule.name: rule for rule in rules} | {rule.te_name: rule for rule in rules if rule.te_name}
    found, unknown = [], []
    for chunk in stages(model):
        for name, value in chunk.state_dict(keep_vars=True).items():
            if not isinstance(value, torch.Tensor) or name.endswith("_extra_state"):
                continue
            rule = by_name.get(_whole_model_name(name, chunk))
            if rule is None:
                unknown.append(name)
            else:
                found.append((rule, value))
    if unknown:
        raise RuntimeError(f"no rule for {', '.join(unknown)}")
    return found


def shard_on_rank(rule: Rule, whole: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """This rank's part of `whole`: over the tensor axis, or over the expert-tensor axis for experts."""
    groups = stages(model)[0].pg_collection
    group = groups.expt_tp if rule.experts else groups.tp
    return rule.layout.shard(whole, group.size(), group.rank())
