"""A run on this machine: the graph, arrays and states of Slurm, from local processes that outlive the terminal."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.base import durable
from jobs.artifacts.run_folder import RunFolder
from launchers.backends.local import driver_is_alive
from launchers.observe.status import run_status
from launchers.planning.ledger import Ledger
from launchers.planning.reasons import changed_settings
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


@pytest.fixture
def toy(tmp_path):
    return write_toy(tmp_path), tmp_path / "run"


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """A run that has ended well, to be left as it is: (its pipeline, its folder, the finished command)."""
    folder = tmp_path_factory.mktemp("sealed")
    pipeline = write_toy(folder)
    return pipeline, folder / "run", afterok("run", pipeline, "--run", folder / "run")


@contextlib.contextmanager
def put_back(*paths):
    """Give files back what they hold now."""
    held = {path: path.read_bytes() for path in paths}
    try:
        yield
    finally:
        for path, data in held.items():
            path.write_bytes(data)


def seal_paths(run):
    return sorted(str(path.relative_to(run)) for path in run.glob("*/*/seal.json"))


def test_a_pipeline_runs_to_its_end_and_a_second_run_submits_nothing(sealed):
    pipeline, run, done = sealed
    assert "total 12" in done.stdout and "summary" in done.stdout
    assert states(run) == {"numbers": "COMPLETED", "total": "COMPLETED", "again": "COMPLETED"}
    for phase in ("numbers", "total", "again"):  # the summary names the link to what is sealed
        assert (run / phase / "latest").resolve() == RunFolder(run).seals(phase)[0].folder
        assert str(run / phase / "latest") in done.stdout
    seals = {path: (run / path).read_bytes() for path in seal_paths(run)}
    again = afterok("run", pipeline, "--run", run)
    assert "nothing to submit: all 3 phases" in again.stdout
    assert {path: (run / path).read_bytes() for path in seal_paths(run)} == seals
    assert RunFolder(run).submissions() == [1]


def test_plan_says_what_is_reused_and_why_the_rest_runs(sealed, tmp_path):
    pipeline, run, _ = sealed
    fresh = {p["phase"]: p for p in afterok_json("plan", pipeline, "--run", tmp_path / "run")["phases"]}
    assert {p["action"] for p in fresh.values()} == {"run"} and not (tmp_path / "run").exists()
    plan = {p["phase"]: p for p in afterok_json("plan", pipeline, "params.factor=3", "--run", run)["phases"]}
    assert plan["numbers"]["action"] == "reuse"
    assert plan["total"]["action"] == "rerun" and plan["total"]["reasons"] == ["total.with.factor 2 → 3"]
    assert plan["again"]["reasons"] == ["because of total"]
    unkeyed = {p["phase"]: p for p in afterok_json("plan", pipeline, "numbers.with.seconds=9", "--run", run)["phases"]}
    assert {p["action"] for p in unkeyed.values()} == {"reuse"}


def test_the_key_follows_an_input_files_content_not_its_name(toy, tmp_path):
    pipeline, run = toy
    data = tmp_path / "data.txt"
    data.write_text("1")
    afterok("run", pipeline, f"numbers.with.file={data}", "--run", run)
    moved = data.rename(tmp_path / "moved.txt")
    plan = afterok_json("plan", pipeline, f"numbers.with.file={moved}", "--run", run)
    assert {p["action"] for p in plan["phases"]} == {"reuse"}
    moved.write_text("2")
    plan = afterok_json("plan", pipeline, f"numbers.with.file={moved}", "--run", run)["phases"]
    assert plan[0]["action"] == "rerun"
    assert plan[0]["reasons"] == [f"numbers.with.file: {moved} is new; {data} is left out"]
    data.write_text("2")
    plan = afterok_json("plan", pipeline, f"numbers.with.file={data}", "--run", run)["phases"]
    assert plan[0]["reasons"] == [f"numbers.with.file: {data} changed"]


@pytest.mark.parametrize("was, now, said", [
    ("a1 b1", "a2 b1", ": a changed"), ("a1 b1", "b1 a1", ": the files are in another order"),
    ("a1", "a1 b1 c1", ": b, c is new"), ("a1 b1", "b2", ": b changed; a is left out"), ("", "a1", ": a is new"),
    ("a1 b1 c1 d1 e1", "a2 b2 c2 d2 e2", ": a, b, c (and 2 more) changed"), ("a1 hub:x", "a2 hub:x", " ['"),
])  # fmt: skip
def test_a_changed_input_is_told_by_its_file(was, now, said):
    lists = [words.split() for words in (was, now)]
    files = [{each[0]: each for each in words if ":" not in each} for words in lists]
    before, after = ({"source": {"inputs": words}} for words in lists)
    (line,) = changed_settings("data", before, after, files)
    assert line.startswith(f"data.with.source.inputs{said}")


def test_code_changes_are_reported_or_rerun_as_the_pipeline_says(sealed):
    pipeline, run, _ = sealed
    code = durable.read_checked(run / "submissions/1/code.json")
    code["files"]["jobs/task.py"] = code["files"]["launchers/cli.py"] = "0" * 64  # which no phase imports
    with put_back(run / "submissions/1/code.json"):
        durable.write_checked(run / "submissions/1/code.json", code)
        reported = afterok_json("plan", pipeline, "--run", run)["phases"]
        plan = afterok_json("plan", pipeline, "on_code_change=rerun", "--run", run)["phases"]
    assert reported[0]["action"] == "reuse" and reported[0]["code_changed"] == ["jobs/task.py"]
    assert plan[0]["action"] == "rerun" and "code changed: jobs/task.py" in plan[0]["reasons"]


def test_a_failed_element_stops_its_dependents_and_submit_runs_only_what_is_missing(toy):
    pipeline, run = toy
    done = afterok("run", pipeline, "numbers.with.fail_at=1", "--run", run, check=1)
    assert "numbers failed: RuntimeError: element 1 was told to fail" in done.stderr
    status = {p["phase"]: p for p in afterok_json("status", run)["phases"]}
    assert (status["numbers"]["state"], status["numbers"]["sealed"]) == ("FAILED", 2)
    assert (status["total"]["state"], status["total"]["reason"]) == ("CANCELLED", "DependencyNeverSatisfied")
    plan = afterok_json("plan", pipeline, "--run", run)["phases"][0]
    assert plan["missing"] == [1] and plan["reasons"] == ["2 of 3 elements are sealed"]
    sealed = {path: (run / path).read_bytes() for path in map(str, run.glob("numbers/*/seals/*.json"))}
    afterok("run", pipeline, "--run", run)
    assert states(run)["again"] == "COMPLETED"
    assert {path: open(path, "rb").read() for path in sealed} == sealed
    assert [job.elements for job in Ledger(run / "ledger.jsonl").jobs() if job.phase == "numbers"] == [[0, 1, 2], [1]]


def test_a_users_mistake_in_a_job_is_one_line_exit_2_and_leaves_no_seal(toy):
    pipeline, run = toy
    done = afterok("run", pipeline, "numbers.with.mistake=row 7 is empty; remove it", "--run", run, check=2)
    assert "numbers failed: row 7 is empty; remove it" in one_line(done)
    assert "Traceback" not in (run / "numbers/logs/a1.0.out").read_text()
    assert seal_paths(run) == [] and list(run.glob("numbers/*/seals/*")) == []


def test_a_dead_rank_takes_the_others_with_it(toy):
    pipeline, run = toy
    done = afterok(
        "run", pipeline, "total.with.die_on_rank=1", "total.resources.ranks_per_node=2", "--run", run, check=1
    )
    assert "rank 1 was told to die" in done.stderr
    assert phase_status(run, "total")["exit_code"] == 1
    state = json.loads((run / "local/1/state.json").read_text())
    wait_for("the driver's end", lambda: not driver_is_alive(state), 60)


def test_killed_workers_and_drivers_lose_nothing(toy):
    pipeline, run = toy
    for victim in ("worker", "driver"):
        afterok("submit", pipeline, "again.with.seconds=30", "numbers.with.seconds=1", "--run", run)
        wait_for("again to run", lambda: states(run)["again"] == "RUNNING")
        number = RunFolder(run).newest_submission()
        state = json.loads((run / f"local/{number}/state.json").read_text())
        for restart in range(2 if victim == "worker" else 1):  # a killed worker gets one more try
            leases = wait_for(
                "a lease",
                lambda number=number, restart=restart: list(
                    (run / "again").glob(f"*/leases/0000.a{number}.r{restart}.*")
                ),
            )
            worker = json.loads(leases[0].read_text())["pid"]
            os.kill(worker if victim == "worker" else state["driver"]["pid"], signal.SIGKILL)
        wait_for("the failure to be seen", lambda: states(run)["again"] == "FAILED")
        wait_for(
            "the worker to be gone",
            lambda worker=worker: (
                not os.path.exists(f"/proc/{worker}/status") or "Z (zombie)" in open(f"/proc/{worker}/status").read()
            ),
        )
    afterok("run", pipeline, "--run", run)
    assert states(run)["again"] == "COMPLETED"


def test_cancel_stops_what_runs_and_what_waits(toy):
    pipeline, run = toy
    afterok("submit", pipeline, "numbers.with.seconds=60", "--run", run)
    wait_for("numbers to run", lambda: states(run)["numbers"] == "RUNNING")
    assert len(afterok_json("cancel", run)["cancelled"]) == 3
    wait_for("the end", lambda: set(states(run).values()) == {"CANCELLED"})
    assert afterok("cancel", run).stdout.strip().endswith("nothing is active")


def test_a_phase_that_is_sealed_while_status_looks_is_completed(sealed, monkeypatch):
    _, run, _ = sealed
    seal, asked = RunFolder.seal, []

    def not_yet(self, phase, key):
        asked.append(phase)
        return None if asked.count(phase) == 1 else seal(self, phase, key)

    monkeypatch.setattr(RunFolder, "seal", not_yet)
    assert {phase.state for phase in run_status(RunFolder(run)).phases} == {"COMPLETED"}


def test_interrupting_run_leaves_the_jobs_running_and_says_how_to_look(toy):
    pipeline, run = toy
    process = subprocess.Popen(
        [sys.executable, "-m", "launchers.cli", "run", str(pipeline), f"again.with.gate={run}.gate", "--run", str(run)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heed_interrupts,
    )
    wait_for("jobs", lambda: (run / "ledger.jsonl").exists() and "COMPLETED" in states(run).values())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and f"afterok status {run}" in err
    Path(f"{run}.gate").touch()
    wait_for("the run to end by itself", lambda: set(states(run).values()) == {"COMPLETED"})


def test_submitting_what_runs_already_submits_nothing_and_other_settings_are_refused(toy):
    pipeline, run = toy
    slow = [f"numbers.with.gate={run}.gate", "--run", run]
    afterok("submit", pipeline, *slow)
    assert afterok_json("submit", pipeline, *slow)["jobs"] == {}
    refused = afterok("submit", pipeline, "params.start=9", *slow, check=2)
    assert "numbers: job 1.0 is still active with other settings" in one_line(refused)
    afterok("cancel", run)


def test_two_simultaneous_submits_do_the_work_once(toy):
    pipeline, run = toy
    command = [sys.executable, "-m", "launchers.cli", "submit", str(pipeline), "--run", str(run)]
    pair = [
        subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    results = [(process.communicate(timeout=60), process.returncode) for process in pair]
    assert sorted(code for _, code in results) in ([0, 0], [0, 2]), results
    if any(code == 2 for _, code in results):
        assert any("is submitting right now" in err for (_, err), _ in results)
    assert RunFolder(run).submissions() == [1]
    wait_for("the end", lambda: set(states(run).values()) == {"COMPLETED"})


def test_the_worker_runs_the_same_by_hand_and_a_sealed_element_exits_0_at_once(toy):
    pipeline, run = toy
    afterok("run", pipeline, "numbers.with.fail_at=2", "total.resources.ranks_per_node=2", "--run", run, check=1)
    plan = run / "submissions/1/plan.json"
    plan.write_text(plan.read_text().replace('"fail_at": 2', '"fail_at": null'))
    durable.write_checked(plan, durable.read_json(plan))
    by_hand = [sys.executable, "-m", "jobs.worker", str(run), "numbers"]
    code = str(run / "submissions/1/code")
    for index, word in (("2", "attempt 1"), ("2", "sealed already")):
        done = subprocess.run([*by_hand, index], env={**os.environ, "PYTHONPATH": code}, text=True, capture_output=True)
        assert done.returncode == 0 and word in done.stdout, done.stderr
    total = subprocess.run(
        [*by_hand[:-1], "total"], env={**os.environ, "PYTHONPATH": code}, text=True, capture_output=True
    )
    assert total.returncode == 0, total.stderr  # two ranks, spawned by the worker itself
    again = subprocess.run([*by_hand, "7"], env={**os.environ, "PYTHONPATH": code}, text=True, capture_output=True)
    assert again.returncode == 2 and "has elements 0 to 2, not 7" in again.stderr


def test_a_phase_whose_upstream_has_no_seal_does_not_run_whatever_started_it(sealed):
    _, run, _ = sealed
    with put_back(*run.glob("total/*/seal.json"), *run.glob("numbers/*/seal.json")):
        for seal in [*run.glob("total/*/seal.json"), *run.glob("numbers/*/seal.json")]:
            seal.unlink()
        done = subprocess.run(
            [sys.executable, "-m", "jobs.worker", str(run), "total"], cwd=ROOT, text=True, capture_output=True
        )
        assert done.returncode == 4 and "needs numbers, which has no seal" in done.stderr
        assert not list(run.glob("total/*/seal.json"))


def test_what_runs_is_the_code_at_submission(sealed):
    _, run, _ = sealed
    snapshot = run / "submissions/1/code"
    assert (snapshot / "tests/toy/numbers.py").read_bytes() == (ROOT / "tests/toy/numbers.py").read_bytes()
    assert (snapshot / "jobs/worker.py").exists()


def test_logs_are_found_by_phase_and_element_and_followed_to_the_end(toy):
    pipeline, run = toy
    afterok("submit", pipeline, "numbers.with.seconds=1", "--run", run)
    followed = afterok("logs", run, "total", "-f")
    assert "total[0] attempt 1" in followed.stdout
    assert "numbers[2] attempt 1" in afterok("logs", run, "numbers:2").stdout
    assert "did you mean total?" in one_line(afterok("logs", run, "totl", check=2))
