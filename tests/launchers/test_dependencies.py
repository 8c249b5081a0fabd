"""Dependency types: what runs after a failure, whatever happens, or never at the same time; on Slurm and locally."""

import json

import pytest

from jobs.schema.pipeline import load_pipeline
from launchers.planning.ledger import Ledger
from slurm.client import Slurm
from tests.cluster import rows_of
from tests.command import afterok, afterok_json, phase_status, states, wait_for

CLEAN = """
name: clean
phases:
  train: {uses: tests.toy.trouble, with: {how: ""}}
  clean: {uses: tests.toy.numbers, needs: [{train: afternotok}], with: {start: 7}}
  tell: {uses: tests.toy.total, with: {numbers: "${phases.clean.out}"}}
  report: {uses: tests.toy.numbers, needs: [{train: afterany}, {clean: afterany}]}
"""


@pytest.fixture(params=["slurm", "local"])
def place(request, tmp_path):
    """(pipeline, run, environment and overrides of a back end)."""
    (tmp_path / "clean.yaml").write_text(CLEAN)
    if request.param == "local":
        return tmp_path / "clean.yaml", tmp_path / "run", {}, ["cluster=local"]
    return tmp_path / "clean.yaml", tmp_path / "run", request.getfixturevalue("dev_cluster").env(), []


def test_what_follows_a_failure_runs_then_and_only_then(place):
    path, run, env, overrides = place
    failed = afterok("run", path, "train.with.how=exception", *overrides, "--run", run, env=env, check=1)
    assert "train failed: ValueError: row 7" in failed.stderr
    found = {"train": "FAILED", "clean": "COMPLETED", "tell": "COMPLETED", "report": "COMPLETED"}
    assert states(run, env=env) == found
    # mended: another start of the same settings
    again = afterok_json("submit", path, *overrides, "--run", run, env=env)
    assert list(again["jobs"]) == ["train", "report"]  # which has to follow this end as well
    wait_for("the end", lambda: set(states(run, env=env).values()) == {"COMPLETED"})


def test_what_follows_a_failure_is_not_needed_after_a_success_and_that_is_none(place):
    path, run, env, overrides = place
    done = afterok("run", path, *overrides, "--run", run, env=env)
    found = {"train": "COMPLETED", "clean": "NOT_NEEDED", "tell": "NOT_NEEDED", "report": "COMPLETED"}
    assert states(run, env=env) == found and "NOT_NEEDED" in done.stdout
    assert phase_status(run, "clean", env=env)["reason"] == "train is sealed"
    assert not list(run.glob("clean/*/leases/*")), "it began"
    why = afterok_json("why", run, env=env)
    assert why["healthy"] and "nothing is wrong: all 2 phases are sealed" in why["headline"]
    plan = {
        phase["phase"]: (phase["action"], phase["reasons"])
        for phase in afterok_json("plan", path, *overrides, "--run", run, env=env)["phases"]
    }
    assert plan["clean"] == plan["tell"] == ("skip", ["not needed: train is sealed"]) and plan["report"][0] == "reuse"
    submitted = afterok("submit", path, *overrides, "--run", run, env=env).stdout
    assert "all 4 phases" in submitted and "are sealed or not needed" in submitted
    if env:
        jobs = {entry.phase: entry.job for entry in Ledger(run / "ledger.jsonl").jobs()}
        wait_for(
            "the queue to be rid of them",
            lambda: (
                {row.state for phase in ("clean", "tell") for row in rows_of(Slurm(env), jobs[phase])} == {"CANCELLED"}
            ),
        )


EXCLUSIVE = """
name: exclusive
phases:
  first: {uses: tests.toy.numbers, array: 2, with: {seconds: 1.5}}
  second: {uses: tests.toy.secretive, needs: {first: singleton}, with: {seconds: 120}}  # or until it finds a file
"""


@pytest.mark.soak
def test_a_singleton_pair_never_runs_at_the_same_time_whichever_is_sent_first(tmp_path, dev_cluster):
    run, env = tmp_path / "run", dev_cluster.env()
    (tmp_path / "e.yaml").write_text(EXCLUSIVE)
    afterok("submit", tmp_path / "e.yaml", "first.with.fail_at=1", "--run", run, env=env)
    wait_for("second, after a failure too", lambda: states(run, env=env)["second"] == "RUNNING")
    assert states(run, env=env)["first"] == "FAILED"
    shown = afterok("resubmit", run, "first", "first.with.fail_at=null", "--dry-run", env=env).stdout
    second = {entry.phase: entry.job for entry in Ledger(run / "ledger.jsonl").jobs()}["second"]
    assert f"--dependency=afterany:{second} " in shown
    afterok("resubmit", run, "first", "first.with.fail_at=null", env=env)  # sent while second runs: it waits
    (next(run.glob("second/*/leases")).parent / "enough").touch()
    wait_for("the end", lambda: set(states(run, env=env).values()) == {"COMPLETED"})
    outcomes = [
        (name, json.loads(path.read_text()))
        for name in ("first", "second")
        for path in run.glob(f"{name}/attempts/*.json")
    ]
    (second,) = [outcome for name, outcome in outcomes if name == "second"]
    assert all(
        outcome["ended"] <= second["started"] or second["ended"] <= outcome["started"]
        for name, outcome in outcomes
        if name == "first"
    )


def test_a_singleton_is_no_input_and_enters_no_key(tmp_path):
    (tmp_path / "e.yaml").write_text(EXCLUSIVE)
    plan = afterok_json("plan", tmp_path / "e.yaml", "cluster=local", "--run", tmp_path / "run")
    (tmp_path / "e.yaml").write_text(EXCLUSIVE.replace("needs: {first: singleton}, ", ""))
    assert (
        afterok_json("plan", tmp_path / "e.yaml", "cluster=local", "--run", tmp_path / "run")["phases"][1]["key"]
        == plan["phases"][1]["key"]
    )


def test_several_types_at_once_and_the_nearest_of_a_wrong_one(tmp_path):
    needs = "needs: {train: afternotok, clean: singleton}"
    (tmp_path / "c.yaml").write_text(CLEAN.replace("needs: [{train: afterany}, {clean: afterany}]", needs))
    found = load_pipeline(tmp_path / "c.yaml").phases["report"].needs
    assert {need.phase: need.type for need in found} == {"train": "afternotok", "clean": "singleton"}
    (tmp_path / "c.yaml").write_text(CLEAN.replace("afternotok", "afternotk"))
    refused = afterok("plan", tmp_path / "c.yaml", check=2)
    assert "unknown dependency type 'afternotk' (did you mean afternotok?" in refused.stderr
