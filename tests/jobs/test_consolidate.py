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
from jobs.artifacts.run_folder import Outcome
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
