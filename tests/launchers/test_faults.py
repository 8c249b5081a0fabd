"""The fault matrix: whatever breaks, every element is sealed exactly once, or the run says what is missing and goes on.

| what breaks | test |
|---|---|
| submitter killed between any two calls | test_submission: a_submitter_killed_between_any_two_calls_… |
| slurmctld killed right after a submit | test_submission: a_controller_killed_right_after_the_submit_… |
| … and its ids given to other jobs | here: ids_that_somebody_else_has_now_… |
| sbatch times out though it was accepted | test_submission: an_sbatch_with_an_open_outcome_… |
| dependent sent after its parent was purged | here: a_dependent_sent_after_its_parent_was_purged_… |
| failed parent | test_resubmit; test_slurm: a_failed_element_leaves_its_dependents_waiting_… |
| failed parent, kill_invalid_depend | here: a_cluster_that_kills_invalid_dependents_… |
| partial array failure | test_resubmit: only_the_named_elements_…, aftercorr_partners_… |
| preemption, REQUEUE | test_survive: a_preempted_job_stops_at_a_checkpoint_… |
| time limit | test_survive: near_its_time_limit_…; here, at a real limit: the_signal_before_a_real_time_limit_… |
| node crash; a node that is only cut off | here: a_lost_node_…; test_restart: the_node_that_failed_and_no_other_… |
| drain | here: drained_nodes_… |
| slurmdbd down, and absent | test_status: status_and_why_with_slurmdbd_…; all other tests run without one |
| slurmctld down for 30 s during a submit | test_submission: a_controller_down_during_a_submit_… |
| MaxArraySize exceeded | test_arrays: elements_beyond_the_array_limit_… |
| log folder missing | here: a_missing_log_folder_… |
| submission inside a job | test_slurm: submitting_from_inside_a_job_… |
| code edited between submit and run | here: code_edited_after_the_submit_… |
| held job | here: a_held_job_… |
| suspended job | here: a_suspended_job_… |
| two workers by hand for one element | here: of_two_workers_for_one_element_… |
| filesystem full, read-only, torn, without locks; clocks | tests/jobs/test_hardened |
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.artifacts.owner import process_start
from jobs.artifacts.run_folder import RunFolder
from launchers.planning.ledger import Ledger
from slurm.client import Slurm
from slurm.dev import cluster as devcluster
from tests.cluster import bring_back, controller_forgets, crash_node, require_packages, rows_of
from tests.command import ROOT, afterok, afterok_json, phase_status, states, wait_for, write_toy


@pytest.fixture
def toy(tmp_path, dev_cluster):
    return write_toy(tmp_path), tmp_path / "run", dev_cluster.env(), Slurm(dev_cluster.env())


def pipeline_of(folder, **phases):
    path = folder / "faults.yaml"
    path.write_text(json.dumps({"name": "faults", "phases": phases}))
    return path


def jobs_of(run):
    return {entry.phase: entry.job for entry in Ledger(run / "ledger.jsonl").jobs()}


def finish(run, env, limit=90):
    wait_for("the end", lambda: set(states(run, env=env).values()) == {"COMPLETED"}, limit)


def assert_sealed_once(run):
    """Each phase has one seal, each element one, and one attempt at each says that it sealed it."""
    phases = RunFolder(run).frozen(RunFolder(run).newest_submission())
    for name, phase in phases.items():
        sealed = sorted(outcome.element for outcome in RunFolder(run).outcomes(name) if outcome.state == "sealed")
        assert sealed == list(range(phase.elements)), (name, sealed)
        assert len(list(run.glob(f"{name}/*/seal.json"))) == 1
        assert len(list(run.glob(f"{name}/*/seals/*.json"))) == (phase.elements if phase.fans_in else 0)


def contents(run):
    """All sealed bytes of a run."""
    return {path: path.read_bytes() for path in [*run.glob("*/*/work/**/*"), *run.glob("*/*/seal*/*.json"),
                                                 *run.glob("*/*/seal.json")] if path.is_file()}  # fmt: skip


def report(run, env):
    return {finding["phase"]: finding for finding in afterok_json("why", run, env=env)["findings"]}


# -- the controller -----------------------------------------------------------------------------------------------


def test_ids_that_somebody_else_has_now_are_not_taken_for_ours(tmp_path, short_folder):
    require_packages()
    cluster = devcluster.up(short_folder, nodes=2)
    env, slurm = cluster.env(), Slurm(cluster.env())
    pipeline, run = write_toy(tmp_path), tmp_path / "run"
    with controller_forgets(cluster):  # none of them started: test_submission has those that did
        slurm.run(["scontrol", "update", f"nodename={','.join(cluster.nodes)}", "state=drain", "reason=test"])
        afterok("submit", pipeline, "--run", run, "--waive", "P011", env=env)
    others = [slurm.sbatch(["--hold", "--job-name=foreign", "--output=/dev/null", "--wrap=true"]) for _ in range(3)]
    assert sorted(others) == sorted(jobs_of(run).values())
    assert set(states(run, env=env).values()) == {"UNKNOWN"}
    afterok("cancel", run, env=env)
    assert {rows_of(slurm, job)[0].state for job in others} == {"PENDING"}
    afterok("run", pipeline, "--run", run, env=env)
    assert_sealed_once(run)
    assert {rows_of(slurm, job)[0].reason for job in others} == {"JobHeldUser"}


@pytest.mark.soak
def test_a_dependent_sent_after_its_parent_was_purged_runs_nothing(tmp_path, short_folder):
    """Slurm takes a parent that it has forgotten for one that succeeded."""
    require_packages()
    cluster = devcluster.up(short_folder, nodes=1, settings={"MinJobAge": "2"})
    env, slurm, run = cluster.env(), Slurm(cluster.env()), tmp_path / "run"
    pipeline = pipeline_of(
        tmp_path,
        parent={"uses": "tests.toy.numbers", "with": {"seconds": 60}},
        child={"uses": "tests.toy.total", "with": {"numbers": "${phases.parent.out}"}},
    )
    afterok("submit", pipeline, "--run", run, env=env)
    parent = jobs_of(run)["parent"]
    afterok("cancel", run, "child", env=env)
    wait_for("the parent", lambda: states(run, env=env)["parent"] == "RUNNING")

    shim, asked, go = tmp_path / "bin/sbatch", tmp_path / "asked", tmp_path / "go"
    shim.parent.mkdir()
    real = subprocess.run(["which", "sbatch"], capture_output=True, text=True).stdout.strip()
    shim.write_text(f'#!/bin/bash\ntouch {asked}; until [ -e {go} ]; do sleep 0.1; done; exec {real} "$@"\n')
    shim.chmod(0o755)
    slow = {**os.environ, **env, "PATH": f"{shim.parent}:{os.environ['PATH']}"}
    submitter = subprocess.Popen(
        [sys.executable, "-m", "launchers.cli", "submit", str(pipeline), "--run", str(run)],
        cwd=ROOT,
        env=slow,
        stdout=subprocess.DEVNULL,
    )
    wait_for("sbatch", asked.exists)
    slurm.cancel([parent])
    wait_for("the purge", lambda: not rows_of(slurm, parent), 90)
    go.touch()
    assert submitter.wait(60) == 0
    wait_for("its end", lambda: RunFolder(run).outcomes("child"))
    wait_for("Slurm to notice", lambda: report(run, env)["child"]["cause"] != "waiting")
    assert report(run, env)["child"]["cause"] == "missing input" and not list(run.glob("*/*/seal.json"))
    assert "COMPLETED" not in states(run, env=env).values()
    afterok("run", pipeline, "parent.with.seconds=0.1", "--run", run, env=env)
    assert_sealed_once(run)


@pytest.mark.soak
def test_a_cluster_that_kills_invalid_dependents_loses_none(tmp_path, short_folder):
    require_packages()
    cluster = devcluster.up(short_folder, nodes=1, settings={"DependencyParameters": "kill_invalid_depend"})
    env, run, pipeline = cluster.env(), tmp_path / "run", write_toy(tmp_path)
    afterok("run", pipeline, "numbers.with.fail_at=1", "--run", run, env=env, check=1)
    wait_for("Slurm to have decided", lambda: not afterok_json("status", run, env=env)["active"])
    found = report(run, env)
    assert [found[phase]["cause"] for phase in ("numbers", "total", "again")] == [
        "python exception",
        "upstream not sealed",
        "upstream not sealed",
    ]
    afterok("resubmit", run, "numbers", "numbers.with.fail_at=null", env=env)
    finish(run, env)
    assert_sealed_once(run)


# -- nodes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["crashed", "cut off"])
def test_a_lost_node_costs_a_restart_elsewhere_and_its_late_twin_changes_nothing(tmp_path, dev_cluster, how):
    """A node that is only cut off goes on working for nobody: Slurm starts the element a second time elsewhere."""
    env, slurm, run = dev_cluster.env(), Slurm(dev_cluster.env()), tmp_path / "run"
    pipeline = pipeline_of(
        tmp_path,
        counter={"uses": "tests.toy.counter", "with": {"steps": 4, "gate": f"{run}.gate"}},
        total={"uses": "tests.toy.total", "with": {"numbers": "${phases.counter.out}"}},
    )
    afterok("submit", pipeline, "--run", run, env=env)
    first = wait_for("its lease", lambda: next(run.glob("counter/*/leases/*.r0.g0"), None))
    twin = json.loads(first.read_text())["pid"]
    job = jobs_of(run)["counter"]
    node = rows_of(slurm, job)[0].nodelist
    try:
        if how == "crashed":
            crash_node(dev_cluster, node)
        else:
            os.kill(twin, signal.SIGSTOP)  # until the second life has sealed: else it may be the first to
            dev_cluster.kill_daemon(node, signal.SIGKILL)
        slurm.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=crash"])  # as after SlurmdTimeout
        Path(f"{run}.gate").touch()
        finish(run, env)
        sealed = contents(run)
        if how == "cut off":
            os.kill(twin, signal.SIGCONT)
        wait_for("the end of the first life", lambda: process_start(twin) is None, 60)
        assert ("skipped" in {outcome.state for outcome in RunFolder(run).outcomes("counter")}) == (how == "cut off")
        assert contents(run) == sealed and afterok_json("why", run, env=env)["healthy"]
        # Slurm counts a launch of its own that failed too, as one does on a busy machine.
        assert jobs_of(run)["counter"] == job and int(slurm.job(job)["Restarts"]) >= 1
        assert len(list(run.glob("counter/*/leases/*"))) == 2
        assert_sealed_once(run)
    finally:
        bring_back(dev_cluster, node)


def test_drained_nodes_finish_what_runs_and_the_rest_waits_for_them(toy):
    pipeline, run, env, slurm = toy
    afterok("submit", pipeline, f"numbers.with.gate={run}.gate", "--run", run, env=env)
    wait_for("numbers to run", lambda: len(list(run.glob("numbers/*/leases/*"))) == 3)
    slurm.run(["scontrol", "update", "nodename=ALL", "state=drain", "reason=maintenance"])
    Path(f"{run}.gate").touch()
    try:
        wait_for("numbers", lambda: states(run, env=env)["numbers"] == "COMPLETED")
        wait_for("Slurm's reason", lambda: report(run, env)["total"]["what"].startswith("waits for nodes"))
        assert report(run, env)["total"]["cause"] == "waiting" and states(run, env=env)["total"] == "PENDING"
    finally:
        slurm.run(["scontrol", "update", "nodename=ALL", "state=resume"])
    finish(run, env)
    assert_sealed_once(run)


# -- a job --------------------------------------------------------------------------------------------------------


def test_a_held_job_is_reported_and_lets_its_dependents_go_even_if_its_phase_was_sealed_meanwhile(
    tmp_path, dev_cluster
):
    run, env, slurm = tmp_path / "run", dev_cluster.env(), Slurm(dev_cluster.env())
    counter = {"uses": "tests.toy.counter", "with": {"steps": 2}}
    log = tmp_path / "watch.log"
    slurm.run(["scontrol", "update", "nodename=ALL", "state=drain", "reason=test"])
    try:
        afterok(
            "submit",
            pipeline_of(tmp_path, parent=counter, child={**counter, "needs": ["parent"]}),
            "--run",
            run,
            "--waive",
            "P011",
            env=env,
        )
        watch = subprocess.Popen(
            [sys.executable, "-m", "launchers.cli", "status", str(run), "--watch"],
            cwd=ROOT,
            env={**os.environ, **env},
            stdout=log.open("w"),
        )
        wait_for("its first look", lambda: "parent: PENDING" in log.read_text())
        slurm.run(["scontrol", "uhold", jobs_of(run)["parent"]])
        said = wait_for(
            "the line", lambda: [line for line in log.read_text().splitlines() if "JobHeldUser" in line], 30
        )
        assert "parent: PENDING" in said[0] and "`afterok repair` releases" in said[0]
    finally:
        slurm.run(["scontrol", "update", "nodename=ALL", "state=resume"])
    by_hand = {**os.environ, **env, "PYTHONPATH": str(run / "submissions/1/code")}
    subprocess.run([sys.executable, "-m", "jobs.worker", str(run), "parent"], env=by_hand, check=True, timeout=60)
    assert states(run, env=env) == {"parent": "COMPLETED", "child": "PENDING"}
    assert "released" in afterok("repair", run, env=env).stdout
    assert watch.wait(60) == 0
    finish(run, env)
    assert_sealed_once(run)


def test_a_suspended_job_is_under_way_and_is_not_sent_again(toy):
    pipeline, run, env, slurm = toy
    slow = [f"again.with.gate={run}.gate", "--run", run]
    afterok("submit", pipeline, *slow, env=env)
    wait_for("again to run", lambda: states(run, env=env)["again"] == "RUNNING")
    job = jobs_of(run)["again"]
    slurm.run(["scontrol", "suspend", job])
    assert states(run, env=env)["again"] == "SUSPENDED" and afterok_json("why", run, env=env)["healthy"]
    done = afterok_json("submit", pipeline, *slow, env=env)
    assert done["jobs"] == {} and done["active"] == {"again": job}
    slurm.run(["scontrol", "resume", job])
    Path(f"{run}.gate").touch()
    finish(run, env)
    assert_sealed_once(run)


def test_a_missing_log_folder_is_named_and_the_next_submit_makes_it(toy):
    pipeline, run, env, _ = toy
    afterok("submit", pipeline, f"numbers.with.gate={run}.gate", "--run", run, env=env)
    (run / "total/logs").rmdir()
    Path(f"{run}.gate").touch()
    wait_for("the failure", lambda: states(run, env=env)["total"] == "FAILED")
    found = report(run, env)["total"]
    assert found["cause"] == "log folder missing" and str(run / "total/logs") in found["sentence"]
    afterok("run", pipeline, "--run", run, env=env)
    assert_sealed_once(run)


def test_code_edited_after_the_submit_does_not_run(tmp_path, dev_cluster):
    run, env, module = tmp_path / "run", dev_cluster.env(), tmp_path / "my_phases/spell.py"
    module.parent.mkdir()
    text = (
        "from dataclasses import dataclass\n@dataclass\nclass Config:\n    x: int = 0\n"
        "def run(config, task):\n    (task.out / 'a').write_text('a')\n    return {'said': 'first'}\n"
    )
    module.write_text(text)
    pipeline = pipeline_of(
        tmp_path,
        gate={"uses": "tests.toy.numbers", "with": {"gate": f"{run}.gate"}},
        spell={"uses": "my_phases.spell", "needs": ["gate"]},
    )
    command = [sys.executable, "-m", "launchers.cli", "submit", str(pipeline), "--run", str(run)]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **env, "PYTHONPATH": str(ROOT)}, check=True)
    module.write_text(text.replace("'first'", "'second'"))
    Path(f"{run}.gate").touch()
    finish(run, env)
    assert phase_status(run, "spell", env=env)["facts"] == {"said": "first"}
    assert_sealed_once(run)


@pytest.mark.soak
def test_of_two_workers_for_one_element_one_works_and_the_other_leaves(tmp_path, dev_cluster):
    run, env = tmp_path / "run", dev_cluster.env()
    pipeline = pipeline_of(tmp_path, counter={"uses": "tests.toy.counter", "with": {"steps": 4, "gate": f"{run}.gate"}})
    afterok("submit", pipeline, "--run", run, env=env)
    owner = json.loads(wait_for("its lease", lambda: next(run.glob("counter/*/leases/0000.*"), None)).read_text())[
        "pid"
    ]
    os.kill(owner, signal.SIGSTOP)
    command = [sys.executable, "-m", "jobs.worker", str(run), "counter"]
    code = {**os.environ, **env, "PYTHONPATH": str(run / "submissions/1/code")}
    twin = subprocess.run(command, env=code, capture_output=True, text=True, timeout=60)
    assert twin.returncode == 3 and "is worked on by process" in twin.stderr
    assert afterok_json("why", run, env=env)["healthy"]
    os.kill(owner, signal.SIGCONT)
    Path(f"{run}.gate").touch()
    finish(run, env)
    assert_sealed_once(run)
    sealed = contents(run)

    (again := next(run.glob("counter/*/seal.json"))).unlink()
    pair = [subprocess.Popen(command, env=code, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert sorted(worker.wait(60) for worker in pair) in ([0, 3], [0, 0])  # the second may come when all is done
    assert again.exists() and subprocess.run(command, env=code, timeout=60).returncode == 0
    assert len(contents(run)) == len(sealed)


@pytest.mark.soak
def test_the_signal_before_a_real_time_limit_ends_in_a_checkpoint_and_a_restart(tmp_path, dev_cluster):
    """sbatch --signal=USR2@90 in a job of two minutes: Slurm itself sends it, a minute and a half before the end."""
    run, env = tmp_path / "run", dev_cluster.env()
    pipeline = pipeline_of(
        tmp_path,
        counter={"uses": "tests.toy.counter", "with": {"steps": 900, "seconds": 0.1}, "resources": {"time": "2"}},
    )
    began = time.monotonic()
    afterok("submit", pipeline, "--run", run, env=env)
    finish(run, env, 400)
    ends = [outcome.state for outcome in RunFolder(run).outcomes("counter")]
    assert len(ends) > 1 and set(ends[:-1]) == {"stopped"} and ends[-1] == "sealed"
    assert time.monotonic() - began > 90
    assert_sealed_once(run)
