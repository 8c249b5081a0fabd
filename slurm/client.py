"""The one place that runs Slurm's commands: scontrol, squeue, sacct, scancel, sinfo, sbatch.

Each command runs under a time limit of ours (a client whose controller is gone blocks for MessageTimeout, often
minutes), in an environment without SLURM_*, SBATCH_* and similar variables of an outer job or a user's dotfiles, which
would change what is asked or how it is printed. What they print is read in slurm/printed.py.
"""

import os
import pwd
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence

from data_tools.mistake import UserMistake
from slurm.printed import (
    ACCOUNTING_FIELDS,
    QUEUE_FIELDS,
    AccountingRow,
    PartitionRow,
    QueueRow,
    SubmitLimit,
    array_limit,
    controller_is_up,
    first_line,
    is_away,
    lost_connection,
    parse_accounting,
    parse_configuration,
    parse_job,
    parse_job_row,
    parse_keys,
    parse_partitions,
    parse_queue,
    parse_submit_limit,
    separator,
    submitted_id,
    whole_message,
)

PING_LIMIT_S = 5.0
PING_RETRY_S = 0.25
IDS_PER_COMMAND = 1000  # keeps a command line of 20-byte ids far below ARG_MAX and one Linux argument below 128 KiB

# An outer job's or a user's variables change the meaning of a command: SBATCH_OUTPUT beats the script's --output,
# SQUEUE_PARTITION filters the queue. Only where the cluster is may pass. These are the beginnings of names of Slurm's
# own (the section "input environment variables" of its commands' man pages, and what it gives to a job), ...
_OF_SLURM = (
    "SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SCONTROL_",
    "SSTAT_", "SPRIO_", "SREPORT_", "SSHARE_", "SDIAG_", "SBCAST_", "SPANK_", "_SLURM_",
)  # fmt: skip
# ... of launchers of ranks (PMI-1, PMI-2 and PMIx; Open MPI, MPICH's Hydra, Intel MPI, Cray's PALS), ...
_OF_RANKS = ("PMI_", "PMI2_", "PMIX_", "OMPI_COMM_WORLD_", "OMPI_UNIVERSE_", "MPI_LOCAL", "HYDI_", "PALS_")
# ... of torchrun, and of our own ranks: whoever has these takes himself for a rank of the outer job.
_OF_TORCHRUN = ("TORCHELASTIC_",)
_RANK_NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "AFTEROK_RANK", "AFTEROK_SPAWN", "AFTEROK_MEETING",
)  # fmt: skip
# The GPUs of the outer job, by their numbers on its node: CUDA, Slurm's own name, AMD's two, Intel's.
_DEVICES = (
    "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK",
)  # fmt: skip
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER")
OUTER_PREFIXES = (*_OF_SLURM, *_OF_RANKS, *_OF_TORCHRUN)
OUTER_NAMES = (*_RANK_NAMES, *_DEVICES)

ASK_AGAIN_S = 2.0
ACCOUNTING_LIMIT_S = 5.0
REQUEUE_PATIENCE_S = 45.0  # half of the default signal lead: the other half is Slurm's, to end the job


class SlurmError(Exception):
    """A Slurm command failed: which, with which code (None: it never ended or never started) and what it said.

    `is_silence`: nobody answered, so that what was asked for may have happened all the same. A command that ended by
    itself with its own words has answered, whatever they are.
    """

    def __init__(
        self, command: Sequence[str], returncode: int | None, message: str, stderr: str = "", is_silence: bool = False
    ):
        self.command = list(command)
        self.returncode = returncode
        self.message = message
        self.stderr = stderr
        self.is_silence = is_silence
        code = "" if returncode is None else f" (exit code {returncode})"
        super().__init__(f"`{_shown(self.command)}` failed{code}: {message}")


class SlurmTimeout(SlurmError):
    """The command was killed at our limit. What it asked for may have happened all the same (an sbatch, a scancel)."""

    def __init__(self, command: Sequence[str], limit_s: float):
        super().__init__(command, None, f"no answer within {limit_s:g} s", is_silence=True)


class SlurmUnavailable(UserMistake):
    """A configured Slurm does not answer."""


def scrubbed_environment(env: Mapping[str, str], same_place: bool = False) -> dict[str, str]:
    """Return `env` without what an outer job or a dotfile would tell Slurm's commands and another job's processes.

    Where the cluster is stays; for processes of this same place (`same_place`) its GPUs do too.
    """
    left_out = _RANK_NAMES if same_place else OUTER_NAMES
    return {
        name: value
        for name, value in env.items()
        if name in _KEPT or not (name.startswith(OUTER_PREFIXES) or name in left_out)
    }


def configuration_of(env: Mapping[str, str]) -> str:
    """Return how Slurm's commands find their cluster under `env`, for messages."""
    for key in _KEPT:
        if env.get(key):
            return f"{key}={env[key]}"
    return "SLURM_CONF is not set"


class Slurm:
    """Slurm's commands, asked in `env` (default: this process's), each killed after `timeout_s` seconds.

    Every failure is a SlurmError; `ping` raises SlurmUnavailable.
    """

    def __init__(self, env: Mapping[str, str] | None = None, timeout_s: float = 30.0):
        self.env = scrubbed_environment(os.environ if env is None else env)
        self.timeout_s = timeout_s

    def run(self, command: Sequence[str], timeout_s: float | None = None) -> str:
        """Run one of Slurm's commands; return its standard output. Raises SlurmError or SlurmTimeout where it fails or
        is late.
        """
        return self._output(command, timeout_s)[0]

    def _output(self, command: Sequence[str], timeout_s: float | None, text: str | None = None) -> tuple[str, str]:
        """Return standard output and error of a command that reads `text` (None: nothing); raise what `run` does."""
        limit = self.timeout_s if timeout_s is None else timeout_s
        env = dict(self.env)
        if command[0] == "squeue":
            env["SLURM_BITSTR_LEN"] = "0"  # print lists of array indices in full, not cut with "..."
        try:
            process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL if text is None else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise SlurmError(command, None, f"{command[0]}: {error.strerror} (are Slurm's commands in PATH?)") from None
        try:
            out, err = process.communicate(text, timeout=limit)
        except subprocess.TimeoutExpired:
            raise SlurmTimeout(command, limit) from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        code = process.returncode
        if code != 0:
            message = whole_message(command[0], err, out) or "it said nothing"
            silent = _ended_by_signal(code) or lost_connection(command[0], err)
            raise SlurmError(command, code, message=message, stderr=err, is_silence=silent)
        return out, err

    def patiently(self, command: Sequence[str], patience_s: float) -> str:
        """Run a command again and again for a while where nobody answers: for commands that may be given twice."""
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return self.run(command)
            except SlurmError as error:
                if not error.is_silence or time.monotonic() + ASK_AGAIN_S > deadline:
                    raise
                time.sleep(ASK_AGAIN_S)

    def ping(self, timeout_s: float = PING_LIMIT_S) -> None:
        """Return when a controller answers; a restart or a fail-over shorter than the limit goes unnoticed.

        Raises SlurmUnavailable after `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                answer = self.run(["scontrol", "ping"], max(deadline - time.monotonic(), 0.1))
                if controller_is_up(answer):
                    return
                problem = first_line(answer)
            except SlurmTimeout:
                problem = "it hangs"
            except SlurmError as error:
                problem = error.message
                if error.returncode is None:  # not installed: no use in asking again
                    break
            if time.monotonic() + PING_RETRY_S > deadline:
                break
            time.sleep(PING_RETRY_S)
        raise SlurmUnavailable(
            f"Slurm does not answer: `scontrol ping` within {timeout_s:g} s, {configuration_of(self.env)}: {problem}; "
            "ask the cluster's admin whether slurmctld runs, or say cluster=local to run on this machine"
        )

    def queue(self, each_element: bool = True) -> list[QueueRow]:
        """Return every job of this user that the controller remembers, in all states, one row an array element.

        Without `each_element` those that wait are one row together, which tells of them in `waiting`.

        Not by `squeue --array`, which loses the last element of an array it prints with a step ("0-396:4", 22.05.8).
        """
        between = separator()
        fields = "".join(field + between for field in QUEUE_FIELDS)
        command = ["squeue", "--noheader", "--states=all", f"--user={os.geteuid()}", f"--format={fields}"]
        return parse_queue(self.run(command), between, each_element)

    def cancel(self, ids: Iterable[str | int]) -> None:
        """Cancel jobs, arrays ("12") or elements ("12_3"); those already ended or forgotten are no error."""
        for some in _chunks(ids):
            self.run(["scancel", "--quiet", *some])

    def cancel_all(self) -> None:
        """Cancel every job of every user, as far as this one may: the end of a cluster."""
        for state in ("PENDING", "RUNNING", "SUSPENDED"):
            self.run(["scancel", "--quiet", f"--state={state}"])

    def active_job_ids(self) -> list[str]:
        """Return the raw ids of the jobs of all users that hold nodes, those still being cleaned up included."""
        states = "RUNNING,COMPLETING,CONFIGURING,SUSPENDED"
        return self.run(["squeue", "--noheader", "--all", f"--states={states}", "--format=%A"]).split()

    def accounting(self, ids: Iterable[str | int]) -> list[AccountingRow] | None:
        """Return what slurmdbd recorded of these jobs, steps left out; None when the cluster keeps no accounting."""
        rows: list[AccountingRow] = []
        between, fields = separator(), ",".join(ACCOUNTING_FIELDS)
        for some in _chunks(ids):
            command = ["sacct", "--allocations", "--noheader", "--parsable", f"--delimiter={between}"]
            try:
                printed = self.run([*command, f"--format={fields}", f"--jobs={','.join(some)}"])
                rows += parse_accounting(printed, between)
            except SlurmError as error:
                if "accounting storage is disabled" in error.message:
                    return None
                raise
        return rows

    def job_row(self, job_id: str) -> AccountingRow | None:
        """Return what the controller still remembers of one job or array element ("12_3"), in accounting's terms; None
        when it has forgotten it.
        """
        try:
            return parse_job_row(self.run(["scontrol", "show", "job", job_id, "--oneliner"]))
        except SlurmError as error:
            if "Invalid job id" in error.message or "not found" in error.message:  # the latter of an array's element
                return None
            raise

    def down_nodes(self, nodelist: str) -> list[str]:
        """Return those of these nodes ("n[1-4]") that are down, drained, failed or do not answer."""
        states = self.node_states(f"--nodes={nodelist}")
        return [name for name, state in states.items() if is_away(state)]

    def usable_nodes(self, partition: str) -> set[str]:
        """Return the nodes of a partition that are not away."""
        states = self.node_states(f"--partition={partition}")
        return {name for name, state in states.items() if not is_away(state)}

    def partitions(self) -> list[PartitionRow]:
        """Return the partitions this user may see."""
        return parse_partitions(self.run(["sinfo", "--noheader", "--exact", "--format=%P|%a|%l|%s|%D|%c|%m|%G"]))

    def node_states(self, *which: str) -> dict[str, str]:
        """Return each node's state as sinfo prints it: "idle", "mixed", "down*" (the star: it does not answer).

        `which` are options of sinfo's that choose nodes. One of several partitions is printed once for each.
        """
        printed = self.run(["sinfo", "--noheader", "--Node", *which, "--format=%N %T"])
        return dict(line.split() for line in printed.splitlines())

    def submit_limit(self, qos: Iterable[str]) -> SubmitLimit | None:
        """Return the least limit on this user's jobs in the queue, of the account or of these QOS ("" is the default
        one).

        None where there is none, or where the cluster keeps no accounting or it does not answer.
        """
        user = pwd.getpwuid(os.geteuid()).pw_name
        ask = ["sacctmgr", "--noheader", "--parsable2", "show"]
        try:
            of_user = ["assoc", "where", f"user={user}", "format=Account,DefaultQOS,MaxSubmit"]
            accounts = self.run([*ask, *of_user], ACCOUNTING_LIMIT_S)
            quality = self.run([*ask, "qos", "format=Name,MaxSubmitPU"], ACCOUNTING_LIMIT_S)
        except SlurmError:
            return None
        return parse_submit_limit(accounts, quality, set(qos))

    def preempt_mode(self, partition: str) -> str:
        """Return what becomes of a partition's jobs when they are preempted: "REQUEUE", "CANCEL", "SUSPEND", "OFF"."""
        return parse_keys(self.run(["scontrol", "show", "partition", partition, "--oneliner"])).get("PreemptMode", "")

    def configuration(self) -> dict[str, str]:
        """Return the controller's running slurm.conf, keys as `scontrol show config` spells them."""
        return parse_configuration(self.run(["scontrol", "show", "config"]))

    def max_array_size(self) -> int:
        """Return how many elements an array may have, indices from 0 (its highest index is one less)."""
        return array_limit(self.configuration())

    def node_address(self, node: str) -> str:
        """Return the address of a node, which need not be its name (and whose name need not resolve)."""
        command = ["scontrol", "show", "node", node, "--oneliner"]
        printed = self.run(command)
        if address := parse_keys(printed).get("NodeAddr"):
            return address
        raise SlurmError(command, 0, f"no NodeAddr in {first_line(printed)!r}")

    def job(self, element: str, patience_s: float = 0.0) -> dict[str, str]:
        """Return what the controller says of one job ("12") or array element ("12_3"), keys as `scontrol show job`
        spells.
        """
        return parse_job(self.patiently(["scontrol", "show", "job", element, "--oneliner"], patience_s))

    def requeue(self, element: str, exclude: str = "", patience_s: float = REQUEUE_PATIENCE_S) -> None:
        """Run a job or array element again under its id, not on the nodes `exclude`; asked again while nobody answers.

        The bare id of an array means all of its elements. A job that requeues itself hears SIGTERM in here.
        """
        self.patiently(["scontrol", "requeue", element], patience_s)
        if exclude:  # only now: Slurm changes it of waiting jobs alone
            self.exclude(element, exclude)

    def exclude(self, element: str, nodes: str) -> None:
        """Let a waiting job, or waiting elements ("12_[3-7]"), start on none of these nodes."""
        self.run(["scontrol", "update", f"jobid={element}", f"excnodelist={nodes}"])

    def sbatch(self, arguments: Sequence[str]) -> str:
        """Submit a job; return its id. An error that `is_silence` leaves open whether it exists: look for its name."""
        command = ["sbatch", "--parsable", *arguments]
        printed = self.run(command)
        job = submitted_id(printed)
        if job is None:
            said = whole_message("sbatch", printed, "") or "nothing"
            raise SlurmError(command, 0, f"no line of what it printed is a job's id: {said}", is_silence=True)
        return job

    def predicted_start(self, script: str) -> str:
        """Return when a batch script would start if it were sent now, "2026-11-30T04:20:00"; "" where Slurm is silent.

        `sbatch --test-only` submits nothing. It is no check: it finds fine what never starts (seen with 22.05).
        """
        start = re.search(r"to start at (\S+)", self._output(["sbatch", "--test-only"], None, script)[1])
        return start[1] if start else ""

    def expected_start(self, job: str) -> str:
        """Return when the backfill scheduler expects a waiting job to start; "" where it does not say."""
        printed = self.run(["squeue", "--start", "--noheader", f"--jobs={job}", "--format=%S"]).split()
        return min((moment for moment in printed if moment != "N/A"), default="")


def job_element(env: Mapping[str, str]) -> str:
    """Return this job's name for scontrol and scancel: "12", or "12_3", for an array's last element has the array's own
    id.
    """
    if "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID", "")


def _ended_by_signal(code: int) -> bool:
    """Return whether a command was killed, by what itself or a shell around it tells (128 and the signal)."""
    return code < 0 or 128 < code <= 192


def _shown(command: Sequence[str], longest: int = 120) -> str:
    text = " ".join("--format=…" if word.startswith("--format=%") else word for word in command)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _chunks(ids: Iterable[str | int]) -> list[list[str]]:
    every = [str(number) for number in ids]
    return [every[start : start + IDS_PER_COMMAND] for start in range(0, len(every), IDS_PER_COMMAND)]
