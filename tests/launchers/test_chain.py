"""A phase whose job may not be requeued is a chain of links: each goes on from the last, dependents on the end."""

import contextlib

import pytest

from jobs.artifacts.run_folder import FrozenPhase, Outcome, RunFolder
from jobs.artifacts.seal import read_seal
from launchers.planning.chain import FIRST_LINKS, SPARE_LINKS, links_needed, surplus
from launchers.planning.ledger import Ledger
from slurm.client import Slurm, SlurmError
from slurm.dev import cluster as devcluster
from tests.cluster import crash_node, require_packages, rows_of
from tests.command import afterok, afterok_json, one_line, phase_status, states, wait_for

CHAIN = """
name: chain
phases:
  counter: {uses: tests.toy.counter, with: {steps: 40, seconds: 0.1}, resources: {partition: preempt, time: "0:10:00"}}
  total: {uses: tests.toy.total, with: {numbers: "${phases.counter.out}"}}
"""


def end(done, total, seconds, key="k", state="stopped"):
    return Outcome(
        0, 1, 0, state, 5, "", "h", "1", started=100.0, ended=100.0 + seconds, done=done, total=total, key=key
    )


PHASE = FrozenPhase("sft", "sft", "k", {}, {}, None, 1, False, {}, {}, 1, 1, 0)


@pytest.mark.parametrize(
    "outcomes, links",
    [
        ([], FIRST_LINKS),
        ([end(None, None, 50)], FIRST_LINKS),  # killed before it could say
        ([end(100, 1000, 1000)], 9 + SPARE_LINKS),  # 10 s a step, 900 steps left, 1000 s a link
        ([end(100, 1000, 1000), end(300, 1000, 1000)], 5 + SPARE_LINKS),  # 300 steps in 2000 s, 700 left
        ([end(1000, 1000, 4000, key="other", state="sealed")], 4 + SPARE_LINKS),  # other settings tell the step time
        ([end(100, 1000, 1000), end(0, 1000, 600)], 9 + SPARE_LINKS),  # a stop before the first step tells nothing
        ([end(1, 10**6, 1000)], 100),
    ],
)
def test_the_number_of_links_follows_from_measured_steps(outcomes, links):
    assert links_needed(PHASE, outcomes, 1000.0) == links


def test_surplus_links_are_taken_from_the_middle():
    assert surplus(0, 9, 3) == [1, 2, 3, 4, 5, 6] and surplus(8, 9, 3) == surplus(9, 9, 1) == []


@pytest.fixture
def chained(tmp_path, dev_cluster):
    """(pipeline, run, environment, Slurm) where the partition cancels what it preempts."""
    slurm = Slurm(dev_cluster.env())
    slurm.run(["scontrol", "update", "partition=preempt", "preemptmode=CANCEL"])
    (tmp_path / "chain.yaml").write_text(CHAIN)
    return tmp_path / "chain.yaml", tmp_path / "run", dev_cluster.env(), slurm


def jobs_of(run):
    return {entry.phase: entry.job for entry in Ledger(run / "ledger.jsonl").jobs()}


def link_states(slurm, job):
    return {row.array_index: row.state for row in rows_of(slurm, job)}


def began(run, link, attempt=1):
    wait_for(f"link {link}", lambda: list(run.glob(f"counter/*/leases/0000.a{attempt}.r{link}.*")))


def preempt(slurm, seconds=1):
    nodes = str(len(slurm.node_states()))
    slurm.sbatch(
        ["--partition=batch", f"--nodes={nodes}", "--exclusive", "--output=/dev/null", f"--wrap=sleep {seconds}"]
    )


def ask_to_stop(slurm, job):
    """What sbatch --signal does near the time limit. scancel tries a job in transition again, and finds it gone."""
    with contextlib.suppress(SlurmError):
        slurm.run(
            ["scancel", "--signal=USR2", next(row.job_id for row in rows_of(slurm, job) if row.state == "RUNNING")]
        )


def facts(run, phase):
    return read_seal(next(run.glob(f"{phase}/*/seal.json"))).facts


def test_a_chain_survives_being_cancelled_by_preemption_and_its_dependents_wait_for_the_last_link(chained):
    path, run, env, slurm = chained
    plan = afterok_json("plan", path, "--run", run, env=env)["phases"]
    assert [phase["links"] for phase in plan] == [FIRST_LINKS, 0]
    afterok("submit", path, "--run", run, env=env)
    jobs = jobs_of(run)
    assert rows_of(slurm, jobs["total"])[0].dependency == f"afterok:{jobs['counter']}_{FIRST_LINKS - 1}(unfulfilled)"
    began(run, 0)
    wait_for("steps", lambda: list(run.glob("counter/*/progress/0000.json")))
    preempt(slurm)
    wait_for("its end", lambda: link_states(slurm, jobs["counter"])[0] == "PREEMPTED")
    assert phase_status(run, "counter", env=env)["state"] in ("REQUEUED", "RUNNING")
    wait_for("the end", lambda: states(run, env=env)["total"] == "COMPLETED")
    assert [o.state for o in RunFolder(run).outcomes("counter")][:2] == ["stopped", "sealed"]
    assert len(facts(run, "counter")["starts"]) == 2 and facts(run, "total")["total"] == sum(range(40))
    found = link_states(slurm, jobs["counter"])  # no link ran for nothing but the last, which tells the dependents
    assert found == {0: "PREEMPTED", 1: "COMPLETED", 3: "COMPLETED"} and jobs_of(run) == jobs


@pytest.mark.soak
def test_a_link_that_is_asked_to_stop_exits_5_and_an_exception_ends_the_chain(chained):
    path, run, env, slurm = chained
    afterok("submit", path, "counter.with.fail_from=1", "--run", run, env=env)
    job = jobs_of(run)["counter"]
    began(run, 0)
    wait_for("steps", lambda: list(run.glob("counter/*/progress/0000.json")))
    ask_to_stop(slurm, job)
    wait_for("the end", lambda: phase_status(run, "counter", env=env)["state"] == "FAILED")
    assert slurm.job(f"{job}_0")["ExitCode"] == "5:0" and slurm.job(f"{job}_1")["ExitCode"] == "1:0"
    wait_for("the rest to go", lambda: set(link_states(slurm, job).values()) == {"FAILED"})
    # the last link tells the dependents that nothing came of it, without having begun
    assert slurm.job(f"{job}_3")["ExitCode"] == "7:0" and not list(run.glob("counter/*/leases/0000.a1.r[23].*"))
    assert "python exception; no further link" in next(run.glob("counter/logs/*.out")).read_text()
    total = phase_status(run, "total", env=env)
    assert (total["state"], total["reason"]) == ("PENDING", "DependencyNeverSatisfied")
    # the code was mended: another chain, and it waits on that
    again = afterok_json("submit", path, "--run", run, env=env)
    assert list(again["jobs"]) == ["counter"] and again["rewired"] == ["total"]
    wait_for("the end", lambda: states(run, env=env)["total"] == "COMPLETED")
    assert facts(run, "counter")["starts"][1] > 0


@pytest.mark.soak
def test_a_chain_that_proves_too_short_is_lengthened_and_one_too_long_shortened(chained):
    path, run, env, slurm = chained
    # 30 s a link: 67 links
    slow = ["counter.with.steps=4000", "counter.with.seconds=0.5", "counter.resources.time=0:02:00"]
    afterok("submit", path, *slow, "--run", run, env=env)
    jobs = jobs_of(run)
    began(run, 0)
    wait_for("steps", lambda: list(run.glob("counter/*/progress/0000.json")))
    ask_to_stop(slurm, jobs["counter"])
    began(run, 1)
    assert "`afterok submit` appends" in next(run.glob("counter/logs/*.out")).read_text()
    again = afterok_json("submit", path, *slow, "--run", run, env=env)
    assert list(again["jobs"]) == ["counter"] and again["rewired"] == ["total"]
    entry = list(Ledger(run / "ledger.jsonl").jobs())[-1]
    assert entry.links > 40 and entry.waits == {"counter": f"{jobs['counter']}_{FIRST_LINKS - 1}"}
    assert rows_of(slurm, jobs["total"])[0].dependency == f"afterok:{entry.awaited}(unfulfilled)"
    assert afterok_json("submit", path, *slow, "--run", run, env=env)["jobs"] == {}
    afterok("cancel", run, env=env)


@pytest.mark.soak
def test_a_time_limit_ends_a_link_and_the_next_goes_on(chained):
    """Slurm's clock is minutes: a link of one minute, asked to stop 30 s before its end, and some seconds early."""
    path, run, env, slurm = chained
    profile = path.with_name("site.yaml")
    profile.write_text(
        "partitions: {preempt: {requeue: false}, batch: {}}\nroles: {cpu: {partition: batch}}\nsignal_lead_s: 30\n"
    )
    slow = ["counter.with.steps=600", "counter.resources.time=0:01:00", f"cluster={profile}"]
    afterok("submit", path, *slow, "--run", run, env=env)
    job = jobs_of(run)["counter"]
    assert "#SBATCH --signal=USR2@30\n" in (run / "submissions/1/scripts/counter.sh").read_text()
    wait_for("the end", lambda: states(run, env=env)["total"] == "COMPLETED", 300)
    assert [o.state for o in RunFolder(run).outcomes("counter")][-1] == "sealed" and len(
        facts(run, "counter")["starts"]
    ) > 1
    assert facts(run, "total")["total"] == sum(range(600)) and jobs_of(run)["counter"] == job


@pytest.mark.soak
def test_a_link_whose_node_is_lost_is_followed_by_links_that_avoid_that_node(short_folder, tmp_path):
    require_packages()
    cluster = devcluster.up(short_folder, nodes=3, settings={"SlurmdTimeout": "3", "JobRequeue": "0"})
    (tmp_path / "chain.yaml").write_text(CHAIN.replace("partition: preempt, ", ""))
    run, env, slurm = tmp_path / "run", cluster.env(), Slurm(cluster.env())
    afterok("submit", tmp_path / "chain.yaml", "counter.with.steps=100", "counter.with.every=5", "--run", run, env=env)
    job = jobs_of(run)["counter"]
    began(run, 0)
    wait_for("a checkpoint", lambda: list(run.glob("counter/*/counter.json")))
    guilty = next(row.nodelist for row in rows_of(slurm, job) if row.state == "RUNNING")
    crash_node(cluster, guilty)
    wait_for("the next link", lambda: link_states(slurm, job).get(1) == "RUNNING", 120)
    began(run, 1)
    assert link_states(slurm, job)[0] == "NODE_FAIL" and slurm.job(f"{job}_3")["ExcNodeList"] == guilty
    (lost,) = [o for o in RunFolder(run).outcomes("counter") if o.cause]
    assert (lost.cause, lost.node) == ("node failure", guilty)
    wait_for("the end", lambda: states(run, env=env)["total"] == "COMPLETED", 120)
    assert facts(run, "counter")["starts"][1] > 0


@pytest.mark.soak
def test_a_node_that_a_links_health_check_found_unhealthy_is_left_out_by_all_later_links(chained):
    path, run, env, slurm = chained
    profile = path.with_name("site.yaml")
    profile.write_text(
        "partitions: {preempt: {}, batch: {}}\nroles: {cpu: {partition: batch}}\n"
        """hooks: {health: {commands: ['[ "$SLURMD_NODENAME" != n1 ]']}}\n"""
    )
    afterok("submit", path, "counter.with.steps=30", f"cluster={profile}", "--run", run, env=env)
    job = jobs_of(run)["counter"]
    wait_for("the end", lambda: states(run, env=env)["total"] == "COMPLETED")
    (sick,) = [outcome for outcome in RunFolder(run).outcomes("counter") if outcome.cause]
    assert (sick.cause, sick.node, sick.restart) == ("node failure", "n1", 0)
    found = link_states(slurm, job)
    assert found[0] == "FAILED" and found[1] == "COMPLETED"
    for link in sorted(found)[1:]:
        assert slurm.job(f"{job}_{link}")["ExcNodeList"] == "n1" != slurm.job(f"{job}_{link}").get("NodeList")


def test_a_time_limit_shorter_than_the_signals_lead_is_refused(chained):
    path, run, env, _ = chained
    line = one_line(afterok("plan", path, "counter.resources.time=0:01:00", "--run", run, env=env, check=2))
    assert "0:01:00 is over before the signal to stop, which comes 90 s before the limit" in line and "0:02:00" in line
