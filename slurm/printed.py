"""What Slurm's commands print, as rows and values: pure functions of the text.

Formats: `man squeue`, `sinfo`, `sacct`, `scontrol`, of Slurm 22.05; array and time notations as in `man sbatch`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SEPARATOR = "\x1f"  # the one character no job name or reason contains

# States that a job leaves only by a requeue (man squeue, JOB STATE CODES); a requeue sets it to PENDING.
ENDED_STATES = frozenset((
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
))  # fmt: skip


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
    keys = parse_keys(printed.splitlines()[0])
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


def parse_keys(printed: str) -> dict[str, str]:
    """Keys and values of one line of `scontrol show` of a job, node or partition; of a value with blanks (names,
    paths) the first word."""
    return dict(re.findall(r"(?:^|\s)([A-Za-z][\w/:]*)=(\S*)", printed))


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


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
