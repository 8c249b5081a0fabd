"""A step on pretended GPUs: nothing is left on the CPU, and the host waits no oftener than is said here."""

import pytest
import torch

from megatron_ext.parallel.plan import ParallelPlan
from tests.gpu_rehearsal import device_ranks
from tests.gpu_rehearsal.pool import PretendedRanks
from tests.megatron_ext import tiny

pytestmark = pytest.mark.rehearsal

FAMILIES = {
    "qwen2": tiny.DIMS,
    "qwen3": tiny.dims(kind="qwen3", tied=False),
    "gpt_oss": tiny.GPT_OSS_DIMS,
    "nemotron_h": tiny.NEMOTRON_H_DIMS,
    "nanochat": tiny.NANOCHAT_DIMS,
}


@pytest.fixture(scope="session")
def pretended():
    """One rank on a pretended GPU."""
    ranks = PretendedRanks(1)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_step_leaves_nothing_on_the_cpu(pretended, family, tmp_path):
    (found,) = pretended.run(device_ranks.walk, of=FAMILIES[family], folder=tmp_path)
    print(found)
