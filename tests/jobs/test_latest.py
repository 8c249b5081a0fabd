"""RUN/PHASE/latest leads to what is sealed of the phase as the newest submission has it, or is not there."""

import dataclasses
import os

import pytest

from data_tools.base import durable
from tests.launchers.planted_run import KEY, PlantedRun, balance_file


def submitted(planted: PlantedRun, key: str) -> None:
    """Have a further submission freeze the phase under a key."""
    number = planted.run.newest_submission() + 1
    planted.phases["data"] = dataclasses.replace(planted.phases["data"], key=key)
    planted.run.submission_folder(number).mkdir(parents=True)
    planted.run.freeze(number, "planted", list(planted.phases.values()))


def test_the_link_follows_seals_and_submissions(tmp_path):
    planted = PlantedRun(tmp_path / "run", {"data": "materialize"})
    link = planted.run.latest_link("data")
    planted.run.link_latest("data")
    assert not link.is_symlink()
    planted.seal("data", 5, balance_file())
    planted.run.link_latest("data")
    sealed = planted.run.seal("data", KEY).folder
    assert link.resolve() == sealed and (link / "balance.json").is_file()
    submitted(planted, "f" * 16)
    assert not link.is_symlink()  # nothing is sealed under these settings yet
    planted.run.link_latest("data")  # as a late worker of the first submission does
    assert not link.is_symlink()
    submitted(planted, KEY)  # the first settings again: what was sealed is reused
    assert link.resolve() == sealed
    (tmp_path / "run").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "data" / "latest" / "balance.json").is_file()  # a moved run keeps its links
    assert sorted(os.listdir(tmp_path / "moved" / "data")) == [KEY, "latest"]


@pytest.mark.parametrize("broken", ["plan.json", "a folder in the link's place", "no submission"])
def test_what_is_sealed_stays_sealed_where_no_link_can_be_made(tmp_path, broken):
    planted = PlantedRun(tmp_path, {"data": "materialize"})
    planted.seal("data", 5, balance_file())
    if broken == "plan.json":
        planted.run.plan_path(1).write_text("{")
    elif broken == "no submission":
        planted.run.plan_path(1).unlink()
    else:
        planted.run.latest_link("data").mkdir()
    planted.run.link_latest("data")
    assert planted.run.seal("data", KEY) is not None and not planted.run.latest_link("data").is_symlink()


def test_a_plan_of_many_phases_is_read_once_to_set_their_links(tmp_path, monkeypatch):
    planted = PlantedRun(tmp_path, {f"phase{n}": "materialize" for n in range(20)})
    read = []
    monkeypatch.setattr(
        durable, "read_checked", lambda path, before=durable.read_checked: read.append(path) or before(path)
    )
    planted.run.freeze(1, "planted", list(planted.phases.values()))
    assert read == [planted.run.plan_path(1)]
