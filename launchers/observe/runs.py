"""The runs below a folder, one line each: what `afterok ls` shows."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.mistake import UserMistake
from jobs.artifacts.run_folder import RunFolder
from launchers.observe.status import run_status


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
    runs = [_line(RunFolder(path.parent.absolute())) for path in folder.glob("*/ledger.jsonl")]
    return sorted(runs, key=lambda line: -line.changed)


def _line(run: RunFolder) -> RunLine:
    numbers = run.submissions()
    line = RunLine(
        name=run.name,
        path=str(run.path),
        pipeline="",
        submissions=len(numbers),
        state="nothing submitted",
        sealed=0,
        phases=0,
        changed=_changed(run),
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


def _changed(run: RunFolder) -> float:
    """Return when a run changed last, in seconds since the epoch.

    Folders' times tell of every file made in them; logs that grow are not looked at.
    """
    places = [
        run.ledger,
        *run.path.glob("*/attempts"),
        *run.path.glob("*/*/leases"),
        *run.path.glob("*/*/seals"),
        *run.path.glob("*/*/seal.json"),
    ]
    return max(place.stat().st_mtime for place in places if place.exists())
