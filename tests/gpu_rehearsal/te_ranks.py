"""What ranks do under the stand-ins. Import it in a process that has stand_ins/ on its path, and nowhere else."""

import math
import sys
import types
from pathlib import Path
from typing import Any

import torch
import transformer_engine

from megatron_ext.lora import adapters
from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.training import certify
from megatron_ext.training.trainer import AdamW, Trainer
from megatron_ext.weights import checkpoint
from tests.megatron_ext import adapted, tiny

PACKS = [tiny.pack([20, 9, 3, 32], seed, vocabulary=19) for seed in range(2)]
ALONE = ParallelPlan()
UPDATES, LEARNING_RATE = 3, 1e-2
IN_TRITON = "megatron.core.inference.contexts.attention_context.triton"  # imported by mcore's mixer, for decoding only


def _without_triton() -> None:
    """Let megatron-core's Mamba mixer be imported where Triton is not installed."""
    names = ("tensor_get_slice_after", "tensor_masked_update", "tensor_merge")
    for module in (IN_TRITON, f"{IN_TRITON}.tensor_ops"):
        found = types.ModuleType(module)
        found.__path__ = []
        found.__dict__.update(dict.fromkeys(names))
        sys.modules[module] = found


assert transformer_engine.__file__ and "stand_ins" in transformer_engine.__file__
_without_triton()


def write_weights(of: Any, folder: Path) -> None:
    """Write weights that either backend can load."""
    with ranks.started(ALONE):
        certify.write_random_weights(tiny.family(of), of, folder)


def losses(
    of: Any,
    backend: str,
    weights: Path,
    plan: ParallelPlan = ALONE,
    lora: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    """Return loss and gradient norm of each of a few updates from `weights`."""
    with ranks.started(plan):
        parts = tiny.family(of).build(of, plan, dtype, backend)
        checkpoint.load_weights(parts, weights)
        if lora:
            adapters.attach(parts, tiny.family(of), of, adapted.lora(of), 3)
        trainer = Trainer(parts, plan, AdamW(weight_decay=0.1))
        found = []
        for _ in range(UPDATES):
            sums, norm = trainer.step(certify.rows_of(PACKS, plan), LEARNING_RATE)
            found += [sums.reduced().mean_loss, norm]
        assert all(map(math.isfinite, found))
        return found
