"""What a live cluster would refuse, never start, or start late, of what one job asks for: pure functions of both.

`plan` and `submit` ask it of each phase's resources, `afterok profile verify` of each role's; what a profile says of
itself is compared in checks.py, by the same words (named.py).
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from data_tools.mistake import Problem
from slurm.printed import format_minutes
from slurm.profile.places import gpus_of, items
from slurm.profile.schema import Resources
from slurm.verify import named
from slurm.verify.live import Limit, Live, LiveNode, minutes_of, tres_of, user_groups, user_name

NEVER_STARTS = "Slurm would take the job and never start it"
CLOCK = "%Y-%m-%dT%H:%M:%S"  # as scontrol prints times


@dataclass
class Asked:
    """What one job asks of a cluster, and the partition and nodes that it would have."""

    wants: Resources
    live: Live
    where: str  # the place of the resources, such as "tiny.yaml: phases.sft.resources"

    @property
    def partition(self) -> dict[str, str]:
        """The keys of the partition, none where there is none of the name."""
        return self.live.partitions.get(self.wants.partition or "", {})

    @property
    def account(self) -> str:
        """The account that is charged; "" where Slurm keeps none."""
        return self.wants.account or self.live.default_account

    @property
    def qos(self) -> str:
        """The QOS that the job gets; "" where that is not known."""
        return self.wants.qos or self.live.default_qos.get(self.account, "")

    @property
    def flags(self) -> list[str]:
        """The flags of its QOS: some let it beyond the partition's limits."""
        return self.live.qos_flags.get(self.qos, [])

    @property
    def minutes(self) -> int | None:
        """The time limit of the job in minutes: what it asks for, else the partition's default; None for no limit."""
        if self.wants.time_minutes is not None:
            return self.wants.time_minutes
        default = minutes_of(self.partition.get("DefaultTime", ""))
        return default if default is not None else minutes_of(self.partition.get("MaxTime", ""))

    @property
    def total(self) -> dict[str, int]:
        """What the whole job has, in the words of Slurm's trackable resources; memory in MiB, none where not said."""
        wants = self.wants
        memory = {"mem": wants.mem_gib * 1024 * wants.nodes} if wants.mem_gib else {}
        return memory | {
            "node": wants.nodes,
            "cpu": wants.nodes * wants.ranks_per_node * wants.cpus_per_task,
            "gres/gpu": wants.nodes * wants.gpus_per_node,
        }

    def problem(self, check: str, key: str, message: str) -> Problem:
        """Return a finding at one of the keys of the resources."""
        return Problem(f"{self.where}.{key}", message, check)


def findings(wants: Resources, live: Live, where: str, now: datetime | None = None) -> list[Problem]:
    """Return all that a cluster has against a job; with `now`, what of this moment would have it wait, too.

    Args:
        where: the place of the resources, such as "tiny.yaml: phases.sft.resources".
    """
    asked = Asked(wants, live, where)
    name = wants.partition or ""
    if name not in live.partitions:
        return [asked.problem("P001", "partition", named.no_partition(live, name))]
    return [
        *_partition(asked),
        *_names(asked),
        *_allowed(asked),
        *_nodes(asked, now),
        *(_reservation(asked, now) if wants.reservation else []),
    ]


def _partition(asked: Asked) -> Iterator[Problem]:
    """Yield what the partition's own state and limits have against the job."""
    keys, name, wants = asked.partition, asked.wants.partition, asked.wants
    state = keys.get("State", "UP")
    if state == "DOWN":
        yield asked.problem("P008", "partition", f"{name} is DOWN: the job would wait until it is up again")
    elif state != "UP":
        yield asked.problem("P012", "partition", f"{name} is {state}, and takes no jobs; choose another partition")
    longest = minutes_of(keys.get("MaxTime", ""))
    beyond = wants.time_minutes is not None and longest is not None and wants.time_minutes > longest
    if beyond and "PartitionTimeLimit" not in asked.flags:
        said, most = format_minutes(wants.time_minutes or 0), format_minutes(longest or 0)
        message = f"{said}, but Slurm's MaxTime of {name} is {most}: {NEVER_STARTS}; ask for at most that"
        yield asked.problem("P002", "time", message)
    most_nodes = keys.get("MaxNodes", "")
    if most_nodes.isdigit() and wants.nodes > int(most_nodes) and "PartitionMaxNodes" not in asked.flags:
        message = f"{wants.nodes}, but Slurm's MaxNodes of {name} is {most_nodes}: {NEVER_STARTS}; ask for at most that"
        yield asked.problem("P003", "nodes", message)
    least = keys.get("MinNodes", "")
    if least.isdigit() and wants.nodes < int(least) and "PartitionMinNodes" not in asked.flags:
        yield asked.problem("P003", "nodes", f"{wants.nodes}, but Slurm's MinNodes of {name} is {least}; ask for that")
    cpus = keys.get("MaxCPUsPerNode", "")
    if cpus.isdigit() and wants.ranks_per_node * wants.cpus_per_task > int(cpus):
        message = f"{wants.ranks_per_node * wants.cpus_per_task} CPUs a node, but Slurm's MaxCPUsPerNode of {name} is"
        yield asked.problem("P006", "cpus_per_task", f"{message} {cpus}: {NEVER_STARTS}; ask for at most that")


def _names(asked: Asked) -> Iterator[Problem]:
    """Yield accounts, QOS, reservations, licences and features that are not there, or not this user's."""
    wants, live = asked.wants, asked.live
    words = {  # what Slurm does not enforce it takes as it is
        "account": ("Q002", named.account(live, wants.account) if live.enforces("associations") else ""),
        "qos": ("Q001", named.qos(live, wants.qos, asked.account) if live.enforces("qos") else ""),
        "licenses": ("L001", named.licenses(live, wants.licenses)),
        "constraint": ("P009", named.features(live.nodes_of(wants.partition or ""), wants.constraint)),
    }
    for key, (check, message) in words.items():
        if message:
            yield asked.problem(check, key, message)
    if live.accounts is not None and not live.accounts and live.enforces("associations"):
        message = (
            f"you have no account in Slurm's accounting, and it refuses jobs of such; ask for one for {user_name()}"
        )
        yield asked.problem("Q002", "account", message)
    for key, value in (("account", asked.account), ("qos", asked.qos)):
        if not words[key][1] and (message := named.not_let_in(asked.partition, key, value)):
            yield asked.problem("P007", key, message)
    groups = asked.partition.get("AllowGroups", "ALL")
    if groups not in ("ALL", "") and user_name() != "root" and not set(groups.split(",")) & set(user_groups()):
        message = f"{wants.partition} has AllowGroups={groups}, and yours are {', '.join(user_groups())}"
        yield asked.problem("P007", "partition", f"{message}; choose another partition")


def _allowed(asked: Asked) -> Iterator[Problem]:
    """Yield what QOS and associations do not allow one job to have."""
    of_partition = asked.partition.get("QoS", "")
    for limit in asked.live.limits:
        about_account = limit.account is not None and limit.account == asked.account
        about_qos = limit.qos is not None and limit.qos in (asked.qos, of_partition)
        if about_account or about_qos:
            yield from _beyond(asked, limit)


def _beyond(asked: Asked, limit: Limit) -> Iterator[Problem]:
    """Yield what of a job is more than one limit allows, or less than it wants."""
    minutes = asked.wants.time_minutes
    if limit.minutes is not None and minutes is not None and minutes > limit.minutes:
        most = format_minutes(limit.minutes)
        message = f"{format_minutes(minutes)}, but {limit.of} is {most}: {NEVER_STARTS}; ask for at most that"
        yield asked.problem("Q003", "time", message)
    keys = {"node": "nodes", "cpu": "cpus_per_task", "mem": "mem_gib", "gres/gpu": "gpus_per_node"}
    for tres, key in keys.items():
        has, bound = asked.total.get(tres), limit.tres.get(tres)
        if has is None or bound is None:
            continue
        if (has < bound) if limit.is_least else (has > bound):
            verb = "wants at least" if limit.is_least else "allows at most"
            message = f"the job has {tres}={has} in all, and {limit.of} {verb} {tres}={bound}: {NEVER_STARTS}"
            yield asked.problem(
                "Q003", key, f"{message}; ask for {'more' if limit.is_least else 'less'}, or another QOS"
            )


def _nodes(asked: Asked, now: datetime | None) -> Iterator[Problem]:
    """Yield what the nodes of the partition have not, together or one by one, and what keeps them from the job."""
    wants, name = asked.wants, asked.wants.partition or ""
    every = asked.live.nodes_of(name)
    if not every:
        yield asked.problem("P003", "partition", f"{name} has no nodes: {NEVER_STARTS}; choose another partition")
        return
    fitting = named.with_features(every, wants.constraint)
    missing = list(_sizes(asked, fitting or every))
    yield from missing
    able = [node for node in fitting if _can_carry(node, wants)]
    if missing or not fitting:
        return  # which is told, and then no number of nodes means anything
    if len(able) < wants.nodes:
        message = f"{wants.nodes}, but {len(able)} of the {len(every)} nodes of {name} have all that is asked of a node"
        yield asked.problem(
            "P003", "nodes", f"{message}: {NEVER_STARTS}; ask for at most {max(len(able), 1)}, or less of each"
        )
        return
    up = [node for node in able if not node.is_away]
    if now is not None and len(up) < wants.nodes:
        away = ", ".join(f"{node.name} {node.state}" for node in able if node.is_away)
        message = f"{wants.nodes}, but of the {len(able)} nodes of {name} that fit {len(up)} are up ({away})"
        yield asked.problem("P011", "nodes", f"{message}: the job would wait for them; ask for less, or wait")
    elif now is not None and not wants.reservation:
        yield from _reserved(asked, up, now)
        yield from _drawn(asked, now)


def _sizes(asked: Asked, nodes: list[LiveNode]) -> Iterator[Problem]:
    """Yield what a job asks of each node and no node has."""
    wants, name = asked.wants, asked.wants.partition
    has = ", ".join(sorted({node.gres or "none" for node in nodes}))
    for resource, kind, count in _gres(wants):
        most = max(node.count(resource, kind) for node in nodes)
        if count > most:
            is_gpu = resource == "gpu"
            what = f"{resource}:{kind}" if kind else resource
            message = f"{count} {what} a node, but the nodes of {name} have {most} at most ({has}); ask for that"
            key = "gres" if wants.gres else "gpus_per_node"
            yield asked.problem("P005" if is_gpu else "P010", key, message)
    cpus, most = wants.ranks_per_node * wants.cpus_per_task, max(node.cpus for node in nodes)
    if cpus > most:
        message = (
            f"{wants.ranks_per_node} ranks of {wants.cpus_per_task} CPUs are {cpus} a node, but the nodes of {name}"
        )
        yield asked.problem("P006", "cpus_per_task", f"{message} have {most} at most; ask for less")
    memory = max(node.mem_mib for node in nodes)
    if wants.mem_gib and wants.mem_gib * 1024 > memory:
        message = f"{wants.mem_gib} GiB, but the nodes of {name} have {memory // 1024} at most; ask for that"
        yield asked.problem("P006", "mem_gib", message)


def _gres(wants: Resources) -> list[tuple[str, str, int]]:
    """Return (name, type or "", count) of each generic resource that a job asks of a node, GPUs included."""
    asked = items(wants.gres) if wants.gres else []
    unnamed = [("gpu", "", wants.gpus_per_node)] if wants.gpus_per_node and not gpus_of(wants.gres)[1] else []
    return [*unnamed, *asked]


def _can_carry(node: LiveNode, wants: Resources) -> bool:
    """Return whether a node has all that a job asks of each."""
    return (
        node.cpus >= wants.ranks_per_node * wants.cpus_per_task
        and node.mem_mib >= (wants.mem_gib or 0) * 1024
        and all(node.count(resource, kind) >= count for resource, kind, count in _gres(wants))
    )


# -- reservations -------------------------------------------------------------------------------------------------


def _reservation(asked: Asked, now: datetime | None) -> Iterator[Problem]:
    """Yield what the reservation that a job names has against it."""
    wants = asked.wants
    if message := named.reservation(asked.live, wants.reservation):
        yield asked.problem("R004", "reservation", message)
        return
    for name in (wants.reservation or "").split(","):
        keys = asked.live.reservations[name]
        if message := _not_let_into(asked, name, keys):
            yield asked.problem("R004", "reservation", message)
        if "FLEX" in keys.get("Flags", ""):
            continue
        nodes, cpus = keys.get("NodeCnt", ""), tres_of(keys.get("TRES", "")).get("cpu")
        if nodes.isdigit() and int(nodes) and wants.nodes > int(nodes):
            message = f"{wants.nodes}, but the reservation {name} has {nodes}: {NEVER_STARTS}; ask for at most that"
            yield asked.problem("R005", "nodes", message)
        elif cpus and (total := asked.total["cpu"]) > cpus:
            message = f"{total} CPUs in all, but the reservation {name} has {cpus}: {NEVER_STARTS}; ask for no more"
            yield asked.problem("R005", "cpus_per_task", message)
        start, end = _moment(keys.get("StartTime", "")), _moment(keys.get("EndTime", ""))
        over = _overrun(asked.live.configuration.get("ResvOverRun", "0"))
        if now is None or end is None or asked.minutes is None or over is None:
            continue
        left = math.floor((end - max(now, start or now)).total_seconds() / 60) + over
        if asked.minutes > left:
            message = f"{format_minutes(asked.minutes)}, but the reservation {name} ends at {keys['EndTime']}"
            remedy = f"ask for at most {format_minutes(left)}" if left > 0 else "leave it out"
            yield asked.problem("R005", "time", f"{message}, when Slurm kills its jobs; {remedy}")


def _overrun(text: str) -> int | None:
    """Return the minutes that jobs may run beyond their reservation (ResvOverRun, "5 min"); None for any number."""
    number = re.match(r"\d+", text)
    return int(number[0]) if number else None


def _not_let_into(asked: Asked, name: str, keys: dict[str, str]) -> str:
    """Return why a reservation is not for this user or the job's account, "" where it is for both (scontrol(1))."""
    users, accounts, groups = (_listed(keys.get(key, "")) for key in ("Users", "Accounts", "Groups"))
    if groups and not set(groups) & set(user_groups()):
        return f"{name} is for the groups {', '.join(groups)}, and yours are {', '.join(user_groups())}; leave it out"
    if users and user_name() not in users:
        return f"{name} is for {', '.join(users)}, and you are {user_name()}; ask its owner, or leave it out"
    if accounts and asked.account not in accounts:
        message = f"{name} is for the accounts {', '.join(accounts)}, and the job's is {asked.account or 'none'}"
        return f"{message}; say one of them as account"
    return ""


def _listed(text: str) -> list[str]:
    """Return the names of a list of users or accounts of a reservation; those that are kept out are left out."""
    return [name for name in text.split(",") if name and name not in ("(null)", "N/A") and not name.startswith("-")]


def _reserved(asked: Asked, nodes: list[LiveNode], now: datetime) -> Iterator[Problem]:
    """Yield the maintenance, or other reservation, that leaves a job that starts now too few nodes to end on."""
    minutes = asked.minutes
    if minutes is None:
        minutes = 366 * 24 * 60  # a job without limit runs into all there is
    cpus = asked.wants.ranks_per_node * asked.wants.cpus_per_task
    taken: dict[str, tuple[datetime, str]] = {}  # node -> the first reservation that keeps it
    for name, keys in asked.live.reservations.items():
        start, end = _moment(keys.get("StartTime", "")), _moment(keys.get("EndTime", ""))
        if start is None or end is None or end <= now:
            continue  # IGNORE_JOBS and FLEX let no job in that does not name it (seen with 22.05)
        if (start - now).total_seconds() / 60 >= minutes or _draws_in(asked, name, now):
            continue
        too_full = [node.name for node in nodes if _left(asked, node, keys) < cpus]
        for node in named.nodes_in(keys.get("Nodes", ""), too_full):
            taken[node] = min(taken.get(node, (start, name)), (start, name))
    free = len(nodes) - len(taken)
    if free >= asked.wants.nodes:
        return
    by_start = sorted(taken.values())
    start, name = by_start[len(by_start) - (asked.wants.nodes - free)]  # until then enough nodes are left
    keys = asked.live.reservations[name]
    kind = "the maintenance" if "MAINT" in keys.get("Flags", "") else "the reservation"
    left = math.floor((start - now).total_seconds() / 60)
    remedy = f"ask for at most {format_minutes(left)} to run before it" if left > 0 else "wait for its end"
    said = "no time limit" if asked.minutes is None else format_minutes(asked.minutes)
    yield asked.problem(
        "V001",
        "time",
        f"{said}, and {kind} {name} has {len(taken)} of the {len(nodes)} nodes that fit from {keys['StartTime']} to "
        f"{keys['EndTime']}: the job would wait for its end; {remedy}",
    )


def _draws_in(asked: Asked, name: str, now: datetime) -> bool:
    """Return whether a reservation that has begun takes jobs of this user that do not name it (seen with 22.05)."""
    keys = asked.live.reservations[name]
    start = _moment(keys.get("StartTime", ""))
    begun = start is not None and start <= now
    return begun and "MAGNETIC" in keys.get("Flags", "") and not _not_let_into(asked, name, keys)


def _drawn(asked: Asked, now: datetime) -> Iterator[Problem]:
    """Yield the reservations that take the job though it names none, and end before it does."""
    over = _overrun(asked.live.configuration.get("ResvOverRun", "0"))
    for name, keys in asked.live.reservations.items():
        end = _moment(keys.get("EndTime", ""))
        if end is None or end <= now or over is None or not _draws_in(asked, name, now):
            continue
        left = math.floor((end - now).total_seconds() / 60) + over
        if asked.minutes is None or asked.minutes > left:
            said = "no time limit" if asked.minutes is None else format_minutes(asked.minutes)
            message = f"{said}, and the reservation {name} (MAGNETIC) takes your jobs in and ends at {keys['EndTime']}"
            remedy = f"ask for at most {format_minutes(left)}, or wait" if left > 0 else "wait"
            yield asked.problem("V001", "time", f"{message}, when Slurm kills them; {remedy} for its end")


def _left(asked: Asked, node: LiveNode, keys: dict[str, str]) -> int:
    """Return how many CPUs of one of its nodes a reservation leaves at the most: it may be of some cores only."""
    reserved = tres_of(keys.get("TRES", "")).get("cpu")
    if reserved is None:
        return 0
    others = [each for each in asked.live.nodes if each.name != node.name]
    elsewhere = set(named.nodes_in(keys.get("Nodes", ""), [each.name for each in others]))
    on_others = sum(each.cpus for each in others if each.name in elsewhere)
    return node.cpus - max(min(reserved - on_others, node.cpus), 0)


def _moment(text: str) -> datetime | None:
    try:
        return datetime.strptime(text, CLOCK)
    except ValueError:
        return None
