"""Adapters on a model's own layers: hooks add what A and B compute to what the frozen layer gives.

    attach(parts, family, dims, config, seed)      new adapters, B = 0; everything else is frozen
    with without(parts): ...                       the base model, for reference log-probs

They live in `part.adapters`, so that names, layers and checkpoints of the base model stay as they are. On tensor ranks
a factor is shared as its matrix is: beside a column-parallel one A is whole and B is cut, beside a row-parallel one A
is cut and B is whole. What is exchanged is `rank` wide, never as wide as the model.
"""

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_ext.lora import peft_format
from megatron_ext.lora.pairs import Pair, pairs, spread
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.models.layouts import Parts, Rule, placed, shard_on_rank
from megatron_ext.models.registry import Family, stages
from megatron_ext.versions import split_tensor


class Adapter(torch.nn.Module):
    """A and B of one matrix on this rank."""

    A: torch.nn.Parameter
    B: torch.nn.Parameter
    owners: torch.Tensor | None  # Pair.owners, of the rows that this rank holds

    def __init__(self, pair: Pair, weight: torch.Tensor, part: Any, config: LoraConfig):
        """Make the factors beside `weight`, 0 both, as `part`, mcore's model chunk, shares them over ranks."""
        super().__init__()
        self.pair, self.scale, self.dropout = pair, config.scale, config.dropout
        dtype = weight.dtype if weight.is_floating_point() else part.config.params_dtype  # uint8: blocks of MXFP4
        groups, self.is_expert = part.pg_collection, bool(pair.matrix.experts)
        self.group = groups.expt_tp if self.is_expert else groups.tp
        self.replicas = groups.expt_dp if self.is_expert else groups.dp_cp
        self.sequence_parallel = part.config.sequence_parallel and not self.is_expert
        for name, rule in (("A", pair.a), ("B", pair.b)):
            local = rule.layout.shard(torch.zeros(rule.layout.shape), self.group.size(), self.group.rank())
            parameter = torch.nn.Parameter(local.to(weight.device, dtype))
            self.register_parameter(name, parameter)
            # mcore's marks: which gradients tensor ranks add up, count once in the norm, or share with other groups.
            cut = local.shape != rule.layout.shape
            marks = {
                "tensor_model_parallel": cut or (self.is_expert and self.group.size() == 1),
                "sequence_parallel": self.sequence_parallel and (pair.shared == "" or not _is_cut(pair, name)),
                "allreduce": getattr(weight, "allreduce", True),
            }
            for mark, value in marks.items():
                setattr(parameter, mark, value)
        owners = pair.owners()
        if owners is not None:
            owners = pair.b.layout.shard(owners, self.group.size(), self.group.rank()).to(weight.device)
        self.register_buffer("owners", owners, persistent=False)

    def factors(self) -> tuple[tuple[torch.nn.Parameter, Rule], tuple[torch.nn.Parameter, Rule]]:
        return (self.A, self.pair.a), (self.B, self.pair.b)

    def forward(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return what is added to the layer's output: x [..., in] -> [..., out], both as this rank's layer has them.

        `dtype` is another one to compute in.
        """
        a: torch.Tensor = self.A
        b: torch.Tensor = self.B
        shared = self.pair.shared
        if dtype is not None:
            x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
        if self.is_expert:
            # The dispatcher adds up over expert-tensor ranks what an expert gives and takes; only what each of them
            # has of a whole factor's gradient is left to do.
            if shared == "rows":
                a = copy_to_tensor_model_parallel_region(a, group=self.group)
            else:
                b = copy_to_tensor_model_parallel_region(b, group=self.group)
        low = F.linear(self._dropped(x), a) * self.scale  # [..., parts * rank]
        if not self.is_expert and shared == "rows":
            if self.sequence_parallel:
                low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=self.group)
            else:
                low = copy_to_tensor_model_parallel_region(low, group=self.group)
        elif not self.is_expert and shared == "columns":
            to_whole = reduce_from_tensor_model_parallel_region
            if self.sequence_parallel:
                to_whole = reduce_scatter_to_sequence_parallel_region
            low = to_whole(low, group=self.group)
        return F.linear(low, spread(b, self.owners))

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if not self.dropout or not self.training:
            return x
        different = self.sequence_parallel or self.pair.shared == "columns"  # tensor ranks hold different inputs
        with get_cuda_rng_tracker().fork() if different else contextlib.nullcontext():
            return F.dropout(x, self.dropout)

    def sharded(self, prefix: str, replicas: Any) -> ShardedStateDict:
        """Return mcore's sharded tensors, under keys of the whole model: any layout reads them."""
        state: ShardedStateDict = {}
        for name, (parameter, rule) in zip("AB", self.factors()):
            key = rule.name
            offsets: tuple[tuple[int, int, int], ...] = ()
            if rule.experts:
                before, after = key.split(".mlp.experts.")
                expert, rest = after.split(".", 1)
                key, offsets = f"{before}.mlp.experts.{rest}", ((0, int(expert), rule.experts),)
            axes = {key: 0 if name == "B" else 1} if _is_cut(self.pair, name) else {}
            tensors = make_sharded_tensors_for_checkpoint(
                {key: parameter}, "", axes, offsets, tp_group=self.group, dp_cp_group=replicas
            )
            state[prefix + name] = tensors[key]
            if axes and isinstance(rule.layout, Parts) and len(rule.layout.rows) > 1:  # each part is cut by itself
                rows = [count // self.group.size() for count in rule.layout.rows]
                names = [str(i) for i in range(len(rows))]
                state[prefix + name] = split_tensor(tensors[key], rows, names, 0)
        return state


def _is_cut(pair: Pair, name: str) -> bool:
    """Return whether tensor ranks hold parts of the factor."""
    return pair.shared == {"A": "columns", "B": "rows"}[name]


def _module_name(adapter: Adapter) -> str:
    """Return the name of the adapter's matrix in the whole model; torch allows no dots in it."""
    return adapter.pair.matrix.name.replace(".", "/")


class Adapters(torch.nn.Module):
    """All adapters of this rank's part of a model."""

    def __init__(self, config: LoraConfig):
        super().__init__()
        self.config, self.enabled = config, True

    @property
    def each(self) -> list[Adapter]:
        """Return the adapters in the order of the model."""
        return [adapter for adapter in self.children() if isinstance(adapter, Adapter)]

    def add(self, adapter: Adapter) -> None:
        self.add_module(_module_name(adapter), adapter)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        state: ShardedStateDict = {}
        for adapter in self.each:
            state |= adapter.sharded(f"{prefix}{_module_name(adapter)}.", adapter.replicas)
        return state


# ---------------------------------------------------------------- on the layers


def attach(model: Any, family: Family, dims: Any, config: LoraConfig, seed: int = 0) -> None:
    """Freeze `model` (its parts, weights loaded) and put new adapters on the layers that `config` names.

    A starts as PEFT's, uniform within 1 / sqrt(in), from `seed` and the name alone, so that every layout starts from
    the same; B is 0.
    """
    by_name = {pair.matrix.name: pair for pair in pairs(family, dims, config)}
    for part in stages(model):
        part.requires_grad_(False)
        owner = {id(p): module for module in part.modules() for p in module._parameters.values() if p is not None}
        adapters = Adapters(config)
        on_layer: dict[torch.nn.Module, list[Adapter]] = {}
        for rule, parameter in placed(part, list(family.mapping.rules(dims))):
            pair = by_name.get(rule.name)
            if pair is None or id(parameter) not in owner:
                continue
            adapter = Adapter(pair, parameter, part, config)
            adapters.add(adapter)
            on_layer.setdefault(owner[id(parameter)], []).append(adapter)
        for layer, own in on_layer.items():
            _hook(layer, own, adapters)
        part.adapters = adapters
        if part.pre_process:
            part.embedding.register_forward_hook(_needs_gradient)
    _start(model, seed)


def _needs_gradient(_module: torch.nn.Module, _inputs: tuple, out: torch.Tensor) -> torch.Tensor:
    """Make an output want a gradient: recomputed layers and pipeline stages pass gradients on only to such inputs."""
    return out.requires_grad_() if torch.is_grad_enabled() and not out.requires_grad else out


def _hook(layer: torch.nn.Module, own: list[Adapter], adapters: Adapters) -> None:
    """Have a layer add what its own adapters compute, while `adapters` are enabled."""
    if isinstance(layer, Router):
        layer.gating = _with_adapter(layer, own[0], adapters)
        return

    def add(_module: torch.nn.Module, inputs: tuple, output: tuple) -> tuple:
        if not adapters.enabled:
            return output
        out, *rest = output
        return (out + _change(layer, own, *inputs), *rest)

    layer.register_forward_hook(add)


def _change(layer: Any, own: list[Adapter], x: torch.Tensor, splits: Any = None) -> torch.Tensor:
    """Return what the adapters of a layer add to its output.

    `splits` are the rows of each expert, where one layer holds several (Transformer Engine's grouped linear).
    """
    if getattr(layer, "layer_norm_weight", None) is not None:  # Transformer Engine's norm within the layer
        x = F.rms_norm(x, x.shape[-1:], layer.layer_norm_weight, layer.eps)
    if splits is None:
        return own[0](x)
    rows = x.split([int(count) for count in splits])
    return torch.cat([adapter(part) for adapter, part in zip(own, rows)])


def _with_adapter(router: Router, adapter: Adapter, adapters: Adapters) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the router's own `gating`, with the adapter: it is no linear layer but a function of its weight."""
    gating = router.gating

    def adapted(x: torch.Tensor) -> torch.Tensor:
        logits = gating(x)
        return logits + adapter(x, logits.dtype) if adapters.enabled else logits

    return adapted


@torch.no_grad()
def _start(model: Any, seed: int) -> None:
    """Draw A of every adapter; B stays 0."""
    for part in stages(model):
        for adapter in part.adapters.each:
            rule = adapter.pair.a
            key = hashlib.sha256(f"{seed} {rule.name}".encode()).digest()[:8]
            generator = torch.Generator().manual_seed(int.from_bytes(key, "little", signed=True))
            bound = 1 / math.sqrt(rule.layout.shape[1])
            whole = torch.empty(rule.layout.shape).uniform_(-bound, bound, generator=generator)
            adapter.A.copy_(shard_on_rank(rule, whole, part))


def adapters_of(model: Any) -> list[Adapter]:
    """Return this rank's adapters, in the order of the model; none where it has none."""
    return [adapter for part in stages(model) if hasattr(part, "adapters") for adapter in part.adapters.each]


@contextlib.contextmanager
def without(model: Any) -> Iterator[None]:
    """Make `model` the base model, without its adapters, inside the block."""
    parts = [part for part in stages(model) if hasattr(part, "adapters")]
    for part in parts:
        part.adapters.enabled = False
    try:
        yield
    finally:
        for part in parts:
            part.adapters.enabled = True


# ---------------------------------------------------------------- from ranks to files and back


def gathered(model: Any, value: Callable[[torch.nn.Parameter], torch.Tensor] = lambda p: p) -> dict[str, torch.Tensor]:
    """Return the whole factors, or what `value` makes of them, by the name of their rule on rank 0, on the CPU; {} on
    others. Every rank takes part."""
    held = []
    for adapter in adapters_of(model):
        if adapter.replicas.rank() == 0:
            for parameter, rule in adapter.factors():
                held.append((rule, adapter.group.rank(), value(parameter).detach().to("cpu", copy=True)))
    everywhere: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(held, everywhere)
    shards: dict[str, tuple[Rule, dict[int, torch.Tensor]]] = {}
    for rule, rank, shard in itertools.chain.from_iterable(everywhere or []):
        shards.setdefault(rule.name, (rule, {}))[1][rank] = shard
    return {
        name: rule.layout.unshard([by_rank[rank] for rank in sorted(by_rank)])
        for name, (rule, by_rank) in shards.items()
    }


def write(folder: Path, model: Any, family: Family, dims: Any) -> LoraConfig:
    """Write the adapters on `model` as a PEFT folder, whose bytes no layout changes, and return their settings.

    Every rank takes part.
    """
    config = stages(model)[0].adapters.config
    factors = gathered(model)
    if dist.get_rank() == 0:
        peft_format.write(folder, pairs(family, dims, config), factors, config)
    return config


@torch.no_grad()
def load(model: Any, reader: peft_format.Reader) -> None:
    """Fill the adapters on `model` from a folder."""
    for part in stages(model):
        for adapter in part.adapters.each:
            for (parameter, rule), whole in zip(adapter.factors(), reader.factors(adapter.pair)):
                parameter.copy_(shard_on_rank(rule, whole, part))
