"""The doors of sbatch: a pipeline and a phase from within a batch job, in the styles of --export that people use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.base import durable
from slurm.profile import files
from tests.command import ROOT, TINY_SHORT, afterok_json, states, wait_for, wait_until_sealed
from tests.slurm.test_client import GPUS, OUTER

TEXT = """
name: toy
variables: {TOY_START: params.start, TOY_LIST: params.list}
params: {start: 1, list: [1]}
phases:
  first: {uses: tests.toy.numbers, array: "${params.list}", with: {start: "${params.start}"}}
  sum: {uses: tests.toy.total, with: {numbers: "${phases.first.out}"}}
"""


@pytest.fixture
def toy(tmp_path, dev_cluster):
    (tmp_path / "toy.yaml").write_text(TEXT)
    return tmp_path / "toy.yaml", tmp_path / "run", dev_cluster.env()


def through(door: str, *words: object, export: str, env: dict, out: Path, options: tuple[str, ...] = ()) -> int:
    """Send a job through a door and wait for its end; its exit code."""
    command = ["sbatch", "--wait", f"--output={out}", f"--export={export}", *options, f"slurm/{door}.sbatch"]
    done = subprocess.run([*command, *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert not done.stderr, done.stderr
    return done.returncode


def total(run: Path, env: dict) -> int:
    return {phase["phase"]: phase["facts"] for phase in afterok_json("status", run, env=env)["phases"]}["sum"]["total"]


def test_a_pipeline_and_then_a_phase_by_sbatch_with_and_without_ALL(toy, tmp_path):
    pipeline, run, env = toy
    python = f"AFTEROK_PYTHON={sys.executable}"
    bare = f'TOY_START=5,TOY_LIST="[7,8]",{python}'  # neither PATH nor HOME
    out = tmp_path / "out"
    assert through("pipeline", pipeline, "--run", run, export=bare, env=env, out=out) == 0, out.read_text()
    wait_until_sealed(run, "first", "sum", env=env)
    assert total(run, env) == 5 + 6
    origin = durable.read_json(run / "submissions/1/pipeline.json")
    assert origin["variables"] == {"TOY_START": "params.start=5", "TOY_LIST": "params.list=[7,8]"}
    # once more, a phase, from within a job that has all that an outer job can have, though the profile forwards it
    of_slurm = ("SBATCH", "SLURM", "_SLURM", "SQUEUE")  # which would say something to the test's own sbatch
    told = dict.fromkeys({name for name in OUTER | GPUS if not name.startswith(of_slurm)}, "7")
    names = sorted({*told, "SLURM_NTASKS", "SLURM_MEM_PER_NODE"} - {"MASTER_ADDR", "MASTER_PORT"})  # refused there
    ours = [f"cluster.env.forward=[{','.join(names)}]", f"cluster.env.setup=['env > {tmp_path}/env.$SLURM_JOB_NAME']"]
    full = env | told | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    options = ("--ntasks=3", "--gpus-per-node=2", "--mem=2000", "--cpus-per-task=2")
    words = (run, "first", *ours)
    code = through("phase", *words, export="ALL,TOY_START=7", env=full, out=out, options=options)
    assert code == 0, out.read_text()
    wait_for("the new sum", lambda: len(list(run.glob("sum/*/seal.json"))) == 2)
    assert total(run, env) == 7 + 8
    (found,) = tmp_path.glob("env.sum.run.*")
    inner = dict(line.split("=", 1) for line in found.read_text().splitlines() if "=" in line)
    assert not [name for name in told if inner.get(name) == "7"]
    told = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    profiles = [event["profile_file"] for event in told if "profile_file" in event]
    assert profiles == [str(files.find("dev"))] * 2  # the same by every door
    assert (
        inner["SLURM_NTASKS"] == "1" and inner["SLURM_MEM_PER_NODE"] != "2000" and inner["SLURM_CPUS_PER_TASK"] == "1"
    )


@pytest.mark.parametrize("door, export, words, said", [
    ("pipeline", "TOY_STRAT=5", (), "TOY_STRAT: the pipeline has no variable of this name (did you mean TOY_START"),
    ("pipeline", "TYO_START=5", (), "the pipeline has no variable TYO_START (did you mean TOY_START"),
    ("pipeline", "TOY_LIST=[7,8]", (), "'8]' is no variable of the environment that sbatch was called in"),
    ("pipeline", "TOY_START=5,TOY_START=6", (), "TOY_START is '5' here: it is said more than once"),
    ("pipeline", "TOY_LIST=[7] #8", (), "from ' #' on it is a comment"),
])  # fmt: skip
def test_what_would_be_lost_is_refused_and_nothing_runs(toy, tmp_path, monkeypatch, capfd, door, export, words, said):
    """The door's program as its script starts it: the environment that Slurm gives is that of tests/slurm."""
    pipeline, run, env = toy
    given = dict(part.split("=", 1) for part in [export.partition(",")[0]])
    there = {**env, **given, "AFTEROK_EXPORT": export}
    place = [pipeline, "--run", run] if door == "pipeline" else [run]
    command = [sys.executable, "-P", "-m", "launchers.door", door, *map(str, [*place, *words])]
    done = subprocess.run(command, cwd=ROOT, env={**there, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not run.exists()


@pytest.mark.parametrize("how", ["word", "variable", "profile"])
def test_what_is_for_this_machine_is_followed_however_it_is_said_and_a_phase_of_it_refused(tmp_path, how):
    (tmp_path / "toy.yaml").write_text(TEXT.replace("{TOY_START", "{TOY_CLUSTER: cluster, TOY_START"))
    (tmp_path / "mine.yaml").write_text("extends: [local]\n")
    words = {"word": ["cluster=local"], "variable": [], "profile": [f"cluster={tmp_path}/mine.yaml"]}[how]
    said = {"TOY_CLUSTER": "local"} if how == "variable" else {}
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | said
    env |= {"AFTEROK_EXPORT": "ALL", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-m", "launchers.door"]
    given = [*command, "pipeline", tmp_path / "toy.yaml", "--run", tmp_path / "run", "--rehearse", *words]
    done = subprocess.run([*given, "--rehearse-scale=1e-6"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run").glob("*/*/seal.json"))) == 2
    given = [*command, "phase", tmp_path / "run", "sum", "--again"]  # the run itself says that it is for this machine
    done = subprocess.run(given, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "a phase is resubmitted to a cluster" in done.stderr, done.stderr


@pytest.mark.parametrize("text, variables, said", [
    (". slurm/door.sh", {"AFTEROK_PYTHON": "/bin/false", "home": str(ROOT), "door": "pipeline"}, "/bin/false cannot"),
    (". slurm/pipeline.sbatch", {"PATH": "/nowhere", "SLURM_SUBMIT_DIR": "/", "SLURM_JOB_ID": "1"}, "--export=PATH,"),
])  # fmt: skip
def test_a_job_that_cannot_start_says_why_and_takes_no_other_python(text, variables, said):
    env = {"PATH": os.environ["PATH"], **variables}
    done = subprocess.run(["/bin/bash", "-c", text], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1 if "home" not in env else -2], done.stderr


def test_a_whole_pipeline_within_the_one_job(toy, tmp_path):
    pipeline, run, env = toy
    out = tmp_path / "out"
    export = f"PATH,HOME,TOY_START=2,AFTEROK_PYTHON={sys.executable}"
    words = (pipeline, "--run", run, "cluster=local")
    assert through("pipeline", *words, export=export, env=env, out=out) == 0, out.read_text()
    assert (run / "local").is_dir() and "total 2" in out.read_text()


def test_the_doors_differ_in_their_words_only():
    texts = [(ROOT / f"slurm/{door}.sbatch").read_text() for door in ("pipeline", "phase")]
    bodies = [[line for line in text.splitlines() if not line.startswith("# ")] for text in texts]
    assert [line.replace("door=phase", "door=pipeline") for line in bodies[1] if line != "#"] == [
        line for line in bodies[0] if line != "#"
    ]


@pytest.mark.soak
def test_the_quick_start_by_sbatch_and_then_a_phase_of_it(dev_cluster, tmp_path):
    env, run, out = dev_cluster.env(), tmp_path / "run", tmp_path / "out"
    python = f"AFTEROK_PYTHON={sys.executable}"
    words = ("jobs/pipelines/tiny.yaml", *TINY_SHORT, "--run", run)
    assert through("pipeline", *words, export=python, env=env, out=out) == 0, out.read_text()
    wait_for("the end", lambda: set(states(run, env=env).values()) == {"COMPLETED"}, 1200)
    words = (run, "trained", "trained.with.samples=3")
    assert through("phase", *words, export=f"PATH,{python}", env=env, out=out) == 0, out.read_text()
    wait_for("the phase", lambda: len(list(run.glob("trained/*/seal.json"))) == 2, 600)
    wait_for("the end", lambda: set(states(run, env=env).values()) == {"COMPLETED"}, 1200)
