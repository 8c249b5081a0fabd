"""How weights are laid out in megatron-core and in a Hugging Face checkpoint, and how they move between the two, as
data.

Here are the layouts that families share: `QueryKeyValue` (qkv, grouped by key-value head), `Stacked` (gate and up),
`Interleaved` (gpt-oss's gate and up), `Parts` (Mamba's projections), `Vocabulary`, `Column`, `Row`, `Replicated`. Which
parameter of a family has which layout and which names is in models/FAMILY/weight_layout.py.

A family lists `Rule`s, one for each mcore parameter and persistent buffer. Import, export, expected names, expected
shapes, distributed-checkpoint keys and the random start all read that one list, so the directions cannot drift apart.

A layout knows one tensor: the shapes of its Hugging Face tensors, how they join into mcore's whole tensor (as at
tensor degree 1, without vocabulary padding), how they come apart again, and which part a tensor rank holds. Layouts
copy values and never compute, so a round trip is exact.

In the comments: h hidden size, d size of a head, g key-value groups, r query heads of a group. Names count layers and
experts over the whole model: `decoder.layers.7.mlp.experts.12.linear_fc1.weight`. Which of them a rank holds, and what
it calls them, is answered in one place, `placed`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

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
        """Return the shapes of the Hugging Face tensors, in the rule's order."""

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Make mcore's whole tensor of the Hugging Face tensors."""

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """Undo `join`."""

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        """Return the part that tensor rank `rank` of `tensor` holds."""

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """Undo `shard`: make the whole of the parts of all tensor ranks."""

    def stored(self) -> list[tuple[str, int]]:
        """Return (suffix, rows) of each tensor that a distributed checkpoint keeps of it; [("", rows)] for one."""


@dataclass(frozen=True)
class Replicated:
    """Laid out whole on every tensor rank: norms, routers, biases of row-parallel matrices."""

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
    """Cut along dimension 0 over tensor ranks: column-parallel matrices and their biases, one value a head."""

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        return whole.chunk(tensor)[rank]

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(shards))


@dataclass(frozen=True)
class Row(Replicated):
    """Cut along dimension 1 over tensor ranks: row-parallel matrices (attention output, MLP down)."""

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        return whole.chunk(tensor, dim=1)[rank]

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(shards), dim=1)


@dataclass(frozen=True)
class Vocabulary(Column):
    """Cut by rows over tensor ranks, zeros after the last real row: embedding and output matrices [rows, h]."""

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        padding = padded_rows(whole.size(0), tensor) - whole.size(0)
        if padding:
            whole = torch.cat([whole, whole.new_zeros((padding, *whole.shape[1:]))])
        return whole.chunk(tensor)[rank]

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(shards))[: self.shape[0]]


@dataclass(frozen=True)
class QueryKeyValue:
    """Joins the q, k and v projections: weights [rows, h] or biases [rows].

    mcore's rows go by key-value group: the group's query heads, its key head, its value head, d rows each. Groups are
    cut over tensor ranks.
    """

    heads: int
    groups: int
    head_dim: int
    columns: int | None  # None for a bias
    turns_backwards: bool = False  # rotary positions by minus mcore's angle: the halves of query and key heads change
    neighbours: int = 0  # so many first numbers of a query or key head turn with the one beside: in mcore half apart

    @property
    def shape(self) -> Shape:
        return ((self.heads + 2 * self.groups) * self.head_dim, *self._tail())

    def _tail(self) -> Shape:
        return () if self.columns is None else (self.columns,)

    def hf_shapes(self) -> list[Shape]:
        return [(heads * self.head_dim, *self._tail()) for heads in (self.heads, self.groups, self.groups)]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        by_group = [t.reshape(self.groups, -1, self.head_dim, *self._tail()) for t in tensors]  # [g, r | 1 | 1, d, ...]
        return torch.cat(self._turned(by_group, to_mcore=True), dim=1).reshape(-1, *self._tail())

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        each = self.heads // self.groups
        by_group = whole.reshape(self.groups, each + 2, self.head_dim, *self._tail())
        parts = self._turned(by_group.split([each, 1, 1], dim=1), to_mcore=False)
        return [part.reshape(-1, *self._tail()) for part in parts]

    def _turned(self, by_group: Sequence[torch.Tensor], to_mcore: bool) -> list[torch.Tensor]:
        """Put the numbers of each q and k head where mcore turns them, or back."""
        order = torch.arange(self.head_dim)
        if self.turns_backwards:
            order = order.roll(self.head_dim // 2)
        if self.neighbours:
            order = torch.cat([order[: self.neighbours].view(-1, 2).t().flatten(), order[self.neighbours :]])
        elif not self.turns_backwards:
            return list(by_group)
        query, key, value = by_group
        order = order if to_mcore else order.argsort()
        return [query.index_select(2, order), key.index_select(2, order), value]

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        return whole.chunk(tensor)[rank]

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(shards))

    def stored(self) -> list[tuple[str, int]]:
        return [("", self.shape[0])]


@dataclass(frozen=True)
class Parts:
    """Stacks parts along dimension 0, each cut by itself: a tensor rank has [its rows of part 0; of part 1; ...].

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
    """Takes each part from a Hugging Face tensor of its own: gate and up projections."""

    def hf_shapes(self) -> list[Shape]:
        return [(rows, *self.tail) for rows in self.rows]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(tensors))

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return list(whole.split(self.rows))


@dataclass(frozen=True)
class Interleaved(Parts):
    """Takes all parts from one Hugging Face tensor whose rows take turns: gate, up, gate, up, ... (gpt-oss).

    `rows` are equal.
    """

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensors[0][i :: len(self.rows)] for i in range(len(self.rows))])

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack(whole.split(self.rows), dim=1).flatten(0, 1)]


def gate_up(ffn: int, hidden: int) -> Stacked:
    """Return the layout of gate and up projections [ffn, h]. A tensor rank holds [its gate rows; its up rows]."""
    return Stacked((ffn, ffn), (hidden,))


@dataclass(frozen=True)
class Stored:
    """Keeps `inner` for mcore and its checkpoints; subclasses say how Hugging Face stores it otherwise.

    `hf_dtype` is set where that is a format of its own, whatever the model's dtype; its values are rounded on export.
    """

    inner: Layout
    hf_dtype: ClassVar[str] = ""

    @property
    def shape(self) -> Shape:
        return self.inner.shape

    def shard(self, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
        return self.inner.shard(whole, tensor, rank)

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.inner.unshard(shards)

    def stored(self) -> list[tuple[str, int]]:
        return self.inner.stored()


@dataclass(frozen=True)
class Transposed(Stored):
    """Makes `inner` from Hugging Face tensors that are stored [in, out]."""

    def hf_shapes(self) -> list[Shape]:
        return [(*shape[:-2], shape[-1], shape[-2]) for shape in self.inner.hf_shapes()]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.inner.join([tensor.mT for tensor in tensors])

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.mT for tensor in self.inner.split(whole)]


@dataclass(frozen=True)
class Entry:
    """Names entry `index` of a Hugging Face tensor [count, ...] that stacks experts."""

    name: str
    index: int
    count: int


HfTensor = str | Entry


@dataclass(frozen=True)
class Rule:
    """Says where one mcore parameter or persistent buffer comes from.

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


def hf_dtype(layout: Layout) -> str:
    """Return the dtype that a layout's Hugging Face tensors always have; "" where it is the model's."""
    return layout.hf_dtype if isinstance(layout, Stored) else ""


def hf_name(tensor: HfTensor) -> str:
    return tensor if isinstance(tensor, str) else tensor.name


def hf_rules(rules: Sequence[Rule]) -> dict[str, list[tuple[Rule, int]]]:
    """Return, for each Hugging Face name, (rule, position in rule.hf) of its tensor or of each entry of its stack."""
    users: dict[str, list[tuple[Rule, int]]] = {}
    for rule in rules:
        for position, tensor in enumerate(rule.hf):
            users.setdefault(hf_name(tensor), []).append((rule, position))
    return users


def hf_shapes(rules: Sequence[Rule]) -> dict[str, Shape]:
    """Return {name: shape} of every tensor of the Hugging Face checkpoint."""
    shapes: dict[str, Shape] = {}
    for rule in rules:
        for tensor, shape in zip(rule.hf, rule.layout.hf_shapes()):
            shapes[hf_name(tensor)] = shape if isinstance(tensor, str) else (tensor.count, *shape)
    return shapes


class Tied(Protocol):
    """Dimensions of a model that may use one matrix for embedding and output."""

    @property
    def tied(self) -> bool: ...


def is_copy(name: str, dims: Tied) -> bool:
    """Return whether some files carry a tensor that no model needs: a copy of the tied output, rotary buffers."""
    return (dims.tied and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq")


INITIAL_STD = 0.02  # transformers' initializer_range


def default_start(name: str) -> Start:
    """Return how a Hugging Face tensor of a random model starts where its rule does not say."""

    def start(shape: Shape, generator: torch.Generator) -> torch.Tensor:
        if name.endswith("bias"):
            return torch.zeros(shape)
        return torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0, INITIAL_STD, generator=generator)

    return start


# ---------------------------------------------------------------- names on a rank

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.(.+)|(.+\.(?:weight|bias))(\d+))$")


class _Experts(Protocol):
    local_expert_indices: Sequence[int]  # of the whole model's experts


class _Layer(Protocol):
    layer_number: int  # from 1, over all stages
    mlp: _Experts


class _Decoder(Protocol):
    layers: Sequence[_Layer]


class _Chunk(Protocol):
    """What we read of mcore's model, or of one virtual stage of it."""

    share_embeddings_and_output_weights: bool
    decoder: _Decoder


def _whole_model_name(name: str, chunk: _Chunk) -> str:
    """Return the rules' name of what this rank calls `name`: stages renumber layers, expert ranks experts."""
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"  # the last stage's copy of a tied embedding
    numbered = _LAYER.match(name)
    if not numbered:
        return name
    layer = chunk.decoder.layers[int(numbered[1])]
    rest = name[numbered.end() :]
    if expert := _EXPERT.match(rest):
        index = layer.mlp.local_expert_indices[int(expert[1] or expert[4])]
        rest = f"mlp.experts.{index}.{expert[2] or expert[3]}"
    return f"decoder.layers.{layer.layer_number - 1}.{rest}"


def placed(model: torch.nn.Module | list[torch.nn.Module], rules: Sequence[Rule]) -> list[tuple[Rule, torch.Tensor]]:
    """Return this rank's parameters and persistent buffers, each with its rule.

    `model` is one model chunk or, with virtual pipeline stages, several.

    Raises:
        RuntimeError: no rule covers some; all are named.
    """
    by_name = {rule.name: rule for rule in rules} | {rule.te_name: rule for rule in rules if rule.te_name}
    here: list[tuple[Rule, torch.Tensor]] = []
    unknown = []
    for chunk in stages(model):
        for name, value in chunk.state_dict(keep_vars=True).items():
            if not isinstance(value, torch.Tensor) or name.endswith("_extra_state"):
                continue
            rule = by_name.get(_whole_model_name(name, chunk))
            if rule is None:
                unknown.append(name)
            else:
                here.append((rule, value))
    if unknown:
        raise RuntimeError(f"no rule for {', '.join(unknown)}")
    return here


def shard_on_rank(rule: Rule, whole: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """Return this rank's part of `whole`: over the tensor axis, or over the expert-tensor axis for experts."""
    groups = stages(model)[0].pg_collection
    group = groups.expt_tp if rule.experts else groups.tp
    return rule.layout.shard(whole, group.size(), group.rank())
