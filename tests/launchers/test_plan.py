"""What plan makes of a pipeline's settings: paths by field, keys by what matters."""

import dataclasses
import re
from types import SimpleNamespace
from typing import get_type_hints

import pytest

from data_tools.mistake import UserMistake
from jobs.artifacts.run_folder import RunFolder
from jobs.kind import find_kind, inputs, kind_names
from jobs.schema.pipeline import load_pipeline
from launchers.planning.planner import _absolute_inputs, make_plan
from slurm.detect import find_cluster


def plan_of(tmp_path, text, *overrides):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    return make_plan(load_pipeline(path, list(overrides)), RunFolder(tmp_path / "run"), find_cluster("local"))


def _filled(schema):
    """A config of `schema` and its settings, where every text is "same" and every list or mapping of texts holds it."""
    settings = {}
    for name, hint in get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint):
            settings[name] = _filled(hint)
        elif "Dict" in str(hint) and dataclasses.is_dataclass(hint.__args__[1]):
            settings[name] = {"same": _filled(hint.__args__[1]), "with.dots": _filled(hint.__args__[1])}
        elif "List[str]" in str(hint):
            settings[name] = ["same"]
        elif "Dict[str, " in str(hint):
            settings[name] = {"same": "same"}
        elif "str" in str(hint):
            settings[name] = "same"
    return settings


def _config(schema, settings):
    hints = get_type_hints(schema)
    return schema(
        **{
            name: _config(hints[name], value)
            if dataclasses.is_dataclass(hints[name])
            else {key: _config(hints[name].__args__[1], one) for key, one in value.items()}
            if "Dict" in str(hints[name]) and dataclasses.is_dataclass(hints[name].__args__[1])
            else value
            for name, value in settings.items()
        }
    )


def _texts(value, key=""):
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _texts(one, f"{key}.{name}" if key else name)
    else:
        yield from ((key, one) for one in (value if isinstance(value, list) else [value]))


@pytest.mark.parametrize("kind", kind_names())
def test_only_the_fields_that_are_inputs_become_absolute_whatever_their_text(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "same").mkdir()
    kind = find_kind(kind)
    settings = _filled(kind.config)
    config = _config(kind.config, settings)
    fields = {key for key, _, _ in inputs(kind.config, config)}
    for key, text in _texts(_absolute_inputs(SimpleNamespace(kind=kind, config=config), settings)):
        assert text == (str(tmp_path / "same") if key in fields else "same"), key


def test_a_setting_that_equals_an_inputs_path_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen2").mkdir()
    (planned,) = plan_of(
        tmp_path,
        """
name: p
phases:
  init:
    uses: init_model
    with: {family: qwen2, tokenizer: qwen2, layers: 1, hidden: 32, heads: 4, kv_groups: 2, ffn: 64}
""",
    ).phases
    assert planned.frozen.settings["family"] == "qwen2"
    assert planned.frozen.settings["tokenizer"] == str(tmp_path / "qwen2")


LEARNT = """
name: p
phases:
  data:
    uses: materialize
    with: {tokenizer: words, source: {inputs: INPUTS}}
"""


def test_a_pattern_is_frozen_as_the_files_it_matches_and_keyed_as_if_each_stood_there(tmp_path, monkeypatch):
    """What appears between plan and run is not read, and nothing is read that the key does not hold."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words").mkdir()
    (tmp_path / "data").mkdir()
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / "data" / name).write_text(name)
    listed, matched = (
        plan_of(tmp_path, LEARNT.replace("INPUTS", text)).phases[0].frozen
        for text in ("[data/a.jsonl, data/b.jsonl]", '["data/*.jsonl"]')
    )
    files = [str(tmp_path / "data" / name) for name in ("a.jsonl", "b.jsonl")]
    assert listed.settings["source"]["inputs"] == matched.settings["source"]["inputs"] == files
    assert listed.key == matched.key and listed.inputs == matched.inputs
    (tmp_path / "data" / "0.jsonl").write_text("more")
    assert plan_of(tmp_path, LEARNT.replace("INPUTS", '["data/*.jsonl"]')).phases[0].frozen.key != matched.key
    with pytest.raises(UserMistake, match="'data/\\*.csv': no such file or folder"):
        plan_of(tmp_path, LEARNT.replace("INPUTS", '["data/*.csv"]'))


SCORED = """
name: p
phases:
  init:
    uses: init_model
    with: {family: qwen2, alphabet_task: calculator, layers: 1, hidden: 32, heads: 4, kv_groups: 2, ffn: 64}
  imported: {uses: import_hf, with: {source: "${phases.init.out}"}}
  samples:
    uses: generate
    with:
      model: "${phases.imported.out}"
      mix: {entries: {mine: {task: "my_rewards:score", source: {inputs: [p.jsonl]}}}}
  trained:
    uses: grpo
    with:
      model: "${phases.imported.out}"
      steps: 1
      mix: {entries: {mine: {task: "my_rewards:score", source: {inputs: [p.jsonl]}}}}
  judged:
    uses: evaluate
    with:
      model: "${phases.imported.out}"
      mix: {entries: {mine: {task: "my_rewards:score", source: {inputs: [p.jsonl]}}}}
"""


def test_what_scores_is_in_the_key_by_content_with_what_it_imports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (tmp_path / "my_rewards.py").write_text("import my_grammar\n\ndef score(item, completion):\n    return 1.0\n")
    (tmp_path / "my_grammar.py").write_text("")
    (tmp_path / "my_other.py").write_text("")
    SCORERS = ("samples", "trained", "judged")

    def keys():
        return {phase.name: phase.frozen.key for phase in plan_of(tmp_path, SCORED).phases}

    first = keys()
    (tmp_path / "my_other.py").write_text("x = 1")
    assert keys() == first
    for file in ("my_rewards.py", "my_grammar.py"):
        before = keys()
        with open(tmp_path / file, "a") as more:
            more.write("\n# edited\n")
        after = keys()
        assert after["init"] == before["init"]
        assert all(after[name] != before[name] for name in SCORERS)


ASKS = """
name: asks
phases:
  data:
    uses: materialize
    with: {task: openthoughts, tokenizer: org/name}
  sampled:
    uses: generate
    with:
      model: org/model
      mix: {entries: {math500: {}, gsm8k: {source: {inputs: [FILE]}}, own: {task: gsm8k, hub: some/set@v1}}}
  measured:
    uses: evaluate
    with: {model: org/model, mix: {entries: {math500: {}, aime: {}}}, max_new_tokens: 8}
"""


def test_all_datasets_that_are_not_on_this_machine_are_noted_once_with_their_commands(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for name in ("model", "tokenizer"):
        (tmp_path / name).mkdir()
    text = ASKS.replace("FILE", str(tmp_path / "rows.jsonl")).replace("org/model", str(tmp_path / "model"))
    plan = plan_of(tmp_path, text)
    found = [note.partition("`hf download ")[2].partition("`")[0] for note in plan.notes]
    sets = ["open-thoughts/OpenThoughts-114k", "HuggingFaceH4/MATH-500", "some/set", "Maxwell-Jia/AIME_2024"]
    wanted = [f"{name} --repo-type dataset{' --revision v1' if name == 'some/set' else ''}" for name in sets]
    assert found == [wanted[0], "org/name", *wanted[1:]]  # the tokenizer, too
    assert plan.as_json()["notes"] == plan.notes and {problem.check for problem in plan.told} == {"H001"}


def test_a_model_that_the_cache_lacks_is_noted_with_its_revision_and_one_that_is_there_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    text = "name: a\nphases: {one: {uses: import_hf, with: {source: org/base}}}"
    (note,) = plan_of(tmp_path, text.replace("org/base", "org/base, revision: v2")).notes
    assert "org/base@v2 is not in the hub cache; run `hf download org/base --revision v2` on" in note
    home = tmp_path / "models--org--base"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    (home / "snapshots" / "abc").mkdir(parents=True)
    assert plan_of(tmp_path, text).notes == []


LARGE = """
name: large
phases:
  init:
    uses: init_model
    with: {alphabet_task: calculator, layers: 64, hidden: 1048576, heads: 4, kv_groups: 4, ffn: 1048576, tied: true}
  model: {uses: import_hf, with: {source: "${phases.init.out}", dtype: bfloat16}}
  tuned:
    uses: sft
    with: {model: "${phases.model.out}", store: store, packs: packs, steps: 5, lora: {rank: 1, targets: [q_proj]}}
  merged: {uses: merge_lora, with: {model: "${phases.tuned.out}"}}
  exported: {uses: export_hf, array: 3, with: {model: "${phases.merged.out}", dtype: float16}}
"""


def test_the_weights_of_every_phase_count_against_the_disk(tmp_path, monkeypatch):
    """Also where each is made of the one before, and nothing is there yet; a rehearsal leaves nothing."""
    for name in ("store", "packs"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserMistake) as refused:
        plan_of(tmp_path, LARGE)
    (line,) = [str(problem) for problem in refused.value.problems if problem.check == "D001"]
    told = re.findall(r"(\w+) ([\d,.]+) (G|T)iB(?=[,)])", line)
    sizes = {name: float(size.replace(",", "")) * {"G": 2**30, "T": 2**40}[unit] for name, size, unit in told}
    assert "tuned" in sizes
    weights = 64 * 7 * 2**40  # matrices alone: q, k, v, o and three of the MLP, each 2^20 x 2^20
    for name, width in (("init", 4), ("model", 2), ("merged", 2), ("exported", 2)):
        assert sizes[name] == pytest.approx(weights * width, rel=1e-4), (name, sizes)
    rehearsed = load_pipeline(tmp_path / "p.yaml", [])
    rehearsed.rehearsed = 0.001
    make_plan(rehearsed, RunFolder(tmp_path / "rehearsal"), find_cluster("local"))


WRITE_WEIGHTS = {
    "export_hf", "export_megatron", "export_nanochat", "grpo", "import_hf", "init_model", "merge_lora", "sft",
}  # fmt: skip


def test_every_kind_is_known_to_write_weights_or_not_to():
    """Of the others no size is known before they ran: rows, tokens and samples."""
    assert {name for name in kind_names() if hasattr(find_kind(name).module, "costs")} == WRITE_WEIGHTS
