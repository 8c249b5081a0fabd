"""In-place GRPO: its step in the training loop (training/loop.py).

A step takes the next prompts of a seeded order, samples a group of completions of each with the weights in training,
asks for their rewards while others still run, turns them into advantages, packs what is to be trained into rows, and
makes one or several updates. A step's rollouts are used by that step alone. Denominators count the whole global batch.

What resumes: weights, optimizer and RNG from a checkpoint, the order of prompts from its position, and the rollouts of
the steps after it from the journal (rl/journal.py): every sample is trained once.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_tools.progress import Progress, Stop, Stopped, silent
from megatron_ext.layers.router_replay import Routers
from megatron_ext.rl import journal, report, untrained
from megatron_ext.rl.collect import Collector
from megatron_ext.rl.position import Position
from megatron_ext.rl.sample_log import SampleLog
from megatron_ext.rl.samples import Sample, batch_of, kept_items
from megatron_ext.rl.settings import GrpoSettings
from megatron_ext.rl.updates import Reference, check_advantages, packed_minibatches, remedy, update
from megatron_ext.training.loop import Loop, Trained
from megatron_ext.training.update import Trainer
from megatron_ext.weights import checkpoint

ROLLOUTS, SAMPLES = "rollouts", "samples"
GIB = 1 << 30

Evaluate = Callable[[int], dict[str, Any]]  # from the step whose weights are evaluated, to what metrics say of them
Spell = Callable[[Sample], dict[str, Any]]  # from a sample, to its texts for the log


Judge = Callable[[Sequence[Sample]], dict[str, Any]]  # from a step's samples, to what metrics say of them by entry


def nothing(drawn: Sequence[Sample]) -> dict[str, Any]:
    """Say no more of a step's samples than their rewards."""
    return {}


def no_texts(sample: Sample) -> dict[str, Any]:
    """Log token counts alone."""
    return {}


@dataclass(frozen=True)
class GrpoTrained(Trained):
    """Facts about a finished training, the same on every rank."""

    position: Position
    bounds: list[str]  # what is not kept because of a bound


def train(
    trainer: Trainer,
    collector: Collector,
    settings: GrpoSettings,
    keep: Path,
    *,
    identity: dict[str, Any],
    stop: Stop,
    progress: Progress = silent,
    reference: Reference | None = None,
    evaluate: Evaluate | None = None,
    spell: Spell = no_texts,
    judge: Judge = nothing,
) -> GrpoTrained:
    """Train to the end of the schedule, as Loop.run does.

    `reference` gives the log-probs of rows for the KL term, on every rank. `evaluate(step)` is called on every rank;
    it may raise Stopped on all of them. `spell` gives the texts of a sample for the log, `judge` the `outcomes` of a
    step's samples for the metrics.
    """
    step = GrpoStep(
        trainer, collector, settings, keep, reference=reference, evaluate=evaluate, spell=spell, judge=judge
    )
    loop = Loop(step, trainer, settings, keep, steps=settings.steps, identity=identity, progress=progress, stop=stop)
    return GrpoTrained(**vars(loop.run()), position=step.reached, bounds=step.bounds)


class GrpoStep:
    """Rollouts of some prompts and the updates that they are for: a TrainingStep."""

    def __init__(
        self,
        trainer: Trainer,
        collector: Collector,
        settings: GrpoSettings,
        keep: Path,
        *,
        reference: Reference | None,
        evaluate: Evaluate | None,
        spell: Spell,
        judge: Judge = nothing,
    ):
        self.trainer, self.collector, self.settings, self.keep = trainer, collector, settings, keep
        self.reference, self.evaluate, self.spell, self.judge = reference, evaluate, spell, judge
        self.schedule = settings.rate_schedule()
        self.reached = Position()
        self.drawn: list[Sample] = []  # of the last step
        self.records: journal.Bound | None = None  # of rank 0
        self.log: SampleLog | None = None  # the same
        self.bounds: list[str] = []  # the same

    def begin(self, loop: Loop, position: dict[str, Any] | None) -> None:
        if position is not None:
            self.reached = Position.read(position)
        if self.evaluate is not None:
            loop.metrics.keep_only(lambda line: not self._is_evaluated_again(json.loads(line)))
        if dist.get_rank() == 0:
            self.records = journal.Bound(self.keep / ROLLOUTS, self.settings.journal_gib * GIB)
            if self.settings.log_samples:
                self.log = SampleLog(self.keep / SAMPLES, self.settings.samples_gib * GIB, loop.steps)

    def _is_evaluated_again(self, line: dict[str, Any]) -> bool:
        """Return whether a line of the metrics is of an evaluation that the checkpoint does not know: a step is saved
        before it is evaluated.
        """
        return "evaluation" in line and line["step"] > self.reached.evaluated

    def is_over(self) -> bool:
        return False

    def make(self, loop: Loop) -> str:
        settings, k, step = self.settings, loop.done, loop.done + 1
        self._evaluate_if_due(loop)
        times = report.StepTimes()
        drawn, kept = self._draw(k)
        batch = batch_of(
            drawn, kept, settings.advantage, rewarding=settings.rewarding, limit=settings.sampling.max_tokens
        )
        check_advantages(batch, step)
        parts = packed_minibatches(
            batch,
            settings,
            k,
            self.trainer.plan,
            bring=partial(self.collector.bring, drawn, written=settings.log_samples),
            routers=Routers.of(self.trainer.model[0]) if settings.routing_replay else None,
        )
        rate = self.schedule.rate(k)
        with times.of("train"):
            made = update(
                self.trainer,
                parts,
                settings,
                rate=rate,
                mismatch=self.reached.mismatch,
                reference=self.reference,
                send_vote=loop.vote.send,
            )
        if not made.is_finite:
            raise loop.non_finite(f"the gradient norm is {made.norm:g}", rate, remedy(made.measures, batch))
        line = report.measured(drawn, batch, kept, made)
        line |= {"outcomes": told} if (told := self.judge(drawn)) else {}
        self.reached.count(drawn, batch, settings.rewarding, updates=made.updates, line=line)
        if self.log is not None:
            self.log.write(step, drawn, batch, differences=made.differences, spell=self.spell)
        times.seconds.update(self.collector.seconds)
        speeds = report.speeds(drawn, made, self.collector, times)
        loop.metrics.append({"step": step, "lr": rate, **line, **speeds})
        reward = "no reward" if line["reward"] is None else f"reward {line['reward']:.3f}, lr {rate:.2e}"
        return reward if batch.trained.any() else f"{reward}, no sample trained"

    def _draw(self, k: int) -> tuple[list[Sample], set[int]]:
        """Return the samples of step `k` and the prompts that are kept. Stopped tells which share of it is recorded."""
        self.collector.begin(k)
        try:
            with self.trainer.offloaded(self.settings.offload):
                self.drawn, kept = draw(self.collector, self.settings, self.reached)
        except Stopped as stopped:
            samples = (1 + self.settings.refill_tries) * self.settings.prompts * self.collector.group
            raise Stopped(stopped.done / (samples * self.settings.sampling.max_tokens + 1), 1) from None
        self.collector.close()
        return self.drawn, kept

    def after(self, loop: Loop) -> None:
        if self.records is not None:
            journal.join(self.keep / ROLLOUTS, loop.done - 1, self.collector.identity)
            self.records.add(loop.done - 1)
        if self.reached.is_broken:
            rollouts = self.keep / ROLLOUTS
            if dist.get_rank() == 0:
                for step in journal.steps(rollouts):
                    journal.drop_failures(rollouts, step, self.collector.identity)
            raise untrained.failed_verdicts(self.drawn, f"step {loop.done}")
        if loop.done == loop.steps:
            self._evaluate_if_due(loop)

    def _evaluate_if_due(self, loop: Loop) -> None:
        """Evaluate the weights of step `loop.done`, as settings.evaluation wants it."""
        every, step = self.settings.evaluation.every, loop.done
        due = every > 0 and (step % every == 0 or step == loop.steps)
        if self.evaluate is not None and due and self.reached.evaluated < step:
            with self.trainer.offloaded(self.settings.offload):  # its samples have the cache of a rollout
                told = self.evaluate(step)
            loop.metrics.append({"step": step, "evaluation": told})
            self.reached.evaluated = step
            loop.watch.move()

    def position(self) -> dict[str, Any]:
        return asdict(self.reached)

    def published(self, loop: Loop, seconds: float) -> None:
        if self.records is not None:  # milestones are not gone on with; a checkpoint under way comes on top
            newest = checkpoint.steps(loop.checkpoints)[: self.settings.keep_checkpoints]
            self.records.forget(min(newest, default=0))

    def finish(self, loop: Loop) -> None:
        self.bounds = [note for kept in (self.log, self.records) if kept is not None and (note := kept.note())]
        reached, loss = self.reached, self.settings.loss
        if not reached.signal and not (reached.trained_samples and (loss.kl_beta or loss.entropy)):
            raise untrained.nothing_trained(
                reached.untrained, reached.reasons, samples=reached.samples, steps=loop.steps
            )


def draw(collector: Collector, settings: GrpoSettings, position: Position) -> tuple[list[Sample], set[int]]:
    """Return all samples of a step, and the prompts that are kept; move the cursor on."""
    drawn: list[Sample] = []
    kept: set[int] = set()
    cursor = position.cursor
    for _ in range(1 + settings.refill_tries):
        missing = settings.prompts - len(kept)
        if not missing:
            break
        drawn += collector.collect(range(cursor, cursor + missing))
        cursor += missing
        kept = kept_items(drawn, settings.advantage, settings.rewarding, settings.sampling.max_tokens)
    position.cursor = cursor  # only now: who stops in between begins the step anew
    return drawn, kept
