"""The engine against the full forward pass: same tokens, same log-probs, whatever shares the batch."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_tools.mistake import UserMistake
from megatron_ext.layers.mamba import MambaMixer
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rollout.cache import NewTokens
from megatron_ext.rollout.engine import Engine, NoDistribution
from megatron_ext.rollout.graphs import Graphs
from megatron_ext.rollout.sequence import Prefix, Request, Sequence
from megatron_ext.rollout.settings import EngineConfig, Sampling
from tests.megatron_ext import tiny

STOP = 5
FAMILIES = {"qwen2": tiny.DIMS, "gpt_oss": tiny.GPT_OSS_DIMS, "nemotron_h": tiny.NEMOTRON_H_DIMS}
MODELS = FAMILIES | tiny.KINDS
PROMPTS = [tuple(1 + (3 * i + j * j) % 18 for j in range(1 + 5 * i % 37)) for i in range(9)]
SMALL = EngineConfig(kv_gib=0.01, block_size=4, max_batch=6, token_budget=16)


def requests(samples: int = 3) -> list[Request]:
    return [Request(100 + i, prompt, samples) for i, prompt in enumerate(PROMPTS)]


def sampled(
    model: Any, config: EngineConfig, wanted: list[Request], sampling: Sampling, **memory: int
) -> dict[tuple[int, int], Sequence]:
    """{(uid, sample): sequence}; `blocks` limits the memory to so many."""
    engine = Engine(model, config, seed=7, stop_ids={STOP})
    if memory:
        engine.runner.cache.blocks_in = lambda gib: memory["blocks"]
    found = {(s.prefix.request.uid, s.sample): s for s in engine.generate(wanted, sampling)}
    assert len(found) == sum(request.samples for request in wanted)
    assert engine.scheduler.blocks.used == 0 and not engine.scheduler.prefixes
    engine_counts.update(engine.counts)
    return found


engine_counts: dict[str, int] = {}


def full_logprobs(model: Any, sequence: Sequence) -> torch.Tensor:
    """fp32 [new tokens], by the forward pass that training does."""
    from tests.megatron_ext.test_attention import forward

    pack = tiny.pack([len(sequence.tokens)], seed=0)
    model.eval()
    logits = forward(model, pack, torch.tensor([sequence.tokens]))[0].float()
    new = torch.tensor(sequence.completion)
    rows = logits[sequence.prompt_length - 1 : -1, : model.vocabulary_rows]
    return rows.log_softmax(-1).gather(1, new[:, None]).squeeze(1), rows.argmax(-1)


@pytest.fixture(params=tiny.marked(MODELS))
def model(request, alone, tmp_path):
    return tiny.model(tiny.hf_folder(tmp_path / "hf", MODELS[request.param]), MODELS[request.param], ParallelPlan())


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_kind_samples_what_the_forward_pass_says(kind, alone, tmp_path):
    of = tiny.KINDS[kind]
    model = tiny.model(tiny.hf_folder(tmp_path / "hf", of), of, ParallelPlan())
    test_greedy_tokens_and_log_probs_are_those_of_the_forward_pass(model)


def test_greedy_tokens_and_log_probs_are_those_of_the_forward_pass(model):
    found = sampled(model, SMALL, requests(1), Sampling(temperature=0, max_tokens=11))
    assert {s.finish for s in found.values()} <= {"stop", "length"}
    for sequence in found.values():
        logprobs, likeliest = full_logprobs(model, sequence)
        assert sequence.completion == likeliest.tolist()
        assert torch.allclose(torch.tensor(sequence.model_logprobs), logprobs, atol=1e-5)


def test_greedy_tokens_are_those_of_transformers(alone, tmp_path):
    from transformers import AutoModelForCausalLM

    hf = tiny.hf_folder(tmp_path / "hf", seed=2)
    theirs = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    found = sampled(
        tiny.model(hf, tiny.DIMS, ParallelPlan()), SMALL, requests(1), Sampling(temperature=0, max_tokens=9)
    )
    for (uid, _), sequence in found.items():
        prompt = torch.tensor([PROMPTS[uid - 100]])
        out = theirs.generate(prompt, do_sample=False, max_new_tokens=9, eos_token_id=STOP, pad_token_id=0)
        assert sequence.completion == out[0, prompt.size(1) :].tolist()


def test_a_stop_string_ends_a_sample(alone, tmp_path):
    model = tiny.model(tiny.hf_folder(tmp_path / "hf", seed=2), tiny.DIMS, ParallelPlan())
    spell = lambda ids: "".join(chr(97 + i) for i in ids)  # noqa: E731
    engine = Engine(model, SMALL, seed=7, stop_ids=set(), detokenize=spell)
    whole = {s.sample: spell(s.completion) for s in engine.generate([Request(1, (1, 2), 6)], Sampling(max_tokens=20))}
    stop = whole[0][5:7]
    for s in engine.generate([Request(1, (1, 2), 6)], Sampling(max_tokens=20, stop_strings=[stop])):
        place = whole[s.sample].find(stop)
        assert spell(s.completion) == (whole[s.sample] if place < 0 else whole[s.sample][: place + 2])


@pytest.mark.parametrize("size", [1, 64, 65, 150])
def test_a_stop_string_of_any_length_is_found(alone, tmp_path, size):
    """A model has to write it: in tokens of one, two and three bytes."""
    spelled = ["a", "é", "€", "b", "c"]
    engine = Engine(tiny.model(tiny.hf_folder(tmp_path / "hf"), tiny.DIMS, ParallelPlan()), SMALL, 7, set(),
                    lambda ids: "".join(spelled[i % 5] for i in ids))  # fmt: skip
    tokens = torch.randint(0, 19, (2 * size,), generator=torch.Generator().manual_seed(size)).tolist()
    text = engine.detokenize(tokens[size - 1 : 2 * size - 1])
    written = Sequence(Prefix(Request(1, (1, 2)), 0), 0, 10**6, [1, 2])
    ends = []
    for token in tokens:
        written.tokens.append(token)
        ends.append(engine._completes(written, [text]))
    assert ends == [engine.detokenize(tokens[: n + 1]).endswith(text) for n in range(len(tokens))]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_end_the_run_with_a_word(alone, tmp_path, temperature):
    model = tiny.model(tiny.hf_folder(tmp_path / "hf"), tiny.DIMS, ParallelPlan())
    with torch.no_grad():
        model.decoder.layers[0].mlp.linear_fc1.weight[0, 0] = float("nan")
    with pytest.raises(NoDistribution, match="NaN or infinite logits for prompt 4, sample 0, new token 1:"):
        sampled(model, SMALL, [Request(4, (1, 2), 2)], Sampling(temperature=temperature))
    assert "/m gives NaN or infinite logits for prompt sums/ab, sample 3, new token 8" in str(
        NoDistribution(4, 3, 7).named("prompt sums/ab", "/m")
    )


def test_an_empty_prompt_is_an_error(alone, tmp_path):
    model = tiny.model(tiny.hf_folder(tmp_path / "hf"), tiny.DIMS, ParallelPlan())
    with pytest.raises(ValueError, match="without tokens"):
        sampled(model, SMALL, [Request(1, ())], Sampling())


CONFIGS = [
    EngineConfig(0.01, block_size=4, max_batch=1, token_budget=4),
    EngineConfig(0.01, block_size=16, max_batch=7, token_budget=7),
    EngineConfig(0.01, block_size=4, max_batch=64, token_budget=512),
]


def test_samples_are_the_same_in_any_batch_order_and_memory(model):
    sampling = Sampling(max_tokens=13)
    expected = sampled(model, SMALL, requests(), sampling)
    for sequence in expected.values():
        assert torch.allclose(torch.tensor(sequence.logprobs), full_logprobs(model, sequence)[0], atol=1e-5)
    assert len({tuple(s.completion) for s in expected.values()}) > len(PROMPTS)
    runs = [sampled(model, config, requests(), sampling) for config in CONFIGS]
    runs.append(sampled(model, SMALL, requests()[::-1], sampling))
    runs.append(sampled(model, SMALL, requests(), sampling, blocks=16))
    assert engine_counts["preemptions"] > 0
    for run in runs:
        for key, sequence in expected.items():
            near = next((i for i, m in enumerate(sequence.margins) if m < 1e-4), len(sequence.margins))
            assert run[key].completion[:near] == sequence.completion[:near]


def test_recorded_passes_draw_the_same_samples_and_what_cannot_be_recorded_is_refused(model):
    """On CPU a recorded pass is run again: what differs is its padding."""
    graphs, sampling = replace(SMALL, cuda_graphs=True), Sampling(max_tokens=13)
    if model.config.num_moe_experts or any(isinstance(module, MambaMixer) for module in model.modules()):
        with pytest.raises(UserMistake, match="engine.cuda_graphs: this model's decoding cannot be recorded, for its"):
            Engine(model, graphs, seed=7, stop_ids=())
        return
    expected = sampled(model, SMALL, requests(), sampling)
    for sequence, found in zip(expected.values(), sampled(model, graphs, requests(), sampling).values()):
        near = next((i for i, m in enumerate(sequence.margins) if m < 1e-4), len(sequence.margins))
        assert found.completion[:near] == sequence.completion[:near]
        assert found.logprobs[:near] == pytest.approx(sequence.logprobs[:near], abs=1e-5)


@pytest.mark.parametrize("unit", [1, 3, 4, 6])
def test_the_rows_of_a_recorded_pass_divide_over_the_tensor_ranks(unit):
    """Whatever their number: sequence parallelism cuts a row into as many parts."""
    made = []
    cache = SimpleNamespace(block_size=4, spare=43, spare_slot=0, target=torch.device("cpu"))
    graphs = Graphs(lambda tokens, row: made.append(tokens.size(1)) or torch.zeros(tokens.size(1), 2), cache, unit)
    for count in range(1, 14):
        assert len(graphs.logits([NewTokens((1,), 0, [i]) for i in range(count)])) == count
    assert all(rows % unit == 0 for rows in made) and made[0] == unit and max(made) < 26


def test_what_was_recorded_is_gone_on_with(model):
    sampling = Sampling(max_tokens=13)
    expected = sampled(model, SMALL, requests(), sampling)
    half = [
        Request(r.uid, r.prompt, r.samples, tuple(
            (tuple(s.completion[: len(s.completion) // 2]), tuple(s.logprobs[: len(s.completion) // 2]))
            for s in (expected[r.uid, i] for i in range(r.samples))
        ))
        for r in requests()
    ]  # fmt: skip
    found = sampled(model, SMALL, half, sampling)
    assert {key: s.completion for key, s in found.items()} == {key: s.completion for key, s in expected.items()}
    for key, sequence in found.items():
        recorded = len(expected[key].completion) // 2  # the others are computed again, in another batch
        assert sequence.logprobs[:recorded] == expected[key].logprobs[:recorded]


def test_a_prompt_is_computed_once_for_its_samples(model):
    sampled(model, EngineConfig(0.01, 4, 64, 512), requests(8), Sampling(max_tokens=13))
    assert engine_counts["prefilled"] == sum(len(prompt) for prompt in PROMPTS)


def test_a_sample_that_cannot_be_held_is_refused_with_the_numbers(model):
    with pytest.raises(UserMistake, match="hold 12 tokens of keys and values, and one sample needs 40"):
        sampled(model, SMALL, [Request(1, (1, 2, 3))], Sampling(max_tokens=30), blocks=3)
