"""From a plan to jobs: submit what is missing, or resubmit one phase.

A submission is frozen (freeze.py), its steps are decided (decide.py) and written down (journal.py), and only then done
(carry_out.py). What a submitter that was killed left is settled first (repair.py).
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from data_tools.mistake import UserMistake, nearest
from jobs.artifacts.anew import how_to_run_anew, restore, retire
from jobs.artifacts.run_folder import RunFolder
from launchers.backends.choose import backend_for, backends_of
from launchers.backends.contract import Backend, JobSpec
from launchers.causes.states import BEGUN_STATES
from launchers.planning.ledger import JobEntry, Ledger
from launchers.planning.limits import ARRAY_TEXT, array_text
from launchers.planning.plan import Plan, PlannedPhase
from launchers.planning.planner import make_plan
from launchers.planning.reasons import changed_settings
from launchers.submission.carry_out import Outdated, carry_out
from launchers.submission.decide import Queue, decide
from launchers.submission.freeze import freeze, is_newest, job_name, next_number, open_submission, select
from launchers.submission.journal import Journal
from launchers.submission.live import LiveJob, live_jobs
from launchers.submission.lock import submit_lock
from launchers.submission.patience import Unfinished
from launchers.submission.repair import release_held, settle_unreleased
from slurm.printed import SHOWN_RANGES, format_indices

LEAVING_S = 10.0  # how long a job may take to leave once its work is sealed
PLAN_TRIES = 3  # how often a submission is planned anew because the queue changed while it was carried out


@dataclass(frozen=True)
class Submitted:
    """What a submit did: its number (None when nothing was written down) and the jobs it made or found."""

    number: int | None
    jobs: dict[str, str]  # phase -> job id, submitted now
    active: dict[str, str]  # phase -> job id, submitted before: queued, running, or rewired now
    rewired: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)  # of a dry run: what would be called
    not_applied: list[str] = field(default_factory=list)  # what was asked for and reaches no job


def submit(plan: Plan, dry_run: bool = False) -> Submitted:
    """Submit every phase that is not sealed and not already under way; rewire what waits on something replaced.

    Afterwards the run's newest submission is one of these settings, though there were no jobs to send: it is what
    `status`, `why` and the summary speak of.

    Raises:
        UserMistake: a job is running with other settings, or the cluster refused one.
        Unfinished: the cluster does not answer, or its queue changed at each try.
    """
    if not plan.to_run:
        if dry_run or is_newest(plan):
            return Submitted(None, {}, {})
        with submit_lock(plan.run):
            return Submitted(select(plan, next_number(plan.run)), {}, {})
    if dry_run:
        return _transact(plan, {}, dry_run=True)
    with submit_lock(plan.run):
        return _transact(plan, {})


def resubmit(plan: Plan, phase: str, elements: list[int] | None = None, dry_run: bool = False) -> Submitted:
    """Start a new attempt at one phase, whatever became of the last one; rewire, revive or send anew what follows it.

    Raises:
        UserMistake: an unknown phase or element, a phase that is sealed under exactly these settings, or some elements
            of one whose key is another than that of the newest submission; and what `submit` raises.
    """
    phases = {planned.name: planned for planned in plan.phases}
    if phase in plan.pipeline.left_out:
        raise UserMistake(f"{plan.run.path}: phase {phase} is left out, since its `when` is false; set that, too")
    if phase not in phases:
        raise UserMistake(f"{plan.run.path} has no phase {phase!r}{nearest(phase, list(phases))}")
    planned = phases[phase]
    if planned.action == "reuse":
        raise UserMistake(
            f"{phase} is sealed under these settings (key {planned.frozen.key}); change one, "
            f"or {how_to_run_anew(plan.run.artifact(planned.frozen).folder)}"
        )
    if elements:
        _refuse_elements(plan, planned, elements)
    fresh = {phase: elements or planned.missing}
    if dry_run:
        return _transact(plan, fresh, dry_run=True)
    with submit_lock(plan.run):
        with _retired(plan):
            return _transact(plan, fresh)


def _refuse_elements(plan: Plan, planned: PlannedPhase, elements: list[int]) -> None:
    """Refuse elements of a phase that cannot run alone.

    Raises:
        UserMistake: they would run under settings that the phase's other elements do not have, there are no such
            elements, or one is sealed.
    """
    name, frozen, number = planned.name, planned.frozen, plan.run.newest_submission()
    before = plan.run.frozen(number).get(name)
    if before is not None and before.key != frozen.key:
        changed = changed_settings(
            name, before.material["settings"], frozen.material["settings"], (before.inputs, frozen.inputs)
        )
        changes = "; ".join([*changed, f"key {before.key} → {frozen.key}"])
        raise UserMistake(
            f"--elements {format_indices(elements, SHOWN_RANGES)}: {name} is no more what submission {number} runs "
            f"({changes}), and all its elements belong under one key; leave --elements out, so that all of "
            "them run under the new one, or leave the change out"
        )
    wrong = [i for i in elements if i not in range(frozen.elements)]
    if wrong:
        raise UserMistake(f"{name} has elements 0 to {frozen.elements - 1}, not {wrong[0]}")
    sealed = [i for i in elements if i not in planned.missing]
    if sealed:
        missing = format_indices(planned.missing, SHOWN_RANGES)
        raise UserMistake(f"{name}: element {sealed[0]} is sealed already; missing are {missing}")
    size = len(array_text(frozen, elements)) if plan.cluster.kind == "slurm" else 0
    if size > ARRAY_TEXT:
        raise UserMistake(
            f"--elements {format_indices(elements, SHOWN_RANGES)}: the list of their tasks has {size:,} characters, "
            f"and Slurm takes {ARRAY_TEXT:,}; name fewer ranges, or leave --elements out: all that is missing is sent"
        )


def _begun(run: RunFolder, jobs: list[JobEntry]) -> list[str]:
    """Return those of these jobs that have begun and not ended."""
    tasks = [task for backend in backends_of(run).values() for task in backend.states(jobs)] if jobs else []
    return sorted({task.job for task in tasks if task.state in BEGUN_STATES})


@contextlib.contextmanager
def _retired(plan: Plan) -> Iterator[None]:
    """Set aside all that the phase to run anew made under its key, and put it back where the submission is refused.

    Raises:
        UserMistake: a job that is under way works on it or reads it.
    """
    if not plan.again:
        yield
        return
    run = plan.run
    readers = {plan.again} | plan.pipeline.descendants(plan.again)
    jobs = {entry.job: entry for entry in Ledger(run.ledger).own_jobs() if entry.phase in readers}
    deadline = time.monotonic() + LEAVING_S
    while busy := _begun(run, list(jobs.values())):
        if time.monotonic() > deadline:
            raise UserMistake(
                f"{run.path}: {jobs[busy[0]].phase} is under way as job {busy[0]} and works on what "
                f"{plan.again} made; wait for it, or `afterok cancel {run.path}` first"
            )
        time.sleep(0.2)
    folder = next(run.artifact(planned.frozen).folder for planned in plan.phases if planned.name == plan.again)
    aside = retire(folder)
    try:
        yield
    except Unfinished:  # what was sent is held, and goes on
        raise
    except BaseException:
        if aside is not None:
            restore(aside, folder)
        raise


def _transact(plan: Plan, fresh: Mapping[str, list[int]], dry_run: bool = False) -> Submitted:
    """Make one submission of the plan, planned anew where the queue changed meanwhile."""
    for attempt in range(1, PLAN_TRIES + 1):
        try:
            if not dry_run:
                settle_unreleased(plan)  # may find that the queue has changed under what was left, too
            return _submit_once(plan, fresh, dry_run)
        except Outdated:
            if attempt == PLAN_TRIES:
                raise
    raise AssertionError("unreachable")


def _submit_once(plan: Plan, fresh: Mapping[str, list[int]], dry_run: bool) -> Submitted:
    run = plan.run
    # The queue first, the seals after: a job that ends in between is then seen at least once.
    live = live_jobs(run, backends_of(run).values())
    again = plan.again if dry_run else ""
    plan = make_plan(plan.pipeline, run, plan.cluster, verify=plan.verified, again=again, budget=plan.budget)
    if not dry_run:
        for some in backends_of(run).values():
            release_held(run, some)
    number = next_number(run)
    backend = backend_for(run, plan.cluster)
    queue = _queue(plan, backend, live, fresh)
    journal = decide(plan, queue, fresh, lambda phase: job_name(run, phase, number))
    if live and journal.steps and not backend.can_rewire:
        job = next(iter(live.values())).entry
        raise UserMistake(
            f"{run.path}: {job.phase} is still active as local job {job.job}; wait for it, "
            f"or `afterok cancel {run.path}` first"
        )
    if dry_run:
        calls = journal.shown(backend, number)
        return Submitted(None, {}, journal.live, calls=calls, not_applied=journal.not_applied)
    for planned in plan.to_run:
        planned.survey.withdraw(run.artifact(planned.frozen), number)
    if not journal.steps:
        selected = None if is_newest(plan) else select(plan, number)
        return Submitted(selected, {}, journal.live, not_applied=journal.not_applied)
    jobs = _send(plan, number, journal, backend)
    return Submitted(number, jobs, journal.live, journal.rewired, not_applied=journal.not_applied)


def _queue(plan: Plan, backend: Backend, live: Mapping[str, LiveJob], fresh: Mapping[str, list[int]]) -> Queue:
    """Return what is under way, and how what would be sent of it now differs; of `fresh` phases nobody asks."""
    differs = {
        planned.name: backend.differs(live[planned.name].entry, planned)
        for planned in plan.to_run
        if planned.name in live and planned.name not in fresh
    }
    return Queue(live, differs, backend.can_rewire)


def _send(plan: Plan, number: int, journal: Journal, backend: Backend) -> dict[str, str]:
    """Write down the submission and carry it out; return {phase: job}."""
    freeze(plan, number)
    planned = {phase.name: phase for phase in plan.phases}
    specs = [
        JobSpec(planned=planned[step.phase], name=step.name, elements=step.elements, needs=step.needs, links=step.links)
        for step in journal.submits
    ]
    backend.prepare(number, specs)
    open_submission(plan, number)
    journal.write(plan.run, number)
    return carry_out(plan.run, number, backend)
