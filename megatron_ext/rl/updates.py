"""The updates of one GRPO step: its samples in minibatches, passes over them, and what to say of an overflow."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from data_tools.base.seeded import permutation
from megatron_ext.layers.router_replay import Routers
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rl.losses import Totals
from megatron_ext.rl.rows import (
    Measures,
    RolloutRow,
    log_probs,
    policy_loss_function,
    shares_of,
    with_old,
    with_reference,
)  # fmt: skip
from megatron_ext.rl.samples import Key, SampleBatch
from megatron_ext.rl.settings import GrpoSettings
from megatron_ext.training.loop import SLOWER
from megatron_ext.training.update import NonFinite, Sums, Trainer

_LARGE_ADVANTAGE = 1e6  # beyond what any scale of rewards gives on purpose
_LARGE_LOG_RATIO = 20.0  # e^20 = 5e8

# From what each data-parallel rank trains, called on every rank: each then has the tokens of its own samples.
Bring = Callable[[Sequence[set[Key]]], None]
# Of a minibatch's rows, on every rank: fp32 [n] of each row's trained tokens; None on a pipeline's stages before the
# last.
Reference = Callable[[list[RolloutRow]], list[torch.Tensor | None]]


class Minibatch(NamedTuple):
    """What one update trains on: counts over all ranks, and this rank's rows."""

    totals: Totals
    rows: list[RolloutRow]


def minibatches(batch: SampleBatch, settings: GrpoSettings, k: int) -> list[SampleBatch]:
    """Return the batch of step `k` in parts of about as many samples, drawn from (seed, step)."""
    if settings.minibatches == 1:
        return [batch]
    order = permutation("rollout minibatches", settings.seed, k, len(batch.samples))
    places = [np.sort(part) for part in np.array_split(order, settings.minibatches)]
    return [
        SampleBatch([batch.samples[i] for i in part], batch.advantages[part], batch.trained[part]) for part in places
    ]


def totals_of(batch: SampleBatch, settings: GrpoSettings) -> Totals:
    """Return what the denominators of the loss count: the whole batch, whatever this rank has of it."""
    tokens = sum(sample.own_tokens for sample, good in zip(batch.samples, batch.trained) if good)
    return Totals(tokens, len(batch.samples), settings.sampling.max_tokens)


def packed_minibatches(
    batch: SampleBatch,
    settings: GrpoSettings,
    k: int,
    plan: ParallelPlan,
    *,
    bring: Bring,
    routers: Routers | None = None,
) -> list[Minibatch]:
    """Return the minibatches of step `k`, with this rank's rows on the device. `bring` gets the samples here.

    With `routers` the rows have the experts that the rollout chose.
    """
    parts = [shares_of(part, plan, settings.row_tokens) for part in minibatches(batch, settings, k)]
    ranks = len(parts[0].rows)
    bring([set().union(*(part.keys(rank) for part in parts)) for rank in range(ranks)])
    sampling = settings.sampling
    return [
        Minibatch(totals_of(part.batch, settings), part.own_rows(sampling.temperature, sampling.is_comparable, routers))
        for part in parts
    ]


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

    @property
    def is_finite(self) -> bool:
        """Whether the gradient was, and no ratio that counts was beyond what a float holds."""
        return math.isfinite(self.norm) and not self.measures.get("beyond")


def update(
    trainer: Trainer,
    parts: list[Minibatch],
    settings: GrpoSettings,
    *,
    rate: float,
    mismatch: float | None,
    reference: Reference | None,
    send_vote: Callable[[], None],
) -> Update:
    """Make the step's passes over its minibatches. One without a trained token changes nothing.

    A lone update needs no old log-probs: its ratio is 1. Several need those of the weights before the first of them,
    which a forward pass over the same rows gives. What the engine recorded carries the rounding of whichever samples
    shared its passes, so it enters the loss only where that was asked for (old_logprobs: rollout, loss.correction).
    `send_vote` is called before the last update, or at the end where there is none.
    """
    done = Update()
    parts = [part for part in parts if part.totals.tokens]
    count = len(parts) * settings.passes
    if count > 1:
        wanted = settings.old_logprobs == "rollout"
        done.trusted = wanted and mismatch is not None and mismatch <= settings.mismatch_limit
        for i, (totals, rows) in enumerate(parts):
            old = [row.behaviour for row in rows] if done.trusted else log_probs(trainer.model, rows)
            parts[i] = Minibatch(totals, with_old(rows, old))
    if reference is not None:
        parts = [Minibatch(totals, with_reference(rows, reference(rows))) for totals, rows in parts]
    measures, total = Measures(), Sums()
    for i in range(count):
        totals, rows = parts[i % len(parts)]
        loss = policy_loss_function(settings.loss, totals, measures, is_first=i == 0)
        sums, done.norm = trainer.step(rows, rate, loss, before_update=send_vote if i == count - 1 else None)
        total.add(Sums(float(sums.loss) / totals.tokens, sums.supervised, sums.tokens))
        done.updates += 1
        if not math.isfinite(done.norm):
            break
    if not count:
        send_vote()
    total = total.reduced()
    done.loss = float(total.loss) / max(count, 1)
    done.tokens, done.row_tokens = total.supervised // settings.passes, total.tokens
    done.measures, done.differences = measures.reduced()
    return done


def check_advantages(batch: SampleBatch, step: int) -> None:
    """Raise NonFinite for advantages that float32 does not hold."""
    with np.errstate(over="ignore"):
        wrong = ~np.isfinite(batch.advantages.astype(np.float32))
    if wrong.any():
        item = batch.samples[int(np.argmax(wrong))].item
        rewards = [sample.reward for sample in batch.samples if sample.item == item and sample.reward is not None]
        which = f"of prompt {item}'s rewards from {min(rewards):g} to {max(rewards):g}"
        raise NonFinite(f"step {step}: {which} float32 holds no advantages: scale the rewards down")


def remedy(measures: Mapping[str, float], batch: SampleBatch) -> str:
    """Say what made a step's gradient overflow, as far as its measures tell, and what to do."""
    ratio, below = (measures.get(name, 0.0) for name in ("max_log_ratio", "max_below_reference"))
    largest = float(np.abs(batch.advantages).max(initial=0.0))
    if largest > _LARGE_ADVANTAGE:
        return f"Advantages are up to {largest:g}: scale the rewards down"
    if ratio > _LARGE_LOG_RATIO:
        advice = "lower lr, give fewer passes or minibatches, or set loss.dual_clip"
        return f"A trained token became e^{ratio:.0f} times as likely within the step: {advice}"
    if below > _LARGE_LOG_RATIO:
        probability = f"e^{below:.0f} times the policy's probability"
        return f"The reference gives a trained token {probability}: lower lr, or use loss.kl: k2"
    return SLOWER
