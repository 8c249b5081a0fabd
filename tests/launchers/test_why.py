"""`why` names the class, shows the evidence and says what to do: local processes, and a real Slurm."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest

from jobs.artifacts.owner import Owner
from jobs.artifacts.run_folder import RunFolder
from slurm.client import Slurm
from tests.command import afterok, afterok_json, states, wait_for

# -- local processes -----------------------------------------------------------------------------------------------


def causes(report):
    return {finding["phase"]: finding["cause"] for finding in report["findings"]}


def pipeline_of(folder, phases):
    path = folder / "trouble.yaml"
    path.write_text(json.dumps({"name": "trouble", "phases": phases}))
    return path


def trouble(how, **more):
    return {"uses": "tests.toy.trouble", "with": {"how": how}, **more}


def test_each_local_failure_has_its_class_and_one_sentence(tmp_path):
    run = tmp_path / "run"
    pipeline = pipeline_of(
        tmp_path,
        {
            "slow": {"uses": "tests.toy.numbers", "with": {"gate": str(tmp_path / "gate")}},
            "numbers": {"uses": "tests.toy.numbers", "array": 2, "with": {"start": 3}},
            "parted": {"uses": "tests.toy.numbers", "array": 2, "with": {"start": 9, "fail_at": 1}},
            "leased": trouble(""),
            "robbed": {"uses": "tests.toy.total", "with": {"numbers": "${phases.numbers.out}"}, "needs": ["slow"]},
            **{
                how.replace(" ", "_"): trouble(how)
                for how in ("exception", "mistake", "memory", "gpu memory", "killed", "crash", "hang")
            },
            "after": {"uses": "tests.toy.numbers", "with": {"start": 5}, "needs": ["exception"]},
        },
    )
    key = {phase["phase"]: phase["key"] for phase in afterok_json("plan", pipeline, "--run", run)["phases"]}
    leases = run / "leased" / key["leased"] / "leases"
    leases.mkdir(parents=True)
    (leases / "0000.a1.r0.g0").write_text(json.dumps(Owner.me(1, 0).__dict__))  # this process works on it, and lives
    afterok("submit", pipeline, "--run", run)
    seal = run / "numbers" / key["numbers"] / "seal.json"
    wait_for("numbers", seal.exists)
    seal.unlink()
    (tmp_path / "gate").touch()
    wait_for("the end", lambda: not afterok_json("status", run)["active"])
    report = afterok_json("why", run)
    assert (
        causes(report)
        == {
            "numbers": "lost",
            "parted": "python exception",
            "leased": "lease held by another",
            "robbed": "missing input",
            "exception": "python exception",
            "mistake": "user mistake",
            "memory": "out of host memory",
            "gpu_memory": "out of GPU memory",
            "killed": "out of host memory",
            "crash": "python exception",
            "hang": "no progress",
            "after": "upstream not sealed",
        }
        and not report["healthy"]
    )
    text = afterok("why", run).stdout.splitlines()
    assert len(text) == 1 + len(report["findings"]), text
    one = {line.split()[0]: line for line in text[1:]}
    assert "tests/toy/trouble.py:" in one["exception"] and "ValueError: row 7 has 3 columns, not 4" in one["exception"]
    assert "it needs exception," in one["after"] and "SIGSEGV" in one["crash"] and "exit code 137" in one["killed"]
    assert "parted[1]" in one and f"process {os.getpid()}" in one["leased"]
    assert list(causes(afterok_json("why", run, "killed"))) == ["killed"]
    assert "did you mean killed?" in afterok("why", run, "kiled", check=2).stderr


def test_a_healthy_run_says_so_while_it_runs_and_when_it_is_done(tmp_path):
    run = tmp_path / "run"
    pipeline = pipeline_of(
        tmp_path,
        {
            "first": {"uses": "tests.toy.numbers", "with": {"gate": str(tmp_path / "gate")}},
            "second": {"uses": "tests.toy.numbers", "with": {"start": 1}, "needs": ["first"]},
        },
    )
    afterok("submit", pipeline, "--run", run)
    during = afterok_json("why", run)
    assert during["healthy"] and set(causes(during).values()) == {"waiting"}, during
    assert "the rest is under way" in during["headline"]
    (tmp_path / "gate").touch()
    wait_for("the end", lambda: afterok_json("status", run)["finished"])
    assert afterok("why", run).stdout == f"{run}: nothing is wrong: all 2 phases are sealed\n"


def test_a_dead_driver_and_a_cancelled_run_are_told_apart(tmp_path):
    run = tmp_path / "run"
    pipeline = pipeline_of(tmp_path, {"nap": trouble("sleep"), "after": trouble("", needs=["nap"])})
    afterok("submit", pipeline, "--run", run)
    wait_for("the nap", lambda: states(run)["nap"] == "RUNNING")
    os.kill(json.loads((run / "local/1/state.json").read_text())["driver"]["pid"], signal.SIGKILL)
    wait_for("the end", lambda: not afterok_json("status", run)["active"])
    assert causes(afterok_json("why", run))["nap"] == "local driver gone"
    afterok("submit", pipeline, "--run", run)
    wait_for("the nap", lambda: states(run)["nap"] == "RUNNING")
    afterok("cancel", run)
    wait_for("the end", lambda: not afterok_json("status", run)["active"])
    nap = next(f for f in afterok_json("why", run)["findings"] if f["phase"] == "nap")
    assert nap["cause"] == "cancelled" and "`afterok cancel` at 20" in nap["evidence"]


# -- a real Slurm --------------------------------------------------------------------------------------------------


TROUBLE_ON_SLURM = {
    "gate": {"uses": "tests.toy.numbers", "with": {"seconds": 4}},
    "exception": trouble("exception"),
    "mistake": trouble("mistake"),
    "killed": trouble("killed"),
    "gpu_memory": trouble("gpu memory"),
    "collective": trouble("collective", resources={"ranks_per_node": 2}),
    "stock": {"uses": "tests.toy.numbers", "with": {"start": 7}},
    "robbed": {"uses": "tests.toy.total", "with": {"numbers": "${phases.stock.out}"}},
    "overtime": trouble("sleep"),
    "scancelled": trouble("sleep"),
    "preempted": trouble("sleep", resources={"partition": "preempt", "cpus_per_task": 64}),
    "node": trouble("sleep", resources={"nodes": 2}),
    "no_log": trouble("", needs=["gate"]),
    "held": trouble("", needs=["gate"]),
    "too_long": trouble("", needs=["gate"], resources={"partition": "long"}),
    "after": trouble("", needs=["exception"]),
    "later": trouble("", needs=["after"]),
}
# Twelve classes of failures, and two of what follows from them.
CAUSES_ON_SLURM = {
    "exception": "python exception",
    "mistake": "user mistake",
    "killed": "out of host memory",
    "gpu_memory": "out of GPU memory",
    "collective": "collective time-out",
    "robbed": "missing input",
    "overtime": "time limit",
    "scancelled": "cancelled",
    "preempted": "preempted",
    "node": "node failure",
    "no_log": "log folder missing",
    "too_long": "cannot start",
    "held": "cannot start",
    "after": "upstream not sealed",
    "later": "upstream not sealed",
    "stock": "lost",
}


@pytest.mark.soak
def test_twelve_failures_on_slurm_have_their_twelve_classes(tmp_path, dev_cluster):
    assert len(set(CAUSES_ON_SLURM.values())) == 14
    run, env, slurm = tmp_path / "run", dev_cluster.env(), Slurm(dev_cluster.env())
    pipeline = pipeline_of(tmp_path, TROUBLE_ON_SLURM)
    jobs = afterok_json("submit", pipeline, "--run", run, env=env)["jobs"]

    def scontrol(*words):
        subprocess.run(["scontrol", *words], env=env, check=True)

    shutil.rmtree(run / "no_log" / "logs")
    scontrol("update", "partitionname=long", "maxtime=60")
    scontrol("hold", jobs["held"], jobs["robbed"])
    scontrol("update", "partitionname=preempt", "preemptmode=cancel")
    wait_for("stock", lambda: list(run.glob("stock/*/seal.json")))
    next(run.glob("stock/*/seal.json")).unlink()
    scontrol("release", jobs["robbed"])
    for phase in ("overtime", "scancelled", "preempted", "node"):
        log = RunFolder(run).log_path(phase, 1, 0)
        wait_for(f"{phase} to sleep", lambda log=log: log.exists() and "sleeping" in log.read_text())
    scontrol("update", f"jobid={jobs['overtime']}", "timelimit=0")
    slurm.cancel([jobs["scancelled"]])
    where = {row.job_id: row.nodelist for row in slurm.queue()}
    slurm.sbatch([f"--nodelist={where[jobs['preempted']]}", "--exclusive", "--output=/dev/null", "--wrap=true"])
    scontrol("update", f"jobid={jobs['node']}", "requeue=0")
    first, last = Slurm(env).run(["scontrol", "show", "hostnames", where[jobs["node"]]]).split()
    dev_cluster.kill_daemon(last, signal.SIGKILL)
    deadline = time.monotonic() + 60  # a time limit and a dead node take Slurm about 25 s to notice
    while causes(report := afterok_json("why", run, env=env)) != CAUSES_ON_SLURM and time.monotonic() < deadline:
        time.sleep(3)
    assert causes(report) == CAUSES_ON_SLURM, report
    found = {finding["phase"]: finding for finding in report["findings"]}
    assert found["node"]["node"] == last
    assert "PartitionTimeLimit" in found["too_long"]["sentence"] and "0:53" in found["no_log"]["sentence"]
    assert "it needs exception," in found["later"]["sentence"] and "4:00:00 time limit" in found["overtime"]["sentence"]

    # Slurm forgets ended jobs after MinJobAge: the run's files still tell most of it, and nothing reads as done.
    forgetful = tmp_path / "bin"
    forgetful.mkdir()
    (forgetful / "squeue").write_text("#!/bin/sh\nexit 0\n")
    (forgetful / "squeue").chmod(0o755)
    blind = env | {"PATH": f"{forgetful}:{env['PATH']}"}
    assert causes(afterok_json("why", run, env=blind)) == {
        **CAUSES_ON_SLURM,
        "no_log": "lost",
        "too_long": "lost",
        "held": "lost",
        "after": "lost",
        "later": "lost",
    }
    assert "COMPLETED" not in {state for phase, state in states(run, env=blind).items() if phase != "gate"}
    afterok("cancel", run, env=env)
    dev_cluster.start_daemon(last)
