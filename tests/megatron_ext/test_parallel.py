"""Parallel plans: every broken rule at once, with numbers and the nearest legal value; and who sits in which group."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.parallel import ranks
from megatron_ext.parallel.machine import Machine
from megatron_ext.parallel.plan import CONTEXT_COMMS, ParallelPlan, Workload, environment_problems, grid, padded_rows
from megatron_ext.parallel.rules import RULES, broken_rules, change, check, is_legal, nearest, remedy
from megatron_ext.versions import planned
from tests.megatron_ext.shapes import GPT_OSS_20B, NANO, QWEN_32B


def messages(plan: ParallelPlan, ranks: int, **known) -> list[str]:
    return [str(problem) for problem in check(plan, Workload(ranks, **known))]


def test_legal_plans_have_no_problem():
    for tensor in (1, 2, 4, 8):
        plan = ParallelPlan(tensor=tensor, sequence_parallel=tensor > 1)
        assert check(plan, Workload(16, QWEN_32B, pack_length=4096, align=1, global_batch=64)) == []


def test_all_problems_come_at_once_with_the_nearest_legal_value():
    plan = ParallelPlan(tensor=3, pipeline=2, sequence_parallel=True)
    assert messages(plan, 8, shape=replace(QWEN_32B, heads=4, kv_groups=2, ffn=100), pack_length=100) == [
        "parallel.tensor: 8 ranks do not divide by tensor 3 x pipeline 2 x context 1 = 6: use tensor 2",
        "parallel.tensor: 3 does not split 4 heads and 2 KV groups evenly: use tensor 2",
        "parallel.tensor: 3 does not split 100 MLP columns evenly: use tensor 2",
        "parallel.tensor: 100 tokens do not divide by 3 (tensor 3 x context 1 sequence-parallel parts): use tensor 2",
    ]


def test_degrees_below_one_are_refused():
    assert [str(problem) for problem in check(ParallelPlan(tensor=0), Workload(2))] == [
        "parallel.tensor: 0 is out of range: at least 1 (ranks)"
    ]


def test_the_sequence_length_of_the_grpo_seed_is_refused_and_12000_offered():
    plan = ParallelPlan(tensor=8, sequence_parallel=True)
    (found,) = messages(plan, 64, shape=QWEN_32B, pack_length=11_999)
    assert found == (
        "parallel: 11,999 tokens do not divide by 8 (tensor 8 x context 1 sequence-parallel parts): "
        "use a pack length of 12,000 tokens"
    )


@pytest.mark.parametrize("data, legal", [(4, True), (8, False)])
def test_the_global_batch_of_the_sft_seed_fits_64_gpus_and_not_128(data, legal):
    plan = ParallelPlan(tensor=2, context=8, expert=16, sequence_parallel=True)
    found = messages(plan, 16 * data, shape=NANO, pack_length=262_144, global_batch=60)
    assert (found == []) is legal
    if not legal:
        assert found[0].endswith("8 data-parallel ranks x micro-batch 1 = 8: use a global batch of 56 packs")


# The legal degrees of released models on 64 ranks.
@pytest.mark.parametrize(
    "shape, field, backend, legal",
    [
        (QWEN_32B, "tensor", "torch", [1, 2, 4, 8]),
        (QWEN_32B, "pipeline", "torch", [1, 2, 4, 8, 16, 32, 64]),
        (GPT_OSS_20B, "tensor", "torch", [1, 2, 4, 8, 16, 32, 64]),
        (GPT_OSS_20B, "expert", "torch", [1, 2, 4, 8, 16, 32]),
        (GPT_OSS_20B, "expert_tensor", "torch", [1]),
        (GPT_OSS_20B, "pipeline", "torch", [1, 2, 4, 8]),
        (GPT_OSS_20B, "context", "te", []),
        (NANO, "tensor", "torch", [1, 2, 4, 8]),
        (NANO, "context", "torch", [1, 2, 4, 8, 16, 32, 64]),
        (NANO, "context", "te", [1, 2]),
        (NANO, "expert", "torch", [1, 2, 4, 8, 16, 32, 64]),
        (NANO, "pipeline", "torch", [1, 2, 4]),
    ],
)
def test_the_valid_sets_of_our_models(shape, field, backend, legal):
    def is_valid(degree: int) -> bool:
        comm = "all_gather" if backend == "torch" else "a2a"
        plan = replace(ParallelPlan(expert=2 if shape.experts else 1, context_comm=comm), **{field: degree})
        plan.sequence_parallel = plan.tensor > 1
        return is_legal(plan, Workload(64, shape, backend=backend))

    assert [degree for degree in (1, 2, 3, 4, 5, 8, 16, 32, 64) if is_valid(degree)] == legal


def test_a_hybrid_model_takes_uneven_ends_only():
    plan = ParallelPlan(pipeline=4, pipeline_layers=[12, 14, 14, 12])
    assert is_legal(plan, Workload(4, NANO))
    (found,) = messages(replace(plan, pipeline_layers=[13, 12, 14, 13]), 4, shape=NANO)
    assert found.endswith("only the first and the last stage may differ: use pipeline_layers []")


def test_stages_cover_the_layers_in_order():
    assert ParallelPlan(pipeline=2, virtual=2).stage_layers(8) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert ParallelPlan(pipeline=2, pipeline_layers=[3, 5]).stage_layers(8) == [range(0, 3), range(3, 8)]


DEGREE = st.sampled_from([1, 1, 1, 2, 2, 3, 4, 6, 8, 16])
PLANS = st.builds(
    ParallelPlan,
    tensor=DEGREE,
    sequence_parallel=st.booleans(),
    pipeline=DEGREE,
    virtual=st.sampled_from([1, 1, 2, 3]),
    pipeline_layers=st.sampled_from([[], [], [10, 14], [30, 34], [16] * 4, [10, 16, 14, 12]]),
    context=DEGREE,
    context_comm=st.sampled_from([*CONTEXT_COMMS, "ring"]),
    expert=DEGREE,
    expert_tensor=st.sampled_from([1, 1, 2, 4]),
    micro_batch=st.sampled_from([1, 2, 3]),
    recompute=st.sampled_from(["none", "full", "most"]),
)
WORKLOADS = st.builds(
    Workload,
    ranks=st.one_of(st.integers(1, 256), st.sampled_from([4, 16, 64])),
    shape=st.sampled_from([None, QWEN_32B, GPT_OSS_20B, NANO]),
    pack_length=st.one_of(st.none(), st.integers(8, 300_000)),
    align=st.sampled_from([None, 1, 2, 12]),
    longest=st.one_of(st.none(), st.integers(1, 400_000)),
    global_batch=st.one_of(st.none(), st.integers(1, 600)),
    backend=st.sampled_from(["auto", "torch", "te"]),
    machine=st.sampled_from([None, Machine(), Machine("A100", (8, 0), transformer_engine="2.11.0")]),
    dtype=st.sampled_from(["", "bfloat16", "float32"]),
    gpus=st.sampled_from([None, True, False]),
)


@settings(max_examples=300)
@given(PLANS, WORKLOADS)
def test_the_value_that_is_offered_mends_what_was_broken(plan, workload):
    for rule, message in broken_rules(plan, workload):
        mend = remedy(rule, plan, workload)
        assert mend is not None, message
        changed = change(plan, workload, *mend)
        assert not rule.broken(*changed), f"{message} -> {mend}"
        assert mend[0] in rule.fields


@settings(max_examples=100)
@given(st.sampled_from([QWEN_32B, GPT_OSS_20B, NANO]), st.sampled_from(["tensor", "expert", "context"]), DEGREE)
def test_one_wrong_degree_is_mended_to_a_plan_that_is_legal_altogether(shape, field, degree):
    expert = 2 if shape.experts else 1
    good = ParallelPlan(tensor=2, sequence_parallel=True, context=2, context_comm="a2a", expert=expert)
    plan, workload = replace(good, **{field: degree}), Workload(16, shape, pack_length=49152, global_batch=48)
    for rule, _ in broken_rules(plan, workload):
        assert is_legal(*change(plan, workload, *remedy(rule, plan, workload)))


SP = dict(sequence_parallel=True)
TE = dict(backend="te")
A100 = Machine("A100", (8, 0), transformer_engine="2.11.0")
EXAMPLES = {  # rule: a plan that breaks it and, of its workload, shape, ranks and what else
    "ranks_divide_by_the_dense_grid": (dict(tensor=4), None, 6, {}),
    "ranks_divide_by_the_expert_grid": (dict(expert=4), GPT_OSS_20B, 6, {}),
    "tensor_splits_attention": (dict(tensor=16, **SP), QWEN_32B, 16, {}),
    "context_splits_yarns_positions": (dict(context=3), replace(QWEN_32B, yarn_positions=32768), 3, {}),
    "tensor_splits_mlp_columns": (dict(tensor=2, **SP), replace(QWEN_32B, ffn=27649), 2, {}),
    "tensor_splits_mamba": (dict(tensor=16, expert=16, **SP), NANO, 16, {}),
    "context_splits_mamba": (dict(context=6), replace(NANO, mamba_heads=66, mamba_groups=4), 6, {}),
    "all_to_all_splits_heads": (dict(context=16, context_comm="a2a"), QWEN_32B, 16, {}),
    "context_communication_is_known_to_attention": (dict(context=2, context_comm="p2p"), QWEN_32B, 2, {}),
    "te_has_no_kernel_for_packed_sinks": ({}, GPT_OSS_20B, 1, TE),
    "te_has_no_ring_for_windows": (dict(context=2, context_comm="p2p"), GPT_OSS_20B, 2, TE),
    "te_gathers_no_packs": (dict(context=2), QWEN_32B, 2, TE),
    "te_exchanges_whole_kv_groups": (dict(context=4, context_comm="a2a"), NANO, 4, TE),
    "base_has_blocks": ({}, QWEN_32B, 1, dict(base="mxfp4")),
    "base_is_held_by_ours": ({}, NANO, 1, TE | dict(base="mxfp4")),
    "te_runs_on_gpus": ({}, QWEN_32B, 1, TE | dict(gpus=False)),
    "te_is_installed": ({}, QWEN_32B, 1, TE | dict(machine=Machine())),
    "te_has_an_attention_kernel_here": ({}, QWEN_32B, 1, TE | dict(machine=A100)),
    "te_norms_have_weights": ({}, replace(QWEN_32B, learned_norms=False), 1, TE),
    "te_multiplies_float32_exactly": ({}, QWEN_32B, 1, TE | dict(machine=A100, dtype="float32")),
    "tokens_divide": (dict(tensor=8, **SP), QWEN_32B, 8, dict(pack_length=11_999)),
    "documents_divide": (dict(context=2), QWEN_32B, 2, dict(align=2)),
    "documents_fit_the_positions": ({}, QWEN_32B, 1, dict(longest=131_073)),
    "sequence_parallel_needs_tensor": (SP, QWEN_32B, 1, {}),
    "experts_need_sequence_parallel": (dict(tensor=2, expert=2), GPT_OSS_20B, 2, {}),
    "expert_splits_experts": (dict(expert=3), GPT_OSS_20B, 3, {}),
    "expert_tensor_splits_expert_columns": (dict(expert_tensor=5), NANO, 5, {}),
    "expert_biases_stay_whole": (dict(tensor=2, expert_tensor=2, **SP), GPT_OSS_20B, 2, {}),
    "experts_are_reduced_over_tensor_ranks": (dict(tensor=2, **SP), NANO, 2, {}),
    "gloo_gathers_even_parts_only": (dict(tensor=2, expert=2, expert_tensor=2, **SP), NANO, 4, dict(gpus=False)),
    "stages_are_even_or_listed": (dict(pipeline=3), QWEN_32B, 3, {}),
    "listed_stages_hold_all_layers": (dict(pipeline=2, pipeline_layers=[30, 33]), QWEN_32B, 2, {}),
    "hybrid_stages_differ_at_the_ends_only": (dict(pipeline=4, pipeline_layers=[13, 12, 14, 13]), NANO, 4, {}),
    "virtual_needs_pipeline": (dict(virtual=2), QWEN_32B, 1, {}),
    "hybrids_are_not_interleaved": (dict(pipeline=2, virtual=2), NANO, 2, {}),
    "global_batch_divides": ({}, QWEN_32B, 4, dict(global_batch=6)),
    "interleaving_takes_whole_rounds": (dict(pipeline=2, virtual=2), QWEN_32B, 2, dict(global_batch=3)),
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_rule_refuses_what_no_other_does(name):
    """All but the TE rules, which overlap: for sinks with windows, for float32."""
    degrees, shape, ranks_, known = EXAMPLES[name]
    workload = Workload(ranks_, shape, **known)
    broken = {rule.broken.__name__ for rule, _ in broken_rules(ParallelPlan(**degrees), workload)}
    if name == "experts_are_reduced_over_tensor_ranks" and planned().reduces_whole_experts:
        assert broken == set()  # megatron-core has it right from 0.19 on
        return
    assert name in broken
    assert broken == {name} or name.startswith("te_")


def test_queries_keys_and_values_are_one_matrix_that_tensor_ranks_split():
    """Of 48 heads and 2 groups, 6 ranks split the heads, and each group goes to three of them; 52 x 128 rows do not."""
    shape = replace(QWEN_32B, heads=48, kv_groups=2, hidden=6144, ffn=24576)
    plan = ParallelPlan(tensor=6, sequence_parallel=True)
    (found,) = messages(plan, 6, shape=shape)
    assert found == "parallel.tensor: 6 does not split the 6,656 rows of queries, keys and values: use tensor 2"


def test_every_rule_has_its_example():
    assert {rule.broken.__name__ for rule in RULES} == EXAMPLES.keys()


def test_nearest_takes_the_smaller_of_two():
    assert nearest(3, [1, 2, 4]) == 2


@pytest.mark.parametrize("rows, tensor, padded", [(19, 1, 19), (19, 2, 32), (152064, 8, 152064), (201088, 3, 201096)])
def test_the_vocabulary_is_padded_only_where_it_does_not_split(rows, tensor, padded):
    assert padded_rows(rows, tensor) == padded and padded % tensor == 0


def test_a_contrary_environment_is_refused():
    given_ = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    assert environment_problems(ParallelPlan(), given_) == []
    (found,) = environment_problems(ParallelPlan(tensor=2), given_)
    assert "need CUDA_DEVICE_MAX_CONNECTIONS=1, and the environment says 8" in str(found)


# ---------------------------------------------------------------- who sits where

AXES = {"tensor": "tp", "context": "cp", "data": "dp", "pipeline": "pp", "optimizer": "dp-cp"}
EXPERT_AXES = {"expert_tensor": "tp", "expert": "ep", "expert_data": "dp", "pipeline": "pp"}


@settings(max_examples=60)
@given(*[st.sampled_from([1, 2, 3, 4])] * 4, st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([1, 2]))
def test_the_grid_is_that_of_megatron_cores_rank_generator(tensor, context, data, pipeline, expert, expert_tensor):
    from megatron.core.parallel_state import RankGenerator

    plan = ParallelPlan(tensor=tensor, context=context, pipeline=pipeline, expert=expert, expert_tensor=expert_tensor)
    count = tensor * context * data * pipeline
    if count % plan.expert_model:
        return
    found, order = grid(plan, count), "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=context, order=order)
    experts = RankGenerator(tp=expert_tensor, ep=expert, dp=plan.expert_data(count), pp=pipeline, cp=1, order=order)
    for axis, token in AXES.items():
        assert getattr(found, axis) == dense.get_ranks(token), axis
    for axis, token in EXPERT_AXES.items():
        assert getattr(found, axis) == experts.get_ranks(token), axis


def _groups(tensor: int) -> tuple[list[int], list[int]]:
    import torch.distributed as dist
    from megatron.core import parallel_state

    with ranks.started(ParallelPlan(tensor=tensor)):
        return (
            dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group()),
            dist.get_process_group_ranks(parallel_state.get_data_parallel_group()),
        )


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_grid_is_that_of_running_ranks(two_ranks, tensor):
    expected = grid(ParallelPlan(tensor=tensor), 2)
    for rank, (tensor_group, data_group) in enumerate(two_ranks.run(_groups, tensor=tensor)):
        assert tensor_group == expected.tensor[rank // tensor]
        assert data_group == next(group for group in expected.data if rank in group)
        assert data_group[expected.place("data", rank)] == rank == tensor_group[expected.place("tensor", rank)]
