"""Where a phase may run: each partition of its role and each kind of nodes there, in the order they are tried."""

import dataclasses
import re
from dataclasses import dataclass

from slurm.profile.schema import NodeType, Partition, Profile, Request

GRES = re.compile(r"([A-Za-z][\w.-]*)(?::([\w.-]*[A-Za-z_][\w.-]*))?(?::(\d+))?")  # name, type ("1g.5gb"), count

SOCKETS = re.compile(r"\(S:[\d,-]+\)")  # behind an item, as `sinfo -o %G` prints the sockets that it is bound to


@dataclass(frozen=True)
class Place:
    """A partition, or one kind of its nodes; `limits` are the partition's with those of the nodes laid upon them."""

    partition: str | None
    node_type: str | None
    limits: Partition

    @property
    def at(self) -> str:
        """What messages call it."""
        if self.partition is None:
            return "this machine"
        return f"partition {self.partition}" + (f", {self.node_type} nodes," if self.node_type else "")


def places(profile: Profile, request: Request) -> list[Place]:
    """Return the places of a request whose role is known, the first tried first; unknown partitions are left out."""
    if profile.kind == "local":  # a pipeline that names a partition still runs where there is none
        return [Place(None, None, Partition())]
    found = []
    for name in partition_names(profile, request):
        if partition := profile.partitions.get(name):
            found += [Place(name, kind, _laid(partition, nodes)) for kind, nodes in partition.node_types.items()] or [
                Place(name, None, _laid(partition, NodeType()))
            ]
    return found


def partition_names(profile: Profile, request: Request) -> list[str]:
    """Return the partitions of a request: its own, its role's, or the only one; none where there are several."""
    role = profile.roles[request.role]
    if request.partition is not None:
        return [request.partition]
    said = [*([role.partition] if role.partition is not None else []), *role.partitions]
    return said or (list(profile.partitions) if len(profile.partitions) == 1 else [])


def _laid(partition: Partition, nodes: NodeType) -> Partition:
    """Return a partition's limits for one kind of its nodes; GPUs are counted by their gres where nobody says more."""
    own = {key: value for key, value in vars(nodes).items() if value is not None and key != "constraint"}
    if nodes.max_nodes is not None and partition.max_nodes is not None:
        own["max_nodes"] = min(nodes.max_nodes, partition.max_nodes)
    if nodes.gres is not None and nodes.gpus_per_node is None:
        own["gpus_per_node"] = None
    laid = dataclasses.replace(partition, **own)
    if laid.gpus_per_node is None and laid.gres is not None:
        laid.gpus_per_node = gpus_of(laid.gres)[1]
    return laid


def items(gres: str) -> list[tuple[str, str, int]]:
    """Return (name, type or "", count) of each item of a list of generic resources: "gpu:h100:8,nvme".

    Raises:
        ValueError: an item is none.
    """
    found: list[tuple[str, str, int]] = []
    if not gres:
        return found
    for item in SOCKETS.sub("", gres).split(","):
        match = GRES.fullmatch(item.strip())
        if match is None:
            raise ValueError(f"{item!r} is no generic resource of Slurm's; write NAME:COUNT or NAME:TYPE:COUNT")
        found.append((match[1], match[2] or "", int(match[3] or 1)))
    return found


def gpus_of(gres: str | None) -> tuple[str, int | None]:
    """Return (type or "", count) of the GPUs in a list of generic resources; count None where it has none."""
    gpus = [(kind, count) for name, kind, count in items(gres or "") if name == "gpu"]
    return gpus[0] if gpus else ("", None)
