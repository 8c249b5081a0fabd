"""`afterok clean` deletes what no seal, no resume and no other run needs, and nothing else, whenever it is killed."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from data_tools.base import durable
from jobs.artifacts.layout import CLEANED, RunLayout
from jobs.artifacts.owner import Owner
from launchers.cli import main
from launchers.observe.look import look_at
from launchers.observe.status import status_of
from launchers.submission import clean
from launchers.submission.superfluous import WHAT
from tests.launchers.planted_run import KEY, PlantedRun, balance_file

OLD, SEALED_BEFORE = "a" * 16, "b" * 16  # keys of submissions of before


def fill(folder: Path, size: int = 1000) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bytes").write_bytes(b"0" * size)
    return folder


def lease(planted: PlantedRun, folder: Path, attempt: int, name: str = "0000", **owner) -> None:
    """Plant the lease of an owner, by default of a process of this host that is dead, with its work folder."""
    dead = Owner(attempt, 0, job="", host=Owner.me(0, 0).host, pid=2**22 + 1, started=1)
    path = folder / "leases" / f"{name}.a{attempt}.r0.g0"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dataclasses.replace(dead, **owner).record())


def checkpoint(keep: Path, step: int) -> Path:
    folder = fill(keep / "checkpoints" / f"step_{step}")
    (folder / "manifest.json").write_text("{}")
    return folder


class Run(PlantedRun):
    """A run of data, a training and GRPO, three times submitted, with one thing of each kind that may go."""

    def __init__(self, path: Path):
        super().__init__(path, {"data": "materialize", "sft": "sft", "grpo": "grpo"}, submissions=0)
        phases = dict(self.phases)
        for number, key in ((1, OLD), (2, SEALED_BEFORE), (3, KEY)):
            self.phases["sft"] = dataclasses.replace(phases["sft"], key=key)
            self.submit(number, list(phases))
        self.may_go: dict[str, list[Path]] = {what: [] for what in WHAT}
        self.stays: list[Path] = []
        data, sft, grpo = (self.run.artifact(self.phases[name]).folder for name in self.phases)
        self.seal("data", 5, balance_file())
        self.life("sft", 7, 17)
        self.seal("sft", 20, {"weights": "w"})
        for folder, attempt in ((data, 1), (sft, 1), (data, 2), (grpo, 1), (sft.with_name(OLD), 1)):
            lease(self, folder, attempt)
        lease(self, data, 2, "1k/1003")
        self.may_go["attempts"] += [fill(data / "work/1k/1003.a2.r0.g0")]
        self.may_go["attempts"] += [fill(data / "work/0000.a2.r0.g0"), fill(data / "sealing/0000.a1.r0.g0.12345678"),
                                    fill(grpo / "work/0000.a1.r0.g0")]  # fmt: skip
        checkpoint(sft.with_name(OLD), 100)
        self.may_go["settings"] += [sft.with_name(OLD)]
        before = shutil.copytree(sft, sft.with_name(SEALED_BEFORE))  # other settings, which may be wanted again
        self.stays += [before / "work/0000.a1.r0.g0"]
        self.may_go["milestones"] += [checkpoint(sft, 100), checkpoint(sft, 200)]
        self.stays += [checkpoint(sft, 300), checkpoint(sft, 1000)]  # the newest two
        self.may_go["journals"] += [fill(sft / "rollouts/step_3").parent]
        self.stays += [checkpoint(grpo, 1), fill(grpo / "rollouts/step_1"), fill(sft / "samples")]
        self.may_go["retired"] += [fill(sft.parent / "retired" / f"{KEY}.1")]
        self.stays += [fill(grpo.parent / "retired" / f"{KEY}.1")]  # not sealed again
        for number in (1, 2, 3, 4, 5):  # the first two as runs of before have them
            if number < 3:
                fill(self.run.code_folder(number))
                continue
            copy = fill(self.run.shared_code_folder / ("same", "same", "other")[number - 3])
            self.run.code_folder(number).parent.mkdir(exist_ok=True)
            self.run.code_folder(number).symlink_to(os.path.relpath(copy, self.run.code_folder(number).parent))
        self.stays += [self.run.code_folder(1), self.run.code_folder(3)]  # a seal names it; the newest
        self.stays += [self.run.shared_code_folder / "same"]
        self.may_go["code"] += [self.run.code_folder(2), self.run.code_folder(4), self.run.code_folder(5)]
        self.may_go["code"] += [self.run.shared_code_folder / "other"]
        self.may_go["leftovers"] += [fill(sft / f"{CLEANED}rollouts.12345678")]

    @property
    def states(self) -> list[str]:
        return [f"{phase.phase} {phase.state} {phase.sealed}" for phase in status_of(look_at(self.run)).phases]

    def check_seals(self) -> None:
        for seal in [*self.run.path.glob("*/*/seal.json")]:
            found = self.run.seal(seal.parent.parent.name, seal.parent.name)
            assert found is not None
            found.verify(rehash=True)


@pytest.fixture
def planted(tmp_path, monkeypatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return Run(tmp_path / "runs" / "one")


def said(capsys, *words: object, code: int = 0) -> dict:
    assert main(["clean", *map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_what_may_go_is_shown_first_and_goes_with_yes_and_nothing_else(planted, capsys):
    files = sorted(planted.run.path.rglob("*"))
    states = planted.states
    (shown,) = said(capsys, planted.run.path)["runs"]
    assert sorted(planted.run.path.rglob("*")) == files and not shown["deleted"]
    may_go = {what: sorted(map(str, paths)) for what, paths in planted.may_go.items()}
    assert {what: sorted(i["path"] for i in shown["items"] if i["what"] == what) for what in WHAT} == may_go
    assert shown["bytes"] == sum(item["bytes"] for item in shown["items"]) > 9000
    assert main(["clean", str(planted.run.path), "--only", "journals"]) == 0
    told = capsys.readouterr().out
    assert "1000 bytes" in told.replace(",", "") and "--only journals --yes` deletes it" in told
    (done,) = said(capsys, planted.run.path, "--yes")["runs"]
    gone = {Path(path) for paths in may_go.values() for path in paths}
    left = {path for path in files if not any(path.is_relative_to(each) for each in gone)}
    assert done["deleted"] and set(planted.run.path.rglob("*")) == {*left, planted.run.cleaned}
    assert all(path.exists() for path in planted.stays)
    planted.check_seals()
    assert planted.states == states
    assert said(capsys, planted.run.path)["runs"][0]["items"] == []


@pytest.mark.parametrize("kill_at", range(1, 11))
def test_killed_at_any_moment_it_leaves_every_seal_valid_and_nothing_half_under_its_name(
    planted, capsys, monkeypatch, kill_at
):
    calls = iter(range(1, 1000))

    def half(path, *words, **named):
        if next(calls) == kill_at:
            next(Path(path).rglob("bytes")).unlink()  # the power goes in the middle
            raise KeyboardInterrupt
        return rmtree(path, *words, **named)

    rmtree = shutil.rmtree
    monkeypatch.setattr(clean.shutil, "rmtree", half)
    whole = {path: len(list(path.rglob("*"))) for paths in planted.may_go.values() for path in paths}
    with pytest.raises(KeyboardInterrupt):
        main(["clean", str(planted.run.path), "--yes"])
    planted.check_seals()
    for path, files in whole.items():
        assert path.name.startswith(CLEANED) or not path.exists() or len(list(path.rglob("*"))) == files
    monkeypatch.setattr(clean.shutil, "rmtree", rmtree)
    said(capsys, planted.run.path, "--yes")
    assert not list(planted.run.path.rglob(f"{CLEANED}*")) and not any(p.exists() for p in whole)


def test_a_run_that_is_going_keeps_all(planted, tmp_path, capsys):
    planted.going("grpo", attempt=3)
    files = sorted(planted.run.path.rglob("*"))
    assert main(["clean", str(planted.run.path), "--yes"]) == 2
    assert "grpo (job 3.2) is under way; nothing was deleted" in capsys.readouterr().err
    idle = Run(tmp_path / "runs" / "two")
    found = {Path(each["run"]).name: each for each in said(capsys, tmp_path / "runs", "--yes")["runs"]}
    assert found["one"]["going"] and not found["one"]["deleted"] and found["two"]["deleted"]
    assert sorted(planted.run.path.rglob("*")) == files
    assert not any(path.exists() for paths in idle.may_go.values() for path in paths)


@pytest.mark.parametrize("way", ["an unfinished submission", "a worker by hand", "a damaged seal", "a torn lease"])
def test_in_doubt_a_thing_stays(planted, capsys, way):
    artifact = planted.run.artifact(planted.phases["data"]).folder
    if way == "an unfinished submission":
        planted._tell(0, event="submission", submission=4, backend="local", choice="local", cluster="local")
        assert main(["clean", str(planted.run.path), "--yes"]) == 2
        assert "submission 4 is not finished" in capsys.readouterr().err
    elif way == "a damaged seal":
        (artifact / "seal.json").write_text("{")
        (found,) = said(capsys, planted.run.path, "--yes")["runs"]
        assert found["kept"][str(artifact)].startswith("a seal in it is damaged")
        assert (artifact / "work/0000.a2.r0.g0").exists() and planted.run.code_folder(2).exists()
    else:
        place = artifact / "leases/0000.a2.r0.g0"
        place.write_text(Owner.me(2, 0).record() if way == "a worker by hand" else "{")
        (found,) = said(capsys, planted.run.path, "--yes")["runs"]
        assert str(artifact / "work/0000.a2.r0.g0") in found["kept"]
        assert (artifact / "work/0000.a2.r0.g0").exists()


@pytest.mark.parametrize(
    "way, what",
    [("setting", "milestones"), ("its training", "milestones"), ("relative setting", "attempts"),
     ("input", "settings"), ("link", "retired"), ("link", "journals")],
)  # fmt: skip
def test_what_another_run_reads_stays(planted, tmp_path, capsys, way, what):
    wanted = planted.may_go[what][0]
    other = PlantedRun(tmp_path / "runs" / "other", {"sft": "sft"})
    phase = other.phases["sft"]
    if way == "link":
        (other.run.path / "sft").mkdir()
        (other.run.path / "sft" / "base").symlink_to(wanted)
    elif way == "input":
        phase.inputs[str(wanted / "state")] = "0" * 64
    else:
        path = {"its training": str(wanted.parents[1]), "setting": str(wanted)}.get(way, os.path.relpath(wanted))
        phase.settings["deep"] = {"init_from": [path]}
    durable.write_checked(other.run.pipeline_origin_path(1), {"cwd": str(tmp_path)})
    other.run.freeze(1, "other", [phase])
    (found,) = said(capsys, planted.run.path, "--yes")["runs"]
    assert wanted.exists() and str(other.run.path) in found["kept"][str(wanted)]
    assert not planted.may_go["code"][0].exists()


@pytest.mark.parametrize("read", ["by nobody", "by another run", "by a link", "by a worker"])
def test_sealed_results_of_settings_of_before_go_by_name_alone_unless_something_reads_them(
    planted, tmp_path, capsys, read
):
    before = planted.run.phase_folder("sft") / SEALED_BEFORE
    assert str(before) not in [item["path"] for item in said(capsys, planted.run.path)["runs"][0]["items"]]
    other = PlantedRun(tmp_path / "runs" / "other", {"sft": "sft"})
    if read == "by another run":
        other.phases["sft"].settings["init_from"] = str(before / "work")
        other.run.freeze(1, "other", [other.phases["sft"]])
    elif read == "by a link":
        (other.run.path / "sft").mkdir()
        (other.run.path / "sft" / "base").symlink_to(before)
    elif read == "by a worker":
        lease(planted, before, 2, host="elsewhere")
    (shown,) = said(capsys, planted.run.path, "--only", "superseded")["runs"]
    expected = [str(before)] if read == "by nobody" else []
    assert [item["path"] for item in shown["items"]] == expected and before.exists()
    (done,) = said(capsys, planted.run.path, "--only", "superseded", "--yes")["runs"]
    assert before.exists() == (read != "by nobody") and all(path.exists() for path in planted.may_go["attempts"])
    assert read == "by nobody" or str(before) in done["kept"]
    planted.check_seals()
    assert clean.when_cleaned(planted.run, "sft", "superseded") is not None or expected == []


def test_what_goes_by_name_alone_is_told_with_its_size(planted, capsys):
    assert main(["clean", str(planted.run.path)]) == 0
    assert "more is sealed under settings of before: --only superseded shows it" in capsys.readouterr().out
    assert main(["clean", str(planted.run.path), "--only", "superseded", "--yes"]) == 0
    assert main(["clean", str(planted.run.path)]) == 0
    assert "superseded" not in capsys.readouterr().out.partition("deletes it")[2]


def test_a_full_disk_is_cleaned_and_what_went_is_written_down_once_there_is_room(planted, capsys, monkeypatch):
    append, tries = durable.append_line, iter([OSError(28, "No space left on device")])

    def full_at_first(path, line):
        if error := next(tries, None):
            raise error
        append(path, line)

    monkeypatch.setattr(clean.durable, "append_line", full_at_first)
    (done,) = said(capsys, planted.run.path, "--yes")["runs"]
    assert done["deleted"] and clean.when_cleaned(planted.run, "sft", "journals") is not None


def test_a_replay_after_a_clean_says_that_the_journals_were_cleaned_and_when(planted, capsys):
    asked = ["logs", str(planted.run.path), "sft", "--replay", "3/0/0"]
    assert main(asked) == 2 and "deleted" not in capsys.readouterr().err
    said(capsys, planted.run.path, "--only", "journals", "--yes")
    assert main(asked) == 2
    assert (
        "`afterok clean` deleted what sft had recorded of its rollouts, the journals, at 20" in capsys.readouterr().err
    )


@pytest.mark.parametrize("end", ["taken back", "a bundle that nobody sent"])
def test_what_the_newest_submission_that_ran_goes_on_from_stays(planted, capsys, end):
    folder = planted.run.artifact(planted.phases["grpo"]).folder
    planted.phases["grpo"] = dataclasses.replace(planted.phases["grpo"], key="d" * 16)
    planted.run.submission_folder(4).mkdir(exist_ok=True)
    planted.run.freeze(4, "planted", list(planted.phases.values()))
    told = {"submission": 4, "backend": "local", "choice": "local", "cluster": "local"}
    if end == "taken back":
        planted._tell(0, event="submission", **told)
        planted._tell(0, event="abandoned", submission=4, why="refused", jobs=[])
    else:
        planted._tell(0, event="bundle", jobs=[], folder="bundle", **told)
    (found,) = said(capsys, planted.run.path, "--yes")["runs"]
    assert found["deleted"] and (folder / "checkpoints/step_1/bytes").exists()


def test_of_many_runs_each_is_told_though_one_cannot_be_cleaned(planted, tmp_path, capsys):
    for name, text in (("a b", "no ledger\n"), ("z", "")):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "ledger.jsonl").write_text(text)
    runs = said(capsys, "runs", "--yes")["runs"]
    assert [bool(run["going"]) for run in runs] == [True, False, True] and runs[1]["items"] and runs[1]["deleted"]
    assert not planted.may_go["code"][0].exists()
    assert "nothing was submitted there yet" in runs[2]["going"] and "is not whole JSON" in runs[0]["going"]


def test_what_went_before_something_that_cannot_is_told(planted, capsys, monkeypatch):
    paths, remove = [Path(item["path"]) for item in said(capsys, planted.run.path)["runs"][0]["items"]], clean.remove
    refuse = PermissionError(1, "Operation not permitted", str(paths[2]))
    monkeypatch.setattr(
        clean, "remove", lambda path: remove(path) if path != paths[2] else (_ for _ in ()).throw(refuse)
    )
    (found,) = said(capsys, planted.run.path, "--yes", code=2)["runs"]
    assert [item["path"] for item in found["items"]] == list(map(str, paths[:2]))
    assert found["going"] == f"{paths[2]} cannot be deleted: Operation not permitted"
    assert [path.exists() for path in paths[:3]] == [False, False, True]


def test_a_folder_that_may_not_be_entered_is_told_as_a_run_that_may_read_something(
    planted, tmp_path, capsys, monkeypatch
):
    (tmp_path / "runs" / "theirs").mkdir()
    monkeypatch.setattr(clean.os, "access", lambda path, _: Path(path).name != "theirs")  # root may enter any
    submissions = RunLayout.submission_numbers

    def closed(run):
        if run.name == "theirs":
            raise PermissionError
        return submissions(run)

    monkeypatch.setattr(RunLayout, "submission_numbers", closed)
    assert said(capsys, planted.run.path)["runs"][0]["unread"] == [str(tmp_path / "runs" / "theirs")]


def test_wrong_words_are_refused_in_a_line(planted, capsys):
    assert main(["clean", str(planted.run.path), "--only", "everything"]) == 2
    assert "--only everything: say one of attempts, settings," in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["clean", "--help"])
    told = capsys.readouterr().out
    assert all(what in told for what in WHAT)
    assert main(["clean", "nowhere"]) == 2
    assert "'nowhere' is no run" in capsys.readouterr().err
