"""Where a run may lie: a path that Slurm, Python or a pipeline would misread is refused before anything is written; and
which run, and which sealed result of it, is meant.
"""

import os
from pathlib import Path

import pytest

from data_tools.mistake import UserMistake
from jobs.artifacts.run_folder import path_problem
from launchers.cli import main
from launchers.observe.runs import find_run
from launchers.observe.sealed import find_sealed
from launchers.observe.status import run_status
from launchers.planning.ledger import Ledger
from tests.command import ROOT, write_toy
from tests.launchers.planted_run import PlantedRun

EVERYWHERE = ["a:b", "2026-11-29T14:37", "${x}", "nl\nx", "cr\rx", "tab\tx", "\x01", "\x1b[31m", "\x7f", "\x85",
              "\u2028", "\udc80", "n" * 256, "é" * 128]  # fmt: skip
ON_SLURM = ["%", "50%job", "%%", "back\\slash"]


def test_each_is_refused_and_every_other_character_is_none_of_them():
    for name in EVERYWHERE:
        assert path_problem(Path("/runs", name), False) and path_problem(Path("/runs", name, "below"), True), name
    for name in ON_SLURM:
        assert path_problem(Path("/runs", name), True) and not path_problem(Path("/runs", name), False), name
    good = [chr(code) for code in range(32, 127) if chr(code) not in ":%\\/"]  # tried on a real Slurm, test_shadowed.py
    for name in [*good, "é日本", "n" * 255, "$HOME", "{x}", "trailing "]:
        assert not path_problem(Path("/runs", name), True), name


def test_a_file_in_the_way_is_one_too(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name in ("file", "file/below", "file/below/it"):
        assert path_problem(tmp_path / name, False), name
    assert not path_problem(tmp_path / "folder/none/yet", True)


@pytest.mark.parametrize("verb", ["plan", "submit", "run"])
@pytest.mark.parametrize("name", EVERYWHERE)
def test_every_verb_refuses_it_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, verb, name):
    monkeypatch.chdir(ROOT)
    pipeline = write_toy(tmp_path)
    assert main([verb, str(pipeline), "cluster=local", f"--run={tmp_path / name}"]) == 2
    told = capsys.readouterr().err
    assert "cannot be a run's folder" in told and told.count("\n") == 1 and told[:-1].isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["toy.yaml"]


@pytest.mark.parametrize("later", ["cancel", "release"])
def test_the_run_submitted_last_is_meant_whatever_was_noted_in_another_one_since(tmp_path, monkeypatch, later):
    new, old = (PlantedRun(tmp_path / "runs" / name, {"data": "materialize"}) for name in ("new", "old"))
    new.submit(2, ["data"], minute=5)
    Ledger(old.run.ledger).append(later, jobs=["1.0"])
    assert old.run.ledger.stat().st_mtime_ns >= new.run.ledger.stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    assert find_run(None).name == "new"
    old.submit(2, ["data"], minute=6)
    assert find_run(None).name == "old"


def test_what_is_sealed_under_settings_of_before_is_named_where_the_newest_ones_are_not(tmp_path):
    planted = PlantedRun(tmp_path, {"data": "materialize"})
    planted.seal("data", 5)
    assert not run_status(planted.run).phases[0].sealed_before
    before = planted.run.artifact(planted.phases["data"]).folder
    planted.phases["data"].key = "f" * 16
    planted.submit(2, ["data"], minute=9)
    status = run_status(planted.run)
    assert status.phases[0].failed and status.phases[0].sealed_before == str(before)
    assert any("sealed earlier, under other settings or inputs: data" in note for note in status.notes)
    with pytest.raises(UserMistake, match=f"data is not sealed yet; under other .*{before}"):
        find_sealed(planted.run, "data")


def test_what_is_there_and_no_folder_is_in_the_way_as_a_path_too_long_is(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")
    for name in ("loop", "nowhere", "pipe", "pipe/below", "a/" * 2100):
        assert path_problem(tmp_path / name, False), name


@pytest.mark.parametrize("verb", ["plan", "status", "why", "ls", "path"])
@pytest.mark.parametrize("name", ["n" * 300, "a/" * 3000, "loop", "file/below", "~nobody_here/x"])
def test_a_path_that_leads_nowhere_is_one_line_of_every_verb(tmp_path, monkeypatch, capsys, verb, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert main([verb, name, *(["a"] if verb == "path" else [])]) == 2
    told = capsys.readouterr().err
    assert told.startswith("afterok: ") and told.count("\n") == 1
