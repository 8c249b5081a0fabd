"""Drafts a profile from a live cluster: what Slurm tells of itself, for an admin to add what it cannot tell."""

import dataclasses
from typing import Any

from data_tools.mistake import UserMistake
from slurm.printed import array_limit, format_minutes
from slurm.profile.files import DEFAULT_MINUTES
from slurm.profile.schema import STANDARD_ROLES, Meta, NodeType, Partition, Profile, Role
from slurm.verify.live import Live, LiveNode, minutes_of

HEAD = """\
# Drafted from the cluster {name} (Slurm {version}) by `afterok profile init`. Every number is Slurm's own; read it,
# add what Slurm cannot tell (below), save it as /etc/afterok/profiles.d/{name}.yaml, and run `afterok profile verify`.
"""
TAIL = """\

# What Slurm cannot tell; slurm/profiles/example.yaml explains each key.
# meta: {contact: help@example.org}            # whom a refusal names
# env: {python: /shared/afterok/bin/python, modules: [cuda/12.8]}
# network: {interface: ib0, hca: "mlx5_0,mlx5_1"}
# storage: {scratch: /scratch, node_local: /local}
# policy: {locked: {env.modules: "Ask us."}, bounds: {resources.nodes: {max: 16}}}
"""


def draft(live: Live) -> Profile:
    """Return a profile that says of a cluster what it says of itself: each partition that is up, and the four roles.

    Roles with GPUs get the default partition where it has some, else that with the most.

    Raises:
        UserMistake: no partition is up.
    """
    name = live.configuration.get("ClusterName", "slurm")
    up = {key: row for key, row in live.partitions.items() if row.get("State") == "UP" and live.nodes_of(key)}
    if not up:
        raise UserMistake("the cluster has no partition that is up and has nodes (`scontrol show partition`)")
    profile = Profile(meta=Meta(name=name), max_array_size=array_limit(live.configuration))
    for key, row in up.items():
        profile.partitions[key] = _partition(row, live.nodes_of(key))
    default = next((key for key, row in up.items() if row.get("Default") == "YES"), next(iter(up)))
    gpus = {key: max(_gpus(node) for node in live.nodes_of(key)) for key in up}
    most = default if gpus[default] else max(gpus, key=lambda key: gpus[key])
    for role in STANDARD_ROLES:
        partition = default if role == "cpu" else most
        profile.roles[role] = _role(partition, up[partition], live.nodes_of(partition), with_gpus=role != "cpu")
    return profile


def _gpus(node: LiveNode) -> int:
    return sum(count for _, count in node.gpus)


def _partition(row: dict[str, str], nodes: list[LiveNode]) -> Partition:
    """Return one partition; nodes that differ become kinds where a feature or a type of GPU tells them apart."""
    limit = minutes_of(row.get("MaxTime", ""))
    most = int(row["MaxNodes"]) if row.get("MaxNodes", "").isdigit() else len(nodes)
    kinds: dict[tuple[Any, ...], list[LiveNode]] = {}
    for node in nodes:
        kinds.setdefault((node.cpus, node.mem_mib // 1024, node.gres, tuple(node.features)), []).append(node)
    partition = Partition(
        max_time=None if limit is None else format_minutes(limit),
        max_nodes=min(most, len(nodes)),
        cpus=max(node.cpus for node in nodes),
        mem_gib=max(node.mem_mib for node in nodes) // 1024,
        gpus_per_node=max(map(_gpus, nodes)),
        gres=_gres(nodes[0]) if len({node.gres for node in nodes}) == 1 else None,
    )
    named = {_name(key, kinds): alike for key, alike in kinds.items()}
    if len(kinds) > 1 and "" not in named and len(named) == len(kinds):
        partition.node_types = {
            name: NodeType(
                max_nodes=len(alike),
                cpus=alike[0].cpus,
                mem_gib=alike[0].mem_mib // 1024,
                gpus_per_node=_gpus(alike[0]),
                gres=_gres(alike[0]),
                constraint=None if (_gres(alike[0]) or "").startswith(f"gpu:{name}:") else name,
            )
            for name, alike in named.items()
        }
    return partition


def _gres(node: LiveNode) -> str | None:
    """Return the GPUs of a node by name, None where they have no type or more than one."""
    return f"gpu:{node.gpus[0][0]}:{node.gpus[0][1]}" if len(node.gpus) == 1 and node.gpus[0][0] else None


def _name(key: tuple[Any, ...], kinds: dict[tuple[Any, ...], list[LiveNode]]) -> str:
    """Return what only these nodes have, a type of GPU or a feature; "" for nothing."""
    others = [nodes[0] for other, nodes in kinds.items() if other != key]
    node = kinds[key][0]
    own = [kind for kind, _ in node.gpus if kind and all(kind not in dict(other.gpus) for other in others)]
    own += [feature for feature in node.features if all(feature not in other.features for other in others)]
    return own[0] if own else ""


def _role(partition: str, row: dict[str, str], nodes: list[LiveNode], with_gpus: bool) -> Role:
    """Return a role of one whole node with GPUs, or of one CPU."""
    limit = minutes_of(row.get("MaxTime", "")) or DEFAULT_MINUTES
    largest = max(nodes, key=_gpus)
    gpus = _gpus(largest) if with_gpus else 0
    return Role(
        partition=partition,
        time=format_minutes(min(limit, DEFAULT_MINUTES)),
        gpus_per_node=gpus,
        cpus_per_task=max(largest.cpus // gpus, 1) if gpus else 1,
    )


def text(profile: Profile, live: Live) -> str:
    """Return the draft as a file: only what differs from what an absent key means."""
    import yaml

    version = live.configuration.get("SLURM_VERSION", "of an unknown version")
    body = yaml.safe_dump(_compact(profile), sort_keys=False, width=120, default_flow_style=None)
    return HEAD.format(name=profile.meta.name, version=version) + body + TAIL


def _compact(value: Any) -> Any:
    """Return a dataclass as a mapping of the values that are not its class's own; the name is the file's."""
    if isinstance(value, dict):
        return {key: _compact(entry) for key, entry in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    said = {}
    for field in dataclasses.fields(value):
        entry = getattr(value, field.name)
        own = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if entry != own and not isinstance(entry, Meta):
            said[field.name] = _compact(entry)
    return said
