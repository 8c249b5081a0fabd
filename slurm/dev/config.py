"""Configure a dev cluster: its folders, its munge key, slurm.conf and gres.conf.

Settings and their reasons: measured on Debian 12, Slurm 22.05.8.
"""

import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from data_tools.base import durable
from data_tools.base.ports import free_ports
from slurm.dev import accounting

PARTITIONS = ("batch", "long", "preempt")


@dataclass(frozen=True)
class Shape:
    """How large the cluster pretends to be."""

    nodes: int = 4
    gpus_per_node: int = 8
    cpus: int = 64  # of a node
    memory_mib: int = 256000  # of a node
    accounting: bool = False  # with slurmdbd


def configure(prefix: Path, shape: Shape, user: str, settings: dict[str, str]) -> None:
    """Write Slurm's files and the munge key; empty what an earlier cluster left, except its state. `user` runs it."""
    is_root = os.geteuid() == 0
    # root's cluster serves every user of the machine, a user's only that user: it could not change to another one
    prefix.chmod(0o755 if is_root else 0o700)
    for name in ("spool", "log", "run", "dev", "mysql"):
        shutil.rmtree(prefix / name, ignore_errors=True)
    for name in ("etc", "munge", "state", "spool", "log", "run", "dev"):
        (prefix / name).mkdir(exist_ok=True)
        (prefix / name).chmod(0o700 if name in ("munge", "state") else 0o755)
    key = prefix / "munge" / "munge.key"
    key.unlink(missing_ok=True)
    with open(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "wb") as file:
        file.write(secrets.token_bytes(128))
    for number in range(shape.gpus_per_node):
        (prefix / "dev" / f"nvidia{number}").symlink_to("/dev/null")
    nodes = [f"n{number}" for number in range(1, shape.nodes + 1)]
    ports = free_ports(2 + shape.nodes)
    for name in nodes:
        (prefix / "spool" / name).mkdir()
    durable.write_file(
        prefix / "etc" / "slurm.conf", slurm_conf(prefix, shape, user=user, ports=ports, settings=settings)
    )
    durable.write_file(prefix / "etc" / "gres.conf", gres_conf(prefix, shape))
    if shape.accounting:
        path = prefix / "etc" / "slurmdbd.conf"
        durable.write_file(path, accounting.slurmdbd_conf(prefix, user, ports[1]))
        path.chmod(0o600)  # or slurmdbd refuses it


def slurm_conf(prefix: Path, shape: Shape, user: str, ports: list[int], settings: dict[str, str]) -> str:
    """Return the text of slurm.conf; `ports` are the controller's, slurmdbd's and one for each node."""
    keys = {
        "ClusterName": "dev",
        "SlurmctldHost": "localhost(127.0.0.1)",  # independent of the host's name
        "SlurmctldPort": str(ports[0]),
        "SlurmUser": user,
        "SlurmdUser": user,
        "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",  # else every daemon listens on 0.0.0.0
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        "AuthInfo": f"socket={prefix}/run/munge.sock,cred_expire=5",  # cred_expire is also the delay of a requeue
        "StateSaveLocation": f"{prefix}/state",
        "SlurmdSpoolDir": f"{prefix}/spool/%n",
        "SlurmctldPidFile": f"{prefix}/run/slurmctld.pid",
        "SlurmdPidFile": f"{prefix}/run/slurmd-%n.pid",
        "SlurmctldLogFile": f"{prefix}/log/slurmctld.log",
        "SlurmdLogFile": f"{prefix}/log/slurmd-%n.log",
        "SlurmdParameters": "config_overrides",  # accept made-up CPUs and memory
        "ReturnToService": "2",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "GresTypes": "gpu",
        "DefMemPerCPU": "100",
        "JobAcctGatherType": "jobacct_gather/none",
        "SchedulerType": "sched/backfill",
        # a job starts within a second of being able to (the defaults are 30 and 60)
        "SchedulerParameters": "bf_interval=1,sched_interval=1,batch_sched_delay=0,preempt_youngest_first",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "JobRequeue": "1",
        "MinJobAge": "3600",
        "MaxArraySize": "4001",
        "MaxJobCount": "20000",
        # sbatch --export=NONE lets slurmd run a login shell for the user's environment, up to 2 s a job, only as root.
        # 0 reads a cache that is not there: at once, and alike for root and others.
        "GetEnvTimeout": "0",
        "KillWait": "5",
        "SlurmdTimeout": "10",
        "SlurmctldTimeout": "30",
        "MessageTimeout": "30",
        "PropagateResourceLimits": "NONE",
        "SlurmctldDebug": "info",
        "SlurmdDebug": "info",
    }
    if shape.accounting:
        keys.update(accounting.slurm_keys(prefix, ports[1]))
    keys.update(settings)
    lines = [f"{key}={value}" for key, value in keys.items() if value != ""]
    gres = f" Gres=gpu:{shape.gpus_per_node}" if shape.gpus_per_node else ""
    for number, port in enumerate(ports[2:], start=1):
        lines.append(
            f"NodeName=n{number} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={shape.cpus} "
            f"RealMemory={shape.memory_mib} Feature=fake{gres}"
        )
    batch, long, preempt = PARTITIONS
    lines += [
        f"PartitionName={batch} Nodes=ALL Default=YES MaxTime=1-0 DefaultTime=10 PriorityTier=10 PreemptMode=OFF",
        f"PartitionName={long} Nodes=ALL MaxTime=7-0 DefaultTime=60 PriorityTier=5 PreemptMode=OFF",
        f"PartitionName={preempt} Nodes=ALL MaxTime=1-0 DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=0",
    ]
    return "\n".join(lines) + "\n"


def gres_conf(prefix: Path, shape: Shape) -> str:
    """Return the text of gres.conf. Without File= slurmd counts no GPU and drains its node."""
    text = "AutoDetect=off\n"
    if shape.gpus_per_node:
        devices = f"[0-{shape.gpus_per_node - 1}]" if shape.gpus_per_node > 1 else "0"
        text += f"NodeName=n[1-{shape.nodes}] Name=gpu File={prefix}/dev/nvidia{devices}\n"
    return text
