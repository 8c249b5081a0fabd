"""Answers `afterok scores`: the evaluations of a run side by side, tasks as rows."""

from collections.abc import Sequence

from data_tools.evaluations.side_by_side import SideBySide, side_by_side, table_of
from data_tools.mistake import UserMistake, nearest
from jobs.artifacts.run_folder import RunFolder
from launchers.observe.evaluated import KINDS
from launchers.observe.show import console, table


def scores(run: RunFolder, names: Sequence[str] = ()) -> SideBySide:
    """Return the sealed evaluations of the newest submission, or those of `names`, the first of which the others are
    compared with.

    Raise UserMistake where a name is no evaluation, one of `names` is not sealed, or there is none at all.
    """
    phases = run.frozen(run.newest_submission())
    known = [name for name, phase in phases.items() if phase.uses in KINDS]
    for name in names:
        if name not in known:
            raise UserMistake(f"{name!r} is no evaluation of {run.path}{nearest(name, known)}")
    seals = {name: run.seal(name, phases[name].key) for name in names or known}
    folders = {name: seal.folder for name, seal in seals.items() if seal is not None}
    if missing := [name for name in names if name not in folders]:
        raise UserMistake(f"{', '.join(missing)}: not sealed yet; see `afterok status {run.path}`")
    if not folders:
        what = f"none of {', '.join(known)} is sealed yet" if known else "has no evaluate phase"
        raise UserMistake(f"{run.path}: {what}; see `afterok status {run.path}`")
    return side_by_side(folders)


def print_scores(run: RunFolder) -> None:
    """Print the evaluations of a run side by side, where it has several."""
    try:
        found = scores(run)
    except UserMistake:  # none is sealed, or one cannot be read: `afterok scores` says so
        return
    if len(found.names) > 1:
        print_table(found)


def print_table(found: SideBySide) -> None:
    """Print evaluations side by side, and how they were asked differently."""
    console().print(table(**table_of(found)))
    for note in found.notes:
        print(note)
