"""What Slurm's commands print, as rows and values: pure functions of the text.

Formats: `man squeue`, `sinfo`, `sacct`, `scontrol`, of Slurm 22.05; array and time notations as in `man sbatch`.
"""

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from data_tools.base.indices import Indices

# What Slurm's library itself says where a connection was lost, so that what was asked for may have happened all the
# same: slurm_strerror's texts of 22.05 for communication, and those of the C library for a socket.
LOST_CONNECTION = (
    "Unexpected message received", "Message send failure", "Message receive failure", "Protocol authentication error",
    "Communication connection failure", "Communication shutdown failure", "Zero Bytes were transmitted or received",
    "Unable to contact slurm controller (connect failure)", "Unable to contact slurm controller (send failure)",
    "Unable to contact slurm controller (receive failure)", "Unable to contact slurm controller (shutdown failure)",
    "Slurm backup controller in standby mode", "Socket timed out on send/recv operation", "Connection refused",
    "Connection timed out", "Connection reset by peer", "Broken pipe", "No route to host", "Network is unreachable",
)  # fmt: skip
SBATCH_FAILED = (
    "sbatch: error: Batch job submission failed: "  # what follows is slurm_strerror's, whatever stands above
)
MESSAGE_CHARACTERS = 4000  # of what a command said: a site's longest policy text, and no more of a log by mistake
QUEUE_FIELDS = ("%A", "%F", "%K", "%T", "%r", "%E", "%N", "%j")
ACCOUNTING_FIELDS = ("JobID", "JobIDRaw", "State", "ExitCode", "ElapsedRaw", "NodeList", "JobName")

# States that a job leaves only by a requeue (man squeue, JOB STATE CODES); a requeue sets it to PENDING.
ENDED_STATES = frozenset((
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
))  # fmt: skip


@dataclass(frozen=True, slots=True)  # a run may have a million
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
    waiting: str = ""  # of a row of several elements that wait together: their indices, "4-9,12%2"

    @property
    def element(self) -> str:
        """Return its name for scontrol and scancel: "12", or "12_3" of one element of an array."""
        return self.job_id if self.array_index is None else f"{self.array_job_id}_{self.array_index}"


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


def is_away(node_state: str) -> bool:
    """Return whether a node in that state, as sinfo prints it, is down, drained, failed or does not answer."""
    return node_state.endswith("*") or node_state.startswith(("down", "drain", "fail"))


def controller_is_up(printed: str) -> bool:
    """Return whether any controller, primary or backup, answered `scontrol ping`."""
    return any(line.rstrip().endswith(" UP") for line in printed.splitlines())


def separator() -> str:
    """Return a text to print between fields that no job's name or reason can hold: it was drawn after they were given.

    Names hold what their users like, newlines, tabs and every other separator among them.
    """
    return secrets.token_hex(8)


def _records(printed: str, between: str, fields: int) -> Iterator[list[str]]:
    """Yield each record of `fields` values, every value followed by `between` and the last by a newline too."""
    values = printed.split(between)
    for start in range(0, len(values) - fields, fields):
        first, *others = values[start : start + fields]
        yield [first.removeprefix("\n"), *others]


def parse_queue(printed: str, between: str, each_element: bool = True) -> list[QueueRow]:
    """Return the rows of `squeue` with QUEUE_FIELDS, each followed by `between`; waiting elements come in one and
    become many, if wanted. Else each row of an array has its indices in `waiting`, and its `array_index` is None.
    """
    rows = []
    for record in _records(printed, between, len(QUEUE_FIELDS)):
        job_id, array_id, index, state, reason, dependency, nodelist, name = record
        is_array = index[:1].isdigit()
        indices = parse_indices(index) if is_array and each_element else [None]
        reason, dependency, nodelist = map(_absent, (reason, dependency, nodelist))
        rows += [
            QueueRow(
                job_id=job_id,
                array_job_id=array_id if is_array else None,
                array_index=element,
                name=name,
                state=state,
                reason=reason,
                dependency=dependency,
                nodelist=nodelist,
                waiting=index if is_array and not each_element else "",
            )
            for element in indices
        ]
    return rows


def parse_indices(text: str) -> list[int]:
    """Return the indices of an array: "0-2,7%4" (the last part is its throttle) is [0, 1, 2, 7], "0-8:4" is [0, 4, 8].

    Raises ValueError for a list that Slurm cut short with "...".
    """
    indices: list[int] = []
    for part in text.partition("%")[0].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        indices += range(int(first), int(last or first) + 1, int(step or 1))
    return indices


def read_indices(text: str) -> Indices:
    """Return what `parse_indices` does in ranges: of 100,000 elements that wait it costs as much as of two."""
    spans: list[tuple[int, int]] = []
    for part in text.partition("%")[0].split(","):
        first, dash, last = part.partition("-")
        if dash and ":" not in last:
            spans.append((int(first), int(last) + 1))
        else:
            spans += ((index, index + 1) for index in parse_indices(part))
    return Indices.of_spans(spans)


SHOWN_RANGES = 6  # of elements, in a sentence


def format_indices(indices: Iterable[int], most: int | None = None) -> str:
    """Return the array indices as Slurm spells them, "3,7-9"; for people at most `most` ranges, then "…"."""
    spans = Indices.of(indices).spans
    texts = [str(first) if end == first + 1 else f"{first}-{end - 1}" for first, end in spans[:most]]
    return ",".join(texts) + (",…" if most is not None and len(spans) > most else "")


def parse_accounting(printed: str, between: str) -> list[AccountingRow]:
    """Return the rows of `sacct -X --parsable` with ACCOUNTING_FIELDS and the delimiter `between`."""
    rows = []
    for record in _records(printed, between, len(ACCOUNTING_FIELDS)):
        job_id, raw_id, state, exit_code, elapsed, nodelist, name = record
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


def parse_job(printed: str) -> dict[str, str]:
    """Return the keys and values of one job of `scontrol show job --oneliner`; JobName is whole, whatever it holds.

    The other texts that a user chooses (comment, paths) come last, and of a key the first value counts.
    """
    named = re.search(r"JobName=(.*?)\s+(?=UserId=\S+\(\d+\) GroupId=\S+\(\d+\) )", printed, re.DOTALL)
    if named is None:
        return parse_keys(printed)
    return parse_keys(printed[named.end() :]) | parse_keys(printed[: named.start()]) | {"JobName": named[1]}


def parse_job_row(printed: str) -> AccountingRow:
    """Return one job of `scontrol show job --oneliner`."""
    keys = parse_job(printed)
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
    """Read the least limit out of `sacctmgr show assoc` (Account, DefaultQOS, MaxSubmit) and `show qos` (Name,
    MaxSubmitPU).
    """
    limits, default = [], "normal"
    for line in accounts.splitlines():
        account, named, most = line.split("|")
        default = named or default
        if most:
            limits.append(SubmitLimit(int(most), f"account {account} (MaxSubmitJobs)"))
    wanted = {name or default for name in qos}
    for line in quality.splitlines():
        name, most = line.split("|")
        if name in wanted and most:
            limits.append(SubmitLimit(int(most), f"QOS {name} (MaxSubmitJobsPerUser)"))
    return min(limits, key=lambda limit: limit.jobs, default=None)


def parse_seconds(text: str) -> int:
    """Return the seconds of an elapsed time as Slurm prints it: "00:01:30", "2-00:00:00"."""
    days, _, rest = text.rpartition("-")
    seconds = 0
    for part in rest.split(":"):
        seconds = seconds * 60 + int(part)
    return int(days or 0) * 86400 + seconds


def parse_partitions(printed: str) -> list[PartitionRow]:
    """Return the rows of `sinfo --exact` with the fields %P %a %l %s %D %c %m %G; unlike nodes of a partition share its
    row.
    """
    rows: dict[str, PartitionRow] = {}
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
        before = rows.get(row.name)
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
        rows[row.name] = row
    return list(rows.values())


def gpus_in_gres(gres: str) -> int:
    """Return the GPUs of a node: "gpu:8", "gpu:h100:8(S:0-1),nvme:2" and "gpu:a100:4,gpu:v100:4" have 8, "(null)" has
    none.
    """
    # sockets in parentheses hold commas too, so they go before the split
    items = re.sub(r"\([^)]*\)", "", gres).split(",")
    return sum(int(item.split(":")[-1]) if item[-1:].isdigit() else 1 for item in items if item.split(":")[0] == "gpu")


def parse_configuration(printed: str) -> dict[str, str]:
    """Return the keys and values of `scontrol show config`."""
    pairs = (line.partition(" = ") for line in printed.splitlines() if " = " in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def array_limit(configuration: Mapping[str, str]) -> int:
    """Return the elements an array may have: MaxArraySize, or the scheduler's max_array_tasks where an admin set it
    lower.
    """
    limit = int(configuration.get("MaxArraySize", 1001))  # Slurm's default
    tasks = re.search(r"\bmax_array_tasks=(\d+)", configuration.get("SchedulerParameters", ""))
    return min(limit, int(tasks[1])) if tasks else limit


def parse_keys(printed: str) -> dict[str, str]:
    """Return the keys and values of one line of `scontrol show` of a job, node or partition; of a value with blanks
    (names, paths) the first word, and of a key that comes twice the first value.
    """
    return dict(reversed(re.findall(r"(?:^|\s)([A-Za-z][\w/:]*)=(\S*)", printed)))


def parse_minutes(text: str) -> int:
    """Return the minutes of a Slurm time limit, rounded up: "30", "30:15", "1:30:00", "2-12", "2-12:30", "2-12:30:00".

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
    """Return the minutes in the form Slurm prints: 90 is "1:30:00", 2880 is "2-00:00:00"."""
    days, rest = divmod(minutes, 1440)
    return f"{days}-{rest // 60:02d}:{rest % 60:02d}:00" if days else f"{rest // 60}:{rest % 60:02d}:00"


def _absent(text: str) -> str:
    """Return "" for Slurm's ways to print nothing."""
    return "" if text in ("(null)", "N/A", "None", "n/a") else text


def _number_or_none(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def submitted_id(printed: str) -> str | None:
    """Return the job's id in what `sbatch --parsable` printed: the last line that is one ("12", or "12;cluster"), else
    None.

    Wrappers of a site's add lines of their own, before and after.
    """
    ids = [number[1] for line in printed.splitlines() if (number := re.fullmatch(r"(\d+)(;\S+)?", line.strip()))]
    return ids[-1] if ids else None


def lost_connection(command: str, stderr: str) -> bool:
    """Return whether a command that failed says, in Slurm's own fixed words, that the connection to the controller was
    lost.

    Words alone are not enough: what a site writes into a refusal may speak of time-outs and communication too. Of
    sbatch the text after SBATCH_FAILED decides, of the others how their last line ends (scontrol adds "for job 12").
    """
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if command == "sbatch":
        verdicts = [line.removeprefix(SBATCH_FAILED) for line in lines if line.startswith(SBATCH_FAILED)]
        return bool(verdicts) and verdicts[-1] in LOST_CONNECTION
    last = re.sub(r" for job \S+$", "", lines[-1]) if lines else ""
    return last in LOST_CONNECTION or last.endswith(tuple(f" {text}" for text in LOST_CONNECTION))


def whole_message(command: str, stderr: str, stdout: str) -> str:
    """Return everything that a failed command said, in one line; the words "COMMAND: error:" stand once at most."""
    lines = [line.strip() for text in (stderr, stdout) for line in text.splitlines() if line.strip()]
    prefix = f"{command}: error: "
    text = " ".join([*lines[:1], *(line.removeprefix(prefix) for line in lines[1:])])
    return text if len(text) <= MESSAGE_CHARACTERS else text[: MESSAGE_CHARACTERS - 1] + "…"
