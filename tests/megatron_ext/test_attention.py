"""A document of a pack sees only itself, and a pack gives what its documents give one by one (whole models of every
family: test_families.py)."""

import numpy
import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_ext.layers import attention, loss_head, sdpa
from megatron_ext.layers.attention import PackedSelfAttention
from megatron_ext.layers.buckets import packed_attention
from megatron_ext.layers.documents import SHORTEST_BUCKET, ContextRank, DocumentLayout, packed_documents, zigzag
from megatron_ext.models.registry import unwrap
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.training.rows import MicroBatch, micro_batch
from megatron_ext.training.update import losses_of
from tests.megatron_ext import tiny

CPU = torch.device("cpu")
LENGTHS = [3, 16, 17, 1, 40, 2, 33, 64, 65]


def cu(lengths) -> numpy.ndarray:
    return numpy.concatenate([[0], numpy.cumsum(lengths)])


@pytest.mark.parametrize("seed", range(20))
def test_a_layout_gives_every_token_its_own_row_in_its_documents_slot(seed):
    random = numpy.random.default_rng(seed)
    lengths = random.integers(0, 70, random.integers(1, 30)) * (60 if seed % 4 == 0 else 1)  # long ones too
    lengths[random.integers(len(lengths))] = 5  # not all empty
    layout = DocumentLayout.of(cu(lengths), CPU)
    slots, seen = layout.slots.numpy(), set()
    assert len(set(slots.tolist())) == lengths.sum()
    assert sum(b.documents * b.length for b in layout.buckets) == layout.rows
    for start, length in zip(cu(lengths)[:-1], lengths):
        if length == 0:
            continue
        mine = slots[start : start + length]
        assert (numpy.diff(mine) == 1).all()
        bucket = next(b for b in layout.buckets if b.start <= mine[0] < b.start + b.documents * b.length)
        assert (mine[0] - bucket.start) % bucket.length == 0 and mine[0] not in seen
        assert bucket.length / 2 < length <= bucket.length or bucket.length == SHORTEST_BUCKET
        seen.add(mine[0])


def qkv(total: int, heads: int = 4, groups: int = 2, d: int = 8, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(total, n, d, generator=generator, requires_grad=True) for n in (heads, groups, groups)]


def naive(q, k, v, scale, window=None, sinks=None):
    """One document, fp64, every score written out: [n, heads, d] -> [n, heads * d]."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
    scores = scores.masked_fill((distance < 0) | (distance >= (window or len(k))), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(-1, len(q), 1)], dim=-1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(k)], v).flatten(1)


SINKS = torch.tensor([-1.0, 0.5, 2.0, 7.0])
KINDS = {
    "full": {},
    "sinks": dict(sinks=SINKS),
    "window of 1": dict(window=1),
    "window of 5": dict(window=5),
    "window of 16 and sinks": dict(window=16, sinks=SINKS),
    "window of 40 and sinks": dict(window=40, sinks=SINKS),
    "window longer than documents": dict(window=200, sinks=SINKS),
}


@pytest.fixture(params=KINDS)
def kind(request):
    chosen = dict(KINDS[request.param])
    if "sinks" in chosen:
        chosen["sinks"] = chosen["sinks"].clone().requires_grad_()
    return chosen


def test_packed_attention_and_its_gradients_are_those_of_the_documents_alone(kind):
    layout = DocumentLayout.of(cu(LENGTHS), CPU)
    tensors = qkv(sum(LENGTHS))
    weight = torch.randn(sum(LENGTHS), 32)
    wanted = [*tensors, *(kind[name] for name in ("sinks",) if name in kind)]
    out = packed_attention(*tensors, layout, 0.3, **kind)
    grads = torch.autograd.grad((out * weight).sum(), wanted)
    parts = zip(cu(LENGTHS)[:-1], cu(LENGTHS)[1:])
    alone = torch.cat([naive(*(x[a:b] for x in tensors), 0.3, **kind) for a, b in parts])
    expected = torch.autograd.grad((alone * weight).sum(), wanted)
    assert torch.allclose(out.double(), alone, atol=1e-5)
    for ours, theirs in zip(grads, expected):
        assert torch.allclose(ours.double(), theirs.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("queries", [1, 7, 90])
def test_the_last_queries_of_a_longer_cache_get_what_the_whole_sequence_gives_them(kind, queries, monkeypatch):
    monkeypatch.setattr(sdpa, "QUERY_BLOCK", 40)
    q, k, v = (x.detach() for x in qkv(90))
    out = sdpa.attend(q[None, -queries:], k[None], v[None], 0.3, **kind)
    assert torch.allclose(out[0].flatten(1).double(), naive(q[-queries:], k, v, 0.3, **kind), atol=1e-5)


@pytest.mark.parametrize("victim", [2, 8])
def test_other_documents_cannot_reach_the_kernel_by_a_single_bit(kind, victim):
    layout, tensors = DocumentLayout.of(cu(LENGTHS), CPU), qkv(sum(LENGTHS))
    a, b = cu(LENGTHS)[victim : victim + 2]
    out = packed_attention(*tensors, layout, 0.3, **kind)
    for grad in torch.autograd.grad(out[a:b].sum(), tensors):
        assert grad[:a].abs().sum() == 0 and grad[b:].abs().sum() == 0
    changed = [torch.cat([x[:a] * 1e3 - 7, x[a:b], -x[b:]]) for x in tensors]
    assert torch.equal(packed_attention(*changed, layout, 0.3, **kind)[a:b], out[a:b])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_context_ranks_share_every_document_and_its_causal_work(size):
    ends = cu([2 * size * pieces for pieces in (1, 3, 0, 40)])
    held = [zigzag(ends, ContextRank(size, rank)) for rank in range(size)]
    assert sorted(numpy.concatenate(held).tolist()) == list(range(ends[-1]))
    for a, b in zip(ends[:-1], ends[1:]):
        work = [int(tokens[(a <= tokens) & (tokens < b)].sum()) for tokens in held]  # a token sees those before it
        assert len(set(work)) == 1
    with pytest.raises(ValueError, match=f"a document of {2 * size + 1} tokens does not divide into the {2 * size} "):
        zigzag(cu([2 * size + 1]), ContextRank(size, 0))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_context_rank_gets_its_part_of_the_attention_of_the_whole_row(kind, size, monkeypatch):
    monkeypatch.setattr(sdpa, "QUERY_BLOCK", 40)
    ends = cu([2 * size * pieces for pieces in (1, 3, 2, 1, 20)])
    tensors, weight = qkv(ends[-1]), torch.randn(ends[-1], 32)
    whole = packed_attention(*tensors, DocumentLayout.of(ends, CPU), 0.3, **kind)
    expected = torch.autograd.grad((whole * weight).sum(), tensors)
    gathered = numpy.concatenate([zigzag(ends, ContextRank(size, rank)) for rank in range(size)])
    total = 0.0
    for rank in range(size):
        documents = packed_documents(ends, CPU, ContextRank(size, rank))
        q, k, v = tensors[0][documents.held], tensors[1][gathered], tensors[2][gathered]
        out = packed_attention(q, k, v, documents.layout, 0.3, share=documents.share, **kind)
        assert torch.allclose(out, whole[documents.held], atol=1e-5)
        total = total + (out * weight[documents.held]).sum()
    for ours, theirs in zip(torch.autograd.grad(total, tensors), expected):
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)


class Rank:
    """As much of a process group of context ranks as megatron-core asks for."""

    def __init__(self, size: int, rank: int):
        self.size, self.rank = lambda: size, lambda: rank


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("pieces", [(3, 1, 5, 2), (7,), (2, 2)])
def test_a_context_rank_turns_each_token_by_its_place_in_its_own_document(size, pieces):
    """By our way through a row and by megatron-core's, which its PR 5243 mended for tables as long as the row.

    We hand it a table as long as the longest document, where each document begins at 0 in every release.
    """
    ends = cu([8 * piece for piece in pieces])
    x = torch.randn(ends[-1], 3, 16, generator=torch.Generator().manual_seed(0))
    place = torch.arange(ends[-1]) - torch.from_numpy(numpy.repeat(ends[:-1], numpy.diff(ends)))
    angles = place[:, None].double() / 10000 ** (torch.arange(8) / 8)  # Su et al., arXiv 2104.09864
    turned = torch.view_as_complex(torch.stack(x.double().chunk(2, dim=-1), dim=-1)) * torch.exp(1j * angles[:, None])
    expected = torch.cat([turned.real, turned.imag], dim=-1).float()
    for rank in range(size):
        row = packed_documents(ends, CPU, ContextRank(size, rank))
        assert row.positions.tolist() == place[row.held].tolist()
        table = torch.arange(row.max_seqlen_q)[:, None].double() / 10000 ** (torch.arange(8) / 8)
        table = torch.cat([table, table], dim=-1).float()[:, None, None]  # [longest, 1, 1, d], as RotaryEmbedding gives
        ours = attention._Turn.apply(x[row.held], *row.turns(table, torch.float32))
        theirs = _apply_rotary_pos_emb_thd(x[row.held], row.cu_seqlens_q, table, cp_group=Rank(size, rank))
        for found in (ours, theirs):  # an angle of 56 in fp32 errs by 2^-19
            assert torch.allclose(found, expected[row.held], atol=2**-16)


def peaks(function) -> tuple[int, int]:
    """The most memory that tensors made by `function` held at once, in bytes, and the most blocks."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    held = numpy.zeros(2, numpy.int64)
    most = held.copy()
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes(), 1 if event.nbytes() > 0 else -1
            most = numpy.maximum(most, held)
    return tuple(most.tolist())


def peak_bytes(function) -> int:
    return peaks(function)[0]


@pytest.mark.parametrize("chosen", [dict(), dict(window=32, sinks=SINKS), dict(sinks=SINKS)])
def test_memory_is_linear_in_the_length_of_a_document(chosen):
    def step(length):
        q, k, v = qkv(length, d=8)
        packed_attention(q, k, v, DocumentLayout.of(cu([length]), CPU), 0.3, **chosen).sum().backward()

    short, long = peak_bytes(lambda: step(1024)), peak_bytes(lambda: step(4096))
    assert 0 < long < 4.2 * short


@pytest.mark.soak
@pytest.mark.parametrize("chosen", [dict(), dict(window=128, sinks=SINKS[:1]), dict(sinks=SINKS[:1])])
def test_one_document_of_262144_tokens_passes_in_a_few_copies_of_itself(chosen):
    length = 262144
    q, k, v = (x.detach() for x in qkv(length, heads=1, groups=1))
    layout = DocumentLayout.of(cu([length]), CPU)
    assert peak_bytes(lambda: packed_attention(q, k, v, layout, 0.3, **chosen)) < 40 * q.nbytes


def forward(model, pack, ids=None) -> tuple[torch.Tensor, MicroBatch]:
    """Logits [T, V] at every position of a pack."""
    batch = micro_batch([pack])
    wanted = torch.arange(batch.ids.numel())
    ids = batch.ids if ids is None else ids
    return loss_head.position_logits(model, ids, batch.positions, batch.documents, wanted), batch


@pytest.fixture
def model(alone, tmp_path):
    return tiny.model(tiny.hf_folder(tmp_path / "hf"), tiny.DIMS, ParallelPlan())


def test_the_short_way_through_a_row_is_megatron_cores_way(model):
    pack = tiny.pack(LENGTHS, seed=6)
    short, _ = forward(model, pack)
    for layer in unwrap(model).decoder.layers:
        assert type(layer.self_attention) is PackedSelfAttention
        layer.self_attention.checkpoint_core_attention = True  # recomputation takes mcore's own forward
    long, _ = forward(model, pack)
    assert torch.allclose(short, long, atol=1e-5)


def test_a_row_without_a_layout_and_a_plain_batch_work_too(model):
    pack = tiny.pack([20], seed=7)
    packed, batch = forward(model, pack)
    plain = model(batch.ids, batch.positions, None)  # [1, T, V]
    assert torch.allclose(plain[0], packed, atol=1e-5)
    documents = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.from_numpy(pack.cu_seqlens))
    q, k, v = qkv(20)
    core = unwrap(model).decoder.layers[0].self_attention.core_attention
    expected = packed_attention(q, k, v, DocumentLayout.of(pack.cu_seqlens, CPU), core.scale)
    assert torch.equal(core(q, k, v, packed_seq_params=documents), expected)


def test_the_loss_head_computes_supervised_positions_only_and_the_same_loss(model):
    pack = tiny.pack(LENGTHS, seed=8)
    logits, batch = forward(model, pack)
    losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(pack.labels), reduction="none")
    mask = torch.from_numpy(pack.loss_mask)
    found = losses_of(model, batch)
    assert len(found) == int(mask.sum()) == batch.labels.numel() < batch.ids.numel()
    assert found.sum().item() == pytest.approx((losses * mask).sum().item(), rel=1e-6)


def test_joined_packs_are_one_row_of_the_same_documents(model):
    packs = [tiny.pack([5, 20], 1), tiny.pack([30, 2, 8], 2)]
    apart = torch.cat([losses_of(model, micro_batch([pack])) for pack in packs])
    assert torch.allclose(losses_of(model, micro_batch(packs)), apart, rtol=1e-6)


def test_what_the_attention_cannot_do_is_refused_at_build_time(alone):
    from megatron.core.transformer.enums import AttnMaskType

    config = tiny.QWEN2.spec.transformer_config(tiny.DIMS, ParallelPlan(), torch.float32)
    config.window_size = (8, 3)
    with pytest.raises(NotImplementedError, match="no window_size = \\(8, 3\\)"):
        attention.PackedAttention(config, 1, AttnMaskType.causal, "self")
