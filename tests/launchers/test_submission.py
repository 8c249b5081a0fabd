"""A submission is a transaction: killed between any two calls, refused or unanswered, it leaves nothing running twice.

The calls are interrupted by shims in PATH that run the real sbatch and scontrol of a real cluster.
"""

import os
import subprocess
import sys
import time

import pytest

from launchers.planning.ledger import Ledger
from slurm.client import Slurm
from tests.cluster import controller_forgets
from tests.command import MIDDLE, ROOT, afterok, afterok_json, one_line, states, wait_for, write_toy
from tests.launchers.shims import submitted_jobs

CALLS = 4  # of a toy submission: three sbatch and one scontrol release


def assert_sealed_once(run, env):
    wait_for("the end", lambda: set(states(run, env=env).values()) == {"COMPLETED"})
    assert len(list(run.glob("*/*/seal.json"))) == 3
    assert len(list(run.glob("numbers/*/seals/*.json"))) == 3


IN_CI = [
    (1, "kill-before", "submit"),
    (2, "kill-after", "repair"),
    (3, "kill-after", "submit"),
    (4, "kill-before", "repair"),
]
KILLS = [
    pytest.param(at, do, way, marks=[] if (at, do, way) in IN_CI else pytest.mark.soak)
    for at in range(1, CALLS + 1)
    for do in ("kill-before", "kill-after")
    for way in ("submit", "repair")
]


@pytest.mark.parametrize("at, do, way", KILLS)
def test_a_submitter_killed_between_any_two_calls_loses_and_doubles_nothing(shimmed, at, do, way):
    pipeline, run, env, shim = shimmed
    afterok("submit", pipeline, "--run", run, env=shim(at, do), check=-9)
    time.sleep(0.3)
    if (at, do) != (CALLS, "kill-after"):  # not released yet
        assert not list(run.glob("*/*/leases/*")), "something ran before the release"
    if way == "repair":
        lines = afterok_json("repair", run, env=env)["repaired"]
        assert len(lines) == 1 and "submission 1" in lines[0]
    else:
        afterok("submit", pipeline, "--run", run, env=env)
    assert_sealed_once(run, env)
    assert len(submitted_jobs(run, env)) == 3
    assert afterok("repair", run, env=env).stdout.strip().endswith("nothing to repair")


@pytest.mark.parametrize("do", ["open-before", "open-after", pytest.param("hang-after", marks=pytest.mark.soak)])
@pytest.mark.parametrize("at", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_an_sbatch_with_an_open_outcome_is_looked_up_before_it_is_sent_again(shimmed, at, do):
    pipeline, run, env, shim = shimmed
    afterok("submit", pipeline, "--run", run, env=shim(at, do))
    assert_sealed_once(run, env)
    assert len(submitted_jobs(run, env)) == 3


@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.soak), 3])
def test_a_refused_job_takes_the_whole_submission_back(shimmed, at):
    pipeline, run, env, shim = shimmed
    line = one_line(afterok("submit", pipeline, "--run", run, env=shim(at, "refuse"), check=2))
    assert "Job violates accounting/QOS policy" in line and "nothing of submission 1 will run" in line
    assert submitted_jobs(run, env) == [] and not list(run.glob("*/*/leases/*"))
    afterok("run", pipeline, "--run", run, env=env)
    assert_sealed_once(run, env)


@pytest.mark.soak
def test_a_job_that_begins_before_it_is_rewired_has_the_submission_planned_anew(shimmed):
    _, run, env, shim = shimmed
    afterok("run", MIDDLE, "mid.with.die_on_rank=0", "--run", run, env=env, check=1)
    rewire_of_left = 2  # the call before it sends the new `mid`
    afterok("resubmit", run, "mid", "mid.with.die_on_rank=-1", env=shim(rewire_of_left, "begin-before"))
    abandoned = [event for event in Ledger(run / "ledger.jsonl").events() if event["event"] == "abandoned"]
    assert [event["submission"] for event in abandoned] == [2] and "no longer pending" in abandoned[0]["why"]
    end = time.monotonic() + 120
    while set(states(run, env=env).values()) != {"COMPLETED"} and time.monotonic() < end:
        afterok("submit", MIDDLE, "mid.with.die_on_rank=-1", "--run", run, env=env)  # what had begun too early failed
        time.sleep(2)
    assert set(states(run, env=env).values()) == {"COMPLETED"}


@pytest.mark.soak
def test_the_first_submit_after_a_killed_submitter_goes_on_though_the_queue_changed_since(shimmed):
    _, run, env, shim = shimmed
    afterok("run", MIDDLE, "mid.with.die_on_rank=0", "--run", run, env=env, check=1)
    rewire_of_left = 2
    afterok("resubmit", run, "mid", "mid.with.die_on_rank=-1", env=shim(rewire_of_left, "kill-before"), check=-9)
    left = next(entry.job for entry in Ledger(run / "ledger.jsonl").jobs() if entry.phase == "left")
    slurm = Slurm(env)
    slurm.run(["scontrol", "update", f"jobid={left}", "dependency="])
    wait_for("its start", lambda: slurm.job(left)["JobState"] != "PENDING")
    afterok("submit", MIDDLE, "mid.with.die_on_rank=-1", "--run", run, env=env)
    events = list(Ledger(run / "ledger.jsonl").events())
    assert [event["submission"] for event in events if event["event"] == "abandoned"] == [2]
    assert Ledger(run / "ledger.jsonl").unreleased() == [] and events[-1]["event"] == "released"
    afterok("cancel", run, env=env)


def test_a_killed_submission_with_other_settings_is_cancelled_not_finished(shimmed):
    pipeline, run, env, shim = shimmed
    afterok("submit", pipeline, "--run", run, env=shim(3, "kill-after"), check=-9)
    afterok("run", pipeline, "params.start=7", "--run", run, env=env)
    assert len(submitted_jobs(run, env)) == 3
    assert [e["submission"] for e in Ledger(run / "ledger.jsonl").events() if e["event"] == "abandoned"] == [1]
    assert "total 48" in afterok("run", pipeline, "params.start=7", "--run", run, env=env).stdout  # (7 + 8 + 9) · 2


def test_an_element_that_ended_before_the_release_of_its_array_is_no_refusal(shimmed):
    """Slurm releases the others and fails all the same; where it released nothing, nothing runs."""
    pipeline, run, env, shim = shimmed
    refused = afterok("submit", pipeline, "--run", run, env=shim(CALLS, "begun-before"), check=2)
    assert "already finished" in refused.stderr and submitted_jobs(run, env) == []
    afterok("submit", pipeline, "--run", run, env=shim(CALLS, "begun-after"))
    assert_sealed_once(run, env)


@pytest.mark.soak
def test_a_controller_that_gives_out_the_ids_of_running_jobs_again_loses_no_work(tmp_path, toy_on_fragile_cluster):
    pipeline, run, env, cluster = toy_on_fragile_cluster
    gate = tmp_path / "gate"  # the forgotten go on until the node has refused their ids
    settings = [f"numbers.with.gate={gate}", "--run", run]
    with controller_forgets(cluster):
        afterok("submit", pipeline, *settings, env=env)
        wait_for("workers", lambda: len(list(run.glob("numbers/*/leases/*"))) == 3)
    afterok("submit", pipeline, *settings, env=env)
    held = "launch failed requeued held"  # the node has a job of that id
    wait_for("the failed launch", lambda: held in {row.reason for row in Slurm(env).queue()})
    gate.touch()
    end = time.monotonic() + 240
    while set(states(run, env=env).values()) != {"COMPLETED"} and time.monotonic() < end:
        afterok("submit", pipeline, *settings, env=env)
        time.sleep(1)
    assert_sealed_once(run, env)


def test_a_controller_killed_right_after_the_submit_loses_no_work(toy_on_fragile_cluster):
    pipeline, run, env, cluster = toy_on_fragile_cluster
    afterok("submit", pipeline, "numbers.with.seconds=1", "--run", run, env=env)
    cluster.kill_daemon("slurmctld", 9)
    cluster.start_daemon("slurmctld")
    wait_for("the controller", lambda: afterok("status", run, env=env, check=None).returncode == 0)
    end = time.monotonic() + 120
    while set(states(run, env=env).values()) != {"COMPLETED"} and time.monotonic() < end:
        # sends what was lost, and only that
        afterok("submit", pipeline, "numbers.with.seconds=1", "--run", run, env=env)
        time.sleep(2)
    assert_sealed_once(run, env)


@pytest.fixture
def toy_on_fragile_cluster(tmp_path, short_folder):
    from slurm.dev import cluster as devcluster
    from tests.cluster import require_packages

    require_packages()
    cluster = devcluster.up(short_folder, nodes=2)
    return write_toy(tmp_path), tmp_path / "run", cluster.env(), cluster


@pytest.mark.soak
@pytest.mark.parametrize("seconds", [2, pytest.param(30, marks=pytest.mark.soak)])
def test_a_controller_down_during_a_submit_is_waited_for(shimmed, dev_cluster, seconds):
    pipeline, run, env, shim = shimmed
    process = subprocess.Popen(
        [sys.executable, "-m", "launchers.cli", "submit", str(pipeline), "--run", str(run)],
        cwd=ROOT,
        env={**os.environ, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_for(
        "the first job", lambda: (run / "ledger.jsonl").exists() and '"sending"' in (run / "ledger.jsonl").read_text()
    )
    dev_cluster.kill_daemon("slurmctld")
    time.sleep(seconds)
    dev_cluster.start_daemon("slurmctld")
    _, err = process.communicate(timeout=120)
    assert process.returncode in (0, 1), err
    if process.returncode:
        afterok("repair", run, env=env)
    assert_sealed_once(run, env)


def test_a_copy_of_a_run_leaves_the_jobs_of_its_original_alone(tmp_path, dev_cluster):
    pipeline, run, copy, env = write_toy(tmp_path), tmp_path / "run", tmp_path / "copy", dev_cluster.env()
    slow = "numbers.with.seconds=600"
    afterok("submit", pipeline, slow, "--run", run, env=env)
    wait_for("its start", lambda: states(run, env=env)["numbers"] == "RUNNING")
    subprocess.run(["cp", "-r", run, copy], check=True)
    assert "RUNNING" not in states(copy, env=env).values() and "PENDING" not in states(copy, env=env).values()
    theirs = submitted_jobs(run, env)
    assert afterok_json("cancel", copy, env=env)["cancelled"] == []
    afterok("submit", pipeline, slow, "--run", copy, env=env)
    mine = submitted_jobs(copy, env)
    assert len(mine) == len(theirs) == 3 and not set(mine) & set(theirs)
    assert submitted_jobs(run, env) == theirs and states(run, env=env)["numbers"] == "RUNNING"
    afterok("cancel", copy, env=env)
    wait_for("the copy's jobs to end", lambda: not submitted_jobs(copy, env))
    assert submitted_jobs(run, env) == theirs
    copy.rename(tmp_path / "moved")  # the original is gone: a run that was moved keeps its jobs
    run.rename(tmp_path / "away")
    assert states(tmp_path / "away", env=env)["numbers"] == "RUNNING"
    afterok("cancel", tmp_path / "away", env=env)
