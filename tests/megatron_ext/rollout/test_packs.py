"""The layouts of weights that a rollout on CPU makes: they are the weights, at every moment, and gone with it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megatron_ext import cpu_linear
from megatron_ext.layers import cpu_kernels
from megatron_ext.layers.attention import _Turn
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rollout.engine import Engine
from megatron_ext.rollout.settings import Sampling
from tests.megatron_ext import tiny
from tests.megatron_ext.rollout.test_engine import FAMILIES, SMALL, STOP, full_logprobs, requests
from tests.megatron_ext.rounding import bound

GREEDY = Sampling(temperature=0, max_tokens=9)


@pytest.fixture(params=FAMILIES)
def model(request, alone, tmp_path):
    of = FAMILIES[request.param]
    return tiny.model(tiny.hf_folder(tmp_path / "hf", of), of, ParallelPlan())


def change(model: torch.nn.Module, by: float) -> None:
    """Update the weights as an optimizer does, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))


def test_a_rollout_has_the_weights_of_its_moment_and_leaves_no_packs(model):
    engine = Engine(model, SMALL, seed=7, stop_ids={STOP})
    for by in (0.0, 0.05, 0.05):
        change(model, by)
        packs = set()
        for sequence in engine.generate(requests(1), GREEDY):
            packs.add(len(engine.runner.packs))
            logprobs, likeliest = full_logprobs(model, sequence)
            assert sequence.completion == likeliest.tolist()
            assert torch.allclose(torch.tensor(sequence.model_logprobs), logprobs, atol=1e-5)
        assert min(packs) > 0 and len(engine.runner.packs) == 0


def test_a_rollout_that_is_left_leaves_no_packs(model):
    engine = Engine(model, SMALL, seed=7, stop_ids={STOP})
    rollout = engine.generate(requests(1), GREEDY)
    next(rollout)
    assert len(engine.runner.packs) > 0
    rollout.close()
    assert len(engine.runner.packs) == 0


def test_a_rollout_takes_the_short_way_through_each_layer_and_training_does_not(alone, tmp_path, monkeypatch):
    """Of all arguments that this megatron-core gives its layers in a rollout, none is one that takes its own way."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    of = FAMILIES["qwen2"]
    trained = tiny.model(tiny.hf_folder(tmp_path / "hf", of), of, ParallelPlan())
    engine = Engine(trained, SMALL, seed=7, stop_ids={STOP})
    entered = []
    theirs = TransformerLayer._forward_attention
    monkeypatch.setattr(
        TransformerLayer, "_forward_attention", lambda *args, **named: entered.append(1) or theirs(*args, **named)
    )
    (sequence, *_) = engine.generate(requests(1), GREEDY)
    assert not entered
    full_logprobs(trained, sequence)
    assert len(entered) == of.layers


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_hook_on_any_part_of_a_layer_is_heard_in_a_rollout(kind, alone, tmp_path):
    """And a function in place of a module's own, in the layer's short way too: whoever hung it changes the model."""
    of = tiny.dims(kind=kind)
    model = tiny.model(tiny.hf_folder(tmp_path / "hf", of), of, ParallelPlan())
    engine, heard = Engine(model, SMALL, seed=7, stop_ids={STOP}), set()
    parts = {name: part for name, part in model.decoder.layers[0].named_modules() if "cross_att" not in name}
    assert {"mlp", "mlp.linear_fc1", "self_attention.linear_qkv", "pre_mlp_layernorm"} < set(parts)
    assert kind == "qwen2" or "self_attention.q_layernorm" in parts
    for name, part in parts.items():
        for hang in (part.register_forward_hook, part.register_forward_pre_hook):
            hook = hang(lambda *_, name=name, hang=hang: heard.add((name, hang.__name__)))
            list(engine.generate(requests(1)[:1], replace(GREEDY, max_tokens=2)))
            hook.remove()
        own = part.forward
        part.forward = lambda *args, name=name, own=own, **named: heard.add((name, "own")) or own(*args, **named)
        list(engine.generate(requests(1)[:1], replace(GREEDY, max_tokens=2)))
        del part.forward
    missed = {name for name in parts if sum(name == found for found, _ in heard) < 3}
    assert not missed


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply by megatron-core's function, which asks as its layers do."""
    from megatron.core.tensor_parallel import layers

    return layers.linear_with_frozen_weight(
        x, weight, bias, gradient_accumulation_fusion=False, allreduce_dgrad=False, sequence_parallel=False,
        tp_group=None,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 2, 17, 70])
def test_a_pack_multiplies_as_its_weight_does(alone, dtype, rows):
    generator = torch.Generator().manual_seed(rows)
    x, bias = torch.randn(rows, 1, 200, generator=generator).to(dtype), torch.randn(72, generator=generator).to(dtype)
    weight = torch.nn.Parameter(torch.randn(72, 200, generator=generator).to(dtype))
    packs = cpu_linear.Packs()
    with torch.no_grad(), cpu_linear.using(packs):
        found = linear(x, weight, bias)
    with torch.no_grad():
        plain = linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert found.shape == plain.shape and found.dtype == dtype
    assert not rows or (found.double() - exact).abs().max() <= bound(plain, exact)
    assert len(packs) == (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def test_a_weight_that_changes_in_mid_rollout_is_packed_again(alone):
    x, weight, packs = torch.randn(3, 40), torch.nn.Parameter(torch.randn(24, 40)), cpu_linear.Packs()
    with torch.no_grad(), cpu_linear.using(packs):
        linear(x, weight)
        for write in (lambda: weight.mul_(2), lambda: setattr(weight, "data", torch.randn(24, 40))):
            write()
            assert torch.allclose(linear(x, weight), F.linear(x, weight), atol=1e-4)
    assert len(packs) == 1


def test_a_weight_made_for_one_product_is_not_packed_and_training_never_sees_a_pack(alone):
    x, weight, packs = torch.randn(3, 40, requires_grad=True), torch.randn(24, 40), cpu_linear.Packs()
    with torch.no_grad(), cpu_linear.using(packs):
        linear(x, weight)
    assert len(packs) == 0
    linear(x, torch.nn.Parameter(weight)).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("shape", [(5, 1, 64), (3, 1, 4, 24), (1, 1, 7)])
def test_norms_of_a_rollout_are_those_of_training(shape):
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    exact = F.rms_norm(x.double(), shape[-1:], weight.double(), 1e-6)
    found = cpu_kernels.rms_norm(x.transpose(0, 1), weight, 1e-6).transpose(0, 1)
    assert (found.double() - exact).abs().max() <= bound(F.rms_norm(x, shape[-1:], weight, 1e-6), exact)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("share, groups, d, half", [(2, 4, 64, 32), (1, 1, 7, 2), (3, 2, 24, 12), (5, 1, 8, 0)])
def test_heads_of_a_rollout_are_split_normalised_and_turned_as_in_training(share, groups, d, half, normed):
    tokens = 5
    mixed, cos, sin = (
        torch.randn(shape) for shape in ((tokens, groups, share + 2, d), (tokens, 1, half), (tokens, 1, half))
    )
    norms = [(torch.randn(d), 1e-6), (torch.randn(d), 1e-2)] if normed else [(None, 0.0), (None, 0.0)]

    def plain(dtype: torch.dtype) -> list[torch.Tensor]:
        query, key, value = mixed.to(dtype).split([share, 1, 1], 2)
        parts = []
        for part, (weight, eps) in zip((query.reshape(tokens, -1, d), key.reshape(tokens, -1, d)), norms):
            part = part if weight is None else F.rms_norm(part, (d,), weight.to(dtype), eps)
            parts.append(_Turn.turn(part, cos.to(dtype), sin.to(dtype), 1))
        return [*parts, value.reshape(tokens, -1, d)]

    for found, near, exact in zip(cpu_kernels.heads(mixed, cos, sin, norms), plain(torch.float32), plain(torch.double)):
        assert found.shape == exact.shape and (found.double() - exact).abs().max() <= bound(near, exact)


def test_swiglu_of_a_rollout_is_that_of_training():
    gate = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, -87.4, 88.9])])
    x = torch.stack([torch.cat([gate, torch.randn(len(gate))]) for _ in range(3)]).unsqueeze(1)
    a, b = x.double().chunk(2, -1)
    exact = F.silu(a) * b
    found = cpu_kernels.swiglu(x)
    # exp is within 2^-23 of itself, and gives 0 below the least normal float32; a sum, a quotient and two products.
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-20 + (a * b).abs() * 2**-126).all()
    odd = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0, 1.0, 1.0, 1.0, torch.nan]])
    assert torch.equal(cpu_kernels.swiglu(odd).isfinite(), (F.silu(odd[:, :4]) * odd[:, 4:]).isfinite())
