"""Torch's FlashAttention, played by a stand-in (tests/gpu_rehearsal/flash_kernel.py), computes the attention of the
documents alone; and what it cannot take never falls to a kernel that writes all scores out."""

import sys
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType

from megatron_ext.layers import flash, sdpa
from megatron_ext.layers.attention import PackedAttention, attention_kernel
from megatron_ext.layers.documents import ContextRank, Spans, packed_documents, rank_after_rank
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rollout import kernels
from tests.gpu_rehearsal.flash_kernel import H100, played
from tests.megatron_ext import tiny
from tests.megatron_ext.rounding import bound
from tests.megatron_ext.test_attention import CPU, KINDS, LENGTHS, cu, naive, qkv

EMPTY_TOO = [0, *LENGTHS, 0, 7, 0]
CLOSE = dict(atol=1e-12, rtol=1e-12)  # float64; sums of a few hundred terms of about 1


@pytest.fixture(params=KINDS)
def kind(request):
    chosen = dict(KINDS[request.param])
    if "sinks" in chosen:
        chosen["sinks"] = chosen["sinks"].double().requires_grad_()
    return chosen


@pytest.fixture
def kernel():
    with played() as playing:
        yield playing


def doubles(total: int, **sizes: int) -> list[torch.Tensor]:
    return [x.detach().double().requires_grad_() for x in qkv(total, **sizes)]


def alone(tensors, lengths, scale: float, kind) -> torch.Tensor:
    """Return the attention [T, heads * d] of each document by itself."""
    parts = [(a, b) for a, b in zip(cu(lengths)[:-1], cu(lengths)[1:]) if b > a]
    return torch.cat([naive(*(x[a:b] for x in tensors), scale, **kind) for a, b in parts])


def core(kind, config, group) -> PackedAttention:
    """Return a PackedAttention of this kind."""
    config.softmax_type = "learnable" if "sinks" in kind else "vanilla"
    config.window_size = (kind["window"] - 1, 0) if "window" in kind else None
    groups = SimpleNamespace(cp=group, tp=SimpleNamespace(size=lambda: 1))
    made = PackedAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=0.3, pg_collection=groups)
    if "sinks" in kind:
        made.softmax_offset = torch.nn.Parameter(kind["sinks"].detach())
    return made


def test_outputs_and_gradients_are_those_of_the_documents_alone(kind, kernel, alone_config):
    """Windows, sinks, shared heads, documents of every length, empty ones too."""
    attention, tensors = core(kind, alone_config, SimpleNamespace(size=lambda: 1)), doubles(sum(EMPTY_TOO))
    weight = torch.randn(sum(EMPTY_TOO), 32, dtype=torch.float64)
    ours = [attention.softmax_offset] if "sinks" in kind else []
    theirs = [kind["sinks"]] if "sinks" in kind else []
    out = attention(*tensors, packed_seq_params=packed_documents(cu(EMPTY_TOO), CPU))
    expected = alone(tensors, EMPTY_TOO, 0.3, kind)
    assert (kernel.forwards, torch.allclose(out, expected, **CLOSE)) == (1, True)
    found = torch.autograd.grad((out * weight).sum(), [*tensors, *ours])
    right = torch.autograd.grad((expected * weight).sum(), [*tensors, *theirs])
    for a, b in zip(found, right):
        assert torch.allclose(a, b, **CLOSE)
    assert kernel.backwards == 1


@pytest.fixture
def alone_config():
    return tiny.QWEN2.spec.transformer_config(tiny.DIMS, ParallelPlan(), torch.float64)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_context_ranks_that_have_all_keys_get_their_parts(kind, size, kernel):
    lengths = [2 * size * pieces for pieces in (1, 3, 0, 2, 1, 20)]
    ends, total = cu(lengths), sum(lengths)
    tensors, weight = doubles(total), torch.randn(total, 32, dtype=torch.float64)
    wanted = [*tensors, *([kind["sinks"]] if "sinks" in kind else [])]
    whole = alone(tensors, lengths, 0.3, kind)
    gathered = torch.from_numpy(rank_after_rank(ends, size))
    sum_of_ranks = 0.0
    for rank in range(size):
        documents = packed_documents(ends, CPU, ContextRank(size, rank))
        spans, picked = documents.chunk_spans(kind.get("window"))
        q, k, v = tensors[0][documents.held], tensors[1][gathered][picked], tensors[2][gathered][picked]
        asked = flash.Asked(spans, 0.3, kind.get("window"))
        out = flash.attention(q, k, v, asked, kind.get("sinks")).flatten(1)
        assert torch.allclose(out, whole[documents.held], **CLOSE)
        sum_of_ranks = sum_of_ranks + (out * weight[documents.held]).sum()
    found = torch.autograd.grad(sum_of_ranks, wanted)
    for a, b in zip(found, torch.autograd.grad((whole * weight).sum(), wanted)):
        assert torch.allclose(a, b, **CLOSE)


def test_a_chunk_gathers_no_key_that_its_window_hides():
    ends, window = cu([4000, 400]), 16
    for rank in range(2):
        documents = packed_documents(ends, CPU, ContextRank(2, rank))
        assert len(documents.chunk_spans(window).picked) <= len(documents.held) + 4 * (window - 1)
        assert documents.chunk_spans(window) is documents.chunk_spans(window)
        assert len(documents.chunk_spans(None).picked) == ends[-1] * 5 // 4  # (2c + 1) / 2c of the row, on every rank


def test_bfloat16_ends_as_near_to_float64_as_the_buckets_do(alone_config):
    kind = dict(window=16, sinks=torch.tensor([-1.0, 0.5, 2.0, 7.0], dtype=torch.float64))
    attention = core(kind, alone_config, SimpleNamespace(size=lambda: 1))
    tensors = [x.detach().bfloat16() for x in qkv(sum(LENGTHS))]
    exact = alone(tensors, LENGTHS, 0.3, kind)
    in_buckets = attention(*tensors, packed_seq_params=packed_documents(cu(LENGTHS), CPU))
    with played(dtypes=flash.HALVES) as kernel:
        found = attention(*tensors, packed_seq_params=packed_documents(cu(LENGTHS), CPU))
    assert kernel.forwards == 1 and found.dtype == torch.bfloat16
    assert (found - in_buckets).abs().max() <= bound(in_buckets, exact)


# ---------------------------------------------------------------- where it cannot be used


@pytest.mark.parametrize(
    "given, why",
    [
        (dict(), ""),
        (dict(dtype=torch.float16, head_size=256, gpu=(8, 0)), ""),
        (dict(gpu=(12, 0)), ""),
        (dict(gpu=None), "this is no NVIDIA GPU"),
        (dict(gpu=(7, 5)), "compute capability 7.5, and it needs 8.0"),
        (dict(dtype=torch.float32), "not float32"),
        (dict(head_size=12), "no heads of 12"),
        (dict(head_size=264), "no heads of 264"),
        (dict(head_size=200), "no heads of 200"),
        (dict(sequences=65536), "65535 sequences at once, not 65536"),
    ],
)
def test_what_the_kernel_cannot_take_is_known_beforehand(given, why):
    found = flash.refusal(**dict(dtype=torch.bfloat16, head_size=128, sequences=9, gpu=H100) | given)
    assert (why in found) if why else (found == "")


def test_which_kernel_computes_is_said():
    assert "in buckets" in attention_kernel(torch.float32, 64, CPU)
    with played(dtypes=flash.HALVES):
        assert attention_kernel(torch.bfloat16, 128, CPU) == "torch's FlashAttention over packed documents"
        said = attention_kernel(torch.float32, 128, CPU)
        assert "efficient_attention" in said and said.endswith("not float32")
    with played(dtypes=flash.HALVES, gpu=(7, 0)):
        with pytest.raises(NotImplementedError, match="bfloat16 on a GPU of compute capability 7.0"):
            attention_kernel(torch.bfloat16, 128, CPU)


@pytest.fixture
def gpu_sdpa():
    """scaled_dot_product_attention as on an H100."""
    with played(dtypes=flash.HALVES) as kernel:
        yield kernel.sdpa


@pytest.mark.parametrize("d", [8, 10])
@pytest.mark.parametrize("positions", [None, torch.tensor([[3, 19], [0, 25]])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_a_fused_kernel_takes_every_attention_of_batches(gpu_sdpa, monkeypatch, dtype, positions, d):
    q, k, v = (torch.stack([x.detach(), -x.detach()]).to(dtype) for x in qkv(30, d=d))
    queries = q if positions is None else q[:, :2]
    for chosen in KINDS.values():
        found = sdpa.attend(queries, k, v, 0.3, positions=positions, **chosen)
        with monkeypatch.context() as on_cpu:
            on_cpu.setattr(flash, "capability", lambda target: None)
            on_cpu.setattr(sdpa, "F", F)
            exact = sdpa.attend(*(x.double() for x in (queries, k, v)), 0.3, positions=positions, **chosen)
            expected = sdpa.attend(queries, k, v, 0.3, positions=positions, **chosen)
        assert found.shape == expected.shape and (found - expected).abs().max() <= bound(expected, exact)
    assert set(gpu_sdpa.backends) == (
        {"flash", "efficient"} if positions is None and dtype == torch.bfloat16 else {"efficient"}
    )


def test_what_no_fused_kernel_takes_is_refused(gpu_sdpa):
    q, k, v = (x.detach().double()[None] for x in qkv(9))
    with pytest.raises(NotImplementedError, match="no fused attention kernel of torch takes torch.float64"):
        sdpa.attend(q, k, v, 0.3)


# ---------------------------------------------------------------- rollouts over blocks


def cached(block: int, tokens: int, dtype: torch.dtype, d: int = 8):
    """Return query, keys, values, table and positions of 4 documents, in whose unused places lies rubbish."""
    generator = torch.Generator().manual_seed(3)
    documents, most, heads, groups = 4, 3, 4, 2

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    keys, values = (random(documents * most + 2, block, groups, d) for _ in range(2))
    table = torch.randperm(documents * most, generator=generator).view(documents, most)
    last = torch.tensor([tokens - 1, block, 2 * block - 1, 3 * block - 1]).clamp(min=tokens - 1)
    positions = last[:, None] - tokens + 1 + torch.arange(tokens)
    return random(documents, tokens, heads, d), keys, values, table, positions


def by_hand(query, keys, values, table, positions, chosen) -> torch.Tensor:
    """Return [n, tokens, heads * d] in float64."""
    outs = []
    for q, blocks, at in zip(query, table, positions):
        k, v = (held[blocks].flatten(0, 1)[: at[-1] + 1] for held in (keys, values))
        outs.append(naive(q, k, v, 0.3, **chosen))
    return torch.stack(outs)


@pytest.mark.parametrize("chosen", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("block, name", [(256, kernels.PAGED_TORCH), (8, kernels.GATHERED_FLASH)])
def test_a_rollouts_tokens_see_their_documents_blocks(kernel, block, name, tokens, chosen):
    query, *cache, positions = cached(block, tokens, torch.float64)
    step = kernels.Step(query.dtype, query.size(3), block, tokens, query.device)
    found = kernels.attend_blocks(query, *cache, positions=positions, scale=0.3, **chosen)
    assert kernels.kernel_name(step) == name
    assert (kernel.forwards, kernel.paged) == (1, int(name == kernels.PAGED_TORCH))
    assert torch.allclose(found.flatten(2), by_hand(query, *cache, positions, chosen), **CLOSE)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, cache_seqlens=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1),
    return_softmax_lse=False,
):  # fmt: skip
    """Compute what the package's function does; test_sources.py compares the rollouts' call with the release."""
    assert causal and return_softmax_lse and k_cache.size(1) % 256 == 0
    assert cache_seqlens.dtype == block_table.dtype == torch.int32
    count = torch.arange(len(q) + 1, dtype=torch.int32)
    spans = Spans(count * q.size(1), cache_seqlens.cumsum(0), q.size(1), k_cache.size(1) * block_table.size(1))
    spans = spans._replace(keys=torch.cat([count[:1], spans.keys.int()]))
    asked = flash.Asked(spans, softmax_scale, None if window_size[0] < 0 else window_size[0] + 1)
    out, log_sum = flash.forward(
        q.flatten(0, 1), k_cache, v_cache, asked, block_table=block_table, seqused_k=cache_seqlens
    )
    return out.view_as(q), log_sum.unflatten(1, q.shape[:2]).transpose(0, 1)


@pytest.mark.parametrize("chosen", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_flash_attn_serves_where_torch_knows_no_blocks(kernel, monkeypatch, tokens, chosen):
    package = ModuleType("flash_attn")
    package.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(flash, "has_block_tables", lambda: False)
    query, *cache, positions = cached(256, tokens, torch.float64)
    step = kernels.Step(query.dtype, query.size(3), 256, tokens, query.device)
    monkeypatch.setattr(kernels, "_has_flash_attn", lambda: False)
    assert kernels.kernel_name(step) == kernels.GATHERED_FLASH
    monkeypatch.setattr(kernels, "_has_flash_attn", lambda: True)
    assert kernels.kernel_name(step) == kernels.PAGED_FLASH
    found = kernels.attend_blocks(query, *cache, positions=positions, scale=0.3, **chosen)
    assert torch.allclose(found.flatten(2), by_hand(query, *cache, positions, chosen), **CLOSE)


def test_the_kernels_of_a_rollout_are_said():
    step = kernels.Step(torch.float32, 64, 32, 1, CPU)
    assert kernels.kernel_names(step) == "numba, in place for decoding; sdpa, gathered for prompts"
    with played(dtypes=flash.HALVES):
        assert kernels.kernel_names(step._replace(target=torch.device("meta"))) == kernels.GATHERED
        assert kernels.kernel_names(step._replace(dtype=torch.bfloat16, block_size=512)) == kernels.PAGED_TORCH


def test_documents_that_end_a_row_are_numbers_of_the_host():
    """Nothing of the spans waits for the GPU: the longest document is known without it."""
    spans = packed_documents(numpy.array([0, 3, 3, 12]), CPU).spans
    assert (spans.longest_queries, spans.longest_keys) == (9, 9) and spans.queries.dtype == torch.int32
