"""A submission as a transaction: the steps of its journal are done one by one, and all its jobs are released last.

Until the release nothing new can run: a job whose needs are not new jobs of this submission is sent held. The ledger
has a line for each step once it was done, then "released", or "abandoned" where everything was taken back. A job is
found again by its name, which carries a token: an sbatch whose outcome is open is looked up before it is sent again.
"""

from data_tools.mistake import UserMistake
from jobs.artifacts.run_folder import RunFolder
from launchers.backends.contract import Backend, OutcomeOpen, Overtaken, Refused
from launchers.planning.ledger import Ledger
from launchers.submission.journal import Journal
from launchers.submission.patience import Unfinished, patiently
from launchers.submission.steps import Execution


class Outdated(Unfinished):
    """The queue is not what was planned for (a job lost, a job begun); what the submission sent was cancelled."""


def carry_out(run: RunFolder, number: int, backend: Backend) -> dict[str, str]:
    """Do what is left of a submission's journal, release it, and return {phase: job}. It may be called again and again.

    Raises:
        UserMistake: the cluster refused a job; everything this submission sent was cancelled.
        Outdated: the cluster lost jobs that it had acknowledged, or began one that was to be rewired; everything this
            submission sent was cancelled.
        Unfinished: the cluster does not answer.
    """
    ledger, journal = Ledger(run.ledger), Journal.read(run, number)
    events = [event for event in ledger.events() if event.get("submission") == number]
    recorded = [event for event in events if event["event"] == "job"]
    if any(event["event"] in ("released", "abandoned") for event in events):
        return {event["phase"]: event["job"] for event in recorded}
    execution = Execution(
        run=run,
        number=number,
        backend=backend,
        awaited=dict(journal.live),
        begun=frozenset(event["name"] for event in events if event["event"] == "sending"),
        recorded={event["name"]: event["job"] for event in recorded},
    )
    try:
        for step in journal.steps:
            step.carry_out(execution)
        lost = _reconcile(backend, {step.name: execution.sent[step.phase] for step in journal.submits})
        if lost:
            _take_back(run, number, backend, f"Slurm lost {', '.join(sorted(lost))}")
            raise Outdated(
                f"{run.path}: Slurm acknowledged {', '.join(sorted(lost))} and lost them (a controller crash?)"
            )
        patiently(lambda: backend.release(number, list(execution.sent.values())))
    except Overtaken as late:
        _take_back(run, number, backend, str(late))
        raise Outdated(f"{run.path}: {late}; nothing of submission {number} will run: submit again") from None
    except Refused as refusal:
        _take_back(run, number, backend, str(refusal))
        raise UserMistake(f"{run.path}: {refusal}; nothing of submission {number} will run") from None
    except OutcomeOpen as silence:
        raise Unfinished(f"{run.path}: {silence}; what was sent is held: `afterok repair {run.path}` goes on") from None
    ledger.append("released", submission=number)
    return execution.sent


def _reconcile(backend: Backend, recorded: dict[str, str]) -> list[str]:
    """Cancel second copies of the jobs {name: job}, and return the names that Slurm no longer knows.

    A second copy comes of an sbatch that went through after all.
    """
    listed = patiently(lambda: backend.find(list(recorded)))
    extra = [job for name, jobs in listed.items() for job in jobs if job != recorded[name]]
    if extra:
        patiently(lambda: backend.cancel(extra))
    return [name for name, job in recorded.items() if job not in listed.get(name, [])]


def _take_back(run: RunFolder, number: int, backend: Backend, why: str) -> None:
    """Abandon a submission, or say what is left of it.

    Raises:
        Unfinished: the cluster, which has refused a job, fell silent or refuses to cancel; its refusal is told too.
    """
    try:
        abandon(run, number, backend, why)
    except (OutcomeOpen, Refused) as failed:
        raise Unfinished(
            f"{run.path}: {why}; what was sent is held and could not be cancelled ({failed}): "
            f"`afterok cancel {run.path}` takes it back"
        ) from None


def abandon(run: RunFolder, number: int, backend: Backend, why: str) -> list[str]:
    """Cancel everything that a submission sent (nothing of it ever ran), close it, and return the jobs cancelled."""
    names = [step.name for step in Journal.read(run, number).submits]
    listed = patiently(lambda: backend.find(names))
    jobs = sorted({job for copies in listed.values() for job in copies})
    if jobs:
        patiently(lambda: backend.cancel(jobs))
    Ledger(run.ledger).append("abandoned", submission=number, why=why, jobs=jobs)
    return jobs
