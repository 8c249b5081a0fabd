"""What a rank with the stand-ins does with Mamba layers. Parameters are drawn anew; bounds come from float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from megatron_ext.layers import mamba
from megatron_ext.layers.mamba import MambaMixer
from megatron_ext.layers.mamba_scan import Sizes, State
from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rollout.engine import Engine
from megatron_ext.rollout.sequence import Request
from megatron_ext.rollout.settings import EngineConfig, Sampling
from tests.gpu_rehearsal import te_ranks
from tests.megatron_ext import tiny
from tests.megatron_ext.rounding import bound

CHUNK = 8
SIZES = (7, 12, 1, 30, 3, 20)  # tokens of the documents of a row, shorter and longer than a chunk


def _mixer(of: Any, dtype: torch.dtype) -> MambaMixer:
    """Return a mixer of the torch backend with random parameters."""
    (model,) = tiny.family(of).build(of, ParallelPlan(), dtype)
    found = next(module for module in model.modules() if isinstance(module, MambaMixer))
    generator = torch.Generator().manual_seed(3)
    for parameter in found.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return found


@contextmanager
def _kernels(mixer: MambaMixer, name: str, segment: int) -> Iterator[None]:
    """Let `mixer` compute with these kernels, and cut rows into segments of so many tokens."""
    kept, sizes = mamba.SEGMENTS[name], Sizes(mixer.head_dim, mixer.state_dim, CHUNK)
    mixer.kernels, mixer.segment = name, partial(mamba._kernels(name), sizes=sizes)
    mamba.SEGMENTS[name] = segment
    try:
        yield
    finally:
        mamba.SEGMENTS[name] = kept


def _row(mixer: MambaMixer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return columns of in_proj and the documents of one row."""
    documents = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))[None]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, documents.size(1), sum(mixer._sizes()), generator=generator), documents


def _of_row(mixer: MambaMixer, state: State | None, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the output, last state and gradients of a row's computation."""
    _, documents = _row(mixer)
    rows = rows.clone().requires_grad_()
    y, last = mixer.advance(rows, documents, state)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)
    loss = (y * weights).sum() + last.ssm.square().sum() + last.inputs.square().sum()
    of = {"rows": rows, **dict(mixer.conv1d.named_parameters()), **{n: getattr(mixer, n) for n in mixer.EXACT}}
    grads = torch.autograd.grad(loss, list(of.values()))
    return {"y": y, "ssm": last.ssm, "inputs": last.inputs, **{f"d {n}": g for n, g in zip(of, grads)}}


def worst_against_torch(of: Any, segment: int) -> dict[str, float]:
    """Return by tensor the difference of both kernels over what fp32 rounding explains; more than 1 is wrong."""
    with ranks.started(ParallelPlan()):
        double, single = _mixer(of, torch.float64), _mixer(of, torch.float32)
        rows, _ = _row(single)
        exact = _of_row(double, None, rows.double())
        ours = _of_row(single, None, rows)
        with _kernels(single, "mamba_ssm", segment):
            theirs = _of_row(single, None, rows)
    return {name: (theirs[name] - ours[name]).abs().max().item() / bound(ours[name], exact[name]) for name in exact}


def decoded(of: Any, cut: int) -> tuple[float, float]:
    """Return how far a row computed at once and one decoded token by token after `cut` are apart, and what fp32
    rounding explains.
    """
    with ranks.started(ParallelPlan()):
        double, mixer = _mixer(of, torch.float64), _mixer(of, torch.float32)
        rows, documents = _row(mixer)
        exact = double.advance(rows.double(), documents)[0]
        with _kernels(mixer, "mamba_ssm", 10**6), torch.no_grad():
            whole = mixer.advance(rows, documents)[0]
            out, state = mixer.advance(rows[:, :cut], documents[:, :cut])
            outs = [out]
            for t in range(cut, rows.size(1)):
                held = [part.clone() for part in state]
                out, following = mixer.advance(rows[:, t : t + 1], documents[:, t : t + 1], state)
                assert all(torch.equal(a, b) for a, b in zip(held, state)), "a step changed the state it began from"
                outs.append(out)
                state = following
    return (torch.cat(outs, dim=1) - whole).abs().max().item(), bound(whole, exact)


def reached(of: Any, segment: int) -> list[list[bool]]:
    """Return [document][other]: whether the gradient of a document's outputs by the other's inputs is not zero."""
    with ranks.started(ParallelPlan()):
        mixer = _mixer(of, torch.float32)
        rows, documents = _row(mixer)
        rows.requires_grad_()
        with _kernels(mixer, "mamba_ssm", segment):
            y, _ = mixer.advance(rows, documents)
            found = []
            for number in range(len(SIZES)):
                (grad,) = torch.autograd.grad(y[documents == number].square().sum(), rows, retain_graph=True)
                found.append([bool(grad[documents == other].any()) for other in range(len(SIZES))])
    return found


def tokens_a_call(of: Any, tokens: int) -> list[int]:
    """Return how many tokens the scan of mamba-ssm is given at a time, of a row of so many."""
    from megatron_ext.layers import mamba_fused

    asked, scan = [], mamba_fused.mamba_chunk_scan_combined

    def counting(x: torch.Tensor, *others: Any, **named: Any) -> Any:
        asked.append(x.size(1))
        return torch.zeros_like(x), named["initial_states"]

    mamba_fused.mamba_chunk_scan_combined = counting
    try:
        with ranks.started(ParallelPlan()), torch.no_grad():
            mixer = _mixer(of, torch.float32)
            mixer.kernels, mixer.segment = "mamba_ssm", partial(mamba_fused.advance, sizes=Sizes(6, 7, 128))
            rows = torch.zeros(1, tokens, sum(mixer._sizes()))
            mixer.advance(rows, torch.zeros(1, tokens, dtype=torch.int64))
    finally:
        mamba_fused.mamba_chunk_scan_combined = scan
    return asked


def losses(**given: Any) -> tuple[list[float], list[float]]:
    """Do te_ranks.losses, of documents that two context ranks can share."""
    kept = te_ranks.PACKS
    te_ranks.PACKS = [tiny.pack([20, 8, 4, 32], seed) for seed in range(2)]
    try:
        return te_ranks.losses(**given)
    finally:
        te_ranks.PACKS = kept


def samples(of: Any, weights: Any, prompts: list[tuple[int, ...]], **layers: Any) -> dict[Any, Any]:
    """Return {(prompt, sample): (tokens, log-probs, margins)} of a rollout. `layers` says whose the model's are."""
    with ranks.started(ParallelPlan()):
        (model,) = te_ranks._loaded(of, weights=weights, **layers)
        engine = Engine(model, EngineConfig(0.01, block_size=4, max_batch=6, token_budget=16), seed=7, stop_ids={5})
        wanted = [Request(i, prompt, 3) for i, prompt in enumerate(prompts)]
        return {
            (s.prefix.request.uid, s.sample): (s.completion, s.logprobs, s.margins)
            for s in engine.generate(wanted, Sampling(max_tokens=13))
        }
