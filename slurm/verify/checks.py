"""Where a profile and its live cluster disagree: pure functions of both. Each mismatch has the id of its check.

P partitions and nodes, Q accounts and QOS, R what stops and starts jobs, S the scheduler. What only a job on a compute
node can tell (F files, N network, E environment) is asked by launchers/backends/probe.py.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from slurm.printed import array_limit, format_minutes, parse_minutes
from slurm.profile.places import Place, gpus_of, items, places
from slurm.profile.resolve import choices
from slurm.profile.schema import Partition, Profile, Request
from slurm.verify.live import Live, LiveNode, minutes_of

CHECKS = {
    "P001": "the partition exists",
    "P002": "its max_time is at most Slurm's MaxTime",
    "P003": "it has that many nodes, and allows one job that many",
    "P004": "an array may be that long",
    "P005": "its nodes have these GPUs, by this name",
    "P006": "its nodes have that many CPUs and that much memory",
    "P007": "it lets the account and the QOS in",
    "P008": "it is up",
    "P009": "its nodes have the features of the constraint",
    "P010": "its nodes have the other generic resources",
    "Q001": "the QOS exists, and this user may have it",
    "Q002": "this user may charge the account",
    "R001": "a job there may be requeued where the profile says so",
    "R004": "the reservation exists",
    "L001": "the licence exists, as often",
    "F001": "scratch and shared folders are the same on all nodes",
    "F002": "the node-local folder is there, and may be written",
    "N001": "the network interface and the HCA are there",
    "E001": "modules, setup and python of the role work, and the worker starts",
}


@dataclass(frozen=True)
class Mismatch:
    """What a profile says at a place (`key`, dotted), and what its cluster says instead."""

    check: str  # of CHECKS
    key: str
    message: str  # both values and the remedy


def mismatches(profile: Profile, live: Live) -> list[Mismatch]:
    """Return all that a cluster itself can tell to be wrong with its profile."""
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
    found += _roles(profile, live)
    found += _accounts(profile, live)
    found += _named(profile, live)
    found += _other_resources(profile, live)
    return found


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
    for key, allow, deny in (("account", "AllowAccounts", "DenyAccounts"), ("qos", "AllowQos", "DenyQos")):
        said = getattr(partition, key)
        allowed, denied = keys.get(allow, "ALL"), keys.get(deny, "")
        if said is not None and allowed != "ALL" and said not in allowed.split(","):
            yield Mismatch("P007", f"{at}.{key}", f"{said}, but {name} has {allow}={allowed}")
        if said is not None and said in denied.split(","):
            yield Mismatch("P007", f"{at}.{key}", f"{said}, but {name} has {deny}={denied}")
    cancels = keys.get("PreemptMode") == "CANCEL" or live.configuration.get("JobRequeue", "1") == "0"
    if partition.requeue and cancels:
        message = f"true, but {name} has PreemptMode={keys.get('PreemptMode')}, and JobRequeue is "
        yield Mismatch("R001", f"{at}.requeue", message + f"{live.configuration.get('JobRequeue', '1')}; write false")


def _roles(profile: Profile, live: Live) -> Iterator[Mismatch]:
    """Yield what a role asks for and its partition allows nobody, where the profile's own limits do not say so."""
    for name in profile.roles:
        place, wants = choices(profile, Request(role=name))[0]
        keys = live.partitions.get(place.partition or "", {})
        longest = minutes_of(keys.get("MaxTime", ""))
        if place.limits.max_time is None and longest is not None and (wants.time_minutes or 0) > longest:
            message = f"{format_minutes(wants.time_minutes or 0)}, but Slurm's MaxTime of {place.partition} is"
            yield Mismatch("P002", f"roles.{name}.time", f"{message} {format_minutes(longest)}; write at most that")
        there = len(live.nodes_of(place.partition or ""))
        if place.limits.max_nodes is None and there and wants.nodes > there:
            message = f"{wants.nodes}, but {place.partition} has {there}; write at most that"
            yield Mismatch("P003", f"roles.{name}.nodes", message)


def _nodes(at: str, place: Place, nodes: list[LiveNode], constraint: str | None) -> Iterator[Mismatch]:
    """Yield what of a kind of nodes no node of the partition has; the constraint first narrows them down."""
    name, limits = place.partition or "", place.limits
    features = sorted({feature for node in nodes for feature in node.features})
    if missing := [word for word in _features(constraint) if word not in features]:
        message = f"{', '.join(missing)}: no node of {name} has it; their features: {', '.join(features) or 'none'}"
        yield Mismatch("P009", f"{at}.constraint", message)
    elif constraint and re.fullmatch(r"[\w.-]+", constraint):
        nodes = [node for node in nodes if constraint in node.features]
    kind = gpus_of(limits.gres)[0]
    named = [node for node in nodes if not kind or kind in dict(node.gpus)]
    yield from _gpus(at, place, nodes, named)
    yield from _sizes(at, place, named or nodes)


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


def _gpus(at: str, place: Place, nodes: list[LiveNode], named: list[LiveNode]) -> Iterator[Mismatch]:
    """Yield what of a kind of nodes' GPUs is not so; `named` are those of the nodes that have GPUs of its name."""
    name, limits = place.partition, place.limits
    kind, count = gpus_of(limits.gres)
    has = ", ".join(sorted({node.gres or "none" for node in nodes}))
    if not named:
        yield Mismatch("P005", f"{at}.gres", f"{limits.gres}: no node of {name} has gpu:{kind}; they have {has}")
        return
    most = max(sum(number for own, number in node.gpus if not kind or own == kind) for node in named)
    wanted = max(limits.gpus_per_node or 0, count or 0)
    if wanted > most:
        key = "gpus_per_node" if limits.gpus_per_node else "gres"
        yield Mismatch("P005", f"{at}.{key}", f"{wanted} GPUs, but the nodes of {name} have {most} at most ({has})")


def _features(constraint: str | None) -> list[str]:
    """Return the features that a constraint names, without its operators and counts."""
    return re.findall(r"[A-Za-z][\w.-]*", re.sub(r"\*\d+", "", constraint or ""))


def _accounts(profile: Profile, live: Live) -> Iterator[Mismatch]:
    """Yield accounts and QOS that Slurm or this user has not."""
    if live.accounts is None or live.qos is None:
        return
    own = sorted({qos for names in live.accounts.values() for qos in names})
    for key, value in _said(profile, "account"):
        if value not in live.accounts:
            message = f"{value}: you may not charge it; yours are {', '.join(sorted(live.accounts)) or 'none'}"
            yield Mismatch("Q002", key, message)
    for key, value in _said(profile, "qos"):
        if value not in live.qos:
            yield Mismatch("Q001", key, f"{value}: Slurm has no such QOS; it has {', '.join(live.qos)}")
        elif value not in own:
            yield Mismatch("Q001", key, f"{value}: you may not have it; yours are {', '.join(own) or 'none'}")


def _named(profile: Profile, live: Live) -> Iterator[Mismatch]:
    """Yield reservations, licences and generic resources that are not there."""
    for key, value in _said(profile, "reservation"):
        for name in value.split(","):
            if name not in live.reservations:
                there = ", ".join(live.reservations) or "none"
                yield Mismatch("R004", key, f"{name}: Slurm has no such reservation; it has {there}")
    for key, value in _said(profile, "licenses"):
        for entry in re.split(r"[,;|]", value):
            name, _, count = entry.partition(":")
            if live.licenses.get(name, 0) < int(count or 1):
                there = ", ".join(f"{name}:{total}" for name, total in live.licenses.items()) or "none"
                yield Mismatch("L001", key, f"{entry}: Slurm has not that many; it has {there}")


def _other_resources(profile: Profile, live: Live) -> Iterator[Mismatch]:
    """Yield what roles ask for beside GPUs and no node of their partition has."""
    for name, role in profile.roles.items():
        others = [item for item in (items(role.gres) if role.gres else []) if item[0] != "gpu"]
        for partition in dict.fromkeys(place.partition or "" for place in places(profile, Request(role=name))):
            nodes = live.nodes_of(partition)
            for resource, kind, count in others:
                most = max((_count(node, resource, kind) for node in nodes), default=0)
                if nodes and most < count:
                    message = f"{role.gres}: the nodes of {partition} have {most} {resource} at most"
                    yield Mismatch("P010", f"roles.{name}.gres", message)


def _count(node: LiveNode, resource: str, kind: str) -> int:
    have = items(node.gres) if node.gres else []
    return sum(count for name, own, count in have if name == resource and (not kind or own == kind))


def _said(profile: Profile, key: str) -> Iterator[tuple[str, str]]:
    """Yield (place, value) wherever a profile says a key of partitions, roles and phases."""
    for group in ("partitions", "roles", "phases"):
        for name, entry in getattr(profile, group).items():
            if (value := getattr(entry, key)) is not None:
                yield f"{group}.{name}.{key}", value


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None
