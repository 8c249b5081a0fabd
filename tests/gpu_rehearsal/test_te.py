"""Parts that are Transformer Engine's, under stand-ins: every mixture computes what our own parts compute."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from megatron_ext.parallel.parts import OURS, Parts
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
    "nanochat": tiny.NANOCHAT_DIMS,
    **tiny.KINDS,
}
WITH_EXPERTS = ("nemotron_h", "gpt_oss", *(kind for kind, of in tiny.KINDS.items() if of.experts))
TE = Parts("te", "te", "te", "te")
MOST = {  # the parts that can be Transformer Engine's; of sinks with the kernel of a later release
    family: replace(TE, norm="torch") if family == "nanochat" else TE for family in FAMILIES
}
BY_AUTO_WITH_SINKS = replace(TE, attention="torch")  # release 2.11
RECOMPUTED = ("full", "selective")
TP2_SP = dict(tensor=2, sequence_parallel=True)
PAIRS = {
    "qwen2": ParallelPlan(**TP2_SP),
    "qwen3": ParallelPlan(**TP2_SP, recompute="full"),
    "nemotron_h": ParallelPlan(**TP2_SP, expert=2),
    "nemotron_h dense": ParallelPlan(**TP2_SP),
    "gpt_oss": ParallelPlan(**TP2_SP, expert=2),
    "nanochat": ParallelPlan(**TP2_SP),
    **{kind: ParallelPlan(**TP2_SP, expert=2 if of.experts else 1) for kind, of in tiny.KINDS.items()},
}


def mixtures(family: str) -> list[Parts]:
    """Return every mixture of layers that the family's specs can be built of, our own parts alone first.

    Mamba's kernels are mamba-ssm's beside linear layers of Transformer Engine, and twice the other way round.
    """
    owners, ours = ("torch", "te"), ("torch",)
    norms = ours if family == "nanochat" else owners
    experts = owners if family in WITH_EXPERTS else ours
    mixed = [Parts(*each) for each in product(owners, owners, norms, experts)]
    if not family.startswith("nemotron_h"):
        return mixed
    beside = [replace(parts, mamba="mamba_ssm") if parts.linear == "te" else parts for parts in mixed]
    return [*beside, replace(OURS, mamba="mamba_ssm"), MOST[family]]


@pytest.fixture(scope="session")
def weights(solo, tmp_path_factory):
    """Folders with weights of each family, written by our own parts."""
    root = tmp_path_factory.mktemp("weights")
    folders = {name: root / name.replace(" ", "_") for name in FAMILIES}
    for name, of in FAMILIES.items():
        solo.te("write_weights", of=of, folder=folders[name])
    return folders


def assert_close(ours: tuple[list[float], list[float]], theirs: tuple[list[float], list[float]], what: object) -> None:
    assert theirs[0] == pytest.approx(ours[0], rel=CLOSE, abs=0), f"losses of {what}"
    assert theirs[1] == pytest.approx(ours[1], rel=CLOSE_NORMS, abs=0), f"gradient norms of {what}"


def assert_same(pool, weights: dict[str, Path], family: str, made_of: Parts, **setting) -> None:
    same = dict(of=FAMILIES[family], weights=weights[family], **setting)
    ours = pool.te("losses", made_of=OURS, **same)
    theirs = pool.te("losses", made_of=made_of, kernel_for_sinks=family == "gpt_oss", **same)
    for rank, (a, b) in enumerate(zip(ours, theirs)):
        assert_close(a, b, f"rank {rank}")


@pytest.mark.parametrize("recompute", RECOMPUTED)
@pytest.mark.parametrize("family", tiny.marked(FAMILIES))
def test_recomputation_computes_what_torch_computes(solo, weights, family, recompute):
    assert_same(solo, weights, family, MOST[family], plan=ParallelPlan(recompute=recompute))


@pytest.mark.parametrize("family", tiny.marked([*FAMILIES, "gpt_oss by auto"]))
def test_two_ranks_compute_what_torch_computes(pair, weights, family):
    family, by_auto_, _ = family.partition(" by auto")
    made_of = BY_AUTO_WITH_SINKS if by_auto_ else MOST[family]
    assert_same(pair, weights, family, made_of, plan=PAIRS[family])


def test_two_ranks_with_lora_compute_what_torch_computes(pair, weights):
    assert_same(pair, weights, "qwen2", TE, plan=PAIRS["qwen2"], lora=True)


PLACES = {  # where a part stands, with its class of Transformer Engine's and ours
    "attention": [("PackedSelfAttention.core_attention", "TEPackedAttention", "PackedAttention")],
    "linear": [
        (place, "TERowParallelLinear", "RowParallelLinear")
        for place in ("PackedSelfAttention.linear_proj", "SharedExpertMLP.linear_fc2", "MambaMixer.out_proj")
    ],
    "norm": [
        (f"{place}norm", "RMSNorm", "Norm")
        for place in ("TransformerBlock.final_layer", "HybridStack.final_", "MoETransformerLayer.pre_mlp_layer")
    ],
    "experts": [("MoELayer.experts", "TEGroupedMLP", "SequentialMLP")],
}


def assert_assembled(made_of: Parts, classes: set[str], norm_before: bool) -> None:
    """A model with modules of these classes has the parts that were chosen."""
    for part, places in PLACES.items():
        for place, theirs, ours in places:
            wanted = theirs if getattr(made_of, part) == "te" else ours
            found = {name.split()[1] for name in classes if name.startswith(f"{place} ")}
            assert found <= {wanted, "BareNorm"}, (made_of, place)
    fused = made_of.linear == made_of.norm == "te" and norm_before
    assert ("TELayerNormColumnParallelLinear" in classes) == fused
    assert "PackedSelfAttention" in classes and "SelfAttention" not in classes


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA, recompute full"])
@pytest.mark.parametrize("family", tiny.marked(FAMILIES))
def test_every_mixture_computes_what_our_parts_compute_and_loads_what_another_saved(
    solo, weights, family, lora, tmp_path
):
    plan = ParallelPlan(recompute="full" if lora else "none")
    (found,) = solo.te(
        "sweep",
        of=FAMILIES[family],
        mixtures=mixtures(family),
        weights=weights[family],
        folder=tmp_path,
        plan=plan,
        lora=lora,
    )
    own_digest, ours, _ = found[OURS]
    for made_of, (digest, theirs, classes) in found.items():
        assert digest == own_digest, made_of
        assert_close(ours, theirs, made_of)
        assert_assembled(made_of, classes, norm_before=not family.startswith("olmo"))


def test_a_folder_s_parts_are_chosen_where_it_is_loaded(solo):
    """On a CPU auto is ours even beside Transformer Engine; te is refused where it would be mixed."""
    for of in FAMILIES.values():
        assert solo.te("chosen", of=of, backend="auto") == [OURS] == solo.te("chosen", of=of, backend="torch")
    assert solo.te("chosen", of=FAMILIES["qwen2"], backend="te") == [TE]
    for family, said in (("gpt_oss", "no kernel"), ("nanochat", "norms without weights")):
        (refused,) = solo.te("chosen", of=FAMILIES[family], backend="te")
        assert said in refused and refused.endswith("use backend auto")


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
        solo.te("losses", of=FAMILIES["gpt_oss"], made_of=TE, weights=weights["gpt_oss"])


def test_plan_refuses_what_has_no_kernel():
    plan = ParallelPlan(expert=2)
    (problem,) = check(plan, Workload(2, GPT_OSS_20B, backend="te"))
    assert "no kernel" in str(problem) and str(problem).endswith("use backend auto")
    assert check(plan, Workload(2, GPT_OSS_20B)) == []
    assert check(ParallelPlan(), Workload(2, QWEN_32B, backend="te")) == []


def test_nanochat_s_norms_are_never_transformer_engine_s(solo, weights):
    with pytest.raises(AssertionError, match="no norms without weights"):
        solo.te("losses", of=tiny.NANOCHAT_DIMS, made_of=TE, weights=weights["nanochat"])
