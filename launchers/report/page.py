"""Writes the report of a run as one HTML file that needs no network.

What a run holds was written by models and by strangers: all of it passes through the escaping of the template, or as
JSON through `_island`, and the page's policy lets nothing run but the two scripts that are ours, told by their hashes,
and nothing load at all. Charts are drawn by uPlot (assets/uplot), the timeline and the graph are SVG.
"""

import base64
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data_tools.base import durable
from data_tools.base.printing import clean
from data_tools.evaluations.plot import svg_of
from data_tools.evaluations.side_by_side import table_of
from data_tools.mistake import UserMistake
from launchers.causes.states import is_active, is_failed
from launchers.observe.show import format_hours, format_seconds, headline
from launchers.report.contents import Contents
from launchers.report.curves import Chart, Curves
from launchers.report.graph import BOX
from launchers.report.timeline import HEIGHT, KINDS, WIDTH

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("uplot/uPlot.iife.min.js", "page.js")
STYLES = ("uplot/uPlot.min.css", "page.css")


def write_report(contents: Contents, path: Path, refresh_s: int = 0) -> int:
    """Write the report into a file and return its bytes; with `refresh_s` a browser loads it again so often (s).

    Raise UserMistake where the file cannot be written.
    """
    text = page_of(contents, refresh_s).encode("utf-8", "replace")
    try:
        durable.write_file(path, text)
    except OSError as error:
        raise UserMistake(f"{path}: {error.strerror}; name a file in a folder that can be written: --output") from None
    return len(text)


def page_of(contents: Contents, refresh_s: int = 0) -> str:
    """Return the report of a run as HTML."""
    scripts, styles = ([(ASSETS / name).read_text() for name in names] for names in (SCRIPTS, STYLES))
    charts: dict[str, Any] = {}
    page = _environment().get_template("page.html")
    return page.render(
        c=contents,
        scripts=list(map(Markup, scripts)),
        styles=list(map(Markup, styles)),
        policy=_policy(scripts, styles),
        refresh_s=refresh_s,
        curves=[_with_ids(curves, charts) for curves in contents.curves],
        island=_island(charts),  # after the charts have their names
        evaluations=Markup(svg_of(contents.scores)) if contents.scores else "",
        evaluation_table=table_of(contents.scores) if contents.scores else None,
        box=BOX,
        row=(WIDTH, HEIGHT),
        row_kinds=KINDS,
    )


def _policy(scripts: list[str], styles: list[str]) -> str:
    """Return the Content-Security-Policy: these scripts and styles, and nothing else from anywhere."""
    return "; ".join([
        "default-src 'none'", "base-uri 'none'", "form-action 'none'",
        f"script-src {' '.join(map(_hash, scripts))}", f"style-src {' '.join(map(_hash, styles))}",
    ])  # fmt: skip


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _island(value: Any) -> Markup:
    """Return JSON that may stand within a <script> of data: no character of it can end that element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _with_ids(curves: Curves, charts: dict[str, Any]) -> dict[str, Any]:
    """Return the charts of a phase with the names under which `charts` then has what they draw."""

    def named(chart: Chart) -> tuple[str, Chart]:
        name = f"chart{len(charts)}"
        charts[name] = {
            "title": clean(chart.metric),
            "group": clean(curves.phase),
            "series": [
                {"label": clean(each.label), "x": each.steps, "y": each.values} for each in chart.series
            ],
        }  # fmt: skip
        return name, chart

    groups = {"first": curves.first, "others": curves.others, "mismatch": curves.mismatch}
    return {"phase": curves.phase, **{name: list(map(named, group)) for name, group in groups.items()}}


# -- how values are written -------------------------------------------------------------------------------------------


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_cleaned,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number, "seconds": format_seconds, "hours": format_hours, "headline": headline,
        "moment": _moment, "json": _json, "tone": _tone, "share": lambda value: f"{100 * value:.1f}%",
    }  # fmt: skip
    return environment


def _cleaned(value: Any) -> Any:
    """Return what a template writes, without control characters."""
    if isinstance(value, Markup):
        return Markup(clean(value))
    return "" if value is None else clean(value) if isinstance(value, str) else value


def _number(value: Any) -> Any:
    """Return a number as people read it, and anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e6 else f"{value:.4g}"


def _moment(seconds: float | None) -> str:
    """Return a time of this host in UTC, to the second."""
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, default=str)


def _tone(state: str, reason: str = "") -> str:
    """Return the colour of a state by the name of its class."""
    if is_failed(state, reason):
        return "bad"
    if state == "COMPLETED":
        return "good"
    return "going" if is_active(state, reason) and state != "PENDING" else "idle"
