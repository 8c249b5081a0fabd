"""A profile's hooks on a real Slurm: a prolog runs once a job, and a node that fails its health check is left out.

And what a phase says of a QOS, an account or a reservation reaches its job.
"""

import pytest

from jobs.artifacts.run_folder import RunFolder
from jobs.retry import Cause
from slurm.client import Slurm
from tests.command import afterok, one_line, wait_for

NUMBERS = "name: one\nphases:\n  numbers: {uses: tests.toy.numbers, with: {start: 1}}\n"
PROFILE = """\
partitions: {batch: {}, long: {}}
roles: {cpu: {partition: batch, time: 5}}
"""


@pytest.fixture
def pipeline(tmp_path):
    (tmp_path / "one.yaml").write_text(NUMBERS)
    return tmp_path / "one.yaml"


def site(cluster):
    return {"SLURM_CONF": str(cluster.conf)}


def test_a_node_that_fails_its_health_check_is_named_and_the_job_runs_elsewhere(tmp_path, pipeline, dev_cluster):
    profile, run = tmp_path / "site.yaml", RunFolder(tmp_path / "run")
    profile.write_text(
        PROFILE
        + f"""\
hooks:
  prolog: ["touch {tmp_path}/prolog.$SLURM_JOB_ID.$SLURMD_NODENAME"]
  health: {{commands: ['[ "$SLURMD_NODENAME" != n1 ] || {{ echo "no link on ib0"; false; }}']}}
"""
    )
    afterok("run", pipeline, f"cluster={profile}", "--run", run.path, env=site(dev_cluster))
    first, last = sorted(run.outcomes("numbers"), key=lambda outcome: outcome.restart)
    assert (first.state, first.cause, first.node) == ("failed", Cause.NODE, "n1") and last.state == "sealed"
    log = run.log_path("numbers", 1, 0).read_text()
    assert "afterok: health check failed on node n1: " in log and "no link on ib0 (exit code 1)" in log
    assert "node failure: restart 1 of 3" in log
    job = Slurm(dev_cluster.env()).job(first.job)
    assert job["ExcNodeList"] == "n1" and job["Restarts"] == "1"
    assert len(list(tmp_path.glob("prolog.*"))) == 2  # once in each life, on its first node
    said = afterok("logs", run.path, "numbers", env=site(dev_cluster)).stdout
    assert "asks its nodes for their health" in said


def test_what_a_phase_says_of_the_site_reaches_its_job(tmp_path, pipeline, accounted_cluster):
    slurm = Slurm(accounted_cluster.env())
    profile, run = tmp_path / "site.yaml", tmp_path / "run"
    profile.write_text(PROFILE)
    said = ["numbers.resources.qos=small", "numbers.resources.account=main"]
    afterok("run", pipeline, *said, f"cluster={profile}", "--run", run, env=site(accounted_cluster))
    (outcome,) = wait_for("how it ended", lambda: RunFolder(run).outcomes("numbers"))
    job = slurm.job(outcome.job)
    assert (job["QOS"], job["Account"]) == ("small", "main")
    slurm.run(["scontrol", "create", "reservation", "reservationname=course", "starttime=now", "duration=60",
               "users=root" if job["UserId"].startswith("root(") else f"users={job['UserId'].partition('(')[0]}",
               "nodes=n2"])  # fmt: skip
    try:
        done = afterok("run", pipeline, "numbers.resources.reservation=course", "numbers.with.start=2",
                       f"cluster={profile}", "--run", run, env=site(accounted_cluster))  # fmt: skip
        (newest,) = wait_for("how it ended", lambda: RunFolder(run).outcomes("numbers", 2))
        job = slurm.job(newest.job)
        assert (job["Reservation"], job["NodeList"]) == ("course", "n2"), done.stdout
    finally:
        slurm.run(["scontrol", "delete", "reservationname=course"])


def test_the_command_line_is_laid_upon_the_profile_and_stays_with_the_run(tmp_path, pipeline, dev_cluster):
    profile, run = tmp_path / "site.yaml", RunFolder(tmp_path / "run")
    profile.write_text(PROFILE)
    words = [pipeline, f"cluster={profile}", "cluster.roles.cpu.time=0:07:00", "--run", run.path]
    done = afterok("submit", *words, env=site(dev_cluster))
    assert "the command line sets roles.cpu.time" in done.stdout
    assert "#SBATCH --time=7\n" in run.script_path(1, "numbers").read_text()
    afterok("resubmit", run.path, "numbers", "--again", env=site(dev_cluster))
    assert "#SBATCH --time=7\n" in run.script_path(2, "numbers").read_text()
    afterok("cancel", run.path, env=site(dev_cluster))
    wrong = afterok("plan", *words, "cluster.roles.cpu.tiem=1", env=site(dev_cluster), check=2)
    assert one_line(wrong).startswith("afterok: the command line: roles.cpu.tiem: unknown key (did you mean time?")
