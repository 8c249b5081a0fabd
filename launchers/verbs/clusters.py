"""Does what `afterok cluster ACTION` says of the rehearsal cluster of this machine."""

import argparse
import os
import shlex
from typing import TYPE_CHECKING

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
        inside = f"afterok cluster exec --prefix {shlex.quote(str(cluster.prefix))}"
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
    status = _dev_cluster(args).status()
    if args.json:
        return print_json(status)
    for key, value in status.items():
        print(f"{key}: {value}")
    return 0


def do_cluster_exec(args: argparse.Namespace) -> int:
    cluster = _dev_cluster(args)
    if not cluster.is_up():
        raise UserMistake(f"the dev cluster in {cluster.prefix} is not up; start it: afterok cluster up")
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UserMistake("name a command: afterok cluster exec squeue")
    try:
        os.execvpe(command[0], command, cluster.env())
    except FileNotFoundError:
        raise UserMistake(f"no command {command[0]!r} in PATH") from None
