"""The training loop that supervised fine-tuning and GRPO share: resume, make one step after the other, stop, publish.

What differs between the two is a TrainingStep: supervised.py has SFT's, rl/step.py GRPO's. Beside the loop:

    update.py      one update: model, optimizer, gradient    rows.py     what a rank trains on in a step of SFT
    metrics.py     what is reported, and where to            watch.py    what happens when nothing happens
    schedule.py    the learning rate, how long               weights/checkpoint.py    what is saved
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist

from data_tools.mistake import UserMistake
from data_tools.progress import Progress, Stop, Stopped, never, silent
from megatron_ext.device import device
from megatron_ext.training.metrics import Metrics, sinks
from megatron_ext.training.settings import TrainingSettings
from megatron_ext.training.update import NonFinite, Trainer
from megatron_ext.training.watch import Watch
from megatron_ext.weights import checkpoint

SLOWER = "Lower lr or raise warmup_steps"  # the remedy for a gradient that overflows without another known cause


@dataclass(frozen=True)
class Trained:
    """Facts about a finished training, the same on every rank."""

    step: int
    resumed_from: int
    notes: list[str]


class TrainingStep(Protocol):
    """What one kind of training does in a step, and what it remembers from step to step.

    Every rank calls each method at the same place of the loop. `loop` offers what the step needs: `done` (steps that
    are made), `metrics`, `vote`, `watch`, `notes`, `non_finite`.
    """

    def begin(self, loop: "Loop", position: dict[str, Any] | None) -> None:
        """Get ready for the first step of this attempt. `position` is that of the checkpoint it resumes from."""

    def is_over(self) -> bool:
        """Return whether this rank wants the training to end before its last step. One rank is enough."""

    def make(self, loop: "Loop") -> str:
        """Make the step after `loop.done` and write its metrics. Return a note for who watches the progress.

        `loop.vote.send` has to be called once, best between the gradient and the update. Raises Stopped, on every rank,
        where the step is left before its end: its `done` is the share of the step that is durable.
        """

    def after(self, loop: "Loop") -> None:
        """Do what follows step `loop.done` before it is published: validate, evaluate. May raise Stopped as `make`."""

    def position(self) -> dict[str, Any]:
        """Return what the next step continues from besides weights, optimizer and RNG, as JSON values.

        Those of rank 0 are kept.
        """

    def published(self, loop: "Loop", seconds: float) -> None:
        """Hear that step `loop.done` is saved, or being saved, for which the loop was held up that long."""

    def finish(self, loop: "Loop") -> None:
        """Do what is left once the last checkpoint is durable."""


class Loop:
    """One attempt at a training."""

    def __init__(
        self,
        step: TrainingStep,
        trainer: Trainer,
        settings: TrainingSettings,
        keep: Path,
        *,
        steps: int,
        identity: dict[str, Any],
        progress: Progress = silent,
        stop: Stop = never,
    ):
        """Prepare an attempt at `steps` steps. KEEP gets checkpoints/, metrics.jsonl and, of a hang, stacks/.

        `identity` names what makes two runs the same (JSON values).
        """
        self.step, self.trainer, self.settings, self.identity = step, trainer, settings, identity
        self.steps, self.progress, self._stop = steps, progress, stop
        self.keep, self.checkpoints = keep, keep / "checkpoints"
        self.done = self.saved = self.resumed_from = 0
        self.notes: list[str] = []
        self.watch = Watch(settings.hang, keep / "stacks", dist.get_rank())

    def run(self) -> Trained:
        """Train to the last step, from the newest valid checkpoint if there is one.

        Every rank takes part and returns the same; KEEP/checkpoints then has the last step.
        Raises UserMistake when a checkpoint of another identity lies there, NonFinite naming the step when loss or
        gradient is inf or NaN, Stopped on every rank once any rank's `stop` is true: before the next step, or where
        the step itself can be left, with all that was done in a checkpoint.
        """
        with self.watch.watching():
            position = self._resume()
            try:
                self.vote = StopVote(self._stop, self.step.is_over)
                self.step.begin(self, position)
                self.vote.send()
                return self._to_the_end()
            finally:
                self.metrics.close()

    def non_finite(self, what: str, rate: float, remedy: str = SLOWER) -> NonFinite:
        """Return the mistake of the step being made, whose gradient is not finite."""
        said = f"{what} at learning rate {rate:g}; the last checkpoint is step {self.saved}"
        return NonFinite(f"step {self.done + 1}: {said}. {remedy}")

    # -- beginning ----------------------------------------------------------------------------------------------

    def _resume(self) -> dict[str, Any] | None:
        """Load the newest valid checkpoint, open what the run writes, and return the position, None without one."""
        trainer, settings = self.trainer, self.settings
        if dist.get_rank() == 0:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            checkpoint.sweep(self.checkpoints)
        dist.barrier()
        folder, self.notes = checkpoint.newest_valid(self.checkpoints)
        position = None
        if folder is not None:
            self.done, position = checkpoint.load_step(
                folder, trainer.model, trainer.optimizer, plan=trainer.plan, identity=self.identity
            )
        self.resumed_from = self.saved = self.done
        self.saver = checkpoint.Saver(
            self.checkpoints,
            trainer.model,
            trainer.optimizer,
            trainer.plan,
            keep=settings.keep_checkpoints,
            milestone=settings.keep_every,
            background=settings.save_in_background,
        )
        self.metrics = Metrics(
            self.keep / "metrics.jsonl", self.done, lambda: sinks(settings.track, self.keep, self.done, self.identity)
        )
        self.progress(self.done, self.steps, "steps", f"resumed from {folder.name}" if folder else "")
        return position

    # -- steps --------------------------------------------------------------------------------------------------

    def _to_the_end(self) -> Trained:
        every = self.settings.checkpoint_every
        while self.done < self.steps:
            if self.vote.count():
                self._leave()
            if self.vote.over:
                break
            self._make_one()
            if self.done == self.steps or (every > 0 and self.done % every == 0):
                self._publish()
            self.saver.check()
        self.vote.count()  # done anyway, but nothing may be under way when the groups end
        self._publish()
        self.saver.close()
        self.trainer.settle()
        self.step.finish(self)
        return Trained(self.done, self.resumed_from, self.notes)

    def _make_one(self) -> None:
        try:
            note = self.step.make(self)
            self.done += 1
            self.progress(self.done, self.steps, "steps", note)
            self.watch.step()
            self.step.after(self)
        except Stopped as stopped:
            self._leave(stopped.done)
        except UserMistake:
            self.saver.wait()  # what is being published still counts
            raise

    def _leave(self, share: float = 0) -> NoReturn:
        """Make what was done durable and stop, with that share of the next step."""
        self._publish()
        self.saver.close()
        raise Stopped(self.done + share, self.steps)

    def _publish(self) -> None:
        """Save the last step with what the next one continues from, if it is not saved; in the background if asked."""
        if self.done == self.saved:
            return
        began = time.perf_counter()
        position = self.step.position()
        self.trainer.settle()
        self.saver.save(self.done, self.identity, position)
        self.saved = self.done
        self.watch.move()
        self.step.published(self, time.perf_counter() - began)


class StopVote:
    """Asks whether any rank is to stop, with one answer for all: a signal reaches them at different moments.

    Sent between gradient and update, counted before the next step: two numbers, reduced while the update's own
    collectives run, so that no rank waits for them (tests/benchmarks/stop_check.py).
    """

    def __init__(self, stop: Stop, ended: Stop = never):
        self.stop, self.ended = stop, ended
        self.over = False  # whether any rank found that the run has `ended`, of the last count
        self.box = torch.zeros(2, device=device())
        self.work: Any = None

    def send(self) -> None:
        """Begin to ask all ranks, with this rank's answers of now."""
        for place, answer in enumerate((self.stop(), self.ended())):
            self.box[place].fill_(float(answer))  # a copy from the host would wait for the whole backward pass
        self.work = dist.all_reduce(self.box, op=dist.ReduceOp.MAX, async_op=True)

    def count(self) -> bool:
        """Return whether any rank is to stop, as of the last `send`."""
        self.work.wait()
        stop, over = self.box.tolist()
        self.over = over > 0
        return stop > 0
