"""What a live cluster has against a job is found before it is sent, each by the id of its check, with both values."""

import dataclasses
from datetime import datetime

import pytest

from data_tools.mistake import Problem
from slurm.checks import CHECKS, NOTE, REFUSAL, WARNING, is_waivable, sort_out, waiver_problems
from slurm.profile.schema import Resources
from slurm.verify import asked
from slurm.verify.asked import findings
from slurm.verify.live import Limit, LiveNode, tres_of
from slurm.verify.named import nodes_in
from tests.slurm.test_verify import live

NOW = datetime(2026, 11, 30, 12, 0, 0)
BEGUN = "2026-11-30T11:00:00"  # before NOW
GOOD = Resources(
    role="train", partition="gpu", nodes=2, ranks_per_node=8, gpus_per_node=8, gpu=None, gpu_mem_gib=None,
    cpus_per_task=12, mem_gib=1000, time_minutes=600, account="llm", qos="high", constraint="sxm", extra_sbatch={},
    gres="gpu:h100:8", licenses="lustre:2",
)  # fmt: skip


def found(cluster=None, now=NOW, **said):
    return findings(dataclasses.replace(GOOD, **said), cluster or live(), "w", now)


def with_partition(**keys):
    cluster = live()
    cluster.partitions["gpu"] |= keys
    return cluster


def reserved(name="upkeep", start="2026-11-30T18:00:00", end="2026-11-30T20:00:00", nodes="h[1-2],a1", **keys):
    cluster = live()
    said = {"StartTime": start, "EndTime": end, "Nodes": nodes, "Flags": "MAINT", "NodeCnt": "3"}
    cluster.reservations[name] = said | {"Users": "(null)", "Accounts": "(null)"} | keys
    return cluster


def without(*away):
    cluster = live()
    cluster.nodes = [
        dataclasses.replace(node, state="IDLE+DRAIN" if node.name in away else node.state) for node in cluster.nodes
    ]
    return cluster


def limited(*limits):
    cluster = live()
    cluster.limits = list(limits)
    return cluster


def test_a_job_that_fits_has_nothing_against_it():
    assert found() == []


CASES = [
    ("P001", "partition", {"partition": "gqu"}, "it has all, cpu, gpu"),
    ("P002", "time", {"time_minutes": 3000}, "2-02:00:00, but Slurm's MaxTime of gpu is 2-00:00:00: Slurm would take"),
    ("P003", "nodes", {"nodes": 3}, "3, but 2 of the 3 nodes of gpu have all that is asked of a node"),
    ("P003", "nodes", {"nodes": 3, "constraint": "ib"}, "3, but 2 of the 3 nodes of gpu have all that is asked"),
    ("P003", "nodes", {"cluster": with_partition(MaxNodes="1")}, "MaxNodes of gpu is 1"),
    ("P003", "nodes", {"cluster": with_partition(MinNodes="4")}, "MinNodes of gpu is 4"),
    ("P005", "gres", {"gres": "gpu:h200:8"}, "8 gpu:h200 a node, but the nodes of gpu have 0 at most (gpu:h100:8)"),
    ("P005", "gpus_per_node", {"gres": None, "gpus_per_node": 9}, "9 gpu a node"),
    ("P006", "cpus_per_task", {"cpus_per_task": 13}, "104 a node, but the nodes of gpu have 96"),
    ("P006", "cpus_per_task", {"cluster": with_partition(MaxCPUsPerNode="64")}, "MaxCPUsPerNode of gpu is 64"),
    ("P006", "mem_gib", {"mem_gib": 1901}, "1901 GiB, but the nodes of gpu have 1900"),
    ("P007", "account", {"cluster": with_partition(AllowAccounts="a,b")}, "llm, but gpu has AllowAccounts=a,b"),
    ("P007", "qos", {"cluster": with_partition(AllowQos="normal")}, "high, but gpu has AllowQos=normal"),
    ("P007", "partition", {"cluster": with_partition(AllowGroups="hpc")}, "AllowGroups=hpc, and yours are"),
    ("P008", "partition", {"cluster": with_partition(State="DOWN")}, "would wait until it is up again"),
    ("P009", "constraint", {"constraint": "sxm&pcie"}, "pcie: no node has it; their features: ib, sxm"),
    ("P010", "gres", {"gres": "gpu:h100:8,nvme:1"}, "1 nvme a node, but the nodes of gpu have 0 at most"),
    ("P011", "nodes", {"cluster": without("h2")}, "of the 2 nodes of gpu that fit 1 are up (h2 IDLE+DRAIN)"),
    ("P012", "partition", {"cluster": with_partition(State="INACTIVE")}, "takes no jobs"),
    ("Q001", "qos", {"qos": "hihg"}, "no such QOS; it has normal, high, root"),
    ("Q001", "qos", {"qos": "root"}, "you may not have it; yours are high, normal"),
    ("Q001", "qos", {"account": "guest"}, "you may not have it with account guest; there yours are normal"),
    ("Q002", "account", {"account": "lmm"}, "you may not charge it; yours are guest, llm"),
    ("Q003", "time", {"cluster": limited(Limit("QOS high (MaxWall)", qos="high", minutes=60))}, "is 1:00:00"),
    ("Q003", "gpus_per_node", {"cluster": limited(Limit("account llm (GrpTRES)", "llm", tres={"gres/gpu": 8}))},
     "the job has gres/gpu=16 in all, and account llm (GrpTRES) allows at most gres/gpu=8"),
    ("Q003", "nodes", {"cluster": limited(Limit("QOS high (MinTRES)", qos="high", tres={"node": 4}, is_least=True))},
     "wants at least node=4"),
    ("R004", "reservation", {"reservation": "cours"}, "no such reservation; it has course"),
    ("R004", "reservation",
     {"cluster": reserved(Users="somebody,else"), "reservation": "upkeep", "time_minutes": 60}, "somebody, else"),
    ("R004", "reservation",
     {"cluster": reserved(Accounts="phys"), "reservation": "upkeep", "time_minutes": 60}, "for the accounts phys"),
    ("R005", "nodes",
     {"cluster": reserved(NodeCnt="1"), "reservation": "upkeep", "time_minutes": 60}, "the reservation upkeep has 1"),
    ("R005", "time", {"cluster": reserved(), "reservation": "upkeep"}, "10:00:00, but the reservation upkeep ends at "
     "2026-11-30T20:00:00, when Slurm kills its jobs; ask for at most 2:00:00"),
    ("R005", "cpus_per_task", {"cluster": reserved(TRES="cpu=100"), "reservation": "upkeep", "time_minutes": 60},
     "192 CPUs in all, but the reservation upkeep has 100"),
    ("R004", "reservation", {"cluster": reserved(Groups="hpc"), "reservation": "upkeep", "time_minutes": 60},
     "upkeep is for the groups hpc"),
    ("L001", "licenses", {"licenses": "lustre:3,matlab"}, "lustre:3, matlab: Slurm has not that many; it has lustre:2"),
    ("V001", "time", {"cluster": reserved()}, "10:00:00, and the maintenance upkeep has 2 of the 2 nodes that fit from "
     "2026-11-30T18:00:00 to 2026-11-30T20:00:00: the job would wait for its end; ask for at most 6:00:00"),
    ("V001", "time", {"cluster": reserved(nodes="h1", Flags="SPEC_NODES")}, "the reservation upkeep has 1 of the 2"),
    ("V001", "time", {"cluster": reserved(nodes="h1", TRES="cpu=1")}, "the maintenance upkeep has 1 of the 2"),
    ("V001", "time", {"cluster": reserved(start=BEGUN, Flags="MAGNETIC", Users="somebody")}, "the job would wait for"),
    ("V001", "time", {"cluster": reserved(start=BEGUN, Flags="MAGNETIC", Users="ada")}, "10:00:00, and the reservation "
     "upkeep (MAGNETIC) takes your jobs in and ends at 2026-11-30T20:00:00, when Slurm kills them; ask for at most "
     "8:00:00, or wait for its end"),
]  # fmt: skip


@pytest.mark.parametrize(
    "check, key, said, words", CASES, ids=[f"{case[0]}-{place}" for place, case in enumerate(CASES)]
)
def test_each_check_finds_what_is_asked_wrongly(monkeypatch, check, key, said, words):
    monkeypatch.setattr(asked, "user_name", lambda: "ada")
    problems = found(**said)
    assert [(problem.check, problem.where) for problem in problems] == [(check, f"w.{key}")], problems
    assert words in problems[0].message


@pytest.mark.parametrize(
    "cluster",
    [
        reserved(end="2026-11-30T11:00:00"),  # over
        reserved(start="2026-11-30T22:00:00", end="2026-12-01T00:00:00"),  # begins as the job ends
        reserved(nodes="a1"),  # nodes that the job could not have
        reserved(nodes="(null)", Flags=""),  # of licences alone
        reserved(nodes="h1", TRES="cpu=9"),  # of some cores: those of h2 and 87 of h1 are left
        reserved(nodes="h[1-2]", TRES="cpu=105"),  # where all of one's are taken, 87 of the other's are left at most
        reserved(start=BEGUN, end="2026-12-01T00:00:00", Flags="SPEC_NODES,MAGNETIC"),  # takes the job in
    ],
)
def test_a_reservation_that_leaves_the_job_its_nodes_is_no_hindrance(cluster):
    assert found(cluster, cpus_per_task=10) == []


@pytest.mark.parametrize("flags", ["MAINT,IGNORE_JOBS,SPEC_NODES,ALL_NODES", "FLEX", "MAGNETIC", "IGNORE_JOBS,OVERLAP"])
def test_whatever_its_flags_a_reservation_that_a_job_does_not_name_is_in_its_way(flags):
    (problem,) = found(reserved(Flags=flags))
    assert problem.check == "V001"


def test_the_longest_time_that_fits_is_until_too_few_nodes_are_left():
    cluster = reserved(nodes="h1")
    later = {"StartTime": "2026-11-30T20:00:00", "EndTime": "2026-11-30T23:00:00", "Nodes": "h2"}
    cluster.reservations["later"] = cluster.reservations["upkeep"] | later
    for nodes, remedy in ((1, "at most 8:00:00 to run before it"), (2, "at most 6:00:00 to run before it")):
        (problem,) = found(cluster, nodes=nodes)
        assert problem.check == "V001" and problem.message.endswith(remedy)


def test_what_passes_by_is_asked_of_a_moment_only():
    assert found(without("h2"), now=None) == [] == found(reserved(), now=None)


def test_flags_of_a_qos_let_its_jobs_beyond_the_partition():
    cluster = with_partition(MaxNodes="1", MaxTime="60")
    assert {problem.check for problem in found(cluster)} == {"P002", "P003"}
    cluster.qos_flags = {"high": ["PartitionTimeLimit", "PartitionMaxNodes"]}
    assert found(cluster) == []


def test_the_default_account_and_its_qos_count_where_a_job_says_none():
    cluster = with_partition(AllowQos="normal")
    cluster.default_account, cluster.default_qos = "llm", {"llm": "high"}
    assert [problem.check for problem in found(cluster, account=None, qos=None)] == ["P007"]


def test_what_slurm_does_not_enforce_refuses_nothing():
    cluster = live()
    cluster.configuration["AccountingStorageEnforce"] = "none"
    cluster.partitions["gpu"]["AllowQos"] = "ALL"
    assert found(cluster, account="nobody", qos="hihg") == []
    cluster.configuration["AccountingStorageEnforce"] = "safe"  # which implies associations and limits
    assert [problem.check for problem in found(cluster, account="nobody", qos="hihg")] == ["Q002"]


def test_nodes_are_read_as_slurm_lists_them():
    every = [f"n{number}" for number in range(1, 12)] + ["r1n01", "r2n02", "login"]
    assert nodes_in("n[1-3,7],login", every) == ["n1", "n2", "n3", "n7", "login"]
    assert nodes_in("r[1-2]n[01-02]", every) == ["r1n01", "r2n02"]
    assert nodes_in("ALL", every) == every and nodes_in("(null)", every) == []


@pytest.mark.parametrize(
    "state, away",
    [("IDLE", False), ("MIXED", False), ("IDLE~", False), ("ALLOCATED+RESERVED", False), ("IDLE+MAINTENANCE", False),
     ("DOWN", True), ("IDLE*", False), ("DOWN*+DRAIN", True), ("MIXED+DRAIN", True),
     ("IDLE+NOT_RESPONDING", False), ("UNKNOWN", False)],
)  # fmt: skip
def test_a_node_is_away_as_its_state_says(state, away):
    assert LiveNode("n", [], 1, 1, "", [], state).is_away is away


def test_trackable_resources_are_read_with_their_units():
    assert tres_of("cpu=64,gres/gpu=8,mem=100G,node=2,gres/gpu:h100=4") == {
        "cpu": 64, "gres/gpu": 8, "mem": 102400, "node": 2, "gres/gpu:h100": 4,
    }  # fmt: skip
    assert tres_of("") == {}


def test_refusals_stay_warnings_go_by_id_and_notes_refuse_nothing():
    problems = [Problem("a", "b", "P002"), Problem("a", "b", "V001"), Problem("a", "b", "H001"), Problem("a", "b")]
    assert sort_out(problems, {"V001", "P002"}) == ([problems[0], problems[3]], [problems[1]], [problems[2]])
    assert {check.severity for check in CHECKS.values()} == {REFUSAL, WARNING, NOTE}
    for check in CHECKS:
        assert bool(waiver_problems([check], "w")) != is_waivable(check)
    (unknown,) = waiver_problems(["V01"], "w")
    assert "did you mean V001?" in unknown.message
    (refused,) = waiver_problems(["V001"], "w", ["V001"], "Ask us.")
    assert str(refused).startswith("w: Ask us (the admin lets nobody waive V001 (no maintenance")
