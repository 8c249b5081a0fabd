"""The one place that runs Slurm's commands: scontrol, squeue, sacct, scancel, sinfo, sbatch.

Each command runs under a time limit of ours (a client whose controller is gone blocks for MessageTimeout, often
minutes), in an environment without SLURM_*, SBATCH_* and similar variables of an outer job or a user's dotfiles, which
would change what is asked or how it is printed. The parsers are pure functions of the printed text.

Formats: `man squeue`, `sinfo`, `sacct`, `scontrol`, of Slurm 22.05; array and time notations as in `man sbatch`.
"""

import os
import pwd
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from data_tools.mistake import UserMistake

PING_LIMIT_S = 5.0
PING_RETRY_S = 0.25
IDS_PER_COMMAND = 1000  # keeps a command line of 20-byte ids far below ARG_MAX and one Linux argument below 128 KiB
SEPARATOR = "\x1f"  # the one character no job name or reason contains

# States that a job leaves only by a requeue (man squeue, JOB STATE CODES); a requeue sets it to PENDING.
ENDED_STATES = frozenset((
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
))  # fmt: skip

# An outer job's or a user's variables change the meaning of a command: SBATCH_OUTPUT beats the script's --output,
# SQUEUE_PARTITION filters the queue. Only where the cluster is may pass.
_SCRUBBED = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_")
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER")

# What sbatch and scontrol say when the controller may have taken the call although the client saw it fail.
_SILENCE = re.compile(
    r"timed out|timeout|unable to contact|connection refused|connection reset|zero bytes|socket|communication|slurm_persist"
    r"|try again",
    re.IGNORECASE,
)
ASK_AGAIN_S = 2.0
ACCOUNTING_LIMIT_S = 5.0
REQUEUE_PATIENCE_S = 45.0  # half of the default signal lead: the other half is Slurm's, to end the job


class SlurmError(Exception):
    """A Slurm command failed: which, with which code (None: it never ended or never started) and what it said."""

    def __init__(self, command: Sequence[str], returncode: int | None, message: str, stderr: str = ""):
        self.command = list(command)
        self.returncode = returncode
        self.message = message
        self.stderr = stderr
        code = "" if returncode is None else f" (exit code {returncode})"
        super().__init__(f"`{_shown(self.command)}` failed{code}: {message}")

    @property
    def is_silence(self) -> bool:
        """Nobody answered: what was asked for may have happened all the same."""
        return _SILENCE.search(self.message) is not None


class SlurmTimeout(SlurmError):
    """The command was killed at our limit. What it asked for may have happened all the same (an sbatch, a scancel)."""

    is_silence = True


class SlurmUnavailable(UserMistake):
    """A configured Slurm does not answer."""


@dataclass(frozen=True)
class QueueRow:
    """One job, or one element of an array.

    `job_id` is Slurm's raw id; elements that wait share their array's id until Slurm splits them off.
    """

    job_id: str
    array_job_id: str | None
    array_index: int | None
    name: str
    state: str  # Slurm's word: PENDING, RUNNING, COMPLETED, ...
    reason: str
    dependency: str  # as Slurm prints it, "" when there is none (left)
    nodelist: str


@dataclass(frozen=True)
class AccountingRow:
    """One job or array element as slurmdbd has it (sacct lags by seconds: absence does not mean unknown).

    Of a script's exit code of 128 and above sacct 22.05 prints what is above 128: a killed srun's 137 comes as 9.
    """

    job_id: str  # "12", "12_3"; waiting elements may come as "12_[4-9]"
    raw_id: str
    name: str
    state: str  # first word: "CANCELLED by 1000" is CANCELLED
    exit_code: int
    exit_signal: int
    elapsed_s: int
    nodelist: str


@dataclass(frozen=True)
class PartitionRow:
    """A partition as sinfo sees it; per-node figures are those of its largest nodes, None means unlimited."""

    name: str
    default: bool
    max_time_minutes: int | None
    nodes: int
    max_nodes: int | None
    cpus_per_node: int
    gpus_per_node: int
    mem_mib_per_node: int
    state: str


@dataclass(frozen=True)
class SubmitLimit:
    """How many jobs a user may have in the queue, array elements counted one by one, and who says so."""

    jobs: int
    of: str  # "QOS small (MaxSubmitJobsPerUser)"


def scrubbed_environment(env: Mapping[str, str]) -> dict[str, str]:
    """`env` without what an outer job or a dotfile would tell Slurm's commands; where the cluster is stays."""
    return {key: value for key, value in env.items() if key in _KEPT or not key.startswith(_SCRUBBED)}


def configuration_of(env: Mapping[str, str]) -> str:
    """How Slurm's commands find their cluster under `env`, for messages."""
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
        """Standard output of one of Slurm's commands that succeeded in time. Raises SlurmError, SlurmTimeout."""
        limit = self.timeout_s if timeout_s is None else timeout_s
        env = dict(self.env)
        if command[0] == "squeue":
            env["SLURM_BITSTR_LEN"] = "0"  # print lists of array indices in full, not cut with "..."
        try:
            process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise SlurmError(command, None, f"{command[0]}: {error.strerror} (are Slurm's commands in PATH?)") from None
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            raise SlurmTimeout(command, None, f"no answer within {limit:g} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        if process.returncode != 0:
            message = _first_line(err) or _first_line(out) or "it said nothing"
            raise SlurmError(command, process.returncode, message, err)
        return out

    def patiently(self, command: Sequence[str], patience_s: float) -> str:
        """`run`, again and again for a while where nobody answers: for commands that may be given twice."""
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
                problem = _first_line(answer)
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

    def queue(self) -> list[QueueRow]:
        """Every job of this user that the controller remembers, in all states, one row an array element.

        Not by `squeue --array`, which loses the last element of an array it prints with a step ("0-396:4", 22.05.8).
        """
        fields = SEPARATOR.join(("%A", "%F", "%K", "%T", "%r", "%E", "%N", "%j"))
        command = ["squeue", "--noheader", "--states=all", f"--user={os.geteuid()}", f"--format={fields}"]
        return parse_queue(self.run(command))

    def cancel(self, ids: Iterable[str | int]) -> None:
        """Cancel jobs, arrays ("12") or elements ("12_3"); those already ended or forgotten are no error."""
        for some in _chunks(ids):
            self.run(["scancel", "--quiet", *some])

    def cancel_all(self) -> None:
        """Cancel every job of every user, as far as this one may: the end of a cluster."""
        for state in ("PENDING", "RUNNING", "SUSPENDED"):
            self.run(["scancel", "--quiet", f"--state={state}"])

    def active_job_ids(self) -> list[str]:
        """Raw ids of the jobs of all users that hold nodes, those still being cleaned up included."""
        states = "RUNNING,COMPLETING,CONFIGURING,SUSPENDED"
        return self.run(["squeue", "--noheader", "--all", f"--states={states}", "--format=%A"]).split()

    def accounting(self, ids: Iterable[str | int]) -> list[AccountingRow] | None:
        """What slurmdbd recorded of these jobs, steps left out; None when the cluster keeps no accounting."""
        rows: list[AccountingRow] = []
        fields = "JobID,JobIDRaw,State,ExitCode,ElapsedRaw,NodeList,JobName"
        for some in _chunks(ids):
            command = ["sacct", "--allocations", "--noheader", "--parsable2", f"--format={fields}"]
            try:
                rows += parse_accounting(self.run([*command, f"--jobs={','.join(some)}"]))
            except SlurmError as error:
                if "accounting storage is disabled" in error.message:
                    return None
                raise
        return rows

    def job_row(self, job_id: str) -> AccountingRow | None:
        """What the controller still remembers of one job or array element ("12_3"), in accounting's terms; None when
        it has forgotten it."""
        try:
            return parse_job_row(self.run(["scontrol", "show", "job", job_id, "--oneliner"]))
        except SlurmError as error:
            if "Invalid job id" in error.message or "not found" in error.message:  # the latter of an array's element
                return None
            raise

    def down_nodes(self, nodelist: str) -> list[str]:
        """Those of these nodes ("n[1-4]") that are down, drained, failed or do not answer."""
        states = self.node_states(f"--nodes={nodelist}")
        return [name for name, state in states.items() if is_away(state)]

    def usable_nodes(self, partition: str) -> set[str]:
        """The nodes of a partition that are not away."""
        states = self.node_states(f"--partition={partition}")
        return {name for name, state in states.items() if not is_away(state)}

    def partitions(self) -> list[PartitionRow]:
        """The partitions this user may see."""
        return parse_partitions(self.run(["sinfo", "--noheader", "--exact", "--format=%P|%a|%l|%s|%D|%c|%m|%G"]))

    def node_states(self, *which: str) -> dict[str, str]:
        """Each node's state as sinfo prints it: "idle", "mixed", "down*" (the star: it does not answer).

        `which` are options of sinfo's that choose nodes. One of several partitions is printed once for each.
        """
        printed = self.run(["sinfo", "--noheader", "--Node", *which, "--format=%N %T"])
        return dict(line.split() for line in printed.splitlines())

    def submit_limit(self, qos: Iterable[str]) -> SubmitLimit | None:
        """The least limit on this user's jobs in the queue, of the account or of these QOS ("" is the default one).

        None where there is none, or where the cluster keeps no accounting or it does not answer.
        """
        user = pwd.getpwuid(os.geteuid()).pw_name
        ask = ["sacctmgr", "--noheader", "--parsable2", "show"]
        try:
            accounts = self.run([*ask, "assoc", "where", f"user={user}", "format=Account,DefaultQOS,MaxSubmit"], ACCOUNTING_LIMIT_S)
            quality = self.run([*ask, "qos", "format=Name,MaxSubmitPU"], ACCOUNTING_LIMIT_S)
        except SlurmError:
            return None
        return parse_submit_limit(accounts, quality, set(qos))

    def preempt_mode(self, partition: str) -> str:
        """What becomes of a partition's jobs when they are preempted: "REQUEUE", "CANCEL", "SUSPEND", "OFF"."""
        return parse_job(self.run(["scontrol", "show", "partition", partition, "--oneliner"])).get("PreemptMode", "")

    def configuration(self) -> dict[str, str]:
        """The controller's running slurm.conf, keys as `scontrol show config` spells them."""
        return parse_configuration(self.run(["scontrol", "show", "config"]))

    def max_array_size(self) -> int:
        """How many elements an array may have, indices from 0 (its highest index is one less)."""
        return array_limit(self.configuration())

    def node_address(self, node: str) -> str:
        """The address of a node, which need not be its name (and whose name need not resolve)."""
        return parse_node_address(self.run(["scontrol", "show", "node", node, "--oneliner"]), node)

    def job(self, element: str, patience_s: float = 0.0) -> dict[str, str]:
        """What the controller says of one job ("12") or array element ("12_3"), keys as `scontrol show job` spells."""
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
        """Submit; gives the new job's id. SlurmTimeout leaves open whether the job exists: look for its name."""
        printed = self.run(["sbatch", "--parsable", *arguments])
        return printed.strip().splitlines()[-1].split(";")[0]  # "12" or, with several clusters, "12;name"


def is_away(node_state: str) -> bool:
    """Whether a node in that state, as sinfo prints it, is down, drained, failed or does not answer."""
    return node_state.endswith("*") or node_state.startswith(("down", "drain", "fail"))


def controller_is_up(printed: str) -> bool:
    """Whether any controller, primary or backup, answered `scontrol ping`."""
    return any(line.rstrip().endswith(" UP") for line in printed.splitlines())


def parse_queue(printed: str) -> list[QueueRow]:
    """Rows of `squeue` with the fields %A %F %K %T %r %E %N %j; waiting elements come in one line and become many."""
    rows = []
    for line in printed.split("\n"):
        if not line:
            continue
        job_id, array_id, index, state, reason, dependency, nodelist, name = line.split(SEPARATOR, 7)
        indices = parse_indices(index) if index[:1].isdigit() else [None]
        rows += [
            QueueRow(
                job_id=job_id,
                array_job_id=None if element is None else array_id,
                array_index=element,
                name=name,
                state=state,
                reason=_absent(reason),
                dependency=_absent(dependency),
                nodelist=_absent(nodelist),
            )
            for element in indices
        ]
    return rows


def parse_indices(text: str) -> list[int]:
    """The indices of an array: "0-2,7%4" (the last part is its throttle) is [0, 1, 2, 7], "0-8:4" is [0, 4, 8].

    Raises ValueError for a list that Slurm cut short with "...".
    """
    indices: list[int] = []
    for part in text.partition("%")[0].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        indices += range(int(first), int(last or first) + 1, int(step or 1))
    return indices


def format_indices(indices: Iterable[int], most: int | None = None) -> str:
    """Array indices as Slurm spells them, "3,7-9"; for people at most `most` ranges, then "…"."""
    ranges: list[list[int]] = []
    for index in sorted(indices):
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    return ",".join(texts[:most]) + (",…" if most is not None and len(texts) > most else "")


def parse_accounting(printed: str) -> list[AccountingRow]:
    """Rows of `sacct -X -P` with the fields JobID, JobIDRaw, State, ExitCode, ElapsedRaw, NodeList, JobName."""
    rows = []
    for line in printed.splitlines():
        job_id, raw_id, state, exit_code, elapsed, nodelist, name = line.split("|", 6)
        code, _, number = exit_code.partition(":")
        rows.append(
            AccountingRow(
                job_id=job_id,
                raw_id=raw_id,
                name=name,
                state=state.split()[0],
                exit_code=int(code or 0),
                exit_signal=int(number or 0),
                elapsed_s=int(elapsed or 0),
                nodelist="" if nodelist == "None assigned" else nodelist,
            )
        )
    return rows


def parse_job_row(printed: str) -> AccountingRow:
    """One job of `scontrol show job --oneliner`."""
    keys = parse_job(printed.splitlines()[0])
    code, _, number = keys.get("ExitCode", "0:0").partition(":")
    array = "ArrayTaskId" in keys
    return AccountingRow(
        job_id=f"{keys['ArrayJobId']}_{keys['ArrayTaskId']}" if array else keys["JobId"],
        raw_id=keys["JobId"],
        name=keys["JobName"],
        state=keys["JobState"],
        exit_code=int(code),
        exit_signal=int(number),
        elapsed_s=parse_seconds(keys.get("RunTime", "0")),
        nodelist=_absent(keys.get("NodeList", "")),
    )


def parse_submit_limit(accounts: str, quality: str, qos: set[str]) -> SubmitLimit | None:
    """From `sacctmgr show assoc` (Account, DefaultQOS, MaxSubmit) and `show qos` (Name, MaxSubmitPU), both parsable."""
    found, default = [], "normal"
    for line in accounts.splitlines():
        account, named, most = line.split("|")
        default = named or default
        if most:
            found.append(SubmitLimit(int(most), f"account {account} (MaxSubmitJobs)"))
    wanted = {name or default for name in qos}
    for line in quality.splitlines():
        name, most = line.split("|")
        if name in wanted and most:
            found.append(SubmitLimit(int(most), f"QOS {name} (MaxSubmitJobsPerUser)"))
    return min(found, key=lambda limit: limit.jobs, default=None)


def parse_seconds(text: str) -> int:
    """Seconds of an elapsed time as Slurm prints it: "00:01:30", "2-00:00:00"."""
    days, _, rest = text.rpartition("-")
    seconds = 0
    for part in rest.split(":"):
        seconds = seconds * 60 + int(part)
    return int(days or 0) * 86400 + seconds


def parse_partitions(printed: str) -> list[PartitionRow]:
    """Rows of `sinfo --exact` with the fields %P %a %l %s %D %c %m %G; unlike nodes of a partition share its row."""
    found: dict[str, PartitionRow] = {}
    for line in printed.splitlines():
        name, state, limit, sizes, nodes, cpus, memory, gres = line.split("|", 7)
        row = PartitionRow(
            name=name.rstrip("*"),
            default=name.endswith("*"),
            max_time_minutes=None if limit in ("infinite", "n/a") else parse_minutes(limit),
            nodes=int(nodes),
            max_nodes=_number_or_none(sizes.rpartition("-")[2]),
            cpus_per_node=int(cpus.rstrip("+")),
            gpus_per_node=gpus_in_gres(gres),
            mem_mib_per_node=int(memory.rstrip("+")),
            state=state,
        )
        before = found.get(row.name)
        if before:
            row = PartitionRow(
                name=row.name,
                default=row.default,
                max_time_minutes=row.max_time_minutes,
                nodes=before.nodes + row.nodes,
                max_nodes=row.max_nodes,
                cpus_per_node=max(before.cpus_per_node, row.cpus_per_node),
                gpus_per_node=max(before.gpus_per_node, row.gpus_per_node),
                mem_mib_per_node=max(before.mem_mib_per_node, row.mem_mib_per_node),
                state=row.state,
            )
        found[row.name] = row
    return list(found.values())


def gpus_in_gres(gres: str) -> int:
    """GPUs of a node: "gpu:8", "gpu:h100:8(S:0-1),nvme:2" and "gpu:a100:4,gpu:v100:4" have 8, "(null)" has none."""
    # sockets in parentheses hold commas too, so they go before the split
    items = re.sub(r"\([^)]*\)", "", gres).split(",")
    return sum(int(item.split(":")[-1]) if item[-1:].isdigit() else 1 for item in items if item.split(":")[0] == "gpu")


def parse_configuration(printed: str) -> dict[str, str]:
    """Keys and values of `scontrol show config`."""
    pairs = (line.partition(" = ") for line in printed.splitlines() if " = " in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def array_limit(configuration: Mapping[str, str]) -> int:
    """Elements an array may have: MaxArraySize, or the scheduler's max_array_tasks where an admin set it lower."""
    limit = int(configuration.get("MaxArraySize", 1001))  # Slurm's default
    tasks = re.search(r"\bmax_array_tasks=(\d+)", configuration.get("SchedulerParameters", ""))
    return min(limit, int(tasks[1])) if tasks else limit


def parse_job(printed: str) -> dict[str, str]:
    """Keys and values of one line of `scontrol show job`; of a value with blanks (names, paths) the first word."""
    return dict(re.findall(r"(?:^|\s)([A-Za-z][\w/:]*)=(\S*)", printed))


def job_element(env: Mapping[str, str]) -> str:
    """This job as scontrol and scancel name it: "12", or "12_3", for an array's last element has the array's own id."""
    if "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID", "")


def parse_node_address(printed: str, node: str) -> str:
    """NodeAddr of `scontrol show node`."""
    found = re.search(r"\bNodeAddr=(\S+)", printed)
    if not found:
        raise SlurmError(["scontrol", "show", "node", node], 0, f"no NodeAddr in {_first_line(printed)!r}")
    return found[1]


def parse_minutes(text: str) -> int:
    """Minutes of a Slurm time limit, rounded up: "30", "30:15", "1:30:00", "2-12", "2-12:30", "2-12:30:00".

    Raises ValueError with the value.
    """
    days, dash, rest = text.strip().rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in parts) or (dash and not days.isdigit()) or len(parts) > 3:
        raise ValueError(f"{text!r} is no Slurm time; write minutes, HH:MM:SS or D-HH:MM:SS, such as 30 or 2-00:00:00")
    numbers = [int(part) for part in parts]
    if dash:  # D-HH[:MM[:SS]]
        hours, minutes, seconds = (numbers + [0, 0])[:3]
    elif len(numbers) == 3:  # HH:MM:SS
        hours, minutes, seconds = numbers
    else:  # MM[:SS]
        hours, (minutes, seconds) = 0, (numbers + [0])[:2]
    return int(days or 0) * 1440 + hours * 60 + minutes + -(-seconds // 60)


def format_minutes(minutes: int) -> str:
    """Minutes in the form Slurm prints: 90 is "1:30:00", 2880 is "2-00:00:00"."""
    days, rest = divmod(minutes, 1440)
    return f"{days}-{rest // 60:02d}:{rest % 60:02d}:00" if days else f"{rest // 60}:{rest % 60:02d}:00"


def _absent(text: str) -> str:
    """Slurm's ways to print nothing."""
    return "" if text in ("(null)", "N/A", "None", "n/a") else text


def _number_or_none(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _shown(command: Sequence[str], longest: int = 120) -> str:
    text = " ".join(command).replace(SEPARATOR, " ")
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _chunks(ids: Iterable[str | int]) -> list[list[str]]:
    every = [str(one) for one in ids]
    return [every[start : start + IDS_PER_COMMAND] for start in range(0, len(every), IDS_PER_COMMAND)]
