"""Does what `afterok cluster ACTION` says of the rehearsal cluster of this machine."""

import argparse
import os
import shlex
from typing import TYPE_CHECKING, Any

from data_tools.mistake import UserMistake
from launchers.verbs.said import print_json

if TYPE_CHECKING:
    from slurm.dev.cluster import DevCluster


def _dev_cluster(args: argparse.Namespace) -> "DevCluster":
    from slurm.dev import cluster as devcluster

    return devcluster.DevCluster(args.prefix or devcluster.default_prefix())


def do_cluster_up(args: argparse.Namespace) -> int:
    from slurm.dev import cluster as devcluster

    prefix = args.prefix or devcluster.default_prefix()
    cluster = devcluster.up(prefix, args.nodes, args.gpus_per_node, accounting=args.dbd)
    if args.json:
        return print_json(cluster.status())
    with_ = " with accounting" if args.dbd else ""
    print(f"up: {args.nodes} nodes × {args.gpus_per_node} fake GPUs{with_} in {cluster.prefix}")
    if args.prefix:
        inside = f"afterok cluster exec --prefix {shlex.quote(str(cluster.prefix))}"  # also where it is the usual one
        print(f"use it: `{inside} afterok run PIPELINE`, or `{inside} squeue`")
    else:
        print("use it: `afterok run PIPELINE cluster=dev`, or `afterok cluster exec squeue`")
    return 0


def do_cluster_down(args: argparse.Namespace) -> int:
    cluster = _dev_cluster(args)
    cluster.down()
    if args.json:
        return print_json({"prefix": str(cluster.prefix), "up": False})
    print(f"down: {cluster.prefix}")
    return 0


def do_cluster_status(args: argparse.Namespace) -> int:
    cluster = _dev_cluster(args)
    status = cluster.status()
    if args.json:
        return print_json(status)
    print("\n".join(_told(status, _command(cluster, "up"))))
    return 0


def _command(cluster: "DevCluster", action: str) -> str:
    """Return the command that does something with a rehearsal cluster, its prefix where that is not the usual one."""
    from slurm.dev.cluster import command

    return command(cluster.prefix, action)


def _told(status: dict[str, Any], up: str) -> list[str]:
    """Return the status of a rehearsal cluster in lines for people; the command `up` starts it."""
    lines = [f"{'up' if status['up'] else 'not up'}: {status['prefix']}"]
    if not status["up"]:
        lines[0] += f"; start it with `{up}`"
    if shape := status["shape"]:
        size = f"{shape['cpus']} CPUs, {shape['memory_mib'] / 1024:,.0f} GiB and {shape['gpus_per_node']} fake GPUs"
        accounting = ", with accounting" if shape["accounting"] else ""
        lines.append(f"shape: {shape['nodes']} nodes, each of {size}{accounting}")
    if status["settings"]:
        lines.append(f"settings: {', '.join(f'{name}={value}' for name, value in status['settings'].items())}")
    by_state: dict[str, list[str]] = {}
    for node, state in status["nodes"].items():
        by_state.setdefault(state, []).append(node)
    if by_state:
        lines.append(f"nodes: {'; '.join(f'{state}: ' + ', '.join(nodes) for state, nodes in by_state.items())}")
    alive = [f"{name} ({told['pid']})" for name, told in status["daemons"].items() if told["alive"]]
    gone = [name for name, told in status["daemons"].items() if not told["alive"]]
    lines += [f"daemons (pid): {', '.join(alive)}"] if alive else []
    lines += [f"daemons that ended: {', '.join(gone)}"] if gone else []
    return [*lines, f"slurm.conf: {status['conf']}"]


def do_cluster_exec(args: argparse.Namespace) -> int:
    cluster = _dev_cluster(args)
    if not cluster.is_up():
        raise UserMistake(f"the dev cluster in {cluster.prefix} is not up; start it: {_command(cluster, 'up')}")
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UserMistake(f"name a command: {_command(cluster, 'exec')} squeue")
    try:
        os.execvpe(command[0], command, cluster.env())
    except FileNotFoundError:
        raise UserMistake(f"no command {command[0]!r} in PATH") from None
