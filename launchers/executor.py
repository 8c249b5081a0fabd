"""Slurm behind the contract of launchers/backend.py: one sbatch a phase, built by submitit, sent by slurm.client.

`PhaseExecutor` is submitit's SlurmExecutor with another command (our worker under srun), chosen array indices and no
pickles. The script runs by hand too: `sbatch RUN/submissions/N/scripts/PHASE.sh`.
"""

import secrets
import shlex
import sys
from pathlib import Path
from typing import Any, Iterable

from submitit.slurm.slurm import SlurmExecutor, SlurmJob

from data_tools import durable
from jobs.run_folder import RunFolder
from launchers.backend import JobSpec, TaskState
from launchers.ledger import Ledger
from slurm.client import Slurm
from slurm.detect import Cluster
from slurm.profile import Profile

SIGNAL_BEFORE_END = "USR2@90"  # submitit's own default; the worker ignores USR2 until checkpoints on signal are built


def index_ranges(indices: Iterable[int]) -> str:
    """Slurm's spelling of array indices: 3,7-9."""
    parts: list[list[int]] = []
    for index in sorted(indices):
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


class PhaseExecutor(SlurmExecutor):
    """Builds a phase's script from submitit's parameters and sends it through the one Slurm client."""

    def __init__(self, folder: Path, script: Path, slurm: Slurm):
        super().__init__(folder)
        self.script, self.slurm = script, slurm

    def send(self, command: str) -> SlurmJob:
        return self._submit_command(command)

    def _submit_command(self, command: str) -> SlurmJob:
        durable.write_file(self.script, self._make_submission_file_text(command, ""))
        job_id = self.slurm.sbatch([str(self.script)])
        return SlurmJob(folder=self.folder, job_id=job_id, tasks=list(range(self._num_tasks())))


def script_setup(profile: Profile, code: Path, ranks: int) -> list[str]:
    """Shell lines before the command, run by the batch script outside any container."""
    low, high = profile.network.port_range
    lines = ["set -euo pipefail",
             # --export=NONE leaves a job no HOME and an unexported PATH; it speaks of sbatch, not of our srun.
             'export SLURM_EXPORT_ENV=ALL PATH HOME="${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}"']
    lines += [f"module load {shlex.quote(module)}" for module in profile.env.modules]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in profile.env.set.items()]
    lines += profile.env.setup
    lines += [f"export PYTHONPATH={shlex.quote(str(code))} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1"]
    if ranks > 1:
        # An address, not a name: node names need not resolve, and NodeAddr may itself be one.
        lines += [
            'node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "address=$(scontrol show node \"$node\" --oneliner | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')",
            "resolved=$(getent ahostsv4 \"${address:-$node}\" | awk 'NR == 1 {print $1}' || true)",
            'export MASTER_ADDR="${resolved:-${address:-$node}}"',
            f"export MASTER_PORT=$(({low} + SLURM_JOB_ID % {high - low + 1}))",
        ]
    return lines


def phase_parameters(profile: Profile, run: RunFolder, number: int, spec: JobSpec, job_ids: dict[str, str],
                     token: str) -> dict[str, Any]:
    """Everything submitit turns into #SBATCH lines for one phase: a pure function, tested by a golden file."""
    resources, frozen = spec.planned.resources, spec.planned.frozen
    log = run.log_path(spec.phase, number, 0)
    extra: dict[str, Any] = {key: value or True for key, value in resources.extra_sbatch.items()}  # "" is a bare flag
    extra |= {
        "output": str(log.with_name(f"a{number}.%a.out") if spec.is_array else log),
        "export": ",".join(profile.env.forward) or "NONE",
        "kill-on-invalid-dep": "yes",
        "signal": SIGNAL_BEFORE_END,
        "chdir": str(run.path),
    }
    if spec.is_array:
        extra["array"] = index_ranges(spec.elements)
    if spec.needs:
        extra["dependency"] = ",".join(f"{type_}:{job_ids[phase]}" for phase, type_ in spec.needs.items())
    return {
        "job_name": f"{run.name}.{spec.phase}.a{number}.{token}",
        "partition": resources.partition, "account": resources.account, "qos": resources.qos,
        "constraint": resources.constraint, "time": resources.time_minutes, "nodes": resources.nodes,
        "ntasks_per_node": resources.ranks_per_node, "cpus_per_task": resources.cpus_per_task,
        "gpus_per_node": resources.gpus_per_node or None,
        "mem": f"{int(resources.mem_gib * 1024)}M" if resources.mem_gib else None,
        "wckey": None, "stderr_to_stdout": True, "use_srun": False,
        "setup": script_setup(profile, run.submission_folder(number) / "code", frozen.ranks),
        "additional_parameters": extra,
    }


def phase_command(profile: Profile, run: RunFolder, number: int, spec: JobSpec) -> str:
    """The last line of the script: srun of our worker on all ranks of the element."""
    # Since 22.05 srun does not take --cpus-per-task over from sbatch.
    srun = ["srun", "--kill-on-bad-exit=1", "--export=ALL", "--unbuffered",
            f"--cpus-per-task={spec.planned.resources.cpus_per_task}"]
    if profile.srun.mpi:
        srun.append(f"--mpi={profile.srun.mpi}")
    python = profile.env.python or sys.executable
    worker = [python, "-m", "jobs.worker", str(run.path), spec.phase, "--submission", str(number)]
    return shlex.join([*srun, *profile.srun.extra, *worker])


class SlurmBackend:
    name = "slurm"

    def __init__(self, run: RunFolder, cluster: Cluster):
        self.run, self.cluster, self.slurm = run, cluster, Slurm(cluster.env)

    def submit(self, number: int, specs: list[JobSpec], waiting: dict[str, str]) -> None:
        ledger = Ledger(self.run.ledger)
        folder = self.run.submission_folder(number) / "scripts"
        folder.mkdir(parents=True, exist_ok=True)
        job_ids = dict(waiting)
        for spec in specs:
            (self.run.phase_folder(spec.phase) / "logs").mkdir(parents=True, exist_ok=True)
            executor = PhaseExecutor(folder, folder / f"{spec.phase}.sh", self.slurm)
            parameters = phase_parameters(self.cluster.profile, self.run, number, spec, job_ids, secrets.token_hex(4))
            executor.parameters = {key: value for key, value in parameters.items() if value is not None or key == "wckey"}
            job = executor.send(phase_command(self.cluster.profile, self.run, number, spec))
            job_ids[spec.phase] = job.job_id
            ledger.append("job", submission=number, phase=spec.phase, key=spec.planned.frozen.key, job=job.job_id,
                          elements=spec.elements, is_array=spec.is_array, needs=spec.needs,
                          name=parameters["job_name"])

    def states(self, jobs: list[str]) -> list[TaskState]:
        wanted = set(jobs)
        rows = [(row.array_job_id or row.job_id, row) for row in self.slurm.queue()]
        return [TaskState(job, row.array_index or 0, row.state, "" if row.reason == "None" else row.reason)
                for job, row in rows if job in wanted]

    def cancel(self, jobs: list[str]) -> None:
        self.slurm.cancel(jobs)
