"""`why` names the class, shows the evidence and says what to do: recorded words, local processes, a real Slurm."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest

from jobs.artifacts.owner import Owner
from jobs.artifacts.run_folder import Outcome, RunFolder
from jobs.retry import Cause
from launchers.causes.diagnosis import classify
from launchers.causes.evidence import Evidence
from launchers.causes.log_lines import first_dead_task, tracebacks
from launchers.causes.traces import log_tail
from slurm.client import Slurm
from slurm.printed import AccountingRow, parse_job_row, parse_seconds
from tests.command import afterok, afterok_json, states, wait_for

# -- recorded words ------------------------------------------------------------------------------------------------

HELLO = "sft[0] attempt 1, key 0123456789abcdef, 2 rank(s) on n1\n"

TORCH_OOM = (
    HELLO
    + """Traceback (most recent call last):
  File "/runs/a/submissions/1/code/jobs/worker.py", line 97, in work
    code, message = self._work()
  File "/runs/a/submissions/1/code/megatron_ext/training/loop.py", line 212, in step
    loss = self.model(batch)
  File "/venv/lib/python3.11/site-packages/torch/nn/modules/module.py", line 1773, in _wrapped_call_impl
    return self._call_impl(*args, **kwargs)
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.2 GiB is free.
afterok: sft[0]: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB
"""
)
NCCL = (
    HELLO
    + """[rank3]:[E1121 01:40:37.001 ProcessGroupNCCL.cpp:632] [Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=184, OpType=ALLREDUCE, NumelIn=1048576, NumelOut=1048576, Timeout(ms)=600000) ran for 600029 milliseconds before timing out.
[rank3]:[E1121 01:40:37.100 ProcessGroupNCCL.cpp:2271] [PG ID 0 PG GUID 0(default_pg) Rank 3] failure detected by watchdog at work sequence id: 184
terminate called after throwing an instance of 'c10::DistBackendError'
srun: error: n1: task 3: Aborted (core dumped)
"""
)
GLOO_WAIT = (
    HELLO
    + """Traceback (most recent call last):
  File "/code/megatron_ext/training/loop.py", line 90, in reduced
    dist.all_reduce(values)
RuntimeError: [../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete
"""
)
GLOO_PEER = (
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer [10.0.0.2]:40122"
)
GLOO_AND_ROOT = (
    HELLO
    + f"""Traceback (most recent call last):
  File "/code/megatron_ext/training/loop.py", line 90, in reduced
    dist.all_reduce(values)
{GLOO_PEER}
Traceback (most recent call last):
  File "/code/data_tools/packs/pack.py", line 41, in pack
    raise ValueError("pack 9 has 0 tokens")
ValueError: pack 9 has 0 tokens
"""
)
GLOO_AND_KILLED = (
    HELLO
    + f"""srun: error: n2: task 1: Killed
Traceback (most recent call last):
  File "/code/megatron_ext/training/loop.py", line 90, in reduced
    dist.all_reduce(values)
{GLOO_PEER}
srun: error: n1: task 0: Exited with exit code 1
"""
)
STEPD = (
    "slurmstepd-n1: error: *** JOB 3 ON n1 CANCELLED AT 2026-11-21T01:41:06 {} ***\n"
    "srun: error: n1: task 0: Terminated\n"
)
CGROUP_OOM = (
    HELLO + "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed.\n"
    "srun: error: n1: task 0: Out Of Memory\n"
)
OVER_MEMORY = (
    HELLO + "slurmstepd: error: Exceeded job memory limit\n"
    "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-21T01:41:06 ***\n"
)


def failed(message, code=1, state="failed"):
    return Outcome(0, 1, 0, state, code, message, "n1", "3", 1.0, 2.0)


def row(state="FAILED", code=1, number=0, nodes="n1"):
    return AccountingRow("3", "3", "x", state, code, number, 60, nodes)


CASES = {
    "GPU OOM, worker spoke": (
        dict(log=TORCH_OOM, outcome=failed("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")),
        Cause.GPU_MEMORY,
        "Tried to allocate 2.00 GiB",
    ),
    "GPU OOM, only the log": (dict(log=TORCH_OOM, state="UNKNOWN"), Cause.GPU_MEMORY, "79.10 GiB"),
    "NCCL watchdog": (dict(log=NCCL, exit_code=134), Cause.COLLECTIVE, "OpType=ALLREDUCE"),
    "gloo waited": (
        dict(log=GLOO_WAIT, outcome=failed(GLOO_WAIT.splitlines()[-1])),
        Cause.COLLECTIVE,
        "Timed out waiting 1800000ms",
    ),
    "gloo peer gone": (dict(outcome=failed(GLOO_PEER)), Cause.COLLECTIVE, "Connection closed by peer"),
    "a peer's exception behind it": (
        dict(log=GLOO_AND_ROOT, outcome=failed(GLOO_PEER)),
        Cause.CODE,
        "pack 9 has 0 tokens",
    ),
    "a peer's death behind it": (
        dict(log=GLOO_AND_KILLED, outcome=failed(GLOO_PEER)),
        Cause.HOST_MEMORY,
        "n2: task 1: Killed",
    ),
    "time limit in the queue": (
        dict(state="TIMEOUT", reason="TimeLimit", asked_minutes=240),
        Cause.TIME_LIMIT,
        "TIMEOUT",
    ),
    "time limit in the log": (
        dict(state="UNKNOWN", log=STEPD.format("DUE TO TIME LIMIT")),
        Cause.TIME_LIMIT,
        "DUE TO TIME LIMIT",
    ),
    "preempted": (dict(state="PREEMPTED"), Cause.PREEMPTED, "PREEMPTED"),
    "preempted in the log": (
        dict(state="UNKNOWN", log=STEPD.format("DUE TO PREEMPTION")),
        Cause.PREEMPTED,
        "DUE TO PREEMPTION",
    ),
    "node": (dict(state="NODE_FAIL", log="srun: error: Node failure on n2\n"), Cause.NODE, "Node failure on n2"),
    "node in accounting": (
        dict(state="NODE_FAIL", row=row("NODE_FAIL", nodes="n[1-2]"), down_nodes=("n2",)),
        Cause.NODE,
        "NODE_FAIL",
    ),
    "cgroup OOM": (dict(log=CGROUP_OOM, state="OUT_OF_MEMORY", asked_memory="8192M"), Cause.HOST_MEMORY, "oom_kill"),
    "OverMemoryKill": (dict(log=OVER_MEMORY, row=row("FAILED", 0, 9)), Cause.HOST_MEMORY, "Exceeded job memory limit"),
    "0:9 and no word": (dict(row=row("FAILED", 0, 9), reason="JobLaunchFailure"), Cause.HOST_MEMORY, "0:9"),
    "137 and no word": (dict(exit_code=137, on_slurm=False), Cause.HOST_MEMORY, "137"),
    "MemoryError": (dict(outcome=failed("MemoryError: Unable to allocate 7.45 GiB")), Cause.HOST_MEMORY, "7.45 GiB"),
    "crash": (
        dict(exit_code=139, log="srun: error: n1: task 0: Segmentation fault\n"),
        Cause.CODE,
        "Segmentation fault",
    ),
    "exception": (dict(outcome=failed("KeyError: 'text'")), Cause.CODE, "KeyError: 'text'"),
    "mistake": (dict(outcome=failed("row 7 is empty; remove it", 2, "mistake")), Cause.MISTAKE, "row 7"),
    "lease": (
        dict(outcome=failed("element 0000 is worked on by process 7 on n1", 3, "skipped")),
        Cause.LEASE_HELD,
        "process 7 on n1",
    ),
    "no input": (dict(outcome=failed("needs pack, which has no seal at /x", 4)), Cause.NO_INPUT, "needs pack"),
    "no log folder": (dict(row=row("FAILED", 0, 53)), Cause.NO_LOG_FOLDER, "0:53"),
    "cancelled": (dict(state="CANCELLED"), Cause.CANCELLED, "not by afterok"),
    "lost": (dict(state="UNKNOWN", job="12"), Cause.LOST, "job 12 wrote no log"),
    "completed without a seal": (dict(reason="ended without a seal", log=HELLO), Cause.LOST, "attempt 1"),
    "stopped, and not started again": (
        dict(outcome=failed("stopped after a durable checkpoint at step 40 of 100; no progress", 5, "stopped")),
        Cause.STOPPED,
        "step 40 of 100",
    ),
    "stopped by the time limit": (
        dict(state="TIMEOUT", outcome=failed("stopped after a durable checkpoint at step 40", 5, "stopped")),
        Cause.TIME_LIMIT,
        "TIMEOUT",
    ),
    "stopped, to start again": (
        dict(state="PENDING", reason="BeginTime", outcome=failed("stopped at step 40", 5, "stopped")),
        Cause.WAITING,
        "step 40",
    ),
    "driver": (
        dict(reason="the local driver is gone (killed, or a reboot)", on_slurm=False),
        Cause.DRIVER_GONE,
        "gone",
    ),
    "script failed first": (
        dict(exit_code=1, log="module: command not found\n"),
        Cause.UNKNOWN,
        "module: command not found",
    ),
    "upstream": (
        dict(state="PENDING", reason="DependencyNeverSatisfied", upstream=("sft",)),
        Cause.UPSTREAM,
        "DependencyNeverSatisfied",
    ),
    "over the partition": (
        dict(state="PENDING", reason="PartitionTimeLimit"),
        Cause.NEVER_STARTS,
        "PartitionTimeLimit",
    ),
    "over the QOS": (dict(state="PENDING", reason="QOSMaxGRESPerJob"), Cause.NEVER_STARTS, "QOSMaxGRESPerJob"),
    "at the user's limit": (
        dict(state="PENDING", reason="QOSMaxJobsPerUserLimit"),
        Cause.WAITING,
        "QOSMaxJobsPerUserLimit",
    ),
    "busy": (dict(state="PENDING", reason="Resources"), Cause.WAITING, "Resources"),
    "queue": (dict(state="PENDING", reason="Priority"), Cause.WAITING, "Priority"),
    "requeued": (
        dict(state="PENDING", reason="BeginTime", log=STEPD.format("DUE TO PREEMPTION")),
        Cause.WAITING,
        "PREEMPTION",
    ),
    "held after requeues": (dict(state="PENDING", reason="JobHoldMaxRequeue"), Cause.NEVER_STARTS, "JobHoldMaxRequeue"),
    "runs": (dict(state="RUNNING"), Cause.WAITING, "RUNNING"),
}


@pytest.mark.parametrize("name", CASES)
def test_recorded_evidence_is_classified(name):
    known, cause, shown = CASES[name]
    found = classify(Evidence("sft", **known))
    assert found.cause is cause, found
    assert shown in found.evidence and found.remedy, found


def test_the_one_guilty_node_is_named_and_two_suspects_are_not():
    assert classify(Evidence("sft", **CASES["node"][0])).node == "n2"
    assert classify(Evidence("sft", **CASES["node in accounting"][0])).node == "n2"
    both = Evidence("sft", state="NODE_FAIL", row=row("NODE_FAIL", nodes="n[1-2]"), down_nodes=("n1", "n2"))
    assert classify(both).node == "" and "n[1-2]" in classify(both).what


def test_the_exceptions_place_is_ours_not_a_librarys():
    found = tracebacks(TORCH_OOM)
    assert [block.place for block in found] == ["megatron_ext/training/loop.py:212"]
    chained = (
        TORCH_OOM
        + "\nThe above exception was the direct cause of the following exception:\n\n"
        + GLOO_WAIT.partition("\n")[2]
    )
    assert [block.error[:12] for block in tracebacks(chained)] == ["RuntimeError"]
    assert len(tracebacks("\n".join("[rank1]: " + line for line in GLOO_AND_ROOT.splitlines()))) == 2


def test_a_requeued_jobs_earlier_life_is_not_its_evidence(tmp_path):
    log = tmp_path / "a1.0.out"
    log.write_text(HELLO + STEPD.format("DUE TO PREEMPTION") + HELLO + "ValueError: second life\n")
    assert log_tail(log, "sft", 0) == HELLO + "ValueError: second life\n"
    assert log_tail(tmp_path / "none", "sft", 0) == ""


def test_the_rank_that_died_first_counts_not_those_that_srun_then_killed():
    log = "srun: error: n2: task 5: Exited with exit code 1\nsrun: error: n1: task 0: Killed\n"
    assert first_dead_task(log)[1] == "n2"
    assert classify(Evidence("sft", log=log, exit_code=1)).cause is not Cause.HOST_MEMORY


def test_what_is_only_likely_says_so():
    assert not classify(Evidence("sft", exit_code=137)).certain
    assert classify(Evidence("sft", log=CGROUP_OOM, exit_code=137)).certain


def test_scontrols_job_reads_like_accountings():
    line = (
        "JobId=15 ArrayJobId=12 ArrayTaskId=3 JobName=toy.numbers.a1.x UserId=root(0) JobState=FAILED "
        "Reason=NonZeroExitCode Requeue=1 Restarts=0 ExitCode=0:53 RunTime=1-00:01:05 TimeLimit=00:10:00 "
        "ReqNodeList=(null) NodeList=n[1-2] NumNodes=2"
    )
    assert parse_job_row(line) == AccountingRow("12_3", "15", "toy.numbers.a1.x", "FAILED", 0, 53, 86465, "n[1-2]")
    assert parse_job_row("JobId=7 JobName=x JobState=PENDING ExitCode=0:0 NodeList=(null)").job_id == "7"
    assert parse_seconds("00:01:30") == 90


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


@pytest.mark.soak
def test_twelve_failures_on_slurm_have_their_twelve_classes(tmp_path, dev_cluster):
    run, env, slurm = tmp_path / "run", dev_cluster.env(), Slurm(dev_cluster.env())
    pipeline = pipeline_of(
        tmp_path,
        {
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
        },
    )
    jobs = afterok_json("submit", pipeline, "--run", run, env=env)["jobs"]

    def scontrol(*words):
        subprocess.run(["scontrol", *words], env=env, check=True)

    shutil.rmtree(run / "no_log" / "logs")
    scontrol("update", "partitionname=long", "maxtime=60")
    scontrol("hold", jobs["held"], jobs["robbed"])
    scontrol("update", "partitionname=preempt", "preemptmode=cancel")
    log = {phase: RunFolder(run).log_path(phase, 1, 0) for phase in jobs}
    wait_for("stock", lambda: list(run.glob("stock/*/seal.json")))
    next(run.glob("stock/*/seal.json")).unlink()
    scontrol("release", jobs["robbed"])
    for phase in ("overtime", "scancelled", "preempted", "node"):
        wait_for(f"{phase} to sleep", lambda: log[phase].exists() and "sleeping" in log[phase].read_text())
    scontrol("update", f"jobid={jobs['overtime']}", "timelimit=0")
    slurm.cancel([jobs["scancelled"]])
    where = {row.job_id: row.nodelist for row in slurm.queue()}
    slurm.sbatch([f"--nodelist={where[jobs['preempted']]}", "--exclusive", "--output=/dev/null", "--wrap=true"])
    scontrol("update", f"jobid={jobs['node']}", "requeue=0")
    first, last = Slurm(env).run(["scontrol", "show", "hostnames", where[jobs["node"]]]).split()
    dev_cluster.kill_daemon(last, signal.SIGKILL)
    expected = {
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
    assert len(set(expected.values())) == 14  # twelve classes of failures and two of what follows from them
    deadline = time.monotonic() + 60  # a time limit and a dead node take Slurm about 25 s to notice
    while causes(report := afterok_json("why", run, env=env)) != expected and time.monotonic() < deadline:
        time.sleep(3)
    assert causes(report) == expected, report
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
        **expected,
        "no_log": "lost",
        "too_long": "lost",
        "held": "lost",
        "after": "lost",
        "later": "lost",
    }
    assert "COMPLETED" not in {state for phase, state in states(run, env=blind).items() if phase != "gate"}
    afterok("cancel", run, env=env)
    dev_cluster.start_daemon(last)
