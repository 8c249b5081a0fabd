import pytest
import torch

from megatron_ext.rollout.sampler import Vocabulary, draw
from megatron_ext.rollout.settings import Sampling, check_engine, check_sampling, EngineConfig

ALONE = Vocabulary()


def logits(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def kept(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution drawn from, by transformers' own filters."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chosen = [TemperatureLogitsWarper(float(sampling.temperature))]
    chosen += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    chosen += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    chosen += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    return LogitsProcessorList(chosen)(None, scores).softmax(-1)


SETTINGS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(temperature=1.3, top_k=5),
    Sampling(top_p=0.8),
    Sampling(top_k=9, top_p=0.6),
    Sampling(min_p=0.2),
]


@pytest.mark.parametrize("sampling", SETTINGS)
def test_noise_spread_evenly_draws_each_token_as_often_as_it_is_likely(sampling):
    scores = logits(1, 23)
    noise = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn = draw(scores.expand(20_000, -1), noise, sampling, ALONE)
    expected = kept(scores, sampling)[0]
    frequency = torch.bincount(drawn.tokens, minlength=23) / 20_000
    assert (frequency - expected).abs().max() < 2e-4
    assert torch.allclose(drawn.logprobs.exp(), expected[drawn.tokens], atol=1e-6)
    assert torch.allclose(drawn.model_logprobs, scores.log_softmax(-1)[0, drawn.tokens], atol=1e-5)


def test_the_margin_is_the_distance_to_another_token():
    scores, noise = logits(50, 11, 3), torch.rand(50, dtype=torch.float64)
    drawn = draw(scores, noise, Sampling(), ALONE)
    for step in (-1, 1):
        inside = draw(scores, (noise + 0.999 * step * drawn.margins).clamp(0, 1 - 1e-12), Sampling(), ALONE)
        assert torch.equal(inside.tokens, drawn.tokens)
    beyond = [draw(scores, noise + 1.01 * step * drawn.margins, Sampling(), ALONE).tokens for step in (-1, 1)]
    outer = (noise - drawn.margins < 1e-6) | (noise + drawn.margins > 1 - 1e-6)
    assert ((beyond[0] != drawn.tokens) | (beyond[1] != drawn.tokens) | outer).all()


def test_greedy_takes_the_first_of_the_likeliest():
    scores = torch.tensor([[0.0, 2.0, 2.0], [1.0, 0.0, 0.0]])
    drawn = draw(scores, torch.zeros(2, dtype=torch.float64), Sampling(temperature=0), ALONE)
    assert drawn.tokens.tolist() == [1, 0] and drawn.logprobs.tolist() == [0, 0]
    assert torch.allclose(drawn.model_logprobs, scores.log_softmax(-1)[torch.arange(2), drawn.tokens])


def shared(sampling: Sampling) -> list[list[float]]:
    """What each rank draws with its half of the vocabulary; the last half shorter than top_k, padded."""
    import torch.distributed as dist

    from megatron_ext import ranks
    from megatron_ext.parallel import ParallelPlan

    with ranks.started(ParallelPlan(tensor=2)):
        group = dist.group.WORLD
        scores = torch.nn.functional.pad(logits(40, 21, 5), (0, 3), value=-torch.inf)
        noise = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        mine = scores.chunk(2, dim=1)[group.rank()]
        return [part.tolist() for part in draw(mine, noise, sampling, Vocabulary(group), 12 * group.rank())]


@pytest.mark.parametrize("sampling", [*SETTINGS, Sampling(temperature=0), Sampling(top_k=20)])
def test_a_vocabulary_split_over_ranks_draws_the_same(two_ranks, sampling):
    noise = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alone = draw(logits(40, 21, 5), noise, sampling, ALONE)
    for found in two_ranks.run(shared, sampling=sampling):
        assert found[0] == alone.tokens.tolist()
        for ours, theirs in zip(found[1:], alone[1:]):
            assert torch.allclose(torch.tensor(ours), theirs, atol=1e-6)


def test_wrong_settings_are_told_at_once():
    wrong = Sampling(-1, -2, 0, 1, 0, [""])
    assert [problem.where.partition(".")[2] for problem in check_sampling(wrong)] == [
        "temperature", "top_k", "top_p", "min_p", "max_tokens", "stop_strings"
    ]  # fmt: skip
    assert [problem.where for problem in check_engine(EngineConfig(0, 0, 8, 4))] == [
        "engine.block_size", "engine.token_budget", "engine.kv_gib"
    ]  # fmt: skip
    for size in (float("inf"), float("nan")):
        assert [problem.where for problem in check_engine(EngineConfig(size))] == ["engine.kv_gib"]
