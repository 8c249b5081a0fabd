"""What status and ls rest on: seals, one squeue, at most one sacct, and GPU time counted from the files of the run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.artifacts.run_folder import FrozenPhase, Outcome, RunFolder
from jobs.task import progress_path
from launchers.backends.contract import States, TaskState
from launchers.observe.gpu_hours import Span, gpu_hours, spans
from launchers.observe.look import Look, _going_on_besides
from launchers.observe.show import format_seconds
from launchers.observe.status import _worst, run_status
from launchers.planning.ledger import JobEntry, Ledger
from slurm.client import Slurm
from tests.command import (
    ROOT,
    afterok,
    afterok_json,
    heed_interrupts,
    one_line,
    phase_status,
    states,
    wait_for,
    write_toy,
)
from tests.launchers.planted_run import in_progress

KEY = "0123456789abcdef"
HOUR = 3600.0


@pytest.mark.parametrize("told, speaks", [
    (["PENDING", "COMPLETING", "RUNNING"], "RUNNING"), (["COMPLETING", "PENDING"], "PENDING"),
    (["RUNNING", "SUSPENDED"], "SUSPENDED"), (["FAILED", "COMPLETING"], "COMPLETING"),
    (["CANCELLED", "FAILED"], "FAILED"), (["CONFIGURING", "RUNNING"], "RUNNING"),
])  # fmt: skip
def test_what_leaves_in_a_moment_does_not_speak_for_thousands(told, speaks):
    tasks = [(TaskState("p", 0, state), None) for state in told]
    assert _worst(tasks)[0].state == speaks


# -- GPU-hours ---------------------------------------------------------------------------------------------------


def frozen(**changes):
    values = dict(
        name="sft",
        uses="sft",
        key=KEY,
        material={},
        settings={},
        array=None,
        elements=1,
        fans_in=False,
        needs={},
        inputs={},
        ranks_per_node=8,
        nodes=2,
        gpus_per_node=8,
    )
    return FrozenPhase(**(values | changes))


class Planted:
    """A run folder with lives of one phase planted in it, hours after midnight."""

    def __init__(self, path, submissions=2, **changes):
        self.run = RunFolder(path)
        self.phase = frozen(**changes)
        for number in range(1, submissions + 1):
            self.run.submission_folder(number).mkdir(parents=True)
            self.run.freeze(number, "planted", [self.phase])
        self.entries = [
            JobEntry(n, "sft", KEY, job=str(10 + n), elements=[0], is_array=False, scripted=n)
            for n in range(1, submissions + 1)
        ]
        self.states = States()

    def _file(self, path, hour):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        os.utime(path, (hour * HOUR, hour * HOUR))

    def lease(self, attempt, hour, restart=0):
        self._file(self.run.artifact(self.phase).folder / "leases" / f"0000.a{attempt}.r{restart}.g0", hour)

    def ended(self, attempt, first, last, state, restart=0, done=None):
        self.lease(attempt, first, restart)
        self.run.record_outcome(
            "sft",
            Outcome(
                element=0,
                attempt=attempt,
                restart=restart,
                state=state,
                exit_code=int(state != "sealed"),
                message="",
                host="n1",
                job="11",
                started=first * HOUR,
                ended=last * HOUR,
                done=done,
            ),
        )

    def checkpoint(self, step, hour):
        self._file(self.run.artifact(self.phase).folder / "checkpoints" / f"step_{step}" / "manifest.json", hour)

    def log(self, attempt, hour):
        self._file(self.run.log_path("sft", attempt, 0), hour)

    def look(self):
        return Look(self.run, 2, phases={"sft": self.phase}, entries=self.entries, states=self.states)

    def hours(self):
        return gpu_hours(self.look(), self.phase)


def test_gpu_hours_are_lost_only_after_the_last_durable_checkpoint_of_an_unsealed_attempt(tmp_path):
    planted = Planted(tmp_path)
    planted.ended(1, 1.0, 4.0, "failed")  # 3 h on 16 GPUs
    planted.checkpoint(100, 2.0)
    planted.checkpoint(200, 3.5)  # half an hour is lost
    planted.ended(2, 5.0, 6.0, "sealed")
    planted.checkpoint(300, 5.9)  # of the next attempt: saves nothing of the first
    assert planted.hours() == pytest.approx((4 * 16, 0.5 * 16))


def test_without_a_checkpoint_the_whole_attempt_is_lost(tmp_path):
    planted = Planted(tmp_path)
    planted.checkpoint(100, 0.5)  # an older attempt's, elsewhere accounted for
    planted.ended(1, 1.0, 4.0, "failed")
    assert planted.hours() == pytest.approx((48, 48))


def test_what_stopped_at_a_checkpoint_lost_nothing_even_once_that_is_pruned(tmp_path):
    planted = Planted(tmp_path)
    planted.ended(1, 1.0, 4.0, "stopped", done=300)
    planted.ended(2, 5.0, 6.0, "stopped")  # before its first step
    assert planted.hours() == pytest.approx((4 * 16, 1 * 16))


def test_a_killed_attempt_ends_with_its_log_or_its_successor(tmp_path):
    planted = Planted(tmp_path)
    planted.lease(1, 1.0)
    planted.lease(1, 3.0, restart=1)  # requeued: one log for both lives
    planted.log(1, 7.0)
    assert [(s.started / HOUR, s.ended / HOUR, s.sealed) for s in spans(planted.look(), "sft")] == [
        (1, 3, False),
        (3, 7, False),
    ]
    assert planted.hours() == pytest.approx((6 * 16, 6 * 16))


def test_what_runs_is_used_so_far_and_not_lost(tmp_path):
    planted = Planted(tmp_path, submissions=1)
    planted.lease(1, time.time() / HOUR - 2)
    planted.states.add([TaskState("11", 0, "RUNNING")])
    used, lost = planted.hours()
    assert used == pytest.approx(32, rel=1e-2) and lost == 0


def test_a_phase_without_gpus_has_no_gpu_hours(tmp_path):
    planted = Planted(tmp_path, gpus_per_node=0)
    planted.ended(1, 1.0, 4.0, "failed")
    assert planted.hours() == (None, None)


def test_a_clock_that_runs_backwards_costs_nothing():
    assert (
        Span(10.0, 5.0, 8, sealed=False, running=False, saved_at=()).used_s == 0
        and Span(10.0, 5.0, 8, sealed=False, running=False, saved_at=()).lost_s == 0
    )


@pytest.mark.parametrize("state, goes_on", [
    ("RUNNING", True), ("PENDING", True), ("COMPLETED", False), ("FAILED", False), (None, False),
])  # fmt: skip
def test_a_job_of_a_phase_that_the_newest_submission_leaves_out_is_told_while_it_goes_on(tmp_path, state, goes_on):
    planted = Planted(tmp_path)
    look = planted.look()
    look.phases = {"data": frozen(name="data")}
    look.states = States([TaskState("11", 0, state)] if state else [])
    said = f"phase sft is none of submission 2's, and goes on as job 11; `afterok cancel {tmp_path} sft` ends that"
    assert _going_on_besides(look) == ([said] if goes_on else [])
    assert _going_on_besides(planted.look()) == []  # it is one of the submission's, and status tells of it


def test_times_of_a_day_and_more_keep_their_hours():
    assert format_seconds(90061) == "25:01:01" and format_seconds(61) == "1m01s" and format_seconds(3.21) == "3.2 s"


# -- ls and --watch ----------------------------------------------------------------------------------------------


def test_ls_lists_runs_newest_change_first(tmp_path):
    pipeline = tmp_path / "small.yaml"
    pipeline.write_text(json.dumps({"name": "small", "phases": {"numbers": {"uses": "tests.toy.numbers"}}}))
    afterok("run", pipeline, "--run", tmp_path / "good")
    afterok("run", pipeline, "numbers.with.fail_at=0", "--run", tmp_path / "bad", check=1)
    runs = afterok_json("ls", tmp_path)["runs"]
    assert [(r["name"], r["pipeline"], r["submissions"], r["state"]) for r in runs] == [
        ("bad", "small", 1, "sealed 0 of 1, failed: numbers"),
        ("good", "small", 1, "sealed 1 of 1"),
    ]
    assert "sealed 1 of 1" in afterok("ls", tmp_path).stdout
    (tmp_path / "empty").mkdir()
    assert "no runs below" in afterok("ls", tmp_path / "empty").stdout
    (tmp_path / "above").mkdir()
    (tmp_path / "above" / "runs").symlink_to(tmp_path)
    told = afterok("ls", tmp_path / "above").stdout
    assert told.startswith(f"no runs below {tmp_path}/above; those below {tmp_path}/above/runs: afterok ls ")
    assert "is no folder" in one_line(afterok("ls", tmp_path / "nowhere", check=2))


def test_watching_ends_with_the_run_and_an_interrupt_only_stops_looking(tmp_path):
    run = tmp_path / "run"
    afterok("submit", write_toy(tmp_path), f"again.with.gate={run}.gate", "--run", run)
    watch = subprocess.Popen(
        [sys.executable, "-m", "launchers.cli", "status", str(run), "--watch"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heed_interrupts,
    )
    assert watch.stdout.readline()  # its first line of change
    watch.send_signal(signal.SIGINT)
    _, err = watch.communicate(timeout=120)
    assert watch.returncode == 0 and "Traceback" not in err
    Path(f"{run}.gate").touch()
    done = afterok("status", run, "--watch")
    assert "again: COMPLETED" in done.stdout and "GPU-h" not in done.stdout
    assert set(states(run).values()) == {"COMPLETED"}


# -- Slurm -------------------------------------------------------------------------------------------------------


def shims(folder, cluster, **bodies):
    """An environment whose Slurm commands are counted, and replaced where a body is given."""
    folder.mkdir(exist_ok=True)
    env = cluster.env()
    for name in ("squeue", "sacct", "scontrol"):
        real = subprocess.run(["which", name], env=env, capture_output=True, text=True).stdout.strip()
        body = bodies.get(name, f'exec {real} "$@"')
        (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {folder}/calls\n{body}\n')
        (folder / name).chmod(0o755)
    return env | {"PATH": f"{folder}:{env['PATH']}"}


@pytest.fixture(scope="module")
def broken(tmp_path_factory, dev_cluster):
    """A run on Slurm of two submissions: numbers[1] was killed without a word, what waits on it waits for ever."""
    folder = tmp_path_factory.mktemp("broken")
    pipeline = folder / "killed.yaml"
    pipeline.write_text(
        json.dumps(
            {
                "name": "killed",
                "phases": {
                    "fine": {"uses": "tests.toy.numbers"},
                    "killed": {
                        "uses": "tests.toy.trouble",
                        "with": {"how": "killed"},
                        "resources": {"gpus_per_node": 2, "ranks_per_node": 1},
                    },
                    "after": {"uses": "tests.toy.numbers", "with": {"start": 2}, "needs": ["killed"]},
                },
            }
        )
    )
    env = dev_cluster.env()
    afterok("run", pipeline, "--run", folder / "run", env=env, check=1)
    afterok("run", pipeline, "--run", folder / "run", "cluster=slurm", env=env, check=1)
    for outcome in folder.glob("run/killed/attempts/*.json"):  # as if its batch script had been killed with it
        outcome.unlink()
    return folder / "run"


@pytest.mark.soak
def test_status_asks_the_queue_once_and_accounting_once(broken, dev_cluster, tmp_path):
    env = shims(tmp_path / "bin", dev_cluster)
    assert (
        len(
            {
                event["choice"]
                for event in map(json.loads, open(broken / "ledger.jsonl"))
                if event["event"] == "submission"
            }
        )
        == 2
    )
    assert states(broken, env=env) == {"fine": "COMPLETED", "killed": "FAILED", "after": "PENDING"}
    counted = (tmp_path / "bin" / "calls").read_text()
    assert (counted.count("squeue "), counted.count("sacct ")) == (1, 1), counted


def test_a_job_that_the_queue_forgot_is_never_a_success(broken, dev_cluster, tmp_path):
    env = shims(tmp_path / "bin", dev_cluster, squeue="exit 0")  # and this cluster keeps no accounting
    assert states(broken, env=env) == {"fine": "COMPLETED", "killed": "UNKNOWN", "after": "UNKNOWN"}
    status = afterok_json("status", broken, env=env)
    assert not status["finished"] and not status["active"]


# What a sacct prints, its "|" as the delimiter that it was asked for.
PRINTED = 'for a; do case $a in --delimiter=*) d=${{a#*=}};; esac; done; echo "{}" | sed "s/|/$d/g"'


@pytest.mark.parametrize(
    "said, state, code",
    [
        ("COMPLETED|0:0", "FAILED", 0),
        ("TIMEOUT|0:15", "TIMEOUT", 143),
        ("OUT_OF_MEMORY|0:125", "OUT_OF_MEMORY", 253),
        ("CANCELLED by 0|0:0", "CANCELLED", 0),
        ("RUNNING|0:0", "UNKNOWN", None),
    ],
)
def test_accounting_tells_what_the_queue_forgot_but_not_that_it_is_done(
    broken, dev_cluster, tmp_path, said, state, code
):
    job = Ledger(broken / "ledger.jsonl").jobs()[-1]
    row = f"{job.job}|{job.job}|{said}|7200|n1"
    env = shims(tmp_path / "bin", dev_cluster, squeue="exit 0", sacct=PRINTED.format(f"{row}|{job.name}|"))
    found = phase_status(broken, "killed", env=env)
    assert (job.phase, found["state"], found["exit_code"]) == ("killed", state, code)
    env = shims(tmp_path / "bin", dev_cluster, squeue="exit 0", sacct=PRINTED.format(f"{row}|of somebody else|"))
    assert phase_status(broken, "killed", env=env)["state"] == "UNKNOWN"
    env = shims(tmp_path / "bin", dev_cluster, squeue="exit 0", sacct=PRINTED.format(f"{row}|{job.name}|"))
    if state == "TIMEOUT":  # 2 GPUs for the 2 hours that only accounting knows of, and seconds of the first attempt
        assert found["gpu_hours"] == pytest.approx(4, abs=0.1) and found["gpu_hours_lost"] == found["gpu_hours"]
        assert "GPU-h" in afterok("status", broken, env=env).stdout


def test_accounting_that_is_down_costs_its_answer_only(broken, dev_cluster, tmp_path):
    env = shims(
        tmp_path / "bin",
        dev_cluster,
        squeue="exit 0",
        sacct="echo 'sacct: error: slurm_persist_conn_open: failed to connect' >&2; exit 1",
    )
    assert states(broken, env=env)["killed"] == "UNKNOWN"
    report = afterok_json("why", broken, env=env)
    assert "accounting was not asked" in report["notes"][0] and {f["phase"] for f in report["findings"]} == {
        "killed",
        "after",
    }


def causes(run, env):
    return {finding["phase"]: finding["cause"] for finding in afterok_json("why", run, env=env)["findings"]}


def cancelled(folder, cluster):
    """(pipeline, run) on a cluster with accounting, of whose phases `nap` was ended without a word, and not by us."""
    pipeline, run, env = folder / "accounted.yaml", folder / "run", cluster.env()
    phases = {
        "fine": {"uses": "tests.toy.numbers"},
        "nap": {"uses": "tests.toy.trouble", "with": {"how": "sleep"}},
        "after": {"uses": "tests.toy.numbers", "with": {"start": 2}, "needs": ["nap"]},
    }
    pipeline.write_text(json.dumps({"name": "accounted", "phases": phases}))
    afterok("submit", pipeline, "--run", run, env=env)
    wait_for("the nap", lambda: states(run, env=env)["nap"] == "RUNNING" and list(run.glob("fine/*/seal.json")))
    Slurm(env).cancel([next(entry.job for entry in Ledger(run / "ledger.jsonl").jobs() if entry.phase == "nap")])
    wait_for("the end", lambda: not afterok_json("status", run, env=env)["active"])
    return pipeline, run


@pytest.mark.soak
def test_status_and_why_with_slurmdbd_running_and_gone(tmp_path, accounted_cluster):
    """A real slurmdbd tells what the queue forgot; without it the answers are poorer, never wrong, and jobs go on."""
    env = accounted_cluster.env()
    pipeline, run = cancelled(tmp_path, accounted_cluster)
    known = {"fine": "COMPLETED", "nap": "CANCELLED", "after": "PENDING"}
    why = {"nap": "cancelled", "after": "upstream not sealed"}
    forgetful = shims(tmp_path / "bin", accounted_cluster, squeue="exit 0")
    wait_for("the record", lambda: states(run, env=forgetful) == {**known, "after": "UNKNOWN"})
    assert states(run, env=env) == known and causes(run, env) == why
    (tmp_path / "bin" / "calls").unlink()
    assert phase_status(run, "nap", env=forgetful)["reason"] == "so says accounting"
    assert (tmp_path / "bin" / "calls").read_text().count("sacct ") == 1

    accounted_cluster.kill_daemon("slurmdbd", signal.SIGKILL)
    try:
        assert states(run, env=env) == known and causes(run, env) == why
        assert states(run, env=forgetful) == {**known, "nap": "UNKNOWN", "after": "UNKNOWN"}
        notes = afterok_json("why", run, env=forgetful)["notes"]
        assert len(notes) == 1 and "accounting was not asked" in notes[0]
        afterok("run", pipeline, "nap.with.how=''", "--run", run, env=env)
    finally:
        accounted_cluster.start_daemon("slurmdbd")
    assert set(states(run, env=env).values()) == {"COMPLETED"} and afterok_json("why", run, env=env)["healthy"]


@pytest.mark.soak
def test_a_slurmdbd_that_hangs_is_waited_for_once(tmp_path, accounted_cluster):
    _, run = cancelled(tmp_path, accounted_cluster)
    accounted_cluster.kill_daemon("slurmdbd", signal.SIGSTOP)
    try:
        report = afterok_json("why", run, env=accounted_cluster.env(), timeout=60)
        assert "accounting was not asked" in report["notes"][0]
        assert report["findings"][0]["cause"] == "cancelled"
    finally:
        accounted_cluster.kill_daemon("slurmdbd", signal.SIGCONT)


@pytest.mark.parametrize("text", [
    "", "[]", "null", "1", "{}", "[" * 100_000, '{"done": "x", "total": 4, "unit": "steps", "note": ""}',
    '{"done": 1, "total": null, "unit": "steps", "note": ""}', '{"done": 1, "total": 4, "unit": [], "note": {}}',
])  # fmt: skip
def test_progress_that_is_none_is_not_told(tmp_path, text):
    planted = in_progress(tmp_path / "run")
    path = progress_path(planted.run.artifact(planted.phases["sft"]).folder, 0)
    path.parent.mkdir()
    told = {}
    for number, written in enumerate(['{"done": 1, "total": 4, "unit": "steps", "note": ""}', text]):
        path.write_text(written)
        told[number] = next(phase for phase in run_status(planted.run).phases if phase.phase == "sft").progress
    assert told[0] and not told[1]
