"""Every name that device.py patches exists, does not do its job on CPU as it is, and does it patched."""

import importlib
import importlib.util
import logging
import subprocess
import sys
from functools import partial

import pytest
import torch

from data_tools.mistake import UserMistake
from megatron_ext import absent_triton, device, versions

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is patched where there is CUDA")


def patched(path: str):
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def test_the_device_is_the_cpu():
    assert device.device() == torch.device("cpu") and device.backend() == "gloo"


def test_a_second_call_changes_nothing():
    before = {path: patched(path) for path in device.PATCHES}
    device.init_device()
    assert {path: patched(path) for path in device.PATCHES} == before


@pytest.mark.parametrize("path", device.PATCHES)
def test_each_patch_names_something_that_exists_and_says_why(path):
    assert device.PATCHES[path].why
    # From 0.17 on the router's product is None by itself where Transformer Engine is missing.
    assert device.original(path) is not patched(path) or path == device._ROUTER


def test_current_device_is_one_that_tensors_accept():
    assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
    with pytest.raises((RuntimeError, AssertionError)):
        device.original("torch.cuda.current_device")()


@pytest.mark.parametrize("path", ["torch.cuda.get_rng_state", "torch.cuda.random.get_rng_state"])
def test_the_cuda_rng_state_is_the_default_generator(path):
    assert torch.equal(patched(path)(), torch.get_rng_state())
    with pytest.raises((RuntimeError, AssertionError)):
        device.original(path)()


def test_cuda_seeding_seeds_the_default_generator():
    torch.cuda.manual_seed(5)
    first = torch.rand(1)
    device.original("torch.cuda.manual_seed")(5)  # queued for a CUDA that never starts
    assert not torch.equal(torch.rand(1), first)
    torch.cuda.manual_seed(5)
    assert torch.equal(torch.rand(1), first)


def test_synchronize_returns():
    assert torch.cuda.synchronize() is None
    with pytest.raises((RuntimeError, AssertionError)):
        device.original("torch.cuda.synchronize")()


def test_streams_of_work_are_ready_at_once():
    with torch.cuda.stream(torch.cuda.Stream()) as stream:
        stream.wait_stream(torch.cuda.current_stream())
    assert stream.record_event().synchronize() is None
    for name in ("torch.cuda.Stream", "torch.cuda.current_stream"):
        with pytest.raises((RuntimeError, AssertionError)):
            device.original(name)()


@pytest.mark.parametrize("bias", [torch.randn(3), None])
def test_the_router_computes_in_the_dtype_it_is_asked_for(bias, monkeypatch):
    route = patched("megatron.core.transformer.moe.router.router_gating_linear")
    arguments = (torch.randn(2, 5), torch.randn(3, 5), bias, torch.float64)
    x, weight, _, dtype = arguments
    expected = torch.nn.functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    assert torch.equal(route(*arguments), expected)
    monkeypatch.delattr("megatron.core.transformer.moe.moe_utils.te_general_gemm")
    with pytest.raises(NameError, match="te_general_gemm"):
        route(*arguments)


def _noting(dtypes, matmul, a, b):
    dtypes.append(a.dtype)
    return matmul(a, b)


@pytest.mark.parametrize("name", ["frozen_weight", "grad_accumulation_and_async_allreduce"])
def test_a_cpu_without_bf16_multiplies_in_fp32(alone, monkeypatch, name):
    linear = patched(f"megatron.core.tensor_parallel.layers.linear_with_{name}")
    operands = [torch.randn(shape).bfloat16().requires_grad_() for shape in ((40, 300), (50, 300), (50,))]
    exact = torch.nn.functional.linear(*(x.double() for x in operands))
    for supported in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda answer=supported: answer)
        multiplied = []
        with monkeypatch.context() as spy:
            spy.setattr(torch, "matmul", partial(_noting, multiplied, torch.matmul))
            out = linear(*operands, False, False, False, tp_group=None)
        assert multiplied == [torch.bfloat16 if supported else torch.float32]
        assert out.dtype == torch.bfloat16 and torch.allclose(out.double(), exact, rtol=2**-7, atol=2**-5)
        grads = torch.autograd.grad(out.sum(), operands, allow_unused=True)
        assert all(grad is None or grad.dtype == torch.bfloat16 for grad in grads) and grads[0] is not None


def test_split_sizes_reach_the_collectives_as_numbers():
    path = "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu"
    sizes = torch.tensor([3, 0, 2])
    assert patched(path)(sizes) is sizes and patched(path)(sizes, as_numpy=True).tolist() == [3, 0, 2]
    assert isinstance(device.original(path)(sizes, as_numpy=True), torch.Tensor)


def test_mcore_reads_and_restores_rng_state():
    from megatron.core.tensor_parallel import random

    state = random._get_cuda_rng_state()
    first = torch.rand(1)
    random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(1), first)


def test_mcore_rng_tracker_forks_and_returns(alone):
    from megatron.core import tensor_parallel

    before = torch.get_rng_state()
    with tensor_parallel.get_cuda_rng_tracker().fork():
        inside = torch.rand(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(torch.rand(1), inside)


def test_mcore_builds_the_fused_adam_and_the_distributed_optimizer_accepts_it(alone, tmp_path):
    from megatron_ext.parallel.plan import ParallelPlan
    from megatron_ext.training.update import AdamW, Trainer
    from tests.megatron_ext import tiny

    trainer = Trainer(tiny.model(tiny.hf_folder(tmp_path), tiny.DIMS, ParallelPlan()), ParallelPlan(), AdamW())
    inner = trainer.optimizer.chained_optimizers[0].optimizer
    assert type(inner) is device.FusedAdam
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    assert optimizer.Adam is distrib_optimizer.Adam is device.FusedAdam
    assert not optimizer.USING_PYTORCH_OPTIMIZER
    # Both decide that the step count is read from the groups, where FusedAdam keeps it.
    assert distrib_optimizer.HAVE_APEX_OR_TE and distrib_optimizer.USING_APEX_OPTIMIZER


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [True, False])
def test_fused_adam_updates_as_torch_does(decay, decoupled):
    torch.manual_seed(0)
    start, grads = torch.randn(7, 3), [torch.randn(7, 3) for _ in range(4)]
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    first = device.FusedAdam([ours], adam_w_mode=decoupled, **settings)
    second = (torch.optim.AdamW if decoupled else torch.optim.Adam)([theirs], **settings)
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        first.step()
        second.step()
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert first.param_groups[0]["step"] == 4


def test_a_literal_cuda_is_the_cpu():
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2, device=torch.device("cuda", 0), pin_memory=True).device.type == "cpu"
    assert torch.zeros(2).cuda().to("cuda").to(device="cuda").pin_memory().device.type == "cpu"
    assert torch.zeros(2).type() == "torch.cuda.FloatTensor"  # mcore compares it with this name
    assert torch.zeros(2).to(torch.float64).dtype == torch.float64
    with device.plain_torch():
        assert torch.zeros(2).type() == "torch.FloatTensor"
    assert torch.zeros(2).type() == "torch.cuda.FloatTensor"


@pytest.mark.parametrize("found", ["0.15.0", "0.17.0", "0.20.0", "0.19.2+local", "0.19.2.dev1", "none"])
def test_another_megatron_core_is_refused(monkeypatch, found):
    monkeypatch.setattr(versions, "installed", lambda: found)
    with pytest.raises(UserMistake) as said:
        versions.release()
    known = f"megatron-core {found} is installed, and 0.16.1, 0.17.1, 0.18.2, 0.19.2 are known"
    assert str(said.value).startswith(known) and "\n" not in str(said.value)


@pytest.mark.parametrize("before", ["", "rc1"])
def test_a_clone_that_is_imported_in_place_of_the_installed_one_is_refused(before, tmp_path):
    """Megatron-LM on PYTHONPATH: the metadata is the installed one's, the code is not."""
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise SystemExit('it was imported')")
    (core / "package_info.py").write_text(f'MAJOR = 0\nMINOR = 20\nPATCH = 0\nPRE_RELEASE = "{before}"\n')
    code = "import sys; sys.path.insert(0, sys.argv[1]); from megatron_ext import versions; versions.check_imported()"
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    said = result.stderr.splitlines()[-1]
    assert f"import finds megatron-core 0.20.0{before} in {core}, and {versions.installed()} is installed" in said
    assert f"take {tmp_path} off PYTHONPATH" in said


def test_coming_too_late_is_an_error_and_not_a_slow_start():
    code = "import megatron.core\nfrom megatron_ext.device import init_device\ninit_device()"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    # A release that needs a Triton which is missing cannot even be imported before.
    assert "was imported before init_device()" in result.stderr or "No module named 'triton'" in result.stderr


def test_a_rank_imports_neither_a_compiler_nor_wandb_to_start():
    code = """
import sys
import torch
from megatron_ext.device import FusedAdam, init_device
init_device()
import megatron_ext.training.update
optimizer = FusedAdam([torch.nn.Parameter(torch.zeros(2))])
optimizer.load_state_dict(optimizer.state_dict())
optimizer.zero_grad()
print(sorted({"torch._dynamo", "torch._inductor", "wandb", "tensorboard"} & set(sys.modules)))
import wandb
from torch.utils.tensorboard import SummaryWriter
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---------------------------------------------------------------- a release that imports Triton

ASKS = "def here():\n    try:\n        import triton\n    except ImportError:\n        return False\n    return True\n"
KERNELS = (
    "import triton\nimport triton.language as tl\n"
    "@triton.jit\ndef kernel(x, SIZE: tl.constexpr):\n    pass\n"
    "@triton.autotune(configs=[triton.Config({'A': 1})], key=['n'])\n@triton.jit\ndef tuned(x):\n    pass\n"
)


def test_a_module_may_import_a_triton_that_is_missing_and_no_other_sees_it(tmp_path, monkeypatch):
    if importlib.util.find_spec("triton"):
        return  # it needs no stand-in
    package = tmp_path / "megatron_like"
    package.mkdir()
    for name, text in {"__init__": "", "kernels": KERNELS, "asks": ASKS}.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    finder = absent_triton._Finder("megatron_like.kernels")
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    assert importlib.import_module("megatron_like.kernels").kernel is not None
    assert not importlib.import_module("megatron_like.asks").here() and "triton" not in sys.modules


def test_the_release_that_is_installed_imports_no_triton_where_there_is_none():
    assert importlib.util.find_spec("triton") or not {"triton", "triton.language"} & sys.modules.keys()


@pytest.mark.parametrize("name, noise", device.LOG_NOISE.items())
def test_what_a_user_cannot_act_on_is_not_logged_and_the_rest_of_that_logger_is(name, noise, caplog):
    device.init_device()
    logging.getLogger(name).warning("%s, as it says", noise)
    logging.getLogger(name).warning("something else")
    assert [record.getMessage() for record in caplog.records if record.name == name] == ["something else"]
