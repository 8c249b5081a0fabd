"""Megatron-LM's distributed checkpoints (`torch_dist`): what Megatron-LM, ModelOpt and megatron-core itself write.

    FOLDER/latest_checkpointed_iteration.txt     a number, or "release"
    FOLDER/iter_0000100/.metadata, metadata.json, *.distcp
                        common.pt                arguments and counters; from megatron-core 0.18 on an object instead

(megatron/training/checkpointing.py.) Their tensors are named as ours (dist_weights.regions), or with all layers of a
kind under one name and an axis of layers before the others: `decoder.layers.mlp.linear_fc2.weight`. Weights are read;
optimizer and random states, which belong to that training, are not.
"""

import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_tools.base.inside import inside
from data_tools.mistake import Problem, UserMistake
from megatron_ext.models.layouts import Rule, Vocabulary
from megatron_ext.parallel.shape import ModelShape
from megatron_ext.weights import dist_weights
from megatron_ext.weights.dist_weights import Region
from megatron_ext.weights.legacy import (
    ARGUMENTS,
    LISTED,
    LLAMA3_FACTOR,
    MegatronTensors,
    check_arguments,
    iteration,
)

COMMON_OBJECT = "common_state/shard_0_1"
NO_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state", "iteration", "args")
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.")


def is_one(folder: Path) -> bool:
    """Return whether a Megatron checkpoint is distributed: it has files of tensors, not of ranks."""
    return inside(iteration(folder), dist_weights.METADATA, needed=False) is not None


class DistTensors(MegatronTensors):
    """Reads such a checkpoint as the Hugging Face tensors that it would export to (convert.Tensors)."""

    def __init__(self, folder: Path, rules: Sequence[Rule], dims: Any):
        """Open a checkpoint.

        Raises:
            UserMistake: tensors are missing, of another shape, or no part of the model; or the model was trained as
                another one than `dims`.
        """
        super().__init__(iteration(folder), rules)
        self._reader = dist_weights.Reader(self.folder, foreign=True)
        self._stored = self._reader.stored.tensors
        check_arguments(self._arguments(), dims, str(self.folder))
        self._layers = _layers(rules)
        self._check(rules)

    def _arguments(self) -> Namespace:
        """Return Megatron's arguments; none where the checkpoint has none, as one of megatron-core alone."""
        common = self._reader.common
        if COMMON_OBJECT in self._reader.stored.objects:
            found = self._reader.object(COMMON_OBJECT)
            common = found[0] if isinstance(found, list) and found else found
        said = common.get("args", Namespace()) if isinstance(common, dict) else None
        if not isinstance(said, Namespace):
            raise UserMistake(Problem(str(self.folder), "its arguments (`args`) are none of Megatron's"))
        return said

    def _check(self, rules: Sequence[Rule]) -> None:
        """Refuse a checkpoint that lacks tensors of the model, or has others."""
        wrong, known = [], set()
        for rule in rules:
            for region, _ in dist_weights.regions(rule):
                placed = self._placed(region)
                if placed is None:
                    wrong.append(f"tensor {region.key} {list(region.size)} is missing")
                    continue
                known.add(placed.key)
                shape = self._stored[placed.key].shape
                padded = (
                    isinstance(rule.layout, Vocabulary) and shape[0] > placed.shape[0] and shape[1:] == placed.shape[1:]
                )
                if shape != placed.shape and not padded:
                    wrong.append(f"tensor {placed.key} is {list(shape)}, config.json gives {list(placed.shape)}")
        for key in self._stored.keys() - known:
            if not key.startswith(NO_WEIGHTS):
                wrong.append(f"tensor {key} {list(self._stored[key].shape)} is not part of the model in config.json")
        if wrong:
            wrong = sorted(dict.fromkeys(wrong))
            raise UserMistake([Problem(str(self.folder), message) for message in wrong[:LISTED]])

    def _placed(self, region: Region) -> Region | None:
        """Return where the checkpoint has a region: under its name, or under that of its kind in all layers."""
        if region.key in self._stored:
            return region
        layer = _LAYER.match(region.key)
        if layer is None or (key := layer[1] + region.key[layer.end() :]) not in self._stored:
            return None
        alike = self._layers[region.key[layer.end() :]]
        axis = (len(alike),), (alike.index(int(layer[2])),), (1,)
        return Region(key, *(a + b for a, b in zip(axis, (region.shape, region.offset, region.size))))

    def whole(self, rule: Rule) -> torch.Tensor:
        """Return mcore's whole tensor."""
        parts = []
        for region, _ in dist_weights.regions(rule):
            placed = self._placed(region)
            if placed is None:  # `_check` has seen it
                raise KeyError(region.key)
            parts.append(self._reader.read(placed).reshape(-1, *rule.layout.shape[1:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def dtype(self, name: str) -> str:
        rule, _ = self._rules[name][0]
        region, _ = next(dist_weights.regions(rule))
        placed = self._placed(region)
        return self._stored[(placed or region).key].dtype


def arguments_of(dims: Any, shape: ModelShape) -> Namespace:
    """Return Megatron-LM's arguments of a model of Qwen2's, Qwen3's or Llama's kind: what `--use-checkpoint-args` takes
    of a checkpoint, and what `legacy.unlike` compares.
    """
    said: dict[str, Any] = {name: getattr(dims, field, None) or None for field, name in ARGUMENTS.items()}
    said |= {
        "num_layers": len(shape.layers),
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "max_position_embeddings": shape.max_positions or None,
        "padded_vocab_size": shape.vocabulary,
        "untie_embeddings_and_output_weights": not shape.tied,
        "normalization": "RMSNorm",
        "swiglu": shape.gated,
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm,
        "group_query_attention": shape.kv_groups != shape.heads,
        "num_query_groups": shape.kv_groups,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "use_rope_scaling": bool(dims.rope_factor),
        "rope_scaling_factor": dims.rope_factor or LLAMA3_FACTOR,
    }
    return Namespace(**{name: value for name, value in said.items() if value is not None})


def _layers(rules: Sequence[Rule]) -> dict[str, list[int]]:
    """Return {the name of a kind of tensor within a layer: the layers that have one}, counted over the whole model."""
    found: dict[str, set[int]] = {}
    for rule in rules:
        for region, _ in dist_weights.regions(rule):
            if layer := _LAYER.match(region.key):
                found.setdefault(region.key[layer.end() :], set()).add(int(layer[2]))
    return {kind: sorted(layers) for kind, layers in found.items()}
