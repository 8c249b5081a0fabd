"""Where a phase goes: the first partition and kind of nodes that it fits, by the names that the site's Slurm has."""

import sys

import pytest

from data_tools.mistake import UserMistake
from slurm.profile import files
from slurm.profile.check import check
from slurm.profile.environments import environment_of, python_here, site_variables, why_not_shared
from slurm.profile.places import gpus_of, items
from slurm.profile.resolve import resolve, with_defaults
from slurm.profile.schema import (
    Container,
    Env,
    Hooks,
    Network,
    Partition,
    Profile,
    Request,
    Role,
    RoleEnv,
    Storage,
    Wishes,
)

MIXED = """\
partitions:
  small: {max_time: 1:00:00, max_nodes: 1, gres: gpu:a100:4, account: a, qos: low, licenses: lustre:1}
  big:
    max_time: 2-0
    max_nodes: 6
    qos: normal
    constraint: ib
    node_types:
      a100: {max_nodes: 4, gres: gpu:a100:4, mem_gib: 500}
      h100: {max_nodes: 8, gres: gpu:h100:8, mem_gib: 1900, constraint: sxm|pcie}
roles:
  train: {partitions: [small, big], gpus_per_node: 4, time: 30}
  cpu: {partition: small, qos: none, gres: nvme:1}
"""


@pytest.fixture
def mixed(tmp_path):
    (tmp_path / "mixed.yaml").write_text(MIXED)
    return files.load(str(tmp_path / "mixed.yaml"))


@pytest.mark.parametrize(
    "asked, partition, node_type, gres, constraint",
    [
        ({}, "small", None, "gpu:a100:4", None),
        ({"nodes": 2}, "big", "a100", "gpu:a100:4", "ib"),
        ({"time": "2:00:00"}, "big", "a100", "gpu:a100:4", "ib"),
        ({"mem_gib": 900, "partition": "big"}, "big", "h100", "gpu:h100:4", "ib&(sxm|pcie)"),
        ({"gpus_per_node": 8}, "big", "h100", "gpu:h100:8", "ib&(sxm|pcie)"),
        ({"nodes": 5}, "big", "h100", "gpu:h100:4", "ib&(sxm|pcie)"),
        ({"gres": "gpu:h100:2,nvme:1"}, "big", "h100", "gpu:h100:2,nvme:1", "ib&(sxm|pcie)"),
        ({"gres": "gpu:2"}, "small", None, "gpu:a100:2", None),
        ({"gpus_per_node": 0}, "small", None, None, None),
        ({"gpus_per_node": 0, "gres": "fpga"}, "small", None, "fpga:1", None),
        ({"nodes": 2, "constraint": "old"}, "big", "a100", "gpu:a100:4", "old"),
    ],
)
def test_the_first_place_that_all_of_it_fits_is_taken(mixed, asked, partition, node_type, gres, constraint):
    got = resolve(mixed, Request("train", **asked))
    assert (got.partition, got.node_type, got.gres, got.constraint) == (partition, node_type, gres, constraint)
    assert check(mixed, Request("train", **asked), "w") == []


def test_what_fits_nowhere_is_told_of_the_first_in_full_and_of_the_others_in_a_word(mixed):
    (problem,) = check(mixed, Request("train", nodes=7), "w")
    assert problem.message == (
        "7 nodes, but partition small has 1; ask for at most 1; nor does it fit partition big, a100 nodes,: "
        "7 nodes, but partition big, a100 nodes, has 4; ask for at most 4; nor does it fit partition big, h100 nodes,: "
        "7 nodes, but partition big, h100 nodes, has 6; ask for at most 6"
    ).replace(" nodes,:", " nodes:")
    (problem,) = check(mixed, Request("cpu", gres="gpu:v100:1"), "w")
    assert str(problem) == "w.gres: partition small has no gpu:v100, but gpu:a100:4; ask for that [P005]"


def test_a_phase_speaks_before_its_role_and_that_before_the_partition(mixed):
    got = resolve(mixed, Request("cpu"))
    assert (got.account, got.qos, got.licenses, got.gres, got.reservation) == ("a", "none", "lustre:1", "nvme:1", None)
    said = {"account": "b", "qos": "high", "reservation": "r", "licenses": "matlab", "constraint": "c", "gres": "x:2"}
    got = resolve(mixed, Request("cpu", **said))
    assert {key: getattr(got, key) for key in said} == said


def test_a_role_that_locks_its_account_keeps_phases_from_saying_another(mixed):
    mixed.roles["cpu"].account = "ours"
    mixed.policy.locked = {"roles.*.account": "Billing is per team.", "partitions.small.qos": ""}
    assert check(mixed, Request("cpu", account="ours", qos="low"), "w") == []
    found = [str(problem) for problem in check(mixed, Request("cpu", account="other", qos="high"), "w")]
    assert found == [
        "w.account: Billing is per team (locked by the admin; it stays 'ours') [A002]",
        "w.qos: locked by the admin; it stays 'low' [A002]",
    ]
    (problem,) = check(mixed, Request("cpu"), "w")  # nor does a role go around the lock of its partition
    assert str(problem) == "w.qos: locked by the admin; it stays 'low' [A002]" and mixed.roles["cpu"].qos == "none"
    mixed.policy.locked |= {"roles.cpu.qos": ""}  # the admin says both
    assert check(mixed, Request("cpu"), "w") == []


@pytest.mark.parametrize(
    "text, where, words",
    [
        ("gres: gpu::8", "partitions.p.gres", "is no generic resource"),
        ("gres: gpu:h100:8, gpus_per_node: 4", "partitions.p.gres", "has 8 GPUs, and gpus_per_node is 4"),
        ("gres: 'gpu:a:4,gpu:b:4'", "partitions.p.gres", "names GPUs twice"),
        ("licenses: a, extra_sbatch: {licenses: b}", "roles.cpu.licenses", "in extra_sbatch too, and one of them"),
        ("node_types: {x: {cpus: 4}}", "partitions.p.node_types.x", "say constraint, or gres with a type"),
    ],
)
def test_gres_that_cannot_be_meant_is_refused(tmp_path, text, where, words):
    path = tmp_path / "p.yaml"
    path.write_text(f"partitions: {{p: {{{text}}}}}\nroles: {{cpu: {{}}}}\n")
    with pytest.raises(UserMistake) as error:
        files.load(str(path))
    assert any(problem.where == f"{path}: {where}" and words in problem.message for problem in error.value.problems)


def test_a_role_says_one_partition_or_several(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("partitions: {p: {}}\nroles: {cpu: {partition: p, partitions: [q]}}\n")
    with pytest.raises(UserMistake) as error:
        files.load(str(path))
    assert "partition is said too" in str(error.value)


def test_gres_is_read_as_slurm_prints_it():
    assert items("gpu:h100:8,nvme,fpga:2") == [("gpu", "h100", 8), ("nvme", "", 1), ("fpga", "", 2)]
    assert gpus_of("nvme:2,gpu:4") == ("", 4) and gpus_of("gpu:h100") == ("h100", 1) and gpus_of(None) == ("", None)


def test_gpus_of_another_name_are_not_taken_for_those_of_the_profile():
    site = Profile(partitions={"p": Partition(gpu="h100", gpu_mem_gib=80)}, roles={"train": Role(gpus_per_node=8)})

    def got(gres):
        resources = resolve(site, Request("train", gres=gres))
        return resources.gpu, resources.gpu_mem_gib

    assert got("gpu:4") == got("gpu:h100:4") == got(None) == ("h100", 80) and got("gpu:v100:4") == ("v100", None)
    site.partitions["p"].gres = "gpu:hopper:8"  # the site's name of its h100
    assert got("gpu:hopper:4") == ("h100", 80)


def test_phase_defaults_stand_between_phase_and_role(mixed):
    mixed.phases = {"sft": Wishes(nodes=2, time="10", gres="gpu:h100:8", qos="normal")}
    got = resolve(mixed, with_defaults(mixed, "sft", Request("train", time="20")))
    assert (got.nodes, got.time_minutes, got.gres, got.qos, got.ranks_per_node) == (2, 20, "gpu:h100:8", "normal", 8)
    assert with_defaults(mixed, "grpo", Request("train")) == Request("train")
    got = resolve(mixed, with_defaults(mixed, "sft", Request("train", gpus_per_node=2, partition="big")))
    assert (got.gpus_per_node, got.gres) == (2, "gpu:a100:2")  # its own number of GPUs, not the default's


def test_a_role_has_its_own_environment_on_top_of_the_profiles():
    profile = Profile(
        roles={"train": Role(), "generate": Role(env=RoleEnv(python="/vllm/bin/python", modules=[], set={"A": "2"}))},
        env=Env(python="/trainer/bin/python", modules=["cuda"], set={"A": "1", "B": "1"}, setup=["ulimit -l"]),
    )
    assert environment_of(profile, "train") == profile.env == environment_of(profile, "unknown")
    own = environment_of(profile, "generate")
    assert (own.python, own.modules, own.set) == ("/vllm/bin/python", [], {"A": "2", "B": "1"})
    assert own.setup == ["ulimit -l"]


def test_network_and_storage_become_variables_and_none_is_said_twice(tmp_path):
    profile = Profile(
        network=Network(interface="=ib0", hca="mlx5_0,mlx5_1"), storage=Storage(scratch="/s", node_local="/n")
    )
    assert site_variables(profile) == {
        "NCCL_SOCKET_IFNAME": "=ib0", "GLOO_SOCKET_IFNAME": "ib0", "NCCL_IB_HCA": "mlx5_0,mlx5_1",
        "AFTEROK_SCRATCH": "/s", "TMPDIR": "/n",
    }  # fmt: skip
    assert site_variables(Profile()) == {}
    path = tmp_path / "p.yaml"
    path.write_text(
        "kind: local\nroles: {cpu: {}}\nnetwork: {hca: a, interface: ^docker0}\n"
        "env: {set: {NCCL_IB_HCA: b}}\nstorage: {scratch: here}\n"
    )
    with pytest.raises(UserMistake) as error:
        files.load(str(path))
    assert [problem.where for problem in error.value.problems] == [
        f"{path}: network.interface", f"{path}: env.set.NCCL_IB_HCA", f"{path}: storage.scratch",
    ]  # fmt: skip


def test_a_run_lies_where_the_profile_says_all_nodes_share(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    profile = Profile(storage=Storage(scratch="/nowhere", shared=[str(tmp_path / "shared")]))
    assert why_not_shared(profile, tmp_path / "link" / "runs" / "x") == ""
    assert "choose one there with --run DIR" in why_not_shared(profile, tmp_path / "x")
    assert why_not_shared(Profile(), tmp_path) == ""


def test_the_sockets_that_sinfo_prints_behind_a_resource_are_no_part_of_it():
    assert items("gpu:h100:8(S:0-1),nvme:2(S:0,2)") == [("gpu", "h100", 8), ("nvme", "", 2)]
    assert gpus_of("gpu:8(S:0-1)") == ("", 8)


@pytest.mark.parametrize("key", ["account", "qos", "reservation", "licenses", "constraint"])
def test_no_value_brings_another_line_into_the_script(key):
    """Whoever says it, a phase, its role or its partition: the line could be an #SBATCH one."""
    value = "a\n#SBATCH --qos=top"
    site = {"partitions": {"p": Partition()}, "roles": {"cpu": Role()}}
    (problem,) = check(Profile(**site), Request("cpu", **{key: value}), "x")
    assert problem.where == f"x.{key}" and "no one line" in problem.message
    setattr(site["roles"]["cpu"], key, value)
    assert [problem.where for problem in check(Profile(**site), Request("cpu"), "x")] == [f"x.{key}"]
    site = {"partitions": {"p": Partition(**{key: value})}, "roles": {"cpu": Role()}}
    assert [problem.where for problem in check(Profile(**site), Request("cpu"), "x")] == [f"x.{key}"]


def test_what_a_node_has_beside_its_gpus_is_a_limit_where_the_profile_says_how_much():
    few, many = (Partition(gres=f"gpu:a100:4,nvme:{count}") for count in (1, 4))
    site = Profile(partitions={"few": few, "many": many}, roles={"cpu": Role(partitions=["few", "many"])})
    asked = {gres: resolve(site, Request("cpu", gres=gres)).partition for gres in ("nvme", "nvme:2", "fpga:9")}
    assert asked == {"nvme": "few", "nvme:2": "many", "fpga:9": "few"}
    (problem,) = check(site, Request("cpu", gres="nvme:5"), "x")
    assert problem.message.startswith("nvme:5, but a node of partition few has 1; ask for that; nor does it fit")


def test_a_roles_python_is_known_here_where_nothing_can_make_it_another():
    roles = {"own": Role(env=RoleEnv(python="/opt/py")), "loaded": Role(env=RoleEnv(modules=["python/3.12"])),
             "prepared": Role(env=RoleEnv(setup=["source activate"]))}  # fmt: skip
    known = {role: python_here(Profile(roles=roles), role) for role in (*roles, "other")}
    assert known == {"own": "/opt/py", "loaded": "", "prepared": "", "other": sys.executable}
    container = Container(runtime="apptainer", images={"own": "/a.sif"})
    assert python_here(Profile(roles=roles, container=container), "own") == ""
    assert python_here(Profile(roles=roles, hooks=Hooks(prolog=["module load x"])), "own") == ""
