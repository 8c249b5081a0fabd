"""What ranks do in the rehearsal of attention and rollouts. What imports megatron-core comes in late: in the ranks."""

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_ext.parallel import ranks
from megatron_ext.parallel.parts import Parts
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rollout.sequence import Request
from megatron_ext.rollout.settings import EngineConfig, Sampling
from tests.megatron_ext import tiny

LENGTHS = [8, 0, 40, 4, 12, 64]  # each divides into the chunks of two context ranks
PROMPTS = [tuple(1 + (3 * i + j * j) % 18 for j in range(1 + 5 * i % 37)) for i in range(7)]
Found = dict[tuple[int, int], tuple[list[int], list[float]]]


def differences(of: Any, plan: ParallelPlan) -> dict[str, float]:
    """Return how far outputs and gradients of torch's FlashAttention, played, are from those of the buckets.

    Each in float64, by name, and the largest over the layers, with the number of calls of the kernel.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_ext.layers.attention import PackedAttention
    from megatron_ext.layers.documents import ContextRank, packed_documents
    from tests.gpu_rehearsal.flash_kernel import played
    from tests.megatron_ext.test_attention import cu

    found = {"calls": 0.0}
    with ranks.started(plan):
        config = tiny.family(of).spec.transformer_config(of, plan, torch.float64)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        context = ContextRank(groups.cp.size(), groups.cp.rank())
        heads, shared = (n // plan.tensor for n in (config.num_attention_heads, config.num_query_groups))
        for layer in (1, 2):
            core = PackedAttention(
                config, layer, AttnMaskType.causal, "self", cp_comm_type=plan.context_comm, pg_collection=groups
            )
            documents = packed_documents(cu(LENGTHS), torch.device("cpu"), context)
            torch.manual_seed(10 * layer + groups.cp.rank())
            shapes = [(len(documents.held), n, config.kv_channels) for n in (heads, shared, shared)]
            tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
            weight = torch.randn(shapes[0][0], heads * config.kv_channels, dtype=torch.float64)
            names = ["query", "key", "value"]
            if core.softmax_offset is not None:
                torch.nn.init.normal_(core.softmax_offset)
                tensors, names = [*tensors, core.softmax_offset], [*names, "sinks"]

            def computed(tensors=tensors, weight=weight, core=core, documents=documents) -> list[torch.Tensor]:
                out = core(*tensors[:3], packed_seq_params=documents)
                return [out.detach(), *torch.autograd.grad((out * weight).sum(), tensors)]

            in_buckets = computed()
            with played() as kernel:
                by_flash = computed()
            found["calls"] += kernel.forwards + kernel.backwards
            for name, a, b in zip(["out", *names], in_buckets, by_flash):
                assert a.abs().max() > 1e-3
                found[name] = max(found.get(name, 0.0), (a - b).abs().max().item())
    return found


def trained(
    of: Any, weights: Path, plan: ParallelPlan, flash: Sequence[torch.dtype] | None = None
) -> tuple[list[float], list[float], int, set[str]]:
    """Return losses and gradient norms of a few updates with the torch backend, the calls of the played kernel, and
    which kernels of scaled_dot_product_attention ran.

    `flash`: on a played GPU, whose FlashAttention takes these types.
    """
    from megatron_ext.training import certify
    from megatron_ext.training.update import AdamW, Trainer
    from megatron_ext.weights import checkpoint
    from tests.gpu_rehearsal.flash_kernel import played

    packs = [tiny.pack([20, 8, 4, 32], seed) for seed in range(2)]
    found, norms = [], []
    with ranks.started(plan), contextlib.nullcontext() if flash is None else played(tuple(flash)) as kernel:
        parts = tiny.family(of).build(of, plan, torch.float32)
        checkpoint.load_weights(parts, weights)
        trainer = Trainer(parts, plan, AdamW(weight_decay=0.1))
        for _ in range(3):
            sums, norm = trainer.step(certify.rows_of(packs, plan), 1e-2)
            found.append(float(sums.reduced().mean_loss))
            norms.append(norm)
    return found, norms, kernel.forwards if kernel else 0, set(kernel.sdpa.backends) if kernel else set()


@contextlib.contextmanager
def no_boundaries() -> Iterator[None]:
    """Fail where a layer asks a rollout's row for the boundaries of documents, which it has not."""
    from megatron_ext.rollout.cache import CachedRow

    def get(row: CachedRow, name: str) -> Any:
        assert not name.startswith("cu_seqlens"), f"a layer reads {name} of a rollout's row"
        return object.__getattribute__(row, name)

    CachedRow.__getattribute__ = get
    try:
        yield
    finally:
        del CachedRow.__getattribute__


def sampled(of: Any, made_of: Parts, weights: Path, plan: ParallelPlan, flash: bool = False, block: int = 4) -> Found:
    """Return the tokens of each sample, and their log-probs, as a rollout engine draws them over these layers.

    `flash`: with torch's FlashAttention, played.
    """
    from megatron_ext.rollout.engine import Engine
    from megatron_ext.rollout.kernels import GATHERED_FLASH, PAGED_TORCH
    from megatron_ext.weights import checkpoint
    from tests.gpu_rehearsal.flash_kernel import played

    if made_of.uses_te:
        importlib.import_module("tests.gpu_rehearsal.te_ranks")  # checks that these are the stand-ins

    settings = EngineConfig(kv_gib=0.05, block_size=block, max_batch=6, token_budget=16)
    with no_boundaries(), ranks.started(plan), played() if flash else contextlib.nullcontext() as kernel:
        parts = tiny.family(of).build(of, plan, torch.float32, made_of)
        checkpoint.load_weights(parts, weights)
        engine = Engine(parts[0], settings, seed=7, stop_ids={5})
        if kernel:
            assert engine.runner.attention == (GATHERED_FLASH if block % 256 else PAGED_TORCH)
        wanted = [Request(i, prompt, 2) for i, prompt in enumerate(PROMPTS)]
        found = {
            (s.prefix.request.uid, s.sample): (s.completion, s.model_logprobs)
            for s in engine.generate(wanted, Sampling(max_tokens=9, top_p=0.95))
        }
        assert kernel is None or kernel.forwards > 20 and bool(kernel.paged) == (block % 256 == 0)
    assert len(found) == 2 * len(PROMPTS)
    return found


def written(of: Any, folder: Path) -> None:
    """Write random weights, norms, biases and sinks included, that either backend loads."""
    from megatron_ext.weights import checkpoint

    with ranks.started(ParallelPlan()):
        hf = tiny.hf_folder(folder / "hf", of, seed=4)
        checkpoint.save_weights(tiny.parts(hf, of, ParallelPlan()), folder / "weights")
