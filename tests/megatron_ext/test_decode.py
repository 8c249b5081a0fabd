"""Greedy decoding: the tokens of transformers, alike on every layout."""

from pathlib import Path

import pytest
import torch

from megatron_ext import ranks
from megatron_ext.parallel import ParallelPlan
from megatron_ext.rollout.decode import chunks, generate
from tests.megatron_ext import tiny

PROMPTS = [[1 + (3 * i + j * j) % 18 for j in range(1 + i % 7)] for i in range(20)]
STOP = 5


def decoded(plan: ParallelPlan, hf: Path, budget: int) -> list[list[int]]:
    with ranks.started(plan):
        model = tiny.model(hf, tiny.DIMS, plan)
        model.train()
        tokens = generate(model, PROMPTS, 9, {STOP}, token_budget=budget)
        assert model.training
        return tokens


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return tiny.hf_folder(tmp_path_factory.mktemp("hf"), seed=2)


@pytest.fixture(scope="module")
def expected(hf) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        out = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=9, eos_token_id=STOP, pad_token_id=0
        )
        found.append(out[0, len(prompt) :].tolist())
    assert any(tokens[-1] == STOP for tokens in found) and any(len(tokens) == 9 for tokens in found)
    return found


@pytest.mark.parametrize("budget", [1, 37, 10_000])
def test_tokens_are_those_of_transformers_whatever_the_chunks(hf, expected, budget):
    assert decoded(ParallelPlan(), hf, budget) == expected


@pytest.mark.parametrize("plan", [ParallelPlan(), ParallelPlan(tensor=2), ParallelPlan(2, True)])
def test_every_layout_gives_the_same_tokens(two_ranks, hf, expected, plan):
    assert two_ranks.run(decoded, plan=plan, hf=hf, budget=64) == [expected, expected]


def test_chunks_keep_to_the_budget_and_the_order():
    assert [list(part) for part in chunks([3, 3, 5, 20, 1, 1], 8)] == [[0, 1], [2], [3], [4, 5]]
    assert list(chunks([], 8)) == []


def test_an_empty_prompt_is_an_error(alone, hf):
    with pytest.raises(ValueError, match="without tokens"):
        generate(tiny.model(hf, tiny.DIMS, ParallelPlan()), [[1], []], 3, {STOP})
