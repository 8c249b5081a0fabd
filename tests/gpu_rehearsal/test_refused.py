"""What would fail or be wrong on a GPU, chosen otherwise or refused before anything starts there."""

from dataclasses import replace

import pytest

from megatron_ext.parallel.parts import AUTO, TE, Needs, choose
from megatron_ext.training.options import CUDA_GRAPHS, Engine, check
from tests.gpu_rehearsal.mixtures import H100, by_auto
from tests.megatron_ext import tiny
from tests.megatron_ext.cells import FAMILIES

pytestmark = pytest.mark.rehearsal

A100 = replace(H100, gpu="NVIDIA A100", capability=(8, 0))


@pytest.mark.parametrize("family", tiny.marked(FAMILIES))
def test_an_a100_without_flash_attention_has_our_attention_over_the_same_other_parts(family):
    """cuDNN's attention over packed documents needs a Hopper."""
    needs = Needs(A100, tiny.family(FAMILIES[family]).config.shape(FAMILIES[family]), None, "bfloat16")
    assert choose(AUTO, needs).parts == replace(by_auto(FAMILIES[family]), attention="torch")
    assert family != "qwen2" or by_auto(FAMILIES[family]).attention == TE  # some small heads are no multiple of 8


@pytest.mark.parametrize("graphs", [value for value in CUDA_GRAPHS if value != "none"])
def test_a_training_s_recorded_passes_are_refused(graphs):
    """They would hold the boundaries of the pack that they were recorded with."""
    (problem,) = check(Engine(cuda_graphs=graphs), by_auto(tiny.DIMS))
    assert problem.where == "engine.cuda_graphs"
