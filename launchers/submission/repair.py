"""What a submitter that was killed left is finished, or taken back; what a crashed controller held is released."""

from data_tools.mistake import UserMistake
from jobs.artifacts.run_folder import RunFolder
from launchers.backends.choose import backends_of
from launchers.backends.contract import Backend
from launchers.causes.states import HELD
from launchers.planning.ledger import Ledger
from launchers.planning.plan import Plan
from launchers.submission.carry_out import abandon, carry_out
from launchers.submission.journal import Journal
from launchers.submission.lock import submit_lock
from launchers.submission.patience import patiently


def repair(run: RunFolder) -> list[str]:
    """Finish the submissions that a killed submitter left, and release held jobs; return a line about each."""
    lines = []
    with submit_lock(run):
        for number in Ledger(run.ledger).unreleased():
            lines.append(_finish(run, number))
        for backend in backends_of(run).values():
            lines += [f"job {job} was held again (a controller crash?); released" for job in release_held(run, backend)]
    return lines


def settle_unreleased(plan: Plan) -> None:
    """Finish each submission that a killed submitter left where it fits the plan, else cancel it: it never ran."""
    run = plan.run
    for number in Ledger(run.ledger).unreleased():
        keys = {phase.name: phase.frozen.key for phase in plan.phases}
        try:
            frozen = {name: phase.key for name, phase in run.frozen(number).items()}
        except UserMistake:
            frozen = {}
        if not run.journal_path(number).exists() or (frozen == keys and _would_send_the_same(plan, number)):
            _finish(run, number)
        else:
            abandon(run, number, _backend_of_submission(run, number), "other settings were submitted since")


def release_held(run: RunFolder, backend: Backend) -> list[str]:
    """Release jobs that are held although their submission was released, as a controller that crashed leaves them.

    Those of sealed phases are released too: what waits on such a job would wait for ever. Returns the jobs.
    """
    ledger = Ledger(run.ledger)
    unreleased = ledger.unreleased()
    released = [entry for entry in ledger.own_jobs() if entry.scripted not in unreleased]
    tasks = backend.states(released) if released and backend.can_rewire else []
    held = sorted({task.job for task in tasks if task.reason in HELD})
    if held:
        ledger.append("release", jobs=held)
        patiently(lambda: backend.release(0, held))
    return held


def close_unwritten(run: RunFolder, number: int) -> None:
    """Close a submission whose submitter was killed before it wrote the journal: nothing of it was sent."""
    Ledger(run.ledger).append("abandoned", submission=number, why="killed before its journal was written", jobs=[])


def _finish(run: RunFolder, number: int) -> str:
    """Carry out what is left of a submission, or close one without a journal; return a line about it."""
    backend = _backend_of_submission(run, number)
    if not run.journal_path(number).exists():
        close_unwritten(run, number)
        return f"submission {number} had sent nothing; closed"
    jobs = carry_out(run, number, backend)
    told = ", ".join(f"{phase} is job {job}" for phase, job in jobs.items()) or "no new jobs"
    return f"submission {number} finished: {told}"


def _would_send_the_same(plan: Plan, number: int) -> bool:
    """Return whether the jobs of an unfinished submission are those that its phases would get now.

    Their keys are the same already, but no key holds what a job asks the cluster for.
    """
    backend, planned = _backend_of_submission(plan.run, number), {phase.name: phase for phase in plan.phases}
    submits = Journal.read(plan.run, number).submits
    return not any(backend.differs(step.entry(number), planned[step.phase]) for step in submits)


def _backend_of_submission(run: RunFolder, number: int) -> Backend:
    return backends_of(run)[Ledger(run.ledger).backend(number)["choice"]]
