"""Runs jobs on Slurm, behind the contract of launchers/backends/contract.py: one sbatch a phase."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from data_tools.base import durable
from jobs.artifacts.run_folder import RunFolder
from launchers.backends.contract import JobSpec, OutcomeOpen, Overtaken, Refused, TaskState
from launchers.backends.slurm_script import phase_script, script_changes
from launchers.causes.states import ACTIVE_STATES, CANCELLED, HELD, NEVER, PENDING
from launchers.planning.ledger import JobEntry
from launchers.planning.plan import PlannedPhase
from slurm.client import Slurm, SlurmError
from slurm.detect import Cluster
from slurm.printed import QueueRow, parse_indices, read_indices
from slurm.profile.check import contact_note


def dependency(needs: dict[str, str], waits: dict[str, str], index: int | None = None) -> str:
    """Return Slurm's --dependency for phases and their jobs, "afterok:12:15,aftercorr:13".

    With `index`, that of this one element of an array.
    """
    return ",".join(_condition(type_, waits[phase], index) for phase, type_ in needs.items() if phase in waits)


def _condition(type_: str, jobs: str, index: int | None) -> str:
    """Return Slurm's condition on the jobs ("12", "12:15") that a phase waits on.

    Slurm's own singleton goes by the job's name, which here carries a token: the jobs are named instead, and the later
    one waits for the earlier. All of several jobs would have to fail for afternotok, where one is enough: they are
    awaited, and the worker sees whether there is a seal.
    """
    if type_ == "singleton" or (type_ == "afternotok" and ":" in jobs):
        return f"afterany:{jobs}"
    if type_ == "aftercorr" and "_" in jobs:  # a chain's last link
        return f"afterok:{jobs}"
    if type_ == "aftercorr" and index is not None:  # its partner alone
        return f"afterok:{jobs}_{index}"
    return f"{type_}:{jobs}"


# QOSMaxSubmitJobPerUserLimit, AssocMaxSubmitJobLimit, …
SUBMIT_LIMIT = re.compile(r"MaxSubmit|GrpSubmit|job submit limit")
# ESLURM_JOB_NOT_PENDING, ESLURM_JOB_FINISHED, …
BEGUN = re.compile(r"no longer pending|already finished|already completing or completed|Invalid job id")


Answer = TypeVar("Answer")


class SlurmBackend:
    """Jobs on a Slurm cluster."""

    name = "slurm"
    can_rewire = True

    def __init__(self, run: RunFolder, cluster: Cluster):
        self.run, self.cluster, self.slurm = run, cluster, Slurm(cluster.env)

    def script(self, number: int, phase: str) -> Path:
        """Return where a submission's script of a phase lies."""
        return self.run.script_path(number, phase)

    def prepare(self, number: int, specs: list[JobSpec]) -> None:
        for spec in specs:
            script = self.script(number, spec.phase)
            script.parent.mkdir(parents=True, exist_ok=True)
            self.run.logs_folder(spec.phase).mkdir(parents=True, exist_ok=True)
            durable.write_file(script, phase_script(self.cluster.profile, self.run, number, spec))

    def differs(self, entry: JobEntry, planned: PlannedPhase) -> str:
        try:
            sent = self.script(entry.scripted, entry.phase).read_text()
        except OSError:
            return "a script that is gone"
        # how many elements share a task follows the queue's limits of the moment: nobody asked for another number
        planned = replace(planned, frozen=replace(planned.frozen, batch=entry.batch))
        spec = JobSpec(planned, name=entry.name, elements=entry.elements, needs={}, links=entry.links)
        return script_changes(sent, phase_script(self.cluster.profile, self.run, entry.scripted, spec))

    def _sbatch_arguments(self, script: Path, waits_on: str, hold: bool) -> list[str]:
        return [*(["--hold"] if hold else []), *([f"--dependency={waits_on}"] if waits_on else []), str(script)]

    def send(self, number: int, phase: str, name: str, needs: dict[str, str], waits: dict[str, str], hold: bool) -> str:
        arguments = self._sbatch_arguments(self.script(number, phase), dependency(needs, waits), hold)
        try:
            return self._ask(lambda: self.slurm.sbatch(arguments))
        except Refused as refusal:
            if not SUBMIT_LIMIT.search(str(refusal)):
                raise
            try:
                numbers = self._submit_numbers(number, phase)
            except SlurmError as error:
                numbers = f"how many of yours are queued is not known: {error}"
            raise Refused(f"{refusal}; {numbers}") from None

    def _submit_numbers(self, number: int, phase: str) -> str:
        """Say what an sbatch that a limit on the user's jobs refused would have needed."""
        text = self.script(number, phase).read_text()
        array = re.search(r"^#SBATCH --array=([^%\n]+)", text, re.MULTILINE)
        qos = re.search(r"^#SBATCH --qos=(\S+)", text, re.MULTILINE)
        asked = len(parse_indices(array[1])) if array else 1
        queued = sum(row.state in ACTIVE_STATES for row in self.slurm.queue())
        limit = self.slurm.submit_limit([qos[1] if qos else ""])
        allowed = f"{limit.of} allows {limit.jobs}" if limit else "sacctmgr does not tell the limit"
        return (
            f"{phase} is {asked} job(s), array elements counted, {queued} of yours are in the queue, and "
            f"{allowed}; wait for others to end, or set the profile's max_submit_jobs so that elements share "
            "tasks"
        )

    def find(self, names: list[str]) -> dict[str, list[str]]:
        jobs: dict[str, list[str]] = {}
        for row in self._ask(lambda: self.slurm.queue(each_element=False)):
            job = row.array_job_id or row.job_id
            if row.name in names and row.state != CANCELLED and job not in jobs.get(row.name, []):
                jobs.setdefault(row.name, []).append(job)
        return jobs

    def _rewire_command(self, job: str, needs: dict[str, str], waits: dict[str, str], only: int | None) -> list[str]:
        element = job if only is None else f"{job}_{only}"
        return ["scontrol", "update", f"jobid={element}", f"dependency={dependency(needs, waits, only)}"]

    def rewire(self, job: str, needs: dict[str, str], waits: dict[str, str], only: int | None) -> None:
        try:
            self._ask(lambda: self.slurm.run(self._rewire_command(job, needs, waits, only)))
        except Refused as refusal:
            raise (Overtaken if BEGUN.search(str(refusal)) else Refused)(str(refusal)) from None

    def release(self, number: int, jobs: list[str]) -> None:
        to_release = self._held(jobs)
        if not to_release:
            return
        try:
            self._ask(lambda: self.slurm.run(["scontrol", "release", *to_release]))
        except Refused as refusal:  # some elements began or ended since the queue was read; the others are released
            if not BEGUN.search(str(refusal)) or self._held(to_release):
                raise

    def _held(self, jobs: list[str]) -> list[str]:
        """Return those of `jobs` that wait because they are held, or an element of them is."""
        held = {
            row.array_job_id or row.job_id
            for row in self._ask(lambda: self.slurm.queue(each_element=False))
            if row.state == PENDING and (row.reason.startswith("JobHeld") or row.reason in HELD)
        }
        return [job for job in jobs if job in held]

    def states(self, jobs: list[JobEntry]) -> list[TaskState]:
        known = {entry.job: entry for entry in jobs}
        rows = self.slurm.queue(each_element=False)
        dead = never_starting(rows)
        tasks: list[TaskState] = []
        chained: list[TaskState] = []  # links
        for row in rows:
            job = row.array_job_id or row.job_id
            # The name as well: a controller that lost its last seconds gives out the same ids again.
            if job not in known or known[job].name != row.name:
                continue
            reason = "" if row.reason == "None" else row.reason
            if row.job_id in dead and row.state == PENDING:
                reason = NEVER
            own = read_indices(row.waiting) if row.waiting else None
            elements = known[job].elements_of(own)
            if known[job].links:
                chained += [TaskState(job, i, row.state, reason) for _ in own or [None] for i in elements]
            elif elements:
                alike = elements if len(elements) > 1 else None
                tasks.append(TaskState(job, elements[0], row.state, reason, alike=alike))
        return tasks + chain_states(chained)

    def cancel(self, jobs: list[str]) -> None:
        self._ask(lambda: self.slurm.cancel(jobs))

    def shown_send(self, number: int, phase: str, needs: dict[str, str], waits: dict[str, str], hold: bool) -> str:
        arguments = self._sbatch_arguments(self.script(number, phase), dependency(needs, waits), hold)
        return " ".join(["sbatch", *arguments])

    def shown_rewire(self, job: str, needs: dict[str, str], waits: dict[str, str], only: int | None) -> str:
        return " ".join(self._rewire_command(job, needs, waits, only))

    def _ask(self, call: Callable[[], Answer]) -> Answer:
        """Return what `call` returns; what the cluster says instead is raised in the contract's terms."""
        try:
            return call()
        except SlurmError as error:
            if error.is_silence:
                raise OutcomeOpen(str(error)) from None
            raise Refused(f"{error}{contact_note(self.cluster.profile)}") from None


def chain_states(links: list[TaskState]) -> list[TaskState]:
    """Return one state a chain, of its links': of the one that runs, else of what waits, else of the last that ended.

    A chain whose next link waits has begun, like a job that was requeued.
    """
    states: list[TaskState] = []
    for job in dict.fromkeys(link.job for link in links):
        chain = [link for link in links if link.job == job]
        left = [link for link in chain if link.state in ACTIVE_STATES]
        speaks = min(left, key=lambda link: link.state == PENDING) if left else chain[-1]
        if speaks.state == PENDING and len(left) < len(chain):
            speaks = replace(speaks, state="REQUEUED")
        states.append(replace(speaks, links_left=len(left)))
    return states


def never_starting(rows: list[QueueRow]) -> set[str]:
    """Return the raw ids of waiting jobs that can never start.

    Slurm marks the first of them; their own dependents just wait for ever.
    """
    dead = {row.job_id for row in rows if row.state == PENDING and row.reason == NEVER}
    if not dead:
        return dead
    waiting = [
        (row, set(re.findall(r"afterok:(\d+)|aftercorr:(\d+)", row.dependency)))
        for row in rows
        if row.state == PENDING and row.dependency
    ]
    before = -1
    while len(dead) != before:
        before = len(dead)
        arrays = {row.array_job_id for row in rows if row.job_id in dead and row.array_job_id}
        for row, parents in waiting:
            if {ok or corr for ok, corr in parents} & (dead | arrays):
                dead.add(row.job_id)
    return dead
