"""Each check of preflight on a real Slurm with accounting: `plan` refuses, and what Slurm itself would have made of it.

Slurm either takes the job, which then never starts (its pending reason), starts too late or fails once it runs; or it
refuses the job itself, after other jobs of the pipeline are in the queue already. Which it is stands in each case.
"""

import contextlib
import re
import subprocess
from datetime import datetime, timedelta

import pytest

from data_tools.mistake import Problem, UserMistake
from jobs.artifacts.run_folder import RunFolder
from jobs.kind import PhaseKind
from jobs.schema.pipeline import load_pipeline
from launchers.observe.foresee import predicted_starts, scripts
from launchers.planning import planner
from launchers.planning.planner import make_plan
from slurm.checks import CHECKS, sort_out
from slurm.client import Slurm, SlurmError
from slurm.detect import find_cluster
from slurm.dev.cluster import DevCluster
from slurm.verify.live import user_name
from tests.cluster import wait_until
from tests.command import ROOT

ONE = "name: one\nphases:\n  counter: {uses: tests.toy.counter, with: {steps: 1}}\n"
SITE = """\
partitions: {batch: {}, long: {}, preempt: {requeue: true}, bathc: {}}
roles: {cpu: {partition: batch, time: 10}}
"""
REFUSES = "it refuses the job itself"

# check, what is changed of the cluster, what the phase asks for, Slurm's word
CASES = [
    ("P001", "", "partition=bathc", REFUSES),
    ("P002", "", "time=1-01:00:00", "PartitionTimeLimit"),
    ("P003", "partition=batch maxnodes=1", "nodes=2", "PartitionNodeLimit"),
    ("P003", "", "nodes=3", "PENDING Partition"),
    ("P005", "", "gpus_per_node=9", REFUSES),
    ("P005", "", "gres=gpu:h100:1", REFUSES),
    ("P006", "", "cpus_per_task=65", REFUSES),
    ("P006", "", "mem_gib=251", REFUSES),
    ("P006", "partition=batch maxcpuspernode=2", "cpus_per_task=4", REFUSES),
    ("P007", "partition=batch allowqos=small", "qos=normal", "Job's QOS not permitted to use this"),
    ("P007", "partition=batch allowaccounts=other", "account=main", "account not permitted to use this"),
    ("P008", "partition=batch state=DOWN", "nodes=1", "PartitionDown"),
    ("P009", "", "constraint=sxm", REFUSES),
    ("P010", "", "gres=nvme:1", REFUSES),
    ("P011", "nodename=n2 state=DRAIN reason=test", "nodes=2", "DOWN, DRAINED"),
    ("P012", "partition=batch state=INACTIVE", "nodes=1", REFUSES),
    ("Q001", "", "qos=hihg", REFUSES),
    ("Q002", "", "account=mine", REFUSES),
    ("Q003", "qos small set maxwall=5", "qos=small", "QOSMaxWallDurationPerJobLimit"),
    ("Q003", "account main set grptres=node=1", "nodes=2", "AssocGrpNodeLimit"),
    ("R004", "", "reservation=cours", REFUSES),
    ("R005", "reservation 60", "reservation=ours nodes=2", REFUSES),
    ("R005", "reservation 60 corecnt=2", "reservation=ours cpus_per_task=4", "PENDING"),
    ("L001", "", "licenses=lustre:1", REFUSES),
    ("V001", "maintenance 5", "nodes=1", "ReqNodeNotAvail"),
    ("V001", "reservation 5 flags=magnetic", "nodes=1", "RUNNING"),  # and it is killed when the reservation ends
]
UNDO = {
    "partition": "scontrol update partition=batch maxnodes=UNLIMITED maxcpuspernode=UNLIMITED state=UP allowqos=ALL "
    "allowaccounts=ALL",
    "nodename": "scontrol update nodename=n2 state=RESUME",
    "qos": "sacctmgr -i modify qos small set maxwall=-1",
    "account": "sacctmgr -i modify account main set grptres=node=-1",
    "reservation": "scontrol delete reservationname=ours",
    "maintenance": "scontrol delete reservationname=ours",
}


@pytest.fixture
def slurm(accounted_cluster, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", str(accounted_cluster.conf))
    return Slurm(accounted_cluster.env())


@pytest.fixture
def plan(tmp_path, slurm):
    """A function that plans the one phase, with what is said of its resources and of the plan."""
    (tmp_path / "one.yaml").write_text(ONE)
    (tmp_path / "site.yaml").write_text(SITE)

    def of(*asked, waive=(), **words):
        overrides = [f"counter.resources.{word}" for word in asked] + [f"cluster={tmp_path}/site.yaml"]
        pipeline = load_pipeline(tmp_path / "one.yaml", overrides)
        pipeline.waive = list(waive)
        return make_plan(pipeline, RunFolder(tmp_path / "run"), find_cluster(pipeline.cluster), **words)

    return of


@contextlib.contextmanager
def changed(slurm, update):
    """Change the cluster for a while: a partition, a node, a QOS, an account, or a reservation in so many minutes."""
    kind = re.split("[= ]", update)[0]
    if kind in ("reservation", "maintenance"):
        minutes, *more = update.split()[1:]
        upkeep = datetime.now() + timedelta(minutes=int(minutes))
        said = ["starttime=now", f"duration={minutes}", f"users={user_name()}"]
        if kind == "maintenance":
            said = [f"starttime={upkeep:%Y-%m-%dT%H:%M:%S}", "duration=60", "users=root", "flags=maint"]
        nodes = "n1" if kind == "reservation" else "n1,n2"
        slurm.run(["scontrol", "create", "reservation", "reservationname=ours", f"nodes={nodes}", *said, *more])
    elif update:
        program = ["sacctmgr", "-i", "modify"] if kind in ("qos", "account") else ["scontrol", "update"]
        slurm.run([*program, *update.split()])
    try:
        yield
    finally:
        if update:
            with contextlib.suppress(SlurmError):  # a reservation that is over is gone
                slurm.run(UNDO[kind].split())


def refused(plan, *asked, **words):
    """Return {check: line} of a plan that is refused."""
    with pytest.raises(UserMistake) as error:
        plan(*asked, **words)
    return {problem.check: str(problem) for problem in error.value.problems}


def sent_all_the_same(plan, slurm, monkeypatch, tmp_path, *asked):
    """Send what the plan refuses; return ({check: line}, the job's id, "") or ({...}, "", what Slurm says against it).

    Everything that was found is let go, as if each check were not there.
    """
    found: list[Problem] = []
    with monkeypatch.context() as let_go:
        let_go.setattr(planner, "sort_out", lambda problems, waived: (found.extend(problems) or [], [], []))
        text = scripts(plan(*asked))["counter"]
    refused, _, _ = sort_out(found, ())
    lines = {problem.check: str(problem) for problem in refused}
    with contextlib.suppress(FileExistsError):
        (tmp_path / "run" / "counter" / "logs").mkdir(parents=True)
    (tmp_path / "job.sh").write_text(
        text.partition("run_element() {")[0] + "sleep 300\n"
    )  # not the work: it is not there
    try:
        return lines, slurm.sbatch([str(tmp_path / "job.sh")]), ""
    except SlurmError as error:
        return lines, "", str(error)


def state_of(slurm, job):
    return slurm.run(["squeue", "-h", "--states=all", "-j", job, "-o", "%T %r"]).strip()


@pytest.mark.parametrize(
    "check, update, asked, word", CASES, ids=[f"{case[0]}-{place}" for place, case in enumerate(CASES)]
)
def test_what_is_refused_would_have_waited_for_ever_or_been_refused_late(
    plan, slurm, monkeypatch, tmp_path, check, update, asked, word
):
    with changed(slurm, update):
        found, job, said = sent_all_the_same(plan, slurm, monkeypatch, tmp_path, *asked.split())
        try:
            assert list(found) == [check], found
            assert bool(said) == (word == REFUSES), said or state_of(slurm, job)
            if job:
                wait_until(lambda: word in state_of(slurm, job), f"{word}, and not {state_of(slurm, job)}", 60)
        finally:
            if job:
                slurm.cancel([job])


def test_a_job_that_fits_is_planned_and_notes_refuse_nothing(plan, slurm):
    fits = plan()
    assert (fits.told, fits.waived, fits.not_asked) == ([], [], [])
    assert re.match(r"20\d\d-", predicted_starts(fits)["counter"])
    (note,) = plan("partition=preempt").told
    assert note.check == "R003" and "has 0 s (GraceTime)" in note.message


def test_a_preempted_job_that_the_profile_would_requeue_is_lost(plan, slurm, monkeypatch, tmp_path):
    slurm.run(["scontrol", "update", "partition=preempt", "preemptmode=CANCEL"])
    try:
        found, job, _ = sent_all_the_same(plan, slurm, monkeypatch, tmp_path, "partition=preempt", "nodes=2")
        assert list(found) == ["R001"] and "PreemptMode=CANCEL" in found["R001"]
        wait_until(lambda: state_of(slurm, job).startswith("RUNNING"), "its start", 30)
        other = slurm.sbatch(["--partition=batch", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"])
        wait_until(lambda: state_of(slurm, job).startswith("PREEMPTED"), "its end", 30)
        assert slurm.job(job)["Requeue"] == "1" and slurm.job(job)["Restarts"] == "0"
        wait_until(lambda: state_of(slurm, other).startswith("COMPLETED"), "that of the other", 30)
        assert [problem.check for problem in plan("partition=preempt", waive=["R001"]).waived] == ["R001"]
    finally:
        slurm.run(["scontrol", "update", "partition=preempt", "preemptmode=REQUEUE"])


@pytest.mark.soak
@pytest.mark.parametrize(
    "check, flags, asked", [("R005", "", "reservation=ours"), ("V001", "flags=magnetic", "nodes=1")]
)
def test_a_job_that_outlasts_its_reservation_is_killed_at_its_end(
    plan, slurm, monkeypatch, tmp_path, check, flags, asked
):
    """Not when its time limit, and the signal before it, are near: what it did since its last checkpoint is lost.

    A reservation that is MAGNETIC takes jobs in that do not name it.
    """
    with changed(slurm, f"reservation 1 {flags}"):
        found, job, _ = sent_all_the_same(plan, slurm, monkeypatch, tmp_path, asked)
        assert "when Slurm kills " in found[check]
        wait_until(lambda: state_of(slurm, job).startswith("RUNNING"), "its start", 30)
        wait_until(lambda: not state_of(slurm, job).startswith("RUNNING"), "its end", 150)
        assert slurm.job(job)["TimeLimit"] == "00:10:00"
        assert state_of(slurm, job).startswith("TIMEOUT"), state_of(slurm, job)


def test_a_folder_of_logs_that_cannot_be_made_is_a_job_without_a_word(plan, slurm, monkeypatch, tmp_path):
    (tmp_path / "run" / "counter").mkdir(parents=True)
    (tmp_path / "run" / "counter" / "logs").write_text("")
    found, job, _ = sent_all_the_same(plan, slurm, monkeypatch, tmp_path)
    assert "is no folder, and the logs of counter belong below it" in found["F005"]
    wait_until(lambda: slurm.job(job)["JobState"] == "FAILED", "its end", 60)
    assert slurm.job(job)["ExitCode"] == "0:53"


def test_a_run_that_slurm_does_not_find_again_is_a_job_without_a_word(plan, slurm, tmp_path):
    """It reads "%j" in a name as the id of the job, and drops a backslash."""
    for name in ("50%j", "lo\\st"):
        (tmp_path / name).mkdir()
        job = slurm.sbatch([f"--output={tmp_path / name}/log", "--wrap=true"])
        wait_until(lambda job=job: slurm.job(job)["JobState"] == "FAILED", "its end", 60)
        assert slurm.job(job)["ExitCode"] == "0:53" and not list((tmp_path / name).iterdir())
        with pytest.raises(UserMistake) as refused:
            make_plan(load_pipeline(tmp_path / "one.yaml", []), RunFolder(tmp_path / name), find_cluster("slurm"))
        assert [problem.check for problem in refused.value.problems] == ["F003"]


@pytest.fixture
def node_that_does_not_see(accounted_cluster, slurm, tmp_path, monkeypatch):
    """A node's name; in its slurmd's own namespace of mounts another, empty filesystem lies at `tmp_path`."""
    hidden = 'mount -t tmpfs none "$0" && exec "$@"'
    alone = ["unshare", "--mount", "--propagation=private", "sh", "-c", hidden, str(tmp_path)]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount in a namespace of its own")
    command = accounted_cluster._command("n2")

    def restart():
        wait_until(lambda: slurm.node_states()["n2"] == "idle", "n2 has told of its job's end")
        accounted_cluster.kill_daemon("n2")
        slurm.run(["scontrol", "update", "nodename=n2", "state=down", "reason=restart"])  # until it registers again
        accounted_cluster.start_daemon("n2")
        wait_until(lambda: slurm.node_states()["n2"] == "idle", "n2 is back")

    with monkeypatch.context() as there:
        there.setattr(DevCluster, "_command", lambda self, name: [*alone, *command])
        restart()
    yield "n2"
    restart()


def test_a_run_that_its_node_does_not_see_is_a_job_without_a_word(
    plan, slurm, monkeypatch, tmp_path, node_that_does_not_see
):
    (tmp_path / "seen_by_all").mkdir()
    there = f"batch: {{extra_sbatch: {{nodelist: {node_that_does_not_see}}}}}"
    storage = f"storage: {{shared: [{tmp_path}/seen_by_all]}}\n"
    (tmp_path / "site.yaml").write_text(SITE.replace("batch: {}", there) + storage)
    found, job, _ = sent_all_the_same(plan, slurm, monkeypatch, tmp_path)
    assert list(found) == ["F003"] and "is in no folder that profile" in found["F003"]
    wait_until(lambda: slurm.job(job)["JobState"] == "FAILED", "its end", 60)
    assert slurm.job(job)["ExitCode"] == "0:53" and not list((tmp_path / "run").rglob("*.*"))


def test_an_array_longer_than_slurms_is_refused_by_sbatch(slurm):
    """`verify` asks for it (tests/slurm/test_verify.py), and a plan shares the elements of longer ones out ("P004")."""
    with pytest.raises(SlurmError, match="Invalid job array specification"):
        slurm.sbatch(["--array=0-4001", "--output=/dev/null", "--wrap=true"])


def test_a_disk_without_room_for_the_checkpoints_is_refused_until_it_is_waived(plan, monkeypatch, tmp_path):
    monkeypatch.setattr(PhaseKind, "costs", lambda self, config, placement: {"bytes": 2.0**60, "seconds": 7200.0})
    line = refused(plan)["D001"]
    assert (
        "1,048,576.0 TiB of checkpoints and weights at the least (counter 1,048,576.0 TiB)" in line
        and "keep fewer" in line
    )
    made = plan("gpus_per_node=2", "nodes=2", "time=3:00:00", waive=["D001"])
    assert [problem.check for problem in made.waived] == ["D001"] and made.notes[0].endswith("[D001]")
    # GPU-hours: 2 nodes x 2 GPUs, 4 links of 3 hours at most, 2 hours planned
    assert vars(made.gpu_hours) == {"bound": 4 * 3.0 * max(made.phases[0].frozen.links, 1), "planned": 8.0}


def test_what_the_budget_does_not_cover_is_refused_with_the_hours_of_each_phase(plan):
    line = refused(plan, "gpus_per_node=2", "time=3:00:00", budget=5.9)["B001"]
    assert "the time limits come to 6.00 GPU-hours (counter 6.00), and the budget is 5.9" in line
    assert plan("gpus_per_node=2", "time=3:00:00", budget=6.0).gpu_hours.bound == 6.0


def test_refusals_and_unknown_ids_are_not_waived_and_all_is_told_at_once(plan):
    found = refused(plan, "time=2-0", "qos=hihg", "nodes=9", waive=["P002", "P0"])
    assert {"P002", "Q001", "P003", ""} == set(found)
    with pytest.raises(UserMistake) as error:
        plan(waive=["P002"])
    assert "P002 (the time limit is at most the partition's) cannot be waived" in str(error.value)


def test_every_check_is_broken_somewhere():
    """What is refused by pipeline or profile alone needs no cluster: tests of it are elsewhere."""
    files = ("launchers/test_preflight.py", "launchers/test_submit_limit.py", "launchers/test_plan_verb.py",
             "launchers/test_profile_verbs.py", "launchers/test_containers.py", "launchers/test_plan.py",
             "slurm/test_verify.py")  # fmt: skip
    texts = [(ROOT / "tests" / name).read_text() for name in files]
    assert [check for check in CHECKS if not any(f'"{check}"' in text or f"[{check}]" in text for text in texts)] == []
    on_slurm = "".join(texts[:2])
    assert [check for check in CHECKS if not CHECKS[check].beyond_slurm and check not in on_slurm] == []
