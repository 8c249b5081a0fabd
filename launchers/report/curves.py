"""Reads the metrics files of a run, and thins what they say to what a chart can show.

A training writes a JSON object a line, with its `step`; numbers in nested objects are told as outer/inner. Of a curve
with too many points the lowest and the highest of each stretch of steps are kept, so that no spike gets lost.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.base.printing import as_float
from jobs.artifacts.layout import metrics_below
from jobs.artifacts.run_folder import FrozenPhase, RunFolder

MOST_POINTS = 600  # of a curve
MOST_ELEMENTS = 5  # of a phase, whose curves share a chart
MOST_BYTES = 64 << 20  # of one metrics file that are parsed; of a longer one every n-th line
MOST_STEPS = 1e15  # that a double counts exactly
FIRST = (  # of the charts of a phase, those that are looked at first, in this order
    "loss", "valid_loss", "reward", "reward_std", "lr", "grad_norm", "entropy", "length", "truncated", "unscorable",
    "tokens_per_s", "step_s", "hours",
)  # fmt: skip
MISMATCH = "mismatch/"  # begins what compares log-probs of the rollout with those of the training
HOURS = "hours"  # of work that was kept, up to a step: the sum of step_s
_NUMBERS = {"step", "samples"}  # count up with the step and are no curve of their own


@dataclass(frozen=True)
class Series:
    """One curve: a metric of one element of a phase. `values` has None where a value is not finite."""

    label: str
    steps: list[float]
    values: list[float | None]
    first: float | None
    last: float | None
    least: float | None
    most: float | None
    points: int  # before it was thinned


@dataclass
class Chart:
    """All curves of one metric of a phase."""

    metric: str
    series: list[Series] = field(default_factory=list)


@dataclass
class Curves:
    """The charts of one phase, those of FIRST first, and what is to be known about them."""

    phase: str
    charts: list[Chart]
    notes: list[str]

    @property
    def first(self) -> list[Chart]:
        """Return the charts that are looked at first; all where none is among these."""
        chosen = [chart for chart in self.charts if _rank(chart.metric) < len(FIRST)]
        return chosen or [chart for chart in self.charts if not chart.metric.startswith(MISMATCH)]

    @property
    def mismatch(self) -> list[Chart]:
        """Return the charts that compare the rollout's log-probs with the training's."""
        return [chart for chart in self.charts if chart.metric.startswith(MISMATCH)]

    @property
    def others(self) -> list[Chart]:
        """Return the charts that are neither."""
        taken = {chart.metric for chart in (*self.first, *self.mismatch)}
        return [chart for chart in self.charts if chart.metric not in taken]


def curves_of(run: RunFolder, phase: FrozenPhase) -> Curves | None:
    """Return the charts of a phase; None where it wrote no metrics."""
    files = list(metrics_below(run.artifact(phase), phase.elements).items())
    if not files:
        return None
    notes = []
    if len(files) > MOST_ELEMENTS:
        notes.append(f"{phase.name}: the curves of {MOST_ELEMENTS} of {len(files):,} elements are drawn")
        files = [files[place * len(files) // MOST_ELEMENTS] for place in range(MOST_ELEMENTS)]
    charts: dict[str, Chart] = {}
    for index, path in files:
        label = f"element {index}" if phase.elements > 1 else phase.name
        lines, told = read_metrics(path)
        notes += [f"{phase.name}: {path.relative_to(run.path)}: {each}" for each in told]
        for metric, column in columns_of(lines).items():
            charts.setdefault(metric, Chart(metric)).series.append(_series(label, column))
    ordered = sorted(charts.values(), key=lambda chart: (_rank(chart.metric), chart.metric))
    return Curves(phase.name, ordered, notes)


def _rank(metric: str) -> int:
    return FIRST.index(metric) if metric in FIRST else len(FIRST)


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the lines of a metrics file that have a step, and what was left out of it."""
    every, notes, lines, bad = -(-path.stat().st_size // MOST_BYTES), [], [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if number % max(every, 1) and line.endswith(b"\n"):
                continue
            try:
                value = json.loads(line.decode())
                if isinstance(value, dict) and _is_step(value.get("step")):
                    lines.append(value)
                    continue
            except (ValueError, RecursionError):
                pass
            bad += line.endswith(b"\n")  # a last line without its end is being written
    if every > 1:
        notes.append(f"one line of {every} was read: the file has {path.stat().st_size:,} bytes")
    if bad:
        notes.append(f"{bad:,} lines have no step or are no JSON, and were left out")
    return lines, notes


def _is_step(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < MOST_STEPS  # neither infinite nor no number


@dataclass
class Column:
    """The values of one metric, and the steps they are of."""

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: float, value: float) -> None:
        """Add the value of a further step."""
        self.steps.append(step)
        self.values.append(value)


def columns_of(lines: Iterable[Mapping[str, Any]]) -> dict[str, Column]:
    """Return all numbers by their metric, with the hours of work up to each step where steps have times.

    `step_s` of a line is the mean of the steps since the line before it.
    """
    ordered = sorted(lines, key=lambda line: line["step"])
    steps = [float(line["step"]) for line in ordered]
    found: dict[str, _Found] = {}
    _gather(found, ordered, range(len(ordered)), "")
    columns = {name: each.column(steps) for name, each in found.items() if name not in _NUMBERS}
    hours, seconds, before = Column(), 0.0, 0.0
    for step, line in zip(steps, ordered, strict=True):
        each = line.get("step_s")
        if isinstance(each, (int, float)) and math.isfinite(each := as_float(each)):
            seconds += each * max(0.0, step - before)
            hours.add(step, seconds / 3600)
            before = step
    return columns | ({HOURS: hours} if hours.steps else {})


@dataclass
class _Found:
    """The numbers of one metric, in pieces: the places of lines, and the number of each."""

    pieces: list[tuple[Sequence[int], Sequence[float]]] = field(default_factory=list)

    def column(self, steps: Sequence[float]) -> Column:
        """Return them by step, in the order of the lines."""
        at, values = self.pieces[0]
        if len(self.pieces) > 1:  # of lines with other names, which may stand between one another
            pairs = sorted((place, value) for piece in self.pieces for place, value in zip(*piece, strict=True))
            at, values = [place for place, _ in pairs], [value for _, value in pairs]
        return Column(list(map(steps.__getitem__, at)), list(values))


def _gather(found: dict[str, _Found], lines: Sequence[Mapping[str, Any]], at: Sequence[int], prefix: str) -> None:
    """Gather the numbers of lines, whose places are `at`; those of nested objects as outer/inner.

    Lines with the same names are taken together, a name at a time: a long training has millions of numbers. JSON has
    no other types of numbers than these two.
    """
    alike: dict[tuple[str, ...], list[int]] = {}
    for place, line in enumerate(lines):
        alike.setdefault(tuple(line), []).append(place)
    for names, group in alike.items():
        where = [at[place] for place in group]
        for name, values in zip(names, zip(*(lines[place].values() for place in group)), strict=True):
            kinds = set(map(type, values))
            if kinds == {float}:
                found.setdefault(prefix + name, _Found()).pieces.append((where, values))
            elif kinds & {float, int}:
                numbers = [(place, as_float(v)) for place, v in zip(where, values) if type(v) in (float, int)]
                each = found.setdefault(prefix + name, _Found())
                each.pieces.append(([place for place, _ in numbers], [value for _, value in numbers]))
            if dict in kinds:
                below = [(place, value) for place, value in zip(where, values) if type(value) is dict]
                _gather(found, [value for _, value in below], [place for place, _ in below], f"{prefix}{name}/")


def _series(label: str, column: Column) -> Series:
    steps, values = np.array(column.steps), np.array(column.values)
    finite = values[np.isfinite(values)]
    kept = thinned(values)
    return Series(
        label=label,
        steps=steps[kept].tolist(),
        values=[_finite(value) for value in values[kept].tolist()],
        first=_finite(values[0]),
        last=_finite(values[-1]),
        least=float(finite.min()) if len(finite) else None,
        most=float(finite.max()) if len(finite) else None,
        points=len(values),
    )


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def thinned(values: np.ndarray) -> np.ndarray:
    """Return the places of at most MOST_POINTS values [n]: the first, the last, and of each stretch its lowest, its
    highest, and the first that is not finite.
    """
    if len(values) <= MOST_POINTS:
        return np.arange(len(values))
    width = -(-len(values) // (MOST_POINTS // 3 - 1))  # of a stretch
    rows = np.pad(values, (0, -len(values) % width), constant_values=values[-1]).reshape(-1, width)  # [stretch, width]
    finite = np.isfinite(rows)
    starts = np.arange(len(rows)) * width
    kept = [np.array([0, len(values) - 1])]
    for chosen, known in (
        (np.where(finite, rows, np.inf).argmin(axis=1), finite.any(axis=1)),
        (np.where(finite, rows, -np.inf).argmax(axis=1), finite.any(axis=1)),
        ((~finite).argmax(axis=1), ~finite.all(axis=1)),
    ):
        kept.append((starts + chosen)[known])
    return np.unique(np.minimum(np.concatenate(kept), len(values) - 1))
