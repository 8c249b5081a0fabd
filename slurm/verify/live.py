"""What a live cluster is: partitions, nodes, reservations, licences, and this user's accounts and QOS, asked once."""

import os
import pwd
import re
from dataclasses import dataclass, field

from slurm.client import ACCOUNTING_LIMIT_S, Slurm, SlurmError
from slurm.printed import parse_keys, parse_minutes
from slurm.profile.places import GRES, items


@dataclass(frozen=True)
class LiveNode:
    """One node as `scontrol show node` prints it."""

    name: str
    partitions: list[str]
    cpus: int
    mem_mib: int
    gres: str  # without sockets: "gpu:h100:8,nvme:1"; "" for none
    features: list[str]

    @property
    def gpus(self) -> list[tuple[str, int]]:
        """(type or "", count) of each kind of GPU."""
        return [(kind, count) for name, kind, count in items(self.gres) if name == "gpu"] if self.gres else []


@dataclass
class Live:
    """A cluster's own words; `accounts` and `qos` are None where it keeps no accounting, or that does not answer."""

    partitions: dict[str, dict[str, str]] = field(default_factory=dict)  # name -> keys of `scontrol show partition`
    nodes: list[LiveNode] = field(default_factory=list)
    reservations: dict[str, dict[str, str]] = field(default_factory=dict)
    licenses: dict[str, int] = field(default_factory=dict)  # name -> how many there are
    configuration: dict[str, str] = field(default_factory=dict)
    accounts: dict[str, list[str]] | None = None  # this user's: account -> the QOS they may have there
    qos: list[str] | None = None  # all there are

    def nodes_of(self, partition: str) -> list[LiveNode]:
        """Return the nodes of a partition."""
        return [node for node in self.nodes if partition in node.partitions]


def ask(slurm: Slurm) -> Live:
    """Return what a cluster says of itself. Raises SlurmError where it does not answer."""

    def rows(what: str) -> list[dict[str, str]]:
        return [parse_keys(line) for line in slurm.run(["scontrol", "show", what, "--oneliner"]).splitlines()]

    live = Live(
        partitions={row["PartitionName"]: row for row in rows("partition") if "PartitionName" in row},
        nodes=[_node(row) for row in rows("node") if "NodeName" in row],
        reservations={row["ReservationName"]: row for row in rows("reservation") if "ReservationName" in row},
        licenses={row["LicenseName"]: int(row.get("Total", 0)) for row in rows("license") if "LicenseName" in row},
        configuration=slurm.configuration(),
    )
    if "slurmdbd" in live.configuration.get("AccountingStorageType", ""):
        _ask_accounting(slurm, live)
    return live


def _ask_accounting(slurm: Slurm, live: Live) -> None:
    user = pwd.getpwuid(os.geteuid()).pw_name
    show = ["sacctmgr", "--noheader", "--parsable2", "show"]
    try:
        own = slurm.run([*show, "assoc", "where", f"user={user}", "format=Account,QOS"], ACCOUNTING_LIMIT_S)
        every = slurm.run([*show, "qos", "format=Name"], ACCOUNTING_LIMIT_S)
    except SlurmError:
        return
    live.qos, live.accounts = every.split(), {}
    for account, _, qos in (line.partition("|") for line in own.splitlines()):
        live.accounts.setdefault(account, []).extend(filter(None, qos.split(",")))


def _node(row: dict[str, str]) -> LiveNode:
    return LiveNode(
        name=row["NodeName"],
        partitions=row.get("Partitions", "").split(","),
        cpus=int(row.get("CPUTot", 1)),
        mem_mib=int(row.get("RealMemory", 1)),
        gres=_readable(row.get("Gres", "")),
        features=[word for word in row.get("AvailableFeatures", "").split(",") if word],
    )


def _readable(gres: str) -> str:
    """Return the items that have a name and a count; sockets in parentheses and flags go ("gpu:8)."""
    listed = re.sub(r"\([^)]*\)", "", gres).replace(":no_consume", "").split(",")
    return ",".join(item for item in listed if GRES.fullmatch(item))


def minutes_of(text: str) -> int | None:
    """Return the minutes of a limit as scontrol prints it, None for no limit."""
    return None if text in ("UNLIMITED", "NONE", "") else parse_minutes(text)
