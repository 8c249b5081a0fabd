"""What run, submit, status, why and the summary say is said of the settings that were asked for last."""

import json

import pytest

from jobs.artifacts.run_folder import RunFolder
from launchers.cli import main
from tests.command import ROOT

ONE = """
name: one
params: {seed: 1, mistake: ""}
phases:
  numbers: {uses: tests.toy.numbers, with: {start: "${params.seed}", mistake: "${params.mistake}"}}
"""


@pytest.fixture
def say(tmp_path, monkeypatch, capsys):
    """`afterok VERB` of the pipeline, or of the run, with settings: (exit code, stdout, stderr)."""
    path, run = tmp_path / "one.yaml", tmp_path / "run"
    path.write_text(ONE)
    monkeypatch.chdir(ROOT)

    def say(verb, *settings):
        what = [run] if verb in ("status", "why", "resubmit") else [path, "cluster=local", "--run", run]
        code = main([verb, *map(str, what), *settings])
        return code, *capsys.readouterr()

    say.run = RunFolder(run)
    say.json = lambda *words: json.loads(say(*words, "--json")[1])
    return say


def test_each_run_speaks_of_its_own_settings_though_nothing_had_to_be_submitted(say):
    keys = {seed: say.json("plan", f"params.seed={seed}")["phases"][0]["key"] for seed in (1, 2)}
    for seed, verb in ((1, "run"), (2, "run"), (1, "run"), (2, "submit"), (2, "submit")):
        code, told, _ = say(verb, f"params.seed={seed}")
        assert code == 0
        if verb == "run":
            assert "numbers/latest" in told and keys[3 - seed] not in told
        assert keys[seed] in (say.run.path / "numbers/latest").resolve().parts
        assert keys[seed] in say.json("status")["phases"][0]["folder"]
    assert say.run.submissions() == [1, 2, 3, 4]  # the second of two equal submits wrote nothing down
    assert len(list(say.run.path.glob("numbers/*/seal.json"))) == 2


def test_good_settings_after_failed_ones_end_well(say):
    assert say("run")[0] == 0
    code, _, told = say("run", "params.mistake=broken")
    assert code == 2 and "broken" in told
    assert say("why")[1].startswith("numbers failed") or "broken" in say("why")[1]
    code, shown, told = say("run")
    assert code == 0 and "broken" not in shown
    assert "those that are to stay: params.mistake=broken" in told and told.count("broken") == 1
    assert say.json("status")["finished"] and "broken" not in say("why")[1]


def test_a_sealed_phase_runs_anew_when_asked_and_what_it_made_is_set_aside(say):
    assert say("run")[0] == 0
    (seal,) = say.run.path.glob("numbers/*/seal.json")
    before = seal.read_bytes()
    code = say("resubmit", "numbers")
    assert code[0] == 2 and "--again" in code[2]
    assert say("resubmit", "numbers", "--again", "--dry-run")[0] == 0 and seal.read_bytes() == before
    assert say("resubmit", "numbers", "--again", "--elements", "0")[0] == 2
    assert say("resubmit", "numbers", "--again")[0] == 0
    (aside,) = say.run.path.glob("numbers/retired/*/seal.json")
    assert aside.read_bytes() == before and list(aside.parent.glob("work/*/numbers.txt"))
    assert say("run")[0] == 0
    assert json.loads(seal.read_bytes())["submission"] == 2
    seal.write_text("{")  # torn: nothing but `--again` goes on from there
    assert say("plan")[0] == 2
    assert say("resubmit", "numbers", "--again")[0] == 0
    assert say("run")[0] == 0 and json.loads(seal.read_bytes())["submission"] == 3


def test_a_damaged_seal_of_other_settings_holds_up_nothing(say):
    """Neither a plan, nor a new attempt, nor a cancel: it says nothing about the settings asked for now."""
    assert say("run", "params.seed=1")[0] == 0
    (seal,) = say.run.path.glob("numbers/*/seal.json")
    assert say("run", "params.seed=2")[0] == 0
    seal.write_text(seal.read_text().replace('"numbers":1', '"numbers":3'))
    assert main(["cancel", str(say.run.path)]) == 0
    assert say("plan", "params.seed=3")[0] == say("resubmit", "numbers", "--again")[0] == 0
    assert say("run", "params.seed=2")[0] == 0
    assert say("run", "params.seed=3")[0] == say("status")[0] == 0
    code, _, told = say("plan", "params.seed=1")
    assert code == 2 and str(seal) in told
