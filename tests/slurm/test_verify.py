"""Each disagreement of a profile and a cluster has one check, which tells both values; a draft has none."""

import dataclasses
from datetime import datetime

import pytest

from slurm.checks import CHECKS, NOTE
from slurm.profile import files
from slurm.verify.checks import mismatches
from slurm.verify.draft import draft, text
from slurm.verify.live import Live, LiveNode, _readable

H100 = LiveNode("h1", ["gpu", "all"], 96, 1945600, "gpu:h100:8", ["ib", "sxm"])
A100 = LiveNode("a1", ["gpu", "all"], 64, 512000, "gpu:a100:4,nvme:2", ["ib"])
CPU = LiveNode("c1", ["cpu", "all"], 128, 256000, "", ["big"])


def live():
    up = {"State": "UP", "MaxTime": "2-00:00:00", "MaxNodes": "UNLIMITED", "AllowAccounts": "ALL", "AllowQos": "ALL"}
    return Live(
        partitions={
            "gpu": up | {"PartitionName": "gpu", "AllowQos": "normal,high", "PreemptMode": "CANCEL"},
            "cpu": up | {"Default": "YES", "MaxNodes": "1", "DenyAccounts": "guest"},
            "all": up | {"State": "DOWN", "MaxTime": "UNLIMITED"},
        },
        nodes=[H100, dataclasses.replace(H100, name="h2"), A100, CPU],
        reservations={"course": {}},
        licenses={"lustre": 2},
        configuration={
            "ClusterName": "big",
            "MaxArraySize": "1001",
            "SLURM_VERSION": "22.05.8",
            "AccountingStorageEnforce": "associations,limits,qos",
        },
        accounts={"llm": ["normal", "high"], "guest": ["normal"]},
        qos=["normal", "high", "root"],
    )


GOOD = """\
partitions:
  gpu:
    max_time: 2-0
    max_nodes: 3
    account: llm
    qos: high
    node_types:
      h100: {gres: gpu:h100:8, max_nodes: 2, mem_gib: 1900, cpus: 96, constraint: sxm}
      a100: {gres: gpu:a100:4, max_nodes: 1, mem_gib: 500}
  cpu: {max_time: 1-0, max_nodes: 1, cpus: 128, mem_gib: 250, gpus_per_node: 0, account: llm}
roles:
  train: {partition: gpu, gpus_per_node: 8}
  eval: {partition: gpu, gres: "gpu:a100:4,nvme:2", reservation: course}
  cpu: {partition: cpu, licenses: lustre:2, time: 1:00:00}
max_array_size: 1001
"""


def found(tmp_path, text_):
    path = tmp_path / "p.yaml"
    path.write_text(text_)
    return [(fault.check, fault.key, fault.message) for fault in mismatches(files.load(str(path)), live())]


def test_a_profile_that_is_right_has_no_mismatch(tmp_path):
    assert found(tmp_path, GOOD) == []


@pytest.mark.parametrize(
    "before, after, check, key, words",
    [
        (
            "  cpu: {max_time: 1-0",
            "  cqu: {max_time: 1-0",
            "P001",
            "partitions.cqu",
            "no partition cqu; it has all, cpu",
        ),
        (
            "max_time: 2-0",
            "max_time: 2-1",
            "P002",
            "partitions.gpu.max_time",
            "2-1, but Slurm's MaxTime of gpu is 2-00",
        ),
        ("max_nodes: 3", "max_nodes: 4", "P003", "partitions.gpu.max_nodes", "4, but gpu has 3 nodes"),
        (
            "max_time: 1-0, max_nodes: 1",
            "max_nodes: 2",
            "P003",
            "partitions.cpu.max_nodes",
            "MaxNodes 1; write at most 1",
        ),
        (
            "max_nodes: 2, mem",
            "max_nodes: 3, mem",
            "P003",
            "partitions.gpu.node_types.h100.max_nodes",
            "has 2 of these",
        ),
        ("max_array_size: 1001", "max_array_size: 1002", "P004", "max_array_size", "at most"),
        ("gres: gpu:h100:8", "gres: gpu:h200:8", "P005", "partitions.gpu.node_types.h100.gres", "gpu:h100:8"),
        (
            "gres: gpu:a100:4",
            "gres: gpu:a100:8",
            "P005",
            "partitions.gpu.node_types.a100.gpus_per_node",
            "have 4 at most",
        ),
        ("cpus: 96", "cpus: 97", "P006", "partitions.gpu.node_types.h100.cpus", "97 CPUs"),
        ("mem_gib: 250", "mem_gib: 251", "P006", "partitions.cpu.mem_gib", "251 GiB, but the nodes of cpu have 250"),
        ("qos: high", "qos: root", "P007", "partitions.gpu.qos", "root, but gpu has AllowQos=normal,high"),
        (
            "250, gpus_per_node: 0, account: llm",
            "250, account: guest",
            "P007",
            "partitions.cpu.account",
            "DenyAccounts",
        ),
        ("  cpu: {max_time", "  all: {}\n  cpu: {max_time", "P008", "partitions.all", "is DOWN"),
        (
            "constraint: sxm",
            "constraint: sxm&pcie",
            "P009",
            "partitions.gpu.node_types.h100.constraint",
            "pcie: no node",
        ),
        ("nvme:2", "nvme:3", "P010", "roles.eval.gres", "3 nvme a node, but the nodes of gpu have 2 at most"),
        ("qos: high", "qos: hihg", "Q001", "partitions.gpu.qos", "no such QOS; it has normal, high, root"),
        ("gpus_per_node: 8}", "gpus_per_node: 8, qos: root}", "Q001", "roles.train.qos", "you may not have it"),
        ("account: llm\n", "account: lmm\n", "Q002", "partitions.gpu.account", "yours are guest, llm"),
        ("max_nodes: 3", "requeue: true", "R001", "partitions.gpu.requeue", "PreemptMode=CANCEL"),
        ("reservation: course", "reservation: cours", "R004", "roles.eval.reservation", "it has course"),
        ("{max_time: 1-0, max_nodes: 1, cpus: 128", "{cpus: 1", "P003", "roles.cpu.nodes", "MaxNodes of cpu is 1"),
        ("{max_time: 1-0, max_nodes: 1, cpus: 128", "{cpus: 1", "P002", "roles.cpu.time", "3-00:00:00, but Slurm's"),
        ("lustre:2", "lustre:3", "L001", "roles.cpu.licenses", "it has lustre:2"),
    ],
)
def test_each_check_finds_its_mistake_with_both_values(tmp_path, before, after, check, key, words):
    assert before in GOOD
    changed = GOOD.replace(before, after)
    if check == "P001":
        changed = changed.replace("partition: cpu", "partition: cqu")
    if key.startswith("roles.cpu.") and check in ("P002", "P003"):
        changed = changed.replace("time: 1:00:00", "time: 3-0, nodes: 2")
    lines = found(tmp_path, changed)
    assert any(line[:2] == (check, key) and words in line[2] for line in lines), lines
    assert check in CHECKS


def test_what_a_preempted_job_has_to_write_a_checkpoint_is_told(tmp_path):
    (tmp_path / "p.yaml").write_text(GOOD)
    profile, cluster = files.load(str(tmp_path / "p.yaml")), live()
    for kind, grace, qos_grace, checks in (
        ("preempt/partition_prio", "60", {}, ["R003"] * 2),  # of the two roles there
        ("preempt/partition_prio", "90", {}, []),
        ("preempt/qos", "0", {"high": 120}, []),
        ("preempt/qos", "120", {"high": 30}, ["R003"] * 2),
        ("preempt/none", "0", {}, []),
    ):
        cluster.configuration["PreemptType"], cluster.grace_s = kind, qos_grace
        cluster.partitions["gpu"]["GraceTime"] = grace
        found = mismatches(profile, cluster)
        assert [fault.check for fault in found] == checks[:1], (kind, grace)
    assert CHECKS["R003"].severity == NOTE


def test_maintenance_that_a_roles_time_runs_into_is_told_with_what_would_fit_before_it(tmp_path):
    (tmp_path / "p.yaml").write_text(GOOD)
    cluster, now = live(), datetime(2026, 11, 30, 12)
    cluster.reservations["upkeep"] = {
        "StartTime": "2026-11-30T18:00:00", "EndTime": "2026-11-30T20:00:00", "Nodes": "ALL", "Flags": "MAINT",
    }  # fmt: skip
    found = mismatches(files.load(str(tmp_path / "p.yaml")), cluster, now)
    assert [(fault.check, fault.key) for fault in found] == [("V001", "roles.train.time")]  # an hour of cpu fits
    assert "ask for at most 6:00:00 to run before it" in found[0].message
    assert mismatches(files.load(str(tmp_path / "p.yaml")), cluster) == []


def test_a_draft_agrees_with_its_cluster_and_reads_back_equal(tmp_path):
    drafted = draft(live())
    assert mismatches(drafted, live()) == []
    assert set(drafted.partitions) == {"gpu", "cpu"}  # what is down is left out
    kinds = drafted.partitions["gpu"].node_types
    assert {name: (kind.gres, kind.max_nodes, kind.constraint) for name, kind in kinds.items()} == {
        "h100": ("gpu:h100:8", 2, None), "a100": ("gpu:a100:4", 1, None),
    }  # fmt: skip
    roles = {name: (role.partition, role.gpus_per_node, role.cpus_per_task) for name, role in drafted.roles.items()}
    assert roles == {"cpu": ("cpu", 0, 1), **dict.fromkeys(("train", "generate", "eval"), ("gpu", 8, 12))}
    (tmp_path / "big.yaml").write_text(text(drafted, live()))
    assert files.load(str(tmp_path / "big.yaml")) == drafted


def test_kinds_that_nothing_tells_apart_are_no_kinds():
    nodes = [dataclasses.replace(CPU, name="c2", cpus=64, partitions=["cpu"]), CPU]
    cluster = dataclasses.replace(live(), nodes=nodes, partitions={"cpu": live().partitions["cpu"]})
    drafted = draft(cluster)
    assert drafted.partitions["cpu"].node_types == {} and drafted.partitions["cpu"].cpus == 128
    assert mismatches(drafted, cluster) == []


def test_gres_of_a_node_is_read_with_sockets_and_flags():
    assert _readable("gpu:h100:8(S:0-1),nvme:no_consume:2") == "gpu:h100:8,nvme:2"
    assert _readable("(null)") == "" and _readable("gpu:1g.5gb:7") == "gpu:1g.5gb:7"
    assert LiveNode("n", [], 1, 1, "gpu:1g.5gb:7,gpu:a100:1", []).gpus == [("1g.5gb", 7), ("a100", 1)]
