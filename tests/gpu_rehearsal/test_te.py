"""Backend te under stand-ins for Transformer Engine and mamba-ssm: it computes what backend torch computes."""

from pathlib import Path

import pytest

from megatron_ext.parallel.plan import ParallelPlan, Workload
from megatron_ext.parallel.rules import check
from tests.megatron_ext import tiny
from tests.megatron_ext.shapes import GPT_OSS_20B, QWEN_32B

pytestmark = pytest.mark.rehearsal

CLOSE = 1e-5  # of losses, relative
CLOSE_NORMS = 1e-4  # of gradients, whose sums are added up in another order
FAMILIES = {
    "qwen2": tiny.DIMS,
    "qwen3": tiny.dims(kind="qwen3", tied=False),
    "nemotron_h": tiny.NEMOTRON_H_DIMS,
    "nemotron_h dense": tiny.hybrid("M*-M", norm_epsilon=1e-2),
    "gpt_oss": tiny.GPT_OSS_DIMS,
}
SINKS = {"gpt_oss": True}  # what has no kernel in 2.11 is compared with the kernel of a later release
SETTINGS = {
    "all weights": dict(),
    "recompute full": dict(plan=ParallelPlan(recompute="full")),
    "recompute selective": dict(plan=ParallelPlan(recompute="selective")),
    "LoRA": dict(lora=True),
}
TP2_SP = dict(tensor=2, sequence_parallel=True)
PAIRS = {
    "qwen2": ParallelPlan(**TP2_SP),
    "qwen3": ParallelPlan(**TP2_SP, recompute="full"),
    "nemotron_h": ParallelPlan(**TP2_SP, expert=2),
    "nemotron_h dense": ParallelPlan(**TP2_SP),
    "gpt_oss": ParallelPlan(**TP2_SP, expert=2),
}


@pytest.fixture(scope="session")
def weights(solo, tmp_path_factory):
    """Folders with weights of each family, written under the torch backend."""
    root = tmp_path_factory.mktemp("weights")
    folders = {name: root / name.replace(" ", "_") for name in FAMILIES}
    for name, of in FAMILIES.items():
        solo.te("write_weights", of=of, folder=folders[name])
    return folders


def assert_same(pool, weights: dict[str, Path], family: str, **setting) -> None:
    of, sinks = FAMILIES[family], SINKS.get(family, False)
    same = dict(of=of, weights=weights[family], **setting)
    ours = pool.te("losses", backend="torch", **same)
    theirs = pool.te("losses", backend="te", kernel_for_sinks=sinks, **same)
    for rank, (a, b) in enumerate(zip(ours, theirs)):
        assert b[0] == pytest.approx(a[0], rel=CLOSE, abs=0), f"losses of rank {rank}"
        assert b[1] == pytest.approx(a[1], rel=CLOSE_NORMS, abs=0), f"gradient norms of rank {rank}"


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_te_computes_what_torch_computes(solo, weights, family, setting):
    assert_same(solo, weights, family, **SETTINGS[setting])


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_compute_what_torch_computes(pair, weights, family):
    assert_same(pair, weights, family, plan=PAIRS[family])


def test_two_ranks_with_lora_compute_what_torch_computes(pair, weights):
    assert_same(pair, weights, "qwen2", plan=PAIRS["qwen2"], lora=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_either_backend_is_loaded_by_both(solo, weights, family, tmp_path):
    digests = solo.te("digests", of=FAMILIES[family], weights=weights[family], folder=tmp_path)
    assert len(set(digests[0])) == 1


@pytest.mark.parametrize("te_rng", [False, True])
def test_training_goes_on_from_its_own_checkpoint(solo, weights, te_rng, tmp_path):
    """Experts, Mamba and random states: what would have come next comes next."""
    (before, after), *_ = solo.te(
        "resumed", of=FAMILIES["nemotron_h"], weights=weights["nemotron_h"], folder=tmp_path, te_rng=te_rng
    )
    assert after == before


def test_mamba_s_decays_stay_exact_in_bf16(solo, weights, tmp_path):
    found = solo.te("exact_in_bf16", of=FAMILIES["nemotron_h"], weights=weights["nemotron_h"], folder=tmp_path)[0]
    assert {name: kind for name, kind in found.items() if kind != "float32"} == {}
    assert len(found) == 3


# ---------------------------------------------------------------- what 2.11 cannot do


def test_sinks_have_no_kernel_for_packs(solo, weights):
    with pytest.raises(AssertionError, match="No dot product attention backend is available"):
        solo.te("losses", of=FAMILIES["gpt_oss"], backend="te", weights=weights["gpt_oss"])


def test_plan_refuses_what_has_no_kernel():
    plan = ParallelPlan(expert=2)
    (problem,) = check(plan, Workload(2, GPT_OSS_20B, backend="te"))
    assert "no kernel" in str(problem) and str(problem).endswith("use backend torch")
    assert check(plan, Workload(2, GPT_OSS_20B)) == []
    assert check(ParallelPlan(), Workload(2, QWEN_32B, backend="te")) == []


def test_nanochat_refuses_te(solo):
    with pytest.raises(AssertionError, match="no norms without weights"):
        solo.te("build", of=tiny.NANOCHAT_DIMS)
