"""Data sets of conversations by name: their real schemas, thoughts kept or left out, files or the hub's cache."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_tools.base import declared
from data_tools.chats.conversation import BadRecord, read_record
from data_tools.chats.tokenizer import load_tokenizer
from data_tools.mistake import UserMistake
from data_tools.packs import materialize
from data_tools.packs.materialize import Config
from data_tools.packs.store import Store
from data_tools.tasks.mix import Entry, MixConfig, check_mix
from data_tools.tasks.task import Source, load_task, task_names, task_options
from jobs.phases import materialize as phase
from tests.data_tools.chats import template_of, write_tokenizer
from tests.data_tools.conftest import build
from tests.data_tools.tasks.test_mix import cache

ASKS = "Your role as an assistant involves … <|begin_of_thought|> {thought} <|end_of_thought|> …"
MARKED = "<|begin_of_thought|>\n\nSECRET\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nfour\n\n<|end_of_solution|>"
ROWS = {  # the schemas as the hub has them
    "OpenThoughts-114k": {"system": ASKS, "conversations": [{"from": "user", "value": "2+2?"},
                                                            {"from": "assistant", "value": MARKED}]},
    "its metadata": {"problem": "2+2?", "deepseek_reasoning": "SECRET", "deepseek_solution": "four", "domain": "math",
                     "ground_truth_solution": "4", "source": "numina", "test_cases": None, "starter_code": None},
    "OpenThoughts3": {"difficulty": 3, "source": "ai2", "domain": "math", "conversations": [
        {"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "<think>\nSECRET\n</think>\n\nfour"}]},
    "Dolci": {"id": "a", "source": "allenai/x", "messages": [
        {"role": "user", "content": "2+2?", "function_calls": None, "functions": None},
        {"role": "assistant", "content": "<think>SECRET</think>four", "function_calls": None, "functions": None}]},
    "of several turns": {"messages": [
        {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "<think>SECRET</think>two"},
        {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "<think>SECRET</think>four"}]},
}  # fmt: skip
CHATS = [name for name in task_names() if hasattr(load_task(name), "conversation")]


def changed(record: dict, **options):
    task = load_task("openthoughts")
    [given] = read_record(record)
    return task.conversation(given, task_options(task, options))


@pytest.mark.parametrize("name", ROWS)
def test_thoughts_leave_what_is_trained_and_its_context_with_answer_only(name):
    with_thoughts, without = changed(ROWS[name]), changed(ROWS[name], answer_only=True)
    assert "SECRET" in json.dumps(with_thoughts.messages)
    told = json.dumps(without.messages)
    assert "SECRET" not in told and "think" not in told and "thought" not in told
    assert without.messages[-1]["content"] == "four" and without.messages[-2]["content"] == "2+2?"


def test_a_thought_without_an_answer_or_an_end_is_no_answer():
    for text, bucket in (("<think>a", "unfinished_thought"), ("a</think>b", "unfinished_thought"),
                         ("<think>a</think> ", "empty_assistant")):  # fmt: skip
        record = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]}
        with pytest.raises(BadRecord) as caught:
            changed(record, answer_only=True)
        assert caught.value.bucket == bucket


def test_turns_that_the_data_keeps_out_of_the_loss_stay_out_when_the_system_message_goes():
    record = {"messages": [
        {"role": "system", "content": ASKS}, {"role": "user", "content": "1"},
        {"role": "assistant", "content": "a", "weight": 0}, {"role": "user", "content": "2"},
        {"role": "assistant", "content": "b"}]}  # fmt: skip
    assert changed(record).untrained == {2} and changed(record, answer_only=True).untrained == {1}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), template=template_of("qwen3"))


def texts_of(store: Path, tokenizer: Path) -> list[str]:
    read, known = Store(store), load_tokenizer(str(tokenizer))
    return [known.decode(np.asarray(read.ids(number)).tolist()) for number in range(len(read))]


@pytest.mark.parametrize("answer_only", [False, True])
def test_materialize_reads_a_data_set_by_its_name_from_files_and_from_the_cache(
    tmp_path, tokenizer, monkeypatch, answer_only
):
    lines = "".join(json.dumps(row) + "\n" for name, row in ROWS.items() if name != "of several turns")
    file = tmp_path / "own.jsonl"
    file.write_text(lines)
    config = Config(Source([str(file)]), str(tokenizer), "openthoughts", {"answer_only": answer_only})
    assert build(config, tmp_path / "files")[1]["kept"] == (1 if answer_only else 2)  # others are duplicates
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(load_task("openthoughts"), "HUB", "some/set:data/train-*")
    hub = Config(Source(), str(tokenizer), "openthoughts", {"answer_only": answer_only})
    assert materialize.datasets(hub) == phase.datasets(hub) == ["some/set:data/train-*"] and not materialize.check(hub)
    assert not materialize.datasets(config) and phase.forecast(hub, None) == {"sources": None}
    with pytest.raises(UserMistake, match="hf download some/set --repo-type dataset"):
        build(hub, tmp_path / "missing")
    cache(tmp_path, {"data/train-0.jsonl": lines, "data/test-0.jsonl": lines})
    assert build(hub, tmp_path / "hub")[1]["kept"] == (1 if answer_only else 2)
    stores = [texts_of(tmp_path / name / "out1", tokenizer) for name in ("files", "hub")]
    assert stores[0] == stores[1] and ("SECRET" in "".join(stores[0])) != answer_only


def test_nanochats_lines_and_smoltalks_rows_are_chats(tmp_path, tokenizer):
    pair = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "a.jsonl").write_text(json.dumps(pair) + "\n" + json.dumps({"messages": pair, "source": "x"}) + "\n")
    config = Config(Source([str(tmp_path / "a.jsonl")]), str(tokenizer), "smoltalk", dedupe=False)
    assert build(config, tmp_path / "out")[1]["kept"] == 2


@pytest.mark.parametrize("name", CHATS)
def test_a_data_set_of_conversations_is_no_task_to_be_scored(name):
    [problem] = check_mix(MixConfig({name: Entry(source=Source(["x"]))}))
    assert f"task {name} has conversations to learn; materialize takes it" in str(problem)


def test_settings_that_a_data_set_does_not_have_are_refused():
    config = Config(Source(synthetic_rows=3), "t", "openthoughts", {"answer_onyl": True})
    told = [str(problem) for problem in declared.check_with(config, materialize.check)]
    assert any("unknown task option 'answer_onyl' (did you mean answer_only?" in line for line in told)
    assert any("source.synthetic_rows: task openthoughts makes no rows" in line for line in told)
    named = declared.check_with(Config(Source(["x"]), "t", "openthots"), materialize.check)
    assert "unknown task 'openthots' (did you mean openthoughts?" in str(named[0])


@pytest.mark.parametrize("task", ["", *task_names(), "tests.data_tools.tasks.verifiers:length"])
def test_a_source_without_rows_is_told_only_of_what_the_task_can_take(task):
    """Whatever names a source without rows: materialize of chats and of rows, and a mix."""
    of_mix = [p for p in check_mix(MixConfig({"a": Entry(task)}), training=False) if p.where.endswith(".source")]
    assert of_mix or not task or task in task_names()
    of_data = [p for p in materialize.check(materialize.Config(task=task, tokenizer="t")) if p.where == "source"]
    makes_rows = task in task_names() and hasattr(load_task(task), "synthetic_row")
    for problem in of_mix + of_data:
        assert "give files in source.inputs" in problem.message
        assert ("synthetic_rows" in problem.message) == makes_rows
    assert all("hub" not in problem.message for problem in of_data)
