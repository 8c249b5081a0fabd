"""One submission as a transaction: what it will do is written down first, then done, and released last.

    submissions/N/journal.json    the steps, durable before the first call to Slurm
    ledger.jsonl                  each step once it was done, then "released" (or "abandoned")

Until the release nothing new can run: a job whose needs are not new jobs of this submission is sent held. A submitter
that dies anywhere leaves held jobs, their dependents and this journal; `repair` finishes it or takes it back. A job is
found again by its name, which carries a token: an sbatch whose outcome is open is looked up before it is sent again.
"""

import dataclasses
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from data_tools.base import durable
from data_tools.mistake import UserMistake
from jobs.artifacts.run_folder import RunFolder
from launchers.backends.contract import Backend, OutcomeOpen, Overtaken, Refused, TaskState, request_of
from launchers.causes.states import ACTIVE_STATES, HELD, NEVER, PENDING
from launchers.planning.chain import last_link
from launchers.planning.ledger import JobEntry, Ledger
from launchers.planning.plan import Plan, PlannedPhase

LOOK_AGAIN_S = 1.0
OPEN_LIMIT_S = 90.0  # how long a controller that does not answer is asked about a job whose sbatch has an open outcome
SEND_TRIES = 3
PLAN_TRIES = 3  # how often a submission is planned anew because the queue changed while it was carried out


class Unfinished(UserMistake):
    """The submission could not be finished now; nothing runs, and `afterok repair` goes on."""

    exit_code = 1


@dataclass
class Step:
    """One thing a submission does: `submit` a phase, `rewire` a pending job to what it waits on now, or `cancel` one."""

    do: str
    phase: str
    key: str = ""
    job: str = ""  # of rewire and cancel
    name: str = ""  # of submit: carries run, phase, attempt and a token
    elements: list[int] = field(default_factory=list)
    is_array: bool = False
    needs: dict[str, str] = field(default_factory=dict)  # unsealed phase -> dependency type
    request: str = ""  # of submit: digest of what the script asks Slurm for
    batch: int = 1  # of submit: elements per array task
    links: int = 0  # of submit: of a chain
    only: int | None = None  # of rewire: just this array task, which waits on its partner alone


@dataclass
class Journal:
    """The steps of a submission and the jobs of earlier ones that stay as they are."""

    steps: list[Step]
    live: dict[str, str]  # phase -> job, or several joined by ":" as Slurm's dependencies take them
    not_applied: list[str] = field(default_factory=list)  # what was asked for and reaches no job, a line each

    def write(self, run: RunFolder, number: int) -> None:
        durable.write_checked(run.submission_folder(number) / "journal.json", dataclasses.asdict(self))

    @staticmethod
    def read(run: RunFolder, number: int) -> "Journal":
        path = run.submission_folder(number) / "journal.json"
        value = durable.read_checked(path)
        try:
            return Journal([Step(**step) for step in value["steps"]], value["live"])
        except (KeyError, TypeError):
            raise durable.TornFile(f"{path} is no journal (edited, or of another version of afterok)") from None


@dataclass
class LiveJob:
    """A job of an earlier submission that the back end lists as waiting or running."""

    entry: JobEntry
    tasks: dict[int, TaskState]

    @property
    def waits(self) -> bool:
        """No element has started."""
        return len(self.tasks) == len(self.entry.elements) and all(t.state == PENDING for t in self.tasks.values())

    @property
    def links_left(self) -> int:
        return sum(task.links_left for task in self.tasks.values())

    @property
    def dead_elements(self) -> list[int]:
        return [i for i, task in self.tasks.items() if task.state == PENDING and task.reason == NEVER]


def live_jobs(run: RunFolder, backends: list[Backend]) -> dict[str, LiveJob]:
    """{phase: its newest job that is listed as queued or running and whose phase is not sealed by it or since}."""
    entries = {
        entry.job: entry
        for entry in Ledger(run.ledger).own_jobs()
        if (seal := run.whole_seal(entry.phase, entry.key)) is None or seal.submission < entry.submission
    }
    tasks: dict[str, dict[int, TaskState]] = {}
    for backend in backends if entries else []:
        for task in backend.states(list(entries.values())):
            if task.state in ACTIVE_STATES:
                tasks.setdefault(task.job, {})[task.index] = task
    return {entries[job].phase: LiveJob(entries[job], found) for job, found in tasks.items()}


def release_held(run: RunFolder, backend: Backend) -> list[str]:
    """Release jobs that are held although their submission was released, as a controller that crashed leaves them.

    Those of sealed phases too: what waits on such a job would wait for ever.
    """
    ledger = Ledger(run.ledger)
    open_ = ledger.unreleased()
    released = [entry for entry in ledger.own_jobs() if entry.scripted not in open_]
    tasks = backend.states(released) if released and backend.can_rewire else []
    held = sorted({task.job for task in tasks if task.reason in HELD})
    if held:
        ledger.append("release", jobs=held)
        _patiently(lambda: backend.release(0, held))
    return held


# -- deciding -----------------------------------------------------------------------------------------------------


def decide(plan: Plan, live: dict[str, LiveJob], number: int, fresh: dict[str, list[int]], backend: Backend) -> Journal:
    """What brings the run to its plan. `fresh` names phases (with their elements) that get a new job whatever is live.

    A waiting job keeps its place in the queue: where what it waits on changed, or its settings did, it is rewired. One
    whose script would be another now is replaced, since no key holds what it asks Slurm for; one that has begun stays.

    Raises:
        UserMistake: a job is running with other settings, and nobody asked to replace it.
    """
    steps: list[Step] = []
    cancels: list[Step] = []
    not_applied: list[str] = []
    can_rewire = backend.can_rewire
    kept: dict[str, str] = {}
    new: set[str] = set()
    batches: dict[str, int] = {}  # of the jobs to wait on; 0 where they differ
    for planned in plan.to_run:
        frozen, found = planned.frozen, live.get(planned.name)
        needs = {
            n: t for n, t in frozen.needs.items() if n in new or n in kept or any(p.name == n for p in plan.to_run)
        }
        sent = found if planned.name not in fresh else None
        differs = backend.differs(sent.entry, planned) if sent is not None else ""
        replaced = sent is not None and bool(differs) and sent.waits and can_rewire
        batch = sent.entry.batch if sent is not None and not replaced else frozen.batch
        # Partners whose tasks hold other elements wait for each other's whole jobs.
        needs = {n: "afterok" if t == "aftercorr" and batches.get(n, batch) != batch else t for n, t in needs.items()}
        links = frozen.links
        # Never at the same time, whoever was sent first:
        # a new job also waits for one that is to follow it and has begun.
        needs |= {
            later.name: "singleton"
            for later in plan.phases
            if later.frozen.needs.get(planned.name) == "singleton" and later.name in live and not live[later.name].waits
        }
        elements = fresh.get(planned.name) or planned.missing
        if found is not None and planned.name not in fresh:
            entry = found.entry
            same_key = entry.key == frozen.key
            would_do = same_key or (found.waits and (fresh or found.dead_elements))
            if can_rewire and not differs and _fits(found, planned) and would_do:
                steps += _rewires(found, planned, needs, kept, new)
            elif not same_key and not fresh:
                raise UserMistake(
                    f"{planned.name}: job {entry.job} is still active with other settings; wait for it, "
                    f"or `afterok cancel {plan.run.path} {planned.name}` first"
                )
            elif not same_key or replaced:
                cancels.append(Step("cancel", planned.name, job=entry.job))
                found = None
            elif differs:
                not_applied.append(
                    f"{planned.name}: job {entry.job} has begun and keeps what it was sent with ({differs} "
                    f"is not applied); `afterok resubmit {plan.run.path} {planned.name}` with the same "
                    "overrides replaces it"
                )
            if found is not None:
                kept[planned.name] = entry.awaited
                batches[planned.name] = entry.batch
                elements = [i for i in planned.missing if i not in found.tasks]
                links = max(0, frozen.links - found.links_left) if same_key and can_rewire else 0
                if links and not found.waits:  # a chain that proved too short goes on behind its last link
                    elements, needs = planned.missing, needs | {planned.name: "singleton"}
                if not elements:
                    continue
        elif found is not None:
            whole = set(found.tasks) <= set(elements)
            tasks = sorted({i // found.entry.batch for i in elements if i in found.tasks})
            jobs = [found.entry.job] if whole else [f"{found.entry.job}_{task}" for task in tasks]
            cancels += [Step("cancel", planned.name, job=job) for job in jobs]
            if not whole:
                kept[planned.name] = found.entry.awaited
        name = f"{plan.run.name}.{planned.name}.a{number}.{secrets.token_hex(4)}"
        steps.append(
            Step(
                "submit",
                planned.name,
                frozen.key,
                name=name,
                elements=elements,
                needs=needs,
                is_array=frozen.array is not None,
                request=request_of(planned),
                batch=frozen.batch,
                links=links,
            )
        )
        new.add(planned.name)
        batches[planned.name] = frozen.batch if batches.get(planned.name, frozen.batch) == frozen.batch else 0
    return Journal(steps + cancels if steps else [], kept, not_applied)


def _fits(found: LiveJob, planned: PlannedPhase) -> bool:
    """Whether a job that waits would run the elements of this phase that are to run now."""
    return set(planned.missing) == set(found.entry.elements) or not found.waits


def _rewires(
    found: LiveJob, planned: PlannedPhase, needs: dict[str, str], kept: dict[str, str], new: set[str]
) -> list[Step]:
    """Steps that make a waiting job wait on the right ones; none when it does already."""
    entry = found.entry
    changed = any(phase in new for phase in needs) or {p: kept[p] for p in needs if p in kept} != entry.waits
    if found.waits:
        if changed or entry.key != planned.frozen.key or found.dead_elements:
            return [
                Step(
                    "rewire",
                    planned.name,
                    planned.frozen.key,
                    entry.job,
                    elements=entry.elements,
                    is_array=entry.is_array,
                    needs=needs,
                )
            ]
        return []
    # Some elements ran already: only those that can never start any more are repaired, each behind its partner.
    return [
        Step(
            "rewire",
            planned.name,
            planned.frozen.key,
            entry.job,
            elements=entry.elements,
            is_array=entry.is_array,
            needs=needs,
            only=task,
        )
        for task in sorted({index // entry.batch for index in found.dead_elements})
    ]


# -- doing --------------------------------------------------------------------------------------------------------


def carry_out(run: RunFolder, number: int, backend: Backend) -> dict[str, str]:
    """Do what is left of a submission's journal, release it, and return {phase: job}. Safe to call again and again.

    Raises:
        UserMistake: the cluster refused a job; everything this submission sent was cancelled.
        Outdated: the cluster lost jobs it had acknowledged, or began one that was to be rewired; what was sent is cancelled.
        Unfinished: the cluster does not answer.
    """
    ledger, journal = Ledger(run.ledger), Journal.read(run, number)
    done = [event for event in ledger.events() if event.get("submission") == number]
    if any(event["event"] in ("released", "abandoned") for event in done):
        return {event["phase"]: event["job"] for event in done if event["event"] == "job"}
    begun = {event["name"] for event in done if event["event"] == "sending"}
    known = {event["name"]: event["job"] for event in done if event["event"] == "job"}
    jobs = dict(journal.live)
    mine: dict[str, str] = {}
    try:
        for step in journal.steps:
            if step.do == "submit":
                waits = {phase: jobs[phase] for phase in step.needs if phase in jobs}
                job = known.get(step.name)
                if job is None:
                    job = _find(backend, step.name) if step.name in begun else None
                    if job is None:
                        ledger.append("sending", submission=number, phase=step.phase, name=step.name)
                        hold = not any(phase in mine for phase in step.needs)
                        job = _send(backend, number, step, waits, hold)
                    ledger.append(
                        "job",
                        submission=number,
                        phase=step.phase,
                        key=step.key,
                        job=job,
                        name=step.name,
                        elements=step.elements,
                        is_array=step.is_array,
                        needs=step.needs,
                        waits=waits,
                        request=step.request,
                        batch=step.batch,
                        links=step.links,
                    )
                mine[step.phase] = job
                awaited = last_link(job, step.links)
                others = step.phase in jobs and not step.links  # whose other elements are under way
                jobs[step.phase] = f"{jobs[step.phase]}:{awaited}" if others else awaited
            elif step.do == "rewire":
                waits = {phase: jobs[phase] for phase in step.needs if phase in jobs}
                run.redirect(_submission_of(ledger, step.job), step.phase, number)
                _patiently(lambda: backend.rewire(step.job, step.needs, waits, step.only))
                ledger.append(
                    "rewire",
                    submission=number,
                    phase=step.phase,
                    key=step.key,
                    job=step.job,
                    waits=waits,
                    needs=step.needs,
                    only=step.only,
                )
                jobs[step.phase] = next(entry.awaited for entry in ledger.jobs() if entry.job == step.job)
            else:
                ledger.append("cancel", submission=number, jobs=[step.job])
                _patiently(lambda: backend.cancel([step.job]))
        lost = _reconcile(backend, {step.name: mine[step.phase] for step in journal.steps if step.do == "submit"})
        if lost:
            _take_back(run, number, backend, f"Slurm lost {', '.join(sorted(lost))}")
            raise Outdated(
                f"{run.path}: Slurm acknowledged {', '.join(sorted(lost))} and lost them (a controller crash?)"
            )
        _patiently(lambda: backend.release(number, list(mine.values())))
    except Overtaken as late:
        _take_back(run, number, backend, str(late))
        raise Outdated(f"{run.path}: {late}; nothing of submission {number} will run: submit again") from None
    except Refused as refusal:
        _take_back(run, number, backend, str(refusal))
        raise UserMistake(f"{run.path}: {refusal}; nothing of submission {number} will run") from None
    except OutcomeOpen as silence:
        raise Unfinished(f"{run.path}: {silence}; what was sent is held: `afterok repair {run.path}` goes on") from None
    ledger.append("released", submission=number)
    return mine


class Outdated(Unfinished):
    """The queue is no longer what was planned for (a job lost, a job begun); all that the submission sent was cancelled."""


def _submission_of(ledger: Ledger, job: str) -> int:
    """The submission whose script a job runs."""
    return next(entry.scripted for entry in ledger.jobs() if entry.job == job)


def _find(backend: Backend, name: str) -> str | None:
    """The job of that name, None when the back end, once it answers, lists none."""
    found = _patiently(lambda: backend.find([name]))
    return found[name][0] if found.get(name) else None


def _send(backend: Backend, number: int, step: Step, waits: dict[str, str], hold: bool) -> str:
    """Send one job; after an open outcome it is looked up by its name before it is sent again."""
    for _ in range(SEND_TRIES):
        try:
            return backend.send(number, step.phase, step.name, step.needs, waits, hold)
        except OutcomeOpen as open_:
            silence = open_
            job = _find(backend, step.name)
            if job is not None:
                return job
    raise silence


def _patiently(call: Any) -> Any:
    """The result of an idempotent call, asked again for a while when the back end does not answer."""
    end = time.monotonic() + OPEN_LIMIT_S
    while True:
        try:
            return call()
        except OutcomeOpen:
            if time.monotonic() > end:
                raise
            time.sleep(LOOK_AGAIN_S)


def _reconcile(backend: Backend, recorded: dict[str, str]) -> list[str]:
    """Cancel second copies of a job (an sbatch that went through after all); names that Slurm no longer knows."""
    found = _patiently(lambda: backend.find(list(recorded)))
    extra = [job for name, jobs in found.items() for job in jobs if job != recorded[name]]
    if extra:
        _patiently(lambda: backend.cancel(extra))
    return [name for name, job in recorded.items() if job not in found.get(name, [])]


def _take_back(run: RunFolder, number: int, backend: Backend, why: str) -> None:
    """`abandon`, or say what is left: that the cluster refused is not lost because it then fell silent."""
    try:
        abandon(run, number, backend, why)
    except (OutcomeOpen, Refused) as failed:
        raise Unfinished(
            f"{run.path}: {why}; what was sent is held and could not be cancelled ({failed}): "
            f"`afterok cancel {run.path}` takes it back"
        ) from None


def abandon(run: RunFolder, number: int, backend: Backend, why: str) -> list[str]:
    """Cancel everything a submission sent (nothing of it ever ran) and close it. Returns the jobs cancelled."""
    names = [step.name for step in Journal.read(run, number).steps if step.do == "submit"]
    found = _patiently(lambda: backend.find(names))
    jobs = sorted({job for some in found.values() for job in some})
    if jobs:
        _patiently(lambda: backend.cancel(jobs))
    Ledger(run.ledger).append("abandoned", submission=number, why=why, jobs=jobs)
    return jobs


def describe(journal: Journal, backend: Backend, number: int) -> list[str]:
    """The calls a journal stands for, as one would type them, with job ids not yet known as <phase>."""
    jobs = {phase: job for phase, job in journal.live.items()}
    lines, new = [], []
    for step in journal.steps:
        waits = {phase: jobs.get(phase, f"<{phase}>") for phase in step.needs}
        if step.do == "submit":
            lines.append(
                backend.shown_send(number, step.phase, step.needs, waits, not any(p in new for p in step.needs))
            )
            new.append(step.phase)
            jobs[step.phase] = f"<{step.phase}>"
        elif step.do == "rewire":
            lines.append(backend.shown_rewire(step.job, step.needs, waits, step.only))
        else:
            lines.append(f"scancel {step.job}")
    return [*lines, f"scontrol release {' '.join(f'<{phase}>' for phase in new)}"] if lines else []
