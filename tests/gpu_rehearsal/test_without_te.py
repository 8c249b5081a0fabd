"""A GPU whose machine has no Transformer Engine, played in a process of its own."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.rehearsal

GPU_WITHOUT_TE = """
import torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda.set_device = lambda index: None
from megatron_ext.device import init_device
init_device()
torch.cuda.is_available = lambda: False
from megatron.core.transformer.moe import router
out = router.router_gating_linear(torch.ones(3, 1, 4), torch.ones(2, 4), torch.ones(2), torch.float64)
assert out.shape == (3, 1, 2) and out.dtype == torch.float64 and (out == 5).all()
"""


def test_a_router_works():
    done = subprocess.run([sys.executable, "-c", GPU_WITHOUT_TE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
