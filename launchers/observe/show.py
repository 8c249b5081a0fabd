"""Prints for people: tables, rich on a terminal and plain text in a log or pipe. Nothing is decided here."""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.base.printing import as_typed, clean, count_of, raw, size_text
from launchers.causes.states import COMPLETED, FAILED, NO_ANSWER, PENDING, RUNNING, UNKNOWN
from launchers.observe.runs import RunLine
from launchers.observe.status import PhaseStatus, RunStatus
from launchers.submission.superfluous import WHAT

if TYPE_CHECKING:  # imported where they are needed, so that a --json answer does not wait for them
    from rich.console import Console, Group
    from rich.table import Table

    from jobs.artifacts.run_folder import RunFolder
    from launchers.observe.foresee import Difference
    from launchers.observe.inspect import Inspection
    from launchers.observe.sampled import ShownSamples
    from launchers.planning.hours import GpuHours
    from launchers.planning.plan import Plan
    from launchers.submission.clean import Cleaned, Item
    from launchers.submission.submit import Submitted

SHORT = 16  # columns of a cell that is not folded
SIZES = ("COLUMNS", "LINES")  # variables of a terminal
PLAIN_WIDTH = 160  # columns of a table that goes to a log or a pipe
COLOURS = {
    COMPLETED: "green",
    RUNNING: "cyan",
    PENDING: "dim",
    FAILED: "bold red",
    UNKNOWN: "bold red",
    "reuse": "green",
    "run": "cyan",
    "rerun": "yellow",
    NO_ANSWER: "yellow",
}


def console() -> "Console":
    """Return what prints tables.

    Text is text, never markup, and holds no control characters but those of our own colours.
    """
    from rich.console import Console
    from rich.segment import Segment

    class CleanConsole(Console):
        def render(self, *args: Any, **kwargs: Any) -> Iterator[Segment]:
            for segment in super().render(*args, **kwargs):
                yield segment if segment.control else Segment(clean(segment.text), segment.style)

    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    # rich takes sizes for numbers that int() does not read ("²").
    said = {name: text for name, text in os.environ.items() if name not in SIZES or text.isdecimal()}
    return CleanConsole(file=raw(sys.stdout), highlight=False, markup=False, emoji=False, width=width, _environ=said)


def table(columns: list[str], rows: list[list[Any]], title: str = "") -> "Table":
    """Return a table whose cells are printed as they are, states and actions in their colours.

    Short cells are never folded. On a terminal that is too narrow for that, each row is told line by line instead.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells)]
    needed = sum(width if width <= SHORT else SHORT for width in widths) + 3 * len(widths)

    class Narrowing(Table):
        def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
            if options.max_width >= needed or not console.is_terminal:
                yield from super().__rich_console__(console, options)
                return
            yield from [Text(title, style="italic")] if title else []
            for first, *others in cells:
                yield Text(first, style="bold")
                told = [f"  {name}: {cell}" if name else f"  {cell}" for name, cell in zip(columns[1:], others) if cell]
                yield from map(Text, told)
            yield Text("")

    out = Narrowing(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column, width in zip(columns, widths):
        out.add_column(column, overflow="fold", no_wrap=width <= SHORT)
    for row in cells:
        out.add_row(*(Text(cell, style=COLOURS.get(cell, "")) for cell in row))
    return out


def plan_table(plan: "Plan", starts: "Mapping[str, str] | None" = None) -> "Table":
    """Return one row a phase: what `plan` would do with it, on what, and why.

    With GPUs there is what it may cost at most; `starts` is when Slurm would start it, where that is known.
    """
    rows, starts = [], starts or {}
    costly = any(phase.resources.gpus_per_node for phase in plan.to_run)
    for phase in plan.phases:
        r = phase.resources
        size = (
            f"{r.nodes} node{'s' if r.nodes > 1 else ''} × {r.ranks_per_node} rank{'s' if r.ranks_per_node > 1 else ''}"
        )
        if r.gpus_per_node:
            size += f", {r.gpus_per_node} GPUs"
        if phase.frozen.links:
            size += f", up to {phase.frozen.links} links"
        to_run = f"{len(phase.missing) if phase in plan.to_run else 0} of {phase.frozen.elements}"
        why = "; ".join(phase.reasons)
        if phase.code_changed:
            why += f"; code changed since: {', '.join(phase.code_changed[:3])}" + (
                " …" if len(phase.code_changed) > 3 else ""
            )
        known = [_at_most(phase.gpu_hours)] if costly else []
        known += [starts.get(phase.name, "").replace("T", " ")] if starts else []
        rows.append([phase.name, to_run, phase.role, size, *known, phase.action, why])
    known = [*(["GPU-h at most"] if costly else []), *(["starts"] if starts else [])]
    return table(
        ["phase", "to run", "role", "resources", *known, "action", "why"],
        rows,
        f"{plan.pipeline.name} in {plan.run.path} on {plan.cluster.name}",
    )


def _at_most(hours: "GpuHours") -> str:
    """Return "120.0 (planned 31.5)"; "no limit" where no time limit bounds them."""
    bound = "no limit" if hours.bound is None else format_hours(hours.bound)
    return f"{bound} (planned {format_hours(hours.planned)})" if hours.planned else bound


def hours_line(plan: "Plan") -> str:
    """Return what all phases may cost, "" where none that runs has GPUs."""
    if not any(phase.resources.gpus_per_node for phase in plan.to_run):
        return ""
    hours = plan.gpu_hours
    planned = "" if hours.planned is None else f", {format_hours(hours.planned)} as planned"
    if hours.bound is None:
        return f"no time limit bounds its GPU-hours{planned}"
    return f"at most {format_hours(hours.bound)} GPU-hours by the time limits{planned}"


def differences_table(found: "Sequence[Difference]", run: "RunFolder") -> "Table":
    """Return one row a difference of a plan from a run that was submitted."""
    rows = [[each.phase, each.what, each.line] for each in found] or [["", "", "nothing differs"]]
    return table(["phase", "what", "differs"], rows, f"against submission {run.newest_submission()} of {run.path}")


def print_submitted(plan: "Plan", done: "Submitted") -> None:
    """Print which jobs a submit made or found, a line each."""
    run = plan.run.path
    for phase, job in done.jobs.items():
        print(f"submitted {phase} as job {job}")
    for phase, job in done.active.items():
        state = "now waits on the new attempt" if phase in done.rewired else "is under way already"
        print(f"{phase} {state} as job {job}")
    if not done.jobs and not done.active:
        all_ = f"all {len(plan.phases)} phases" if len(plan.phases) != 1 else "the one phase"
        or_not_needed = " or not needed" if any(phase.action == "skip" for phase in plan.phases) else ""
        print(
            f"nothing to submit: {all_} of {run} {'is' if len(plan.phases) == 1 else 'are'} sealed{or_not_needed}"
            + (f"; submission {done.number} has their settings" if done.number else "")
        )
    elif done.number:
        print(f"submission {done.number} of {run}; look with `afterok status {as_typed(run)}`")


def progress_text(phase: PhaseStatus) -> str:
    """Return "120/400 steps  loss 2.1"; "" of a phase that tells of no progress."""
    p = phase.progress
    return f"{p['done']:,}/{p['total']:,} {p['unit']}  {p.get('note', '')}".rstrip() if p else ""


def print_inspection(inspection: "Inspection") -> None:
    """Print a balance sheet, a histogram, and documents with what is in the loss in green (plain: between ⟦ and ⟧)."""
    from rich.text import Text

    out, balance = console(), inspection["balance"]
    out.print(table(balance["columns"], balance["rows"], balance["title"]))
    most = max((row[2] for row in inspection["lengths"]), default=1)
    rows = [
        [f"{a:,} to {b:,}", f"{n:,}", f"{tokens:,}", "█" * -(-40 * n // most)]
        for a, b, n, tokens in inspection["lengths"]
    ]
    out.print(table(["tokens", "documents", "tokens of all", ""], rows, "Lengths"))
    out.print(
        f"{inspection['phase']}: {inspection['title']}; in the loss: green"
        if out.is_terminal
        else f"{inspection['phase']}: {inspection['title']}; in the loss: ⟦ ⟧"
    )
    for document in inspection["documents"]:
        out.print(
            f"\n{document['where']}, {document['tokens']:,} tokens, {document['supervised']:,} in the loss",
            style="bold",
        )
        text = Text()
        for span in document["spans"]:
            marked = span["text"] if out.is_terminal or not span["trained"] else f"⟦{span['text']}⟧"
            text.append(marked, style="green" if span["trained"] else "dim")
        out.print(text, soft_wrap=True)
        if (more := document["tokens"] - inspection["limit"]) > 0:
            out.print(f"… {count_of(more, 'more token')} (--tokens {document['tokens']})")


def print_samples(shown: "ShownSamples") -> None:
    """Print groups of samples: each prompt, then its samples with what they were worth."""
    out = console()
    of_steps = f" of step {shown.step} (steps {shown.steps[0]} to {shown.steps[-1]})" if shown.steps else ""
    out.print(f"{shown.phase}: samples{of_steps} from {shown.file}")
    for group in shown.groups:
        out.print(f"\n{group.title}", style="bold")
        out.print(group.prompt, soft_wrap=True)
        rows = [[s.number, s.completion, *map(_short, (s.reward, s.advantage)), s.masked, s.tokens or "", s.finish,
                 s.note] for s in group.samples]  # fmt: skip
        columns = ["", "completion", "reward", "advantage", "masked", "tokens", "ended", "note"]
        told = [n for n in range(len(columns)) if n < 2 or any(row[n] != "" for row in rows)]
        out.print(table([columns[n] for n in told], [[row[n] for n in told] for row in rows]))
        if group.left_out:
            out.print(f"{group.left_out:,} more samples")
    for note in shown.notes:
        out.print(note)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def status_table(status: RunStatus) -> "Table":
    """Return one row a phase; GPU-hours only where a phase asked for GPUs."""
    gpus = any(phase.gpu_hours is not None for phase in status.phases)
    rows = []
    for phase in status.phases:
        detail = phase.message or progress_text(phase) or phase.reason or headline(phase.facts)
        hours = [format_hours(phase.gpu_hours), format_hours(phase.gpu_hours_lost)] if gpus else []
        rows.append(
            [
                phase.phase,
                phase.state,
                f"{phase.sealed}/{phase.elements}",
                phase.job,
                format_seconds(phase.seconds),
                *hours,
                detail,
            ]
        )
    columns = ["phase", "state", "sealed", "job", "took", *(["GPU-h", "lost"] if gpus else []), ""]
    return table(columns, rows, f"{status.run}, submission {status.submission}")


def format_seconds(seconds: float | None) -> str:
    """Return 4.2 s, 3m07s or 01:02:03; "" for None."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}m{rest:02d}s"


def format_hours(value: float | None) -> str:
    """Return 0.0031, 0.032, 0.42, 7.10 or 1,234.5: few digits, and never 0.00 for what is not nothing."""
    if value is None:
        return ""
    if value >= 10:
        return f"{value:,.1f}"
    return f"{value:.2f}" if value >= 0.1 or not value else f"{value:.2g}"


def runs_table(runs: list[RunLine]) -> "Table":
    """Return one row a run."""
    rows = [
        [
            run.name,
            run.pipeline,
            run.submissions,
            run.state,
            time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed)),
        ]
        for run in runs
    ]
    return table(["run", "pipeline", "submissions", "state", "last change"], rows)


def cleaned_table(cleaned: "Cleaned") -> "Table":
    """Return one row a phase and kind of what may go of a run, or went, the largest first."""
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in cleaned.items:
        groups.setdefault((item.phase, item.what), []).append(item)
    rows = [
        [
            phase,
            what,
            size_text(sum(item.size for item in items)),
            f"{len(items):,}",
            as_typed(items[0].path) + (" …" if len(items) > 1 else ""),
            WHAT[what],
        ]
        for (phase, what), items in sorted(groups.items(), key=lambda each: -sum(item.size for item in each[1]))
    ]
    title = f"{as_typed(cleaned.run.path)}: {size_text(cleaned.size)} {'deleted' if cleaned.deleted else 'may go'}"
    return table(["phase", "kind", "size", "folders", "where", "what it is"], rows, title)


def sealed_line(status: RunStatus) -> str:
    """Return where the sealed results lie, by the links that are for people; "" where there are none."""
    linked = [phase for phase in status.phases if phase.latest]
    if not linked:
        return ""
    where = as_typed(Path(status.run))
    names = ", ".join(phase.phase for phase in linked)
    return f"sealed results: {where}/PHASE/latest, where PHASE is {names}"


def headline(facts: dict[str, Any]) -> str:
    """Return the numbers of a phase worth one line: its own `headline`, else its first few scalar facts.

    With them, whose samples they are, where another engine than ours made them.
    """
    if "headline" in facts:
        return str(facts["headline"]) + made_by(facts.get("engine"))
    scalars = [(k, v) for k, v in facts.items() if isinstance(v, (int, float, str)) and not isinstance(v, bool)]
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in scalars[:4])


def made_by(engine: Any) -> str:
    """Return "; by vllm 0.32.0" or "; by MODEL at URL" of the engine in a seal's facts, or of several; "" of ours."""
    told = []
    for one in engine if isinstance(engine, list) else [engine]:
        if isinstance(one, dict) and one.get("is") not in (None, "afterok"):
            whose = f"{one['model']} at {one['url']}" if "url" in one else f"{one['is']} {one.get('version') or ''}"
            told.append(whose.strip())
    return f"; by {', '.join(told)}" if told else ""


def summary(status: RunStatus) -> "Group":
    """Return what ran, how long, what came of it, and the tables that the phases wrote; then where the files are."""
    from rich.console import Group

    rows = [[p.phase, p.state, format_seconds(p.seconds), p.message or headline(p.facts)] for p in status.phases]
    parts = [table(["phase", "state", "took", "result"], rows, f"summary of {status.run}")]
    for phase in status.phases:
        for written in phase.tables.values():
            if not written["rows"]:  # which says nothing, such as the idle shares of fewer packs than a step has
                continue
            cells = [
                [
                    f"{cell:,}" if isinstance(cell, int) else f"{cell:.4g}" if isinstance(cell, float) else cell or ""
                    for cell in row
                ]
                for row in written["rows"]
            ]
            parts.append(table(written["columns"], cells, f"{phase.phase}: {written['title']}"))
    if sealed := [[p.phase, p.latest or p.folder] for p in status.phases if p.state == COMPLETED]:
        parts.append(table(["phase", "files"], sealed, "files"))
    return Group(*parts)
