"""The same pipelines on a real Slurm: dependent arrays, one sbatch a phase, the same seals as a local run."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.artifacts.seal import read_seal
from launchers.planning.ledger import Ledger
from slurm.client import Slurm
from tests.command import ROOT, afterok, afterok_json, one_line, phase_status, states, wait_for, write_toy


@pytest.fixture
def toy(tmp_path, dev_cluster):
    return write_toy(tmp_path), tmp_path / "run", dev_cluster.env()


TWO_RANKS = ["total.resources.ranks_per_node=2", "total.resources.nodes=2"]


@pytest.fixture(scope="module")
def sealed(tmp_path_factory, dev_cluster):
    """A run that has ended well, to be left as it is: (its pipeline, its folder, the environment, the command)."""
    folder = tmp_path_factory.mktemp("sealed")
    pipeline, run, env = write_toy(folder), folder / "run", dev_cluster.env()
    done = afterok("run", pipeline, *TWO_RANKS, "--run", run, env=env | {"PLANTED_SECRET": "s3cr3t-value"})
    return pipeline, run, env, done


def seal_digests(run):
    return {str(path.relative_to(run).parent): read_seal(path).digest for path in run.glob("*/*/seal.json")}


def test_a_run_on_slurm_seals_the_same_as_a_local_run(sealed, tmp_path):
    pipeline, run, env, done = sealed
    assert "total 12" in done.stdout
    assert "2 nodes × 2 ranks" in afterok("plan", pipeline, *TWO_RANKS, "--run", run, env=env).stdout
    afterok("run", pipeline, "cluster=local", "--run", tmp_path / "local")
    assert seal_digests(run) == seal_digests(tmp_path / "local") and len(seal_digests(run)) == 3
    array = Ledger(run / "ledger.jsonl").jobs()[0].job
    assert phase_status(run, "numbers", env=env)["job"] in {f"{array}_{index}" for index in range(3)}
    before = len(Ledger(run / "ledger.jsonl").jobs())
    assert "nothing to submit" in afterok("run", pipeline, *TWO_RANKS, "--run", run, env=env).stdout
    assert len(Ledger(run / "ledger.jsonl").jobs()) == before


def test_phases_wait_on_each_other_as_dependent_arrays(toy):
    pipeline, run, env = toy
    jobs = afterok_json("submit", pipeline, f"numbers.with.gate={run}.gate", "--run", run, env=env)["jobs"]
    rows = {
        row.array_index if row.array_index is not None else row.name.split(".")[0]: row
        for row in Slurm(env).queue()
        if (row.array_job_id or row.job_id) in jobs.values()
    }
    assert rows["total"].reason == "Dependency" and f"afterok:{jobs['numbers']}" in rows["total"].dependency
    assert rows["again"].reason == "Dependency" and f"afterok:{jobs['total']}" in rows["again"].dependency
    assert {0, 1, 2} <= rows.keys()  # one array of three elements
    assert states(run, env=env)["total"] == "PENDING"
    Path(f"{run}.gate").touch()
    wait_for("the end", lambda: set(states(run, env=env).values()) == {"COMPLETED"})


def test_a_failed_element_leaves_its_dependents_waiting_and_submit_sends_only_what_is_missing(toy):
    pipeline, run, env = toy
    done = afterok("run", pipeline, "numbers.with.fail_at=1", "--run", run, env=env, check=1)
    assert "element 1 was told to fail" in done.stderr
    assert states(run, env=env) == {"numbers": "FAILED", "total": "PENDING", "again": "PENDING"}
    assert phase_status(run, "again", env=env)["reason"] == "DependencyNeverSatisfied"
    afterok("run", pipeline, "--run", run, env=env)
    assert set(states(run, env=env).values()) == {"COMPLETED"}
    jobs = Ledger(run / "ledger.jsonl").jobs()
    assert [entry.elements for entry in jobs if entry.phase == "numbers"] == [[0, 1, 2], [1]]
    # the waiting jobs kept their place
    assert [entry.phase for entry in jobs] == ["numbers", "total", "again", "numbers"]
    assert "#SBATCH --array=1\n" in (run / "submissions/2/scripts/numbers.sh").read_text()


def test_a_phase_checks_its_inputs_itself_when_slurm_lets_it_start(sealed):
    """An unknown or purged parent id counts as satisfied: a script sent by hand, without dependency, must not pass."""
    _, run, env, _ = sealed
    aside = [path.rename(path.with_suffix(".aside")) for path in run.glob("[nt]*/*/seal.json")]
    script = (run / "submissions/1/scripts/total.sh").read_text()
    bare = "\n".join(line for line in script.splitlines() if "--dependency" not in line)
    (run / "bare.sh").write_text(bare.replace("total/logs/a1.0.out", "total/logs/bare.out"))
    Slurm(env).sbatch(["--dependency=afterok:888888", str(run / "bare.sh")])
    log = run / "total/logs/bare.out"
    wait_for("the refusal", lambda: log.exists() and "needs numbers, which has no seal" in log.read_text())
    assert len(aside) == 2 and not list(run.glob("total/*/seal.json"))
    for path in aside:
        path.rename(path.with_suffix(".json"))


def test_submitting_from_inside_a_job_does_not_inherit_its_shape(toy, tmp_path):
    pipeline, run, env = toy
    outer = tmp_path / "outer.sh"
    outer.write_text(
        "#!/bin/bash\nexport SBATCH_PARTITION=nosuch SBATCH_OUTPUT=/nowhere/x SLURM_MEM_PER_NODE=2\n"
        f"cd {ROOT} && exec {sys.executable} -m launchers.cli submit {pipeline} --run {run}\n"
    )
    shape = ["--ntasks=7", "--mem-per-cpu=10", "--gpus-per-node=3", "--cpus-per-task=2"]
    Slurm(env).sbatch([*shape, f"--output={tmp_path}/outer.out", str(outer)])
    ledger = Ledger(run / "ledger.jsonl")
    wait_for("the submission", lambda: ledger.path.exists() and ledger.unreleased() == [])
    wait_for("the end", lambda: set(states(run, env=env).values()) == {"COMPLETED"})


def test_cancel_and_logs_reach_slurms_jobs(toy):
    pipeline, run, env = toy
    afterok("submit", pipeline, "numbers.with.seconds=100", "--run", run, env=env)
    wait_for("a log", lambda: phase_status(run, "numbers", env=env)["state"] == "RUNNING")
    wait_for(
        "its first line",
        lambda: "numbers[1] attempt 1" in afterok("logs", run, "numbers:1", env=env, check=None).stdout,
    )
    afterok("cancel", run, env=env)
    wait_for("the end", lambda: set(states(run, env=env).values()) == {"CANCELLED"})


def test_nothing_of_the_submitters_environment_reaches_a_job_unless_forwarded(sealed):
    _, run, env, _ = sealed
    found = subprocess.run(
        ["grep", "-rl", "--exclude-dir=code", "s3cr3t-value", str(run)], capture_output=True, text=True
    ).stdout
    assert found == ""
    job = Ledger(run / "ledger.jsonl").jobs()[0].job
    shown = subprocess.run(["scontrol", "show", "job", job], env=env, capture_output=True, text=True).stdout
    assert "s3cr3t" not in shown and "JobId" in shown


@pytest.mark.soak
def test_a_controller_that_dies_before_a_submit_loses_nothing(toy, dev_cluster):
    pipeline, run, env = toy
    dev_cluster.kill_daemon("slurmctld")
    try:
        line = one_line(afterok("submit", pipeline, "--run", run, env=env, check=2))
        assert str(dev_cluster.prefix) in line and not run.exists()
    finally:
        dev_cluster.start_daemon("slurmctld")
    wait_for("the controller", lambda: afterok("run", pipeline, "--run", run, env=env, check=None).returncode == 0)
