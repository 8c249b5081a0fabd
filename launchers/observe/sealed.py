"""Finds the sealed result of a phase: for `afterok path`, `inspect` and the like."""

from collections.abc import Sequence
from pathlib import Path

from data_tools.base.printing import as_typed
from data_tools.mistake import UserMistake, nearest
from jobs.artifacts.layout import is_run
from jobs.artifacts.run_folder import FrozenPhase, RunFolder
from jobs.artifacts.seal import Seal


def no_phase(run: RunFolder, name: str, phases: Sequence[str]) -> UserMistake:
    """Return the mistake of naming a phase that a run has not; where a run has the name, it says that too."""
    return UserMistake(f"{run.path} has no phase {name!r}{nearest(name, phases)}{run_hint(name)}")


def run_hint(name: str) -> str:
    """Return what to add to a message that a name is no phase: whether it is a run's."""
    is_a_run = bool(name) and any(map(is_run, (Path(name), Path("runs") / name)))
    return f"; {name} is a run: name a phase of it, too" if is_a_run else ""


def find_sealed(run: RunFolder, name: str) -> tuple[FrozenPhase, Seal]:
    """Return a phase of the newest submission, and its seal.

    Raise UserMistake where there is no such phase, or it is not sealed.
    """
    phases = run.frozen(run.newest_submission())
    if name not in phases:
        raise no_phase(run, name, list(phases))
    seal = run.seal(name, phases[name].key)
    if seal is None:
        before = run.sealed_before(phases[name])
        said = f"; under other settings or inputs it was, and lies in {as_typed(before)}" if before else ""
        raise UserMistake(f"{name} is not sealed yet{said}; see `afterok status {as_typed(run.path)}`")
    return phases[name], seal


def readable(run: RunFolder, phase: str, seal: Seal) -> Path:
    """Return where a seal's content lies: by the link RUN/PHASE/latest where it leads there."""
    link = run.latest_link(phase)
    return link if link.exists() and link.resolve() == seal.folder.resolve() else seal.folder
