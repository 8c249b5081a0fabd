"""`afterok explain`: the phase kinds, and every setting of one as its config declares it."""

import subprocess
import sys

import pytest

from jobs.kind import kind_names
from tests.command import ROOT, afterok, afterok_json, one_line


def test_without_a_phase_the_kinds_are_listed_with_a_line_each():
    told = afterok("explain").stdout
    listed = afterok_json("explain")["phases"]
    assert [each["phase"] for each in listed] == [*kind_names(), "resources"]
    assert all(each["about"] and each["about"] in told for each in listed)


def test_each_setting_of_a_phase_is_told_with_type_default_unit_range_and_meaning():
    found = {each["key"]: each for each in afterok_json("explain", "grpo")["settings"]}
    assert found["loss.clip_low"] == {
        "key": "loss.clip_low", "type": "float", "default": 0.2, "unit": "", "legal": "0 to 1", "keyed": True,
        "needed": False, "help": "the ratio counts from 1 - clip_low; cispo: from 0", "example": 0.4,
    }  # fmt: skip
    assert found["schedule"]["default"] == "constant" and "cosine" in found["schedule"]["legal"]
    assert found["bos"]["keyed"] == "if_set" and found["parallel.tensor"]["keyed"] is False
    assert found["model"]["needed"] and found["mix.entries.NAME.weight"]["legal"] == "at least 0"
    told = afterok("explain", "grpo").stdout
    assert all(key in told for key in found)


@pytest.mark.parametrize(
    "setting, keys",
    [
        ("lora.rank", ["lora.rank"]),
        ("track", ["track", "track.wandb", "track.project", "track.entity", "track.name", "track.tensorboard"]),
        ("mix.entries.gsm8k.limit", ["mix.entries.NAME.limit"]),
    ],
)
def test_one_setting_and_those_below_it_can_be_asked_for(setting, keys):
    assert [each["key"] for each in afterok_json("explain", "grpo", setting)["settings"]] == keys
    assert [each["key"] for each in afterok_json("explain", f"grpo.{setting}")["settings"]] == keys


def test_what_a_phase_may_ask_of_the_cluster_is_explained_too():
    told = afterok("explain", "resources.time").stdout
    assert "time limit" in told and "written as PHASE.resources.time=8:00:00" in told


@pytest.mark.parametrize(
    "words, told",
    [
        (["stf"], "unknown phase kind 'stf' (did you mean sft?"),
        (["sft", "lora.rnk"], "phase kind sft has no setting 'lora.rnk' (did you mean lora.rank? known: lora.rank, "),
        (["sft", "lernrate"], "phase kind sft has no setting 'lernrate' ("),
        (["no.such.module"], "module 'no.such.module' cannot be imported"),
    ],
)
def test_an_unknown_name_is_refused_in_a_line_with_the_nearest(words, told):
    assert told in one_line(afterok("explain", *words, check=2))


def test_a_users_own_phase_is_explained_as_far_as_it_says():
    found = afterok_json("explain", "tests.toy.numbers")
    assert found["about"].startswith("A phase kind for tests")
    assert [each["key"] for each in found["settings"]][:2] == ["start", "seconds"]
    assert [each["keyed"] for each in found["settings"]][:2] == [True, False]


def test_explaining_imports_nothing_heavy():
    code = "import sys; from launchers.cli import main; main(['explain', 'sft']); "
    code += "print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
