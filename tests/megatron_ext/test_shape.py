"""A model's shape counts its parameters exactly."""

import math

import pytest

from megatron_ext.models.layouts import hf_shapes
from megatron_ext.models.registry import stages as parts_of
from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.preflight.memory import stages
from tests.megatron_ext import tiny
from tests.megatron_ext.shapes import GPT_OSS_20B, GPT_OSS_120B, NANO, QWEN_32B

FAMILIES = [tiny.DIMS, tiny.dims(tied=False), tiny.GPT_OSS_DIMS, tiny.NEMOTRON_H_DIMS]
KINDS = [pytest.param(of, marks=pytest.mark.soak, id=kind) for kind, of in tiny.KINDS.items()]


@pytest.mark.parametrize(
    "shape, parameters, expert, active",
    [  # those of the released models; the 120B is that of its model card
        (QWEN_32B, 32_763_876_352, 0, 32_763_876_352 - 152064 * 5120),
        (GPT_OSS_20B, 20_914_757_184, 19_116_933_120, 3_608_307_264),
        (GPT_OSS_120B, 116_829_156_672, 114_701_598_720, 5_132_849_472),
        (NANO, 31_577_937_344, 29_374_808_064, 3_227_751_872),
    ],
)
def test_parameters_are_those_of_the_released_checkpoints(shape, parameters, expert, active):
    assert (shape.parameters.total, shape.parameters.expert, shape.active) == (parameters, expert, active)


@pytest.mark.parametrize("dims", FAMILIES, ids=lambda dims: tiny.family(dims).name)
def test_parameters_are_those_of_the_familys_checkpoint(dims):
    family = tiny.family(dims)
    tensors = hf_shapes(family.mapping.rules(dims))
    buffers = [name for name in tensors if name.endswith("e_score_correction_bias")]
    stored = sum(math.prod(shape) for name, shape in tensors.items() if name not in buffers)
    assert family.config.shape(dims).parameters.total == stored


def _built(plan: ParallelPlan, dims) -> int:
    with ranks.started(plan):
        import torch

        built = tiny.family(dims).build(dims, plan, torch.float32)
        return sum(p.numel() for part in parts_of(built) for p in part.parameters())


PLANS = {
    "TP2": ParallelPlan(tensor=2, sequence_parallel=True, expert=2),
    "PP2": ParallelPlan(pipeline=2),
    "CP2": ParallelPlan(context=2),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("dims", [*FAMILIES, *KINDS], ids=lambda dims: tiny.family(dims).name)
def test_parameters_of_a_rank_are_those_of_the_built_model(two_ranks, plan, dims):
    """Padding of the vocabulary, whole norms and routers, experts over ranks, ends of the pipeline."""
    family = tiny.family(dims)
    shape = family.config.shape(dims)
    if not shape.experts:
        plan = ParallelPlan(**{**vars(plan), "expert": 1})
    predicted = [stage.parameters.total for stage in stages(plan, shape)]
    found = two_ranks.run(_built, plan=plan, dims=dims)
    assert found == (predicted if plan.pipeline == 2 else predicted * 2)
