"""A new attempt at one phase: what waits on it is rewired on the real cluster, not sent again."""

import json
from types import SimpleNamespace

import pytest

from data_tools.base import durable
from data_tools.base.indices import Indices
from data_tools.mistake import UserMistake
from launchers.planning.ledger import Ledger
from launchers.submission.submit import _refuse_elements
from slurm.client import Slurm
from tests.command import MIDDLE, afterok, afterok_json, one_line, states, wait_for


def test_thousands_of_missing_elements_are_told_in_one_short_line():
    frozen = SimpleNamespace(elements=3000)
    planned = SimpleNamespace(name="p", frozen=frozen, missing=Indices.of(range(1, 3000, 2)))
    plan = SimpleNamespace(run=SimpleNamespace(newest_submission=lambda: 1, frozen=lambda number: {}))
    with pytest.raises(UserMistake) as caught:
        _refuse_elements(plan, planned, [1, 2])
    assert str(caught.value) == "p: element 2 is sealed already; missing are 1,3,5,7,9,11,…"


@pytest.fixture
def failed(tmp_path, dev_cluster):
    return fail(tmp_path / "run", dev_cluster)


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory, dev_cluster):
    """Like `failed`, and left as it is by the tests that use it."""
    return fail(tmp_path_factory.mktemp("failed") / "run", dev_cluster)


def fail(run, dev_cluster):
    """Return a run whose phase `mid` failed while three dependents wait, and the cluster's environment."""
    env = dev_cluster.env()
    afterok("run", MIDDLE, "mid.with.die_on_rank=0", "--run", run, env=env, check=1)
    assert states(run, env=env) == {
        "first": "COMPLETED",
        "mid": "FAILED",
        "left": "PENDING",
        "right": "PENDING",
        "last": "PENDING",
    }
    return run, env


def jobs_of(run):
    return {entry.phase: entry.job for entry in Ledger(run / "ledger.jsonl").jobs()}


def finish(run, env):
    wait_for("the end", lambda: set(states(run, env=env).values()) == {"COMPLETED"})


def test_dependents_of_a_resubmitted_phase_run_after_it_without_being_resubmitted(failed):
    run, env = failed
    before = jobs_of(run)
    done = afterok_json("resubmit", run, "mid", "mid.with.die_on_rank=-1", "mid.with.factor=5", env=env)
    assert list(done["jobs"]) == ["mid"] and sorted(done["rewired"]) == ["last", "left", "right"]
    finish(run, env)
    after = jobs_of(run)
    assert {phase: job for phase, job in after.items() if phase != "mid"} == {
        p: j for p, j in before.items() if p != "mid"
    }
    facts = {p["phase"]: p["facts"] for p in afterok_json("status", run, env=env)["phases"]}
    assert facts["mid"]["total"] == 15 and facts["last"]["total"] == 21  # (0 + 1 + 2) · 5; 10 + 11
    events = [e["event"] for e in Ledger(run / "ledger.jsonl").events() if e.get("submission") == 2]
    assert events == ["submission", "sending", "job", "rewire", "rewire", "rewire", "released"]
    for phase in ("left", "right", "last"):  # sealed under the key of the new settings, by the job that had waited
        seal = json.loads(next(run.glob(f"{phase}/*/seal.json")).read_text())
        assert seal["submission"] == 2


def test_resubmitting_without_a_change_revives_the_same_jobs(failed):
    run, env = failed
    plan = run / "submissions/1/pipeline.json"
    # the user mended the code
    plan.write_text(plan.read_text().replace("mid.with.die_on_rank=0", "mid.with.die_on_rank=-1"))
    durable.write_checked(plan, durable.read_json(plan))
    before = jobs_of(run)
    assert "now waits on the new attempt" in afterok("resubmit", run, "mid", env=env).stdout
    finish(run, env)
    assert {p: j for p, j in jobs_of(run).items() if p != "mid"} == {p: j for p, j in before.items() if p != "mid"}


def test_a_dry_run_shows_the_calls_and_makes_none(looked_at):
    run, env = looked_at
    before = (run / "ledger.jsonl").read_bytes()
    jobs = jobs_of(run)
    shown = afterok("resubmit", run, "mid", "mid.with.factor=7", "--dry-run", env=env).stdout
    assert f"sbatch --hold {run}/submissions/2/scripts/mid.sh" in shown
    assert f"scontrol update jobid={jobs['left']} dependency=afterok:<mid>" in shown
    assert shown.strip().endswith("scontrol release <mid>")
    assert (run / "ledger.jsonl").read_bytes() == before and not (run / "submissions/2").exists()


def test_a_finished_dependent_whose_key_changed_is_sent_again(tmp_path, dev_cluster):
    run, env = tmp_path / "run", dev_cluster.env()
    afterok("run", MIDDLE, "--run", run, env=env)
    again = afterok_json("resubmit", run, "mid", "mid.with.factor=3", env=env)
    assert sorted(again["jobs"]) == ["last", "left", "mid", "right"] and again["rewired"] == []
    finish(run, env)
    refused = afterok("resubmit", run, "mid", "mid.with.factor=3", env=env, check=2)
    assert "mid is sealed under these settings" in one_line(refused)


def test_only_the_named_elements_run_again(tmp_path, dev_cluster):
    run, env = tmp_path / "run", dev_cluster.env()
    afterok("run", MIDDLE, "first.with.fail_at=1", "--run", run, env=env, check=1)
    seals = {path: path.read_bytes() for path in run.glob("first/*/seals/*.json")}
    assert "element 0 is sealed already" in one_line(
        afterok("resubmit", run, "first", "--elements", "0-1", env=env, check=2)
    )
    assert "elements 0 to 2, not 9" in one_line(afterok("resubmit", run, "first", "--elements", "9", env=env, check=2))
    afterok("resubmit", run, "first", "first.with.fail_at=null", "--elements", "1", env=env)
    finish(run, env)
    assert {path: path.read_bytes() for path in seals} == seals
    assert [e.elements for e in Ledger(run / "ledger.jsonl").jobs() if e.phase == "first"] == [[0, 1, 2], [1]]


AFTERCORR = """
name: corr
phases:
  first: {uses: tests.toy.numbers, array: 3}
  pair: {uses: tests.toy.numbers, array: 3, needs: [{first: aftercorr}], with: {start: 100}}
"""


def test_aftercorr_partners_are_repaired_element_by_element(tmp_path, dev_cluster):
    run, env = tmp_path / "run", dev_cluster.env()
    (tmp_path / "corr.yaml").write_text(AFTERCORR)
    afterok("run", tmp_path / "corr.yaml", "first.with.fail_at=1", "--run", run, env=env, check=1)
    job = jobs_of(run)["pair"]
    live = [row for row in Slurm(env).queue() if row.array_job_id == job and row.state == "PENDING"]
    assert [row.array_index for row in live] == [1]  # its partners 0 and 2 have run
    done = afterok_json("resubmit", run, "first", "first.with.fail_at=null", env=env)
    assert list(done["jobs"]) == ["first"] and done["rewired"] == ["pair"]
    finish(run, env)
    assert jobs_of(run)["pair"] == job


def test_a_running_phase_is_replaced_and_its_dependents_follow(tmp_path, dev_cluster):
    run, env = tmp_path / "run", dev_cluster.env()
    afterok("submit", MIDDLE, "first.with.seconds=60", "--run", run, env=env)
    wait_for("first to run", lambda: states(run, env=env)["first"] == "RUNNING")
    old = jobs_of(run)["first"]
    afterok("resubmit", run, "first", "first.with.seconds=0.1", env=env)
    finish(run, env)
    assert {row.state for row in Slurm(env).queue() if old in (row.job_id, row.array_job_id)} == {"CANCELLED"}


def test_a_local_run_is_resubmitted_too(tmp_path):
    run = tmp_path / "run"
    afterok("run", MIDDLE, "mid.with.die_on_rank=0", "cluster=local", "--run", run, check=1)
    done = afterok_json("resubmit", run, "mid", "mid.with.die_on_rank=-1")
    assert sorted(done["jobs"]) == ["last", "left", "mid", "right"]
    finish(run, {})


def test_wrong_names_are_refused_with_the_nearest(looked_at):
    run, env = looked_at
    assert "did you mean mid?" in one_line(afterok("resubmit", run, "midd", env=env, check=2))
    assert "did you mean factor?" in one_line(afterok("resubmit", run, "mid", "mid.with.facto=2", env=env, check=2))
    for wrong in ("a-b", "9-3", "", "1%2"):  # a range of nothing must not mean everything
        assert "write indices and ranges" in one_line(
            afterok("resubmit", run, "mid", f"--elements={wrong}", env=env, check=2)
        )
