"""`afterok explain`: the phase kinds, and every setting of one as its config declares it."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from data_tools.base.yaml_loaders import read_values
from jobs.kind import kind_names
from jobs.schema.pipeline import load_pipeline
from launchers.observe.explain import explain
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
        "needed": False, "help": "the ratio counts from 1 - clip_low; cispo: from 0", "example": 0.1,
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
        (["evaluate", "sampling.max_tokens"], "evaluate has its settings beside the others: max_new_tokens, "),
        (["sft", "lernrate"], "phase kind sft has no setting 'lernrate' ("),
        (["no.such.module"], "module 'no.such.module' cannot be imported"),
    ],
)
def test_an_unknown_name_is_refused_in_a_line_with_the_nearest(words, told):
    assert told in one_line(afterok("explain", *words, check=2))


def nested(key: str, value):
    """Return a setting of a dotted key as the YAML below `with` has it."""
    first, *rest = re.findall(r"[^.\[\]]+|\[N\]", key)
    for part in reversed(rest):
        value = [value] if part == "[N]" else {part: value}
    return {first: value}


def joined(one, other):
    """Return two pieces of YAML in one."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: joined(one[key], other[key]) if key in one and key in other else one.get(key, other.get(key))
                for key in {**one, **other}}  # fmt: skip
    return [joined(one[0], other[0])] if isinstance(one, list) and one and isinstance(one[0], dict) else other


@pytest.mark.parametrize("kind", [*kind_names(), "resources"])
def test_each_example_can_be_pasted_into_a_pipeline_as_it_is_printed(kind, tmp_path):
    explained = explain(kind)
    lines, whole, where = explained.lines(100), {}, "resources" if kind == "resources" else "with"
    for setting in explained.settings:
        if setting.example is None:
            continue
        example = json.loads(json.dumps(setting.example))
        start = next(n for n, line in enumerate(lines) if line.split(" ")[0] == setting.key)
        end = lines.index("", start) if "" in lines[start:] else len(lines)
        pasted = lines[end - 1]
        assert read_values(pasted) == nested(setting.key, example), pasted
        whole = joined(whole, nested(setting.key, example))
    needs = re.findall(r"\$\{phases\.(\w+)\.out\}", json.dumps(whole))
    uses = "init_model" if kind == "resources" else kind
    phases = {**{need: {"uses": "init_model"} for need in needs}, "p": {"uses": uses, where: whole}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"name": "p", "phases": phases}))
    phase = load_pipeline(tmp_path / "p.yaml").phases["p"]
    assert kind == "resources" or phase.settings.keys() == whole.keys()


@pytest.mark.parametrize("width", [60, 100])
def test_the_text_is_as_wide_as_the_terminal(width):
    told = afterok("explain", "sft", env={"COLUMNS": str(width)}).stdout.splitlines()
    prose = [line for line in told if not re.match(r"    [\w]+: |On the command line", line)]
    assert max(map(len, prose)) <= width and max(map(len, prose)) > width // 2


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
