"""Builds the batch script of one phase, its #SBATCH lines and its commands, with submitit and from pure functions.

`PhaseExecutor` is submitit's SlurmExecutor with another command (our worker under srun), chosen array indices and no
pickles. The script runs by hand too: `sbatch RUN/submissions/N/scripts/PHASE.sh`.
"""

import re
import shlex
import sys
from collections.abc import Collection
from typing import Any

from submitit.slurm.slurm import SlurmExecutor

from jobs.artifacts.run_folder import RunFolder
from jobs.retry import EXIT_UNFINISHED
from launchers.backends.containers import contained
from launchers.backends.contract import JobSpec
from launchers.backends.shell_lines import script_setup
from launchers.planning.limits import array_text
from slurm.profile.environments import environment_of
from slurm.profile.mail import mail_options
from slurm.profile.places import gpus_of
from slurm.profile.schema import Health, Profile

# Slurm gives a task the default signals, and Python takes a moment before the worker's handler is in place.
WITHOUT_USR2 = ["/bin/sh", "-c", 'trap "" USR2; exec "$@"', "worker"]
RESTART = "launchers.backends.restart"  # what decides whether an element that ended is run again
RESTART_BEFORE = "launchers.rerun"  # its name in scripts that wait since before: no other script for that


class PhaseExecutor(SlurmExecutor):
    """Builds a phase's script from submitit's parameters; slurm.client sends it, within our time limits."""

    @classmethod
    def affinity(cls) -> int:
        return 2  # a script can be written where there is no srun

    def text(self, parameters: dict[str, Any], command: str) -> str:
        """Return the script that asks Slurm for `parameters`, a value of None meaning that it says nothing of it."""
        self.parameters = {key: value for key, value in parameters.items() if value is not None or key == "wckey"}
        return self._make_submission_file_text(command, "")


def phase_script(profile: Profile, run: RunFolder, number: int, spec: JobSpec) -> str:
    """Return the whole batch script of one phase of submission `number`."""
    executor = PhaseExecutor(run.submission_folder(number) / "scripts")
    return executor.text(
        phase_parameters(profile, run, number, spec),
        phase_command(profile, run, number, spec),
    )


def phase_parameters(profile: Profile, run: RunFolder, number: int, spec: JobSpec) -> dict[str, Any]:
    """Return all that submitit turns into #SBATCH lines for one phase: a pure function, tested by a golden file.

    Hold and dependency are not in the script but on sbatch's command line: they are this submission's business.
    """
    resources, frozen = spec.planned.resources, spec.planned.frozen
    log = run.log_path(spec.phase, number, f"{'tasks' if frozen.batch > 1 else ''}%a" if spec.is_array else 0)
    # "" is a bare flag
    extra: dict[str, str | bool] = {key: value or True for key, value in resources.extra_sbatch.items()}
    extra |= {
        "output": str(log),
        "export": ",".join(environment_of(profile, resources.role).forward) or "NONE",
        # A dependent of a failed phase waits, so that it can be rewired to the next attempt; what only a failure calls
        # for must not wait for ever behind a success.
        "kill-on-invalid-dep": "yes" if spec.planned.conditional else "no",
        "signal": f"USR2@{profile.signal_lead_s}",
        "chdir": str(run.path),
    }
    mixed = bool(spec.links) or spec.planned.conditional
    extra |= mail_options(profile.mail, first=not frozen.needs, last=spec.planned.last, mixed=mixed)
    said = {key: getattr(resources, key) for key in ("reservation", "licenses", "gres")}
    extra |= {key: value for key, value in said.items() if value is not None}
    if spec.links:
        extra |= {"array": f"0-{spec.links - 1}%1", "no-requeue": True}
    elif spec.is_array:
        extra["array"] = array_text(frozen, spec.elements)
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
        "gpus_per_node": None if gpus_of(resources.gres)[1] else resources.gpus_per_node or None,
        "mem": f"{int(resources.mem_gib * 1024)}M" if resources.mem_gib else None,
        "wckey": None,
        "stderr_to_stdout": True,
        "use_srun": False,
        "setup": script_setup(profile, run.code_folder(number), ranks=frozen.processes, role=resources.role),
        "additional_parameters": extra,
    }


def phase_command(profile: Profile, run: RunFolder, number: int, spec: JobSpec) -> str:
    """Return the last lines of the script: srun of our worker's processes for each element, and what ended it.

    In a chain the array's index is a link, and all links work on the one element. Elements that share a task run one
    after the other; the task fails if one fails, and ends where one was asked to stop.
    """
    frozen, resources = spec.planned.frozen, spec.planned.resources
    python = environment_of(profile, resources.role).python or sys.executable
    inside = contained(profile, resources.role, run.path, with_gpus=resources.gpus_per_node > 0)
    # Since 22.05 srun does not take --cpus-per-task over from sbatch.
    srun = [
        "srun",
        "--kill-on-bad-exit=1",
        "--export=ALL",
        "--unbuffered",
        f"--cpus-per-task={resources.cpus_per_task}",
    ]
    if frozen.rehearsal:
        srun += [f"--ntasks={frozen.processes}", "--ntasks-per-node=1"]
    if profile.srun.mpi:
        srun.append(f"--mpi={profile.srun.mpi}")
    srun += [*inside.srun, *profile.srun.extra]
    where = [str(run.path), spec.phase]
    worker = shlex.join([*WITHOUT_USR2, *inside.before, inside.python or python, "-m", "jobs.worker", *where])
    # No container has Slurm's commands: what stopped inside is requeued from outside.
    by_worker, by_script = ("", " --requeue") if inside.python else (" --requeue", "")
    restart = shlex.join([python, "-m", RESTART, *where])
    log = ""
    if frozen.batch > 1:
        log = (
            " --open-mode=append "
            f"--output={shlex.quote(str(run.logs_folder(spec.phase)))}/{run.log_path(spec.phase, number, '$1').name}"
        )
    later_life = "$SLURM_ARRAY_TASK_ID" if spec.links else "${SLURM_RESTART_COUNT:-0}"
    ended = "" if spec.links else "[ $code = 0 ] || "
    health = health_lines(profile, spec, number=number, python=python, log=log)
    if_healthy = "[ $code != 0 ] || " if health else ""
    lines = [
        *inside.exports,
        "run_element() {",
        f'    if [ "{later_life}" != 0 ]; then',
        f"        {restart} $1 --submission {number} || return $?",
        "    fi",
        "    local code=0",
        *health,
        f"    {if_healthy}{shlex.join(srun)}{log} {worker} $1 --submission {number}{by_worker} || code=$?",
        f"    {ended}{restart} $1 --submission {number} --code $code{by_script}",
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


def health_lines(profile: Profile, spec: JobSpec, number: int, python: str, log: str) -> list[str]:
    """Return what asks each node of an element for its health and sets `code`; [] where the profile asks nothing.

    `log` are srun's options for the element's own log. The first line begins a life in that log, as a worker's does.
    """
    health, resources = profile.hooks.health, spec.planned.resources
    if health == Health():
        return []
    asked = ["--limit-s", str(health.limit_s)]
    asked += ["--gpus", str(resources.gpus_per_node)] if health.gpus and resources.gpus_per_node else []
    has_gpus = resources.gpus_per_node > 0
    asked += ["--ecc"] if health.ecc and has_gpus else []
    asked += ["--min-clock-mhz", str(health.min_clock_mhz)] if health.min_clock_mhz is not None and has_gpus else []
    asked += ["--all-reduce"] if health.all_reduce and has_gpus else []
    for command in health.commands:
        asked += ["--command", command]
    if len(asked) == 2:  # only the limit: the role has no GPUs, and nothing else is asked
        return []
    srun = ["srun", "--export=ALL", "--unbuffered", f"--nodes={resources.nodes}", f"--ntasks={resources.nodes}",
            "--ntasks-per-node=1", f"--cpus-per-task={resources.cpus_per_task}"]  # fmt: skip
    to_log = f" >> {log.rpartition('--output=')[2]}" if log else ""
    return [
        f'    echo "{spec.phase}[$1] attempt {number} asks its nodes for their health"{to_log}',
        f"    {shlex.join(srun)}{log} {shlex.join([python, '-m', 'jobs.health', *asked])} || code=$?",
    ]


def script_changes(sent: str, now: str) -> str:
    """Say in which options two scripts differ, "time 5 → 33", or that they do so elsewhere; "" where they do not."""
    sent = sent.replace(f" -m {RESTART_BEFORE} ", f" -m {RESTART} ")
    if sent == now:
        return ""
    return ", ".join(option_changes(sent, now)) or "another script"


def option_changes(sent: str, now: str, but: Collection[str] = ()) -> list[str]:
    """Return in which options of sbatch two scripts differ, "time 5 → 33", those in `but` left out."""
    options = [dict(re.findall(r"^#SBATCH --([^=\n]+)=?(.*)$", text, re.MULTILINE)) for text in (sent, now)]
    return [
        f"{name} {options[0].get(name, 'none')} → {options[1].get(name, 'none')}"
        for name in sorted(options[0].keys() | options[1].keys())
        if options[0].get(name) != options[1].get(name) and name not in but
    ]
