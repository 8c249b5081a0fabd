"""Sampling for rejection: the same samples however they are cut, stopped and gone on with; training reads the best."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_tools.base import declared, durable
from data_tools.chats.chat import ChatConfig
from data_tools.chats.samples import problem_of_sample
from data_tools.chats.tokenizer import load_tokenizer
from data_tools.mistake import UserMistake
from data_tools.packs import materialize, pack
from data_tools.prepare import rejection, rejection_element, rejection_finish
from data_tools.progress import Stopped
from data_tools.tasks.mix import Entry, MixConfig
from data_tools.tasks.task import Source
from megatron_ext.entrypoints import evaluate, generate, grpo, sft
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rl.prompts import stop_ids_of
from megatron_ext.rl.settings import Evaluation
from megatron_ext.rollout.settings import EngineConfig, Sampling
from tests.megatron_ext import tiny

PROMPTS, SAMPLES = 12, 4
VERIFIER = "tests.data_tools.tasks.verifiers:length"


def config(calculator, **changes) -> generate.Config:
    mix = MixConfig({
        "sums": Entry("calculator", source=Source(synthetic_rows=40, synthetic_split="heldout"), limit=PROMPTS - 2),
        "lengths": Entry(VERIFIER, source=Source(inputs=[str(calculator["questions"])]), evaluation_only=True),
    })  # fmt: skip
    values = {"samples": SAMPLES, "sampling": Sampling(max_tokens=6), "seed": 3, "verifiers": 1, "chunk": 5, **changes}
    return generate.Config(model=str(calculator["base"]), mix=mix, **values)


@pytest.fixture(scope="module")
def folders(calculator, tmp_path_factory):
    root = tmp_path_factory.mktemp("generate")
    (root / "questions.jsonl").write_text("".join(json.dumps({"prompt": f"{n}="}) + "\n" for n in (1, 2)))
    return {**calculator, "questions": root / "questions.jsonl", "root": root}


@pytest.fixture(scope="module")
def whole(folders):
    """The folder of an uninterrupted run of one element, and its facts."""
    out, keep = made(folders["root"] / "whole")
    return out, generate.run(config(folders), out, keep)


def made(folder: Path) -> tuple[Path, Path]:
    for name in ("out", "keep"):
        (folder / name).mkdir(parents=True)
    return folder / "out", folder / "keep"


def test_samples_are_what_rejection_reads(whole):
    out, facts = whole
    rows = [json.loads(line) for line in open(out / "samples.jsonl")]
    assert [(row["place"], row["sample"]) for row in rows] == [(p, s) for p in range(PROMPTS) for s in range(SAMPLES)]
    assert all(problem_of_sample(row) == "" for row in rows)
    assert facts["prompts"] == PROMPTS and facts["samples"] == PROMPTS * SAMPLES == len(rows)
    lengths = [row for row in rows if row["task"] == "lengths"]
    assert len(lengths) == 2 * SAMPLES and all(row["reward"] == len(row["completion"]) for row in lengths)
    assert {row["correct"] for row in rows if row["task"] == "sums"} <= {True, False}
    assert {"pass@1", "pass@2", "pass@4"} <= set(facts) and facts["pass@1"] == pytest.approx(facts["accuracy"])
    rows[0]["reward"], rows[0]["correct"] = 0.5, None
    unjudged = generate._result(rows)
    assert unjudged["accuracy"] is None and "pass@1" not in unjudged and unjudged["reward"] > 0
    assert facts == durable.read_json(out / "result.json") | {name: facts[name] for name in ("engine", "parts")}
    found = facts["records"]["sums"]
    assert (found["prompts"], found["lines"]) == (PROMPTS - 2, found["rows"]) and facts["records"]["lengths"][
        "rows"
    ] == 2


def test_several_turns_are_sampled_shown_and_gone_on_with(folders, tmp_path):
    """A tool in a process of its own says how long the transcript is."""

    def several(**changes):
        tool = Entry("tests.data_tools.tasks.verifiers", source=Source(inputs=[str(folders["questions"])]))
        options = {"samples": 6, "sampling": Sampling(max_tokens=12), "record_s": 1e-9, **changes}
        return replace(config(folders), mix=MixConfig({"tool": tool}), **options)

    out, keep = made(tmp_path / "whole")
    generate.run(several(), out, keep)
    tokenizer = load_tokenizer(str(folders["hf"]))
    end = tokenizer.decode([tokenizer.eos_id])
    rows = [json.loads(line) for line in open(out / "samples.jsonl")]
    spoken = [row for row in rows if "turns" in row]
    assert spoken and all(
        "".join(turn["text"] for turn in row["turns"]).startswith(row["completion"]) for row in spoken
    )
    for row in spoken:
        for place, turn in enumerate(row["turns"]):
            before = "".join(one["text"] for one in row["turns"][:place]).removesuffix(end)  # as the task is asked
            assert turn["from"] == ("task" if place % 2 else "model")
            assert not place % 2 or turn["text"] == str(len(before))[: len(turn["text"])]
    out, keep = made(tmp_path / "cut")
    for allowed in (4, 3, 6):
        asked = iter(range(allowed))
        with pytest.raises(Stopped):
            generate.run(several(), out, keep, stop=lambda asked=asked: next(asked, None) is None)
    generate.run(several(engine=EngineConfig(0.1, 4, 3, 8)), out, keep)
    assert (out / "samples.jsonl").read_bytes() == (tmp_path / "whole/out/samples.jsonl").read_bytes()
    out, keep = made(tmp_path / "one turn")
    generate.run(several(sampling=Sampling(max_tokens=12, max_turns=1)), out, keep)
    found = [json.loads(line) for line in open(out / "samples.jsonl")]
    assert {row["finish"] for row in found} >= {"turns"} and not any("turns" in row for row in found)


def test_elements_join_to_the_bytes_of_the_whole(folders, whole, tmp_path):
    parts = []
    for index in range(3):
        out, keep = made(tmp_path / str(index))
        generate.run(config(folders), out, keep, index=index, count=3)
        parts.append(out)
    out, keep = made(tmp_path / "joined")
    facts = generate.finish(config(folders), parts, out, keep)
    assert facts | {name: whole[1][name] for name in ("engine", "parts")} == whole[1]  # each element says it of itself
    assert (out / "samples.jsonl").read_bytes() == (whole[0] / "samples.jsonl").read_bytes()
    assert (keep / "tables" / "samples.json").is_file()


def test_what_was_stopped_goes_on_to_the_same_samples(folders, whole, tmp_path):
    out, keep = made(tmp_path)
    reached = 0.0
    # engine steps until it is asked to stop; chunks that are whole by then
    for allowed, chunks in ((3, 0), (8, 1), (4, 1)):
        asked = iter(range(allowed))
        with pytest.raises(Stopped) as stopped:
            generate.run(config(folders), out, keep, stop=lambda asked=asked: next(asked, None) is None)
        assert reached < stopped.value.done < stopped.value.total and stopped.value.unit == "prompt"
        reached = stopped.value.done  # one that gets no further is not started again
        assert len(list(keep.glob("element_0000/samples/*/*"))) == chunks and not (out / "samples.jsonl").exists()
        assert list(keep.glob("element_0000/rollouts/*/*.jsonl"))
    again = generate.run(config(folders), out, keep)
    assert again == whole[1]
    assert (out / "samples.jsonl").read_bytes() == (whole[0] / "samples.jsonl").read_bytes()


def test_finished_samples_need_no_model_and_other_settings_do_not_take_them(folders, tmp_path, monkeypatch):
    out, keep = made(tmp_path)
    facts = generate.run(config(folders), out, keep)
    from megatron_ext.model_folders import model_folder

    monkeypatch.setattr(model_folder, "load_model", None)
    assert generate.run(config(folders), out, keep) == facts
    with pytest.raises(TypeError):
        generate.run(config(folders, seed=4), out, keep)


JUDGE = """
from dataclasses import dataclass
from data_tools.tasks.task import Item
REWARDS, HUB = {"correct": 1.0}, ""
@dataclass
class Options:
    always: bool = False
def items(record, options):
    return [Item.of(record["problem"], record["answer"], record)]
def rewards(item, completion, options):
    return {"correct": float(options.always or item.answer == "right" or item.columns["hint"] == "right") + LIKED}
"""


def test_verdicts_are_of_the_answers_the_columns_the_options_and_the_code_as_they_are(folders, tmp_path, monkeypatch):
    """The same KEEP serves while only the samples' settings are the same, and their scores are not those of before."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # which tells a file by its second and size
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    out, keep = made(tmp_path)

    def correct(answer: str = "wrong", hint: str = "none", liked: int = 0, always: bool = False, weight: float = 1.0):
        (tmp_path / "judges" / "of_users.py").write_text(JUDGE.replace("LIKED", str(liked)))
        rows = [{"problem": f"{n}=", "answer": answer, "hint": hint} for n in range(2)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = Source(inputs=[str(tmp_path / "rows.jsonl")])
        mix = MixConfig({"mine": Entry("judges.of_users", {"always": always}, source, rewards={"correct": weight})})
        return generate.run(replace(config(folders, samples=1), mix=mix), out, keep)["correct"]

    (tmp_path / "judges").mkdir()
    assert correct() == 0 and correct(answer="right") == 2 and correct(hint="right") == 2 and correct(liked=1) == 2
    assert correct(always=True, weight=3.0) == 2
    assert {row["reward"] for row in rows_of(out)} == {3.0}


def test_a_task_whose_every_verdict_fails_ends_the_phase_and_is_scored_anew(folders, tmp_path, monkeypatch):
    """Beside one that scores; without the model once more, for what was sampled stays."""
    rows = [{"prompt": f"{n}=", "file": str(tmp_path / "service")} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(inputs=[str(tmp_path / "rows.jsonl")])
    broken = Entry("tests.data_tools.tasks.verifiers:needs_a_file", source=source)
    mix = MixConfig({"sums": config(folders).mix.entries["sums"], "broken": broken})
    out, keep = made(tmp_path)
    wanted = replace(config(folders, samples=2, chunk=100), mix=mix)
    for run in (generate.run, lambda wanted, out, keep: evaluate.run(evaluation_of(wanted), out, keep / "evaluated")):
        with pytest.raises(UserMistake, match=r"entries.broken: no sample of \d could be scored: FileNotFoundError"):
            run(wanted, out, keep)
    assert not list(out.iterdir())
    (tmp_path / "service").touch()
    monkeypatch.setattr("megatron_ext.rollout.engine.Engine._draw", None)  # nothing is drawn again
    facts = generate.run(wanted, out, keep)
    assert facts["unscored"] == 0 and {row["reward"] for row in rows_of(out) if row["task"] == "broken"} == {1.0}


def evaluation_of(wanted: generate.Config) -> evaluate.Config:
    return evaluate.Config(model=wanted.model, mix=wanted.mix, max_new_tokens=6, verifiers=1)


def test_a_model_without_finite_logits_is_named_with_the_prompt(folders, tmp_path, monkeypatch):
    """Where generate samples, and where evaluate and grpo do."""

    def logits(*given: Any, **named: Any) -> torch.Tensor:
        return torch.full_like(whole(*given, **named), float("nan"))

    from megatron_ext.rollout import runner

    whole = runner.position_logits
    monkeypatch.setattr(runner, "position_logits", logits)
    wanted = replace(config(folders), mix=MixConfig({"sums": config(folders).mix.entries["sums"]}))
    trained = grpo.Config(model=wanted.model, mix=wanted.mix, steps=1, prompts=2, group=2, verifiers=1,
                          sampling=wanted.sampling)  # fmt: skip
    held_out = replace(
        trained,
        evaluation=Evaluation(every=1),
        mix=MixConfig(
            {**wanted.mix.entries, "held": replace(wanted.mix.entries["sums"], task="calculator", evaluation_only=True)}
        ),
    )
    for number, (entry, asked) in enumerate([
        (generate, wanted), (evaluate, evaluation_of(wanted)), (grpo, trained), (grpo, held_out)
    ]):  # fmt: skip
        out, keep = made(tmp_path / str(number))
        name = "held" if asked is held_out else "sums"
        said = f"gives NaN or infinite logits for prompt {name}/[0-9a-f]+, sample 0, new token 1: its weights"
        with pytest.raises(UserMistake, match=f"{folders['base']}.* {said}"):
            entry.run(asked, out, keep)
        assert not list(out.iterdir())


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in open(out / "samples.jsonl")]


def test_two_ranks_make_the_samples_of_one(two_ranks, folders, whole, tmp_path):
    for name, plan in (("dp", ParallelPlan()), ("tp", ParallelPlan(tensor=2))):
        out, keep = made(tmp_path / name)
        found = two_ranks.run(generate.run, config=config(folders, parallel=plan), out=out, keep=keep)
        assert found == [whole[1]] * 2, name
        assert (out / "samples.jsonl").read_bytes() == (whole[0] / "samples.jsonl").read_bytes(), name


def test_wrong_settings_and_prompts_without_room_are_refused(folders, tmp_path):
    wrong = config(folders, samples=0, chunk=0, sampling=Sampling(max_tokens=0), verify_limit_s=0.0)
    assert [problem.where for problem in declared.check(wrong)] == [
        "verify_limit_s",
        "samples",
        "sampling.max_tokens",
        "chunk",
    ]
    assert "4 samples all alike" in str(generate.check(config(folders, sampling=Sampling(temperature=0)), 1)[0])
    out, keep = made(tmp_path)
    with pytest.raises(
        UserMistake, match="prompt sums/.* has .* tokens; the model's positions and sampling.max_tokens leave 1 for it"
    ):
        generate.run(config(folders, sampling=Sampling(max_tokens=2047)), out, keep)


def test_the_end_tokens_are_the_models_and_the_tokenizers_and_a_torn_file_of_them_is_no_absent_one(tmp_path):
    folder, tokenizer = SimpleNamespace(hf=tmp_path), SimpleNamespace(eos_id=2)
    assert stop_ids_of(folder, tokenizer) == {2}
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": [7, 8]}')
    assert stop_ids_of(folder, tokenizer) == {2, 7, 8}
    for torn in ('{"eos_token_id": [7', "[7, 8]"):
        file.write_text(torn)
        with pytest.raises(UserMistake, match="generation_config.json: is no generation config"):
            stop_ids_of(folder, tokenizer)


TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"


def test_generated_samples_are_filtered_materialized_packed_and_trained_on(folders, whole, tmp_path):
    """Rejection sampling from end to end, as jobs/pipelines/r1_nanochat.yaml does it."""
    kept, part, store, packs, out, keep = (
        tmp_path / name for name in ("kept", "part", "store", "packs", "out", "keep")
    )
    for folder in (kept, part, store, packs, out, keep):
        folder.mkdir()
    rules = rejection.Config(inputs=[str(whole[0])], correct=False, truncated=True, per_prompt=2, near_duplicate=1.0)
    (tmp_path / "element").mkdir()
    rejection_element.reject_filter(rules, tmp_path / "element")
    facts = rejection_finish.finish(rules, [tmp_path / "element"], kept)
    chats = [json.loads(line) for line in open(kept / "chat.jsonl")]
    assert all(chat["sampling"]["temperature"] == 1.0 and chat["weights"] and chat["seed"] == 3 for chat in chats)
    assert facts["samples"] == PROMPTS * SAMPLES and facts["kept"] > 0 and facts["seed"] == ["3"]
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    rows = materialize.Config(
        source=Source(inputs=[str(kept / "chat.jsonl")]),
        tokenizer=str(folders["hf"]),
        chat=ChatConfig(template=str(tmp_path / "chat.jinja"), header=""),
        on_bad_row="bucket",  # a random model may say the padding token
    )
    materialize.materialize(rows, part, 0, 1)
    made_ = materialize.finish(rows, [part], store)
    assert made_["kept"] > 0 and made_["rows"] == facts["kept"]
    pack.pack(pack.Config(store=str(store), pack_length=64), packs)
    trained = sft.run(
        sft.Config(model=str(folders["base"]), store=str(store), packs=str(packs), steps=2, global_batch=1, lr=1e-3),
        out,
        keep,
    )
    assert trained["step"] == 2


@pytest.mark.parametrize("entrypoint", (generate, evaluate, grpo))
@pytest.mark.parametrize("family, layout, word", [
    ("gpt_oss", ParallelPlan(), "experts"),
    ("nemotron_h", ParallelPlan(), "recurrent states"),
    ("qwen2", ParallelPlan(pipeline=2), "pipeline"),
    ("qwen2", ParallelPlan(), ""),
])  # fmt: skip
def test_decoding_that_cannot_be_recorded_is_refused_before_it_runs(entrypoint, family, layout, word, tmp_path):
    of = {"gpt_oss": tiny.GPT_OSS_DIMS, "nemotron_h": tiny.NEMOTRON_H_DIMS, "qwen2": tiny.DIMS}[family]
    tiny.hf_folder(tmp_path / "hf", of)
    asked = entrypoint.Config(model=str(tmp_path), parallel=layout, engine=EngineConfig(cuda_graphs=True))
    found = [str(problem) for problem in entrypoint.check(asked, layout.pipeline) if "cuda_graphs" in str(problem)]
    assert bool(found) is bool(word) and all(word in " ".join(found) for _ in found)
