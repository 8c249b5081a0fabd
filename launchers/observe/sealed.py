"""Finds the sealed result of a phase: for `afterok path`, `inspect` and the like."""

from data_tools.mistake import UserMistake, nearest
from jobs.artifacts.run_folder import FrozenPhase, RunFolder
from jobs.artifacts.seal import Seal


def find_sealed(run: RunFolder, name: str) -> tuple[FrozenPhase, Seal]:
    """Return a phase of the newest submission, and its seal.

    Raise UserMistake where there is no such phase, or it is not sealed.
    """
    phases = run.frozen(run.newest_submission())
    if name not in phases:
        raise UserMistake(f"{run.path} has no phase {name!r}{nearest(name, list(phases))}")
    seal = run.seal(name, phases[name].key)
    if seal is None:
        raise UserMistake(f"{name} is not sealed yet; see `afterok status {run.path}`")
    return phases[name], seal
