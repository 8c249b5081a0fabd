"""Tokens of samples lie where they were made, and reach whoever trains or writes them, and nobody else."""

from typing import Any

import numpy
import pytest

from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan

LENGTHS = [1, 7, 0, 30, 2, 5, 12]  # the log-prob of each third token is NaN, as a reply's


def sample_of(number: int, replica: int) -> Any:
    from megatron_ext.rl.samples import Sample

    dice = numpy.random.default_rng(number)
    length = LENGTHS[number % len(LENGTHS)]
    logprobs = dice.standard_normal(length).astype(numpy.float32)
    logprobs[2::3] = numpy.nan
    tokens = dice.integers(0, 1 << 30, length).astype(numpy.int32)
    return Sample(number // 4, number % 4, (1,), tokens, logprobs, "stop", replica=replica)


def exchanged(plan: ParallelPlan, count: int, written: bool) -> tuple[int, int, set[int]]:
    """(rank, data-parallel rank, numbers of the samples that were brought) of this rank."""
    with ranks.started(plan):
        import torch.distributed as dist
        from megatron.core import parallel_state

        from megatron_ext.rl.replica import Replica

        replica, samples = Replica(), []
        size = parallel_state.get_data_parallel_world_size()
        for number in range(count):
            sample = sample_of(number, number % 3 % replica.count)  # the last of four makes none
            samples.append(sample if sample.replica == replica.number else sample.told())
        trained = [{s.key for n, s in enumerate(samples) if n % size == rank} for rank in range(size)]
        before = [number for number, s in enumerate(samples) if s.is_here and s.length]
        replica.bring(samples, replica.wanted(samples, trained, written))
        here = {number for number, s in enumerate(samples) if s.is_here and s.length}
        for number in here:
            expected = sample_of(number, 0)
            assert samples[number].tokens.tobytes() == expected.tokens.tobytes()
            assert samples[number].logprobs.tobytes() == expected.logprobs.tobytes()
        assert here >= set(before)
        return dist.get_rank(), parallel_state.get_data_parallel_rank(), here - set(before)


PLANS = {
    "DP4": ParallelPlan(),
    "CP2": ParallelPlan(context=2),
    "TP2": ParallelPlan(tensor=2),
    "PP2": ParallelPlan(pipeline=2),
}


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_each_rank_is_brought_what_it_trains_and_the_first_what_is_written(four_ranks, name, written):
    plan, count = PLANS[name], 23
    replicas = 4 // (plan.tensor * plan.pipeline)
    size = replicas // plan.context
    for rank, data, brought in four_ranks.run(exchanged, plan=plan, count=count, written=written):
        number = {"DP4": rank, "CP2": rank, "TP2": rank // 2, "PP2": rank % 2}[name]
        wanted = {n for n in range(count) if n % size == data or (written and rank == 0)}
        made = {n for n in range(count) if n % 3 % replicas == number}
        assert brought == {n for n in wanted - made if LENGTHS[n % len(LENGTHS)]}


def test_without_samples_nothing_is_brought(four_ranks):
    assert all(not brought for _, _, brought in four_ranks.run(exchanged, plan=ParallelPlan(), count=0, written=True))
