"""Choices by likelihood: the log-likelihoods that transformers gives, whatever the ranks, and what follows of them."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from data_tools.base import durable
from data_tools.mistake import UserMistake
from data_tools.tasks.mix import Entry, MixConfig, load_items
from data_tools.tasks.task import Source
from megatron_ext.entrypoints import evaluate, import_hf, init_model
from megatron_ext.parallel.plan import ParallelPlan
from tests.data_tools.chats import write_tokenizer
from tests.inputs import SHIPPED
from tests.megatron_ext.rounding import logits_bound

QUESTIONS = SHIPPED / "qwen_math" / "mmlu_stem.test.jsonl"
SCHOOL = [
    {"id": str(n), "question": f"Which of these is number {n}?", "answerKey": "ABC"[n % 3],
     "choices": {"text": ["one", "two of them", "a b c d e f"], "label": ["A", "B", "C"]}}
    for n in range(5)
]  # fmt: skip


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    """A tiny model with a tokenizer that writes any text, and questions in ARC's schema."""
    root = tmp_path_factory.mktemp("likelihood")
    for name in ("hf", "model"):
        (root / name).mkdir()
    write_tokenizer(root / "tokenizer")
    sizes = dict(hidden=32, ffn=48, layers=2, max_positions=512)
    init_model.run(init_model.Config(tokenizer=str(root / "tokenizer"), **sizes), root / "hf", root)
    import_hf.run(import_hf.Config(str(root / "hf")), root / "model", root)
    (root / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SCHOOL))
    return root


def entries(school) -> dict[str, Entry]:
    likely = {"answered_by": "likelihood"}
    return {
        "mmlu": Entry("mmlu", likely, source=Source([str(QUESTIONS)])),
        "arc": Entry("arc_easy", likely, source=Source([str(school / "arc.jsonl")])),
    }


def config(school, **changes) -> evaluate.Config:
    return evaluate.Config(model=str(school / "model"), mix=MixConfig(entries(school)), **changes)


def run(config, out, **more):
    out.mkdir(exist_ok=True)
    result = evaluate.run(config, out, out.with_name(f"{out.name}.keep"), **more)
    return result, [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def exact(school) -> dict[str, list[tuple[float, float]]]:
    """Return of each question the log-likelihoods of its choices in float64, and how far fp32 may end from each."""
    model = AutoModelForCausalLM.from_pretrained(school / "hf", dtype=torch.float32).eval()
    double, tokenizer = copy.deepcopy(model).double(), PreTrainedTokenizerFast.from_pretrained(school / "hf")
    found: dict[str, list[tuple[float, float]]] = {}
    for item in (item for name, entry in entries(school).items() for item in load_items(name, entry)):
        before = len(tokenizer(item.prompt)["input_ids"])
        for text in item.columns["choices"]:
            ids = torch.tensor([tokenizer(f"{item.prompt} {text}")["input_ids"]])
            own = range(before, ids.shape[1])
            with torch.no_grad():
                logits = double(ids).logits[0].log_softmax(-1)
            value = sum(float(logits[place - 1, ids[0, place]]) for place in own)
            # A log-prob moves by at most twice what a logit does.
            found.setdefault(item.uid, []).append((value, 2 * len(own) * logits_bound(model, ids)))
    return found


def is_near(line: dict, exact: dict) -> bool:
    pairs = zip(line["log_likelihoods"].values(), exact[line["prompt"]], strict=True)
    return all(abs(found - value) <= bound for found, (value, bound) in pairs)


def test_log_likelihoods_are_those_of_transformers_and_so_are_both_accuracies(school, exact, tmp_path):
    result, lines = run(config(school), tmp_path / "out")
    found = {line["prompt"]: line for line in lines}
    assert found.keys() == exact.keys() and all(is_near(line, exact) for line in lines)
    for name, entry in entries(school).items():
        items = load_items(name, entry)
        for key, weights in (("accuracy", lambda text: 1), ("accuracy_normalized", len)):
            right = 0
            for item in items:
                values = [value / weights(text) for (value, _), text in zip(exact[item.uid], item.columns["choices"])]
                right += item.columns["letters"][values.index(max(values))] == item.answer
            assert result[f"{name}_{key}"] == right / len(items)
    assert result["records"]["arc"]["prompts"] == 5 and result["prompts"] == len(lines)


def test_elements_and_ranks_do_not_change_what_is_likeliest(school, exact, tmp_path, two_ranks):
    whole, lines = run(config(school), tmp_path / "whole")
    parts = [tmp_path / name for name in ("a", "b")]
    for index, part in enumerate(parts):
        run(config(school), part, index=index, count=2)
    (tmp_path / "joined").mkdir()
    joined = evaluate.finish(config(school), parts, tmp_path / "joined", tmp_path / "keep")
    assert {name: value for name, value in joined.items() if "accuracy" in name} == {
        name: value for name, value in whole.items() if "accuracy" in name
    }
    plans = {"data": {}, "tensor": {"tensor": 2}, "context": {"context": 2}, "pipeline": {"pipeline": 2}}
    for name, axes in plans.items():
        (tmp_path / name).mkdir()
        parallel = replace(config(school), parallel=ParallelPlan(**axes))
        both = two_ranks.run(evaluate.run, config=parallel, out=tmp_path / name, keep=tmp_path / f"{name}.keep")
        assert both[0] == both[1], name
        found = [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        assert [line["prompt"] for line in found] == [line["prompt"] for line in lines], name
        assert all(is_near(line, exact) for line in found), name


def test_choices_and_written_answers_stand_side_by_side_and_are_told_apart(school, tmp_path):
    mixed = entries(school) | {
        "written": Entry("arc_easy", {"chat": False}, source=Source([str(school / "arc.jsonl")]))
    }
    result, lines = run(replace(config(school, max_new_tokens=4, samples=2), mix=MixConfig(mixed)), tmp_path / "out")
    assert result["written_prompts"] == result["arc_prompts"] == 5
    assert "accuracy" not in result and "sampled_accuracy" not in result  # tasks are not pooled
    assert "written_sampled_accuracy" in result and "arc_accuracy_normalized" in result
    assert set(result["records"]) == {"mmlu", "arc", "written"}
    table = durable.read_json(tmp_path / "out.keep" / "tables" / "accuracy.json")
    assert "by characters" in table["columns"]
    assert {row[0] for row in table["rows"]} == {"mmlu", "arc", "written"}
    harness = durable.read_json(tmp_path / "out" / "harness" / "results.json")
    assert harness["results"]["arc"]["acc,none"] == result["arc_accuracy"]
    assert harness["results"]["arc"]["acc_norm,none"] == result["arc_accuracy_normalized"]
    assert harness["results"]["written"]["exact_match,greedy"] == result["written_accuracy"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "harness" / "samples_arc.jsonl").read_text().splitlines()]
    assert [row["doc_id"] for row in rows] == [*range(5)] and len(rows[0]["arguments"]) == 3
    assert rows[0]["arguments"]["gen_args_1"]["arg_1"] == " two of them"


def test_a_question_that_the_positions_do_not_hold_is_refused_by_name(school, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps(SCHOOL[0] | {"question": "why " * 600}) + "\n")
    long = Entry("arc_easy", {"answered_by": "likelihood"}, source=Source([str(tmp_path / "long.jsonl")]))
    with pytest.raises(UserMistake, match=r"mix.entries.long: prompt .* tokens with the choice 'one', .* hold 512"):
        run(replace(config(school), mix=MixConfig({"long": long})), tmp_path / "out")
