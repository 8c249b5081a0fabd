"""A submission as plain files, for a login node that has sh and sbatch and no Python: `afterok bundle`.

The submission is frozen and journaled as ever, and its scripts are those that `submit` would send. Only the sending is
left, to a shell script (bundle_script.py), which notes in submissions/N/sent what it did. The ledger reads that as if
`submit` had written it, so that status, why, logs, repair and cancel know of its jobs.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from data_tools.base import durable
from data_tools.mistake import UserMistake
from jobs.artifacts.run_folder import RunFolder
from launchers.backends.choose import backends_of
from launchers.backends.contract import JobSpec
from launchers.backends.slurm import SlurmBackend
from launchers.planning.ledger import Ledger
from launchers.planning.plan import Plan
from launchers.submission.bundle_script import NAME, submit_script
from launchers.submission.decide import Queue, decide
from launchers.submission.freeze import freeze, job_name, next_number, opening
from launchers.submission.live import live_jobs
from launchers.submission.lock import submit_lock
from launchers.submission.steps import Submit


@dataclass(frozen=True)
class Bundled:
    """What a bundle became: its submission (None: there was nothing to submit), and the files in its folder."""

    number: int | None
    folder: Path
    files: list[str]


def bundle(plan: Plan, folder: Path) -> Bundled:
    """Write what a plan would submit into an empty folder, as a submission of the run that is yet to be sent.

    Raises:
        UserMistake: the plan is for this machine, the folder holds something, cannot be made or is the run's, or jobs
            of the run are under way.
    """
    if plan.cluster.kind != "slurm":
        raise UserMistake(f"a bundle is for Slurm, and this plan is for {plan.cluster.where}; say cluster=PROFILE")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserMistake(f"{folder} is there already; name a folder that is empty, or none yet")
    if not plan.to_run:
        return Bundled(None, folder, [])
    with submit_lock(plan.run):
        _refuse_begun(plan)
        _make_folder(plan.run, folder)  # before anything is written down of a submission
        number = next_number(plan.run)
        steps = _steps(plan, number)
        for planned in plan.to_run:
            planned.survey.withdraw(plan.run.artifact(planned.frozen), number)
        files = _write(plan, number, steps, folder)
        told = [step.record() for step in steps]
        Ledger(plan.run.ledger).append("bundle", **opening(plan, number), folder=str(folder.resolve()), jobs=told)
    return Bundled(number, folder, files)


def _make_folder(run: RunFolder, folder: Path) -> None:
    """Make the bundle's folder, if need be. Raises UserMistake where it cannot be one."""
    if folder.resolve().is_relative_to(run.path.resolve()):
        raise UserMistake(f"{folder} lies in the run {run.path}, whose files are afterok's; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserMistake(f"{folder}: a folder above it is a file; name another folder") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserMistake(f"{folder}: you may not write there; name another folder")


def _refuse_begun(plan: Plan) -> None:
    """Refuse a run of which something is under way: a script that sends jobs rewires and cancels none."""
    run = plan.run
    if numbers := Ledger(run.ledger).unreleased():
        raise UserMistake(f"{run.path}: submission {numbers[-1]} is not finished; `afterok repair {run.path}` first")
    for phase, live in live_jobs(run, backends_of(run).values()).items():
        raise UserMistake(
            f"{run.path}: {phase} is under way as job {live.entry.job}, and a bundle only sends jobs; "
            f"wait for it, or `afterok cancel {run.path}` first"
        )


def _steps(plan: Plan, number: int) -> list[Submit]:
    """Write down the submission and return its steps: jobs to send, since nothing of the run is under way."""
    run = plan.run
    nothing = Queue(live={}, differs={}, can_rewire=True)
    journal = decide(plan, nothing, {}, lambda phase: job_name(run, phase, number))
    freeze(plan, number)
    journal.write(run, number)
    return journal.submits


def _write(plan: Plan, number: int, steps: list[Submit], folder: Path) -> list[str]:
    """Write the scripts, here and in the run, and what sends them; return the names of the files in `folder`."""
    planned = {phase.name: phase for phase in plan.phases}
    specs = [
        JobSpec(planned=planned[step.phase], name=step.name, elements=step.elements, needs=step.needs, links=step.links)
        for step in steps
    ]
    backend = SlurmBackend(plan.run, plan.cluster)
    backend.prepare(number, specs)
    names = [f"{step.phase}.sh" for step in steps]
    for step, name in zip(steps, names, strict=True):
        durable.write_file(folder / name, backend.script(number, step.phase).read_text())
    durable.write_file(folder / NAME, submit_script(plan.run, number, steps, plan.cluster.slurm_name))
    (folder / NAME).chmod(0o755)
    return [NAME, *names]
