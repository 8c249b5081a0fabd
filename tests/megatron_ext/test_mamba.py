"""The Mamba-2 mixer against the recurrence that defines it, and against megatron-core's own.

Over ranks it is tested in the table of test_certify.py.
"""

import copy
import importlib
import sys
import types
from functools import partial

import numpy
import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_ext.layers import mamba
from megatron_ext.layers.documents import packed_documents
from megatron_ext.layers.mamba import documents_of
from megatron_ext.layers.mamba_scan import State, convolve, scan
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.weights import staging
from tests.megatron_ext import tiny
from tests.megatron_ext.test_attention import peak_bytes, peaks

CASES = {  # tokens, heads, groups, p, n, chunk size
    "heads share groups": (37, 6, 3, 4, 5, 8),
    "one group, odd heads": (50, 3, 1, 5, 4, 16),
    "one chunk, longer than the row": (7, 4, 4, 2, 3, 128),
    "whole chunks": (64, 4, 2, 3, 3, 16),
}


def recurrence(x, dt, decay, b, c, documents, state, before):
    """The definition, token by token."""
    each = x.size(2) // b.size(2)
    b, c = (t.repeat_interleave(each, dim=2) for t in (b, c))
    ys = []
    for t in range(x.size(1)):
        state = state * (documents[:, t] == before)[:, None, None, None]
        fade = torch.exp(dt[:, t] * decay)[..., None, None]
        state = fade * state + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        ys.append((state * c[:, t, :, None]).sum(-1))
        before = documents[:, t]
    return torch.stack(ys, dim=1), state


def arguments(tokens, heads, groups, p, n, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = (
        random(2, tokens, heads, p),
        random(2, tokens, heads).abs(),
        -random(heads).abs(),
        random(2, tokens, groups, n),
        random(2, tokens, groups, n),
        random(2, heads, p, n),
    )
    for tensor in tensors:
        tensor.requires_grad_()
    documents = torch.randint(0, 5, (2, tokens), generator=generator).sort().values
    return tensors, documents, torch.tensor([0, mamba.NO_DOCUMENT])  # row 0 goes on in its document, row 1 does not


@pytest.mark.parametrize("case", CASES)
def test_the_scan_and_its_gradients_are_those_of_the_recurrence(case):
    *sizes, chunk = CASES[case]
    (*inputs, state), documents, before = arguments(*sizes)
    found = scan(*inputs, documents, state, before, chunk)
    expected = recurrence(*inputs, documents, state, before)
    weights = [torch.randn_like(x) for x in expected]
    grads = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(result, weights)), [*inputs, state])
        for result in (found, expected)
    ]
    for ours, theirs in zip((*found, *grads[0]), (*expected, *grads[1])):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [2, 4])
def test_the_convolution_is_that_of_each_document_alone(width):
    lengths, channels = [1, 2, 9, 3], 5
    shapes = ((1, 15, channels), (channels, width), (channels,))
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    documents = torch.arange(4).repeat_interleave(torch.tensor(lengths))[None]
    nothing = State(x.new_zeros(1, width - 1, channels), torch.full((1, width - 1), mamba.NO_DOCUMENT), x.new_zeros(0))
    y, inputs, origins = convolve(x, documents, nothing, weight, bias)
    expected = []
    for part in x.split(lengths, dim=1):
        padded = torch.nn.functional.pad(part.mT, (width - 1, 0))
        expected.append(torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=channels).mT)
    assert torch.allclose(y, torch.cat(expected, dim=1), atol=1e-12)
    assert torch.equal(inputs, x[:, -(width - 1) :]) and torch.equal(origins, documents[:, -(width - 1) :])


def test_documents_end_at_the_padded_boundaries_and_what_follows_is_one_more():
    from megatron.core.packed_seq_params import PackedSeqParams

    def packed(**boundaries):
        tensors = {name: torch.tensor(value, dtype=torch.int32) for name, value in boundaries.items()}
        return PackedSeqParams(qkv_format="thd", **tensors)

    ends = packed(cu_seqlens_q=[0, 1, 3])
    assert documents_of(ends, 5, torch.device("cpu")).tolist() == [1, 2, 2, 3, 3]
    padded = packed(cu_seqlens_q=[0, 1, 3], cu_seqlens_q_padded=[0, 2, 4])
    assert documents_of(padded, 5, torch.device("cpu")).tolist() == [1, 1, 2, 2, 3]
    assert documents_of(None, 3, torch.device("cpu")).tolist() == [0, 0, 0]


# ---------------------------------------------------------------- the mixer


@pytest.fixture
def mixer(alone, tmp_path):
    model = tiny.model(tiny.hf_folder(tmp_path / "hf", tiny.NEMOTRON_H_DIMS), tiny.NEMOTRON_H_DIMS, ParallelPlan())
    return model.decoder.layers[0].mixer


def rows_of(mixer, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """in_proj's output for one row, and its documents."""
    generator = torch.Generator().manual_seed(tokens)
    rows = torch.randn(1, tokens, sum(mixer._sizes()), generator=generator).requires_grad_()
    return rows, torch.randint(0, 4, (1, tokens), generator=generator).sort().values


@pytest.mark.parametrize("cuts", [(1,) * 30, (7, 1, 22), (29, 1)])
def test_a_row_goes_on_from_its_state_wherever_it_was_cut(mixer, cuts):
    rows, documents = rows_of(mixer, 30)
    whole, last = mixer.advance(rows, documents)
    state, outs = None, []
    for part, origins in zip(rows.split(cuts, dim=1), documents.split(cuts, dim=1)):
        out, state = mixer.advance(part, origins, state)
        outs.append(out)
    assert torch.allclose(torch.cat(outs, dim=1), whole, atol=1e-6)
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(state, last))


def test_segments_recomputed_in_backward_give_the_same_gradients(mixer, monkeypatch):
    rows, documents = rows_of(mixer, 100)
    leaves = [rows, mixer.A_log, mixer.D, mixer.dt_bias, *mixer.conv1d.parameters()]
    found = []
    for segment in (100, 24):
        monkeypatch.setitem(mamba.SEGMENTS, "torch", segment)
        y, _ = mixer.advance(rows, documents)
        found.append((y, *torch.autograd.grad((y * y).sum(), leaves)))
    for whole, cut in zip(*found):
        assert torch.allclose(whole, cut, rtol=1e-4, atol=1e-5 * whole.abs().max().item())


def test_memory_is_linear_and_that_of_a_segment_besides_its_inputs(mixer):
    def step(tokens):
        rows, documents = rows_of(mixer, tokens)
        mixer.advance(rows, documents)[0].sum().backward()

    segment = mamba.SEGMENTS["torch"]
    one, four, eight = (peak_bytes(partial(step, n * segment)) for n in (1, 4, 8))
    width, inner = sum(mixer._sizes()), mixer.heads * mixer.head_dim
    per_token = (eight - four) / (4 * segment)
    assert per_token <= 4 * (2 * width + 3 * inner)  # inputs and outputs with their gradients
    assert one / segment > 4 * per_token  # what would be kept of every token


def test_a_segment_leaves_no_block_behind(mixer, monkeypatch):
    """Blocks kept between segments' temporaries broke up malloc's heap: 2.4 times the memory at 262,144 tokens."""
    monkeypatch.setitem(mamba.SEGMENTS, "torch", 32)

    def blocks(segments):
        rows, documents = rows_of(mixer, 32 * segments)
        mixer.advance(rows, documents)[0].sum().backward()  # the parameters' gradients are there
        return peaks(lambda: mixer.advance(rows, documents)[0].sum().backward())[1]

    assert blocks(3) == blocks(12)


def test_decays_and_steps_stay_fp32_in_a_bf16_model(mixer):
    exact = {name: getattr(mixer, name).detach().clone() for name in mixer.EXACT}
    mixer.bfloat16()
    assert mixer.conv1d.weight.dtype == mixer.in_proj.weight.dtype == torch.bfloat16
    for name, value in exact.items():
        assert getattr(mixer, name).dtype == torch.float32 and torch.equal(getattr(mixer, name), value)
        assert getattr(mixer, name).tensor_model_parallel


# ---------------------------------------------------------------- megatron-core's own mixer

TRITON = "megatron.core.inference.contexts.attention_context.triton"
ABSENT = {  # what mamba_mixer.py imports and a machine without Triton and mamba-ssm lacks, by module
    f"{TRITON}.tensor_ops": ("tensor_get_slice_after", "tensor_masked_update", "tensor_merge"),
    "mamba_ssm": (),
    "mamba_ssm.ops": (),
    "mamba_ssm.ops.triton": (),
    "mamba_ssm.ops.triton.selective_state_update": ("selective_state_update",),
    "mamba_ssm.ops.triton.layernorm_gated": ("RMSNorm",),
    "mamba_ssm.ops.triton.ssd_combined": ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"),
}


class StandInNorm(torch.nn.Module):
    """mamba_ssm.ops.triton.layernorm_gated.RMSNorm, of what the gate has been applied to."""

    def __init__(self, size, eps, group_size, norm_before_gate, device, dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=dtype))
        self.eps, self.group_size = eps, group_size

    def forward(self, x):
        grouped = x.unflatten(-1, (-1, self.group_size))
        return (grouped * (grouped.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()).flatten(-2) * self.weight


def stand_in_kernel(zxbcdt, weight, bias, dt_bias, decay, D, ngroups, headdim, seq_idx, **_):  # noqa: N803
    """mamba_ssm's fused kernel by its definition: the convolution of each document, then the recurrence."""
    heads = decay.numel()
    inner, states = heads * headdim, (weight.size(0) - heads * headdim) // 2
    z, xbc, dt = zxbcdt.split([inner, inner + 2 * states, heads], dim=-1)
    lengths = seq_idx[0].unique_consecutive(return_counts=True)[1].tolist()
    padded = [torch.nn.functional.pad(part.mT, (weight.size(1) - 1, 0)) for part in xbc.split(lengths, dim=1)]
    conv1d, silu = torch.nn.functional.conv1d, torch.nn.functional.silu
    xbc = silu(torch.cat([conv1d(part, weight[:, None], bias, groups=weight.size(0)).mT for part in padded], dim=1))
    x, b, c = xbc.split([inner, states, states], dim=-1)
    x, b, c = x.unflatten(-1, (heads, -1)), b.unflatten(-1, (ngroups, -1)), c.unflatten(-1, (ngroups, -1))
    steps = torch.nn.functional.softplus(dt + dt_bias)
    state, before = x.new_zeros(1, heads, headdim, b.size(-1)), torch.tensor([mamba.NO_DOCUMENT])
    y, _ = recurrence(x, steps, decay, b, c, seq_idx, state, before)
    return (y + D[:, None] * x).flatten(-2) * silu(z)


@pytest.fixture
def stock(mixer, monkeypatch):
    """mcore's MambaMixer, unchanged, over stand-ins for kernels, with the weights of `mixer`."""
    modules = {name: types.ModuleType(name) for name in ABSENT}
    for name, functions in ABSENT.items():
        for function in functions:
            setattr(modules[name], function, None)
        monkeypatch.setitem(sys.modules, name, modules[name])
    modules["mamba_ssm.ops.triton.layernorm_gated"].RMSNorm = StandInNorm
    modules["mamba_ssm.ops.triton.ssd_combined"].mamba_split_conv1d_scan_combined = stand_in_kernel
    name = "megatron.core.ssm.mamba_mixer"
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, module)  # forgotten afterwards
    monkeypatch.setattr(module, "_check_mamba_sequence_packing_support", lambda **_: (True, None))
    config = copy.copy(mixer.config)
    submodules = module.MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    found = module.MambaMixer(config, submodules, config.hidden_size, layer_number=1, pg_collection=groups)
    found.load_state_dict({stock_name(found, name): value for name, value in mixer.state_dict().items()}, strict=True)
    return found


def stock_name(stock, name):
    """Return what megatron-core calls a parameter: from 0.19 on its convolution has no module. Checkpoints have one."""
    return name.replace("conv1d.", "conv1d_") if hasattr(stock, "conv1d_weight") else name


def test_the_mixer_is_megatron_cores(mixer, stock):
    """Order of in_proj's rows, gate before norm, groups, packed boundaries: the same output and gradients."""
    documents = packed_documents(numpy.array([0, 1, 40, 44, 150]), torch.device("cpu"))
    x = torch.randn(150, 1, mixer.config.hidden_size, requires_grad=True)
    names = [name for name, _ in mixer.named_parameters()]
    assert {stock_name(stock, name) for name in names} == {name for name, _ in stock.named_parameters()}
    results = []
    for one, called in ((mixer, names), (stock, [stock_name(stock, name) for name in names])):
        y, _ = one(x, packed_seq_params=documents)
        results.append((y, *torch.autograd.grad((y * y).sum(), [x, *map(one.get_parameter, called)])))
    for ours, theirs in zip(*results):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_the_checkpoint_is_megatron_cores(mixer, stock):
    def stored(module):
        state = module.sharded_state_dict("mixer.", metadata=staging.metadata())
        apply_factories(state)
        shards = [shard for shard in nested_values(state) if isinstance(shard, ShardedTensor)]
        return {shard.key: (shard.global_shape, shard.global_offset, shard.dtype) for shard in shards}

    found = stored(mixer)
    assert found == stored(stock) and "mixer.in_proj.weight.dt" in found and "mixer.conv1d.bias.B" in found
