"""Finds runs: the one that a user means, and those below a folder with a line about each (`afterok ls`)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.base.printing import as_typed
from data_tools.mistake import UserMistake, nearest
from jobs.artifacts.layout import CHANGING, is_run, runs_below
from jobs.artifacts.run_folder import RunFolder
from launchers.observe.status import run_status
from launchers.planning.ledger import Ledger


def find_run(name: str | None) -> RunFolder:
    """Return the run a user means: a folder, a name below ./runs, or by default the one submitted last.

    UserMistake where there is none.
    """
    if name is not None:
        for path in (Path(name), Path("runs") / name):
            if is_run(path):
                return RunFolder(path.absolute())
        if (run := _with_phase(name)) is not None:
            last = as_typed(run.path)
            remedy = f"name the run: {last}, or look at the phase alone: `afterok why {last} {name}`"
            raise UserMistake(f"{name!r} is no run but a phase of {last}, the run submitted last; {remedy}")
        raise UserMistake(f"{_no_run(name)}{nearest(name, _names()) if _names() else '; there is no run below ./runs'}")
    runs = [RunFolder(path.absolute()) for path in runs_below(Path("runs"))]
    if not runs:
        raise UserMistake("no run below ./runs; name one: afterok status RUN")
    return max(runs, key=_last_submission)


def _last_submission(run: RunFolder) -> float:
    """Return when something was submitted in a run last, in seconds since the epoch: no cancel or repair counts."""
    try:
        times = [event["time"] for event in Ledger(run.ledger).events() if event["event"] in ("submission", "bundle")]
        return max(times)
    except (UserMistake, KeyError, TypeError, ValueError):  # damaged, which the verb tells of it; or of before
        return run.ledger.stat().st_mtime


def _no_run(name: str) -> str:
    return f"{name!r} is no run: neither {name}/ledger.jsonl nor runs/{name}/ledger.jsonl exists"


def _names() -> list[str]:
    """Return the names of the runs below ./runs."""
    return [path.name for path in runs_below(Path("runs"))]


def _with_phase(word: str) -> RunFolder | None:
    """Return the run submitted last where it has a phase of that name."""
    if "/" in word or not _names():
        return None
    run = find_run(None)
    numbers = run.submissions()
    return run if numbers and word in run.frozen(numbers[-1]) else None


def run_and_phases(name: str | None, phases: Sequence[str]) -> tuple[RunFolder, list[str]]:
    """Return what RUN and PHASE… mean, or PHASE… alone: a first word that is no run is a phase of the run submitted
    last.

    UserMistake where it is neither.
    """
    try:
        return find_run(name), list(phases)
    except UserMistake:
        run = _with_phase(name) if name is not None else None
        if name is not None and run is not None:
            return run, [name, *phases]
        if name is None or phases or "/" in name or not _names():
            raise
        run = find_run(None)
        neither = f"and no phase of {as_typed(run.path)}, the run submitted last"
        close = nearest(name, [*_names(), *run.frozen(run.newest_submission())])
        raise UserMistake(f"{_no_run(name)}, {neither}{close}") from None


def run_and_phase(words: list[str]) -> tuple[RunFolder, str | None]:
    """Return what RUN, PHASE, both or neither mean, as `run_and_phases` does."""
    if len(words) > 2:
        raise UserMistake(f"{len(words)} words: {' '.join(words)}; write afterok why [RUN] [PHASE]")
    run, phases = run_and_phases(words[0] if words else None, words[1:])
    if len(phases) > 1:  # the first word was no run
        raise UserMistake(f"{_no_run(words[0])}{nearest(words[0], _names())}")
    return run, phases[0] if phases else None


@dataclass
class RunLine:
    """One run, in one line."""

    name: str
    path: str
    pipeline: str
    submissions: int
    state: str
    sealed: int
    phases: int
    changed: float  # newest change of the ledger, a seal, a lease or an outcome, seconds since the epoch

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def list_runs(folder: Path) -> list[RunLine]:
    """Return the runs directly below `folder`, the one changed last first."""
    runs = [_line(RunFolder(path.absolute())) for path in runs_below(folder)]
    return sorted(runs, key=lambda line: -line.changed)


def _line(run: RunFolder) -> RunLine:
    """Return the line of one run."""
    numbers = run.submissions()
    line = RunLine(
        name=run.name,
        path=str(run.path),
        pipeline="",
        submissions=len(numbers),
        state="nothing submitted",
        sealed=0,
        phases=0,
        changed=last_change(run),
    )
    if numbers:
        phases = run.frozen(numbers[-1])
        sealed = {name for name, phase in phases.items() if run.artifact(phase).seal_path.exists()}
        needed = {name for name in phases if name in sealed or not run.not_needed(phases, name)}
        line.pipeline = run.pipeline_name(numbers[-1])
        line.sealed, line.phases = len(sealed), len(needed)
        line.state = _state(run, line.sealed, line.phases)
    return line


def _state(run: RunFolder, sealed: int, phases: int) -> str:
    """Say how far a run is. The files of a sealed run say it; only the others cost a question to their cluster."""
    done = f"sealed {sealed} of {phases}"
    if sealed == phases:
        return done
    try:
        status = run_status(run)
    except UserMistake as mistake:
        return f"{done}, unknown: {mistake.problems[0].message}"
    if status.unasked and not status.finished:  # its Slurm is not this machine's, or does not answer
        return f"{done}, unknown: {status.unasked}"
    if status.active:
        return f"{done}, active: {', '.join(p.phase for p in status.phases if p.active)}"
    failed = [p.phase for p in status.phases if p.failed]
    return f"{done}, failed: {', '.join(failed)}" if failed else f"{done}, nothing is active"


def last_change(run: RunFolder) -> float:
    """Return when a run changed last, in seconds since the epoch.

    Folders' times tell of every file made in them; logs that grow are not looked at.
    """
    places = [run.ledger, *(place for pattern in CHANGING for place in run.path.glob(pattern))]
    return max(place.stat().st_mtime for place in places if place.exists())
