import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.base.blend import sources_of
from data_tools.packs.batches import Stream, deal, idle_shares
from data_tools.packs.best_fit import best_fit, longest_first


@given(st.lists(st.one_of(st.just(0.0), st.floats(0.01, 50)), min_size=1, max_size=6).filter(any))
def test_every_prefix_of_a_blend_is_within_one_of_its_shares(weights: list[float]) -> None:
    sources = sources_of(np.array(weights), 400)
    counts = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    assert (np.abs(counts - np.arange(1, 401)[:, None] * np.array(weights) / sum(weights)) < 1).all()
    assert sources_of(np.array(weights), 100).tolist() == sources[:100].tolist()


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=8), st.integers(1, 6))
def test_dealing_gives_every_pack_once_and_never_leaves_a_rank_far_behind(costs: list[float], ranks: int) -> None:
    batch = np.array(costs * ranks)
    dealt = deal(batch, ranks)
    assert sorted(dealt.ravel().tolist()) == list(range(len(batch)))
    totals = batch[dealt].sum(axis=0)
    assert totals.max() - totals.min() <= max(costs) + 1e-9  # one pack, whatever their number


def agentic_packs(documents: int) -> np.ndarray:
    """float64[packs], costs of 262,144-token packs of log-normal trajectories (data.md, `agentic`)."""
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(20_000), 1.0, documents), 100, 262_144).astype(np.int32)
    order = longest_first(lengths, 262_144)
    packs, _ = best_fit(lengths[order], 262_144)
    ordered = lengths[order].astype(np.float64)
    return np.bincount(packs, 24_576 * ordered + ordered**2)


def test_dealing_and_grouping_leave_ranks_little_to_wait_for() -> None:
    costs = agentic_packs(20_000)
    source = np.zeros(len(costs), dtype=np.int16)
    plain, grouped = Stream(costs, source), Stream(costs, source, group=8)
    each_step, each_micro = idle_shares(plain, 64, 8, steps=len(costs) // 64)
    assert each_step < 0.03 and each_micro < 0.15
    each_step, each_micro = idle_shares(grouped, 64, 8, steps=len(costs) // 64)
    assert each_step < 0.01 and each_micro < 0.01


@pytest.mark.parametrize("group", [1, 4])
def test_a_group_stays_together_and_an_epoch_holds_every_pack_once(group: int) -> None:
    costs = np.random.default_rng(1).random(26)
    stream = Stream(costs, np.zeros(26, dtype=np.int16), group=group, seed=3)
    epochs = np.reshape([stream.batch(k, 13) for k in range(6)], (3, 26))
    assert all(sorted(epoch) == list(range(26)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    rank = np.empty(26, dtype=int)
    rank[np.argsort(-costs)] = np.arange(26)
    for epoch in epochs[:, : 26 // group * group]:
        assert all(rank[four].max() - rank[four].min() == group - 1 for four in epoch.reshape(-1, group))
