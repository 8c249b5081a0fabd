"""The command line: quick, light, and one line with exit code 2 for every wrong input."""

import json
import subprocess
import sys

import pytest

from data_tools.base import durable
from launchers import cli
from launchers.planning.ledger import Ledger
from tests.command import ROOT, afterok, afterok_json, one_line, write_toy
from tests.launchers.planted_run import PlantedRun

HEAVY = ("torch", "megatron", "transformers", "submitit", "tokenizers")


def imported_by(*args):
    code = (
        "import sys; sys.argv = ['afterok', *sys.argv[1:]]\nfrom launchers.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('MODULES', *sorted(m.split('.')[0] for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, text=True, capture_output=True)
    return set(done.stdout.split("MODULES")[1].split())


TINY = ["plan", "jobs/pipelines/tiny.yaml", "--run", "/nonexistent/run", "cluster=local"]


@pytest.mark.parametrize("args", [["--help"], TINY, [*TINY, "--parallel", "sft", "--search"]])
def test_help_and_plan_import_no_torch(args):
    assert not imported_by(*args) & set(HEAVY)


def test_every_verb_has_help_and_every_reporting_verb_takes_json():
    for verb in ("plan", "submit", "run", "status", "cancel", "logs"):
        text = afterok(verb, "--help").stdout
        assert ("--json" in text) == (verb != "logs")


@pytest.mark.parametrize("args, expected", [
    (["plan", "none.yaml"], "none.yaml: no such pipeline file"),
    (["status", "nowhere"], "'nowhere' is no run"),
    (["plan", "TOY", "cluster=nosuch"], "no cluster profile 'nosuch'"),
    (["plan", "TOY", "numbers.with.file=./absent.jsonl"],
     "phases.numbers.with.file: './absent.jsonl': no such file or folder"),
    (["plan", "TOY", "numbers.with.start=-1"], "phases.numbers.with.start: -1 is negative; take 0"),
    (["plan", "TOY", "numbers.resources.role=trian", "cluster=local"], "no role 'trian'"),
])  # fmt: skip
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, args, expected):
    toy = write_toy(tmp_path)
    args = [str(toy) if arg == "TOY" else arg for arg in args]
    if "plan" in args:
        args += ["--run", str(tmp_path / "run")]
    assert expected in one_line(afterok(*args, check=2))
    assert not (tmp_path / "run").exists()


def test_a_configured_slurm_that_does_not_answer_is_an_error_never_a_fall_back(tmp_path):
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=dead\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=9\n")
    done = afterok("submit", write_toy(tmp_path), "--run", tmp_path / "run", env={"SLURM_CONF": str(conf)}, check=2)
    assert str(conf) in one_line(done)
    assert not (tmp_path / "run").exists()


def test_plan_as_json_carries_what_the_table_shows(tmp_path):
    plan = afterok_json("plan", write_toy(tmp_path), "--run", tmp_path / "run", "cluster=local")
    assert [phase["phase"] for phase in plan["phases"]] == ["numbers", "total", "again"]
    assert {"key", "action", "reasons", "elements", "missing", "role", "resources"} <= plan["phases"][0].keys()


def test_folders_of_the_user_do_not_stand_in_for_our_packages(tmp_path):
    for name in ("jobs", "slurm", "launchers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    (tmp_path / "mine" / "phase.py").write_text((ROOT / "tests/toy/numbers.py").read_text())
    (tmp_path / "p.yaml").write_text("name: p\nphases:\n  a: {uses: mine.phase}\n")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import launchers.cli; sys.path.remove({str(ROOT)!r}); "
        "sys.path.remove(''); sys.path.append(" + repr(str(ROOT)) + "); sys.exit(launchers.cli.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "p.yaml", "cluster=local"], cwd=tmp_path, text=True, capture_output=True
    )
    assert done.returncode == 0 and "mine" not in done.stderr, done.stderr


def test_an_event_may_hold_what_python_takes_for_a_line_break(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for value in ("a\u2028b", "c\x0cd\n"):
        ledger.append("note", value=value)
    assert [event["value"] for event in ledger.events()] == ["a\u2028b", "c\x0cd\n"]


def test_a_ledger_that_another_version_wrote_is_one_line(tmp_path):
    afterok("run", write_toy(tmp_path), "cluster=local", "--run", tmp_path / "run")
    ledger = tmp_path / "run" / "ledger.jsonl"
    lines = [json.loads(line.replace('"name":', '"title":')) for line in ledger.read_text().splitlines()]
    ledger.write_text("".join(json.dumps(durable.with_sum(line)) + "\n" for line in lines))
    assert "another version of afterok wrote it" in one_line(afterok("status", tmp_path / "run", check=2))


def test_a_word_that_is_neither_run_nor_phase_is_told_so_with_the_nearest_of_either(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["why", "nowhere"]) == 2
    assert "'nowhere' is no run: neither nowhere/ledger.jsonl" in capsys.readouterr().err
    planted = PlantedRun(tmp_path / "runs" / "tiny", {"data": "materialize", "sft": "sft"})
    planted.seal("data", 1, {"balance.json": "{}"})
    for words, said in [
        (["why", "tiney"], ["'tiney' is no run", "and no phase of runs/tiny", "did you mean tiny?"]),
        (["why", "sfft"], ["'sfft' is no run", "and no phase of runs/tiny", "did you mean sft?"]),
        (["why", "tiney", "sft"], ["'tiney' is no run", "did you mean tiny?"]),
        (["why", "tiny", "sfft"], ["runs/tiny has no phase 'sfft' (did you mean sft?"]),
        (["status", "tinny"], ["'tinny' is no run", "did you mean tiny?"]),
        (["status", "sft"], ["no run but a phase of runs/tiny", "`afterok why runs/tiny sft`"]),
        (["plot", "sft"], ["no phase of the run has written metrics"]),  # it is found
        (["scores", "sft", "data"], ["sft"]),
        (["plot", "sfft"], ["'sfft' is no run", "and no phase of runs/tiny", "did you mean sft?"]),
        (["path", "tiny"], ["has no phase 'tiny'", "tiny is a run: name a phase of it, too"]),
        (["inspect", "tiny"], ["'tiny' is no phase", "tiny is a run: name a phase of it, too"]),
    ]:
        assert cli.main(words) == 2
        told = capsys.readouterr().err
        assert all(part in told for part in said) and len(told.splitlines()) == 1, told
