"""Profiles are laid upon one another, each value's file is known, and an admin's policy is the last word."""

import json
import os
import tempfile
from pathlib import Path

import pytest

from data_tools.mistake import UserMistake
from slurm.profile import admins, files
from slurm.profile.check import check
from slurm.profile.layers import command_line
from slurm.profile.schema import Request
from tests.command import afterok, one_line

ADMINS = """\
partitions:
  gpu: {max_time: 2-0, max_nodes: 8, gpus_per_node: 8, account: llm, qos: normal}
  spare: {max_nodes: 9, account: llm}
  other: {}
roles:
  train: {partition: gpu, time: 1-0, gpus_per_node: 8}
  cpu: {partition: gpu}
  eval: {partitions: [gpu, spare]}
env: {modules: [cuda/12.8], set: {HF_HOME: /shared/hf}}
policy:
  locked: {roles.*.partitions: "", env.modules: "The driver wants this CUDA; ask hpc@x.org.", partitions.*.account: "",
    partitions.*.reservation: ""}
  bounds:
    signal_lead_s: {min: 60, reason: Slurm needs a minute}
    partitions.*.max_nodes: {max: 9, reason: Nine}
    resources.nodes: {max: 4, reason: four nodes a job until May}
    resources.time: {max: 1-12}
    roles.*.gpus_per_node: {choices: [0, 8]}
"""


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A site's folder that only admins may write, a user's, and how to write a file of each."""
    monkeypatch.setattr(admins, "admin_uids", lambda: {0, os.geteuid()})
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
        monkeypatch.setattr(files, "ADMINS_FOLDER", Path(folder))
        if why := admins.why_no_admins(Path(folder)):
            pytest.skip(f"no folder here is an admin's: {why}")
        users = tmp_path / "users"
        users.mkdir(mode=0o777)
        users.chmod(0o777)
        monkeypatch.setenv("AFTEROK_PROFILES", str(users))

        def write(whose, name, text):
            path = {"admin": Path(folder), "user": users}[whose] / f"{name}.yaml"
            path.write_text(text)
            path.chmod(0o644)
            return path

        yield write


def refused(name, *overrides):
    with pytest.raises(UserMistake) as error:
        files.read(name, command_line(overrides))
    return [str(problem) for problem in error.value.problems]


def test_a_users_profile_extends_the_admins_of_its_name_and_each_value_knows_its_file(site):
    admin = site("admin", "big", ADMINS)
    user = site("user", "big", "roles: {train: {time: 2:00:00}, mine: {partition: gpu}}\n")
    loaded = files.read("big", command_line(["cluster.roles.train.nodes=2", "sft.with.lr=1", "cluster=big"]))
    train = loaded.profile.roles["train"]
    assert (train.time, train.nodes, train.gpus_per_node) == ("2:00:00", 2, 8)
    assert set(loaded.profile.roles) == {"train", "cpu", "eval", "mine"}
    assert loaded.extended == [str(admin)]
    origins = {key: loaded.merged.origin(key) for key in ("roles.train.time", "roles.train.nodes", "env.modules")}
    assert origins == {
        "roles.train.time": str(user), "roles.train.nodes": "the command line", "env.modules": str(admin),
    }  # fmt: skip


def test_lists_replace_or_are_added_to_and_a_team_stands_between(site, tmp_path):
    site("admin", "big", ADMINS.partition("policy")[0])
    team = tmp_path / "team.yaml"
    team.write_text("extends: [big]\nenv: {+modules: [nccl], set: {TEAM: a}}\n")
    site("user", "mine", f"extends: [{team}]\nenv: {{set: {{HF_HOME: /me}}, setup: [ulimit -l unlimited]}}\n")
    loaded = files.read("mine")
    assert loaded.profile.env.modules == ["cuda/12.8", "nccl"]
    assert loaded.profile.env.set == {"HF_HOME": "/me", "TEAM": "a"}
    assert [Path(file).name for file in loaded.extended] == ["big.yaml", "team.yaml"]
    assert loaded.merged.origin("env.modules").endswith(f"big.yaml and {team}")
    assert loaded.profile.meta.name == "mine" and loaded.profile.extends == []
    replaced = files.read("mine", command_line(["cluster.env.modules=[gcc]"]))
    assert replaced.profile.env.modules == ["gcc"]


def test_a_circle_and_a_missing_base_are_refused_in_one_line(site):
    first = site("user", "a", "extends: [b]\n")
    site("user", "b", "extends: [a]\n")
    (line,) = refused("a")
    assert str(first) in line and "cannot extend itself" in line
    site("user", "c", "extends: [big]\n")
    (line,) = refused("c")
    assert "c.yaml: extends: no cluster profile 'big'" in line


def test_a_folder_that_is_named_twice_and_a_link_to_the_next_make_no_circle(site, monkeypatch):
    admin = site("admin", "big", "partitions: {gpu: {}}\nroles: {cpu: {time: 5}}\n")
    user = site("user", "big", "roles: {cpu: {time: 6}}\n")
    monkeypatch.setenv("AFTEROK_PROFILES", f"{user.parent}:{user.parent}:{admin.parent}:{user.parent}")
    assert files.load("big").roles["cpu"].time == "6"
    monkeypatch.setenv("AFTEROK_PROFILES", f"{admin.parent}/../{admin.parent.name}")
    assert files.load("big").roles["cpu"].time == "5"
    monkeypatch.setenv("AFTEROK_PROFILES", str(user.parent))
    user.unlink()
    user.symlink_to(admin)
    assert files.load("big").roles["cpu"].time == "5"


def test_a_file_without_an_end_to_its_brackets_is_refused_in_one_line(site):
    user = site("user", "big", "[" * 20_000)
    (told,) = refused("big")
    assert told.startswith(f"{user}:1: not readable as YAML: more than 100 levels") and "AFTEROK_YAML_DEPTH" in told


def test_a_mistake_is_named_with_the_file_that_made_it(site):
    admin = site("admin", "big", ADMINS)
    user = site("user", "big", "roles: {cpu: {tiem: 5}}\n")
    (line,) = refused("big")
    assert line.startswith(f"{user}: roles.cpu.tiem: unknown key")
    site("user", "big", "roles: {cpu: {nodes: 9}}\n")
    (line,) = refused("big")
    assert line.startswith(f"{user}: roles.cpu.nodes: 9 nodes, but partition gpu has 8")
    site("user", "big", "meta: {description: mine}\n")
    site("admin", "big", ADMINS.replace("time: 1-0", "time: 9-0"))
    assert refused("big")[0].startswith(f"{admin}: roles.train.time: 9-00:00:00 is longer")


@pytest.mark.parametrize(
    "text, key, words",
    [
        ("env: {modules: [cuda/11]}", "env.modules", "The driver wants this CUDA; ask hpc@x.org (locked by "),
        ("env: {+modules: [x]}", "env.modules", "it stays ['cuda/12.8'])"),
        ("env: {modules: []}", "env.modules", "The driver wants this CUDA"),
        ("env: ", "env", "The driver wants this CUDA"),
        ("partitions: {gpu: {account: mine}}", "partitions.gpu.account", "locked by the admin; it stays 'llm'"),
        ("partitions: {gpu: }", "partitions.gpu", "locked by the admin; it stays 'llm'"),
        ("partitions: {new: {account: mine}}", "partitions.new.account", "locked by the admin; it stays unset"),
        ("signal_lead_s: 30", "signal_lead_s", "Slurm needs a minute (30 is less than the admin allows; at least 60)"),
        ("roles: {cpu: {gpus_per_node: 4}}", "roles.cpu.gpus_per_node", "'4' is not among 0, 8"),
        ("policy: {locked: {}}", "policy", "counts only in an admin's file: others may write"),
        ("roles: {a.b: {partition: gpu}}", "roles.a.b", "the policy's keys are dotted and would miss it"),
        ("partitions: {gpu: {extra_sbatch: {reservation: r}}}", "partitions.gpu.extra_sbatch.reservation", "unset"),
        ("roles: {cpu: {env: {modules: []}}}", "roles.cpu.env.modules", "The driver wants this CUDA"),
        ("partitions: {gpu: {max_nodes: null}}", "partitions.gpu.max_nodes", "Nine (the admin bounds it, and says '8'"),
        ("roles: {train: }", "roles.train", "the admin bounds it, and says '8'; say a value, or leave it"),
    ],
)  # fmt: skip
def test_what_the_policy_locks_or_bounds_is_refused_with_the_admins_words(site, text, key, words):
    site("admin", "big", ADMINS)
    user = site("user", "big", f"meta: {{description: x}}\n{text}\n")
    lines = refused("big")
    assert any(line.startswith(f"{user}: {key}") and words in line for line in lines), lines


def test_the_command_line_is_a_user_too_and_the_same_value_changes_nothing(site):
    site("admin", "big", ADMINS)
    (line,) = refused("big", "cluster.env.modules=[x]")
    assert line.startswith("the command line: env.modules: The driver wants this CUDA")
    assert files.read("big", command_line(["cluster.env.modules=[cuda/12.8]"])).profile.env.modules == ["cuda/12.8"]


def test_what_the_command_line_adds_to_a_list_is_added_to_the_files(site):
    """An override replaces what the overrides before it said of its key, and a `+` adds, as files do it."""
    site("admin", "big", "partitions: {gpu: {}}\nroles: {cpu: {}}\nenv: {setup: [a]}\n")

    def setup(*overrides):
        return files.read("big", command_line([f"cluster.env.{said}" for said in overrides])).profile.env.setup

    assert setup("+setup=[b]") == ["a", "b"]
    assert setup("+setup=[b]", "+setup=[c]") == ["a", "b", "c"]
    assert setup("setup=[b]", "+setup=[c]") == ["b", "c"]
    assert setup("+setup=[b]", "setup=[c]") == ["c"]
    layer = command_line(["cluster.roles.cpu.nodes=2", "cluster.roles.cpu={time: 1:30:00}"])
    assert layer.values == {"roles": {"cpu": {"nodes": "2", "time": "1:30:00"}}}
    with pytest.raises(UserMistake, match="only a file extends others"):
        command_line(["cluster.extends=[big]"])
    assert "the command line is none" in refused("big", "cluster.policy.reason=x")[0]


def test_a_user_lifts_no_policy_with_another_admins_file(site):
    """What an admin wrote for another cluster is not what this one's admin said, whichever is laid upon the other."""
    big = site("admin", "big", ADMINS)
    site("admin", "beside", "env: {modules: [other]}\n")
    site("admin", "above", "extends: [big]\nenv: {modules: [other]}\n")
    small = site("admin", "small", "policy: {allowed_qos: []}\n")
    site("user", "mine", "extends: [big, beside]\n")
    assert any("env.modules: The driver wants this CUDA" in line for line in refused("mine"))
    site("user", "mine", "extends: [beside, big]\n")
    assert files.load("mine").env.modules == ["cuda/12.8"]
    site("user", "mine", "extends: [above]\n")  # that admin laid it upon the policy's file, and may
    assert files.load("mine").env.modules == ["other"]
    for order in ("big, small", "small, big"):
        site("user", "mine", f"extends: [{order}]\n")
        first, last = (big, small) if order.startswith("big") else (small, big)
        assert f"{first}: policy: {last} has another, and does not extend this file; leave one of them out" in refused(
            "mine"
        )


@pytest.mark.parametrize(
    "entry, words",
    [
        ("[a]", "['a'] is neither a profile's name nor its file"),
        ("{a: b}", "{'a': 'b'} is neither a profile's name nor its file"),
        ("~no.such.user/x", "the home that it begins with is not known here"),
    ],
)
def test_what_extends_cannot_name_is_refused_in_one_line(site, entry, words):
    site("user", "mine", f"extends: [{entry}]\n")
    assert [line for line in refused("mine") if words in line]


def test_a_policy_in_a_file_that_others_may_write_is_refused_not_ignored(site):
    path = site("admin", "big", ADMINS)
    assert files.load("big").policy.locked
    for mode in (0o664, 0o646):
        path.chmod(mode)
        assert any("policy: counts only in an admin's file: others may write" in line for line in refused("big"))
        with pytest.raises(UserMistake, match="policy: counts only"):  # another profile does not get around it either
            files.policy_file("big")
    path.chmod(0o644)
    assert files.policy_file("big") == path
    path.parent.chmod(0o770)
    assert any(f"others may write {path.parent} (mode 770)" in line for line in refused("big"))
    path.parent.chmod(0o700)
    linked = Path(os.environ["AFTEROK_PROFILES"]) / "lax.yaml"  # a link in a user's folder may point elsewhere tomorrow
    linked.symlink_to(path)
    assert any("counts only in an admin's file" in line for line in refused("lax"))


def test_a_file_of_anybody_else_is_no_admins(site, monkeypatch):
    path = site("admin", "big", ADMINS)
    monkeypatch.setattr(admins, "admin_uids", lambda: {4242})
    assert any("belongs to uid" in line for line in refused("big"))
    assert str(path) in admins.why_no_admins(path)


def test_who_installs_names_the_admins(tmp_path, monkeypatch):
    monkeypatch.setattr(admins, "ADMINS_FILE", tmp_path / "admins")
    assert admins.admin_uids() == {0}
    (tmp_path / "admins").write_text("501\n502\n")
    assert admins.admin_uids() == {0, 501, 502}


def test_places_that_no_profile_has_are_the_admins_mistake(site):
    admin = site("admin", "big", "roles: {cpu: {}}\nkind: local\npolicy: {locked: {rolls.cpu: x, roles.*.tiem: x}}\n")
    found = refused("big")
    assert [line.partition(": no place")[0] for line in found] == [
        f"{admin}: policy.locked.rolls.cpu", f"{admin}: policy.locked.roles.*.tiem",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "entry, words",
    [
        ("nodes: {max: 1}", "nodes: no place of a profile; of what a phase gets, write resources.nodes"),
        ("resources.time_minutes: {max: 1}", "resources.time_minutes: a phase gets nothing of this name; known: role,"),
        ("resources.extra_sbatch: {max: 1}", "resources.extra_sbatch: a phase gets nothing of this name"),
        ("resources.gres: {max: 4}", "resources.gres: gres is no number: say choices"),
        ("resources.nodes: {max: eight}", "resources.nodes.max: 'eight' is no integer"),
        ("resources.time: {min: soon}", "resources.time.min: 'soon' is no Slurm time"),
        ("resources.nodes: {}", "resources.nodes: bounds nothing"),
        ("resources.nodes: {reason: Small.}", "resources.nodes: bounds nothing"),
        ("resources.nodes: {min: 3, max: 1}", "resources.nodes: no value is legal: min 3 is more than max 1"),
        ('resources.time: {min: "1-0", max: "90"}', "resources.time: no value is legal: min 1-0 is more than max 90"),
    ],
)
def test_a_bound_that_could_never_count_is_the_admins_mistake(site, entry, words):
    admin = site("admin", "big", f"roles: {{cpu: {{}}}}\nkind: local\npolicy: {{bounds: {{{entry}}}}}\n")
    (line,) = refused("big")
    assert line.startswith(f"{admin}: policy.bounds.{words}")


def test_a_check_that_nobody_may_waive_is_one_that_there_is(site):
    admin = site("admin", "big", "roles: {cpu: {}}\nkind: local\npolicy: {unwaivable: [D001, d001]}\n")
    (line,) = refused("big")
    assert line.startswith(f"{admin}: policy.unwaivable: there is no check 'd001' (")


def test_what_nobody_says_is_held_to_a_bound_too(site):
    admin = site("admin", "big", "roles: {cpu: {}}\nkind: local\npolicy: {bounds: {signal_lead_s: {min: 120}}}\n")
    assert refused("big") == [f"{admin}: signal_lead_s: 90 is less than the admin allows; at least 120 [A002]"]
    assert files.read("big", command_line(["cluster.signal_lead_s=120"])).profile.signal_lead_s == 120


def test_a_list_is_compared_with_no_number(site):
    site("admin", "big", "roles: {cpu: {}}\nkind: local\npolicy: {bounds: {network.port_range: {max: 1}}}\n")
    (line,) = refused("big", "cluster.network.port_range=[2000,3000]")
    assert "cannot be compared with the admin's bound" in line


def test_a_phase_takes_no_partition_that_a_locked_role_has_not(site):
    site("admin", "big", ADMINS)
    profile = files.load("big")
    assert check(profile, Request("eval", partition="spare", time="1"), "p") == []
    (problem,) = check(profile, Request("eval", partition="other", time="1"), "p")
    assert str(problem) == "p.partition: locked by the admin; it stays 'gpu or spare' [A002]"


def test_no_time_at_all_is_beyond_the_longest_that_an_admin_allows(site):
    site("admin", "big", ADMINS)
    (problem,) = check(files.load("big"), Request("cpu", partition="spare"), "p")
    assert str(problem) == "p.time: no time is said, and the admin allows at most 1-12; say one [A002]"


def test_a_phase_is_held_to_the_policy_by_what_it_gets(site):
    site("admin", "big", ADMINS)
    profile = files.load("big")
    (problem,) = check(profile, Request("train", nodes=5), "p: sft.resources")
    assert str(problem) == (
        "p: sft.resources.nodes: four nodes a job until May (5 is more than the admin allows; at most 4) [A002]"
    )
    (problem,) = check(profile, Request("train", time="1-13"), "p")
    assert problem.message == "1-13:00:00 is more than the admin allows; at most 1-12"
    assert check(profile, Request("train", nodes=4, time="1-12"), "p") == []


def test_a_bound_on_time_holds_for_the_least_that_slurm_may_give(site):
    policy = (
        "policy: {bounds: {resources.time: {min: 1:00:00, max: 1-0}, partitions.*.extra_sbatch.time-min: {min: 30}}}"
    )
    admin = site("admin", "big", "partitions: {gpu: {}}\nroles: {train: {time: 2:00:00}}\n" + policy + "\n")
    assert check(files.load("big"), Request("train"), "p") == []
    site("user", "big", "partitions: {gpu: {extra_sbatch: {time-min: 0:40:00}}}\n")
    (problem,) = check(files.load("big"), Request("train"), "p")
    assert str(problem) == (
        "p.time: 0:40:00 is less than the admin allows; at least 1:00:00, "
        "and the partition's extra_sbatch has time-min [A002]"
    )
    user = site("user", "big", "partitions: {gpu: {extra_sbatch: {time-min: 0:20:00}}}\n")
    assert refused("big") == [
        f"{user}: partitions.gpu.extra_sbatch.time-min: 0:20:00 is less than the admin allows; at least 30 [A002]"
    ]
    assert admin != user


def test_a_bound_on_gres_is_of_names_types_and_counts(site):
    policy = "policy: {bounds: {resources.gres: {choices: ['gpu:a100', 'nvme:1'], reason: Ask us}}}\n"
    site("admin", "big", "partitions: {gpu: {}}\nroles: {train: {}}\n" + policy)
    profile = files.load("big")

    def found(**said):
        return [str(problem) for problem in check(profile, Request("train", **said), "p")]

    assert found() == found(gres="gpu:a100:8") == found(gres="gpu:a100:2,nvme:1") == []
    assert found(gres="nvme:2") == ["p.gres: Ask us ('nvme:2' is not among gpu:a100, nvme:1) [A002]"]
    assert found(gres="gpu:h100:1") == ["p.gres: Ask us ('gpu:h100:1' is not among gpu:a100, nvme:1) [A002]"]
    (line,) = found(gpus_per_node=8)  # any GPU would do for Slurm
    assert line == "p.gpus_per_node: Ask us (GPUs of any name are not among gpu:a100, nvme:1; say gres) [A002]"


def test_a_lock_on_images_keeps_the_runtime_that_starts_them(site):
    image = "partitions: {gpu: {}}\nroles: {train: {}}\ncontainer: {runtime: pyxis, images: {default: a#b}}\n"
    for locked in ("container.images", "container.images.default"):
        site("admin", "big", image + f"policy: {{locked: {{{locked}: Our image only.}}}}\n")
        user = site("user", "big", "container: {runtime: none}\n")
        assert refused("big") == [
            f"{user}: container.runtime: Our image only (locked by the admin; it stays 'pyxis') [A002]"
        ]


def test_a_variable_without_a_value_is_no_variable_named_null(site):
    user = site(
        "user", "mine", "kind: local\nroles: {cpu: {env: {set: {C: }}}}\nenv: {set: {A: , B: null, D: '', E: 'null'}}\n"
    )
    assert refused("mine") == [
        f'{user}: {key}: no value is written; write "" for an empty one, or take the line out'
        for key in ("roles.cpu.env.set.C", "env.set.A", "env.set.B")
    ]
    site("user", "mine", "kind: local\nroles: {cpu: }\nenv: {set: {D: '', E: 'null'}}\n")
    assert files.load("mine").env.set == {"D": "", "E": "null"}
    site("user", "mine", "partitions: {p: {extra_sbatch: {exclusive: null}}}\nroles: {cpu: }\n")
    loaded = files.load("mine")
    assert loaded.partitions["p"].extra_sbatch == {"exclusive": ""} and "exclusive: ''" in files.to_yaml(loaded)


def test_account_and_qos_are_asked_of_each_phase_not_of_the_file(site):
    rest = "policy: {require_account: true, allowed_qos: [normal], reason: Bill somebody.}\n"
    site("admin", "big", "partitions: {gpu: {qos: high}}\nroles: {train: {}}\n" + rest)
    found = [str(problem) for problem in check(files.load("big"), Request("train"), "p")]
    assert found == [
        "p.account: Bill somebody (no account is said; say account in the phase's resources, or in a profile of yours) "
        "[A002]",
        "p.qos: Bill somebody (QOS 'high' is not among normal) [A002]",
    ]
    site("user", "big", "partitions: {gpu: {account: mine, qos: normal}}\n")
    assert check(files.load("big"), Request("train"), "p") == []


def test_a_frozen_profile_is_whole_without_its_files_and_its_policy(site, tmp_path):
    site("admin", "big", ADMINS)
    site("user", "big", "roles: {train: {time: 2:00:00}}\n")
    frozen = tmp_path / "frozen.yaml"
    frozen.write_text(files.to_yaml(files.load("big")))
    again, before = files.load(str(frozen)), files.load("big")
    assert (again.roles, again.env, again.partitions) == (before.roles, before.env, before.partitions)
    assert again.meta.name == "big" and not again.policy.locked


def test_explain_names_the_file_and_the_admins_words_and_list_all_files(site):
    admin = site("admin", "big", ADMINS)
    user = site("user", "big", "roles: {train: {time: 2:00:00}}\n")
    env = {"AFTEROK_PROFILES": f"{user.parent}:{admin.parent}"}
    site("admin", "big", ADMINS.partition("policy")[0])
    done = afterok(
        "profile", "explain", "roles.train", "cluster.roles.train.nodes=3", "--profile", "big", "--json", env=env
    )
    values = {row["key"]: (row["value"], row["file"]) for row in json.loads(done.stdout)["values"]}
    assert values["roles.train.time"] == ("2:00:00", str(user))
    assert values["roles.train.partition"] == ("gpu", str(admin))
    assert values["roles.train.nodes"] == ("3", "the command line")
    listed = json.loads(afterok("profile", "list", "--json", env=env).stdout)["profiles"]
    assert next(row for row in listed if row["profile"] == "big")["files"] == [str(admin), str(user)]
    assert "sets no 'rolls'" in one_line(afterok("profile", "explain", "rolls", "--profile", "big", env=env, check=2))


@pytest.mark.parametrize("text", ["[a] # b", "# b", "a\nb", '"a\nb"'])
def test_what_yaml_would_leave_out_of_an_override_is_refused(text):
    with pytest.raises(UserMistake, match="put the text in double quotes"):
        command_line([f"cluster.env.setup={text}"])
    assert command_line(['cluster.env.setup=["a # b"]']).values == {"env": {"setup": ["a # b"]}}
