"""What a live cluster is: partitions, nodes, reservations, licences, and this user's accounts, QOS and limits, asked
once.
"""

import grp
import os
import pwd
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from slurm.client import ACCOUNTING_LIMIT_S, Slurm, SlurmError
from slurm.printed import parse_keys, parse_minutes, parse_seconds
from slurm.profile.places import GRES, items

ASSOCIATION = ("Account", "User", "QOS", "DefaultQOS", "MaxWall", "MaxTRES", "GrpTRES")
QUALITY = ("Name", "Flags", "GraceTime", "MaxWall", "MaxTRES", "MaxTRESPU", "MaxTRESPA", "GrpTRES", "MinTRES")
AWAY = (
    "DOWN",
    "DRAIN",
    "DRAINED",
    "DRAINING",
    "FAIL",
    "FAILING",
    "ERROR",
    "INVAL",
    "FUTURE",
)
ENFORCED = {  # AccountingStorageEnforce has one of these
    "associations": ("associations", "limits", "qos", "safe", "wckeys", "all"),
    "limits": ("limits", "safe", "all"),
    "qos": ("qos", "all"),
}
UNSPOKEN = ("", "N/A", "(null)", "NONE")  # Slurm's ways to say none


@dataclass(frozen=True)
class LiveNode:
    """One node as `scontrol show node` prints it."""

    name: str
    partitions: list[str]
    cpus: int
    mem_mib: int
    gres: str  # without sockets: "gpu:h100:8,nvme:1"; "" for none
    features: list[str]
    state: str = "IDLE"  # "IDLE+DRAIN", "DOWN*"

    @property
    def gpus(self) -> list[tuple[str, int]]:
        """(type or "", count) of each kind of GPU."""
        return [(kind, count) for name, kind, count in items(self.gres) if name == "gpu"] if self.gres else []

    @property
    def is_away(self) -> bool:
        """Whether it is down, drained or failed, so that no job starts there. One that has not answered yet, as right
        after a restart of the controller (UNKNOWN, IDLE*), may well be there; else Slurm soon says DOWN."""
        return any(word in AWAY for word in re.split(r"[+*~#!%$@^-]", self.state))

    def count(self, resource: str, kind: str = "") -> int:
        """Return how many it has of a generic resource, of one type where that is said."""
        have = items(self.gres) if self.gres else []
        return sum(count for name, own, count in have if name == resource and (not kind or own == kind))


@dataclass(frozen=True)
class Limit:
    """What an association or a QOS allows jobs; `tres` are Slurm's words: "node", "cpu", "mem" (MiB), "gres/gpu"."""

    of: str  # whose it is, in Slurm's words: "QOS small (MaxTRESPerJob)"
    account: str | None = None  # it is about jobs of this account; None: of any
    qos: str | None = None
    minutes: int | None = None
    tres: dict[str, int] = field(default_factory=dict)
    is_least: bool = False  # the job must have at least that


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
    default_account: str = ""
    default_qos: dict[str, str] = field(default_factory=dict)  # account -> that of its jobs that say none
    qos_flags: dict[str, list[str]] = field(default_factory=dict)
    grace_s: dict[str, int] = field(default_factory=dict)  # QOS -> what its jobs have after they are preempted
    limits: list[Limit] = field(default_factory=list)  # none where Slurm does not enforce them

    def nodes_of(self, partition: str) -> list[LiveNode]:
        """Return the nodes of a partition."""
        return [node for node in self.nodes if partition in node.partitions]

    def enforces(self, what: str) -> bool:
        """Return whether Slurm holds jobs to its "associations", "limits" or "qos"; some words imply others."""
        words = self.configuration.get("AccountingStorageEnforce", "").lower().split(",")
        return any(word in words for word in ENFORCED[what])


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
    user = user_name()

    def rows(fields: tuple[str, ...], *what: str) -> list[dict[str, str]]:
        command = ["sacctmgr", "--noheader", "--parsable2", "show", *what, f"format={','.join(fields)}"]
        printed = slurm.run(command, ACCOUNTING_LIMIT_S)
        return [dict(zip(fields, line.split("|"), strict=False)) for line in printed.splitlines()]

    try:
        default = rows(("DefaultAccount",), "user", "where", f"name={user}")
        own = rows(ASSOCIATION, "assoc", "where", f"user={user}")
        names = list(dict.fromkeys(row["Account"] for row in own))
        above = rows(ASSOCIATION, "assoc", "where", f"account={','.join(names)}", "user=") if names else []
        qualities = rows(QUALITY, "qos")
    except SlurmError:
        return
    live.qos, live.accounts = [row["Name"] for row in qualities], {}
    live.default_account = next((row["DefaultAccount"] for row in default), "")
    for row in own:
        live.accounts.setdefault(row["Account"], []).extend(filter(None, row["QOS"].split(",")))
        live.default_qos.setdefault(row["Account"], row["DefaultQOS"])
    for row in qualities:
        live.qos_flags[row["Name"]] = [flag for flag in row["Flags"].split(",") if flag]
        live.grace_s[row["Name"]] = seconds_of(row["GraceTime"])
    if live.enforces("limits"):
        live.limits = [*_of_associations([*own, *above]), *_of_qualities(qualities)]


def _of_associations(rows: Iterable[dict[str, str]]) -> list[Limit]:
    """Return the limits of a user's associations, and of the accounts that these belong to."""
    limits = []
    for row in rows:
        whose = f"account {row['Account']}" + (f" for {row['User']}" if row["User"] else "")
        account = row["Account"]
        if (minutes := minutes_of(row["MaxWall"])) is not None:
            limits.append(Limit(f"{whose} (MaxWallDurationPerJob)", account, minutes=minutes))
        for key, name in (("MaxTRES", "MaxTRESPerJob"), ("GrpTRES", "GrpTRES")):
            if tres := tres_of(row[key]):
                limits.append(Limit(f"{whose} ({name})", account, tres=tres))
    return limits


def _of_qualities(rows: Iterable[dict[str, str]]) -> list[Limit]:
    """Return the limits of QOS on one job; what a user or an account may have at once is one too."""
    limits = []
    for row in rows:
        whose, qos = f"QOS {row['Name']}", row["Name"]
        if (minutes := minutes_of(row["MaxWall"])) is not None:
            limits.append(Limit(f"{whose} (MaxWallDurationPerJob)", qos=qos, minutes=minutes))
        for key, name in (
            ("MaxTRES", "MaxTRESPerJob"), ("MaxTRESPU", "MaxTRESPerUser"), ("MaxTRESPA", "MaxTRESPerAccount"),
            ("GrpTRES", "GrpTRES"), ("MinTRES", "MinTRESPerJob"),
        ):  # fmt: skip
            if tres := tres_of(row[key]):
                limits.append(Limit(f"{whose} ({name})", qos=qos, tres=tres, is_least=key == "MinTRES"))
    return limits


def tres_of(text: str) -> dict[str, int]:
    """Return {resource: most} of "cpu=64,gres/gpu=8,mem=100G,node=2", memory in MiB; what is no whole number is left
    out.
    """
    found = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        number = re.fullmatch(r"(\d+)([KMGT]?)", value)
        if number is None:
            continue
        scale = {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024 * 1024}[number[2]] if name == "mem" else 1
        found[name] = int(int(number[1]) * scale)
    return found


def user_name() -> str:
    """Return the name of the user who asks."""
    return pwd.getpwuid(os.geteuid()).pw_name


def user_groups() -> list[str]:
    """Return the names of the groups of the user who asks; those without a name are left out."""
    names = []
    for number in dict.fromkeys([os.getegid(), *os.getgroups()]):
        try:
            names.append(grp.getgrgid(number).gr_name)
        except KeyError:
            continue
    return names


def _node(row: dict[str, str]) -> LiveNode:
    return LiveNode(
        name=row["NodeName"],
        partitions=row.get("Partitions", "").split(","),
        cpus=int(row.get("CPUTot", 1)),
        mem_mib=int(row.get("RealMemory", 1)),
        gres=_readable(row.get("Gres", "")),
        features=[word for word in row.get("AvailableFeatures", "").split(",") if word],
        state=row.get("State", "UNKNOWN"),
    )


def _readable(gres: str) -> str:
    """Return the items that have a name and a count; sockets in parentheses and flags go ("gpu:8)."""
    listed = re.sub(r"\([^)]*\)", "", gres).replace(":no_consume", "").split(",")
    return ",".join(item for item in listed if GRES.fullmatch(item))


def minutes_of(text: str) -> int | None:
    """Return the minutes of a limit as Slurm prints it, None for no limit."""
    return None if text in ("UNLIMITED", *UNSPOKEN) else parse_minutes(text)


def seconds_of(text: str) -> int:
    """Return the seconds of a grace time as scontrol ("30") and sacctmgr ("00:00:30") print it, 0 for none."""
    return 0 if text in UNSPOKEN else parse_seconds(text)
