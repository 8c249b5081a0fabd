"""The runs below a folder, one line each: what `afterok ls` shows."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.mistake import UserMistake
from jobs.artifacts.run_folder import RunFolder
from launchers.observe.status import run_status


@dataclass
class RunLine:
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
    """Runs directly below `folder`, the one changed last first."""
    runs = [_line(RunFolder(path.parent.absolute())) for path in folder.glob("*/ledger.jsonl")]
    return sorted(runs, key=lambda line: -line.changed)


def _line(run: RunFolder) -> RunLine:
    numbers = run.submissions()
    if not numbers:
        return RunLine(run.name, str(run.path), "", 0, "nothing submitted", 0, 0, _changed(run))
    phases = run.frozen(numbers[-1])
    phases = {
        name: phase
        for name, phase in phases.items()
        if run.artifact(phase).seal_path.exists() or not run.not_needed(phases, name)
    }
    sealed = sum(run.artifact(phase).seal_path.exists() for phase in phases.values())
    return RunLine(
        run.name,
        str(run.path),
        run.pipeline_name(numbers[-1]),
        len(numbers),
        _state(run, sealed, len(phases)),
        sealed,
        len(phases),
        _changed(run),
    )


def _state(run: RunFolder, sealed: int, phases: int) -> str:
    """What a sealed run is, its files say; only the others cost a question to their cluster."""
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
    """Folders' times tell of every file made in them; logs that grow are not looked at."""
    places = [
        run.ledger,
        *run.path.glob("*/attempts"),
        *run.path.glob("*/*/leases"),
        *run.path.glob("*/*/seals"),
        *run.path.glob("*/*/seal.json"),
    ]
    return max(place.stat().st_mtime for place in places if place.exists())
