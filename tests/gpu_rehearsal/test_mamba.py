"""Mamba layers over stand-ins for mamba-ssm and causal-conv1d: what they compute with torch's kernels, and no more."""

import pytest

from megatron_ext.layers.mamba import SEGMENTS
from megatron_ext.models.registry import Family
from megatron_ext.parallel.mamba_kernels import channels_of, mamba_kernels
from megatron_ext.parallel.parts import OURS
from megatron_ext.parallel.plan import ParallelPlan
from tests.gpu_rehearsal.mixtures import by_auto
from tests.gpu_rehearsal.pool import call
from tests.megatron_ext import tiny
from tests.megatron_ext.shapes import NANO

pytestmark = pytest.mark.rehearsal

SHAPES = {
    "as the model's": tiny.hybrid("M"),
    # causal-conv1d takes 56 channels; the columns of in_proj are 101, which its strides must not be
    "5 heads": tiny.hybrid("M", mamba_heads=5, mamba_head_dim=8, mamba_groups=1, mamba_state=8),
    "44 channels, which causal-conv1d refuses": tiny.hybrid("M", mamba_heads=5, mamba_groups=1),
}
EVERY = pytest.mark.parametrize("shape", SHAPES)
NUMBERS = {"installed": ("mamba_ssm", "causal_conv1d"), "dtype": "bfloat16", "capability": (9, 0)}


def shape_of(name: str):
    return Family("nemotron_h").config.shape(SHAPES[name])


def mamba(pool, name: str, **given):
    return pool.run(call, name=name, given=given, module="mamba_ranks")[0]


# ---------------------------------------------------------------- which kernels


def test_heads_of_any_number_have_kernels():
    assert [mamba_kernels(shape_of(name), **NUMBERS)[:2] for name in SHAPES] == [
        ("mamba_ssm", "causal_conv1d"),
        ("mamba_ssm", "causal_conv1d"),
        ("mamba_ssm", "torch"),
    ]
    assert channels_of(shape_of("5 heads")) == 56


@pytest.mark.parametrize(
    "facts, why",
    [
        (dict(capability=None), "there is no GPU"),
        (dict(capability=(7, 5)), "compute capability 7.5, and mamba-ssm's kernels need 8.0"),
        (dict(installed=("mamba_ssm",)), "causal-conv1d is not installed"),
        (dict(installed=()), "mamba-ssm and causal-conv1d are not installed"),
        (dict(dtype="float32"), "float32 to TF32"),
    ],
)
def test_where_the_kernels_do_not_fit_torch_computes_and_the_reason_is_said(facts, why):
    found = mamba_kernels(NANO, **{**NUMBERS, **facts})
    assert found[:2] == ("torch", "torch") and why in found.reason


def test_a_model_without_mamba_needs_none():
    dense = Family("qwen2").config.shape(tiny.DIMS)
    assert mamba_kernels(dense, **NUMBERS) == ("torch", "torch", "the model has no Mamba layer")


@pytest.mark.parametrize("tensor, context, channels", [(1, 1, 6144), (8, 1, 768), (2, 8, 512), (1, 4, 1536)])
def test_the_channels_of_a_rank_are_its_heads_and_the_groups_that_they_use(tensor, context, channels):
    assert channels_of(NANO, tensor, context) == channels


# ---------------------------------------------------------------- what they compute


@EVERY
@pytest.mark.parametrize("segment", [10**6, 24])
def test_outputs_states_and_gradients_are_those_of_torch(solo, shape, segment):
    worst = mamba(solo, "worst_against_torch", of=SHAPES[shape], segment=segment)
    assert len(worst) == 9 and {name: far for name, far in worst.items() if not far <= 1} == {}


@EVERY
def test_decoding_goes_on_from_where_the_scan_ended(solo, shape):
    for cut in (1, 2, 20):
        far, bound = mamba(solo, "decoded", of=SHAPES[shape], cut=cut)
        assert far <= bound


@EVERY
@pytest.mark.parametrize("segment", [10**6, 24])
def test_no_gradient_reaches_another_document(solo, shape, segment):
    found = mamba(solo, "reached", of=SHAPES[shape], segment=segment)
    assert found == [[document == other for other in range(len(found))] for document in range(len(found))]


def test_kernels_never_see_more_elements_than_they_count(solo):
    """A row of 262,144 tokens of Nemotron-3-Nano has 2.7e9 elements; they count 2^31."""
    calls = mamba(solo, "tokens_a_call", of=SHAPES["as the model's"], tokens=20_000)
    assert sum(calls) == 20_000 and max(calls) == SEGMENTS["mamba_ssm"]
    assert 262_144 * NANO.mamba_projection >= 2**31
    assert max(calls) * 8 * NANO.mamba_projection < 2**31  # room for models eight times as wide


CONTEXT = {  # a context rank's channels: a multiple of 8, and not
    "64 channels": tiny.hybrid("M-M", mamba_head_dim=8, mamba_state=8),
    "52 channels": tiny.hybrid("M-M"),
}


@pytest.mark.parametrize("shape", CONTEXT)
def test_context_ranks_compute_what_torch_computes(solo, pair, shape, tmp_path):
    of = CONTEXT[shape]
    solo.te("write_weights", of=of, folder=tmp_path / "weights")
    same = dict(of=of, weights=tmp_path / "weights", plan=ParallelPlan(context=2, context_comm="a2a"))
    mixtures = OURS, by_auto(of, same["plan"])
    (ours, norms), (theirs, their_norms) = (mamba(pair, "losses", made_of=parts, **same) for parts in mixtures)
    assert theirs == pytest.approx(ours, rel=1e-5, abs=0)
    assert their_norms == pytest.approx(norms, rel=1e-4, abs=0)


# ---------------------------------------------------------------- rollouts

PROMPTS = [tuple(1 + (3 * i + j * j) % 18 for j in range(1 + 5 * i % 37)) for i in range(6)]


@pytest.mark.parametrize("shape", ["M-M", "5 heads"])
def test_rollouts_under_te_are_those_of_torch(solo, shape, tmp_path):
    of = tiny.hybrid("M-M") if shape == "M-M" else SHAPES[shape]
    solo.te("write_weights", of=of, folder=tmp_path / "weights")
    same = dict(of=of, weights=tmp_path / "weights", prompts=PROMPTS)
    ours = mamba(solo, "samples", made_of=OURS, **same)
    theirs = mamba(solo, "samples", made_of=by_auto(of), **same)
    assert len(ours) == 3 * len(PROMPTS) and ours.keys() == theirs.keys()
    for key, (tokens, logprobs, margins) in ours.items():
        near = next((i for i, margin in enumerate(margins) if margin < 1e-4), len(margins))
        assert theirs[key][0][:near] == tokens[:near]
        assert theirs[key][1][:near] == pytest.approx(logprobs[:near], abs=1e-5)
