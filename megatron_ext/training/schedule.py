"""How long a training is, and its learning rate as a pure function of the step. Pure Python."""

import math
from dataclasses import dataclass

from data_tools.mistake import Problem

SHAPES = ("constant", "linear", "cosine", "wsd")


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak`, then a shape that would reach `floor` one step after the last.

    constant: stays at `peak`. linear: falls over all that follows the warm-up. cosine: half a cosine over the same. wsd
    (warm-up, stable, decay; MiniCPM, arXiv 2404.06395): stays at `peak`, then falls linearly over the last
    `decay_share` of all steps. `warmup` is in steps, and need not be whole.
    """

    shape: str
    steps: int
    peak: float
    floor: float = 0.0
    warmup: float = 0
    decay_share: float = 0.2

    def rate(self, step: int) -> float:
        """Return the rate of update `step`, counted from 0."""
        if step + 1 <= self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.shape == "constant":
            return self.peak
        left = self.steps - step  # updates from this one on
        if self.shape in ("linear", "cosine"):
            share = min(1.0, left / (self.steps - self.warmup)) if left else 0.0
            share = share if self.shape == "linear" else 0.5 * (1 - math.cos(math.pi * share))
        else:
            share = min(1.0, left / max(1, round(self.steps * self.decay_share)))
        return self.floor + (self.peak - self.floor) * share


@dataclass(frozen=True)
class Amount:
    """How much is trained, or warmed up, in any of three units; 0: not given in that one.

    A sample is a pack; tokens count padding, as every update then has equally many.
    """

    steps: float = 0
    samples: float = 0
    tokens: float = 0

    def in_steps(self, global_batch: int, pack_length: int | None) -> list[float]:
        """Return each amount that is given, in steps; tokens only where the length of a pack is known."""
        given = [self.steps] if self.steps else []
        given += [self.samples / global_batch] if self.samples else []
        return given + ([self.tokens / (global_batch * pack_length)] if self.tokens and pack_length else [])


def updates(amount: Amount, global_batch: int, pack_length: int | None) -> int:
    """Return the whole updates that the smallest of the given amounts allows."""
    return int(min(amount.in_steps(global_batch, pack_length), default=0))


def check(schedule: Schedule, where: str = "") -> list[Problem]:
    """Return the rules that the schedule's values break together. `where` is the dotted place of its fields."""
    problems = []

    def refuse(field: str, message: str) -> None:
        problems.append(Problem(f"{where}.{field}" if where else field, message))

    if schedule.steps < 1:
        refuse("steps", f"{schedule.steps} is too few: the least is 1")
    if schedule.warmup > schedule.steps:
        refuse("warmup_steps", f"{schedule.warmup:g} is not between 0 and steps = {schedule.steps}")
    if schedule.floor > schedule.peak:
        refuse("min_lr", f"{schedule.floor} is not between 0 and lr = {schedule.peak}")
    return problems
