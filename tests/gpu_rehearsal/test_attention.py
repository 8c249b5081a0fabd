"""Attention and rollouts as on a GPU, on real ranks: torch's FlashAttention played by its stand-in, Transformer Engine
by its own. They compute what the torch layers compute on a CPU."""

from pathlib import Path

import pytest
import torch

from megatron_ext.layers.flash import HALVES
from megatron_ext.parallel.parts import OURS
from megatron_ext.parallel.plan import ParallelPlan
from tests.gpu_rehearsal.flash_kernel import EXACT
from tests.gpu_rehearsal.mixtures import by_auto
from tests.gpu_rehearsal.rollout_ranks import Found, differences, sampled, trained, written
from tests.megatron_ext import tiny

pytestmark = pytest.mark.rehearsal

CLOSE = 1e-5  # of losses and log-probs, fp32
FAMILIES = {
    "qwen2": tiny.DIMS,
    "qwen3": tiny.dims(kind="qwen3", tied=False),
    "gpt_oss": tiny.GPT_OSS_DIMS,
    "nemotron_h attention": tiny.hybrid("*-*-", head_dim=16),
    "nanochat": tiny.NANOCHAT_DIMS,
    **tiny.KINDS,
}
WITH_TE = {name: by_auto(of) for name, of in FAMILIES.items()}
PLANS = {
    "all_gather": ParallelPlan(context=2, context_comm="all_gather"),
    "a2a": ParallelPlan(context=2, context_comm="a2a"),
    "tensor": ParallelPlan(tensor=2, sequence_parallel=True),
}


@pytest.fixture(scope="session")
def folders(solo, tmp_path_factory) -> dict[str, Path]:
    """Folders with weights of each family."""
    found = {}
    for name, of in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        solo.run(written, of=of, folder=folder)
        found[name] = folder / "weights"
    return found


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("family", tiny.marked(FAMILIES))
def test_flash_attention_computes_what_the_buckets_compute(solo, family):
    assert_close(solo.run(differences, of=FAMILIES[family], plan=ParallelPlan()))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", tiny.marked(FAMILIES))
def test_two_ranks_compute_by_flash_attention_what_the_buckets_compute(pair, family, plan):
    assert_close(pair.run(differences, of=FAMILIES[family], plan=PLANS[plan]))


def assert_close(by_rank: list[dict[str, float]]) -> None:
    for rank, found in enumerate(by_rank):
        assert found.pop("calls") == 4  # two layers, both ways
        assert {name: far for name, far in found.items() if far > 1e-12} == {}, f"rank {rank}"


@pytest.mark.parametrize("family", tiny.marked(FAMILIES))
def test_training_by_flash_attention_has_the_losses_of_the_buckets(pair, folders, family):
    for plan in (PLANS["all_gather"], PLANS["a2a"]):
        same = dict(of=FAMILIES[family], weights=folders[family], plan=plan)
        for ours, theirs in zip(*(pair.run(trained, **same, flash=flash) for flash in (EXACT, None))):
            assert ours[0] == pytest.approx(theirs[0], rel=CLOSE, abs=0)
            assert ours[1] == pytest.approx(theirs[1], rel=1e-4, abs=0)  # sums in another order
            assert ours[2] > 0 and theirs[2] == 0


@pytest.mark.parametrize("family", tiny.marked(FAMILIES))
def test_training_in_fp32_on_a_gpu_has_fused_kernels_and_the_losses_of_a_cpu(solo, folders, family):
    """FlashAttention takes no fp32: masks and shared heads are made into what the other kernel takes."""
    same = dict(of=FAMILIES[family], weights=folders[family], plan=ParallelPlan())
    (ours,), (theirs,) = (solo.run(trained, **same, flash=flash) for flash in (HALVES, None))
    assert ours[0] == pytest.approx(theirs[0], rel=CLOSE, abs=0)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4, abs=0)  # sums in another order
    assert ours[2:] == (0, {"efficient"}) and theirs[2:] == (0, set())


# ---------------------------------------------------------------- rollouts


@pytest.fixture(scope="session")
def expected(solo, folders) -> dict[str, Found]:
    """Samples of each family by the torch layers on a CPU."""
    return {
        name: solo.run(sampled, of=of, made_of=OURS, weights=folders[name], plan=ParallelPlan())[0]
        for name, of in FAMILIES.items()
    }


def assert_same_samples(found: Found, expected: Found) -> None:
    assert found.keys() <= expected.keys() and found
    for name, (tokens, logprobs) in found.items():
        assert tokens == expected[name][0]
        assert logprobs == pytest.approx(expected[name][1], rel=0, abs=CLOSE)


@pytest.mark.parametrize("family", WITH_TE)
def test_rollouts_over_transformer_engines_layers_draw_the_samples_of_torchs(solo, folders, expected, family):
    same = dict(of=FAMILIES[family], made_of=WITH_TE[family], weights=folders[family], plan=ParallelPlan())
    assert_same_samples(solo.run(sampled, **same)[0], expected[family])
    assert_same_samples(solo.run(sampled, **same, flash=True)[0], expected[family])


@pytest.mark.parametrize("family", WITH_TE)
def test_two_ranks_with_transformer_engine_draw_the_same_samples(pair, folders, expected, family):
    plan = PLANS["tensor"]
    same = dict(of=FAMILIES[family], made_of=by_auto(FAMILIES[family], plan), weights=folders[family], plan=plan)
    for found in pair.run(sampled, **same):
        assert_same_samples(found, expected[family])


@pytest.mark.parametrize("block", [8, 256])
@pytest.mark.parametrize("family", tiny.marked(FAMILIES))
def test_rollouts_by_flash_attention_draw_the_same_samples(solo, folders, expected, family, block):
    same = dict(of=FAMILIES[family], made_of=OURS, weights=folders[family], plan=ParallelPlan())
    assert_same_samples(solo.run(sampled, **same, flash=True, block=block)[0], expected[family])


# ---------------------------------------------------------------- the kernel itself


def test_torch_has_the_operations_that_the_stand_in_plays():
    """Another release of torch is noticed here: read its flash_api.cpp again, and play what it changed."""
    forward, backward = (
        str(operation.default._schema)
        for operation in (torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward)
    )
    assert forward == (
        "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, "
        "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
        "SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, "
        "Tensor? alibi_slopes=None, Tensor? block_table=None, int? num_splits=None) -> (Tensor output, "
        "Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)"
    )
    assert backward == (
        "aten::_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
        "Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
        "bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None, SymInt? window_size_left=None, "
        "SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)"
    )
