"""Where a run may lie: a path that Slurm, Python or a pipeline would misread is refused before anything is written."""

from pathlib import Path

import pytest

from jobs.artifacts.run_folder import path_problem
from launchers.cli import main
from tests.command import ROOT, write_toy

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
