"""A model's shape counts its parameters exactly."""

import pytest

from tests.megatron_ext.shapes import GPT_OSS_20B, GPT_OSS_120B, NANO, QWEN_32B


@pytest.mark.parametrize(
    "shape, parameters, expert, active",
    [  # reference/megatron.md 1.1; the 120B is that of its model card
        (QWEN_32B, 32_763_876_352, 0, 32_763_876_352 - 152064 * 5120),
        (GPT_OSS_20B, 20_914_757_184, 19_116_933_120, 3_608_307_264),
        (GPT_OSS_120B, 116_829_156_672, 114_701_598_720, 5_132_849_472),
        (NANO, 31_577_937_344, 29_374_808_064, 3_227_751_872),
    ],
)
def test_parameters_are_those_of_the_released_checkpoints(shape, parameters, expert, active):
    assert (shape.parameters.total, shape.parameters.expert, shape.active) == (parameters, expert, active)
