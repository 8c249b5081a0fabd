"""When a worker stops, and whether it runs again: the policy as a table, the signals on real processes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from data_tools.mistake import UserMistake
from data_tools.progress import Stopped
from jobs import requeue, retry, stopping
from jobs.phases import materialize
from jobs.ranks import rank_from_environment
from jobs.retry import Cause, End, decide
from jobs.task import Task
from launchers.backends.slurm_script import WITHOUT_USR2
from tests.command import ROOT


def stops(*done):
    return [End(Cause.STOPPED, n) for n in done]


@pytest.mark.parametrize(
    "ends, again",
    [
        (stops(0), True),  # asked to stop while it loaded: once
        (stops(0, 0), False),
        (stops(30), True),
        (stops(30, 40, 55, 56, 57, 58, 59), True),  # as often as there is progress
        (stops(30, 40, 40), False),
        (stops(30, None), False),  # SIGTERM before it could ask
        ([End(Cause.UNKNOWN), *stops(30)], True),
        ([*stops(30), End(Cause.UNKNOWN), *stops(30)], False),
        ([End(Cause.UNKNOWN)], True),
        ([End(Cause.UNKNOWN), End(Cause.UNKNOWN)], False),
        ([End(Cause.NODE)] * 3, True),
        ([End(Cause.NODE)] * 4, False),
        ([End(Cause.CODE)], False),
        ([End(Cause.MISTAKE)], False),
        ([End(Cause.NO_INPUT)], False),
    ],
)
def test_only_what_is_safe_and_gets_further_is_repeated(ends, again):
    assert decide(ends).again == again


def test_a_loop_without_progress_names_its_step_and_the_remedy():
    why = decide(stops(1200, 1200)).why
    assert "still at step 1,200" in why and "ask for a longer time" in why


@pytest.mark.parametrize(
    "code, cause",
    [
        (1, None),
        (2, Cause.MISTAKE),
        (3, Cause.LEASE_HELD),
        (4, Cause.NO_INPUT),
        (5, Cause.STOPPED),
        (137, None),
        (139, None),
        (143, Cause.STOPPED),
    ],
)
def test_the_workers_own_exit_codes_name_their_cause(code, cause):
    assert retry.told_by(code) == cause


RUNNING = {"JobState": "RUNNING", "Requeue": "1", "BatchFlag": "1", "PreemptTime": "None"}
TERM, USR2 = signal.SIGTERM, signal.SIGUSR2


@pytest.mark.parametrize(
    "changes, received, refusal",
    [
        ({}, {USR2}, ""),
        ({"PreemptTime": "2026-11-21T01:47:31"}, {TERM}, ""),  # within a preemption's GraceTime the job still runs
        ({}, {TERM}, "SIGTERM came from neither"),
        ({}, {USR2, TERM}, "SIGTERM came from neither"),  # the limit was near, then somebody ended it
        ({"JobState": "COMPLETING"}, {USR2}, "Slurm was ending the job"),  # scancel: a requeue would bring it back
        ({"JobState": "COMPLETING"}, {TERM}, "Slurm was ending the job"),
        ({"Requeue": "0"}, {USR2}, "may not be requeued"),
        ({"BatchFlag": "0"}, {USR2}, "no batch job"),
    ],
)
def test_a_job_is_requeued_only_where_slurm_would_not_and_nobody_ended_it(changes, received, refusal):
    found = requeue.refusal({**RUNNING, **changes}, received)
    assert found.startswith(refusal) if not refusal else refusal in found
    assert bool(found) == bool(refusal)


def test_a_stop_says_how_far_it_got():
    assert str(Stopped(1200, 4000)) == "stopped after a durable checkpoint at step 1,200 of 4,000"
    assert str(Stopped(12.251, 40)) == "stopped after a durable checkpoint at step 12.25 of 40"
    assert str(Stopped(0, 9, "row")) == "stopped before the first row of 9 was durable"


# -- signals ------------------------------------------------------------------------------------------------------

ASKING = """
import sys, time
from jobs.stopping import StopSignals
signals = StopSignals()
signals.install()
if sys.argv[1] == "asks":
    signals.asked()
print("ready", flush=True)
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    if sys.argv[1] == "asks" and signals.asked():
        print(sorted(signals.received), flush=True)
        time.sleep(0.3)  # a second signal in this time changes nothing
        sys.exit(5)
    time.sleep(0.01)
"""


def started(mode, seconds, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-c", ASKING, mode, str(seconds)], cwd=ROOT, stdout=subprocess.PIPE, text=True, **kwargs
    )


@pytest.mark.parametrize(
    "mode, number, code",
    [
        ("asks", signal.SIGTERM, 5),
        ("asks", signal.SIGUSR2, 5),
        ("silent", signal.SIGTERM, -signal.SIGTERM),
        ("silent", signal.SIGUSR2, 0),
    ],
)
def test_who_asks_stops_and_who_does_not_dies_of_sigterm_alone(mode, number, code):
    process = started(mode, 20 if code else 1)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    if code == 5:
        assert process.stdout.readline() == f"[{int(number)}]\n"
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == code


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_before_the_handlers_are_there_waits_for_them(number):
    process = started("asks", 20, preexec_fn=stopping.hold)
    process.send_signal(number)  # Python has hardly begun to start
    # SIGUSR2 is noted, so the first question is answered yes; SIGTERM ends what has not begun to ask
    assert process.wait(timeout=20) == (5 if number == signal.SIGUSR2 else -signal.SIGTERM)


def test_the_worker_survives_sigusr2_from_its_first_import_on(tmp_path):
    """Under the shell wrapper of the batch script, at many moments of its start."""
    for delay in (0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.25):
        process = subprocess.Popen(
            [*WITHOUT_USR2, sys.executable, "-m", "jobs.worker", str(tmp_path), "x"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(delay)
        process.send_signal(signal.SIGUSR2)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 2 and "nothing was submitted" in err, (delay, err)


SPAWNER = """
import sys
from jobs.ranks import spawn_ranks
sys.exit(spawn_ranks([sys.executable, "-c", sys.argv[1], "asks", "20"], 2, 0))
"""


def test_every_rank_hears_a_signal_whenever_it_comes():
    for delay in (0.05, 0.1, 0.15, 0.2, 0.4):
        parent = subprocess.Popen(
            [sys.executable, "-c", SPAWNER, ASKING],
            cwd=ROOT,
            preexec_fn=stopping.hold,
            stdout=subprocess.PIPE,
            text=True,
        )
        time.sleep(delay)
        parent.send_signal(signal.SIGUSR2)
        out, _ = parent.communicate(timeout=30)
        assert parent.returncode == 5 and out.count(f"[{int(signal.SIGUSR2)}]") == 2, (delay, out)


RANK = """
import os, signal, sys
if os.environ["AFTEROK_RANK"] == "1":
    held = open("held", "w")  # closes with the process
    os.kill(os.getpid(), signal.SIGKILL)
open("held").read()  # until rank 1 is gone
sys.exit(1)  # what a peer does that misses it
"""


def test_a_killed_rank_is_the_cause_not_the_peer_that_misses_it(tmp_path):
    os.mkfifo(tmp_path / "held")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SPAWNER, RANK], cwd=tmp_path, env=env, timeout=30)
    assert done.returncode == 137


def task_of(folder, stop, world_size=1):
    (folder / "out").mkdir(exist_ok=True)
    return Task("data", 0, 1, 0, folder / "out", folder, 0, world_size, stop)


def test_work_that_lies_in_its_own_folder_leaves_at_any_moment_and_counts_nothing_as_done(tmp_path):
    with pytest.raises(Stopped, match="stopped before the first row of 10 was durable"):
        task_of(tmp_path, lambda: True).progress_or_stop(4, 10, "rows")
    task_of(tmp_path, lambda: True).progress_or_stop(10, 10, "rows")  # the little that is left is worth its time
    task_of(tmp_path, lambda: True, world_size=2).progress_or_stop(4, 10, "rows")  # its peers sit in a collective
    task_of(tmp_path, lambda: False).progress_or_stop(4, 10, "rows")


def test_materialize_stops_when_asked_to(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        materialize.materialize,
        "materialize",
        lambda config, out, index, count, progress: seen.append(progress(1, 5, "rows")),
    )
    with pytest.raises(Stopped):
        materialize.run(materialize.Config(), task_of(tmp_path, lambda: True))
    assert not seen and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "0x1", "٣", "9" * 400])
@pytest.mark.parametrize("others", [{}, {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}])
def test_a_rank_that_is_no_number_is_a_mistake(text, others):
    with pytest.raises(UserMistake, match="variable (AFTEROK_RANK|LOCAL_RANK): .* (no whole number|not set)"):
        rank_from_environment({"AFTEROK_RANK": text, **others}, 2)
    with pytest.raises(UserMistake, match="variable SLURM_PROCID"):
        rank_from_environment({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": text}, 2)
    with pytest.raises(UserMistake, match="LOCAL_RANK: is not set"):
        rank_from_environment({"AFTEROK_RANK": "0"}, 2)
