"""Distributed checkpoints: what is in one, how it is published, which is the newest whole one, what its weights are.

    ROOT/step_400/manifest.json    files with size and sha256, step, identity, position, layout, weights digest
    ROOT/step_400/state/           torch_dist: weights, optimizer (`fully_reshardable`), RNG; any layout can load it
    ROOT/latest                    the newest step's name, a hint only

A step is written into a hidden sibling, fsynced, and renamed: a folder named step_N is complete. Every rank takes
part in each function unless it says otherwise.
"""

import logging
import shutil
import uuid
from pathlib import Path
from typing import Any, Iterator

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed import checkpoint as torch_checkpoint

from data_tools import durable
from data_tools.mistake import UserMistake
from megatron_ext.digest import combined, tensor_sum
from megatron_ext.models.registry import stages
from megatron_ext.parallel import ParallelPlan

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state"
EXTRA_STATE = "_extra_state"


class InProcessSave(TorchDistSaveShardedStrategy):
    """mcore's torch_dist format, written by the rank itself.

    mcore's own writer forks a process from one that runs gloo or NCCL threads, and keeps a queue server that
    outlives a killed rank; it also costs one to two seconds a save. The files are the same to every reader.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> None:
        translated, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(translated, False),
            storage_writer=torch_checkpoint.FileSystemWriter(
                checkpoint_dir, sync_files=False
            ),  # fsynced before renaming
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def _metadata() -> dict[str, Any]:
    # The default sharding type is broken in 0.16.1 (mapping.py:104), and dp_reshardable cannot change
    # the tensor degree.
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "non_homogeneous_layers": True,  # one key a layer in every family, as Megatron will always have it
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


Model = torch.nn.Module | list[torch.nn.Module]  # or the parts of an interleaved pipeline (registry.stages)


def model_state(model: Model) -> dict[str, Any]:
    """What of the whole model this rank holds, as mcore's sharded tensors. Without the extra states of linear layers:
    they are empty but under FP8, and differ between layer specs, which are to read each other's weights."""
    states = {f"stage{i}": part.sharded_state_dict(metadata=_metadata()) for i, part in enumerate(stages(model))}
    return {
        stage: {name: value for name, value in state.items() if not name.endswith(EXTRA_STATE)}
        for stage, state in states.items()
    }


def save_weights(model: Model, folder: Path) -> None:
    """Weights only, into the empty folder `folder` (made here)."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save({"model": model_state(model)}, str(folder), InProcessSave())


def load_weights(model: Model, folder: Path) -> None:
    """Weights of `save_weights`, or of a step's `state`, written under any layout, into `model`."""
    state = dist_checkpointing.load({"model": model_state(model)}, str(folder))
    _load_model(model, state["model"])


def _load_model(model: Model, state: dict[str, Any]) -> None:
    for i, part in enumerate(stages(model)):
        missing, unexpected = part.load_state_dict(state[f"stage{i}"], strict=False)
        missing = [name for name in missing if not name.endswith(EXTRA_STATE)]
        if missing or unexpected:
            raise RuntimeError(f"the checkpoint lacks {missing} and has {unexpected} besides")


# ---------------------------------------------------------------- digest


def _shard_sum(shard: ShardedTensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The shard's part of the sum of its tensor, whose true `shape` leaves out vocabulary padding."""
    data = shard.data.reshape((1,) * shard.prepend_axis_num + tuple(shard.data.shape))
    if shape:  # padding is at the end of dimension 0
        data = data[: max(0, shape[0] - shard.global_offset[0])]
    return tensor_sum(data, shard.global_offset, shape)


def weights_digest(model: Model) -> str:
    """SHA-256 that names the weights, whatever the layout. Any changed bit changes it; padding rows do not count.

    Per distributed-checkpoint key the sum over ranks of digest.tensor_sum, each shard once (DESIGN.md, Checkpoints).
    """
    vocabulary = stages(model)[0].vocabulary_rows
    state = model_state(model)
    apply_factories(state)
    lines: dict[str, tuple[str, tuple[int, ...]]] = {}
    sums: dict[str, torch.Tensor] = {}
    for shard in nested_values(state):
        if not isinstance(shard, ShardedTensor):
            continue
        shape = tuple(shard.global_shape)
        if shard.allow_shape_mismatch:  # mcore's mark of a padded vocabulary
            shape = (vocabulary, *shape[1:])
        lines[shard.key] = (str(shard.dtype).removeprefix("torch."), shape)
        found = _shard_sum(shard, shape) if is_main_replica(shard.replica_id) else None
        if found is not None:
            sums[shard.key] = sums.get(shard.key, torch.zeros_like(found)) + found
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (lines, {key: int(value) for key, value in sums.items()}))
    return combined(
        {
            key: (*line, sum(part.get(key, 0) for _, part in everywhere))
            for lines, _ in everywhere
            for key, line in lines.items()
        }
    )


# ---------------------------------------------------------------- files


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def _hash_files(folder: Path, names: list[str]) -> dict[str, list[Any]]:
    """{name: [bytes, sha256]}, the work shared by all ranks. A file that cannot be read is missing from it."""
    mine: dict[str, list[Any]] = {}
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        try:
            mine[name] = [(folder / name).stat().st_size, durable.sha256_file(folder / name)]
        except OSError:
            continue
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {name: entry for part in parts for name, entry in part.items()}


def from_rank_zero(value: Any) -> Any:
    """`value` of rank 0, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


# ---------------------------------------------------------------- steps


def layout_name(plan: ParallelPlan) -> str:
    """Names the assignment of RNG streams to ranks: only the same one can restore them."""
    degrees = f"tp{plan.tensor}_pp{plan.pipeline}_cp{plan.context}_ep{plan.expert}_etp{plan.expert_tensor}"
    return f"world{dist.get_world_size()}_{degrees}"


def _rng_state() -> dict[str, Any]:
    return {"torch": torch.get_rng_state(), "tracker": dict(get_cuda_rng_tracker().get_states())}


def _rng_object() -> ShardedObject:
    return ShardedObject("rng", _rng_state(), (dist.get_world_size(),), (dist.get_rank(),))


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def save_step(
    root: Path,
    step: int,
    model: Model,
    optimizer: Any,
    plan: ParallelPlan,
    *,
    identity: dict[str, Any],
    position: dict[str, Any],
    keep: int,
) -> Path:
    """Publish ROOT/step_N and drop all but the newest `keep` steps.

    `identity` is what a resuming run must have in common with this one, `position` what it continues from; both JSON,
    and those of rank 0 count.
    """
    writer = dist.get_rank() == 0
    target = root / f"step_{step}"
    temporary = root / from_rank_zero(f".step_{step}.{uuid.uuid4().hex[:8]}.tmp")
    if writer:
        (temporary / STATE).mkdir(parents=True)
    dist.barrier()
    weights = model_state(model)
    state = {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, metadata=_metadata()),
        "rng": _rng_object(),
    }
    dist_checkpointing.save(state, str(temporary / STATE), InProcessSave())
    digest = weights_digest(model)
    files = _hash_files(temporary, _files(temporary))
    if writer:
        manifest = {
            "format": FORMAT,
            "step": step,
            "identity": identity,
            "position": position,
            "layout": layout_name(plan),
            "optimizers": len(optimizer.chained_optimizers),
            "weights_digest": digest,
            "files": files,
        }
        durable.write_json(temporary / MANIFEST, manifest)
        durable.fsync_tree(temporary)
        if target.exists():  # a damaged one that this run fell back from
            _remove(target)
        temporary.rename(target)
        durable.fsync_folder(root)
        durable.write_file(root / "latest", target.name + "\n")
        for old in steps(root)[keep:]:
            _remove(root / f"step_{old}")
    dist.barrier()
    return target


def _remove(folder: Path) -> None:
    """Take the name away first, so that a kill in between leaves no half step."""
    doomed = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(root: Path) -> None:
    """Delete what killed attempts left half written. One rank; the caller owns the folder."""
    for left in root.glob(".step_*"):
        shutil.rmtree(left, ignore_errors=True)


def steps(root: Path) -> list[int]:
    """Published steps, newest first. No torch.distributed."""
    found = (p.name.removeprefix("step_") for p in root.glob("step_*"))
    return sorted((int(n) for n in found if n.isdigit()), reverse=True)


def _defects(folder: Path) -> Iterator[str]:
    """What of a step does not agree with its manifest."""
    manifest = from_rank_zero(_read_manifest(folder) if dist.get_rank() == 0 else None)
    if manifest is None:
        yield f"{MANIFEST} is missing or unreadable"
        return
    found = _hash_files(folder, sorted(manifest["files"]))
    for name, (size, digest) in sorted(manifest["files"].items()):
        if name not in found:
            yield f"{name} is missing"
        elif found[name][0] != size:
            yield f"{name} has {found[name][0]} bytes instead of {size}"
        elif found[name][1] != digest:
            yield f"{name} has other bytes than were written"


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = durable.read_json(folder / MANIFEST)
        return manifest if manifest["format"] == FORMAT and manifest["files"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def newest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """The newest step whose files all have the bytes that were written, and one line about each newer, damaged one."""
    notes: list[str] = []
    for step in from_rank_zero(steps(root)):
        folder = root / f"step_{step}"
        defects = list(_defects(folder))
        if not defects:
            return folder, notes
        notes.append(f"{folder.name} is damaged and was skipped: {defects[0]}")
        if dist.get_rank() == 0:
            log.warning("%s", notes[-1])
    return None, notes


def load_step(
    folder: Path, model: Model, optimizer: Any, plan: ParallelPlan, identity: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Restore weights, optimizer and, under the same layout, RNG. Returns the step and the saved position.

    Raises UserMistake where the checkpoint belongs to another `identity`, naming what differs.
    """
    manifest = from_rank_zero(_read_manifest(folder) if dist.get_rank() == 0 else None)
    for name in sorted({*identity, *manifest["identity"]}):
        theirs, ours = manifest["identity"].get(name), identity.get(name)
        if theirs != ours:
            raise UserMistake(
                f"{folder} was written with {name} = {theirs!r}, this run has {ours!r}: it cannot be resumed; "
                f"use a fresh folder, or the old value"
            )
    ours = len(optimizer.chained_optimizers)
    if manifest.get("optimizers", ours) != ours:  # mcore keeps one more for experts over ranks, under other names
        raise UserMistake(
            f"{folder} holds the optimizer's state for parallel.expert {'of' if ours > 1 else 'above'} 1, which this "
            f"layout cannot read: resume with parallel.expert as it was ({manifest['layout']})"
        )
    same_layout = manifest["layout"] == layout_name(plan)
    weights = model_state(model)
    wanted = {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=True, metadata=_metadata()),
    }
    if same_layout:
        wanted["rng"] = _rng_object()
    state = dist_checkpointing.load(wanted, str(folder / STATE))
    _load_model(model, state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if same_layout:
        _restore_rng(state["rng"])
    return manifest["step"], manifest["position"]
