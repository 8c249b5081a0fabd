"""Draws the curves of a run into one SVG, PNG or PDF file by matplotlib, which comes with the extra `plot`."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from data_tools.base import durable
from data_tools.base.printing import clean
from data_tools.mistake import UserMistake, nearest
from launchers.report.curves import Chart, Curves

FORMATS = ("svg", "png", "pdf")
COLUMNS = 3
SIZE = (4.2, 2.6)  # of one chart, in inches
DOTS = 150  # an inch, in a PNG
FEW = 3  # points of a curve, below which each is marked
MOST = 1e300  # that is drawn: matplotlib adds and subtracts limits, which overflow beyond


def chosen(curves: Sequence[Curves], phases: Sequence[str], metrics: Sequence[str]) -> list[tuple[str, Chart]]:
    """Return the charts of `phases` (none: all) by `metrics` (none: those that are looked at first).

    Raise UserMistake where a phase or a metric is not there.
    """
    known = [each.phase for each in curves if each.charts]
    if not known:
        raise UserMistake("no phase of the run has written metrics yet")
    for phase in phases:
        if phase not in known:
            raise UserMistake(f"{phase!r} is no phase with metrics{nearest(phase, known)}")
    asked = [each for each in curves if each.charts and (each.phase in phases or not phases)]
    names = list(dict.fromkeys(chart.metric for each in asked for chart in each.charts))
    for metric in metrics:
        if metric not in names:
            raise UserMistake(f"--metric {metric!r}: no phase that is drawn has it{nearest(metric, names)}")
    return [
        (each.phase, chart)
        for each in asked
        for chart in (each.charts if metrics else each.first or each.charts)
        if chart.metric in metrics or not metrics
    ]


def draw(charts: Sequence[tuple[str, Chart]], path: Path) -> int:
    """Draw charts by step into a file, whose ending says the format, and return its bytes.

    Raise UserMistake where the format is none of FORMATS, matplotlib is missing, or the file cannot be written.
    """
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise UserMistake(f"--output {path}: the ending says the format; known: {', '.join(FORMATS)}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserMistake("plot: matplotlib is not installed: pip install 'afterok[plot]'") from None
    lines = -(-len(charts) // COLUMNS)
    columns = min(COLUMNS, len(charts))
    figure = Figure(figsize=(SIZE[0] * columns, SIZE[1] * lines), layout="constrained")
    places = figure.subplots(lines, columns, squeeze=False).flat
    for (phase, chart), place in zip(charts, places):  # the charts first: they end first
        drawn = [
            place.plot(each.steps, [_drawn(value) for value in each.values], _style(len(each.steps)), linewidth=1)[0]
            for each in chart.series
        ]
        # What a run holds is no markup: neither TeX between dollars nor control characters.
        title = clean(f"{phase}: {chart.metric}").encode(errors="replace").decode()
        place.set_title(title, fontsize=9, parse_math=False)
        place.set_xlabel("step", fontsize=7)
        place.tick_params(labelsize=7)
        place.grid(alpha=0.3)
        if len(drawn) > 1:
            place.legend(drawn, [each.label for each in chart.series], fontsize=6)
    for place in places:  # those of the last line that have no chart
        place.set_axis_off()
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=DOTS)
    try:
        durable.write_file(path, file.getvalue())
    except OSError as error:
        raise UserMistake(f"--output {path}: {error.strerror}; name a file in a folder that can be written") from None
    return len(file.getvalue())


def _drawn(value: float | None) -> float:
    """Return a value, or the gap that one is that is not finite, or too large for matplotlib."""
    return math.nan if value is None or abs(value) > MOST else value


def _style(points: int) -> str:
    """Return how matplotlib draws a curve: one of few points as these too, since a single one has no line."""
    return "o-" if points < FEW else "-"
