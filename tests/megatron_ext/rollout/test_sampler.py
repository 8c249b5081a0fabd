import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_tools.base import declared
from megatron_ext.rollout.sampler import NOTHING, Vocabulary, draw
from megatron_ext.rollout.settings import EngineConfig, RolloutSettings, Sampling, check_rollouts

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


@given(
    st.integers(0, 10**6), st.integers(2, 40), st.floats(0.3, 3.0), st.integers(0, 12), st.floats(0.05, 1.0),
    st.floats(0.0, 0.9),
)  # fmt: skip
@settings(max_examples=150)
def test_all_filters_together_leave_what_transformers_leaves(seed, size, temperature, top_k, top_p, min_p):
    sampling, scores = Sampling(temperature, top_k, top_p, min_p), logits(1, size, seed)
    weights = (scores[0].double() / temperature).softmax(-1)
    best = weights.sort(descending=True).values[: top_k or size]
    # Where a sum falls on top_p, or a weight on min_p, to the last digits, either answer is right.
    assume(top_p == 1 or (best.cumsum(0) / best.sum() - top_p).abs().min() > 1e-5)
    assume((weights / weights.max() - min_p).abs().min() > 1e-5)
    expected = kept(scores, sampling)[0].double()
    left = expected.nonzero().squeeze(1)
    middles = (expected.cumsum(0) - expected / 2)[left]  # of each token's share of the noise
    found = draw(scores.expand(len(left), -1), middles, sampling, ALONE)
    assert found.tokens.tolist() == left.tolist()
    # Were one more or one less left, all would have other shares.
    assert torch.allclose(found.logprobs.double(), expected[left].log(), atol=1e-5)


UNSOUND = [float("nan"), float("inf")]


@pytest.mark.parametrize("sampling", [*SETTINGS, Sampling(temperature=0), Sampling(top_k=3, top_p=0.7, min_p=0.1)])
def test_logits_that_are_no_distribution_give_no_token(sampling):
    """And cost no other sample its own; -inf alone is how a token is left out."""
    scores = logits(6, 9)
    scores[1, 4], scores[2, 0], scores[3], scores[4, 1:3] = *UNSOUND, -torch.inf, -torch.inf
    found = draw(scores, torch.full((6,), 0.4, dtype=torch.float64), sampling, ALONE)
    assert (found.tokens == NOTHING).tolist() == [False, True, True, True, False, False]
    sound = [0, 4, 5]
    alone = draw(scores[sound], torch.full((3,), 0.4, dtype=torch.float64), sampling, ALONE)
    assert found.tokens[sound].tolist() == alone.tokens.tolist()


def unsound_here(sampling: Sampling) -> list[int]:
    """Of a vocabulary over two ranks, where one rank has a NaN or an inf among its logits."""
    import torch.distributed as dist

    from megatron_ext.parallel import ranks
    from megatron_ext.parallel.plan import ParallelPlan

    with ranks.started(ParallelPlan(tensor=2)):
        group = dist.group.WORLD
        scores = logits(3, 8)
        scores[0, 1], scores[1, 6] = UNSOUND
        mine = scores.chunk(2, dim=1)[group.rank()]
        return draw(mine, torch.full((3,), 0.4, dtype=torch.float64), sampling, Vocabulary(group), 4 * group.rank())[
            0
        ].tolist()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0)])
def test_every_rank_knows_that_one_has_no_distribution(two_ranks, sampling):
    one, other = two_ranks.run(unsound_here, sampling=sampling)
    assert one == other and one[:2] == [NOTHING] * 2 and one[2] != NOTHING


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

    from megatron_ext.parallel import ranks
    from megatron_ext.parallel.plan import ParallelPlan

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
    assert [problem.where for problem in declared.check(wrong)] == [
        "temperature", "top_k", "top_p", "min_p", "max_tokens"
    ]  # fmt: skip
    assert [problem.where for problem in declared.check(EngineConfig(0, 0, 8, 4))] == ["kv_gib", "block_size"]
    together = RolloutSettings(engine=EngineConfig(max_batch=8, token_budget=4))
    assert [problem.where for problem in check_rollouts(together, wrong)] == [
        "sampling.stop_strings", "engine.token_budget"
    ]  # fmt: skip
    for size in (float("inf"), float("nan")):
        assert [problem.where for problem in declared.check(EngineConfig(size))] == ["kv_gib"]
