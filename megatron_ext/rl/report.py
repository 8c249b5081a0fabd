"""What a step of GRPO was, in numbers and as a log of its samples."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_ext.rl.collect import Collector
from megatron_ext.rl.samples import Sample, SampleBatch
from megatron_ext.rl.updates import Update

OUTSIDE = ("rollout", "reward", "train")  # what a step is for; the rest is its overhead


class StepTimes:
    """Seconds of a step by what they went into."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.began = time.perf_counter()

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count the seconds inside as those of `name`."""
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def measured(drawn: Sequence[Sample], batch: SampleBatch, kept: set[int], update: Update) -> dict[str, Any]:
    """Return what the metrics say of a step, the same on every rank.

    Shares are of samples, or of trained tokens where they speak of the loss.
    """
    rewards = [s.reward for s in drawn if s.reward is not None]
    lengths = [s.length for s in drawn]
    line: dict[str, Any] = {
        "reward": float(np.mean(rewards)) if rewards else None,
        "reward_std": float(np.std(rewards)) if rewards else None,
        "reward_parts": _means(s.parts for s in drawn),
        "samples": len(drawn),
        "trained_samples": int(batch.trained.sum()),
        "unscorable": sum(s.reward is None for s in drawn),
        "truncated": float(np.mean([s.is_truncated for s in drawn])),
        "length": float(np.mean(lengths)),
        "longest": max(lengths),
        "prompts": len({s.item for s in drawn}),
        "prompts_kept": len(kept),
        "loss": update.loss,
        "grad_norm": update.norm,
        "updates": update.updates,
        "trained_tokens": update.tokens,
    }
    line |= _turns(drawn)
    if update.trusted is not None:
        line["old_logprobs"] = "rollout" if update.trusted else "recomputed"
    sums = update.measures
    if count := sums.get("counted"):
        means = ("ratio", "clipped_low", "clipped_high", "masked", "entropy", "kl")
        line |= {name: sums[name] / count for name in means if name in sums}
    if count := sums.get("compared"):
        line["mismatch"] = _mismatch(sums, count)
    return line


def _mismatch(sums: Mapping[str, float], count: float) -> dict[str, float]:
    """Return how far the rollout's log-probs are from the training's, from sums over `count` tokens."""
    return {
        "probability": sums["probability_difference"] / count,
        "max_probability": sums["max_probability_difference"],
        "max_log": sums["max_log_difference"],
        "kl": sums["behaviour_kl"] / count,
        "ess": sums["weight"] ** 2 / (count * sums["weight_squared"]),
    }


def _turns(drawn: Sequence[Sample]) -> dict[str, float]:
    """Return the means of a sample's turns and of the tokens of replies, where tasks reply at all."""
    replies = [sample.length - sample.own_tokens for sample in drawn]
    if not any(replies):
        return {}
    return {"turns": float(np.mean([sample.turns for sample in drawn])), "reply_tokens": float(np.mean(replies))}


def _means(parts: Any) -> dict[str, float]:
    """Return the mean of each numeric part of the rewards, over the samples that have it."""
    by_name: dict[str, list[float]] = {}
    for part in parts:
        for name, value in part.items():
            if isinstance(value, (int, float)):
                by_name.setdefault(name, []).append(float(value))
    return {name: float(np.mean(values)) for name, values in sorted(by_name.items())}


def speeds(drawn: Sequence[Sample], update: Update, collector: Collector, times: StepTimes) -> dict[str, Any]:
    """Return times of this rank and counts of all replicas. Every rank takes part."""
    parts: list[Any] = [None] * dist.get_world_size()
    own = {**collector.counts, "kv_use": collector.kv_use} if collector.replica.speaks else {}
    dist.all_gather_object(parts, (own, collector.seconds["rollout"]))
    counts = [part for part, _ in parts if part]
    step_s = time.perf_counter() - times.began
    rollout_s = max(seconds for _, seconds in parts)
    steps = sum(part.get("steps", 0) for part in counts)
    seconds = {name: round(value, 6) for name, value in sorted(times.seconds.items())}
    seconds["other"] = step_s - sum(times.seconds.values())
    new = sum(part.get("decoded", 0) for part in counts)
    running = sum(part.get("running", 0) for part in counts)
    return {
        "step_s": step_s,
        "seconds": seconds,
        "share_outside": 1 - sum(times.seconds.get(name, 0.0) for name in OUTSIDE) / step_s,
        "rollout_tokens_per_s": sum(s.length for s in drawn) / rollout_s if new and rollout_s else None,
        "train_tokens_per_s": update.row_tokens / times.seconds["train"],
        "occupancy": running / (steps * collector.engine.config.max_batch) if steps else None,
        "kv_use": max((part.get("kv_use", 0.0) for part in counts), default=0.0),
        "evictions": sum(part.get("preemptions", 0) for part in counts),
        "prefilled_tokens": sum(part.get("prefilled", 0) for part in counts),
        "samples_from_journal": sum(part.get("reused", 0) for part in counts),
    }
