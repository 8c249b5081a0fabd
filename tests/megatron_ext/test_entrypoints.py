"""Entrypoints: torch-free at their top, all mistakes at once, evaluation split over elements adds up."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest

from data_tools.base import declared, durable
from data_tools.chats.tokenizer import load_tokenizer
from data_tools.evaluations.accuracy import accuracy
from data_tools.evaluations.lines import compared_lines
from data_tools.mistake import UserMistake
from data_tools.tasks.mix import Entry, MixConfig
from data_tools.tasks.task import Source
from jobs.kind import Placement
from jobs.phases import evaluate as phase
from megatron_ext.entrypoints import (
    bare,
    evaluate,
    export_hf,
    export_megatron,
    export_nanochat,
    generate,
    grpo,
    import_hf,
    init_model,
    merge_lora,
    run_exported,
    sft,
)
from megatron_ext.model_folders import model_folder
from megatron_ext.parallel.plan import ParallelPlan

ENTRYPOINTS = (
    init_model, import_hf, sft, grpo, generate, evaluate, merge_lora, export_hf, export_nanochat, export_megatron,
)  # fmt: skip


def test_entrypoints_import_and_check_without_torch():
    code = (
        "import sys, importlib\n"
        "for name in 'init_model import_hf sft grpo generate evaluate merge_lora export_hf export_nanochat '\\\n"
        "    'export_megatron'.split():\n"
        "    module = importlib.import_module('megatron_ext.entrypoints.' + name)\n"
        "    module.check(module.Config(), 1)\n"
        "print([m for m in ('torch', 'megatron.core', 'transformers', 'safetensors') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("module", ENTRYPOINTS, ids=lambda module: module.__name__.rsplit(".")[-1])
def test_configs_are_structured_configs(module):
    from omegaconf import OmegaConf

    assert OmegaConf.to_object(OmegaConf.structured(module.Config)) == module.Config()


def test_sft_names_every_mistake(calculator):
    config = sft.Config(
        model=str(calculator["base"]),
        store=str(calculator["store"]),
        packs=str(calculator["packs"]),
        steps=9,
        schedule="cosin",
        global_batch=3,
        parallel=ParallelPlan(tensor=3),
    )
    found = [str(problem) for problem in declared.check_with(config, lambda config: sft.check(config, 3))]
    assert found[0].startswith("schedule: unknown value 'cosin' (did you mean cosine?")
    assert found[1].startswith("parallel.tensor: 3 does not split 4 heads and 2 KV groups evenly: use tensor 1")
    config.parallel = ParallelPlan()
    assert "global batch of 3 packs does not divide by 2" in str(sft.check(config, 2)[-1])


def test_a_folder_that_is_no_model_folder_says_so(tmp_path):
    with pytest.raises(UserMistake, match="not a model folder"):
        model_folder.open_folder(tmp_path)
    durable.write_json(tmp_path / "model.json", {"format": 99})
    with pytest.raises(UserMistake, match="format 99 is unknown"):
        model_folder.open_folder(tmp_path)


def test_weights_that_were_changed_by_hand_are_not_exported(calculator, tmp_path):
    facts = durable.read_json(calculator["base"] / "model.json")
    folder = tmp_path / "model"
    shutil.copytree(calculator["base"], folder)
    durable.write_json(folder / "model.json", {**facts, "weights_digest": "0" * 64})
    (tmp_path / "out").mkdir()
    with pytest.raises(UserMistake, match="they were changed"):
        export_hf.run(export_hf.Config(str(folder)), tmp_path / "out", tmp_path)


def evaluation(calculator, **changes) -> evaluate.Config:
    source = Source(synthetic_rows=40, synthetic_split="heldout")
    values = {"max_new_tokens": 4, "verifiers": 1, **changes}
    return evaluate.Config(model=str(calculator["base"]), source=source, **values)


def test_elements_of_an_evaluation_add_up_to_the_whole(calculator, tmp_path):
    config = evaluation(calculator, seen_in=str(calculator["store"]), samples=3)
    outs = [tmp_path / name for name in ("whole", "a", "b", "joined")]
    for out in outs:
        out.mkdir()
    whole = evaluate.run(config, outs[0], tmp_path)
    for index in range(2):
        evaluate.run(config, outs[1 + index], tmp_path / "keep", index=index, count=2)
    assert not (tmp_path / "keep" / "tables").exists()
    joined = evaluate.finish(config, outs[1:3], outs[3], tmp_path / "keep")
    said = {name: whole[name] for name in ("engine", "parts")}  # by each element of itself
    assert joined | said == whole
    assert joined == durable.read_json(outs[3] / "result.json") == durable.read_json(outs[0] / "result.json")
    assert whole["prompts"] == whole["seen_prompts"] + whole["unseen_prompts"] and whole["seen_prompts"] == 0
    samples = [sorted((out / "samples.jsonl").read_text().splitlines()) for out in (outs[0], outs[3])]
    assert samples[0] == samples[1] and len(samples[0]) == whole["prompts"]
    table = durable.read_json(tmp_path / "keep" / "tables" / "accuracy.json")
    assert [row[0] for row in table["rows"]] == [
        "all",
        "seen in training",
        "not seen",
        "others",
        "single operation sums",
    ]
    (prompts,) = durable.read_json(tmp_path / "keep" / "tables" / "prompts.json")["rows"]
    records = whole["records"]["calculator"]
    assert prompts[:4] == ["calculator", records["lines"], records["rows"], whole["prompts"]]
    assert records["rows"] == whole["prompts"] + records.get("duplicate", 0) + records.get("over_limit", 0)
    again = evaluate.run(replace(config, compare_with=str(outs[0])), outs[1], tmp_path)
    assert again["gain"] == again["gain_error"] == 0 and again["sampled_accuracy"] == whole["sampled_accuracy"]


def test_what_was_gained_is_told_with_its_error_prompt_by_prompt():
    def lines(*counts: int) -> list[dict]:
        told = dict(correct=True, seen=None, sampled=4, votes=[])
        return [dict(prompt=str(i), sampled_correct=count, **told) for i, count in enumerate(counts)]

    before = {sample["prompt"]: sample for sample in lines(0, 2, 2)}
    result = accuracy(lines(1, 3, 4), before)
    assert result["sampled_accuracy"] == pytest.approx(8 / 12) and result["gain"] == pytest.approx(4 / 12)
    assert result["gain_error"] == pytest.approx(numpy.std([0.25, 0.25, 0.5], ddof=1) / 3**0.5)
    assert "gain" not in accuracy(lines(1), {})


def test_a_mix_of_tasks_is_evaluated_with_pass_and_majority_at_k(calculator, tmp_path):
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps({"prompt": f"{n}="}) + "\n" for n in (1, 2, 3)))
    mix = MixConfig({
        "sums": Entry("calculator", source=Source(synthetic_rows=9, synthetic_split="heldout")),
        "tool": Entry("tests.data_tools.tasks.verifiers", source=Source(inputs=[str(tmp_path / "questions.jsonl")])),
    })  # fmt: skip
    macro = {"both": ["sums", "tool"]}
    config = evaluate.Config(
        model=str(calculator["base"]), mix=mix, macro=macro, max_new_tokens=5, samples=4, verifiers=1
    )
    outs = [tmp_path / name for name in ("whole", "a", "b", "joined", "sums", "tool", "by task")]
    for out in outs:
        out.mkdir()
    whole = evaluate.run(config, outs[0], tmp_path / "keep")
    for index in range(2):
        evaluate.run(config, outs[1 + index], tmp_path / "parts", index=index, count=2)
        evaluate.run(config, outs[4 + index], tmp_path / "tasks", index=index, count=2, only=outs[4 + index].name)
    for parts, out, keep in ((outs[1:3], outs[3], "parts"), (outs[4:6], outs[6], "tasks")):
        joined = evaluate.finish(config, parts, out, tmp_path / keep)
        assert joined | {name: whole[name] for name in ("engine", "parts")} == whole
        for file in ("results.json", "samples_sums.jsonl", "samples_tool.jsonl"):
            assert (out / "harness" / file).read_bytes() == (outs[0] / "harness" / file).read_bytes(), file
    assert {json.loads(line)["kind"] for line in open(outs[4] / "samples.jsonl")} == {"sums"}  # an element a task
    # its reward is a length, of which 1 and more are right
    assert whole["prompts"] == 12 and whole["tool_prompts"] == 3 and whole["tool_accuracy"] == 1
    assert whole["tool_pass@4"] == 1 and "tool_maj@4" not in whole
    assert {"sums_pass@1", "sums_pass@2", "sums_pass@4", "sums_maj@4"} <= set(whole)
    assert whole["sums_pass@1"] == pytest.approx(whole["sums_sampled_accuracy"])
    assert whole["sums_pass@4"] >= whole["sums_pass@2"] >= whole["sums_pass@1"]
    assert not {"accuracy", "pass@1", "sampled_accuracy"} & set(whole)  # tasks are not pooled
    assert whole["macro"]["both"]["accuracy"] == (whole["sums_accuracy"] + 1) / 2
    # nothing is sampled anew
    again = evaluate.run(replace(config, compare_with=str(outs[0]), verifiers=2), outs[1], tmp_path / "keep")
    assert again["sums_gain"] == again["tool_gain"] == 0
    wrong = replace(config, source=Source(synthetic_rows=1), task_options={"reverse_digits": True}, top_p=0.0)
    problems = declared.check_with(wrong, lambda config: evaluate.check(config, 1))
    assert [problem.where for problem in problems] == ["top_p", "mix"]
    assert "beside task_options, source" in problems[1].message


def test_an_array_names_the_tasks_of_the_mix_each_once_and_a_mean_names_tasks_that_are_there():
    entries = {name: Entry("calculator", source=Source(synthetic_rows=1)) for name in ("gsm8k", "aime")}
    config = evaluate.Config(model="m", mix=MixConfig(entries))
    for values, said in (
        (["gsm8k", "aime"], ""), ([0, 1, 2], ""), ([], ""),
        (["gsm8k"], "no element takes aime of mix"), (["gsm8k", "aime", "gsm8k"], "name each task once"),
        (["gsm8k", 1], "name each task once"), (["gsm8k", "aim"], "'aim' is no task of mix (did you mean aime?"),
    ):  # fmt: skip
        assert said in (" ".join(evaluate.check_elements(config, values)) or "") and (
            bool(said) == bool(evaluate.check_elements(config, values))
        ), values
    rows = replace(config, mix=MixConfig())  # of which check would say that the default task has no rows
    for array in (["gsm8k"], ["gsm8k", "aime"]):
        (problem,) = phase.check(rows, Placement(1, elements=len(array), values=tuple(array)))
        assert problem.where == "mix" and f"{array} names tasks of a mix, and there is none" in problem.message
        assert "mix: {entries: {gsm8k: {}" in problem.message and "a number of elements" in problem.message
    both = replace(config, macro={"all": ["aime"]})
    problems = phase.check(both, Placement(1, elements=1, values=("gsm8k",)))
    assert [problem.where for problem in problems] == ["macro.all", "mix"]  # all at once
    for names, said in ((["gsm8k", "aim"], "did you mean aime?"), (["aime", "aime"], "each once"), (["aime"], "two")):
        (problem, *_) = evaluate.check(replace(config, macro={"all": names}), 1)
        assert problem.where == "macro.all" and said in problem.message
    names = MixConfig(entries | {"gsm8k_sampled": entries["gsm8k"]})
    (problem, *_) = evaluate.check(replace(config, mix=names), 1)
    assert problem.where == "mix.entries.gsm8k_sampled" and "would be those of gsm8k too" in problem.message


def test_samples_that_could_not_be_scored_are_counted_on_the_line_of_their_prompt():
    lines: dict[str, dict] = {"p": {}, "q": {}}
    outcomes = [("p", 1.0, True), ("p", None, None), ("p", 0.0, False), ("q", 1.0, True)]
    told = dict(answer="4", finish="stop", completion="4")
    evaluate.add_samples(lines, [dict(prompt_id=p, reward=r, correct=right, **told) for p, r, right in outcomes])
    assert (lines["p"]["sampled"], lines["p"]["sampled_correct"], lines["p"]["sampled_unscored"]) == (3, 1, 1)
    assert "sampled_unscored" not in lines["q"]


def test_a_task_is_sampled_and_scored_as_its_mix_is(calculator, tmp_path):
    """The end tokens of generation_config.json, the room that the model's positions leave, and the noise."""
    model = tmp_path / "model"
    shutil.copytree(calculator["base"], model)
    tokenizer = load_tokenizer(str(calculator["hf"]))
    ends = [tokenizer.eos_id, *tokenizer.encode("=")]  # what this model writes
    durable.write_json(model_folder.open_folder(model).hf / "generation_config.json", {"eos_token_id": ends})
    entry = Entry("calculator", source=Source(synthetic_rows=40, synthetic_split="heldout"))
    alone = evaluate.Config(model=str(model), source=entry.source, max_new_tokens=8, samples=2, verifiers=1)
    mixed = replace(alone, source=Source(), mix=MixConfig({"calculator": entry}))
    found = {}
    for name, config in (("task", alone), ("mix", mixed)):
        for folder in (tmp_path / name, tmp_path / f"{name}.keep"):
            folder.mkdir()
        evaluate.run(config, tmp_path / name, tmp_path / f"{name}.keep")
        found[name] = [json.loads(line) for line in open(tmp_path / name / "samples.jsonl")]
    assert len(found["task"]) == len(found["mix"]) > 10
    for ours, theirs in zip(found["task"], found["mix"]):
        assert (ours["completion"], ours["finish"]) == (theirs["completion"], theirs["finish"])
        assert ours["correct"] == (theirs["correct"] and theirs["finish"] == "stop")
        assert [answer for answer, _ in ours["votes"]] == [answer for answer, _ in theirs["votes"]]
    completions = [line["completion"] for line in found["task"] if line["finish"] == "stop"]
    assert completions and not any("=" in text for text in completions)
    for config in (alone, mixed):
        with pytest.raises(UserMistake, match="the model's positions and sampling.max_tokens leave 1 for it"):
            evaluate.run(replace(config, max_new_tokens=2047), tmp_path / "none", tmp_path / "none.keep")


def test_a_completion_may_hold_whatever_some_take_for_the_end_of_a_line(tmp_path, monkeypatch):
    """json.dumps escapes control characters alone: U+0085, U+2028 and U+2029 stay as they are."""
    lines = [dict(prompt=f"{n}", correct=True, seen=None, completion=f"a{mark}b", sampled=1, sampled_correct=1,
                  votes=[])
             for n, mark in enumerate("\x85\u2028\u2029")]  # fmt: skip
    for name in ("part", "out"):
        (tmp_path / name).mkdir()
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "part" / "samples.jsonl").write_text(text)
    monkeypatch.setattr(model_folder, "open_folder", lambda path: SimpleNamespace(step=0))
    config = evaluate.Config(compare_with=str(tmp_path / "part"), samples=1)
    found = evaluate.finish(config, [tmp_path / "part"], tmp_path / "out", tmp_path / "keep")
    assert found["prompts"] == 3 and found["gain"] == 0
    assert (tmp_path / "out" / "samples.jsonl").read_text() == text


def test_an_evaluation_without_samples_is_nothing_to_compare_with(tmp_path):
    config = evaluate.Config(model="m", source=Source(synthetic_rows=1), compare_with=str(tmp_path))
    assert [problem.where for problem in evaluate.check(config, 1)] == ["compare_with"]
    for line, said in ((None, "is no output of an evaluation"), (dict(prompt="1+1="), "has greedy answers alone")):
        if line:
            (tmp_path / "samples.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(UserMistake, match=f"compare_with: {tmp_path} {said}"):
            compared_lines(config.compare_with, samples=2)


def test_rows_of_one_prompt_are_compared_each_with_itself_or_not_at_all(tmp_path):
    """The task scores them differently, so one of them is no stand-in for the other."""

    def line(name: str, right: int) -> dict:
        return dict(
            prompt="1+1=",
            correct=True,
            seen=None,
            sampled=4,
            sampled_correct=right,
            votes=[],
            **({"prompt_id": name} if name else {}),
        )

    config = evaluate.Config(compare_with=str(tmp_path), samples=4)
    lines = [line("a", 0), line("b", 4)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert accuracy(lines, compared_lines(config.compare_with, config.samples))["gain"] == 0
    assert accuracy([line("b", 2)], compared_lines(config.compare_with, config.samples))["gain"] == -0.5
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line("", right)) + "\n" for right in (0, 4)))
    with pytest.raises(UserMistake, match="two lines of prompt '1.1=', the second at .*samples.jsonl:2"):
        compared_lines(config.compare_with, config.samples)


def test_prompts_of_the_training_store_count_as_seen(calculator, tmp_path):
    config = evaluation(calculator, seen_in=str(calculator["store"]), limit=25)
    config.source = Source(synthetic_rows=60)  # the training split
    result = evaluate.run(config, tmp_path, tmp_path)
    assert result["prompts"] == result["seen_prompts"] == 25 and result["unseen_accuracy"] is None


def test_right_answers_count_by_number_and_only_when_they_end():
    samples = [dict(prompt=f"{n}", correct=n != 1, seen=n < 2) for n in range(3)]
    result = accuracy(samples)
    assert (result["accuracy"], result["seen_accuracy"], result["unseen_accuracy"]) == (2 / 3, 0.5, 1.0)
    assert "seen_prompts" not in accuracy([dict(prompt="1", correct=True, seen=None)])


def test_a_malformed_line_is_named_by_file_and_line(calculator, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "?", "answer": "<<1+1=2>>2"}) + "\nnot json\n")
    config = evaluation(calculator)
    config.source = Source(inputs=[str(rows)])
    with pytest.raises(UserMistake, match=rf"{rows}:2: not JSON"):
        evaluate.run(config, tmp_path, tmp_path)


def test_an_exported_folder_is_asked_without_what_its_generation_config_adds(calculator, tmp_path):
    """A penalty of repetition, as Qwen2.5 has one, would make other completions than were trained and evaluated."""
    source = calculator["hf"]
    tokenizer, prompts = load_tokenizer(str(source)), [[5, 6, 7, 5, 6, 7], [8, 9]]
    found = []
    for name, more in (("plain", {}), ("penalised", {"repetition_penalty": 50.0, "min_new_tokens": 6, "min_p": 0.9})):
        shutil.copytree(source, folder := tmp_path / name)
        kept = durable.read_json(path) if (path := folder / "generation_config.json").exists() else {}
        durable.write_json(path, {**kept, **more})
        asked = run_exported._Model(run_exported.Config(str(folder), max_new_tokens=8), folder, tokenizer, 0)
        found.append([asked.completions(prompts, ways) for ways in (0, 3)])
    assert found[0] == found[1]


def test_evaluation_on_two_ranks_is_that_on_one(two_ranks, calculator, tmp_path):
    results = []
    for name, plan in (("dp", ParallelPlan()), ("tp", ParallelPlan(tensor=2))):
        (tmp_path / name).mkdir()
        config = evaluation(calculator, parallel=plan)
        results += two_ranks.run(evaluate.run, config=config, out=tmp_path / name, keep=tmp_path)
    (tmp_path / "one").mkdir()
    assert results == [evaluate.run(evaluation(calculator), tmp_path / "one", tmp_path)] * 4
    texts = {(tmp_path / name / "samples.jsonl").read_text() for name in ("dp", "tp", "one")}
    assert len(texts) == 1


def test_bare_mistakes_are_one_line_and_exit_code_2(tmp_path):
    config = tmp_path / "sft.yaml"
    config.write_text("model: nowhere\nstepps: 3\n")
    command = [
        sys.executable,
        "-m",
        "megatron_ext.entrypoints.sft",
        "--config",
        str(config),
        "--out",
        str(tmp_path / "o"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "stepps" in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_bare_configs_take_overrides(tmp_path):
    (tmp_path / "c.yaml").write_text("model: m\nlr: 1e-3\n")
    config = bare.read_config(sft.Config, tmp_path / "c.yaml", ["lr=0.5", "parallel.tensor=2"])
    assert (config.model, config.lr, config.parallel.tensor) == ("m", 0.5, 2)
    with pytest.raises(UserMistake):
        bare.read_config(sft.Config, tmp_path / "c.yaml", ["steps=many"])


def _hosted() -> int:
    """A rank whose store somebody already hosts, as our worker does it."""
    import os

    import torch

    from data_tools.base import rendezvous
    from data_tools.base.ports import PORTS
    from data_tools.base.rendezvous_server import Server
    from megatron_ext.parallel import ranks

    rank, port = int(os.environ["RANK"]), os.environ["MASTER_PORT"]
    place = rendezvous.Meeting("127.0.0.1", PORTS, f"test {port}", b"the key of a test")
    server = Server(place) if rank == 0 else None
    store = rendezvous.Client(place, 30.0)
    told = rendezvous.to_environment(place, store.port)
    os.environ.update(told)
    try:
        for _ in range(2):  # the second process group must not meet at the addresses of the first
            with ranks.started(ParallelPlan()):
                box = torch.ones(1)
                torch.distributed.all_reduce(box)
                group = torch.distributed.new_group([0, 1])
                torch.distributed.all_reduce(box, group=group)
                total = int(box)
        if rank:
            store.set("bye", b"1")
        else:
            store.wait(["bye"])  # the host of the store leaves last, as our worker's rank 0 does
        return total
    finally:
        store.close()
        for name in told:
            del os.environ[name]
        if server:
            server.close()


def test_ranks_join_a_store_that_somebody_hosts(two_ranks):
    assert two_ranks.run(_hosted) == [4, 4]
