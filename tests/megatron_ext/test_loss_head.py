"""The chunked loss head gives what the logits written out give: losses, entropies and all gradients."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_ext.layers import loss_head
from megatron_ext.layers.loss_head import Targets, capped, token_losses
from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan, padded_rows
from megatron_ext.training.rows import micro_batch
from megatron_ext.training.update import losses_of
from tests.megatron_ext import tiny
from tests.megatron_ext.test_attention import peak_bytes

VOCABULARY, HIDDEN = 301, 24


def plain_head(hidden, weight, labels, rows, cap=0.0, temperature=1.0):
    """All logits at once: [2, n], the losses and the entropies."""
    logits = capped(hidden @ weight.t(), cap)[:, :rows].float() / temperature
    log_p = logits.log_softmax(1)
    return torch.stack([F.nll_loss(log_p, labels, reduction="none"), -(log_p.exp() * log_p).sum(1)])


def example(n: int, padded: int = VOCABULARY, dtype: torch.dtype = torch.float32):
    """hidden [n, h], weight [padded, h], labels [n] and a gradient [2, n] that differs by token."""
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(padded, HIDDEN, generator=generator).mul(0.5).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (n,), generator=generator)
    return hidden, weight, labels, torch.randn(2, n, generator=generator)


def assert_equal(found, expected, tolerance: float = 1e-6) -> None:
    """To `tolerance` of the largest value."""
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1.0)


def chunks_of(tokens: int, monkeypatch) -> None:
    monkeypatch.setattr(loss_head, "CHUNK_LOGITS", tokens * VOCABULARY)


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("n, chunk", [(1, 1), (7, 1), (64, 64), (65, 64), (63, 64), (50, 7)])
def test_losses_entropies_and_gradients_are_those_of_the_plain_head(alone, monkeypatch, n, chunk, temperature, cap):
    chunks_of(chunk, monkeypatch)
    hidden, weight, labels, grad = example(n, padded=VOCABULARY + 20)
    for entropy in (False, True):
        found = token_losses(hidden, weight, Targets(labels, temperature, entropy), VOCABULARY, dist.group.WORLD, cap)
        expected = plain_head(hidden, weight, labels, VOCABULARY, cap, temperature)
        found, expected = (found, expected) if entropy else (found[None], expected[:1])
        assert_equal(found, expected)
        ours, theirs = (torch.autograd.grad(x, [hidden, weight], grad[: len(x)]) for x in (found, expected))
        assert_equal(ours, theirs)
        assert not ours[1][VOCABULARY:].any()


def test_gradients_are_those_of_finite_differences(alone, monkeypatch):
    chunks_of(3, monkeypatch)
    hidden, weight, labels, grad = example(8)
    targets = Targets(labels, 0.8, entropy=True)

    def value() -> torch.Tensor:
        return (token_losses(hidden, weight, targets, VOCABULARY, dist.group.WORLD, 5.0) * grad).sum().double()

    for tensor, slope in zip((hidden, weight), torch.autograd.grad(value(), [hidden, weight])):
        step = 1e-2 * slope / slope.norm()
        with torch.no_grad():
            tensor += step
            above = value()
            tensor -= 2 * step
            below = value()
        assert (above - below).item() == pytest.approx(2 * (slope * step).sum().item(), rel=5e-3)


def test_no_supervised_position_gives_no_loss_and_a_gradient_of_zeros(alone):
    hidden, weight, labels, _ = example(0)
    losses = token_losses(hidden, weight, Targets(labels), VOCABULARY, dist.group.WORLD)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert hidden.grad.shape == (0, HIDDEN) and weight.grad.shape == weight.shape and not weight.grad.any()


def test_a_frozen_weight_gets_no_gradient_and_hidden_states_the_same(alone):
    hidden, weight, labels, grad = example(9)
    head = lambda weight: token_losses(hidden, weight, Targets(labels), VOCABULARY, dist.group.WORLD)  # noqa: E731
    expected = torch.autograd.grad(head(weight), [hidden], grad[0])
    assert torch.equal(*torch.autograd.grad(head(weight.detach()), [hidden], grad[0]), *expected)


def test_bf16_logits_have_fp32_losses_and_a_weight_gradient_summed_in_fp32(alone, monkeypatch):
    chunks_of(2, monkeypatch)
    hidden, weight, labels, grad = example(400, dtype=torch.bfloat16)
    found = token_losses(hidden, weight, Targets(labels), VOCABULARY, dist.group.WORLD)
    expected = plain_head(hidden, weight, labels, VOCABULARY)[0]
    assert found.dtype == torch.float32
    assert_equal(found[None], expected[None])
    ours, theirs = (torch.autograd.grad(x, [hidden, weight], grad[0]) for x in (found, expected))
    assert [x.dtype for x in ours] == [torch.bfloat16] * 2
    assert_equal(ours, theirs, tolerance=2**-7)  # of a last bit; 200 sums in bf16 would be off by several


def split_head(n: int, rows: int, temperature: float, cap: float):
    """This tensor rank's part of the head's output and gradients."""
    with patch.object(loss_head, "CHUNK_LOGITS", 5 * VOCABULARY), ranks.started(ParallelPlan(tensor=2)):
        hidden, weight, labels, grad = example(n, padded_rows(rows, 2))
        weight = weight.detach().chunk(2)[dist.get_rank()].requires_grad_()
        found = token_losses(hidden, weight, Targets(labels % rows, temperature, True), rows, dist.group.WORLD, cap)
        return found.detach(), *torch.autograd.grad(found, [hidden, weight], grad)


@pytest.mark.parametrize("n, rows", [(33, VOCABULARY), (0, VOCABULARY), (33, 19)])  # of 19 the second rank has none
def test_tensor_ranks_give_the_whole_vocabularys_losses_and_gradients(two_ranks, n, rows):
    hidden, weight, labels, grad = example(n, padded_rows(rows, 2))
    expected = plain_head(hidden, weight, labels % rows, rows, cap=3.0, temperature=1.3)
    of_hidden, of_weight = torch.autograd.grad(expected, [hidden, weight], grad)
    parts = two_ranks.run(split_head, n=n, rows=rows, temperature=1.3, cap=3.0)
    for part, of_rows in zip(parts, of_weight.chunk(2)):
        if n:
            assert_equal(part, [expected.detach(), of_hidden, of_rows])
        else:
            assert part[0].shape == (2, 0) and not part[2].any()


def whole_model(hf: Path, plan: ParallelPlan):
    """Losses of a pack, and their gradient at this rank's part of the tied embedding."""
    with patch.object(loss_head, "CHUNK_LOGITS", 7 * 19), ranks.started(plan):
        model = tiny.model(hf, tiny.DIMS, plan)
        losses = losses_of(model, micro_batch([tiny.pack([20, 31, 1], seed=8)]))
        losses.sum().backward()
        return losses.detach(), model.embedding.word_embeddings.weight.grad[:19]


@pytest.mark.parametrize("plan", [ParallelPlan(tensor=2), ParallelPlan(tensor=2, sequence_parallel=True)])
def test_a_model_over_tensor_ranks_has_the_losses_and_gradients_of_one(two_ranks, tmp_path, plan):
    hf = tiny.hf_folder(tmp_path / "hf")
    losses, grad = whole_model(hf, ParallelPlan())
    parts = two_ranks.run(whole_model, hf=hf, plan=plan)
    for part, _ in parts:
        assert_equal([part], [losses], tolerance=2e-6)
    assert_equal([torch.cat([part for _, part in parts])[:19]], [grad], tolerance=5e-6)


def test_memory_beyond_the_gradients_does_not_grow_with_the_number_of_tokens(alone, monkeypatch):
    chunks_of(64, monkeypatch)

    def peak(n: int) -> int:
        hidden, weight, labels, _ = example(n)
        head = lambda: token_losses(hidden, weight, Targets(labels), VOCABULARY, dist.group.WORLD)  # noqa: E731
        return peak_bytes(lambda: head().sum().backward()) - hidden.nbytes

    logits_of_the_others = 4 * VOCABULARY * (4096 - 512)
    assert peak(4096) - peak(512) < logits_of_the_others / 10
