"""Distributed checkpoints: how a step is published, which is the newest whole one, what its weights are.

    ROOT/step_400/manifest.json    files with size and sha256, step, identity, position, layout, weights digest
    ROOT/step_400/state/           torch_dist: weights (with LoRA the adapters alone) and optimizer, for any layout, a
                                   file a node, where each rank's part ends with its random states
    ROOT/latest                    the newest step's name, a hint only

A step is written into a hidden sibling, fsynced, and renamed: a folder named step_N is complete. Every rank takes
part in each function unless it says otherwise. What a rank writes: staging.py; the file format: dist_weights.py; who
tells whom: exchange.py, told.py.
"""

import logging
import math
import shutil
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_tools.base import digests, durable
from data_tools.mistake import UserMistake
from megatron_ext.device import backend
from megatron_ext.files import step_manifest
from megatron_ext.files.digest import combined
from megatron_ext.files.step_manifest import FORMAT, MANIFEST
from megatron_ext.models.registry import stages
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.weights import dist_weights, exchange, loading, random_states, told
from megatron_ext.weights.exchange import Group, from_rank_zero, to_rank_zero
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
    model_state,
    sums,
    trained_state,
    wanted_optimizer,
)
from megatron_ext.weights.told import Everything, Sums, Told

log = logging.getLogger(__name__)

STATE = "state"


# ---------------------------------------------------------------- weights


def _write(folder: Path, parts: Sequence[Part], group: Group, rng: bytes = b"") -> Told:
    """Write this rank's part of its node's file of a checkpoint, with its random states; sync it, and return what to
    tell of it. Every rank takes part; rank 0 has made the folder.
    """
    boxes = [
        (region, part.data.reshape(-1)[start : start + math.prod(region.size)])
        for part in parts
        for region, start in dist_weights.pieces(part.region, part.data.element_size())
    ]
    size = sum(dist_weights.stored_bytes(region.size, data.dtype) for region, data in boxes)
    size += dist_weights.aligned(len(rng))
    place = exchange.place(size, group)
    writer = dist_weights.Writer(folder, place.file, place.start)
    for region, data in boxes:
        writer.write(region, data)
    states = writer.append(rng)
    part = writer.close()
    if part[0] != size:  # the next rank's part begins there
        raise RuntimeError(f"rank {dist.get_rank()} wrote {part[0]:,} bytes where {size:,} were meant")
    return Told(writer.name, part, writer.written, sums={}, rng=states)


def save_weights(model: Model, folder: Path) -> str:
    """Write the weights only, into the folder `folder` (made here), and return their digest (`weights_digest`).

    What the ranks hashed while they wrote stands in its `digests.json`: a seal does not read it again.
    """
    first = dist.get_rank() == 0
    if first:
        folder.mkdir(parents=True)
    with exchange.control() as group:
        parts = Staging().copy(Weights(model).parts())
        words = to_rank_zero(replace(_write(folder, parts, group), sums=sums(parts)).packed(), group)
        return from_rank_zero(finish_weights(folder, told.everything(words)) if first else "", group)


def finish_weights(folder: Path, written: Everything) -> str:
    """Make the folder that all ranks have filled, and synced, a checkpoint of weights. Return their digest.

    Rank 0 alone, without the others.
    """
    digests.write(folder, written.files | dist_weights.finish(folder, written.pieces))
    return written.weights_digest


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
    with exchange.control() as group:
        total: Sums = {}
        for of_rank in to_rank_zero(sums(Weights(model).parts()), group):
            told.add(total, of_rank)
        return from_rank_zero(combined(total), group)


# ---------------------------------------------------------------- steps


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
    rng: bytes
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
        apart = background or backend() != "gloo"  # see exchange.control
        self._group = dist.new_group(backend="gloo") if apart else None
        self._background = background
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
            rng=random_states.stored(),
            updates=self._optimizer.updates(),
            facts={
                "identity": identity,
                "position": position,
                "layout": random_states.layout_name(self.plan),
                "vocabulary": stages(self._model)[0].vocabulary_rows,  # tensors may have padding
            },
        )
        if not self._background:
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
        first = dist.get_rank() == 0
        temporary = self.root / from_rank_zero(f".step_{job.step}.{uuid.uuid4().hex[:8]}.tmp", self._group)
        if first:
            (temporary / STATE).mkdir(parents=True)
        mine = _write(temporary / STATE, job.weights + job.optimizer, self._group, job.rng)
        mine = replace(mine, sums=sums(job.weights), updates=job.updates)
        words = to_rank_zero(mine.packed(), self._group)
        if first:
            publish(temporary, self.root / f"step_{job.step}", told.everything(words), {"step": job.step, **job.facts})
            for old in surplus(steps(self.root), self.keep, self.milestone):
                _remove(self.root / f"step_{old}")
        dist.barrier(group=self._group)


def publish(temporary: Path, target: Path, written: Everything, facts: dict[str, Any]) -> None:
    """Make the folder that all ranks have filled, and synced, the step `target`. Rank 0 alone, without the others."""
    files = written.files | dist_weights.finish(temporary / STATE, written.pieces)
    manifest = {
        "format": FORMAT,
        "updates": written.updates,
        "weights_digest": written.weights_digest,
        "files": {f"{STATE}/{name}": parts for name, parts in files.items()},
        "rng": [(f"{STATE}/{name}", start, size) for name, start, size in written.rng],
        **facts,
    }
    durable.write_checked(temporary / MANIFEST, manifest)
    durable.fsync_folder(temporary / STATE)
    if target.exists():  # a damaged one that this run fell back from
        _remove(target)
    temporary.rename(target)
    durable.fsync_folder(target.parent)
    durable.write_file(target.parent / "latest", target.name + "\n")


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
    saver = Saver(root, model, optimizer=optimizer, plan=plan, keep=keep)
    saver.save(step, identity, position)
    saver.close()
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


def _defect(folder: Path, group: Group) -> str:
    """Return what of a step does not agree with its manifest, "" where all does. Each rank reads a share of it."""
    first, rank = dist.get_rank() == 0, dist.get_rank()
    manifest, problem = step_manifest.read(folder) if first else ({}, "")
    places, problem = from_rank_zero((step_manifest.places(manifest) if manifest else [], problem), group)
    if problem:
        return problem
    own = (wrong for place in places[rank :: dist.get_world_size()] if (wrong := _difference(folder, place)))
    found = sorted(wrong for wrong in to_rank_zero(next(own, ""), group) if wrong)
    return from_rank_zero(found[0] if found else "", group)


def _difference(folder: Path, place: step_manifest.Place) -> str:
    """Return how one part of a step's file is other than what was written, "" where it is not. One rank."""
    try:
        size = (folder / place.file).stat().st_size
        if size != place.whole:
            return f"{place.file} has {size} bytes instead of {place.whole}"
        found = digests.part_of(folder / place.file, place.start, place.size)
    except OSError:
        return f"{place.file} is missing"
    return "" if found == (place.size, place.sha256) else f"{place.file} has other bytes than were written"


def newest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """Return the newest step whose files all have the bytes that were written, and a line about each newer, damaged
    one.

    A last line where nobody can tell whether that step's manifest was altered: before, it had no sum over itself.
    """
    notes: list[str] = []
    with exchange.control() as group:
        for step in from_rank_zero(steps(root), group):
            folder = root / f"step_{step}"
            defect = _defect(folder, group)
            if not defect:
                if not from_rank_zero(step_manifest.has_sum(folder) if dist.get_rank() == 0 else None, group):
                    notes.append(f"{folder.name} has no sum: written before")
                return folder, notes
            notes.append(f"{folder.name} is damaged and was skipped: {defect}")
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
    manifest, problem = step_manifest.read(folder) if dist.get_rank() == 0 else ({}, "")
    manifest.pop("files", None)
    manifest, problem = from_rank_zero((manifest, problem))
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
    wanted = {"model": weights, "optimizer": wanted_optimizer(optimizer, weights)}
    state = loading.load(wanted, folder / STATE)
    _load_model(model, state["model"], adapters=is_adapted(model))
    fill_optimizer(optimizer, trained_state(model), state["optimizer"], manifest["updates"])
    if manifest["layout"] == random_states.layout_name(plan):
        random_states.restore(random_states.read(folder, *step_manifest.rng_of(manifest, dist.get_rank())))
    return manifest["step"], manifest["position"]
