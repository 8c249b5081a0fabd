"""Gathering what a sealed array left may end at any step: nothing is lost or told twice, and a later start goes on."""

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from jobs import sealing
from jobs.artifacts import consolidate
from jobs.artifacts.artifact import Artifact, LeaseHeld
from jobs.artifacts.run_folder import Outcome, RunFolder
from launchers.causes.traces import lease_time
from tests.jobs.test_inodes import Leaves, numbers

ELEMENTS = 6


class Ended(BaseException):
    """The process ends here."""


class EndsAt:
    """Gathers as before, and ends before so many steps that change the disk were made; `refused` is what a full disk,
    or one that may only be read, does from then on.
    """

    def __init__(self, steps: int, refused: bool):
        self.left, self.refused = steps, refused

    def __call__(self, *given: Any) -> None:
        with mock.patch("os.link", self.step(os.link)), mock.patch("pathlib.Path.unlink", self.step(Path.unlink)):
            consolidate.consolidate(*given)

    def step(self, real: Callable[..., None]) -> Callable[..., None]:
        def made(*args: Any, **kwargs: Any) -> None:
            if self.left <= 0:
                raise OSError(28, "No space left on device") if self.refused else Ended
            self.left -= 1
            real(*args, **kwargs)

        return made


def sealed(folder: Path, monkeypatch: pytest.MonkeyPatch, gather: Callable[..., None]) -> Leaves:
    """A sealed phase of which element 1 has two lives; its gathering is `gather`."""
    leaves = Leaves(folder / "run", *numbers(folder), elements=ELEMENTS)
    leaves.run.record_outcome("p", Outcome(1, 1, 1, "failed", 1, "ValueError: x", "host", "", 1.0, key="k" * 16))
    monkeypatch.setattr(sealing, "consolidate", gather)
    for index in range(ELEMENTS):
        try:
            leaves.element(index)
        except Ended:  # and it leaves no word
            pass
    return leaves


def told(leaves: Leaves) -> list[tuple[int, int, str]]:
    return sorted((outcome.element, outcome.restart, outcome.state) for outcome in leaves.run.outcomes("p"))


@pytest.mark.parametrize("refused", [False, True], ids=["killed", "refused by the disk"])
def test_wherever_the_gathering_ends_nothing_is_lost_and_a_later_start_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    monkeypatch.setattr(consolidate, "FROM_ELEMENTS", ELEMENTS)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    (tmp_path / "whole").mkdir()
    whole = sealed(tmp_path / "whole", monkeypatch, consolidate.consolidate)
    for steps in itertools.count():
        folder = tmp_path / str(steps)
        folder.mkdir()
        ends = EndsAt(steps, refused)
        leaves = sealed(folder, monkeypatch, ends)
        assert [life for life in told(leaves) if life[0] < ELEMENTS - 1] == told(whole)[:-1]
        before = leaves.inodes().total()
        consolidate.take_up(leaves.run, leaves.phase)
        assert [life for life in told(leaves) if life[0] < ELEMENTS - 1] == told(whole)[:-1]
        assert leaves.inodes()["leases"] == whole.inodes()["leases"]
        files = [path for path in leaves.run.outcomes_folder("p").iterdir() if not path.name.startswith(".")]
        assert len(files) <= len(list(whole.run.outcomes_folder("p").iterdir()))
        few, gathered = leaves.run.outcomes_in_brief("p")
        assert sum(len(some.elements) for some in gathered) + len(few) == len(told(leaves))
        if ends.left > 0:
            break
        shutil.rmtree(folder)
    assert steps > 2 * ELEMENTS - 2 and before == leaves.inodes().total()  # those that had ended were left alone


def test_logs_of_shared_tasks_go_where_they_are_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consolidate, "FROM_ELEMENTS", ELEMENTS)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    leaves = sealed(tmp_path, monkeypatch, lambda *given: None)
    own = {path.name for path in leaves.run.logs_folder("p").iterdir()}
    for task, text in enumerate(("", "srun: error: n1\n", "")):
        leaves.run.log_path("p", 1, f"tasks{task}").write_text(text)
    leaves.run.log_path("p", 1, 3).write_text("")
    consolidate.take_up(leaves.run, leaves.phase)
    assert {path.name for path in leaves.run.logs_folder("p").iterdir()} == {*own, "a1.tasks1.out"}


def test_elements_that_start_again_leave_no_second_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consolidate, "FROM_ELEMENTS", ELEMENTS)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    leaves = sealed(tmp_path, monkeypatch, consolidate.consolidate)
    before, lives = leaves.inodes(), told(leaves)
    assert len(list(leaves.run.outcomes_folder("p").glob("*.json"))) == 2  # the failure, and the word of the last one
    for index in range(ELEMENTS):  # as a worker does that finds the phase sealed
        leaves.run.record_outcome("p", Outcome(index, 1, 0, "sealed", 0, "sealed already", "", "", 0.0, key="k" * 16))
    after = leaves.inodes()
    assert after == before and told(leaves) == lives


class GatheredBetween:
    """Has what a sealed phase left gathered as soon as the first thing was looked up, before anything else is."""

    def __init__(self, leaves: Leaves):
        self.leaves, self.done = leaves, False

    def after(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def looked_up(*args: Any, **kwargs: Any) -> Any:
            found = real(*args, **kwargs)
            found = iter(list(found)) if not isinstance(found, list | dict) else found
            if not self.done:
                self.done = True
                consolidate.take_up(self.leaves.run, self.leaves.phase)
            return found

        return looked_up


def brief(leaves: Leaves) -> int:
    few, gathered = leaves.run.outcomes_in_brief("p")
    return len(few) + sum(len(some.elements) for some in gathered)


def a_twin_starts(leaves: Leaves) -> None:
    with pytest.raises(LeaseHeld, match="was sealed a moment ago"):
        leaves.run.artifact(leaves.phase)._refuse_unless_dead("0002", leases_of(leaves)[0], lambda job: False)


def leases_of(leaves: Leaves) -> list[Path]:
    return list(leaves.run.artifact(leaves.phase).leases(2).values())


@pytest.mark.parametrize(
    "look, sees",
    [
        (lambda leaves: len(leaves.run.outcomes("p")), ELEMENTS + 1),
        (brief, ELEMENTS + 1),
        (lambda leaves: leaves.run.environment(leaves.phase, 2, 1, 0), {}),
        (lambda leaves: lease_time(leaves.run.artifact(leaves.phase), 2, 1, 0), None),
        (a_twin_starts, None),
    ],
    ids=["outcomes", "outcomes in brief", "environment", "lease's time", "a twin's start"],
)
def test_who_looks_while_it_is_gathered_sees_all_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[Leaves], Any], sees: Any
) -> None:
    monkeypatch.setattr(consolidate, "FROM_ELEMENTS", ELEMENTS)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    leaves = sealed(tmp_path, monkeypatch, lambda *given: None)
    between = GatheredBetween(leaves)
    for of, name in ((RunFolder, "outcome_files"), (RunFolder, "gathered_outcomes"), (Artifact, "leases")):
        monkeypatch.setattr(of, name, between.after(getattr(of, name)))
    assert look(leaves) == sees
    assert between.done and not leases_of(leaves)
