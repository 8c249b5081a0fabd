"""Where a profile and its live cluster disagree: pure functions of both. Each mismatch has the id of its check.

The ids are those of slurm/checks.py. A role is checked as a job of its defaults would be (asked.py). What only a job on
a compute node can tell (F files, N network, E environment) is asked by launchers/backends/probe.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from data_tools.mistake import Problem
from slurm.printed import array_limit, format_minutes, parse_minutes
from slurm.profile.places import Place, gpus_of, places
from slurm.profile.resolve import choices
from slurm.profile.schema import Partition, Profile, Request
from slurm.verify import named
from slurm.verify.asked import findings
from slurm.verify.live import Live, LiveNode, minutes_of, seconds_of


@dataclass(frozen=True)
class Mismatch:
    """What a profile says at a place (`key`, dotted), and what its cluster says instead."""

    check: str  # of slurm/checks.py
    key: str
    message: str  # both values and the remedy


def mismatches(profile: Profile, live: Live, now: datetime | None = None) -> list[Mismatch]:
    """Return all that a cluster itself can tell to be wrong with its profile; with `now`, what passes by too."""
    found: list[Mismatch] = []
    for name, partition in profile.partitions.items():
        at = f"partitions.{name}"
        if name not in live.partitions:
            known = ", ".join(sorted(live.partitions))
            found.append(Mismatch("P001", at, f"Slurm has no partition {name}; it has {known}"))
            continue
        found += _limits(at, partition, live=live, name=name)
        if not live.nodes_of(name):
            found.append(Mismatch("P008", at, f"partition {name} has no nodes, so that nothing starts there"))
            continue
        for place in _kinds(profile, name):
            inner = f"{at}.node_types.{place.node_type}" if place.node_type else at
            kind = partition.node_types[place.node_type] if place.node_type else partition
            found += _nodes(inner, place, live.nodes_of(name), constraint=kind.constraint)
    limit = array_limit(live.configuration)
    if profile.max_array_size is not None and profile.max_array_size > limit:
        message = f"{profile.max_array_size}, but Slurm's arrays may have {limit} elements; write at most that"
        found.append(Mismatch("P004", "max_array_size", message))
    found += _names(profile, live)
    found += _roles(profile, live, found, now)
    return list(dict.fromkeys(found))


def _kinds(profile: Profile, partition: str) -> list[Place]:
    """Return the kinds of nodes of a partition, whatever role may use it."""
    role = next(iter(profile.roles))
    return places(profile, Request(role=role, partition=partition))


def _limits(at: str, partition: Partition, live: Live, name: str) -> Iterator[Mismatch]:
    """Yield what of a partition's own limits is not Slurm's."""
    keys = live.partitions[name]
    if (state := keys.get("State", "UP")) != "UP":
        yield Mismatch("P008", at, f"partition {name} is {state}, so that nothing starts there")
    longest = minutes_of(keys.get("MaxTime", ""))
    if partition.max_time is not None and longest is not None and parse_minutes(partition.max_time) > longest:
        message = f"{partition.max_time}, but Slurm's MaxTime of {name} is {format_minutes(longest)}, and longer jobs"
        yield Mismatch("P002", f"{at}.max_time", f"{message} wait for ever; write at most that")
    most = [number for text in (keys.get("MaxNodes", ""), str(len(live.nodes_of(name)))) if (number := _number(text))]
    if partition.max_nodes is not None and most and partition.max_nodes > min(most):
        message = f"{partition.max_nodes}, but {name} has {most[-1]} nodes and MaxNodes {keys.get('MaxNodes')}"
        yield Mismatch("P003", f"{at}.max_nodes", f"{message}; write at most {min(most)}")
    for key in ("account", "qos"):
        if message := named.not_let_in(keys, key, getattr(partition, key)):
            yield Mismatch("P007", f"{at}.{key}", message)


def _roles(profile: Profile, live: Live, found: list[Mismatch], now: datetime | None) -> Iterator[Mismatch]:
    """Yield what the cluster has against a job of a role's defaults, where nothing that was `found` says so already."""
    for name in profile.roles:
        place, wants = choices(profile, Request(role=name))[0]
        partition = f"partitions.{place.partition}"
        known = {fault.check for fault in found if f"{fault.key}.".startswith(f"{partition}.")}
        if place.partition not in live.partitions or not live.nodes_of(place.partition):
            continue
        for problem in findings(wants, live, f"roles.{name}", now):
            if problem.check not in known:
                yield Mismatch(problem.check, problem.where, problem.message)
        for problem in preemption(profile, live, partition=place.partition, qos=wants.qos or ""):
            if problem.check not in known:
                yield Mismatch(problem.check, problem.where, problem.message)


def preemption(profile: Profile, live: Live, partition: str, qos: str) -> Iterator[Problem]:
    """Yield what becomes of a partition's jobs that are preempted, where the profile expects something else."""
    keys, said = live.partitions.get(partition, {}), profile.partitions.get(partition, Partition())
    mode, requeues = keys.get("PreemptMode", "OFF"), live.configuration.get("JobRequeue", "1")
    if said.requeue and (mode == "CANCEL" or requeues == "0"):
        message = f"true, but {partition} has PreemptMode={mode}, and JobRequeue is {requeues}; write false"
        yield Problem(f"partitions.{partition}.requeue", message, "R001")
    kind = live.configuration.get("PreemptType", "preempt/none")
    if "none" in kind or mode not in ("REQUEUE", "CANCEL"):
        return
    grace = live.grace_s.get(qos, 0) if "qos" in kind else seconds_of(keys.get("GraceTime", ""))
    if grace < profile.signal_lead_s:
        message = (
            f"a job that is preempted there has {grace} s (GraceTime) to write a checkpoint, and signal_lead_s says "
            f"that it takes {profile.signal_lead_s}: it may lose its work since the last one; have checkpoints often, "
            "or ask the admin for a longer GraceTime"
        )
        yield Problem(f"partitions.{partition}", message, "R003")


def _nodes(at: str, place: Place, nodes: list[LiveNode], constraint: str | None) -> Iterator[Mismatch]:
    """Yield what of a kind of nodes no node of the partition has; the constraint first narrows them down."""
    limits = place.limits
    if message := named.features(nodes, constraint):
        yield Mismatch("P009", f"{at}.constraint", message)
    else:
        nodes = named.with_features(nodes, constraint) or nodes
    kind = gpus_of(limits.gres)[0]
    having = [node for node in nodes if not kind or kind in dict(node.gpus)]
    yield from _gpus(at, place, nodes, having)
    yield from _sizes(at, place, having or nodes)


def _sizes(at: str, place: Place, nodes: list[LiveNode]) -> Iterator[Mismatch]:
    """Yield what of a kind of nodes is larger than the largest, or more than there are."""
    name, limits = place.partition, place.limits
    for key, most, unit in (
        ("cpus", max(node.cpus for node in nodes), "CPUs"),
        ("mem_gib", max(node.mem_mib for node in nodes) // 1024, "GiB"),
    ):
        said = getattr(limits, key)
        if said is not None and said > most:
            yield Mismatch("P006", f"{at}.{key}", f"{said} {unit}, but the nodes of {name} have {most} at most")
    if place.node_type and limits.max_nodes is not None and limits.max_nodes > len(nodes):
        message = f"{limits.max_nodes}, but {name} has {len(nodes)} of these nodes; write that"
        yield Mismatch("P003", f"{at}.max_nodes", message)


def _gpus(at: str, place: Place, nodes: list[LiveNode], having: list[LiveNode]) -> Iterator[Mismatch]:
    """Yield what of a kind of nodes' GPUs is not so; `having` are those of the nodes that have GPUs of its name."""
    name, limits = place.partition, place.limits
    kind, count = gpus_of(limits.gres)
    has = ", ".join(sorted({node.gres or "none" for node in nodes}))
    if not having:
        yield Mismatch("P005", f"{at}.gres", f"{limits.gres}: no node of {name} has gpu:{kind}; they have {has}")
        return
    most = max(sum(number for own, number in node.gpus if not kind or own == kind) for node in having)
    wanted = max(limits.gpus_per_node or 0, count or 0)
    if wanted > most:
        key = "gpus_per_node" if limits.gpus_per_node else "gres"
        yield Mismatch("P005", f"{at}.{key}", f"{wanted} GPUs, but the nodes of {name} have {most} at most ({has})")


def _names(profile: Profile, live: Live) -> Iterator[Mismatch]:
    """Yield accounts, QOS, reservations and licences of partitions and phases that Slurm or this user has not.

    Those of roles are found with the roles.
    """
    tests = {"account": ("Q002", named.account), "qos": ("Q001", named.qos), "reservation": ("R004", named.reservation),
             "licenses": ("L001", named.licenses)}  # fmt: skip
    for key, (check, why_not) in tests.items():
        for place, value in _said(profile, key):
            if message := why_not(live, value):
                yield Mismatch(check, place, message)


def _said(profile: Profile, key: str) -> Iterator[tuple[str, str]]:
    """Yield (place, value) wherever a profile says a key of partitions and phases."""
    for group in ("partitions", "phases"):
        for name, entry in getattr(profile, group).items():
            if (value := getattr(entry, key)) is not None:
                yield f"{group}.{name}.{key}", value


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None
