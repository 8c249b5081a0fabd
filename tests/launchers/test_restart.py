"""What no worker can speak of (killed, a lost node) is read from other evidence and repeated within its budget."""

import signal
import time

import pytest

from jobs.artifacts.run_folder import RunFolder
from launchers.planning.ledger import Ledger
from slurm.client import Slurm
from slurm.dev import cluster as devcluster
from tests.cluster import crash_node, require_packages, rows_of
from tests.command import afterok, afterok_json, phase_status, states, wait_for

TROUBLE = """
name: trouble
phases:
  killed: {uses: tests.toy.trouble, with: {how: killed}}
  error: {uses: tests.toy.trouble, with: {how: exception}}
"""
COUNTER = """
name: lost
phases:
  counter: {uses: tests.toy.counter, with: {steps: 40, seconds: 0.1, every: 5}}
  total: {uses: tests.toy.total, with: {numbers: "${phases.counter.out}"}}
"""


def jobs_of(run):
    return {entry.phase: entry.job for entry in Ledger(run / "ledger.jsonl").jobs()}


def causes(run, phase):
    return [(outcome.restart, outcome.cause, outcome.node) for outcome in RunFolder(run).outcomes(phase)]


def test_a_killed_worker_is_started_once_more_under_its_job_id_and_an_exception_never(tmp_path, dev_cluster):
    run, env, slurm = tmp_path / "run", dev_cluster.env(), Slurm(dev_cluster.env())
    (tmp_path / "t.yaml").write_text(TROUBLE)
    jobs = afterok_json("submit", tmp_path / "t.yaml", "--run", run, env=env)["jobs"]
    wait_for("both ends", lambda: set(states(run, env=env).values()) == {"FAILED"})
    assert {phase: slurm.job(job)["Restarts"] for phase, job in jobs.items()} == {"killed": "1", "error": "0"}
    assert causes(run, "killed") == [(0, "unknown", ""), (1, "unknown", "")]
    log = next(run.glob("killed/logs/*.out")).read_text()
    assert "restart 0: unknown: restart 1 of 1" in log and "restart 1: unknown, after 1 of 1 restarts" in log
    found = {finding["phase"]: finding["cause"] for finding in afterok_json("why", run, env=env)["findings"]}
    assert found == {"killed": "out of host memory", "error": "python exception"}  # `why` names the likeliest


@pytest.fixture
def quick_to_miss(short_folder):
    """A cluster that gives a node up after a few seconds of silence."""
    require_packages()
    return devcluster.up(short_folder, nodes=3, settings={"SlurmdTimeout": "3"})


@pytest.mark.soak  # half a minute: Slurm takes its time to give a node up
def test_the_node_that_failed_and_no_other_is_excluded_from_the_next_start(tmp_path, quick_to_miss):
    run, env, slurm = tmp_path / "run", quick_to_miss.env(), Slurm(quick_to_miss.env())
    (tmp_path / "c.yaml").write_text(COUNTER)
    afterok("submit", tmp_path / "c.yaml", "counter.with.steps=400", "counter.resources.nodes=2", "--run", run, env=env)
    job = jobs_of(run)["counter"]
    wait_for("its start", lambda: list(run.glob("counter/*/progress/0000.json")))
    guilty = "n2"  # not the batch host: the job's other node
    assert rows_of(slurm, job)[0].nodelist == "n[1-2]"
    crash_node(quick_to_miss, guilty)
    wait_for("its restart", lambda: causes(run, "counter") and rows_of(slurm, job)[0].state == "RUNNING", 120)
    assert causes(run, "counter") == [(0, "node failure", guilty)]
    quick_to_miss.start_daemon(guilty)
    wait_for("the node to be back", lambda: slurm.node_states()[guilty] == "idle")
    before = rows_of(slurm, job)[0].nodelist
    wait_for("steps", lambda: list(run.glob("counter/*/leases/0000.a1.r1.*")))
    slurm.run(["scancel", "--signal=USR2", job])
    wait_for("the next start", lambda: slurm.job(job)["Restarts"] == "2" and rows_of(slurm, job)[0].state == "RUNNING")
    assert slurm.job(job)["ExcNodeList"] == guilty and rows_of(slurm, job)[0].nodelist == before == "n[1,3]"
    assert phase_status(run, "counter", env=env)["state"] == "RUNNING"
    afterok("cancel", run, env=env)


@pytest.mark.soak
def test_a_step_that_slurm_could_not_launch_begins_again(tmp_path, dev_cluster):
    """Its slurmd looks at the credential when that has expired: srun ran nothing, and exits with an errno of Slurm."""
    run, env, slurm, gate = tmp_path / "run", dev_cluster.env(), Slurm(dev_cluster.env()), tmp_path / "gate"
    (tmp_path / "c.yaml").write_text(COUNTER)
    setup = f"cluster.env.setup=['until [ -e {gate} ]; do sleep 0.1; done']"
    job = afterok_json("submit", tmp_path / "c.yaml", setup, "--run", run, env=env)["jobs"]["counter"]
    wait_for("its batch script", lambda: list(run.glob("counter/logs/*.out")))
    node = rows_of(slurm, job)[0].nodelist
    dev_cluster.kill_daemon(node, signal.SIGSTOP)
    try:
        gate.touch()
        wait_for("its step's credential", lambda: f"{job}.0" in slurm.run(["squeue", "--steps", "--noheader"]))
        time.sleep(7)  # past slurm.conf's cred_expire
    finally:
        dev_cluster.kill_daemon(node, signal.SIGCONT)
    wait_for("its seal", lambda: list(run.glob("total/*/seal.json")))
    assert causes(run, "counter") == [(0, "node failure", node), (1, "", "")]
    assert slurm.job(job)["Restarts"] == "1" and slurm.job(job)["ExcNodeList"] == node
