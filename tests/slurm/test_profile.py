"""A profile's mistakes are all named at once with file and key; requests get what the cluster would grant."""

import dataclasses
import os
import re

import pytest
from omegaconf import OmegaConf

from data_tools.base.bounds import BOUNDS
from data_tools.mistake import UserMistake
from slurm.client import scrubbed_environment
from slurm.printed import PartitionRow
from slurm.profile import files
from slurm.profile.check import check, forwarding_notes, forwarding_problems
from slurm.profile.resolve import resolve
from slurm.profile.schema import STANDARD_ROLES, Env, Partition, Profile, Request, Role

GOOD = """\
partitions:
  gpu: {max_time: 2-00:00:00, max_nodes: 4, cpus: 96, mem_gib: 1000, gpus_per_node: 8, account: llm, qos: high}
  cpu: {max_time: 1:30:00, cpus: 64}
roles:
  train: {partition: gpu, time: 1-0, gpus_per_node: 8, cpus_per_task: 12}
  cpu: {partition: cpu}
env: {set: {FLAG: yes, OCTAL: 010, HOME: "${HOME}/x"}}
max_array_size: 100
"""


@pytest.fixture
def good(tmp_path):
    (tmp_path / "good.yaml").write_text(GOOD)
    return files.load(str(tmp_path / "good.yaml"))


def problems_of(tmp_path, text):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(UserMistake) as error:
        files.load(str(path))
    return {problem.where.replace(f"{path}", "p.yaml"): problem.message for problem in error.value.problems}


@pytest.mark.parametrize("name", ["dev", "local", "example", "plain", "h100_preemptible"])
def test_shipped_profiles_load_have_every_standard_role_and_freeze_without_loss(name, tmp_path):
    loaded = files.load(name)
    assert set(loaded.roles) == set(STANDARD_ROLES)
    assert resolve(loaded, Request("cpu")).gpus_per_node == 0
    (tmp_path / "frozen.yaml").write_text(files.to_yaml(loaded))
    assert files.load(str(tmp_path / "frozen.yaml")) == loaded
    assert OmegaConf.to_object(OmegaConf.structured(loaded)) == loaded


def test_values_mean_what_is_written(good):
    # YAML 1.1 makes 5400 of the time, True of yes and 8 of 010
    assert good.partitions["cpu"].max_time == "1:30:00"
    assert good.env.set == {"FLAG": "yes", "OCTAL": "010", "HOME": "${HOME}/x"}
    assert good.meta.name == "good"


def test_every_mistake_of_a_file_is_named_at_once(tmp_path):
    found = problems_of(
        tmp_path,
        """\
partitons: {}
partitions:
  gpu: {max_tme: 1, max_nodes: many, account: [a]}
roles:
  train: {nodes: 4.5}
  cpu: 7
env: {modules: cuda, set: {A: [1]}}
""",
    )
    assert set(found) == {
        "p.yaml: partitons", "p.yaml: partitions.gpu.max_tme", "p.yaml: partitions.gpu.max_nodes",
        "p.yaml: partitions.gpu.account", "p.yaml: roles.train.nodes", "p.yaml: roles.cpu", "p.yaml: env.modules",
        "p.yaml: env.set",
    }  # fmt: skip
    assert (
        "mean partitions?" in found["p.yaml: partitons"] and "mean max_time?" in found["p.yaml: partitions.gpu.max_tme"]
    )
    assert found["p.yaml: partitions.gpu.max_nodes"] == "'many' is not an integer"
    assert "[cuda]" in found["p.yaml: env.modules"]


def test_names_and_numbers_that_do_not_fit_together_are_named(tmp_path):
    found = problems_of(
        tmp_path,
        """\
kind: slurm
partitions: {gpu: {max_time: 1-0, gpus_per_node: 8}}
roles: {train: {partition: gpu, gpus_per_node: 16, time: 2-0}, cpu: {partition: gpus}}
""",
    )
    keys = ("roles.train.gpus_per_node", "roles.train.time", "roles.cpu.partition")
    assert set(found) == {f"p.yaml: {key}" for key in keys}
    assert "mean gpu?" in found["p.yaml: roles.cpu.partition"]
    found = problems_of(
        tmp_path, "kind: cloud\nroles: {cpu: {time: 1h}}\nnetwork: {port_range: [1, 2]}\nmax_array_size: 0\n"
    )
    assert set(found) == {
        "p.yaml: kind", "p.yaml: roles.cpu.time", "p.yaml: network.port_range", "p.yaml: max_array_size",
    }  # fmt: skip
    assert "'1h'" in found["p.yaml: roles.cpu.time"]


@pytest.mark.parametrize("text", ["roles: [", "- a", "roles: {}\nroles: {}\n", "\t"])
def test_a_file_that_is_no_mapping_is_refused_in_one_line(tmp_path, text):
    assert len(problems_of(tmp_path, text)) == 1


def test_an_unknown_profile_names_the_nearest_and_the_folders():
    with pytest.raises(UserMistake, match=re.escape("did you mean example?")) as error:
        files.load("exmple")
    assert str(files.BUILT_IN) in str(error.value)


def test_the_users_own_folder_comes_first(tmp_path, monkeypatch):
    (tmp_path / "dev.yaml").write_text("kind: local\nroles: {cpu: {}}\n")
    monkeypatch.setenv("AFTEROK_PROFILES", os.pathsep.join(["/nowhere", str(tmp_path)]))
    assert files.load("dev").kind == "local"
    assert "dev" in files.names()


def test_a_request_takes_what_it_does_not_say_from_its_role(good):
    got = resolve(good, Request("train"))
    assert (got.partition, got.nodes, got.gpus_per_node, got.ranks_per_node, got.cpus_per_task) == ("gpu", 1, 8, 8, 12)
    assert (got.time_minutes, got.mem_gib, got.account, got.qos) == (1440, None, "llm", "high")
    assert resolve(good, Request("cpu")).ranks_per_node == 1
    assert resolve(good, Request("cpu")).time_minutes == 90  # the partition's
    got = resolve(good, Request("train", nodes=2, gpus_per_node=4, time="30", mem_gib=7, partition="cpu"))
    assert (got.partition, got.nodes, got.ranks_per_node, got.time_minutes, got.mem_gib) == ("cpu", 2, 4, 30, 7)
    good.roles["train"].ranks_per_node = 16
    assert resolve(good, Request("train")).ranks_per_node == 16
    assert resolve(good, Request("train", gpus_per_node=4)).ranks_per_node == 4  # one a GPU again


def test_what_the_cluster_would_refuse_is_said_with_numbers_and_the_nearest_legal_value(good):
    request = Request("train", nodes=9, gpus_per_node=16, mem_gib=2000, time="3-0")
    found = {problem.where: problem.message for problem in check(good, request, "t.yaml: sft.resources")}
    assert found == {
        "t.yaml: sft.resources.nodes": "9 nodes, but partition gpu has 4; ask for at most 4",
        "t.yaml: sft.resources.gpus_per_node": "16 GPUs a node, but partition gpu has 8; ask for at most 8",
        "t.yaml: sft.resources.mem_gib": "2000 GiB a node, but partition gpu has 1000; ask for at most 1000",
        "t.yaml: sft.resources.cpus_per_task":
            "16 ranks of 12 CPUs are 192 a node, but partition gpu has 96; at most 6 cpus_per_task",
        "t.yaml: sft.resources.time": "3-00:00:00 is longer than partition gpu allows; ask for at most 2-00:00:00",
    }  # fmt: skip
    assert check(good, Request("train", nodes=4, time="2-0"), "w") == []


def test_values_below_the_least_are_refused(good):
    request = Request("cpu", nodes=0, gpus_per_node=-1, cpus_per_task=0, ranks_per_node=0, time="0", mem_gib=0)
    wheres = [problem.where for problem in check(good, request, "w")]
    assert sorted(wheres) == [
        "w.cpus_per_task", "w.gpus_per_node", "w.mem_gib", "w.nodes", "w.ranks_per_node", "w.time",
    ]  # fmt: skip


def test_unknown_role_partition_and_time_name_the_nearest(good):
    (found,) = check(good, Request("trian"), "w")
    assert found.where == "w.role" and "mean train?" in found.message and "cpu, train" in found.message
    (found,) = check(good, Request("train", partition="gpus"), "w")
    assert found.where == "w.partition" and "mean gpu?" in found.message
    (found,) = check(good, Request("train", time="1h"), "w")
    assert found.where == "w.time" and "'1h'" in found.message
    with pytest.raises(UserMistake):
        resolve(good, Request("trian"))


def test_a_local_machine_limits_nothing_and_ignores_partitions():
    local = files.load("local")
    assert check(local, Request("train", gpus_per_node=64, nodes=9, partition="gpu"), "w") == []
    assert resolve(local, Request("train", partition="gpu")).partition is None


def test_a_profile_from_the_live_cluster_puts_every_role_on_the_default_partition():
    class Stub:
        def partitions(self):
            down = PartitionRow("old", False, None, 1, None, 8, 0, 1024, "down")
            return [down, PartitionRow("debug", False, 30, 1, 1, 8, 0, 16384, "up"),
                    PartitionRow("gpu", True, None, 4, 2, 96, 8, 1024000, "up")]  # fmt: skip

        def max_array_size(self):
            return 1001

    made = files.from_live(Stub())
    assert set(made.roles) == set(STANDARD_ROLES) and set(made.partitions) == {"debug", "gpu"}
    assert made.partitions["gpu"] == Partition(max_nodes=2, cpus=96, mem_gib=1000, gpus_per_node=8)
    assert made.roles["train"] == Role(partition="gpu", time="1-00:00:00", gpus_per_node=8, cpus_per_task=12)
    assert made.roles["cpu"].gpus_per_node == 0
    for role in made.roles:
        assert check(made, Request(role), "w") == []


def test_the_schema_is_an_omegaconf_structured_config():
    assert OmegaConf.structured(Profile).network.port_range == [20000, 29999]
    assert {key.name for key in dataclasses.fields(Request)} >= {"role", "nodes", "time", "ranks_per_node"}


def test_secrets_are_references_and_freeze_as_such(tmp_path):
    text = GOOD.replace("env: {", 'env: {secrets: {A: "file:~/.key", B: "cmd:pass show b", C: "env:X"}, forward: [X], ')
    (tmp_path / "p.yaml").write_text(text)
    loaded = files.load(str(tmp_path / "p.yaml"))
    assert loaded.env.secrets == {"A": "file:~/.key", "B": "cmd:pass show b", "C": "env:X"}
    (tmp_path / "frozen.yaml").write_text(files.to_yaml(loaded))
    assert files.load(str(tmp_path / "frozen.yaml")) == dataclasses.replace(loaded)


def test_what_is_no_reference_is_refused_without_showing_it(tmp_path):
    found = problems_of(
        tmp_path,
        """\
kind: local
roles: {cpu: {}}
env:
  set: {E: f}
  forward: [OK, "A=hunter2", ALL]
  secrets: {A: hunter2, B: "hunter2:x", C: "file:key", D: "env:NOT_LISTED", E: "file:/k",
            "F=hunter2": "file:/k", G: "cmd:"}
""",
    )
    assert "hunter2" not in "".join(found.values())
    secrets = {f"p.yaml: env.secrets.{name}" for name in ("A", "B", "C", "D", "E", "F=hunter2", "G")}
    assert set(found) == {"p.yaml: env.forward"} | secrets
    assert "env.forward to allow" in found["p.yaml: env.secrets.D"] and "relative" in found["p.yaml: env.secrets.C"]


def test_forwarding_is_said_by_name_and_a_forwarded_secret_is_warned_of():
    asked = Profile(env=Env(forward=["MODE", "KEY", "UNSET"], secrets={"TOKEN": "env:KEY", "F": "file:/f"}))
    asked.meta.name = "site"
    sent, warning = forwarding_notes(asked, {"MODE": "offline", "KEY": "hunter2"})
    assert "MODE, KEY (profile site, env.forward)" in sent and "UNSET" not in sent and "hunter2" not in sent + warning
    assert "TOKEN will not stay secret" in warning and "F" not in warning.split(" will ")[0]
    assert forwarding_problems(asked, {"KEY": "x"}) == []
    (problem,) = forwarding_problems(asked, {})
    assert "export KEY first" in problem.message and "env.secrets.TOKEN" in problem.message
    assert forwarding_notes(Profile(), {"MODE": "x"}) == []


def test_what_sbatch_would_obey_and_does_not_get_is_said_by_name():
    obeyed = {"SBATCH_ACCOUNT": "hunter2", "SBATCH_QOS": "", "SLURM_JOB_ID": "1", "MODE": "x"}
    (note,) = forwarding_notes(Profile(), obeyed)
    assert note.startswith("SBATCH_ACCOUNT, SBATCH_QOS of") and "say account" in note and "hunter2" not in note
    assert forwarding_notes(Profile(kind="local"), obeyed) == []
    assert not [name for name in scrubbed_environment(obeyed) if name.startswith("SBATCH_")]  # so it is true


def test_what_a_profile_sets_for_afterok_itself_is_a_variable_that_is_read_and_a_value_that_can_be(tmp_path):
    known = {bound.variable: str(bound.default) for bound in BOUNDS} | {"AFTEROK_VERIFIER_GIB": "0.5"}
    wrong = dict.fromkeys(known, "many")
    right = known | {"AFTEROK_VERIFIER_ENV": "A,B", "AFTEROK_SCRATCH": "/s", "AFTER": "any", "OTHER_AFTEROK_X": "any"}
    said = {**wrong, "AFTEROK_LINE_MB": "9"}
    told = problems_of(tmp_path, f"kind: local\nroles: {{cpu: {{}}}}\nenv: {{set: {said}}}\n")
    assert list(told) == [f"p.yaml: env.set.{name}" for name in said]
    *values, name = told.values()
    assert all("'many' is no" in value for value in values) and "(did you mean AFTEROK_LINE_MIB? known: " in name
    (tmp_path / "right.yaml").write_text(f"kind: local\nroles: {{cpu: {{env: {{set: {right}}}}}}}\n")
    assert files.load(str(tmp_path / "right.yaml")).roles["cpu"].env.set == right


def test_local_processes_run_no_shell_lines_and_say_so(tmp_path):
    found = problems_of(tmp_path, "kind: local\nroles: {cpu: {}}\nenv: {setup: [source x], modules: [cuda]}\n")
    assert set(found) == {"p.yaml: env.setup", "p.yaml: env.modules"}
    assert all("local processes run no shell lines; say it in env.set" in message for message in found.values())


def test_what_a_cluster_would_refuse_ends_with_its_contact(good):
    request = Request("train", nodes=99, gpus_per_node=99)
    assert not any("contact" in str(problem) for problem in check(good, request, "p"))
    good.meta.contact = "help@x.org"
    *others, last = check(good, request, "p")
    assert last.message.endswith("; contact for profile good: help@x.org")
    assert others and not any("contact" in str(problem) for problem in others)


@pytest.mark.parametrize(
    "mail, key, said",
    [
        ("{user: me at home}", "mail.user", "'me at home' is no address and no user"),
        ('{user: "a@b\\n#SBATCH --x"}', "mail.user", "is no address"),
        ("{user: me, type: [ENDED]}", "mail.type", "unknown type 'ENDED' (did you mean END?"),
        ("{type: [end]}", "mail.type", "unknown type 'end' (did you mean END?"),
        ("{type: [ARRAY_TASKS]}", "mail.type", "would send a mail for each element"),
        ("{type: [FAIL]}", "partitions.gpu.extra_sbatch.mail_type", "mail says it too"),
    ],
)
def test_mail_that_nobody_could_get_is_refused(tmp_path, mail, key, said):
    text = f"partitions: {{gpu: {{extra_sbatch: {{mail_type: END}}}}}}\nroles: {{cpu: {{}}}}\nmail: {mail}\n"
    assert said in problems_of(tmp_path, text)[f"p.yaml: {key}"]
    (tmp_path / "p.yaml").write_text(text.partition("mail: ")[0])
    files.load(str(tmp_path / "p.yaml"))  # as it was before
