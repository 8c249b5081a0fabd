"""What is left of an array once its phase is sealed: how its elements ended in one file, and few of their leases.

A phase of thousands of elements otherwise keeps two small files of each for good, and the journals that its samples
could be taken up from: those go as soon as an element is sealed. The leases of sealed elements decide
nothing any more: whoever would work on one finds its seal, and owners before the one that sealed cannot seal.
"""

import contextlib
import os
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path

from data_tools.base import durable
from data_tools.base.indices import Indices
from jobs.artifacts.gathered import Gathered, gathered_line, read_gathered
from jobs.artifacts.layout import indices_of_logs, journals_of, read_lease_name
from jobs.artifacts.run_folder import FrozenPhase, RunFolder
from jobs.artifacts.seal import DamagedSeal, read_seal

# Of a phase. Below, all that is left of its elements is a few hundred files, and each stays where people look for it.
FROM_ELEMENTS = 100


def consolidate(run: RunFolder, phase: FrozenPhase, attempt: int, sealed_by: Mapping[int, tuple[int, int]]) -> None:
    """Gather what the elements of a sealed phase left, so that it is read as before; a kill in between does no harm.

    Args:
        attempt: the submission whose element merged the phase.
        sealed_by: element -> (submission, restart) of the owner that sealed it.
    """
    if phase.elements < FROM_ELEMENTS:
        return
    # The phase is sealed, and what is not gathered is found where it is. `take_up` goes on.
    with contextlib.suppress(OSError):
        idle = _idle_leases(run, phase, sealed_by)
        gathered = run.gathered_outcomes_path(phase.name, phase.key, attempt)
        words = _gathered(run, phase, gathered, idle)
        last = _removed_last(run, phase, gathered)
        _remove([*(path for path in words if path not in last), *idle.values(), *_empty_logs(run, phase), *last])


def take_up(run: RunFolder, phase: FrozenPhase) -> None:
    """Go on where whoever sealed a phase was stopped while it gathered, which leaves thousands of files.

    A start that finds the phase sealed asks, as that of what a crashed node ran.
    """
    with contextlib.suppress(OSError, DamagedSeal):
        artifact = run.artifact(phase)
        whole = read_seal(artifact.seal_path) if phase.elements >= FROM_ELEMENTS else None
        if whole is None:
            return
        gathered = run.gathered_outcomes_path(phase.name, phase.key, whole.submission)
        if gathered.exists() and not any(path.exists() for path in _removed_last(run, phase, gathered)):
            return
        seals = {index: read_seal(artifact.element_seal_path(index)) for index in range(phase.elements)}
        sealed_by = {index: (seal.submission, seal.restart) for index, seal in seals.items() if seal is not None}
        consolidate(run, phase, whole.submission, sealed_by)


def _removed_last(run: RunFolder, phase: FrozenPhase, gathered: Path) -> list[Path]:
    """Return the word that is there until all else is gone that was gathered in a file; none if no life is summed."""
    with open(gathered, "rb") as lines:
        sums, _ = read_gathered(lines.readline())
    return [run.outcome_path(phase.name, (some.elements[0], some.attempt, 0), is_twin=False) for some in sums[:1]]


def _empty_logs(run: RunFolder, phase: FrozenPhase) -> Iterator[Path]:
    """Yield the logs of tasks that elements share in which nothing stands: each element has its own."""
    folder = run.logs_folder(phase.name)
    logs = indices_of_logs(os.listdir(folder) if folder.is_dir() else [])
    for attempt, task in ((attempt, task) for (attempt, shared), tasks in logs.items() if shared for task in tasks):
        path = run.log_path(phase.name, attempt, f"tasks{task}")
        if path.stat().st_size == 0:
            yield path


def forget_journals(phase: FrozenPhase, keep: Path) -> None:
    """Delete what a sealed element of a large array wrote down to go on from after a stop, in what it keeps.

    What a user's own kind keeps under such a name may be something else.
    """
    if phase.elements >= FROM_ELEMENTS and "." not in phase.uses:
        for path in journals_of(keep):
            shutil.rmtree(path, ignore_errors=True)  # a late twin may look in


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _gathered(run: RunFolder, phase: FrozenPhase, gathered: Path, idle: Container[int]) -> list[Path]:
    """Gather the outcomes of sealed elements in one file and return their own; if it is there, those that it has.

    Its first line sums up those of `idle` elements, which had one life each.
    """
    folder, paths = run.outcomes_folder(phase.name), {}
    alone: list[str] = []
    others: list[str] = []
    lives: dict[int, list[tuple[int, float, float]]] = {}  # attempt -> (element, start, seconds)
    for name, told in run.outcome_files(phase.name):
        if told.get("state") == "sealed" and told.get("key") == phase.key:
            line = durable.canonical_json(durable.with_sum(told)) + "\n"
            paths[line] = folder / name
            if told["element"] in idle and told["restart"] == 0:
                alone.append(line)
                seconds = max(0.0, told["ended"] - told["started"])
                lives.setdefault(told["attempt"], []).append((told["element"], told["started"], seconds))
            else:
                others.append(line)
    first_line = gathered_line([_sum_of(number, some) for number, some in lives.items()], len(others))
    text = "".join([first_line, *others, *alone])
    if not durable.create_file(gathered, text):
        there = set(gathered.read_text().splitlines(keepends=True))
        return [own for line, own in paths.items() if line in there]
    return [*paths.values()]


def _sum_of(attempt: int, lives: list[tuple[int, float, float]]) -> Gathered:
    elements, starts, seconds = zip(*lives)
    return Gathered(attempt, Indices.of(elements), min(starts), sum(seconds))


def _idle_leases(run: RunFolder, phase: FrozenPhase, sealed_by: Mapping[int, tuple[int, int]]) -> dict[int, Path]:
    """Return the leases of elements that had one life; of others they tell when a life began that left no word."""
    leases: dict[str, list[tuple[Path, tuple[int, int]]]] = {}
    for folder in run.artifact(phase).lease_folders():
        for name in os.listdir(folder):
            if lease := read_lease_name(name):
                leases.setdefault(lease[0], []).append((folder / name, lease[1][:2]))
    return {
        int(element): first[0]
        for element, (first, *others) in leases.items()
        if element.isdigit() and not others and first[1] == sealed_by.get(int(element))
    }
