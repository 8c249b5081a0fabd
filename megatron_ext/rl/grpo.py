"""In-place GRPO: the loop.

A step takes the next prompts of a seeded order, samples a group of completions of each with the weights in training,
asks for their rewards while others still run, turns them into advantages, packs what is to be trained into rows, and
makes one or several updates. A step's rollouts are used by that step alone. Denominators count the whole global batch.

What resumes: weights, optimizer and RNG from a checkpoint, the order of prompts from its position, and the rollouts of
the steps after it from the journal (rl/journal.py): every sample is trained once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_tools.base.seeded import permutation
from data_tools.progress import Progress, Stop, Stopped, silent
from megatron_ext.rl import fruit, journal, report
from megatron_ext.rl.collect import Collector
from megatron_ext.rl.losses import Totals
from megatron_ext.rl.rows import (
    Measures,
    RolloutRow,
    log_probs,
    policy_loss_function,
    rollout_rows,
    with_old,
    with_reference,
)  # fmt: skip
from megatron_ext.rl.samples import Batch, Sample, batch_of, kept_items
from megatron_ext.rl.settings import Advantage, Loss, Rewarding
from megatron_ext.training.loop import StopVote
from megatron_ext.training.metrics import Metrics, Sink
from megatron_ext.training.schedule import Schedule
from megatron_ext.training.trainer import NonFinite, Sums, Trainer
from megatron_ext.training.watch import Hang, Watch
from megatron_ext.weights import checkpoint

ROLLOUTS, SAMPLES = "rollouts", "samples"


@dataclass(frozen=True)
class Run:
    """What `train` needs besides model, prompts and engine."""

    schedule: Schedule
    prompts: int  # a step
    loss: Loss
    advantage: Advantage
    rewarding: Rewarding
    temperature: float
    max_tokens: int  # of a completion
    comparable: bool  # recorded log-probs are of the distribution that is trained
    row_tokens: int
    passes: int = 1
    minibatches: int = 1
    refill_tries: int = 0
    old_logprobs: str = "auto"
    mismatch_limit: float = 1e-3
    seed: int = 0
    log_samples: bool = True
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    evaluate_every: int = 0
    offload: bool = False
    keep_every: int = 0
    save_in_background: bool = True
    hang: Hang = field(default_factory=Hang)


Sinks = Callable[[int], Sequence[Sink]]
Reference = Callable[[list[RolloutRow]], list[torch.Tensor | None]]


@dataclass
class Position:
    """What the next step continues from besides weights: JSON values, the same on every rank."""

    cursor: int = 0  # the next prompt of the order
    evaluated: int = -1  # the last step that was evaluated
    mismatch: float | None = None  # KL of rollout and training log-probs, as last measured
    updates: int = 0
    samples: int = 0
    trained_samples: int = 0
    tokens: int = 0  # of completions
    first_reward: float | None = None
    last_reward: float | None = None
    signal: int = 0  # trained samples whose advantage was not 0
    unscorable: int = 0  # samples that were not trained, by why
    cut_off: int = 0
    equal: int = 0
    reasons: dict[str, int] = field(default_factory=dict)  # notes of those without a reward
    steps: int = 0
    broken_steps: int = 0  # the last ones, in which every verdict failed

    @classmethod
    def read(cls, saved: dict[str, Any]) -> "Position":
        """Return the position of a checkpoint, which may be from before `signal` was counted."""
        return cls(**{"signal": saved.get("trained_samples", 0), "steps": 1, **saved})

    def after(
        self, drawn: list[Sample], batch: Batch, rewarding: Rewarding, update: "Update", found: dict[str, Any]
    ) -> None:
        """Count what a step did."""
        self.steps += 1
        self.updates += update.updates
        self.samples += len(drawn)
        self.trained_samples += int(batch.trained.sum())
        self.tokens += sum(len(sample.tokens) for sample in drawn)
        self.mismatch = found.get("mismatch", {}).get("kl", self.mismatch)
        self.last_reward = found["reward"] if found["reward"] is not None else self.last_reward
        self.first_reward = self.last_reward if self.first_reward is None else self.first_reward
        self.signal += int((batch.trained & (batch.advantages != 0)).sum())
        for name, count in fruit.untrained(drawn, batch, rewarding).items():
            setattr(self, name, getattr(self, name) + count)
        fruit.add_reasons(self.reasons, drawn)
        self.broken_steps = self.broken_steps + 1 if fruit.all_failed(drawn) else 0

    @property
    def is_broken(self) -> bool:
        """Whether every verdict of the first step failed, or of so many in a row that the verifiers will not mend."""
        return self.broken_steps >= fruit.BROKEN_STEPS or 0 < self.broken_steps == self.steps

    @property
    def untrained(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in fruit.CATEGORIES}


@dataclass(frozen=True)
class Outcome:
    """Facts about a finished training, the same on every rank."""

    step: int
    position: Position
    resumed_from: int
    notes: list[str]


def train(
    trainer: Trainer,
    collector: Collector,
    run: Run,
    keep: Path,
    identity: dict[str, Any],
    stop: Stop,
    progress: Progress = silent,
    reference: Reference | None = None,
    evaluate: Callable[[int], dict[str, Any]] | None = None,
    spell: Callable[[Sample], dict[str, Any]] = lambda sample: {},
    sinks: Sinks = lambda resumed_from: (),
) -> Outcome:
    """Train to the end of the schedule, from the newest valid checkpoint in KEEP/checkpoints if there is one.

    `reference` gives the log-probs of rows for the KL term, on every rank. `evaluate(step)` is called on every rank.
    `spell` gives the texts of a sample for the log. `sinks` makes, on rank 0, what metrics go to besides
    KEEP/metrics.jsonl. Raises as train.train_on_packs does.
    """
    watch = Watch(run.hang, keep / "stacks", dist.get_rank())
    with watch.watching():
        root, plan = keep / "checkpoints", trainer.plan
        if dist.get_rank() == 0:
            root.mkdir(parents=True, exist_ok=True)
            checkpoint.sweep(root)
        dist.barrier()
        folder, notes = checkpoint.newest_valid(root)
        done, position = 0, Position()
        if folder is not None:
            done, saved_position = checkpoint.load_step(folder, trainer.model, trainer.optimizer, plan, identity)
            position = Position.read(saved_position)
        resumed_from = saved = done
        saver = checkpoint.Saver(
            root, trainer.model, trainer.optimizer, plan, run.keep_checkpoints, run.keep_every, run.save_in_background
        )
        metrics = Metrics(keep / "metrics.jsonl", resumed_from, lambda: sinks(resumed_from))
        schedule, steps = run.schedule, run.schedule.steps
        progress(done, steps, "steps", f"resumed from {folder.name}" if folder else "")

        def publish(step: int) -> None:
            nonlocal saved
            saver.save(step, identity, dict(vars(position)))
            saved = step
            watch.move()
            if dist.get_rank() == 0:  # what a retained checkpoint may be gone on with from; one under way comes on top
                journal.forget(keep / ROLLOUTS, min(checkpoint.steps(root), default=0))

        def give_up(step: int, tokens: float = 0) -> None:
            """Asked to stop: the work so far is durable before the ranks leave, `tokens` of the next step's rollouts
            too."""
            if step > saved:
                publish(step)
            saver.close()
            most = (1 + run.refill_tries) * run.prompts * collector.group * run.max_tokens
            raise Stopped(step + tokens / (most + 1), steps)

        def evaluate_if_due(step: int) -> None:
            due = run.evaluate_every > 0 and (step % run.evaluate_every == 0 or step == steps)
            if evaluate is not None and due and position.evaluated < step:
                try:
                    metrics.append({"step": step, "evaluation": evaluate(step)})
                except Stopped:
                    give_up(step)
                position.evaluated = step
                watch.move()

        vote = StopVote(stop)
        vote.send()
        for k in range(done, steps):
            if vote.count():
                give_up(k)
            evaluate_if_due(k)
            clock = report.Clock()
            collector.begin(k)
            try:
                with offloaded(trainer, run.offload):
                    drawn, kept = _draw(collector, run, position)
            except Stopped as stopped:
                give_up(k, stopped.done)
            collector.close()
            batch = batch_of(drawn, kept, run.advantage, run.rewarding, run.max_tokens)
            _check_advantages(batch, k + 1)
            parts = [
                (totals_of(part, run), rollout_rows(part, plan, run.row_tokens, run.temperature, run.comparable))
                for part in minibatches(batch, run, k)
            ]
            rate = schedule.rate(k)
            with clock("train"):
                update = _update(trainer, parts, run, rate, position.mismatch, reference, vote)
            if not math.isfinite(update.norm) or update.measures.get("beyond"):
                saver.wait()
                what = f"the gradient norm is {update.norm:g} at learning rate {rate:g}"
                remedy = _remedy(update.measures, batch)
                raise NonFinite(f"step {k + 1}: {what}; the last checkpoint is step {saved}. {remedy}")
            found = report.measured(drawn, batch, kept, update)
            position.after(drawn, batch, run.rewarding, update, found)
            if run.log_samples and dist.get_rank() == 0:
                report.write_samples(keep / SAMPLES, k + 1, drawn, batch, update.differences, spell)
            clock.seconds.update(collector.seconds)
            metrics.append({"step": k + 1, "lr": rate, **found, **report.speeds(drawn, update, collector, clock)})
            reward = found["reward"]
            none = "" if batch.trained.any() else ", no sample trained"
            said = "no reward" if reward is None else f"reward {reward:.3f}, lr {rate:.2e}"
            progress(k + 1, steps, "steps", said + none)
            if position.is_broken:
                if dist.get_rank() == 0:
                    for step in journal.steps(keep / ROLLOUTS):
                        journal.drop_failures(keep / ROLLOUTS, step, collector.identity)
                saver.wait()
                raise fruit.failed_verdicts(drawn, f"step {k + 1}")
            if k + 1 == steps:
                evaluate_if_due(steps)
            if k + 1 == steps or (run.checkpoint_every > 0 and (k + 1) % run.checkpoint_every == 0):
                publish(k + 1)
            saver.check()
            watch.step()
        vote.count()
        saver.close()
        metrics.close()
        if not position.signal and not (position.trained_samples and (run.loss.kl_beta or run.loss.entropy)):
            raise fruit.nothing_trained(position.untrained, position.reasons, position.samples, steps)
        return Outcome(steps, position, resumed_from, notes)


# ---------------------------------------------------------------- what a step trains


def _draw(collector: Collector, run: Run, position: Position) -> tuple[list[Sample], set[int]]:
    """All samples of a step, and the prompts that are kept; moves the cursor on."""
    drawn: list[Sample] = []
    kept: set[int] = set()
    cursor = position.cursor
    for _ in range(1 + run.refill_tries):
        missing = run.prompts - len(kept)
        if not missing:
            break
        drawn += collector.collect(range(cursor, cursor + missing))
        cursor += missing
        kept = kept_items(drawn, run.advantage, run.rewarding, run.max_tokens)
    position.cursor = cursor  # only now: who stops in between begins the step anew
    return drawn, kept


def minibatches(batch: Batch, run: Run, k: int) -> list[Batch]:
    """The batch in `run.minibatches` parts of about as many samples, drawn from (seed, step)."""
    if run.minibatches == 1:
        return [batch]
    order = permutation("rollout minibatches", run.seed, k, len(batch.samples))
    places = [np.sort(part) for part in np.array_split(order, run.minibatches)]
    return [Batch([batch.samples[i] for i in part], batch.advantages[part], batch.trained[part]) for part in places]


def totals_of(batch: Batch, run: Run) -> Totals:
    tokens = sum(int(sample.own.sum()) for sample, good in zip(batch.samples, batch.trained) if good)
    return Totals(tokens, len(batch.samples), run.max_tokens)


_LARGE_ADVANTAGE = 1e6  # beyond what any scale of rewards gives on purpose
_LARGE_LOG_RATIO = 20.0  # e^20 = 5e8


def _check_advantages(batch: Batch, step: int) -> None:
    """Raise NonFinite for advantages that float32 does not hold."""
    with np.errstate(over="ignore"):
        wrong = ~np.isfinite(batch.advantages.astype(np.float32))
    if wrong.any():
        item = batch.samples[int(np.argmax(wrong))].item
        rewards = [sample.reward for sample in batch.samples if sample.item == item and sample.reward is not None]
        of = f"of prompt {item}'s rewards from {min(rewards):g} to {max(rewards):g}"
        raise NonFinite(f"step {step}: {of} float32 holds no advantages: scale the rewards down")


def _remedy(measures: Mapping[str, float], batch: Batch) -> str:
    """Say what made a step's gradient overflow, as far as its measures tell, and what to do."""
    ratio, below = (measures.get(name, 0.0) for name in ("max_log_ratio", "max_below_reference"))
    largest = float(np.abs(batch.advantages).max(initial=0.0))
    if largest > _LARGE_ADVANTAGE:
        return f"Advantages are up to {largest:g}: scale the rewards down"
    if ratio > _LARGE_LOG_RATIO:
        remedy = "lower lr, give fewer passes or minibatches, or set loss.dual_clip"
        return f"A trained token became e^{ratio:.0f} times as likely within the step: {remedy}"
    if below > _LARGE_LOG_RATIO:
        of = f"e^{below:.0f} times the policy's probability"
        return f"The reference gives a trained token {of}: lower lr, or use loss.kl: k2"
    return "Lower lr or raise warmup_steps"


# ---------------------------------------------------------------- updates


@dataclass
class Update:
    """What a step's updates were: sums over all ranks, the same on each."""

    norm: float = 0.0  # of the last gradient
    loss: float = 0.0
    updates: int = 0
    tokens: int = 0  # trained, a pass
    row_tokens: int = 0  # computed, padding and prompts among them, over all passes
    trusted: bool | None = None  # recorded log-probs served as those of the update's beginning; None: not needed
    measures: dict[str, float] = field(default_factory=dict)
    differences: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)


def _update(
    trainer: Trainer,
    parts: list[tuple[Totals, list[RolloutRow]]],
    run: Run,
    rate: float,
    mismatch: float | None,
    reference: Reference | None,
    vote: StopVote,
) -> Update:
    """Make the step's passes over its minibatches. One without a trained token changes nothing.

    A lone update needs no old log-probs: its ratio is 1. Several need those of the weights before the first of them,
    which a forward pass over the same rows gives. What the engine recorded carries the rounding of whichever samples
    shared its passes, so it enters the loss only where that was asked for (old_logprobs: rollout, loss.correction).
    """
    done = Update()
    parts = [(totals, rows) for totals, rows in parts if totals.tokens]
    count = len(parts) * run.passes
    if count > 1:
        done.trusted = run.old_logprobs == "rollout" and mismatch is not None and mismatch <= run.mismatch_limit
        for i, (totals, rows) in enumerate(parts):
            found = [row.behaviour for row in rows] if done.trusted else log_probs(trainer.model, rows)
            parts[i] = totals, with_old(rows, found)
    if reference is not None:
        parts = [(totals, with_reference(rows, reference(rows))) for totals, rows in parts]
    measures, total = Measures(), Sums()
    for i in range(count):
        totals, rows = parts[i % len(parts)]
        loss = policy_loss_function(run.loss, totals, measures, is_first=i == 0)
        last = i == count - 1
        sums, done.norm = trainer.step(rows, rate, loss, vote.send if last else None)
        total.add(Sums(float(sums.loss) / totals.tokens, sums.supervised, sums.tokens))
        done.updates += 1
        if not math.isfinite(done.norm):
            break
    if not count:
        vote.send()
    total = total.reduced()
    done.loss = total.loss / max(count, 1)
    done.tokens, done.row_tokens = total.supervised // run.passes, total.tokens
    done.measures, done.differences = measures.reduced()
    return done


class offloaded:
    """Optimizer state and gradients leave the device while it generates: the room is for keys and values.

    mcore's own functions (optimizer/optimizer.py:344, distributed/distributed_data_parallel.py:575); gradients are not
    copied, since each update begins with zeros.
    """

    def __init__(self, trainer: Trainer, wanted: bool):
        self.trainer, self.wanted = trainer, wanted

    def __enter__(self) -> None:
        if self.wanted:
            for part in self.trainer.model:
                part.offload_grad_buffers()
            self.trainer.optimizer.offload_to_cpu()

    def __exit__(self, *_: Any) -> None:
        if self.wanted:
            self.trainer.optimizer.restore_from_cpu()
            for part in self.trainer.model:
                part.restore_grad_buffers()
