"""Distributed checkpoints: how a step is published, which is the newest whole one, what its weights are.

    ROOT/step_400/manifest.json    files with size and sha256, step, identity, position, layout, weights digest
    ROOT/step_400/state/           torch_dist: weights (with LoRA the adapters alone) and optimizer, for any layout
    ROOT/step_400/rng/             random states, a file a rank: only the same layout can restore them
    ROOT/latest                    the newest step's name, a hint only

A step is written into a hidden sibling, fsynced, and renamed: a folder named step_N is complete. Every rank takes
part in each function unless it says otherwise. What a rank writes: staging.py; the file format: dist_weights.py.
"""

import logging
import math
import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random as mcore_random

from data_tools.base import durable
from data_tools.base.inside import inside
from data_tools.mistake import Problem, UserMistake
from megatron_ext.files import pickles, step_manifest
from megatron_ext.files.digest import combined
from megatron_ext.files.step_manifest import FORMAT, MANIFEST
from megatron_ext.models.registry import stages
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.weights import dist_weights, loading
from megatron_ext.weights.staging import (
    ADAPTERS,
    Model,
    OptimizerState,
    Part,
    Staging,
    Weights,
    fill_optimizer,
    is_adapted,
    is_extra_state,
    is_packed,
    metadata,
    model_state,
    sums,
    trained_state,
)

log = logging.getLogger(__name__)

STATE, RNG = "state", "rng"
Group = dist.ProcessGroup | None  # None: all ranks, on the device's back end


# ---------------------------------------------------------------- weights


def _write(folder: Path, parts: Sequence[Part]) -> list[dist_weights.Piece]:
    """Write this rank's file of a checkpoint."""
    writer = dist_weights.Writer(folder, dist.get_rank())
    for part in parts:
        flat = part.data.reshape(-1)
        for region, start in dist_weights.pieces(part.region, part.data.element_size()):
            writer.write(region, flat[start : start + math.prod(region.size)])
    writer.close()
    return writer.written


def _check_whole(written: Iterable[dist_weights.Piece]) -> None:
    """Raise RuntimeError where ranks wrote more or less than each tensor has: never published."""
    shapes: dict[str, tuple[int, ...]] = {}
    elements: Counter[str] = Counter()
    for piece in written:
        shapes[piece.region.key] = piece.region.shape
        elements[piece.region.key] += math.prod(piece.region.size)
    for key, shape in shapes.items():
        if elements[key] != math.prod(shape):
            raise RuntimeError(f"{key} has {math.prod(shape):,} elements, and ranks wrote {elements[key]:,}")


def save_weights(model: Model, folder: Path) -> None:
    """Write the weights only, into the empty folder `folder` (made here)."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    written = _gathered(_write(folder, Staging().copy(Weights(model).parts())), None)
    if dist.get_rank() == 0:
        pieces = [piece for part in written for piece in part]
        _check_whole(pieces)
        dist_weights.finish(folder, pieces)
    dist.barrier()


def load_weights(model: Model, folder: Path) -> None:
    """Load the weights of `save_weights`, or of a step's `state`, written under any layout, into `model`."""
    state = loading.load({"model": model_state(model)}, folder)
    _load_model(model, state["model"])


def _load_model(model: Model, state: dict[str, Any], adapters: bool = False) -> None:
    """Load `state` as of `model_state`, or with `adapters` as of `adapter_state`."""
    for i, part in enumerate(stages(model)):
        missing, unexpected = part.load_state_dict(state[f"stage{i}"], strict=False)
        missing = [name for name in missing if not is_extra_state(name) and name.startswith(ADAPTERS) == adapters]
        missing = [name for name in missing if not is_packed(part, name)]
        if missing or unexpected:
            raise RuntimeError(f"the checkpoint lacks {missing} and has {unexpected} besides")


def weights_digest(model: Model) -> str:
    """Return SHA-256 that names the weights, whatever the layout. Any changed bit changes it; padding rows do not
    count.

    Per distributed-checkpoint key the sum over ranks of digest.tensor_sum, each region once (DESIGN.md, Checkpoints).
    """
    return _digest(_gathered(sums(Weights(model).parts()), None))


def _digest(of_ranks: Sequence[dict[str, tuple[str, tuple[int, ...], int]]]) -> str:
    """Return the digest of the sums that each rank found (staging.sums)."""
    total: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for sums_ in of_ranks:
        for key, (dtype, shape, value) in sums_.items():
            total[key] = dtype, shape, value + (total[key][2] if key in total else 0)
    return combined(total)


# ---------------------------------------------------------------- files


def _gathered(value: Any, group: Group) -> list[Any]:
    """Return `value` of every rank, on every rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value, group=group)
    return parts


def _hash_files(folder: Path, names: Iterable[str]) -> dict[str, list[Any]]:
    """Return {name: [bytes, sha256]}. A file that cannot be read is missing from it. One rank."""
    hashes: dict[str, list[Any]] = {}
    for name in names:
        try:
            hashes[name] = [(folder / name).stat().st_size, durable.sha256_file(folder / name)]
        except OSError:
            continue
    return hashes


def from_rank_zero(value: Any, group: Group = None) -> Any:
    """Return `value` of rank 0, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


# ---------------------------------------------------------------- steps


def layout_name(plan: ParallelPlan) -> str:
    """Name the assignment of RNG streams to ranks: only the same one can restore them."""
    degrees = f"tp{plan.tensor}_pp{plan.pipeline}_cp{plan.context}_ep{plan.expert}_etp{plan.expert_tensor}"
    return f"world{dist.get_world_size()}_{degrees}"


def _rng_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "device": mcore_random._get_cuda_rng_state(),
        "tracker": {name: _plain(stream) for name, stream in mcore_random.get_cuda_rng_tracker().get_states().items()},
    }


def _plain(state: torch.Tensor | torch.Generator) -> torch.Tensor:
    """Return a random state as a tensor; trackers that CUDA graphs may use keep generators."""
    return state.get_state() if isinstance(state, torch.Generator) else state


def _read_rng(folder: Path, name: str) -> dict[str, Any]:
    """Read what `_rng_state` gave from a step's file. Raises UserMistake where the file is not of that kind."""
    try:
        return pickles.load(inside(folder, name))
    except pickles.Refused as error:
        raise UserMistake(Problem(str(folder / name), f"are no random states of ours: {error}")) from None


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    mcore_random._set_cuda_rng_state(state["device"])
    tracker = mcore_random.get_cuda_rng_tracker()
    own, saved = tracker.get_states(), dict(state["tracker"])
    for name in saved:
        if isinstance(own.get(name), torch.Generator):  # which graphs hold on to: it stays the same object
            own[name].set_state(saved[name])
            saved[name] = own[name]
    tracker.set_states(saved)


def surplus(steps: Sequence[int], keep: int, milestone: int = 0) -> list[int]:
    """Return those of the published `steps` to drop: all but the newest `keep` and, with `milestone`, its multiples."""
    old = sorted(steps, reverse=True)[keep:]
    return [step for step in old if not milestone or step % milestone]


@dataclass(frozen=True)
class _Step:
    """What is to be published, copied from what goes on changing."""

    step: int
    weights: list[Part]
    optimizer: list[Part]
    rng: dict[str, Any]
    updates: int
    facts: dict[str, Any]  # identity, position, layout, vocabulary: those of rank 0 count


class Saver:
    """Publishes steps of a run in ROOT, one at a time; drops those that retention does not keep.

    In the background `save` returns once this rank's share is copied to host memory (kept for the next save: as much
    again as a rank's weights and optimizer), and a thread writes, hashes and publishes it, its ranks in touch through
    a gloo group of their own, while training goes on. A kill meanwhile leaves a hidden folder, and the step before.
    mcore's own way forks the training process, with its gloo or NCCL threads, or keeps a queue server that outlives
    a killed rank (async_utils.py).
    """

    def __init__(
        self,
        root: Path,
        model: Model,
        optimizer: Any,
        plan: ParallelPlan,
        keep: int,
        milestone: int = 0,
        background: bool = False,
    ):
        self.root, self.plan, self.keep, self.milestone = root, plan, keep, milestone
        self._model = model
        self._weights, self._staging = Weights(model, trained_state), Staging()
        self._optimizer = OptimizerState(model, optimizer)
        self._group = dist.new_group(backend="gloo") if background else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, identity: dict[str, Any], position: dict[str, Any]) -> None:
        """Publish ROOT/step_N, or begin to, once the save before is done.

        `identity` is what a resuming run must have in common with this one, `position` what it continues from; both
        JSON. Raises what went wrong in the background since.
        """
        self.wait()
        job = _Step(
            step,
            self._staging.copy(self._weights.parts()),
            optimizer=self._staging.copy(self._optimizer.parts()),
            rng=_rng_state(),
            updates=self._optimizer.updates(),
            facts={
                "identity": identity,
                "position": position,
                "layout": layout_name(self.plan),
                "vocabulary": stages(self._model)[0].vocabulary_rows,  # tensors may have padding
            },
        )
        if self._group is None:
            self._publish(job)
            return
        self._thread = threading.Thread(target=self._publish_in_background, args=(job,), name=f"save step {step}")
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is under way. Raise what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what went wrong in the background, at once."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self.wait()
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def _publish_in_background(self, job: _Step) -> None:
        try:
            self._publish(job)
        except BaseException as error:
            self._error = error

    def _publish(self, job: _Step) -> None:
        first, rank = dist.get_rank() == 0, dist.get_rank()
        temporary = self.root / from_rank_zero(f".step_{job.step}.{uuid.uuid4().hex[:8]}.tmp", self._group)
        if first:
            (temporary / STATE).mkdir(parents=True)
            (temporary / RNG).mkdir()
        dist.barrier(group=self._group)
        written = _write(temporary / STATE, job.weights + job.optimizer)
        torch.save(job.rng, temporary / RNG / f"{rank}.pt")
        names = [f"{STATE}/__{rank}_0.distcp", f"{RNG}/{rank}.pt"]
        for name in names:
            durable.fsync_file(temporary / name)  # by the host that wrote it
        gathered = _gathered((written, sums(job.weights), job.updates, _hash_files(temporary, names)), self._group)
        if first:
            self._finish(job, temporary, *zip(*gathered))
        dist.barrier(group=self._group)

    def _finish(self, job: _Step, temporary: Path, written: Any, digests: Any, updates: Any, hashes: Any) -> None:
        """Make the folder that all ranks have filled the step's; rank 0 calls it."""
        pieces = [piece for part in written for piece in part]
        _check_whole(pieces)
        dist_weights.finish(temporary / STATE, pieces)
        files = {name: entry for part in hashes for name, entry in part.items()}
        own = (str(path.relative_to(temporary)) for path in sorted((temporary / STATE).iterdir()))
        files |= _hash_files(temporary, [name for name in own if name not in files])
        manifest = {
            "format": FORMAT,
            "step": job.step,
            "updates": max(updates),
            "weights_digest": _digest(digests),
            "files": files,
            **job.facts,
        }
        durable.write_checked(temporary / MANIFEST, manifest)
        durable.fsync_tree(temporary)
        target = self.root / f"step_{job.step}"
        if target.exists():  # a damaged one that this run fell back from
            _remove(target)
        temporary.rename(target)
        durable.fsync_folder(self.root)
        durable.write_file(self.root / "latest", target.name + "\n")
        for old in surplus(steps(self.root), self.keep, self.milestone):
            _remove(self.root / f"step_{old}")


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
    """Publish ROOT/step_N (`Saver.save`) and drop all but the newest `keep` steps. Return once it is there."""
    Saver(root, model, optimizer=optimizer, plan=plan, keep=keep).save(step, identity, position)
    return root / f"step_{step}"


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
    """Return the published steps, newest first. No torch.distributed."""
    numbers = (p.name.removeprefix("step_") for p in root.glob("step_*"))
    return sorted((int(n) for n in numbers if n.isdigit()), reverse=True)


def _defects(folder: Path) -> Iterator[str]:
    """Return what of a step does not agree with its manifest."""
    manifest, problem = from_rank_zero(step_manifest.read(folder) if dist.get_rank() == 0 else None)
    if problem:
        yield problem
        return
    names = sorted(manifest["files"])
    shares = _gathered(_hash_files(folder, names[dist.get_rank() :: dist.get_world_size()]), None)
    entries = {name: entry for part in shares for name, entry in part.items()}
    for name, (size, digest) in sorted(manifest["files"].items()):
        if name not in entries:
            yield f"{name} is missing"
        elif entries[name][0] != size:
            yield f"{name} has {entries[name][0]} bytes instead of {size}"
        elif entries[name][1] != digest:
            yield f"{name} has other bytes than were written"


def newest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """Return the newest step whose files all have the bytes that were written, and a line about each newer, damaged
    one.

    A last line where nobody can tell whether that step's manifest was altered: before, it had no sum over itself.
    """
    notes: list[str] = []
    for step in from_rank_zero(steps(root)):
        folder = root / f"step_{step}"
        defects = list(_defects(folder))
        if not defects:
            if not from_rank_zero(step_manifest.has_sum(folder) if dist.get_rank() == 0 else None):
                notes.append(f"{folder.name} has no sum: written before")
            return folder, notes
        notes.append(f"{folder.name} is damaged and was skipped: {defects[0]}")
        if dist.get_rank() == 0:
            log.warning("%s", notes[-1])
    return None, notes


def load_step(
    folder: Path, model: Model, optimizer: Any, plan: ParallelPlan, identity: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Restore weights, optimizer and, under the same layout, RNG. Return the step and the saved position.

    Raises UserMistake where the checkpoint belongs to another `identity`, naming what differs, or is damaged. What it
    does not say, since it was not written down yet when it was made, is no difference.
    """
    manifest, problem = from_rank_zero(step_manifest.read(folder) if dist.get_rank() == 0 else None)
    if problem:
        raise UserMistake(f"{folder}/{problem}; delete {folder} to go on from an earlier step")
    for name in sorted({*identity, *manifest["identity"]}):
        theirs, ours = manifest["identity"].get(name), identity.get(name)
        if name not in manifest["identity"]:
            log.warning("%s does not say its %s: taken for this run's", folder, name)
            continue
        if theirs != ours:
            raise UserMistake(
                f"{folder} was written with {name} = {theirs!r}, this run has {ours!r}: it cannot be resumed; "
                f"use a fresh folder, or the old value, or begin anew from its weights (init_from)"
            )
    weights = trained_state(model)
    wanted = {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=True, metadata=metadata()),
    }
    state = loading.load(wanted, folder / STATE)
    _load_model(model, state["model"], adapters=is_adapted(model))
    fill_optimizer(optimizer, state["optimizer"], manifest["updates"])
    if manifest["layout"] == layout_name(plan):
        _restore_rng(_read_rng(folder / RNG, f"{dist.get_rank()}.pt"))
    return manifest["step"], manifest["position"]
