"""The Mamba-2 mixer against the recurrence that defines it, document by document, and over ranks."""

import pytest
import torch

from megatron_ext.layers import mamba
from megatron_ext.layers.mamba import State, convolve, documents_of, scan
from megatron_ext.parallel import ParallelPlan
from tests.megatron_ext import tiny
from tests.megatron_ext.test_attention import peak_bytes

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
    nothing = State(
        x.new_zeros(1, width - 1, channels), torch.full((1, width - 1), mamba.NO_DOCUMENT), x.new_zeros(0)
    )
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
        monkeypatch.setattr(mamba, "SEGMENT", segment)
        y, _ = mixer.advance(rows, documents)
        found.append((y, *torch.autograd.grad((y * y).sum(), leaves)))
    for whole, cut in zip(*found):
        assert torch.allclose(whole, cut, rtol=1e-4, atol=1e-5 * whole.abs().max().item())


def test_memory_is_linear_and_that_of_a_segment_besides_its_inputs(mixer):
    def step(tokens):
        rows, documents = rows_of(mixer, tokens)
        mixer.advance(rows, documents)[0].sum().backward()

    segment = mamba.SEGMENT
    one, four, eight = (peak_bytes(lambda: step(n * segment)) for n in (1, 4, 8))
    width, inner = sum(mixer._sizes()), mixer.heads * mixer.head_dim
    per_token = (eight - four) / (4 * segment)
    assert per_token <= 4 * (2 * width + 3 * inner)  # inputs and outputs with their gradients
    assert one / segment > 4 * per_token  # what would be kept of every token


def test_decays_and_steps_stay_fp32_in_a_bf16_model(mixer):
    exact = {name: getattr(mixer, name).detach().clone() for name in mixer.EXACT}
    mixer.bfloat16()
    assert mixer.conv1d.weight.dtype == mixer.in_proj.weight.dtype == torch.bfloat16
    for name, value in exact.items():
        assert getattr(mixer, name).dtype == torch.float32 and torch.equal(getattr(mixer, name), value)
        assert getattr(mixer, name).tensor_model_parallel
