"""Tasks from files in their real schemas, asked of a small model and scored: from a phase's array to its results."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.base import durable
from data_tools.mistake import Problem
from data_tools.tasks.mix import Entry, MixConfig, load
from data_tools.tasks.task import Item, Source, load_task, task_options
from jobs.kind import Placement
from jobs.phases import evaluate as phase
from jobs.task import Task
from megatron_ext.entrypoints import evaluate, generate, grpo, import_hf, init_model
from megatron_ext.parallel.plan import Site
from megatron_ext.rollout.settings import EngineConfig
from tests.data_tools.chats import template_of, write_tokenizer
from tests.inputs import Inputs

FILES = {
    "mmlu": "qwen_math/mmlu_stem.test.jsonl", "aime": "qwen_math/aime24.test.jsonl", "math500": "math500/test.jsonl",
    "svamp": "qwen_math/svamp.test.jsonl",
}  # fmt: skip
WRITTEN = ("aime", "math500", "svamp")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that writes any text, without a chat template."""
    root = tmp_path_factory.mktemp("model")
    for name in ("hf", "model"):
        (root / name).mkdir()
    write_tokenizer(root / "tokenizer", template=None)
    sizes: dict[str, Any] = dict(hidden=32, ffn=48, layers=2, max_positions=4096)
    init_model.run(init_model.Config(tokenizer=str(root / "tokenizer"), **sizes), root / "hf", root)
    import_hf.run(import_hf.Config(str(root / "hf")), root / "model", root)
    return root / "model"


def entries(inputs: Any, limit: int) -> dict[str, Entry]:
    found = {name: Entry(name, {"chat": False}, Source([str(inputs.data(file))]), limit=limit)
             for name, file in FILES.items()}  # fmt: skip
    found["mmlu"].options = {"answered_by": "likelihood"}
    return found


def evaluated(config: evaluate.Config, folder: Path, array: list[str]) -> dict[str, Any]:
    """Run the phase as its worker does: an element for each task, and then what joins them."""
    parts, keep = [], folder / "keep"
    problems = phase.check(config, Placement(1, elements=len(array), values=tuple(array)))
    assert not problems, problems
    for index, value in enumerate(array):
        parts.append(folder / f"part{index}")
        parts[-1].mkdir(parents=True)
        task = Task("evaluated", index, len(array), value, parts[-1], keep, rank=0, world_size=1)
        phase.run(config, task)
    (folder / "out").mkdir()
    return phase.finish(parts, config, Task("evaluated", 0, len(array), None, folder / "out", keep, 0, 1))


def check_all(inputs: Any, model: Path, folder: Path, *, limit: int, tokens: int, verifiers: int) -> None:
    """See that each task is there with all its prompts, and scored as its verifier scores the completions."""
    mix = entries(inputs, limit)
    config = evaluate.Config(model=str(model), mix=MixConfig(mix), macro={"mathematics": list(WRITTEN)}, samples=2,
                             max_new_tokens=tokens, engine=EngineConfig(kv_gib=0.5, max_batch=128),
                             verifiers=verifiers)  # fmt: skip
    facts = evaluated(config, folder, list(mix))
    results = durable.read_json(folder / "out" / "harness" / "results.json")
    lines = [json.loads(line) for line in open(folder / "out" / "samples.jsonl")]
    for name, entry in mix.items():
        items: dict[str, Item] = {item.uid: item for item in load(name, entry).items}
        own = {line["prompt"]: line for line in lines if line["kind"] == name}
        assert own.keys() == items.keys() and facts[f"{name}_prompts"] == len(items), name
        assert f"{name}: accuracy {facts[f'{name}_accuracy']:.3f}" in facts["headline"]
        rows = [json.loads(row) for row in open(folder / "out" / "harness" / f"samples_{name}.jsonl")]
        assert {row["doc_id"] for row in rows} == set(range(len(items)))
        if name not in WRITTEN:
            assert results["results"][name]["acc,none"] == facts["mmlu_accuracy"]
            assert facts["mmlu_accuracy"] == sum(line["correct"] for line in own.values()) / len(own)
            continue
        task: Any = load_task(name)
        options = task_options(task, entry.options)
        scored = {uid: task.rewards(items[uid], line["completion"], options) for uid, line in own.items()}
        assert all(line["correct"] == bool(scored[uid]["correct"]) for uid, line in own.items())
        assert facts[f"{name}_accuracy"] == sum(score["correct"] for score in scored.values()) / len(scored)
        assert results["results"][name]["exact_match,greedy"] == facts[f"{name}_accuracy"]
        assert len(rows) == 2 * len(items) and all(len(row["resps"][0]) == 2 for row in rows[1::2])
    means = [facts[f"{name}_accuracy"] for name in WRITTEN]
    assert facts["macro"]["mathematics"]["accuracy"] == pytest.approx(sum(means) / 3) and "accuracy" not in facts


def test_mmlu_aime_math_and_svamp_are_read_asked_and_scored_an_element_a_task(model, tmp_path):
    """Of the shipped files; the public ones under soak."""
    check_all(Inputs("shipped"), model, tmp_path, limit=2, tokens=4, verifiers=1)


@pytest.mark.soak
def test_all_questions_of_mmlu_stem_aime24_math500_and_svamp_are_asked_and_scored(inputs, model, tmp_path):
    check_all(inputs, model, tmp_path, limit=0, tokens=16, verifiers=2)


# -- chat templates ---------------------------------------------------------------------------------------------------


def test_messages_for_a_tokenizer_without_a_chat_template_are_refused_by_every_phase_that_asks(model, tmp_path):
    """Whether the model folder is there, or a phase upstream will make it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"problem": "1+1?", "answer": "2"}) + "\n")
    source = Source([str(rows)])
    asks = MixConfig({"aime": Entry("aime", source=source), "texts": Entry("aime", {"chat": False}, source)})
    plain, templated = tmp_path / "plain", tmp_path / "templated"
    write_tokenizer(plain, template=None)
    write_tokenizer(templated, template=template_of("qwen3"))

    def told(folder: str, forecasts: dict[str, Any]) -> list[list[Problem]]:
        site = Site(1, forecasts=forecasts)
        return [
            [problem for problem in module.check(module.Config(model=folder, mix=asks), 1, site)
             if "no chat template" in problem.message]
            for module in (evaluate, generate, grpo)
        ]  # fmt: skip

    upstream = {
        name: {"init": init_model.forecast(init_model.Config(tokenizer=str(folder)))}
        for name, folder in (("plain", plain), ("templated", templated))
    }
    for name, forecasts in upstream.items():
        forecasts["m"] = import_hf.forecast(import_hf.Config("init"), forecasts)
        forecasts["tuned"] = grpo.forecast(grpo.Config(model="m"), Site(1, forecasts=forecasts))
        for folder in ("m", "tuned"):
            for problems in told(folder, forecasts):
                assert [problem.where for problem in problems] == (["mix.entries.aime.options"] * (name == "plain"))
    assert all(len(problems) == 1 for problems in told(str(model), {}))
    assert not any(told("nothing known of it", {}))  # what nobody knows yet is not asked


@pytest.mark.parametrize("source, tokenizer, known", [
    ("plain", "", False), ("templated", "", True), ("bare", "plain", False), ("bare", "templated", True),
    ("bare", "", None), ("templated", "plain", True), ("plain", "templated", None), ("org/nowhere", "", None),
    ("bare", "nanochat", True),
])  # fmt: skip
def test_what_an_import_will_have_of_a_template_is_known_or_said_to_be_not(tmp_path, source, tokenizer, known):
    for name, template in (("plain", None), ("templated", template_of("qwen3"))):
        write_tokenizer(tmp_path / name, template=template)
    for name in ("bare", "nanochat"):
        (tmp_path / name).mkdir()
    (tmp_path / "nanochat" / "tokenizer.pkl").write_bytes(b"")
    folder = tmp_path / source if "/" not in source else source
    config = import_hf.Config(str(folder), tokenizer=str(tmp_path / tokenizer) if tokenizer else "")
    assert import_hf._template(config, None) is known
