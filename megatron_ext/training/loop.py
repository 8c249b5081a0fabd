"""The training loop: `train_on_packs` drives a Trainer over a pack plan, with schedule, metrics, validation,
checkpoints and resume.

    trainer.py      one update: model, optimizer, gradient     rows.py         what a rank trains on in a step
    metrics.py      what is told, and where to                 checkpoint.py   what is saved
    schedule.py     the learning rate, how long                watch.py        what happens if nothing happens
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from data_tools.progress import Progress, Stop, Stopped, never, silent
from megatron_ext.device import device
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.training import metrics
from megatron_ext.training.metrics import Metrics, Sink
from megatron_ext.training.rows import MicroBatch, Packs, micro_batch
from megatron_ext.training.schedule import Schedule
from megatron_ext.training.trainer import NonFinite, Sums, Trainer
from megatron_ext.training.watch import Hang, Watch
from megatron_ext.weights import checkpoint


@dataclass(frozen=True)
class Run:
    """What `train_on_packs` needs besides model and data."""

    schedule: Schedule
    global_batch: int  # packs a step
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 0  # 0: only at the end
    keep_checkpoints: int = 2
    keep_every: int = 0  # checkpoints of its multiples stay for good
    save_in_background: bool = True
    validate_every: int = 0  # 0: only at the end
    minutes: float = 0.0  # of training, all attempts together, after which it ends early; 0: as many as it takes
    pack_flops: float = 0.0  # of the model for an average pack, forward and backward; 0: not known
    hang: Hang = field(default_factory=Hang)


@dataclass(frozen=True)
class Outcome:
    """Facts about a finished training, the same on every rank."""

    step: int
    first_loss: float
    last_loss: float
    tokens: int
    supervised_tokens: int
    resumed_from: int
    notes: list[str]
    valid_losses: list[float] = field(default_factory=list)  # of each validation set, after the last step


def rows_of_step(packs: Packs, k: int, run: Run, plan: ParallelPlan) -> list[MicroBatch]:
    """This data-parallel rank's micro-batches of step `k`."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = packs.share(k, run.global_batch, run.seed, rank, size)
    return [
        micro_batch([packs.pack(i) for i in mine[start : start + plan.micro_batch]])
        for start in range(0, len(mine), plan.micro_batch)
    ]


def validation_loss(trainer: Trainer, packs: Packs) -> float:
    """Mean loss over all supervised tokens of all packs. Every rank takes part and gets it.

    Ranks must run equally many micro-batches: packs that some lack are made of one whose tokens do not count.
    """
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    at_once = trainer.plan.micro_batch * trainer.plan.pipeline  # a rank's packs of one pass: whole pipeline rounds
    sums = Sums()
    for first in range(0, packs.n_packs, size * at_once):
        mine = []
        for i in range(first + rank, first + size * at_once, size):
            pack = packs.pack(min(i, packs.n_packs - 1))
            if i >= packs.n_packs:
                pack = replace(pack, loss_mask=numpy.zeros_like(pack.loss_mask))
            mine.append(pack)
        parts = [mine[j : j + trainer.plan.micro_batch] for j in range(0, at_once, trainer.plan.micro_batch)]
        sums.add(trainer.evaluate([micro_batch(part) for part in parts]))
    return sums.reduced().mean_loss


def train_on_packs(
    trainer: Trainer,
    packs: Packs,
    run: Run,
    keep: Path,
    identity: dict[str, Any],
    progress: Progress = silent,
    stop: Stop = never,
    validation: Sequence[Packs] = (),
    sinks: Callable[[int], Sequence[Sink]] = lambda resumed_from: (),
) -> Outcome:
    """Train to the end of the schedule, from the newest valid checkpoint in KEEP/checkpoints if there is one.

    `identity` names what makes two runs the same (JSON values); the plan's digest is added. `sinks` makes, on rank 0,
    what metrics go to besides KEEP/metrics.jsonl. Raises UserMistake when a checkpoint of another identity lies
    there, NonFinite naming the step when loss or gradient is inf or NaN, Stopped on every rank once any rank's `stop`
    is true: before the next step, with the last one in a checkpoint.
    Afterwards KEEP/checkpoints has the last step. Every rank takes part and returns the same.
    """
    identity = {**identity, "packs": packs.digest, "global_batch": run.global_batch, "seed": run.seed}
    loop = _Loop(trainer, packs, run, keep, identity, progress, stop, validation)
    watch = Watch(run.hang, keep / "stacks", dist.get_rank())
    with watch.watching():
        loop.resume(sinks)
        try:
            return loop.run(watch)
        finally:
            loop.metrics.close()


class _Loop:
    """The state of `train_on_packs`. `window` sums since the last metrics line, `whole` since the first step."""

    def __init__(
        self,
        trainer: Trainer,
        packs: Packs,
        run: Run,
        keep: Path,
        identity: dict[str, Any],
        progress: Progress,
        stop: Stop,
        validation: Sequence[Packs],
    ):
        self.trainer, self.packs, self.settings, self.keep, self.identity = trainer, packs, run, keep, identity
        self.progress, self.validation = progress, validation
        self.root = keep / "checkpoints"
        self.window, self.whole, self.first_loss, self.last_loss = Sums(), Sums(), 0.0, 0.0
        self.done = self.saved = self.logged = 0
        self.seconds, self.began = 0.0, time.monotonic()  # of training before this attempt; when this one began
        self.notes: list[str] = []
        self.valid: list[float] = []
        self.held_up = 0.0  # seconds that saving kept the loop from training since the last line
        self.vote = StopVote(stop, self._time_is_over)

    # -- beginning ----------------------------------------------------------------------------------------------

    def resume(self, sinks: Callable[[int], Sequence[Sink]]) -> None:
        """Load the newest valid checkpoint, if any, and open what the run writes."""
        trainer, run = self.trainer, self.settings
        if dist.get_rank() == 0:
            self.root.mkdir(parents=True, exist_ok=True)
            checkpoint.sweep(self.root)
        dist.barrier()
        folder, self.notes = checkpoint.newest_valid(self.root)
        if folder is not None:
            self.done, position = checkpoint.load_step(
                folder, trainer.model, trainer.optimizer, trainer.plan, self.identity
            )
            self.first_loss, self.last_loss = position["first_loss"], position["last_loss"]
            self.logged, self.seconds = position["logged"], position["seconds"]
            if dist.get_rank() == 0:  # sums of all ranks: one rank carries them on
                self.window, self.whole = Sums(**position["window"]), Sums(**position["whole"])
        self.resumed_from = self.saved = self.done
        self.saver = checkpoint.Saver(
            self.root,
            trainer.model,
            trainer.optimizer,
            trainer.plan,
            run.keep_checkpoints,
            run.keep_every,
            run.save_in_background,
        )
        self.metrics = Metrics(self.keep / "metrics.jsonl", self.done, lambda: sinks(self.done))
        name = f"resumed from {folder.name}" if folder else ""
        self.progress(self.done, run.schedule.steps, "steps", name)

    # -- steps --------------------------------------------------------------------------------------------------

    def run(self, watch: Watch) -> Outcome:
        run, steps = self.settings, self.settings.schedule.steps
        self.vote.send()
        self._start_timing()
        while self.done < steps:
            if self.vote.count():
                self._publish()
                self.saver.close()
                raise Stopped(self.done, steps)
            if self.vote.over:
                self.notes.append(f"ended after {run.minutes:g} minutes at step {self.done:,} of {steps:,}")
                break
            self._step()
            watch.step()
            last = self.done == steps
            if last or (run.validate_every and self.done % run.validate_every == 0):
                self._validate()
                watch.move()
            if last or (run.checkpoint_every and self.done % run.checkpoint_every == 0):
                self._publish()
                watch.move()
            self.saver.check()
        self.vote.count()  # done anyway, but nothing may be under way when the groups end
        self._publish()
        self.saver.close()
        self.trainer.settle()
        if self.validation and not self.valid:
            self._validate()
        total = self.whole.reduced()
        return Outcome(
            self.done,
            self.first_loss,
            self.last_loss,
            total.tokens,
            total.supervised,
            self.resumed_from,
            self.notes,
            self.valid,
        )

    def _step(self) -> None:
        run, trainer, step = self.settings, self.trainer, self.done + 1
        rate = run.schedule.rate(self.done)
        log = step % run.log_every == 0 or step == run.schedule.steps
        trainer.clock.start()
        rows = rows_of_step(self.packs, self.done, run, trainer.plan)
        trainer.clock.mark("data")
        sums, norm = trainer.step(rows, rate, before_update=self.vote.send, count_zeros=log)
        if not math.isfinite(norm):
            total = sums.reduced()
            self.saver.wait()
            raise NonFinite(
                f"step {step}: the gradient norm is {norm} and the loss {total.mean_loss} at learning rate {rate:g}; "
                f"the last checkpoint is step {_newest(self.root)}. Lower lr or raise warmup_steps"
            )
        self.done = step
        self.window.add(sums)
        self.whole.add(sums)
        if log or step == 1:
            total = self.window.reduced()
            self.last_loss = total.mean_loss
            if step == 1:
                self.first_loss = self.last_loss
            if not math.isfinite(self.last_loss):
                raise NonFinite(f"the loss up to step {step} is {self.last_loss}. Lower lr or raise warmup_steps")
        if log:
            self._log(total, rate, norm)
        self.progress(step, run.schedule.steps, "steps", f"loss {self.last_loss:.4f}, lr {rate:.2e}")

    # -- what comes between -------------------------------------------------------------------------------------

    def _log(self, total: Sums, rate: float, norm: float) -> None:
        """One line about the steps since the last one."""
        run, packs = self.settings, self.packs
        parts = self.trainer.clock.read()
        ranks = metrics.compare_ranks(parts["forward_backward"])
        weights = metrics.parameter_norm(self.trainer.model)
        per_step = (time.perf_counter() - self.timed_from - self.paused) / (self.done - self.timed_since)
        peak = metrics.peak_flops()
        trained = (packs.batch(k, run.global_batch, run.seed) for k in range(self.logged, self.done))
        values = {
            "step": self.done,
            "samples": self.done * run.global_batch,  # packs
            "loss": self.last_loss,
            "lr": rate,
            "grad_norm": norm,
            "grad_zeros": self.trainer.zeros,
            "param_norm": weights,
            "tokens": total.tokens,
            "supervised_tokens": total.supervised,
            "padded_tokens": sum(packs.padding(i) for batch in trained for i in batch),
            "step_s": per_step,
            "tokens_per_s": run.global_batch * packs.pack_length / per_step,
            "parts_s": {**parts, "saving": self.held_up},
            "memory_gib": ranks.peak_memory / 2**30,
            "slowest_rank": ranks.rank,
            "slowest_ratio": ranks.ratio,
        }
        if peak and run.pack_flops:
            values["mfu"] = run.pack_flops * run.global_batch / per_step / (peak * dist.get_world_size())
        self.metrics.append(values)
        self.window, self.logged = Sums(), self.done
        self._start_timing()

    def _start_timing(self) -> None:
        """The next line's step_s is training from here on, without what `_aside` takes."""
        self.timed_from, self.timed_since, self.paused, self.held_up = time.perf_counter(), self.done, 0.0, 0.0

    def _aside(self, began: float) -> float:
        """Seconds since `began`, which are not to count as training."""
        seconds = time.perf_counter() - began
        self.paused += seconds
        return seconds

    def _validate(self) -> None:
        began = time.perf_counter()
        self.valid = [validation_loss(self.trainer, packs) for packs in self.validation]
        if self.valid:
            names = [f"valid_loss_{i}" if i else "valid_loss" for i in range(len(self.valid))]
            self.metrics.append({"step": self.done, **dict(zip(names, self.valid))})
        self._aside(began)

    def _publish(self) -> None:
        """Make the last step durable, with what the next one continues from; in the background if asked."""
        if self.done == self.saved:
            return
        began = time.perf_counter()
        window, whole = self.window.reduced(), self.whole.reduced()
        self.window, self.whole = (window, whole) if dist.get_rank() == 0 else (Sums(), Sums())
        self.trainer.settle()
        position = {
            "window": asdict(window),
            "whole": asdict(whole),
            "first_loss": self.first_loss,
            "last_loss": self.last_loss,
            "logged": self.logged,
            "seconds": self.seconds + time.monotonic() - self.began,
        }
        self.saver.save(self.done, self.identity, position)
        self.saved = self.done
        self.held_up += self._aside(began)

    def _time_is_over(self) -> bool:
        minutes = (self.seconds + time.monotonic() - self.began) / 60
        return 0 < self.settings.minutes <= minutes


class StopVote:
    """Whether any rank is to stop, with one answer for all: a signal reaches them at different moments.

    Sent between gradient and update, counted before the next step: two numbers, reduced while the update's own
    collectives run, so that no rank waits for them (tests/benchmarks/stop_check.py).
    """

    def __init__(self, stop: Stop, ended: Stop = never):
        self.stop, self.ended = stop, ended
        self.over = False  # whether any rank found that the run has `ended`, of the last count
        self.box = torch.zeros(2, device=device())
        self.work: Any = None

    def send(self) -> None:
        self.box.copy_(torch.tensor([float(self.stop()), float(self.ended())]))
        self.work = dist.all_reduce(self.box, op=dist.ReduceOp.MAX, async_op=True)

    def count(self) -> bool:
        self.work.wait()
        stop, over = self.box.tolist()
        self.over = over > 0
        return stop > 0


def _newest(root: Path) -> int:
    found = checkpoint.steps(root)
    return found[0] if found else 0
