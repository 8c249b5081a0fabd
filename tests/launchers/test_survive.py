"""What is asked to stop stops at a checkpoint and goes on by itself: on a real Slurm, and as local processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools.base import durable
from jobs.artifacts.owner import process_start
from jobs.artifacts.run_folder import RunFolder
from jobs.artifacts.seal import read_seal
from launchers.planning.ledger import Ledger
from slurm.client import Slurm
from tests.cluster import rows_of
from tests.command import ROOT, afterok, phase_status, states, wait_for

PIPELINE = """
name: survive
phases:
  counter: {uses: tests.toy.counter, with: {steps: 40, seconds: 0.05}}
  total: {uses: tests.toy.total, with: {numbers: "${phases.counter.out}"}}
"""
NUMBERS = list(range(40))


@pytest.fixture
def pipeline(tmp_path):
    path = tmp_path / "survive.yaml"
    path.write_text(PIPELINE)
    return path, tmp_path / "run"


def facts(run, phase="counter"):
    return read_seal(next(run.glob(f"{phase}/*/seal.json"))).facts


def outcomes(run, phase="counter"):
    return [(outcome.restart, outcome.state, outcome.exit_code) for outcome in RunFolder(run).outcomes(phase)]


def counted(run, least=3):
    """Wait until the phase has made some steps of this start; returns its worker's pid."""

    def at():
        for path in run.glob("counter/*/progress/0000.json"):
            return json.loads(path.read_text())["done"] >= least

    wait_for("some steps", at)
    return newest_owner(run)["pid"]


def gate(run):
    """An override: the counter does not end before the test says so, however slow the test is."""
    return f"counter.with.gate={run}.gate"


def opened(run):
    Path(f"{run}.gate").touch()


def newest_owner(run, phase="counter"):
    return json.loads(max(run.glob(f"{phase}/*/leases/0000.*"), key=lambda path: path.name).read_text())


def assert_sealed_once_after_restarts(run, starts):
    """All numbers once, each start where the one before was stopped, the dependent sealed, one seal."""
    sealed = facts(run)["starts"]
    assert len(sealed) == starts and sealed[0] == 0 and sealed == sorted(set(sealed)), sealed
    assert facts(run, "total")["total"] == sum(NUMBERS)
    assert len(list(run.glob("counter/*/seal.json"))) == len(list(run.glob("total/*/seal.json"))) == 1
    assert outcomes(run) == [(n, "stopped", 5) for n in range(starts - 1)] + [(starts - 1, "sealed", 0)]


# -- Slurm --------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_slurm(pipeline, dev_cluster):
    return (*pipeline, dev_cluster.env(), Slurm(dev_cluster.env()))


def jobs_of(run):
    return {entry.phase: entry.job for entry in Ledger(run / "ledger.jsonl").jobs()}


def finished(run, env):
    wait_for("the end", lambda: "COMPLETED" == states(run, env=env)["total"], 60)


@pytest.mark.parametrize("grace", [0, pytest.param(20, marks=pytest.mark.soak)])
def test_a_preempted_job_stops_at_a_checkpoint_and_goes_on_when_its_nodes_are_free(on_slurm, grace):
    """With a grace time Slurm leaves the job RUNNING, and one that ends within it as FAILED: then we requeue it."""
    path, run, env, slurm = on_slurm
    slurm.run(["scontrol", "update", "partition=preempt", f"gracetime={grace}"])
    afterok("submit", path, "counter.resources.partition=preempt", gate(run), "--run", run, env=env)
    counted(run)
    jobs = jobs_of(run)
    high = slurm.sbatch(["--partition=batch", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"])
    wait_for("the higher job", lambda: rows_of(slurm, high)[0].state in ("RUNNING", "COMPLETED"), 30)
    assert rows_of(slurm, jobs["counter"])[0].state in ("PENDING", "RUNNING")
    opened(run)
    finished(run, env)
    assert jobs_of(run) == jobs and slurm.job(jobs["counter"])["Restarts"] == "1"
    assert_sealed_once_after_restarts(run, 2)


def test_near_its_time_limit_an_element_is_requeued_in_place_and_the_rest_of_its_run_stays(on_slurm):
    """The last element of an array has the array's own id: `scontrol requeue ID` would take all of them."""
    path, run, env, slurm = on_slurm
    path.write_text(PIPELINE.replace("uses: tests.toy.counter", "uses: tests.toy.counter_array, array: 2"))
    afterok("submit", path, gate(run), "--run", run, env=env)
    jobs = jobs_of(run)
    wait_for("both", lambda: len(list(run.glob("counter/*/elements/*/progress/*.json"))) == 2)
    last = next(row.array_index for row in rows_of(slurm, jobs["counter"]) if row.job_id == jobs["counter"])
    slurm.run(["scancel", "--signal=USR2", f"{jobs['counter']}_{last}"])  # what sbatch --signal=USR2@90 does
    wait_for("the requeue", lambda: any(row.state == "PENDING" for row in rows_of(slurm, jobs["counter"])))
    dependent = rows_of(slurm, jobs["total"])[0]
    assert (dependent.state, dependent.reason) == ("PENDING", "Dependency")
    assert phase_status(run, "counter", env=env)["state"] in ("PENDING", "RUNNING")
    opened(run)
    finished(run, env)
    assert jobs_of(run) == jobs
    assert [slurm.job(f"{jobs['counter']}_{index}")["Restarts"] for index in (last, 1 - last)] == ["1", "0"]
    assert sorted(outcomes(run)) == [(0, "sealed", 0), (0, "stopped", 5), (1, "sealed", 0)]
    assert facts(run, "total")["total"] == 2 * sum(NUMBERS) and len(list(run.glob("*/*/seal.json"))) == 2


@pytest.mark.parametrize("before", [[], ["USR2"]])
def test_a_cancelled_job_is_never_requeued(on_slurm, before):
    path, run, env, slurm = on_slurm
    afterok("submit", path, "counter.with.seconds=0.3", "counter.with.steps=10", gate(run), "--run", run, env=env)
    counted(run, 2)
    job = jobs_of(run)["counter"]
    for name in before:
        slurm.run(["scancel", f"--signal={name}", job])
    slurm.cancel([job])  # within the step at whose end it would have asked for a requeue
    wait_for("its last words", lambda: outcomes(run) == [(0, "stopped", 5)])
    wait_for("the end", lambda: not slurm.active_job_ids())
    assert (rows_of(slurm, job)[0].state, slurm.job(job)["Restarts"]) == ("CANCELLED", "0")
    assert not list(run.glob("*/*/seal.json"))
    afterok("cancel", run, env=env)


def test_a_job_that_may_not_be_requeued_ends_unfinished_and_says_so(on_slurm):
    path, run, env, slurm = on_slurm
    afterok("submit", path, gate(run), "--run", run, env=env)
    counted(run)
    job = jobs_of(run)["counter"]
    slurm.run(["scontrol", "update", f"jobid={job}", "requeue=0"])
    slurm.run(["scancel", "--signal=USR2", job])
    wait_for("the end", lambda: rows_of(slurm, job)[0].state == "FAILED")
    assert slurm.job(job)["ExitCode"] == "5:0"
    message = phase_status(run, "counter", env=env)["message"]
    assert "stopped after a durable checkpoint at step" in message and "may not be requeued" in message
    afterok("cancel", run, env=env)


@pytest.mark.soak
def test_a_loop_without_progress_is_cut_on_slurm(on_slurm):
    path, run, env, slurm = on_slurm
    afterok("submit", path, "counter.with.stuck=true", "--run", run, env=env)
    job = jobs_of(run)["counter"]
    for restart in range(2):
        wait_for("its start", lambda restart=restart: list(run.glob(f"counter/*/leases/0000.a1.r{restart}.*")))
        time.sleep(1)
        slurm.run(["scancel", "--signal=USR2", job])
    wait_for("the end", lambda: rows_of(slurm, job)[0].state == "FAILED")
    assert "no progress since the last restart, still at step 0" in phase_status(run, "counter", env=env)["message"]
    afterok("cancel", run, env=env)


# -- local processes ----------------------------------------------------------------------------------------------


def test_the_local_driver_restarts_what_stopped_at_a_checkpoint(pipeline):
    path, run = pipeline
    afterok("submit", path, gate(run), "cluster=local", "--run", run)
    for restart, (least, number) in enumerate([(3, signal.SIGTERM), (15, signal.SIGUSR2)]):
        wait_for("its start", lambda restart=restart: newest_name(run) == f"0000.a1.r{restart}.g0")
        os.kill(counted(run, least), number)
        wait_for("the stop", lambda restart=restart: outcomes(run)[restart:] == [(restart, "stopped", 5)])
    opened(run)
    wait_for("the end", lambda: states(run)["total"] == "COMPLETED")
    assert_sealed_once_after_restarts(run, 3)
    assert [path.name for path in sorted(run.glob("counter/*/leases/*"))] == [f"0000.a1.r{n}.g0" for n in range(3)]


def test_a_killed_worker_gets_one_more_try_and_a_code_error_none(pipeline):
    path, run = pipeline
    afterok("submit", path, "counter.with.every=1", "cluster=local", "--run", run)
    for restart in range(2):
        wait_for("its start", lambda restart=restart: newest_name(run).startswith(f"0000.a1.r{restart}"))
        os.kill(newest_owner(run)["pid"], signal.SIGKILL)
    wait_for("the failure", lambda: states(run)["counter"] == "FAILED")
    assert phase_status(run, "counter")["reason"] == "unknown, after 1 of 1 restarts"
    afterok("run", path, "cluster=local", "--run", run)
    assert facts(run, "total")["total"] == sum(NUMBERS)


def newest_name(run):
    return max((path.name for path in run.glob("counter/*/leases/*")), default="")


def test_a_loop_without_progress_is_cut(pipeline):
    path, run = pipeline
    afterok("submit", path, "counter.with.stuck=true", "cluster=local", "--run", run)
    for restart in range(2):
        wait_for("its start", lambda restart=restart: newest_name(run).startswith(f"0000.a1.r{restart}"))
        wait_for("its work", lambda: list(run.glob("counter/*/progress/0000.json")))
        time.sleep(0.3)
        os.kill(newest_owner(run)["pid"], signal.SIGUSR2)
    wait_for("the failure", lambda: states(run)["counter"] == "FAILED")
    status = phase_status(run, "counter")
    assert status["exit_code"] == 5 and "no progress since the last restart, still at step 0" in status["message"]


@pytest.mark.parametrize("how", ["cancel", "driver"])
def test_what_is_cancelled_stops_for_good_and_leaves_its_checkpoint(pipeline, how):
    path, run = pipeline
    afterok("submit", path, gate(run), "cluster=local", "--run", run)
    counted(run)
    if how == "cancel":
        afterok("cancel", run)
    else:
        os.kill(durable.read_json(run / "local/1/state.json")["driver"]["pid"], signal.SIGTERM)
    wait_for("the end", lambda: set(states(run).values()) == {"CANCELLED"})
    assert outcomes(run) == [(0, "stopped", 5)]
    opened(run)
    afterok("run", path, "cluster=local", "--run", run)
    assert facts(run)["starts"][1] > 0 and len(facts(run)["starts"]) == 2


def test_by_hand_a_stopped_worker_exits_5_and_goes_on_when_run_again(pipeline):
    path, run = pipeline
    afterok("submit", path, gate(run), "cluster=local", "--run", run)
    os.kill(counted(run), signal.SIGTERM)
    wait_for("a restart", lambda: newest_name(run) == "0000.a1.r1.g0")
    afterok("cancel", run)
    wait_for("the end", lambda: set(states(run).values()) == {"CANCELLED"})
    command = [sys.executable, "-m", "jobs.worker", str(run), "counter"]
    env = os.environ | {"PYTHONPATH": str(run / "submissions/1/code")}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    wait_for("its lease", lambda: newest_name(run) == "0000.a1.r1.g1")
    process.send_signal(signal.SIGUSR2)  # SIGTERM is deadly until the phase asks for the first time
    _, err = process.communicate(timeout=120)
    assert process.returncode == 5 and "stopped after a durable checkpoint at step" in err
    opened(run)
    assert subprocess.run(command, env=env, timeout=60).returncode == 0
    starts = facts(run)["starts"]  # the driver's restart may have been cancelled before it began to count
    assert starts == sorted(starts) and len(starts) >= 3 and starts[-1] > 0


# -- training -----------------------------------------------------------------------------------------------------

SFT = [
    "params.steps=60",
    "params.train_rows=2000",
    "params.test_rows=64",
    "sft.with.checkpoint_every=25",
    "cluster=local",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run of the quick start, never interrupted, without what follows training."""
    folder = tmp_path_factory.mktemp("sft")
    text = (ROOT / "jobs/pipelines/tiny.yaml").read_text()
    pipeline = folder / "sft.yaml"
    pipeline.write_text(text.partition("  trained:\n")[0])
    afterok("run", pipeline, *SFT, "--run", folder / "run", timeout=200)
    driver = folder / "run/local/1/state.json"
    wait_for(
        "its driver, of which copies would have to believe that it runs",
        lambda: all(task["state"] == "COMPLETED" for task in durable.read_json(driver)["tasks"]),
    )
    return pipeline, folder / "run"


def stopped_at_random(trained, run, seed, stops=1):
    """The facts of a training whose worker was sent SIGTERM or SIGUSR2 at random moments, each after its first step."""
    pipeline, whole = trained
    shutil.copytree(whole, run)
    shutil.rmtree(run / "sft")
    dice = random.Random(seed)
    afterok("submit", pipeline, *SFT, "--run", run)
    delays = []
    for stop in range(stops):
        wait_for("steps", lambda stop=stop: newest_training(run) == stop, 90)
        progress = wait_for("a step", lambda: list(run.glob("sft/*/progress/0000.json")))[0]
        seen = progress.stat().st_mtime_ns
        wait_for(
            "a step of this start",
            lambda progress=progress, seen=seen: (
                progress.stat().st_mtime_ns != seen and json.loads(progress.read_text())["done"] > 0
            ),
            90,
        )
        time.sleep(dice.uniform(0, 0.5))
        parent = spawning_parent(newest_owner(run, "sft")["pid"])
        began = time.monotonic()
        os.kill(parent, dice.choice([signal.SIGTERM, signal.SIGUSR2]))
        start = process_start(parent)
        wait_for("its exit", lambda parent=parent, start=start: process_start(parent) != start or start is None, 60)
        delays.append(time.monotonic() - began)
    wait_for("the end", lambda: states(run)["sft"] in ("COMPLETED", "FAILED"), 120)
    print(f"seed {seed}: {len(outcomes(run, 'sft')) - 1} stop(s), seconds from signal to exit: {delays}")
    return facts(run, "sft")


def newest_training(run):
    names = sorted(path.name for path in run.glob("sft/*/leases/0000.*"))
    return int(names[-1].split(".r")[1].split(".")[0]) if names else -1


def spawning_parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def assert_same_training(trained, found, run):
    whole = facts(trained[1], "sft")
    assert found["weights_digest"] == whole["weights_digest"] and found["tokens"] == whole["tokens"]
    lines = [
        [json.loads(line)["step"] for line in next(folder.glob("sft/*/metrics.jsonl")).read_text().splitlines()]
        for folder in (run, trained[1])
    ]
    assert lines[0] == lines[1]


@pytest.mark.soak  # CI kills ranks of tiny.yaml instead (tests/test_tiny.py)
def test_training_stopped_at_a_random_moment_gives_the_weights_of_an_uninterrupted_one(trained, tmp_path):
    found = stopped_at_random(trained, tmp_path / "run", seed=int(time.time()))
    assert found["resumed_from"] > 0
    assert_same_training(trained, found, tmp_path / "run")
    assert [state for _, state, _ in outcomes(tmp_path / "run", "sft")] == ["stopped", "sealed"]


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_training_survives_stops_at_many_random_moments(trained, tmp_path, seed):
    found = stopped_at_random(trained, tmp_path / "run", seed, stops=1 + seed % 3)
    assert_same_training(trained, found, tmp_path / "run")
