"""Parallel plans: every broken rule at once, with numbers and the nearest legal value; and who sits in which group."""

import pytest

from megatron_ext import ranks
from megatron_ext.parallel import ParallelPlan, check, grid, legal_tensor, nearest, padded_rows


def messages(plan: ParallelPlan, world_size: int, **shape) -> list[str]:
    return [str(problem) for problem in check(plan, world_size, **shape)]


def test_legal_plans_have_no_problem():
    shape = dict(heads=40, kv_groups=8, ffn=27648, pack_length=4096, global_batch=64)
    for tensor in (1, 2, 4, 8):
        assert messages(ParallelPlan(tensor=tensor, sequence_parallel=tensor > 1), 16, **shape) == []


def test_all_problems_come_at_once_with_the_nearest_legal_value():
    found = messages(
        ParallelPlan(tensor=3, pipeline=2), 8, heads=4, kv_groups=2, ffn=96, pack_length=100, global_batch=6
    )
    assert found == [
        "parallel.pipeline: 2 is not supported yet: use 1",
        "parallel.tensor: 8 ranks do not divide by tensor 3 x pipeline 2 x context 1 = 6: use 4, or 6 ranks",
        "parallel.tensor: 3 does not split 4 heads, 2 KV groups and 96 MLP columns evenly: use 2 (legal: 1, 2, 4)",
    ]


def test_a_global_batch_that_does_not_divide_is_refused():
    (found,) = messages(ParallelPlan(micro_batch=2), 3, global_batch=8)
    assert found.endswith("8 packs does not divide by 3 data-parallel ranks x micro-batch 2 = 6: use 6 packs")


def test_sequence_parallel_needs_a_tensor_axis_and_a_length_that_divides():
    assert "needs tensor > 1" in messages(ParallelPlan(sequence_parallel=True), 1)[0]
    (found,) = messages(ParallelPlan(tensor=2, sequence_parallel=True), 2, pack_length=101)
    assert "use a pack length of 102" in found


def test_degrees_below_one_are_refused():
    assert messages(ParallelPlan(tensor=0), 2) == ["parallel.tensor: 0 is not a degree: the least is 1"]


def test_more_tensor_ranks_than_kv_groups_are_legal_when_they_divide():
    assert legal_tensor(heads=32, kv_groups=2, ffn=4096) == [1, 2, 4, 8, 16, 32]
    assert nearest(3, [1, 2, 4]) == 2


@pytest.mark.parametrize("rows, tensor, padded", [(19, 1, 19), (19, 2, 32), (152064, 8, 152064), (201088, 3, 201096)])
def test_the_vocabulary_is_padded_only_where_it_does_not_split(rows, tensor, padded):
    assert padded_rows(rows, tensor) == padded and padded % tensor == 0


def _groups(tensor: int) -> tuple[list[int], list[int]]:
    import torch.distributed as dist
    from megatron.core import parallel_state

    with ranks.started(ParallelPlan(tensor=tensor)):
        return (
            dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group()),
            dist.get_process_group_ranks(parallel_state.get_data_parallel_group()),
        )


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_grid_is_that_of_megatron_core(two_ranks, tensor):
    expected = grid(ParallelPlan(tensor=tensor), 2)
    for rank, (tensor_group, data_group) in enumerate(two_ranks.run(_groups, tensor=tensor)):
        assert tensor_group == expected.tensor[rank // tensor]
        assert data_group == next(group for group in expected.data if rank in group)
        assert data_group[expected.data_rank(rank)] == rank == tensor_group[expected.tensor_rank(rank)]


def test_the_grid_puts_tensor_ranks_next_to_each_other():
    found = grid(ParallelPlan(tensor=2), 6)
    assert found.tensor == [[0, 1], [2, 3], [4, 5]] and found.data == [[0, 2, 4], [1, 3, 5]]
