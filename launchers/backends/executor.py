"""Slurm behind the contract of launchers/backends/contract.py: one sbatch a phase, built by submitit, sent by slurm.client.

`PhaseExecutor` is submitit's SlurmExecutor with another command (our worker under srun), chosen array indices and no
pickles. The script runs by hand too: `sbatch RUN/submissions/N/scripts/PHASE.sh`.
"""

import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmExecutor

from data_tools.base import durable
from jobs.artifacts.run_folder import RunFolder
from jobs.retry import EXIT_UNFINISHED
from launchers.backends.contract import (
    ACTIVE_STATES,
    HELD,
    NEVER,
    PENDING,
    JobSpec,
    OutcomeOpen,
    Overtaken,
    Refused,
    TaskState,
)
from launchers.backends.shell_lines import script_setup
from launchers.planning.ledger import JobEntry
from launchers.planning.plan import PlannedPhase
from slurm.client import Slurm, SlurmError
from slurm.detect import Cluster
from slurm.printed import QueueRow, format_indices, parse_indices
from slurm.profile.check import contact_note
from slurm.profile.schema import Profile

# Slurm gives a task the default signals, and Python takes a moment before the worker's handler is in place.
WITHOUT_USR2 = ["/bin/sh", "-c", 'trap "" USR2; exec "$@"', "worker"]


class PhaseExecutor(SlurmExecutor):
    """Builds a phase's script from submitit's parameters; slurm.client sends it, within our time limit."""

    def __init__(self, script: Path):
        super().__init__(script.parent)
        self.script = script

    @classmethod
    def affinity(cls) -> int:
        return 2  # a script can be written where there is no srun

    def write(self, parameters: dict[str, Any], command: str) -> None:
        durable.write_file(self.script, self.text(parameters, command))

    def text(self, parameters: dict[str, Any], command: str) -> str:
        self.parameters = {key: value for key, value in parameters.items() if value is not None or key == "wckey"}
        return self._make_submission_file_text(command, "")


def phase_parameters(profile: Profile, run: RunFolder, number: int, spec: JobSpec) -> dict[str, Any]:
    """Everything submitit turns into #SBATCH lines for one phase: a pure function, tested by a golden file.

    Hold and dependency are not in the script but on sbatch's command line: they are this submission's business.
    """
    resources, frozen = spec.planned.resources, spec.planned.frozen
    log = run.log_path(spec.phase, number, 0)
    extra: dict[str, Any] = {key: value or True for key, value in resources.extra_sbatch.items()}  # "" is a bare flag
    extra |= {
        "output": str(
            log.with_name(f"a{number}.{'tasks' if frozen.batch > 1 else ''}%a.out") if spec.is_array else log
        ),
        "export": ",".join(profile.env.forward) or "NONE",
        # A dependent of a failed phase waits, so that it can be rewired to the next attempt; what only a failure calls
        # for must not wait for ever behind a success.
        "kill-on-invalid-dep": "yes" if spec.planned.conditional else "no",
        "signal": f"USR2@{profile.signal_lead_s}",
        "chdir": str(run.path),
    }
    if spec.links:
        extra |= {"array": f"0-{spec.links - 1}%1", "no-requeue": True}
    elif spec.is_array:
        tasks = {element // frozen.batch for element in spec.elements}
        extra["array"] = format_indices(tasks) + (f"%{frozen.throttle}" if frozen.throttle else "")
    return {
        "job_name": spec.name,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "time": resources.time_minutes,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.ranks_per_node,
        "cpus_per_task": resources.cpus_per_task,
        "gpus_per_node": resources.gpus_per_node or None,
        "mem": f"{int(resources.mem_gib * 1024)}M" if resources.mem_gib else None,
        "wckey": None,
        "stderr_to_stdout": True,
        "use_srun": False,
        "setup": script_setup(profile, run.submission_folder(number) / "code", frozen.ranks),
        "additional_parameters": extra,
    }


def phase_command(profile: Profile, run: RunFolder, number: int, spec: JobSpec) -> str:
    """The last lines of the script: srun of our worker on all ranks of each element of the task, and what ended it.

    In a chain the array's index is a link, and all work on the one element. Elements that share a task run one after the
    other; the task fails if one fails, and ends where one was asked to stop.
    """
    # Since 22.05 srun does not take --cpus-per-task over from sbatch.
    srun = [
        "srun",
        "--kill-on-bad-exit=1",
        "--export=ALL",
        "--unbuffered",
        f"--cpus-per-task={spec.planned.resources.cpus_per_task}",
    ]
    if profile.srun.mpi:
        srun.append(f"--mpi={profile.srun.mpi}")
    srun += profile.srun.extra
    python, frozen = profile.env.python or sys.executable, spec.planned.frozen
    where = [str(run.path), spec.phase]
    worker = shlex.join([*WITHOUT_USR2, python, "-m", "jobs.worker", *where])
    rerun = shlex.join([python, "-m", "launchers.backends.restart", *where])
    log = ""
    if frozen.batch > 1:
        log = (
            " --open-mode=append "
            f"--output={shlex.quote(str(run.log_path(spec.phase, number, 0).parent))}/a{number}.$1.out"
        )
    later_life = "$SLURM_ARRAY_TASK_ID" if spec.links else "${SLURM_RESTART_COUNT:-0}"
    ended = "" if spec.links else "[ $code = 0 ] || "
    lines = [
        "run_element() {",
        f'    if [ "{later_life}" != 0 ]; then',
        f"        {rerun} $1 --submission {number} || return $?",
        "    fi",
        "    local code=0",
        f"    {shlex.join(srun)}{log} {worker} $1 --submission {number} --requeue || code=$?",
        f"    {ended}{rerun} $1 --submission {number} --code $code",
        "    return $code",
        "}",
    ]
    if spec.links:
        return "\n".join([*lines, "run_element 0"])
    if frozen.batch == 1:
        return "\n".join([*lines, 'run_element "${SLURM_ARRAY_TASK_ID:-0}"'])
    last = f"(SLURM_ARRAY_TASK_ID + 1) * {frozen.batch} - 1"
    most = frozen.elements - 1
    return "\n".join(
        [
            *lines,
            "code=0",
            f"for element in $(seq $(( SLURM_ARRAY_TASK_ID * {frozen.batch} )) "
            f"$(( {last} < {most} ? {last} : {most} ))); do",
            "    run_element $element || code=$?",
            f"    [ $code != {EXIT_UNFINISHED} ] || break",
            "done",
            "exit $code",
        ]
    )


def dependency(needs: dict[str, str], waits: dict[str, str], index: int | None = None) -> str:
    """Slurm's --dependency for phases and their jobs, afterok:12:15,aftercorr:13; of one array element with `index`."""
    return ",".join(_condition(type_, waits[phase], index) for phase, type_ in needs.items() if phase in waits)


def _condition(type_: str, jobs: str, index: int | None) -> str:
    """Slurm's condition on the jobs ("12", "12:15") that a phase waits on.

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


class SlurmBackend:
    name = "slurm"
    can_rewire = True

    def __init__(self, run: RunFolder, cluster: Cluster):
        self.run, self.cluster, self.slurm = run, cluster, Slurm(cluster.env)

    def script(self, number: int, phase: str) -> Path:
        return self.run.submission_folder(number) / "scripts" / f"{phase}.sh"

    def prepare(self, number: int, specs: list[JobSpec]) -> None:
        for spec in specs:
            script = self.script(number, spec.phase)
            script.parent.mkdir(parents=True, exist_ok=True)
            (self.run.phase_folder(spec.phase) / "logs").mkdir(parents=True, exist_ok=True)
            PhaseExecutor(script).write(*self._parts(number, spec))

    def _parts(self, number: int, spec: JobSpec) -> tuple[dict[str, Any], str]:
        """What a phase's script is made of."""
        profile = self.cluster.profile
        return phase_parameters(profile, self.run, number, spec), phase_command(profile, self.run, number, spec)

    def differs(self, entry: JobEntry, planned: PlannedPhase) -> str:
        script = self.script(entry.scripted, entry.phase)
        try:
            sent = script.read_text()
        except OSError:
            return "a script that is gone"
        # how many elements share a task follows the queue's limits of the moment: nobody asked for another number
        planned = replace(planned, frozen=replace(planned.frozen, batch=entry.batch))
        parts = self._parts(entry.scripted, JobSpec(planned, entry.name, entry.elements, {}, entry.links))
        return script_changes(sent, PhaseExecutor(script).text(*parts))

    def _send_command(
        self, number: int, phase: str, needs: dict[str, str], waits: dict[str, str], hold: bool
    ) -> list[str]:
        waits_on = dependency(needs, waits)
        return [
            *(["--hold"] if hold else []),
            *([f"--dependency={waits_on}"] if waits_on else []),
            str(self.script(number, phase)),
        ]

    def send(self, number: int, phase: str, name: str, needs: dict[str, str], waits: dict[str, str], hold: bool) -> str:
        try:
            return self._ask(lambda: self.slurm.sbatch(self._send_command(number, phase, needs, waits, hold)))
        except Refused as refusal:
            if not SUBMIT_LIMIT.search(str(refusal)):
                raise
            try:
                numbers = self._submit_numbers(number, phase)
            except SlurmError as error:
                numbers = f"how many of yours are queued is not known: {error}"
            raise Refused(f"{refusal}; {numbers}") from None

    def _submit_numbers(self, number: int, phase: str) -> str:
        """What an sbatch that a limit on the user's jobs refused would have needed."""
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
        found: dict[str, list[str]] = {}
        for row in self._ask(self.slurm.queue):
            job = row.array_job_id or row.job_id
            if row.name in names and row.state != "CANCELLED" and job not in found.get(row.name, []):
                found.setdefault(row.name, []).append(job)
        return found

    def _rewire_command(self, job: str, needs: dict[str, str], waits: dict[str, str], only: int | None) -> list[str]:
        element = job if only is None else f"{job}_{only}"
        return ["scontrol", "update", f"jobid={element}", f"dependency={dependency(needs, waits, only)}"]

    def rewire(self, job: str, needs: dict[str, str], waits: dict[str, str], only: int | None) -> None:
        try:
            self._ask(lambda: self.slurm.run(self._rewire_command(job, needs, waits, only)))
        except Refused as refusal:
            raise (Overtaken if BEGUN.search(str(refusal)) else Refused)(str(refusal)) from None

    def release(self, number: int, jobs: list[str]) -> None:
        rows = self._ask(self.slurm.queue)
        held = {
            row.array_job_id or row.job_id
            for row in rows
            if row.state == "PENDING" and (row.reason.startswith("JobHeld") or row.reason in HELD)
        }
        mine = [job for job in jobs if job in held]
        if mine:
            self._ask(lambda: self.slurm.run(["scontrol", "release", *mine]))

    def states(self, jobs: list[JobEntry]) -> list[TaskState]:
        known = {entry.job: entry for entry in jobs}
        rows = self.slurm.queue()
        dead = never_starting(rows)
        found = []
        for row in rows:
            job = row.array_job_id or row.job_id
            # The name as well: a controller that lost its last seconds gives out the same ids again.
            if job not in known or known[job].name != row.name:
                continue
            reason = (
                NEVER if row.job_id in dead and row.state == "PENDING" else "" if row.reason == "None" else row.reason
            )
            found += [TaskState(job, i, row.state, reason) for i in known[job].elements_of(row.array_index)]
        chained = [state for state in found if known[state.job].links]
        return [state for state in found if not known[state.job].links] + chain_states(chained)

    def cancel(self, jobs: list[str]) -> None:
        self._ask(lambda: self.slurm.cancel(jobs))

    def shown_send(self, number: int, phase: str, needs: dict[str, str], waits: dict[str, str], hold: bool) -> str:
        return " ".join(["sbatch", *self._send_command(number, phase, needs, waits, hold)])

    def shown_rewire(self, job: str, needs: dict[str, str], waits: dict[str, str], only: int | None) -> str:
        return " ".join(self._rewire_command(job, needs, waits, only))

    def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except SlurmError as error:
            if error.is_silence:
                raise OutcomeOpen(str(error)) from None
            raise Refused(f"{error}{contact_note(self.cluster.profile)}") from None


def chain_states(links: list[TaskState]) -> list[TaskState]:
    """One state a chain, of those of its links: of the one that runs, else of what waits, else of the last that ended.

    A chain whose next link waits has begun, like a job that was requeued.
    """
    found = []
    for job in dict.fromkeys(link.job for link in links):
        mine = [link for link in links if link.job == job]
        left = [link for link in mine if link.state in ACTIVE_STATES]
        speaks = min(left, key=lambda link: link.state == PENDING) if left else mine[-1]
        if speaks.state == PENDING and len(left) < len(mine):
            speaks = replace(speaks, state="REQUEUED")
        found.append(replace(speaks, links_left=len(left)))
    return found


def script_changes(sent: str, now: str) -> str:
    """Say in which options two scripts differ, "time 5 → 33", or that they do so elsewhere; "" where they do not."""
    if sent == now:
        return ""
    options = [dict(re.findall(r"^#SBATCH --([^=\n]+)=?(.*)$", text, re.MULTILINE)) for text in (sent, now)]
    changed = [
        f"{name} {options[0].get(name, 'none')} → {options[1].get(name, 'none')}"
        for name in sorted(options[0].keys() | options[1].keys())
        if options[0].get(name) != options[1].get(name)
    ]
    return ", ".join(changed) or "another script"


def never_starting(rows: list[QueueRow]) -> set[str]:
    """Raw ids of waiting jobs that can never start: Slurm marks the first, their own dependents just wait for ever."""
    dead = {row.job_id for row in rows if row.state == "PENDING" and row.reason == NEVER}
    waiting = [
        (row, set(re.findall(r"afterok:(\d+)|aftercorr:(\d+)", row.dependency)))
        for row in rows
        if row.state == "PENDING" and row.dependency
    ]
    before = -1
    while len(dead) != before:
        before = len(dead)
        arrays = {row.array_job_id for row in rows if row.job_id in dead and row.array_job_id}
        for row, parents in waiting:
            if {ok or corr for ok, corr in parents} & (dead | arrays):
                dead.add(row.job_id)
    return dead
