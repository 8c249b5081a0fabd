"""Draws when the elements of each phase waited and worked, as rows of numbers that a page makes paths of.

A row counts how many elements did what at a time. One element gives rectangles of its lives; of thousands, the height
is how many ran at once, in the mean of each of `CELLS` equal stretches of time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from launchers.report.attempts import RUNNING, SEALED, Attempt, end_of

CELLS = 400  # stretches of time that a row is cut into where more would be drawn
WIDTH, HEIGHT = 1000, 24  # of a row, in its own units
TICKS = 6
TOO_LITTLE = 1e-6  # of an element, to be drawn: sums of seconds are no more exact than this
KINDS = ("sealed", "running", "stopped", "lost", "waiting")  # from the ground up


@dataclass(frozen=True)
class Row:
    """One phase: a path for each kind of time, and how many elements the whole height stands for."""

    phase: str
    paths: dict[str, str]
    most: int


@dataclass(frozen=True)
class Timeline:
    """The rows of a run from `start` to `end`, in seconds since the epoch; ticks are (percent, seconds since start)."""

    start: float
    end: float
    rows: list[Row]
    ticks: list[tuple[float, float]]


def timeline_of(attempts: dict[str, list[Attempt]]) -> Timeline | None:
    """Return the drawing of a run; None where nothing was sent or worked."""
    each = [attempt for group in attempts.values() for attempt in group]
    starts = [time for attempt in each for time in (attempt.sent, attempt.first_start) if time is not None]
    ends = [attempt.last_end for attempt in each if attempt.last_end is not None]
    ends += [wait.until for attempt in each for wait in attempt.waits]
    if not starts or not ends:
        return None
    start = min(starts)
    end = max(*ends, start + 1.0)
    rows = [_row(phase, group, start, end) for phase, group in attempts.items()]
    return Timeline(start, end, rows, _ticks(end - start))


def _row(phase: str, attempts: Sequence[Attempt], start: float, end: float) -> Row:
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for attempt in attempts:
        for span in attempt.spans:
            times[_kind(end_of(span))].append((span.started - start, span.ended - start))
        times["waiting"] += [(wait.since - start, wait.until - start) for wait in attempt.waits]
    counts, edges = _counts([times[kind] for kind in KINDS], end - start)
    most = max(1, int(np.ceil(counts.sum(axis=0).max(initial=0.0) - TOO_LITTLE)))
    tops = np.cumsum(counts, axis=0)
    paths = {
        kind: path
        for place, kind in enumerate(KINDS)
        if (path := _path(tops[place] - counts[place], tops[place], edges / (end - start), most))
    }
    return Row(phase, paths, most)


def _kind(end: str) -> str:
    return end if end in (SEALED, RUNNING, "stopped") else "lost"


def _counts(times: Sequence[Sequence[tuple[float, float]]], length: float) -> tuple[np.ndarray, np.ndarray]:
    """Return how many intervals of each kind cover each stretch of time, float [kinds, n], and its edges [n + 1].

    The stretches are those between all ends of intervals, or `CELLS` equal ones where these are fewer.
    """
    ends = np.unique([0.0, length, *(time for kind in times for interval in kind for time in interval)])
    ends = ends[(ends >= 0) & (ends <= length)]
    exact = len(ends) <= CELLS
    edges = ends if exact else np.linspace(0.0, length, CELLS + 1)
    return np.stack([_covered(np.array(kind).reshape(-1, 2), edges, exact) for kind in times]), edges


def _covered(intervals: np.ndarray, edges: np.ndarray, exact: bool) -> np.ndarray:
    """Return by how many intervals [n, 2] each stretch between edges is covered: in the mean over it, or (`exact`, no
    interval ends within one) as a whole number.
    """
    begun, ended = np.sort(intervals[:, 0]), np.sort(np.maximum(intervals[:, 0], intervals[:, 1]))
    if exact:
        left = edges[:-1]
        return (np.searchsorted(begun, left, "right") - np.searchsorted(ended, left, "right")).astype(float)

    def until(points: np.ndarray) -> np.ndarray:  # sum over points of max(0, edge - point)
        before = np.searchsorted(points, edges)
        return before * edges - np.concatenate([[0.0], np.cumsum(points)])[before]

    return np.diff(until(begun) - until(ended)) / np.diff(edges)


def _path(low: np.ndarray, high: np.ndarray, edges: np.ndarray, most: int) -> str:
    """Return the SVG path of the area between two step functions over edges (shares of the width)."""
    parts = []
    for place in np.flatnonzero(high - low > TOO_LITTLE):
        left, right = WIDTH * edges[place], WIDTH * edges[place + 1]
        top, bottom = HEIGHT * (1 - high[place] / most), HEIGHT * (1 - low[place] / most)
        parts.append(f"M{left:.2f} {bottom:.2f}V{top:.2f}H{right:.2f}V{bottom:.2f}Z")
    return "".join(parts)


def _ticks(length: float) -> list[tuple[float, float]]:
    """Return round times within a length, each with its place in percent."""
    steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400]
    days = [86400 * n for n in (2, 5, 10, 20, 50, 100, 200, 500, 1000, 10000)]
    step = next((step for step in (*steps, *days) if length / step <= TICKS), days[-1])
    return [(100 * step * n / length, float(step * n)) for n in range(int(length / step) + 1)]
