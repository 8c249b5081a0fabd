"""Recorded evidence of an end is given its cause: words of Slurm, PyTorch and NCCL, as they stood in logs."""

import pytest

from jobs.artifacts.run_folder import Outcome
from jobs.retry import Cause
from launchers.causes.diagnosis import classify
from launchers.causes.evidence import Evidence
from launchers.causes.log_lines import first_dead_task, tracebacks
from launchers.causes.traces import log_tail
from slurm.printed import AccountingRow, parse_job_row, parse_seconds

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
"""  # noqa: E501  (recorded word for word)
)
VLLM_ROOM = (
    HELLO
    + """(EngineCore pid=19359) ERROR 11-30 23:41:35 [core.py:1510] EngineCore failed to start.
(EngineCore pid=19359) ERROR 11-30 23:41:35 [core.py:1510] ValueError: To serve at least one request with the model's max seq len (8388608), (16.0 GiB KV cache is needed, which is larger than the available KV cache memory (1.0 GiB). Try increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU backend) or decreasing `max_model_len` when initializing the engine.
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}
"""  # noqa: E501  (the frame as it was seen, the message as kv_cache_utils.py has it)
)
NCCL = (
    HELLO
    + """[rank3]:[E1121 01:40:37.001 ProcessGroupNCCL.cpp:632] [Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=184, OpType=ALLREDUCE, NumelIn=1048576, NumelOut=1048576, Timeout(ms)=600000) ran for 600029 milliseconds before timing out.
[rank3]:[E1121 01:40:37.100 ProcessGroupNCCL.cpp:2271] [PG ID 0 PG GUID 0(default_pg) Rank 3] failure detected by watchdog at work sequence id: 184
terminate called after throwing an instance of 'c10::DistBackendError'
srun: error: n1: task 3: Aborted (core dumped)
"""  # noqa: E501  (recorded word for word)
)
GLOO_WAIT = (
    HELLO
    + """Traceback (most recent call last):
  File "/code/megatron_ext/training/loop.py", line 90, in reduced
    dist.all_reduce(values)
RuntimeError: [../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete
"""  # noqa: E501  (recorded word for word)
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
NOT_LAUNCHED = """srun: error: Task launch for StepId=1.0 failed on node n1: Job credential expired
srun: error: Application launch failed: Job credential expired
srun: Job step aborted
"""
CGROUP_OOM = (
    HELLO + "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed.\n"
    "srun: error: n1: task 0: Out Of Memory\n"
)
OVER_MEMORY = (
    HELLO + "slurmstepd: error: Exceeded job memory limit\n"
    "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-21T01:41:06 ***\n"
)


def failed(message, code=1, state="failed"):
    return Outcome(
        element=0,
        attempt=1,
        restart=0,
        state=state,
        exit_code=code,
        message=message,
        host="n1",
        job="3",
        started=1.0,
        ended=2.0,
    )


def row(state="FAILED", code=1, number=0, nodes="n1"):
    return AccountingRow(
        job_id="3",
        raw_id="3",
        name="x",
        state=state,
        exit_code=code,
        exit_signal=number,
        elapsed_s=60,
        nodelist=nodes,
    )


CASES = {
    "GPU OOM, worker spoke": (
        dict(log=TORCH_OOM, outcome=failed("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")),
        Cause.GPU_MEMORY,
        "Tried to allocate 2.00 GiB",
    ),
    "GPU OOM, only the log": (dict(log=TORCH_OOM, state="UNKNOWN"), Cause.GPU_MEMORY, "79.10 GiB"),
    "vLLM's engine has no room": (
        dict(log=VLLM_ROOM, outcome=failed("RuntimeError: Engine core initialization failed. See root cause above.")),
        Cause.GPU_MEMORY,
        "larger than the available KV cache memory",
    ),
    "NCCL watchdog": (dict(log=NCCL, exit_code=134), Cause.COLLECTIVE, "OpType=ALLREDUCE"),
    "engine died, worker spoke": (
        dict(outcome=failed("EngineDied: the sampling engine died: vLLM: EngineDeadError: EngineCore ...")),
        Cause.ENGINE,
        "EngineDeadError",
    ),
    "engine died, only the log": (
        dict(
            log='Traceback (most recent call last):\n  File "x.py", line 1, in f\n'
            "megatron_ext.foreign.vllm_engine.EngineDied: the sampling engine died: vLLM: EngineDeadError: gone\n"
        ),
        Cause.ENGINE,
        "EngineDeadError: gone",
    ),
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
    "launch": (  # the controller stood still while srun began; its exit code is Slurm's errno, no signal's
        dict(exit_code=167, log=NOT_LAUNCHED),
        Cause.NODE,
        "Job credential expired",
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
        "JobId=15 ArrayJobId=12 ArrayTaskId=3 JobName=numbers.toy.a1.x UserId=root(0) JobState=FAILED "
        "Reason=NonZeroExitCode Requeue=1 Restarts=0 ExitCode=0:53 RunTime=1-00:01:05 TimeLimit=00:10:00 "
        "ReqNodeList=(null) NodeList=n[1-2] NumNodes=2"
    )
    assert parse_job_row(line) == AccountingRow(
        job_id="12_3",
        raw_id="15",
        name="numbers.toy.a1.x",
        state="FAILED",
        exit_code=0,
        exit_signal=53,
        elapsed_s=86465,
        nodelist="n[1-2]",
    )
    assert parse_job_row("JobId=7 JobName=x JobState=PENDING ExitCode=0:0 NodeList=(null)").job_id == "7"
    assert parse_seconds("00:01:30") == 90
