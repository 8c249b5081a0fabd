"""Megatron-LM's legacy `torch` checkpoints, read: one file a rank, of any tensor, pipeline and expert degree.

    FOLDER/latest_checkpointed_iteration.txt     a number, or "release"
    FOLDER/iter_0000100/mp_rank_00/model_optim_rng.pt
                        mp_rank_TT[_PPP][_EEE]   PPP where the pipeline has stages, EEE where experts are spread

(megatron/training/checkpointing.py, get_checkpoint_name.) The files are pickles with Megatron's own classes in them:
pickles.py reads them, so that Megatron need not be installed and no code of theirs or of anybody else runs.

They also have the arguments that the model was trained with, which tell what shapes of tensors do not: heads, rotary
positions, epsilons, windows, the router's scale. Each that config.json says otherwise is refused.
"""

import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_tools.base import bounds
from data_tools.base.inside import inside
from data_tools.mistake import Problem, UserMistake
from megatron_ext.files import pickles
from megatron_ext.models.layouts import Entry, HfTensor, Rule, Shape, hf_rules, hf_shapes
from megatron_ext.weights.copies import difference
from megatron_ext.weights.megatron_arguments import check_arguments

FILE = "model_optim_rng.pt"
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
LISTED = 12  # wrong tensors that a message names
_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?$")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.(.+)|(.+\.(?:weight|bias))(\d+))$")


def _load(root: Path, rank: Path) -> dict[str, Any]:
    """Load the file in a rank's folder, which is below `root`."""
    path = rank / FILE
    try:
        loaded = pickles.load(inside(root, str(path.relative_to(root))), pickles.ARGUMENTS, unknown=True)
    except (OSError, pickles.Refused) as error:
        raise UserMistake(Problem(str(path), f"not a whole Megatron checkpoint ({error})")) from None
    if not isinstance(loaded, dict) or not isinstance(loaded.get("args", Namespace()), Namespace):
        raise UserMistake(Problem(str(path), "is no Megatron checkpoint: it is no dict of weights and arguments"))
    return loaded


def _degree(arguments: Namespace, axis: str, where: str) -> int:
    """Return a parallel degree of Megatron's arguments; 1 where there is none."""
    degree = getattr(arguments, f"{axis}_parallel_size", None) or 1
    if type(degree) is not int or degree < 1:
        raise UserMistake(Problem(where, f"{axis}_parallel_size is {degree!r}, no degree"))
    return degree


def iteration(folder: Path) -> Path:
    """Return the folder with the files of ranks: FOLDER, or that of its latest iteration."""
    latest = inside(folder, "latest_checkpointed_iteration.txt", needed=False)
    if latest is None:
        return folder
    with bounds.open_regular(latest) as file:
        text = file.read(80).decode(errors="replace").strip()
    if text != "release" and not (text.isascii() and text.isdecimal()):
        raise UserMistake(Problem(str(latest), f'has {text[:40]!r}, neither a number nor "release"'))
    named = folder / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not named.is_dir():
        raise UserMistake(Problem(str(named), f"is not there, and {latest.name} names it"))
    return named


class MegatronTensors:
    """Stands for a Hugging Face checkpoint (convert.Tensors) whose tensors are parts of Megatron's whole ones."""

    def __init__(self, folder: Path, rules: Sequence[Rule]):
        self.folder = folder
        self._rules, self._shapes = hf_rules(rules), hf_shapes(rules)

    def whole(self, rule: Rule) -> torch.Tensor:
        """Return mcore's whole tensor."""
        raise NotImplementedError

    def shapes(self) -> dict[str, Shape]:
        return self._shapes

    def file(self, name: str) -> str:
        return self.folder.name

    def read(self, tensor: HfTensor) -> torch.Tensor:
        name, index = (tensor.name, tensor.index) if isinstance(tensor, Entry) else (tensor, 0)
        rule, position = self._rules[name][index]
        return rule.layout.split(self.whole(rule))[position].reshape(rule.layout.hf_shapes()[position])


class LegacyTensors(MegatronTensors):
    """Reads such a checkpoint as the Hugging Face tensors that it would export to (convert.Tensors)."""

    def __init__(self, folder: Path, rules: Sequence[Rule], dims: Any):
        """Read the files of a checkpoint.

        Raises:
            UserMistake: files or tensors are missing, the names of files do not tell a degree, or the model was trained
                as another one than `dims`.
        """
        super().__init__(iteration(folder), rules)
        self._root = folder
        files = self._files()
        first = files[min(files)]
        arguments = self._arguments(first, dims)
        self.tensor, self.pipeline, self.expert, expert_tensor = (
            _degree(arguments, axis, str(first / FILE))
            for axis in ("tensor_model", "pipeline_model", "expert_model", "expert_tensor")
        )
        if any(rule.experts for rule in rules) and self.tensor > 1 and expert_tensor not in (1, self.tensor):
            degrees = f"expert tensor degree {expert_tensor} under tensor degree {self.tensor}"
            remedy = "is not supported: save it as a distributed checkpoint"
            raise UserMistake(Problem(str(self.folder), f"{degrees} {remedy}"))
        self._wholes_experts = expert_tensor < self.tensor
        self._copies: dict[str, list[tuple[torch.Tensor, int]]] = {}  # name -> (copy, tensor rank of what it repeats)
        self._shards = self._collect(files)
        self._check_names(rules, dims)

    def _files(self) -> dict[tuple[int, ...], Path]:
        """Return the folder of each rank, by the numbers in its name."""
        files = {
            tuple(int(part or 0) for part in numbers.groups()): path
            for path in sorted(self.folder.glob("mp_rank_*"))
            if (numbers := _RANK.match(path.name))
        }
        if not files:
            raise UserMistake(Problem(str(self.folder), "has no mp_rank_* folders: not a legacy Megatron checkpoint"))
        return files

    def _arguments(self, rank: Path, dims: Any) -> Namespace:
        """Return Megatron's arguments as a rank's file has them, which must say the same as `dims`."""
        arguments = _load(self._root, rank).get("args", Namespace())
        check_arguments(arguments, dims, str(rank / FILE))
        return arguments

    def _check_names(self, rules: Sequence[Rule], dims: Any) -> None:
        """Refuse a checkpoint that lacks tensors of the model or has others; a copy of the embedding is put aside."""
        missing = [rule for rule in rules if self._name(rule) not in self._shards]
        wrong = [f"tensor {self._name(rule)} {list(rule.layout.shape)} is missing" for rule in missing]
        known = {name for rule in rules for name in (rule.name, rule.te_name)}
        if getattr(dims, "tied", False) and OUTPUT in self._shards:  # the last stage's copy of the embedding
            copies = [(shard, rank) for rank, shard in enumerate(self._shards.pop(OUTPUT))]
            self._copies.setdefault(EMBEDDING, []).extend(copies)
        for name in sorted(self._shards.keys() - known):
            wrong.append(f"tensor {name} {list(self._shards[name][0].shape)} is not part of the model in config.json")
        if wrong:
            raise UserMistake([Problem(str(self.folder), message) for message in wrong[:LISTED]])

    def _collect(self, files: dict[tuple[int, ...], Path]) -> dict[str, list[torch.Tensor]]:
        """Return {name in rules, or by Transformer Engine: its shards by tensor rank}."""
        shards: dict[str, list[torch.Tensor]] = {}
        for expert in range(self.expert):
            for tensor in range(self.tensor):
                stages = self._stages(files, tensor, expert)
                before = 0
                for state in stages:
                    local = {int(m[1]) for name in state if (m := _LAYER.match(name))}
                    for name, value in state.items():
                        whole = self._whole_name(name, before, expert, state)
                        if not isinstance(value, torch.Tensor) or name.endswith(("_extra_state", ".inv_freq")):
                            continue
                        if ".mlp.experts." in whole or expert == 0:
                            shards.setdefault(whole, []).append(value)
                        else:  # which all expert ranks have
                            self._copies.setdefault(whole, []).append((value, tensor))
                    before += len(local)
        return shards

    def _stages(self, files: dict[tuple[int, ...], Path], tensor: int, expert: int) -> list[dict[str, Any]]:
        """Return the state dicts of one tensor and expert rank in model order: interleaved stages take turns."""
        loaded = []
        for stage in range(self.pipeline):
            rest = [stage] * (self.pipeline > 1) + [expert] * (self.expert > 1)
            rank = tuple([tensor, *rest, 0, 0][:3])
            if rank not in files:
                name = "_".join(["mp_rank", f"{tensor:02d}", *(f"{part:03d}" for part in rest)])
                raise UserMistake(Problem(str(self.folder / name / FILE), "is missing"))
            loaded.append(_load(self._root, files[rank]))
        virtual = sum(re.fullmatch(r"model\d+", str(key)) is not None for key in loaded[0])
        keys = ["model"] if "model" in loaded[0] else [f"model{i}" for i in range(virtual)]
        states = [state.get(key) for key in keys for state in loaded]
        weights = [state for state in states if isinstance(state, dict) and all(type(name) is str for name in state)]
        if len(weights) < len(states) or not states:
            raise UserMistake(Problem(str(self.folder), "has files without the weights of a model (`model`)"))
        return weights

    def _whole_name(self, name: str, layers_before: int, expert_rank: int, state: dict[str, Any]) -> str:
        layer = _LAYER.match(name)
        if not layer:
            return name
        rest = name[layer.end() :]
        if expert := _EXPERT.match(rest):
            prefix = name[: layer.end()]
            rests = (key[layer.end() :] for key in state if key.startswith(prefix))
            held = {int(m[1] or m[4]) for name_ in rests if (m := _EXPERT.match(name_))}
            index = expert_rank * len(held) + int(expert[1] or expert[4])
            rest = f"mlp.experts.{index}.{expert[2] or expert[3]}"
        return f"decoder.layers.{layers_before + int(layer[1])}.{rest}"

    def _name(self, rule: Rule) -> str:
        return rule.name if rule.name in self._shards else rule.te_name or rule.name

    def whole(self, rule: Rule) -> torch.Tensor:
        """Return mcore's whole tensor.

        Raises:
            UserMistake: the shards do not make one, or its copies differ.
        """
        name, wholes = self._name(rule), rule.experts and self._wholes_experts
        shards, copies = self._shards[name], list(self._copies.get(name, ()))
        if wholes or shards[0].shape == rule.layout.shape:  # each tensor rank has all of it
            copies += [(shard, 0) for shard in shards[1:]]
        for copy, rank in copies:
            if said := difference(copy, shards[rank]):
                raise UserMistake(Problem(str(self.folder), f"tensor {name}: a rank's copy {said} (of another's)"))
        joined = rule.layout.unshard(shards[:1] if wholes else shards)
        if joined.shape != rule.layout.shape:
            raise UserMistake(
                Problem(
                    str(self.folder),
                    f"tensor {name} has shape {list(joined.shape)}, config.json gives {list(rule.layout.shape)}",
                )
            )
        return joined

    def dtype(self, name: str) -> str:
        rule, _ = self._rules[name][0]
        return str(self._shards[self._name(rule)][0].dtype).removeprefix("torch.")
