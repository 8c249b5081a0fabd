"""Whose layers a small model is made of: what `auto` chooses on an H100 where all packages of the extra `gpu` are."""

from typing import Any

from megatron_ext.parallel.machine import PINNED, Machine
from megatron_ext.parallel.parts import AUTO, Needs, Parts, choose
from megatron_ext.parallel.plan import ParallelPlan
from tests.megatron_ext import tiny

H100 = Machine(
    "NVIDIA H100",
    (9, 0),
    91002,
    transformer_engine=PINNED.transformer_engine,
    mamba_ssm=PINNED.mamba_ssm,
    causal_conv1d=PINNED.causal_conv1d,
)


def by_auto(of: Any, plan: ParallelPlan | None = None) -> Parts:
    """Return the parts of a model in bfloat16 under a layout."""
    return choose(AUTO, Needs(H100, tiny.family(of).config.shape(of), plan, "bfloat16")).parts
