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

from jobs.artifacts.layout import metrics_of
from jobs.artifacts.run_folder import FrozenPhase, RunFolder
from launchers.causes.traces import keep_folder

MOST_POINTS = 600  # of a curve
MOST_ELEMENTS = 8  # of a phase, whose curves share a chart
MOST_BYTES = 64 << 20  # of one metrics file that are parsed; of a longer one every n-th line
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
    folder = run.artifact(phase).folder
    files = [(i, metrics_of(keep_folder(folder, phase, i))) for i in range(phase.elements)]
    files = [(i, path) for i, path in files if path.is_file()]
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
        for metric, points in columns_of(lines).items():
            charts.setdefault(metric, Chart(metric)).series.append(_series(label, points))
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
                value = json.loads(line)
                if isinstance(value, dict) and isinstance(value.get("step"), (int, float)):
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


def columns_of(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Return {metric: [(step, value)]} of all numbers, with the hours of work up to each step where steps have times.

    `step_s` of a line is the mean of the steps since the line before it.
    """
    columns: dict[str, list[tuple[float, float]]] = {}
    seconds, before = 0.0, 0.0
    for line in sorted(lines, key=lambda line: line["step"]):
        step = float(line["step"])
        for name, value in _numbers(line):
            if name not in _NUMBERS:
                columns.setdefault(name, []).append((step, value))
        each = line.get("step_s")
        if isinstance(each, (int, float)) and math.isfinite(each):
            seconds += each * max(0.0, step - before)
            columns.setdefault(HOURS, []).append((step, seconds / 3600))
            before = step
    return columns


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + name, _as_float(value)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON's integers have no bound
        return math.inf


def _series(label: str, points: Sequence[tuple[float, float]]) -> Series:
    table = np.array(points, dtype=float).reshape(-1, 2)
    values = table[:, 1]
    finite = values[np.isfinite(values)]
    kept = thinned(values)
    return Series(
        label=label,
        steps=table[kept, 0].tolist(),
        values=[_finite(values[place]) for place in kept],
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
    kept = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), MOST_POINTS // 3 - 1):
        own = values[part]
        finite = np.isfinite(own)
        if finite.any():
            kept |= {
                int(part[np.where(finite, own, np.inf).argmin()]),
                int(part[np.where(finite, own, -np.inf).argmax()]),
            }
        if not finite.all():
            kept.add(int(part[(~finite).argmax()]))
    return np.array(sorted(kept))
