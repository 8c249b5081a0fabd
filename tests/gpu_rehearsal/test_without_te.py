"""A GPU whose machine has Transformer Engine or not, played in a process of its own."""

import os
import subprocess
import sys

import pytest

from tests.gpu_rehearsal.pool import STAND_INS

pytestmark = pytest.mark.rehearsal

ROUTED = """
import torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda.set_device = lambda index: None
from megatron_ext.device import init_device
init_device()
torch.cuda.is_available = lambda: False
from megatron.core.transformer.moe import moe_utils, router
print(moe_utils.HAVE_TE)
x, weight, bias = torch.ones(3, 1, 4), torch.ones(2, 4), torch.ones(2)
for dtype in (torch.bfloat16, torch.float32):
    out = router.router_gating_linear(x.to(dtype), weight.to(dtype), bias.to(dtype), torch.float32)
    assert out.shape == (3, 1, 2) and out.dtype == torch.float32 and (out == 5).all()
from megatron.core import optimizer
print(optimizer.USING_PYTORCH_OPTIMIZER, optimizer.Adam.__module__.partition(".")[0])
"""


@pytest.mark.parametrize("installed", ("transformer_engine", "apex", ""))
def test_a_router_and_an_optimizer_are_there(installed, tmp_path):
    """`apex` is the package of that name which the index has: not NVIDIA's, without an optimizer."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    first = {"transformer_engine": [STAND_INS], "apex": [tmp_path]}.get(installed, [])
    path = os.pathsep.join(map(str, [*first, STAND_INS.parents[2]]))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", ROUTED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    te = installed == "transformer_engine"
    assert done.stdout.split() == [str(te), "False", "transformer_engine" if te else "megatron_ext"]
