"""From a plan to jobs: submit what is missing, resubmit one phase, repair what a killed submitter left, cancel.

A submission is frozen (resolved phases, pipeline, profile, code) and its steps are written down before its first job
exists, so that what runs never depends on what the user edits meanwhile (launchers/submission/transaction.py does the steps).
"""

import contextlib
import dataclasses
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from data_tools.base import durable
from data_tools.mistake import UserMistake, disk_problem, nearest
from jobs.artifacts.anew import how_to_run_anew, restore, retire
from jobs.artifacts.artifact import Owner
from jobs.artifacts.run_folder import RunFolder
from jobs.kind import user_code
from launchers.backends.contract import ACTIVE_STATES, PENDING, Backend, JobSpec
from launchers.planning.ledger import JobEntry, Ledger
from launchers.planning.plan import Plan, PlannedPhase, changed_settings, make_plan
from launchers.planning.snapshot import take_snapshot
from launchers.submission.transaction import (
    PLAN_TRIES,
    Journal,
    Outdated,
    Unfinished,
    abandon,
    carry_out,
    decide,
    describe,
    live_jobs,
    release_held,
)
from slurm.detect import Cluster, find_cluster
from slurm.printed import format_indices
from slurm.profile.files import to_yaml

LEAVING_S = 10.0  # how long a job may take to leave once its work is sealed


def backend_for(run: RunFolder, cluster: Cluster) -> Backend:
    if cluster.kind == "slurm":
        from launchers.backends.executor import SlurmBackend

        return SlurmBackend(run, cluster)
    from launchers.backends.local import LocalBackend

    return LocalBackend(run)


def backends_of(run: RunFolder) -> dict[str, Backend]:
    """The back ends this run's jobs went to, by the cluster choice recorded with each submission.

    Raises:
        OtherCluster: the Slurm that answers is not the one that a submission went to.
        SlurmUnavailable: it does not answer.
    """
    return {choice: backend_of(run, choice) for choice in choices_of(run)}


def choices_of(run: RunFolder) -> list[str]:
    """The cluster choices of a run's submissions, the first first."""
    return list(dict.fromkeys(e["choice"] for e in Ledger(run.ledger).events() if e["event"] == "submission"))


def backend_of(run: RunFolder, choice: str) -> Backend:
    """The back end that the submissions with this cluster choice went to. Raises what `backends_of` does."""
    from launchers.backends.local import LocalBackend

    ledger = Ledger(run.ledger)
    event = next(e for e in ledger.events() if e["event"] == "submission" and e["choice"] == choice)
    if event["backend"] == "local":
        return LocalBackend(run)
    cluster = find_cluster(choice)
    if cluster.kind != "slurm":
        raise OtherCluster(
            f"{run.path}: submission {event['submission']} went to the Slurm cluster "
            f"{event['cluster']}, which is not configured here; set SLURM_CONF, or use "
            "`afterok cluster exec` for a dev cluster"
        )
    if other := ledger.other_cluster(choice, cluster.slurm_name):
        raise OtherCluster(other)
    return backend_for(run, cluster)


class OtherCluster(UserMistake):
    """The run's jobs are on a Slurm that is not the one of this machine."""


@contextlib.contextmanager
def submit_lock(run: RunFolder) -> Iterator[None]:
    """One submitter a run; the lock of a dead one on this host is taken over."""
    run.make()
    path = run.path / "submit.lock"
    me = Owner.me(0, 0)
    while not durable.create_file(path, me.record()):
        try:
            holder = Owner.read(path)
        except FileNotFoundError:
            continue
        if holder is None:
            raise UserMistake(f"{path} is torn: nobody knows who holds it; delete it if nobody is submitting")
        if not holder.is_dead(lambda _: False):
            raise UserMistake(
                f"{run.path}: process {holder.pid} on {holder.host} is submitting right now; "
                f"wait for it, or delete {path} if it is gone"
            )
        _remove_lock_of(holder, path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _remove_lock_of(dead: Owner, path: Path) -> None:
    """Remove the lock of a dead submitter, and not that of a living one who removed it a moment earlier."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if Owner.read(aside) != dead:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()


@dataclasses.dataclass(frozen=True)
class Submitted:
    """What a submit did: its number (None when nothing was written down) and the jobs it made or found."""

    number: int | None
    jobs: dict[str, str]  # phase -> job id, submitted now
    active: dict[str, str]  # phase -> job id, submitted before: queued, running, or rewired now
    rewired: list[str] = dataclasses.field(default_factory=list)
    calls: list[str] = dataclasses.field(default_factory=list)  # of a dry run: what would be called
    not_applied: list[str] = dataclasses.field(default_factory=list)  # what was asked for and reaches no job


def submit(plan: Plan, dry_run: bool = False) -> Submitted:
    """Submit every phase that is not sealed and not already under way; rewire what waits on something replaced.

    Afterwards the run's newest submission is one of these settings, though there were no jobs to send: it is what
    `status`, `why` and the summary speak of.
    """
    if not plan.to_run:
        if dry_run or _is_newest(plan):
            return Submitted(None, {}, {})
        with submit_lock(plan.run):
            return Submitted(_select(plan, _next_number(plan.run)), {}, {})
    if dry_run:
        return _transact(plan, {}, dry_run=True)
    with submit_lock(plan.run):
        return _transact(plan, {})


def resubmit(plan: Plan, phase: str, elements: list[int] | None = None, dry_run: bool = False) -> Submitted:
    """A new attempt at one phase, whatever became of the last one; its dependents are rewired, revived or sent anew.

    Raises:
        UserMistake: an unknown phase or element, a phase that is sealed under exactly these settings, or some elements
            of one whose key is another than that of the newest submission.
    """
    planned = {p.name: p for p in plan.phases}
    if phase not in planned:
        raise UserMistake(f"{plan.run.path} has no phase {phase!r}{nearest(phase, list(planned))}")
    found = planned[phase]
    if found.action == "reuse":
        raise UserMistake(
            f"{phase} is sealed under these settings (key {found.frozen.key}); change one, "
            f"or {how_to_run_anew(plan.run.artifact(found.frozen).folder)}"
        )
    if elements:
        _refuse_other_key(plan, found, elements)
    wrong = [i for i in elements or [] if i not in range(found.frozen.elements)]
    if wrong:
        raise UserMistake(f"{phase} has elements 0 to {found.frozen.elements - 1}, not {wrong[0]}")
    sealed = [i for i in elements or [] if i not in found.missing]
    if sealed:
        raise UserMistake(f"{phase}: element {sealed[0]} is sealed already; missing are {found.missing}")
    fresh = {phase: elements or found.missing}
    if dry_run:
        return _transact(plan, fresh, dry_run=True)
    with submit_lock(plan.run):
        with _retired(plan):
            return _transact(plan, fresh)


def _begun(run: RunFolder, jobs: list[JobEntry]) -> list[str]:
    """Return those of these jobs that have begun and not ended."""
    tasks = [task for backend in backends_of(run).values() for task in backend.states(jobs)] if jobs else []
    return sorted({task.job for task in tasks if task.state in ACTIVE_STATES - {PENDING}})


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
    folder = next(run.artifact(p.frozen).folder for p in plan.phases if p.name == plan.again)
    aside = retire(folder)
    try:
        yield
    except Unfinished:  # what was sent is held, and goes on
        raise
    except BaseException:
        if aside is not None:
            restore(aside, folder)
        raise


def _refuse_other_key(plan: Plan, found: PlannedPhase, elements: list[int]) -> None:
    """Raise UserMistake where `elements` alone would run under settings that the phase's other elements do not have."""
    number = plan.run.newest_submission()
    before = plan.run.frozen(number).get(found.name)
    if before is None or before.key == found.frozen.key:
        return
    changed = changed_settings(found.name, before.material["settings"], found.frozen.material["settings"])
    changes = "; ".join([*changed, f"key {before.key} → {found.frozen.key}"])
    raise UserMistake(
        f"--elements {format_indices(elements)}: {found.name} is no more what submission {number} runs "
        f"({changes}), and all its elements belong under one key; leave --elements out, so that all of "
        "them run under the new one, or leave the change out"
    )


def repair(run: RunFolder) -> list[str]:
    """Finish the submissions that a killed submitter left; one line about each."""
    lines = []
    with submit_lock(run):
        for number in Ledger(run.ledger).unreleased():
            lines.append(_finish_or_abandon(run, number))
        for backend in backends_of(run).values():
            lines += [f"job {job} was held again (a controller crash?); released" for job in release_held(run, backend)]
    return lines


def _finish_or_abandon(run: RunFolder, number: int) -> str:
    backend = _backend_of_submission(run, number)
    if not (run.submission_folder(number) / "journal.json").exists():
        Ledger(run.ledger).append("abandoned", submission=number, why="killed before its journal was written", jobs=[])
        return f"submission {number} had sent nothing; closed"
    jobs = carry_out(run, number, backend)
    return (
        f"submission {number} finished: "
        f"{', '.join(f'{phase} is job {job}' for phase, job in jobs.items()) or 'no new jobs'}"
    )


def _settle_unreleased(plan: Plan) -> None:
    """A submission that a killed submitter left is finished where it fits the plan, else cancelled: it never ran."""
    run = plan.run
    for number in Ledger(run.ledger).unreleased():
        keys = {phase.name: phase.frozen.key for phase in plan.phases}
        try:
            frozen = {name: phase.key for name, phase in run.frozen(number).items()}
        except UserMistake:
            frozen = {}
        if not (run.submission_folder(number) / "journal.json").exists():
            _finish_or_abandon(run, number)
        elif frozen == keys and _would_send_the_same(plan, number):
            _finish_or_abandon(run, number)
        else:
            abandon(run, number, _backend_of_submission(run, number), "other settings were submitted since")


def _would_send_the_same(plan: Plan, number: int) -> bool:
    """Whether the jobs of an unfinished submission are those that its phases would get now: no key holds resources."""
    backend, planned = _backend_of_submission(plan.run, number), {phase.name: phase for phase in plan.phases}
    return not any(
        backend.differs(
            JobEntry(
                number,
                step.phase,
                step.key,
                "",
                step.elements,
                step.is_array,
                step.name,
                request=step.request,
                scripted=number,
                batch=step.batch,
                links=step.links,
            ),
            planned[step.phase],
        )
        for step in Journal.read(plan.run, number).steps
        if step.do == "submit"
    )


def _backend_of_submission(run: RunFolder, number: int) -> Backend:
    return backends_of(run)[Ledger(run.ledger).backend(number)["choice"]]


def _transact(plan: Plan, fresh: dict[str, list[int]], dry_run: bool = False) -> Submitted:
    for again in range(PLAN_TRIES):
        try:
            if not dry_run:
                _settle_unreleased(plan)  # may find that the queue has changed under what was left, too
            return _submit_once(plan, fresh, dry_run)
        except Outdated:
            if again == PLAN_TRIES - 1:
                raise
    raise AssertionError("unreachable")


def _submit_once(plan: Plan, fresh: dict[str, list[int]], dry_run: bool) -> Submitted:
    run = plan.run
    # The queue first, the seals after: a job that ends in between is then seen at least once.
    live = live_jobs(run, list(backends_of(run).values()))
    plan = make_plan(plan.pipeline, run, plan.cluster, plan.verified, plan.again if dry_run else "")
    if not dry_run:
        for some in backends_of(run).values():
            release_held(run, some)
    number = _next_number(run)
    backend = backend_for(run, plan.cluster)
    journal = decide(plan, live, number, fresh, backend)
    if live and journal.steps and not backend.can_rewire:
        job = next(iter(live.values())).entry
        raise UserMistake(
            f"{run.path}: {job.phase} is still active as local job {job.job}; wait for it, "
            f"or `afterok cancel {run.path}` first"
        )
    if dry_run:
        return Submitted(None, {}, journal.live, [], describe(journal, backend, number), journal.not_applied)
    for planned in plan.to_run:
        planned.survey.withdraw(run.artifact(planned.frozen), number)
    if not journal.steps:
        selected = None if _is_newest(plan) else _select(plan, number)
        return Submitted(selected, {}, journal.live, not_applied=journal.not_applied)
    _freeze(plan, number)
    planned = {phase.name: phase for phase in plan.phases}
    backend.prepare(
        number,
        [
            JobSpec(planned[step.phase], step.name, step.elements, step.needs, step.links)
            for step in journal.steps
            if step.do == "submit"
        ],
    )
    _open(plan, number)
    journal.write(run, number)
    jobs = carry_out(run, number, backend)
    rewired = [step.phase for step in journal.steps if step.do == "rewire"]
    return Submitted(number, jobs, journal.live, rewired, not_applied=journal.not_applied)


def _next_number(run: RunFolder) -> int:
    return max([0, *(int(p.name) for p in (run.path / "submissions").glob("*") if p.name.isdigit())]) + 1


def _is_newest(plan: Plan) -> bool:
    """Whether the newest submission is of the plan's phases under the plan's keys."""
    numbers = plan.run.submissions()
    newest = plan.run.frozen(numbers[-1]) if numbers else {}
    return {name: phase.key for name, phase in newest.items()} == {p.name: p.frozen.key for p in plan.phases}


def _select(plan: Plan, number: int) -> int:
    """Write down a submission that has no jobs: all of its phases are sealed, or under way for an earlier one."""
    _freeze(plan, number)
    _open(plan, number)
    Ledger(plan.run.ledger).append("released", submission=number)
    return number


def _open(plan: Plan, number: int) -> None:
    backend = "slurm" if plan.cluster.kind == "slurm" else "local"
    Ledger(plan.run.ledger).append(
        "submission",
        submission=number,
        backend=backend,
        choice=plan.pipeline.cluster,
        cluster=plan.cluster.name,
        cluster_name=plan.cluster.slurm_name,
        profile=plan.cluster.profile.meta.name,
        profile_file=plan.cluster.profile_file,
        run=str(plan.run.path.resolve()),
    )


def _freeze(plan: Plan, number: int) -> None:
    """Write everything a submission's jobs will read: code, pipeline, profile, resolved phases."""
    run, folder = plan.run, plan.run.submission_folder(number)
    folder.mkdir(parents=True)
    roots = [root for phase in plan.pipeline.phases.values() for root in user_code(phase.uses, phase.config)]
    take_snapshot(folder / "code", roots)
    durable.write_checked(
        folder / "pipeline.json",
        {
            "source": plan.pipeline.source,
            "overrides": plan.pipeline.overrides,
            "params": plan.pipeline.params,
            "cwd": os.getcwd(),
        },
    )
    durable.write_file(folder / "pipeline.yaml", Path(plan.pipeline.source).read_bytes())
    durable.write_file(folder / "profile.yaml", to_yaml(plan.cluster.profile))
    run.meeting_key(number)
    run.freeze(number, plan.pipeline.name, [phase.frozen for phase in plan.phases])


@dataclasses.dataclass(frozen=True)
class Cancelled:
    """What a cancel did: the jobs it ended, and what a user has to know besides."""

    jobs: list[str]
    notes: list[str]


def cancel(run: RunFolder, phases: list[str] | None = None) -> Cancelled:
    """Cancel the active jobs of a run, or of some of its phases, and take back a submission that was never released.

    The jobs end first and are written down then: a file system that takes no more writes keeps nothing running.
    """
    ledger = Ledger(run.ledger)
    planned = {entry.phase for entry in ledger.jobs()} | {name for n in ledger.unreleased() for name in _frozen(run, n)}
    if unknown := set(phases or []) - planned:
        name = sorted(unknown)[0]
        raise UserMistake(f"{run.path} never submitted a phase {name!r}{nearest(name, sorted(planned))}")
    backends, notes, jobs = backends_of(run), [], []
    if any(not phases or set(phases) & set(_frozen(run, n)) for n in ledger.unreleased()):
        with _lock_if_writable(run):
            for number in ledger.unreleased():
                if not phases or set(phases) & set(_frozen(run, number)):
                    jobs += _written_down(notes, lambda: _abandon_begun(run, number, backends))
                    notes.append(f"submission {number} was never released: taken back")
    live = live_jobs(run, list(backends.values()))
    mine = [found.entry for phase, found in live.items() if not phases or phase in phases]
    by_choice: dict[str, list[str]] = {}
    for entry in mine:  # an id means one thing on each cluster
        by_choice.setdefault(ledger.backend(entry.scripted)["choice"], []).append(entry.job)
    for choice, some in by_choice.items():
        backends[choice].cancel(some)
    ended = [entry.job for entry in mine if entry.job not in jobs]
    if ended:
        _written_down(notes, lambda: ledger.append("cancel", jobs=ended))
    return Cancelled(jobs + ended, notes)


def _abandon_begun(run: RunFolder, number: int, backends: dict[str, Backend]) -> list[str]:
    if (run.submission_folder(number) / "journal.json").exists():
        return abandon(run, number, backends[Ledger(run.ledger).backend(number)["choice"]], "cancelled")
    Ledger(run.ledger).append("abandoned", submission=number, why="killed before its journal was written", jobs=[])
    return []


def _written_down(notes: list[str], call: Callable[[], list[str] | None]) -> list[str]:
    """What `call` gives; where the file system refuses what it writes last, a note says so."""
    try:
        return call() or []
    except OSError as error:
        problem = disk_problem(error)
        if problem is None:
            raise
        notes.append(f"the jobs are cancelled, and it could not be written down: {problem}")
        return []


@contextlib.contextmanager
def _lock_if_writable(run: RunFolder) -> Iterator[None]:
    """`submit_lock`, but for a file system that takes no writes: nobody can submit there."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(submit_lock(run))
        except OSError as error:
            if disk_problem(error) is None:
                raise
        yield


def _frozen(run: RunFolder, number: int) -> list[str]:
    """The phases of a submission, none where it was killed before they were written."""
    try:
        return list(run.frozen(number))
    except UserMistake:
        return []
