"""Supervised fine-tuning over a pack plan: its step in the training loop, with metrics and validation."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
import torch.distributed as dist
from megatron.core import parallel_state

from data_tools.progress import Progress, Stop, never, silent
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.training import metrics
from megatron_ext.training.loop import SLOWER, Loop, Trained
from megatron_ext.training.rows import MicroBatch, Packs, micro_batch
from megatron_ext.training.settings import SftSettings
from megatron_ext.training.update import NonFinite, Sums, Trainer


@dataclass(frozen=True)
class SftTrained(Trained):
    """Facts about a finished supervised training, the same on every rank."""

    first_loss: float
    last_loss: float
    tokens: int
    supervised_tokens: int
    valid_losses: list[float]  # of each validation set, after the last step


def rows_of_step(packs: Packs, k: int, settings: SftSettings, plan: ParallelPlan) -> list[MicroBatch]:
    """Return this data-parallel rank's micro-batches of step `k`, counted from 0."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    share = packs.share(k, settings.global_batch, settings.seed, rank=rank, ranks=size)
    return [
        micro_batch([packs.pack(i) for i in share[start : start + plan.micro_batch]])
        for start in range(0, len(share), plan.micro_batch)
    ]


def validation_loss(trainer: Trainer, packs: Packs) -> float:
    """Return the mean loss over all supervised tokens of all packs, on every rank; every rank takes part.

    Ranks must run equally many micro-batches: packs that some lack are made of one whose tokens do not count.
    """
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    at_once = trainer.plan.micro_batch * trainer.plan.pipeline  # a rank's packs of one pass: whole pipeline rounds
    sums = Sums()
    for first in range(0, packs.n_packs, size * at_once):
        share = []
        for i in range(first + rank, first + size * at_once, size):
            pack = packs.pack(min(i, packs.n_packs - 1))
            if i >= packs.n_packs:
                pack = replace(pack, loss_mask=numpy.zeros_like(pack.loss_mask))
            share.append(pack)
        parts = [share[j : j + trainer.plan.micro_batch] for j in range(0, at_once, trainer.plan.micro_batch)]
        sums.add(trainer.evaluate([micro_batch(part) for part in parts]))
    return sums.reduced().mean_loss


def train_on_packs(
    trainer: Trainer,
    packs: Packs,
    settings: SftSettings,
    keep: Path,
    *,
    identity: dict[str, Any],
    progress: Progress = silent,
    stop: Stop = never,
    validation: Sequence[Packs] = (),
    pack_flops: float = 0.0,
) -> SftTrained:
    """Train to the end of the schedule, as Loop.run does. What the packs and their order are is added to `identity`.

    `pack_flops` is what the model takes for an average pack, forward and backward; 0: not known.
    """
    identity = {**identity, "packs": packs.digest, "global_batch": settings.global_batch, "seed": settings.seed}
    step = SftStep(trainer, packs, settings, validation=validation, pack_flops=pack_flops)
    steps = step.schedule.steps
    loop = Loop(step, trainer, settings, keep, steps=steps, identity=identity, progress=progress, stop=stop)
    trained = loop.run()
    return SftTrained(
        **vars(trained),
        first_loss=step.first_loss,
        last_loss=step.last_loss,
        tokens=step.total.tokens,
        supervised_tokens=step.total.supervised,
        valid_losses=step.valid_losses,
    )


@dataclass
class _Timing:
    """Since when, in time and steps, the next metrics line counts, and what of it was no training."""

    began: float = field(default_factory=time.perf_counter)
    since: int = 0  # steps that were made when it began
    paused: float = 0.0  # seconds of validating and of being held up
    saving: float = 0.0  # seconds that saving kept the loop from training


class SftStep:
    """One update over the packs of a global batch: a TrainingStep.

    `window` has the sums since the last metrics line, `whole` those since the first step; of ranks that resumed, rank 0
    has those of before.
    """

    def __init__(
        self,
        trainer: Trainer,
        packs: Packs,
        settings: SftSettings,
        *,
        validation: Sequence[Packs],
        pack_flops: float,
    ):
        self.trainer, self.packs, self.settings = trainer, packs, settings
        self.validation, self.pack_flops = validation, pack_flops
        self.schedule = settings.rate_schedule(packs.pack_length)
        self.window, self.whole, self.total = Sums(), Sums(), Sums()
        self.first_loss = self.last_loss = 0.0
        self.logged = 0  # the step of the last metrics line
        self.seconds, self.began = 0.0, time.monotonic()  # of training before this attempt; when this one began
        self.valid_losses: list[float] = []
        self.timing = _Timing()

    def begin(self, loop: Loop, position: dict[str, Any] | None) -> None:
        if position is not None:
            self.first_loss, self.last_loss = position["first_loss"], position["last_loss"]
            self.logged, self.seconds = position["logged"], position["seconds"]
            if dist.get_rank() == 0:  # sums of all ranks: one rank carries them on
                self.window, self.whole = Sums(**position["window"]), Sums(**position["whole"])
        self.timing = _Timing(since=loop.done)

    def is_over(self) -> bool:
        return 0 < self.settings.minutes <= self._seconds() / 60

    def _seconds(self) -> float:
        """Return the seconds of training, all attempts together."""
        return self.seconds + time.monotonic() - self.began

    def make(self, loop: Loop) -> str:
        settings, trainer, step = self.settings, self.trainer, loop.done + 1
        rate = self.schedule.rate(loop.done)
        log = step % settings.log_every == 0 or step == loop.steps
        trainer.clock.start()
        rows = rows_of_step(self.packs, loop.done, settings, trainer.plan)
        trainer.clock.mark("data")
        sums, norm = trainer.step(rows, rate, before_update=loop.vote.send, count_zeros=log)
        if not math.isfinite(norm):
            loss = sums.reduced().mean_loss
            raise loop.non_finite(f"the gradient norm is {norm} and the loss {loss}", rate)
        self.window.add(sums)
        self.whole.add(sums)
        if log or step == 1:
            total = self.window.reduced()
            self.last_loss = total.mean_loss
            if step == 1:
                self.first_loss = self.last_loss
            if not math.isfinite(self.last_loss):
                raise NonFinite(f"the loss up to step {step} is {self.last_loss}. {SLOWER}")
            if log:
                self._log(loop, step, total, rate=rate, norm=norm)
        return f"loss {self.last_loss:.4f}, lr {rate:.2e}"

    def after(self, loop: Loop) -> None:
        every = self.settings.validate_every
        if loop.done == loop.steps or (every and loop.done % every == 0):
            self._validate(loop)
            loop.watch.move()

    def position(self) -> dict[str, Any]:
        window, whole = self.window.reduced(), self.whole.reduced()
        self.window, self.whole = (window, whole) if dist.get_rank() == 0 else (Sums(), Sums())
        return {
            "window": asdict(window),
            "whole": asdict(whole),
            "first_loss": self.first_loss,
            "last_loss": self.last_loss,
            "logged": self.logged,
            "seconds": self._seconds(),
        }

    def published(self, loop: Loop, seconds: float) -> None:
        self.timing.paused += seconds
        self.timing.saving += seconds

    def finish(self, loop: Loop) -> None:
        if loop.done < loop.steps:
            minutes = f"{self.settings.minutes:g} minutes"
            loop.notes.append(f"ended after {minutes} at step {loop.done:,} of {loop.steps:,}")
        if not self.valid_losses:
            self._validate(loop)
        self.total = self.whole.reduced()

    def _log(self, loop: Loop, step: int, total: Sums, *, rate: float, norm: float) -> None:
        """Write one line about the steps since the last one."""
        settings, packs, timing = self.settings, self.packs, self.timing
        parts = self.trainer.clock.read()
        ranks = metrics.compare_ranks(parts["forward_backward"])
        weights = metrics.parameter_norm(self.trainer.model)
        per_step = (time.perf_counter() - timing.began - timing.paused) / (step - timing.since)
        peak = metrics.peak_flops()
        trained = (packs.batch(k, settings.global_batch, settings.seed) for k in range(self.logged, step))
        values = {
            "step": step,
            "samples": step * settings.global_batch,  # packs
            "loss": self.last_loss,
            "lr": rate,
            "grad_norm": norm,
            "grad_zeros": self.trainer.zeros,
            "param_norm": weights,
            "tokens": total.tokens,
            "supervised_tokens": total.supervised,
            "padded_tokens": sum(packs.padding(i) for batch in trained for i in batch),
            "step_s": per_step,
            "tokens_per_s": settings.global_batch * packs.pack_length / per_step,
            "parts_s": {**parts, "saving": timing.saving},
            "memory_gib": ranks.peak_memory / 2**30,
            "slowest_rank": ranks.rank,
            "slowest_ratio": ranks.ratio,
        }
        if peak and self.pack_flops:
            values["mfu"] = self.pack_flops * settings.global_batch / per_step / (peak * dist.get_world_size())
        loop.metrics.append(values)
        self.window, self.logged, self.timing = Sums(), step, _Timing(since=step)

    def _validate(self, loop: Loop) -> None:
        began = time.perf_counter()
        self.valid_losses = [validation_loss(self.trainer, packs) for packs in self.validation]
        if self.valid_losses:
            names = [f"valid_loss_{i}" if i else "valid_loss" for i in range(len(self.valid_losses))]
            loop.metrics.append({"step": loop.done, **dict(zip(names, self.valid_losses))})
        self.timing.paused += time.perf_counter() - began
