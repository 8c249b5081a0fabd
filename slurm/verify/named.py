"""Why a name that a profile or a job says means nothing to its live cluster, or nothing to this user; "" where it does.

One function a name; each message has what is said, what there is, and so the remedy.
"""

import re
from collections.abc import Iterable

from slurm.verify.live import Live, LiveNode

ONE_FEATURE = re.compile(r"[\w.-]+(&[\w.-]+)*")  # constraints whose nodes can be told: a feature, or several at once


def no_partition(live: Live, name: str) -> str:
    """Return that Slurm has no partition of this name."""
    return f"Slurm has no partition {name}; it has {', '.join(sorted(live.partitions)) or 'none'}"


def account(live: Live, value: str | None) -> str:
    """Return why this user may not charge an account."""
    if value is None or live.accounts is None or value in live.accounts:
        return ""
    return f"{value}: you may not charge it; yours are {', '.join(sorted(live.accounts)) or 'none'}"


def qos(live: Live, value: str | None, account: str = "") -> str:
    """Return why this user may not have a QOS: there is none, or none of theirs, or not for the account."""
    if value is None or live.accounts is None or live.qos is None:
        return ""
    own = sorted({name for names in live.accounts.values() for name in names})
    if value not in live.qos:
        return f"{value}: Slurm has no such QOS; it has {', '.join(live.qos)}"
    if value not in own:
        return f"{value}: you may not have it; yours are {', '.join(own) or 'none'}"
    theirs = live.accounts.get(account)
    if theirs is not None and value not in theirs:
        return f"{value}: you may not have it with account {account}; there yours are {', '.join(theirs) or 'none'}"
    return ""


def reservation(live: Live, value: str | None) -> str:
    """Return which of the reservations of a list Slurm does not have."""
    wrong = [name for name in (value or "").split(",") if name and name not in live.reservations]
    there = ", ".join(live.reservations) or "none"
    return f"{', '.join(wrong)}: Slurm has no such reservation; it has {there}" if wrong else ""


def licenses(live: Live, value: str | None) -> str:
    """Return which of the licences of a list Slurm has not, or not as often."""
    wrong = []
    for entry in re.split(r"[,;|]", value or ""):
        name, _, count = entry.partition(":")
        if name and live.licenses.get(name, 0) < int(count or 1):
            wrong.append(entry)
    there = ", ".join(f"{name}:{total}" for name, total in live.licenses.items()) or "none"
    return f"{', '.join(wrong)}: Slurm has not that many; it has {there}" if wrong else ""


def features(nodes: Iterable[LiveNode], constraint: str | None) -> str:
    """Return which features of a constraint none of these nodes has."""
    there = sorted({feature for node in nodes for feature in node.features})
    named = re.findall(r"[A-Za-z][\w.-]*", re.sub(r"\*\d+", "", constraint or ""))  # without operators and counts
    missing = [word for word in named if word not in there]
    return f"{', '.join(missing)}: no node has it; their features: {', '.join(there) or 'none'}" if missing else ""


def with_features(nodes: list[LiveNode], constraint: str | None) -> list[LiveNode]:
    """Return the nodes that a constraint leaves; all of them where it is more than features that must all be there."""
    if not constraint or not ONE_FEATURE.fullmatch(constraint):
        return nodes
    return [node for node in nodes if all(word in node.features for word in constraint.split("&"))]


def not_let_in(partition: dict[str, str], key: str, value: str | None) -> str:
    """Return why a partition does not let an account or a QOS in (`key`)."""
    allow, deny = {"account": ("AllowAccounts", "DenyAccounts"), "qos": ("AllowQos", "DenyQos")}[key]
    allowed, denied = partition.get(allow, "ALL"), partition.get(deny, "")
    name = partition.get("PartitionName", "the partition")
    if value and allowed not in ("ALL", "") and value not in allowed.split(","):
        return f"{value}, but {name} has {allow}={allowed}"
    return f"{value}, but {name} has {deny}={denied}" if value and value in denied.split(",") else ""


def nodes_in(nodelist: str, names: Iterable[str]) -> list[str]:
    """Return those of these nodes that Slurm's list of nodes names: "n[1-3,7],login1", "r[1-2]n[01-16]", "ALL"."""
    if nodelist == "ALL":
        return list(names)
    parts = re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    listed = {name for part in parts for name in _hosts(part)}
    return [name for name in names if name in listed]


def _hosts(part: str) -> list[str]:
    """Return the names of one entry of a list of nodes, whatever brackets it has; numbers keep their leading zeros."""
    span = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
    if span is None:
        return [part]
    numbers = []
    for piece in span[2].split(","):
        first, _, last = piece.partition("-")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return [f"{span[1]}{number}{rest}" for number in numbers for rest in _hosts(span[3])]
