"""Megatron-LM's distributed checkpoints (`torch_dist`): what Megatron-LM, ModelOpt and megatron-core itself write.

    FOLDER/latest_checkpointed_iteration.txt     a number, or "release"
    FOLDER/iter_0000100/.metadata, metadata.json, *.distcp
                        common.pt                arguments and counters; from megatron-core 0.18 on an object instead

(megatron/training/checkpointing.py.) Their tensors are named as ours (dist_weights.regions), or with all layers of a
kind under one name and an axis of layers before the others: `decoder.layers.mlp.linear_fc2.weight`. A norm before a
matrix is called as Transformer Engine does, or by its own name (ModelOpt without --export-te-mcore-model), or before
experts as before an MLP (megatron-core's local layers). Weights are read; optimizer and random states, which belong to
that training, and states of FP8 are not.
"""

import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_tools.base.inside import inside
from data_tools.mistake import Problem, UserMistake
from megatron_ext.models.layouts import Rule, Vocabulary
from megatron_ext.parallel.settings import DTYPES
from megatron_ext.weights import dist_weights
from megatron_ext.weights.dist_weights import COMMON, Region
from megatron_ext.weights.legacy import LISTED, MegatronTensors, iteration
from megatron_ext.weights.megatron_arguments import check_arguments

COMMON_OBJECT = "common_state/shard_0_1"
NO_WEIGHTS = ("optimizer", "opt_param_scheduler", "chained_", "rng_state", "rerun_state", "iteration", "args")
EXTRA_STATE = "_extra_state"  # of Transformer Engine's modules: scales of FP8
LOCAL = "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.")


def is_one(folder: Path) -> bool:
    """Return whether a Megatron checkpoint is distributed: it has files of tensors, not of ranks.

    Raises UserMistake where it is one of another format, or not whole.
    """
    of = iteration(folder)
    if inside(of, dist_weights.METADATA, needed=False) is not None:
        return True
    if inside(of, dist_weights.MARK, needed=False) is not None:  # by which megatron-core knows a distributed checkpoint
        remedy = "load it with the megatron-core that wrote it, and save it with --ckpt-format torch_dist"
        said = f"has {dist_weights.MARK} and no {dist_weights.METADATA}: it is no whole torch_dist checkpoint (zarr?)"
        raise UserMistake(Problem(str(of), f"{said}; {remedy}"))
    return False


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
        self._common = self._beside()
        check_arguments(self._arguments(), dims, str(self.folder))
        self._layers = _layers(rules)
        self._check(rules)

    def _beside(self) -> Any:
        """Return the state beside the tensors, of which all ranks had the same."""
        if COMMON_OBJECT not in self._reader.stored.objects:
            return self._reader.common
        found = self._reader.object(COMMON_OBJECT)
        return found[0] if isinstance(found, list) and found else found

    def _arguments(self) -> Namespace:
        """Return Megatron's arguments; none where the checkpoint has none, as one of megatron-core alone."""
        said = self._common.get("args", Namespace()) if isinstance(self._common, dict) else None
        if not isinstance(said, Namespace):
            raise UserMistake(Problem(str(self.folder), "its arguments (`args`) are none of Megatron's"))
        return said

    def _check(self, rules: Sequence[Rule]) -> None:
        """Refuse a checkpoint that lacks tensors of the model, or has others."""
        wrong, known = [], set()
        for rule in rules:
            for region, _ in dist_weights.regions(rule):
                placed = self._placed(region, rule)
                if placed is None:
                    wrong.append(f"tensor {region.key} {list(region.size)} is missing")
                    continue
                known.add(placed.key)
                shape, dtype = self._stored[placed.key].shape, self._stored[placed.key].dtype
                padded = (
                    isinstance(rule.layout, Vocabulary) and shape[0] > placed.shape[0] and shape[1:] == placed.shape[1:]
                )
                if shape != placed.shape and not padded:
                    wrong.append(f"tensor {placed.key} is {list(shape)}, config.json gives {list(placed.shape)}")
                elif dtype not in DTYPES:
                    wrong.append(f"tensor {placed.key} is {dtype}, no type of weights: {', '.join(DTYPES)} are")
        for key in self._stored.keys() - known:
            if not key.startswith(NO_WEIGHTS):
                wrong.append(f"tensor {key} {list(self._stored[key].shape)} is not part of the model in config.json")
        wrong += [f"object {key} is nothing that a model of config.json has" for key in self._strange()]
        if wrong:
            wrong = sorted(dict.fromkeys(wrong))
            raise UserMistake([Problem(str(self.folder), message) for message in wrong[:LISTED]])

    def _strange(self) -> list[str]:
        """Return what is stored beside the tensors that is no known state: each may be a part of the model."""
        for_sure = (*NO_WEIGHTS, COMMON_OBJECT)
        objects = [
            key
            for key in self._reader.stored.objects
            if not key.startswith(for_sure) and not key.partition("/")[0].endswith(EXTRA_STATE)
        ]
        states = [state for key, state in self._common.items() if re.fullmatch(r"model\d*", str(key))]
        return objects + [f"{name} of {COMMON}" for state in states if isinstance(state, dict) for name in state]

    def _placed(self, region: Region, rule: Rule) -> Region | None:
        """Return where the checkpoint has a region: under one of its names, or under that of its kind in all layers."""
        layer = _LAYER.match(region.key)
        for key in _spellings(region.key, rule):
            if key in self._stored:
                return replace(region, key=key)
            if layer and (of_all := layer[1] + key[layer.end() :]) in self._stored:
                alike = self._layers[region.key[layer.end() :]]
                axis = (len(alike),), (alike.index(int(layer[2])),), (1,)
                return Region(of_all, *(a + b for a, b in zip(axis, (region.shape, region.offset, region.size))))
        return None

    def whole(self, rule: Rule) -> torch.Tensor:
        """Return mcore's whole tensor."""
        parts = []
        for region, _ in dist_weights.regions(rule):
            placed = self._placed(region, rule)
            if placed is None:  # `_check` has seen it
                raise KeyError(region.key)
            parts.append(self._reader.read(placed).reshape(-1, *rule.layout.shape[1:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def dtype(self, name: str) -> str:
        rule, _ = self._rules[name][0]
        region, _ = next(dist_weights.regions(rule))
        placed = self._placed(region, rule)
        return self._stored[(placed or region).key].dtype


def _spellings(key: str, rule: Rule) -> list[str]:
    """Return the names that a tensor may have."""
    if rule.te_name:
        return [key, rule.name]
    return [key, key.replace(*LOCAL)] if LOCAL[0] in key else [key]


def _layers(rules: Sequence[Rule]) -> dict[str, list[int]]:
    """Return {the name of a kind of tensor within a layer: the layers that have one}, counted over the whole model."""
    found: dict[str, set[int]] = {}
    for rule in rules:
        for region, _ in dist_weights.regions(rule):
            if layer := _LAYER.match(region.key):
                found.setdefault(region.key[layer.end() :], set()).add(int(layer[2]))
    return {kind: sorted(layers) for kind, layers in found.items()}
