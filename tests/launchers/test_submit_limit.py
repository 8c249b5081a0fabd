"""On a cluster with accounting the pipeline fits into what its user may queue, or is refused with the numbers."""

import pytest

from launchers.planning.ledger import Ledger
from slurm.client import Slurm
from slurm.printed import ENDED_STATES, SubmitLimit, parse_submit_limit
from tests.command import afterok, afterok_json, one_line, states, wait_for

WIDE = """
name: wide
phases:
  first: {uses: tests.toy.numbers, array: 13}
  pair: {uses: tests.toy.numbers, array: 13, needs: [{first: aftercorr}], with: {start: 100}}
  total: {uses: tests.toy.total, with: {numbers: "${phases.pair.out}"}}
"""
SITE = """
partitions: {batch: {qos: small}}
roles: {cpu: {partition: batch}}
"""


def test_the_least_limit_counts_with_its_name():
    accounts, quality = "main|normal|50\nother|normal|\n", "normal|\nsmall|6\n"
    assert parse_submit_limit(accounts, quality, {""}) == SubmitLimit(50, "account main (MaxSubmitJobs)")
    assert parse_submit_limit(accounts, quality, {"small"}) == SubmitLimit(6, "QOS small (MaxSubmitJobsPerUser)")
    assert parse_submit_limit("main|small|\n", quality, {""}) == SubmitLimit(6, "QOS small (MaxSubmitJobsPerUser)")
    assert parse_submit_limit("main||\n", quality, {""}) is None


@pytest.fixture
def limited(tmp_path, accounted_cluster):
    """(pipeline, profile, run, environment) of a user who may have 6 jobs in the queue."""
    (tmp_path / "wide.yaml").write_text(WIDE)
    (tmp_path / "site.yaml").write_text(SITE)
    return tmp_path / "wide.yaml", tmp_path / "site.yaml", tmp_path / "run", accounted_cluster.env()


@pytest.mark.parametrize("soak", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["submitted", "run"])
def test_elements_share_tasks_so_that_the_whole_pipeline_fits_the_users_limit(limited, soak):
    path, profile, run, env = limited
    afterok("submit", path, f"cluster={profile}", "--run", run, env=env)
    jobs = {entry.phase: entry for entry in Ledger(run / "ledger.jsonl").jobs()}
    assert (jobs["first"].batch, jobs["pair"].batch, jobs["total"].batch) == (7, 7, 1)  # 2 + 2 + 1 tasks of at most 6
    if not soak:  # that elements in one task come out as they should is shown in test_arrays.py
        afterok("cancel", run, env=env)
        wait_for("their end", lambda: {row.state for row in Slurm(env).queue()} <= ENDED_STATES)
        return
    wait_for("the end", lambda: set(states(run, env=env).values()) == {"COMPLETED"}, 120)
    facts = {phase["phase"]: phase["facts"] for phase in afterok_json("status", run, env=env)["phases"]}
    assert facts["total"]["total"] == sum(range(100, 113))


def test_what_cannot_fit_is_refused_with_the_numbers_before_anything_is_sent(limited):
    path, profile, run, env = limited
    slurm = Slurm(env)
    others = slurm.sbatch(["--qos=small", "--array=0-3", "--hold", "--output=/dev/null", "--wrap=true"])
    line = one_line(afterok("submit", path, f"cluster={profile}", "--run", run, env=env, check=2))
    assert "3 phases are 3 jobs at the least" in line and "QOS small (MaxSubmitJobsPerUser) allows 6" in line
    assert "4 are other jobs of yours" in line and "[Q004]" in line and not (run / "submissions").exists()
    # The profile promises more than Slurm allows:
    # the refusal itself is told with the numbers, and nothing stays behind.
    profile.write_text(SITE + "max_submit_jobs: 1000\n")
    line = one_line(afterok("submit", path, f"cluster={profile}", "--run", run, env=env, check=2))
    assert "QOSMaxSubmitJobPerUserLimit" in line and "first is 13 job(s), array elements counted, 4 of yours" in line
    assert "QOS small (MaxSubmitJobsPerUser) allows 6" in line and "nothing of submission 1 will run" in line
    assert {row.array_job_id for row in slurm.queue() if row.state == "PENDING"} == {others}
    slurm.cancel([others])
