"""What a submission does is decided by a pure function, and its journal is read as submitters of before wrote it."""

from types import SimpleNamespace

import pytest

from data_tools.base import durable
from data_tools.mistake import UserMistake
from jobs.artifacts.run_folder import RunFolder
from launchers.backends.contract import States, TaskState
from launchers.causes.states import PENDING, RUNNING
from launchers.planning.ledger import JobEntry
from launchers.submission import decide as deciding
from launchers.submission.decide import Queue, decide
from launchers.submission.journal import Journal
from launchers.submission.live import LiveJob
from launchers.submission.steps import Cancel, Rewire, Submit


@pytest.fixture(autouse=True)
def no_requests(monkeypatch):
    monkeypatch.setattr(deciding, "request_of", lambda planned: "digest")


def phase(name, needs=(), elements=1, key="new", links=0):
    frozen = SimpleNamespace(
        key=key, needs=dict(needs), batch=1, links=links, array=None if elements == 1 else elements
    )
    return SimpleNamespace(name=name, frozen=frozen, missing=list(range(elements)))


def live(name, job, states=(PENDING,), key="new", waits=()):
    entry = JobEntry(1, name, key, job, list(range(len(states))), len(states) > 1, waits=dict(waits), scripted=1)
    return LiveJob(entry, States(TaskState(job, i, state) for i, state in enumerate(states)).of(job))


def decided(phases, jobs=(), differs=(), fresh=(), can_rewire=True):
    plan = SimpleNamespace(phases=phases, to_run=phases, run=SimpleNamespace(path="run"))
    by_phase = {job.entry.phase: job for job in jobs}
    queue = Queue(by_phase, dict.fromkeys(by_phase, "") | dict(differs), can_rewire)
    return decide(plan, queue, dict(fresh), lambda name: f"run.{name}")


CHAIN = [phase("a"), phase("b", {"a": "afterok"})]
UNDER_WAY = [live("a", "1", (RUNNING,)), live("b", "2", waits={"a": "1"})]


def test_of_a_run_without_jobs_all_is_sent_in_order():
    steps = decided(CHAIN).steps
    assert [(type(step), step.phase, step.needs) for step in steps] == [
        (Submit, "a", {}),
        (Submit, "b", {"a": "afterok"}),
    ]


def test_what_is_under_way_stays():
    journal = decided(CHAIN, UNDER_WAY)
    assert journal.steps == [] and journal.live == {"a": "1", "b": "2"}


def test_a_new_attempt_cancels_the_last_and_rewires_what_waits_on_it():
    journal = decided(CHAIN, UNDER_WAY, fresh={"a": []})
    assert [type(step) for step in journal.steps] == [Submit, Rewire, Cancel]
    assert journal.steps[1:] == [
        Rewire(phase="b", key="new", job="2", needs={"a": "afterok"}),
        Cancel("a", "1"),
    ]


def test_a_waiting_job_with_another_script_is_replaced_and_a_running_one_stays():
    journal = decided(CHAIN, UNDER_WAY, differs={"a": "time", "b": "time"})
    assert [(type(step), step.phase) for step in journal.steps] == [(Submit, "b"), (Cancel, "b")]
    assert len(journal.not_applied) == 1 and "job 1 has begun" in journal.not_applied[0]


def test_a_running_job_with_other_settings_is_refused():
    with pytest.raises(UserMistake, match="still active with other settings"):
        decided(CHAIN, [live("a", "1", (RUNNING,), key="old")])


def test_elements_that_a_job_does_not_carry_get_another_job():
    steps = decided([phase("a", elements=3)], [live("a", "1", (RUNNING, RUNNING))]).steps
    assert [step.elements for step in steps] == [[2]]


def test_a_journal_of_before_gives_each_step_the_fields_of_all_kinds(tmp_path):
    blank = {"key": "", "job": "", "name": "", "elements": [], "is_array": False, "needs": {}, "request": "",
             "batch": 1, "links": 0, "only": None}  # fmt: skip
    steps = [
        {**blank, "do": "submit", "phase": "a", "key": "k", "name": "r.a", "elements": [0, 1], "batch": 2},
        {**blank, "do": "rewire", "phase": "b", "key": "k", "job": "7", "elements": [0], "needs": {"a": "afterok"}},
        {**blank, "do": "cancel", "phase": "a", "job": "5"},
    ]
    run = RunFolder(tmp_path)
    run.submission_folder(1).mkdir(parents=True)
    path = run.submission_folder(1) / "journal.json"
    durable.write_checked(path, {"steps": steps, "live": {"b": "7"}, "not_applied": []})
    journal = Journal.read(run, 1)
    assert journal.steps == [
        Submit(phase="a", key="k", name="r.a", elements=[0, 1], batch=2),
        Rewire(phase="b", key="k", job="7", needs={"a": "afterok"}),
        Cancel(phase="a", job="5"),
    ]
    journal.write(run, 1)
    assert Journal.read(run, 1) == journal
    durable.write_checked(path, {"steps": [{**steps[0], "hold": True}], "live": {}})
    with pytest.raises(durable.TornFile, match="another version"):
        Journal.read(run, 1)
