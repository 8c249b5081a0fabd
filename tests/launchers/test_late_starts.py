"""Whatever starts late, what is sealed stands; what is lost or altered is sealed anew, that and nothing else.

The elements of an aftercorr phase are started by hand, as Slurm starts them: again, twice, requeued, preempted, in one
task, for an older submission. The daemons' own late starts: test_arrays.py.
"""

import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest

from jobs import worker
from jobs.artifacts import consolidate
from jobs.artifacts.layout import FINISH
from jobs.artifacts.owner import Owner
from jobs.artifacts.run_folder import Outcome, RunFolder
from jobs.artifacts.seal import read_seal
from jobs.retry import EXIT_LEASE_HELD, EXIT_SEALED
from jobs.schema.pipeline import load_pipeline
from launchers.planning.planner import make_plan
from launchers.submission.freeze import freeze
from slurm.detect import find_cluster
from tests.command import afterok, afterok_json, one_line

PIPELINE = """
name: late
phases:
  first: {uses: tests.toy.numbers, array: 3}
  pair: {uses: tests.toy.numbers, array: 3, needs: [{first: aftercorr}], with: {start: 100}}
  last: {uses: tests.toy.numbers, needs: [pair], with: {start: 1}}
"""
FORK = multiprocessing.get_context("fork")


class Run:
    """A run whose workers are started here, each in a process of its own."""

    def __init__(self, folder: Path):
        self.file, self.run = folder / "late.yaml", RunFolder(folder / "run")
        if not self.file.exists():
            self.file.write_text(PIPELINE)

    def plan(self, verify=False):
        return make_plan(load_pipeline(self.file, ["cluster=local"]), self.run, find_cluster("local"), verify)

    def actions(self, **kwargs):
        return {phase.name: phase.action for phase in self.plan(**kwargs).phases}

    def submit(self, number):
        """Plan and freeze; what the plan withdraws is set aside, as `submit` does. Returns the plan."""
        plan = self.plan()
        self.freeze(plan, number)
        for phase in plan.to_run:
            phase.survey.withdraw(self.run.artifact(phase.frozen), number)
        return plan

    @staticmethod
    def freeze(plan, number):
        with mock.patch("launchers.submission.freeze.take_snapshot"):  # these workers run our own code
            freeze(plan, number)

    def start(self, phase, *elements, submission=1, restart=0):
        """A process that works on these elements one after the other, as a task that they share does."""
        process = FORK.Process(target=self._work, args=(phase, elements, submission, restart))
        process.start()
        return process

    def _work(self, phase, elements, submission, restart):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        os.environ["SLURM_RESTART_COUNT"] = str(restart)
        codes = [worker.main([str(self.run.path), phase, str(i), "--submission", str(submission)]) for i in elements]
        os._exit(max(codes))

    def finish(self, *phases, submission=1):
        for phase in phases or ("first", "pair", "last"):
            for i in range(3 if phase != "last" else 1):
                assert ended(self.start(phase, i, submission=submission)) == EXIT_SEALED

    def artifact(self, phase):
        return self.run.artifact(self.run.frozen(self.run.newest_submission())[phase])

    def seals(self):
        return {
            path: path.read_bytes()
            for path in [*self.run.path.glob("*/*/seal.json"), *self.run.path.glob("*/*/seals/*.json")]
        }


def ended(process):
    process.join(60)
    return process.exitcode


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("finished"))
    run.submit(1)
    run.finish()
    return run.run.path.parent


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    return Run(tmp_path / "copy")


def rerun(run, draw):
    return [run.start("pair", i) for i in draw.sample(range(3), 3)], {EXIT_SEALED}


def duplicate(run, draw):
    again = [draw.randrange(3) for _ in range(3)]
    return [run.start("pair", i) for i in draw.sample([0, 1, 2, *again], 6)], {EXIT_SEALED, EXIT_LEASE_HELD}


def requeue(run, draw):
    return [run.start("pair", i, restart=draw.randrange(1, 3)) for i in draw.sample(range(3), 3)], {EXIT_SEALED}


def preempted(run, draw):
    """Killed somewhere on its way, and started again."""
    alive = [run.start("pair", i) for i in range(3)]
    for process in draw.sample(alive, draw.randrange(1, 4)):
        process.join(draw.random() * 0.15)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    for process in alive:
        process.join()
    return [run.start("pair", i, restart=1) for i in range(3)], {EXIT_SEALED}


def shared_task(run, draw):
    return [run.start("pair", 0, 1), run.start("pair", 2), run.start("pair", 0, 1, 2, restart=1)], {
        EXIT_SEALED,
        EXIT_LEASE_HELD,
    }


LATE = [rerun, duplicate, requeue, preempted, shared_task]


@pytest.mark.parametrize("trials", [5, pytest.param(200, marks=pytest.mark.soak)])
def test_no_late_start_of_an_element_changes_what_is_sealed(run, trials):
    """In every other trial the phase is not sealed yet: the same late starts then race for what is missing."""
    pair, before = run.artifact("pair"), run.seals()
    digest = read_seal(pair.seal_path).digest
    for trial in range(trials):
        draw, late = random.Random(trial), LATE[trial % len(LATE)]
        fresh = trial // len(LATE) % 2 == 1 or trials == len(LATE) and late in (preempted, shared_task)
        if fresh:
            shutil.rmtree(pair.folder)
        processes, allowed = late(run, draw)
        codes = [ended(process) for process in processes]
        assert set(codes) <= allowed and EXIT_SEALED in codes, (trial, late.__name__, codes)
        assert read_seal(pair.seal_path).digest == digest, (trial, late.__name__, fresh)
        assert not list(pair.folder.glob("**/*.retired.*")), (trial, late.__name__)
        assert set(run.actions().values()) == {"reuse"}, (trial, late.__name__, fresh)
        assert fresh or run.seals() == before, (trial, late.__name__)
        before = run.seals()


def test_the_seal_of_an_aftercorr_phase_records_every_partner_whoever_merges(run):
    first, pair = run.artifact("first"), run.artifact("pair")
    partners = [read_seal(first.element_seal_path(i)).digest for i in range(3)]
    assert read_seal(pair.seal_path).upstream == {"first": partners}
    for order in ((2, 0, 1), (1, 2, 0)):
        shutil.rmtree(pair.folder)
        for i in order:
            assert ended(run.start("pair", i)) == EXIT_SEALED
        assert read_seal(pair.seal_path).upstream == {"first": partners}


def seal_first_anew(run, element, submission, text):
    """As a worker of that submission would whose result came out otherwise."""
    first = run.artifact("first")
    record = {"key": read_seal(first.seal_path).content["key"], "upstream": {}, "submission": submission}
    for index, files in ((element, text), (FINISH, None)):
        lease = first.acquire(index, Owner.me(submission, 0), lambda job: False, lambda seal: True)
        (lease.folder / "numbers.txt").write_text(text)
        parts = [read_seal(first.element_seal_path(i)).digest for i in range(3)] if files is None else None
        assert first.seal(lease, record | ({"parts": parts} if parts else {}))


def test_other_results_upstream_have_their_own_partners_sealed_anew_and_an_older_submission_undoes_nothing(run):
    before = run.seals()
    seal_first_anew(run, 1, 2, "other\n")
    upstream = {path: data for path, data in run.seals().items() if path.parts[-3] == "first" or "first" in path.parts}
    run.finish("pair")  # of submission 1, late: theirs is not to judge
    assert {path: data for path, data in run.seals().items() if path not in upstream} == {
        path: data for path, data in before.items() if path not in upstream
    }
    plan = {phase.name: phase for phase in run.plan().phases}
    assert (plan["pair"].action, plan["pair"].missing) == ("rerun", [1])
    assert plan["pair"].reasons == ["element 1: first was sealed anew since"]
    run.submit(3)
    assert ended(run.start("pair", 1, submission=3)) == EXIT_SEALED
    after = run.seals()
    pair = run.artifact("pair")
    changed = {path for path in after if path not in upstream and after[path] != before.get(path)}
    assert changed == {pair.seal_path, pair.element_seal_path(1)}
    assert set(run.actions().values()) == {"reuse"}  # pair came out the same, so that last stands
    run.finish("pair", submission=1)
    assert run.seals() == after


def test_a_later_submission_that_finds_other_results_upstream_sets_the_seals_aside_itself(run):
    """They came out otherwise after it was planned: the submitter withdrew nothing."""
    plan = run.plan()
    run.freeze(plan, 2)
    seal_first_anew(run, 0, 2, "other\n")
    seal_first_anew(run, 2, 3, "another\n")
    pair = run.artifact("pair")
    for i in (1, 0):
        assert ended(run.start("pair", i, submission=2)) == EXIT_SEALED
    assert not pair.seal_path.exists()  # all three elements are sealed, and what the last says is of before
    assert ended(run.start("pair", 2, submission=2)) == EXIT_SEALED
    submissions = [read_seal(pair.element_seal_path(i)).submission for i in range(3)]
    assert submissions == [2, 1, 2] and read_seal(pair.seal_path).submission == 2
    assert set(run.actions().values()) == {"reuse"}


# -- what was lost or altered ----------------------------------------------------------------------------------------

CONTENT, SEAL = "content", "seal"
HARMS = {
    "deleted": Path.unlink,
    "altered": lambda path: path.write_bytes(path.read_bytes().replace(b"1", b"7")),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
}


@pytest.mark.parametrize("phase", ["first", "pair"])
@pytest.mark.parametrize("what", [CONTENT, SEAL])
@pytest.mark.parametrize("harm", HARMS)
def test_an_element_that_was_lost_or_altered_is_sealed_anew_and_no_other(run, phase, what, harm):
    before, artifact = run.seals(), run.artifact(phase)
    seal = read_seal(artifact.element_seal_path(1))
    HARMS[harm](seal.folder / "numbers.txt" if what == CONTENT else seal.path)
    plan = {planned.name: planned for planned in run.plan().phases}[phase]
    assert (plan.action, plan.missing) == ("rerun", [1]) and str(
        seal.folder if what == CONTENT else seal.path
    ) in plan.reasons[0]
    assert len(plan.reasons) == 1 and "\n" not in plan.reasons[0]
    submitted = run.submit(2)
    for planned in submitted.to_run:
        for i in planned.missing:
            assert ended(run.start(planned.name, i, submission=2)) == EXIT_SEALED
    assert set(run.actions(verify=True).values()) == {"reuse"}
    changed = {path for path, data in run.seals().items() if data != before[path]}
    assert changed == {artifact.seal_path, artifact.element_seal_path(1)}
    if what == CONTENT and harm != "deleted":  # what somebody may have meant is kept
        assert (seal.folder / "numbers.txt").exists()


@pytest.mark.parametrize("phase, missing", [("pair", [0]), ("last", [0])])
@pytest.mark.parametrize("harm", HARMS)
def test_what_a_phase_sealed_and_lost_is_sealed_anew(run, phase, missing, harm):
    before, artifact = run.seals(), run.artifact(phase)
    harmed = read_seal(artifact.seal_path).folder / "numbers.txt"
    HARMS[harm](harmed)
    plan = {planned.name: planned for planned in run.submit(2).phases}[phase]
    assert (plan.action, plan.missing) == ("rerun", missing) and str(harmed) in plan.reasons[0]
    assert ended(run.start(phase, 0, submission=2)) == EXIT_SEALED
    assert set(run.actions(verify=True).values()) == {"reuse"}
    last = {run.artifact("last").seal_path, run.artifact("last").element_seal_path(0)} if phase == "last" else set()
    assert {path for path, data in run.seals().items() if data != before[path]} <= {artifact.seal_path} | last


def test_one_submit_is_enough_and_run_waits_for_what_is_sealed_anew(tmp_path):
    run, file = tmp_path / "run", tmp_path / "late.yaml"
    file.write_text(PIPELINE)
    afterok("run", file, "cluster=local", "--run", run)
    next(run.glob("pair/*/work/0001.*/numbers.txt")).unlink()
    shown = {phase["phase"]: phase for phase in afterok_json("plan", file, "cluster=local", "--run", run)["phases"]}
    assert shown["pair"]["missing"] == [1] and "numbers.txt is missing" in shown["pair"]["reasons"][0]
    done = afterok("run", file, "cluster=local", "--run", run)
    assert "submitted pair as job" in done.stdout and next(run.glob("pair/*/work/0001.a2.*/numbers.txt"))
    assert "nothing to submit" in afterok("submit", file, "cluster=local", "--run", run).stdout
    # --elements and another key: the others would be left under settings that nobody reads any more
    state = sorted(path for path in run.rglob("*"))
    refused = afterok("resubmit", run, "pair", "pair.with.start=5", "--elements", "1", check=2).stderr
    assert "pair.with.start 100 → 5" in refused and "leave --elements out" in refused and refused.count("\n") == 1
    assert sorted(path for path in run.rglob("*")) == state


def test_an_element_without_a_partner_is_refused_by_plan(tmp_path):
    (tmp_path / "odd.yaml").write_text(PIPELINE.replace("array: 3, needs", "array: 5, needs"))
    refused = one_line(afterok("plan", tmp_path / "odd.yaml", "cluster=local", "--run", tmp_path / "run", check=2))
    assert "phases.pair.needs.first" in refused and "pair has 5 elements, first 3" in refused


def what_is_gathered_is_read_as_a_line(run, outcomes):
    """Of elements with one life the sum is read; the others tell their own."""
    few, gathered = run.outcomes_in_brief("first")
    assert [list(some.elements) for some in gathered] == [[0]]
    assert gathered[0].started == min(outcome.started for outcome in outcomes if outcome.element == 0)
    told = [(outcome.element, outcome.restart, outcome.state) for outcome in few]
    assert sorted(told) == [(1, 0, "failed"), (1, 1, "sealed"), (2, 0, "sealed")]


@pytest.mark.parametrize("killed", [False, True])
def test_what_a_large_array_leaves_is_gathered_once_it_is_sealed_and_reads_as_before(tmp_path, monkeypatch, killed):
    """Killed: before the files that were gathered are removed."""
    run = Run(tmp_path)
    run.submit(1)
    assert ended(run.start("first", 0)) == EXIT_SEALED  # element 1 has two lives
    run.run.record_outcome("first", Outcome(1, 1, 0, "failed", 1, "ValueError: x", "host", "", 1.0))
    for element in (1, 2):
        monkeypatch.setattr(consolidate, "FROM_ELEMENTS", 3)
        if killed:
            monkeypatch.setattr(consolidate, "_remove", mock.Mock(side_effect=OSError("killed")))
        assert ended(run.start("first", element, restart=1 if element == 1 else 0)) == EXIT_SEALED
    artifact, folder = run.artifact("first"), run.run.outcomes_folder("first")
    assert artifact.seal_path.exists() and not list((artifact.folder / "elements").iterdir())
    left = sorted(path.name for path in folder.glob("*.json"))
    if not killed:  # the failure, and the word of the last one, who gathered
        assert left == ["0001.a1.r0.json", "0002.a1.r0.json"]
        assert sorted(path.name.split(".")[0] for path in artifact.leases_folder.iterdir()) == ["finish"]
    assert len(list(folder.glob("*.jsonl"))) == 1
    outcomes = run.run.outcomes("first")
    told = [(outcome.element, outcome.restart, outcome.state) for outcome in outcomes]
    assert sorted(told) == [(0, 0, "sealed"), (1, 0, "failed"), (1, 1, "sealed"), (2, 0, "sealed")]
    assert [outcome.state for outcome in run.run.outcomes("first", element=1)] == ["failed", "sealed"]
    assert run.run.outcomes("first", attempt=2) == [] and run.actions()["first"] == "reuse"
    run.run.record_outcome("first", Outcome(0, 1, 0, "failed", 1, "another rank, later", "host", "", 1.0))
    assert [outcome.state for outcome in run.run.outcomes("first", element=0)] == ["sealed"]
    what_is_gathered_is_read_as_a_line(run.run, outcomes)
    for element in range(3):
        assert ended(run.start("first", element)) == EXIT_SEALED  # there is nothing to do for a late start
