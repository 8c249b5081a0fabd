"""Log-probs of the choices of questions (choices.py), by the model on its ranks: nothing is generated."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from data_tools.progress import Progress
from data_tools.tasks.mix import Draw
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rl.choices import Choice, choices, line
from megatron_ext.rl.prompts import Encoding
from megatron_ext.rl.rows import log_probs, rollout_rows
from megatron_ext.rl.samples import Sample, SampleBatch

_AT_A_TIME = 64  # prompts whose choices are packed and dealt to the ranks together


def answered(
    model: torch.nn.Module,
    draws: Sequence[Draw],
    encoding: Encoding,
    *,
    plan: ParallelPlan,
    row_tokens: int,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Yield what evaluate.py writes of each question, on every rank; all of them take part."""
    model.eval()
    asked = [choices(draw, encoding) for draw in draws]
    for start in range(0, len(draws), _AT_A_TIME):
        some = asked[start : start + _AT_A_TIME]
        values = _log_likelihoods(model, some, plan, row_tokens)
        for number, (draw, own) in enumerate(zip(draws[start : start + _AT_A_TIME], some)):
            yield line(draw, own, [values[number, place] for place in range(len(own))])
        progress(start + len(some), len(draws), "prompts")


def _log_likelihoods(
    model: torch.nn.Module, asked: Sequence[Sequence[Choice]], plan: ParallelPlan, row_tokens: int
) -> dict[tuple[int, int], float]:
    """Return the log-likelihood of each choice by (question, choice), on every rank."""
    samples = [
        Sample(number, place, choice.prompt, np.array(choice.tokens, np.int32), np.zeros(len(choice.tokens)), "stop")
        for number, own in enumerate(asked)
        for place, choice in enumerate(own)
    ]
    batch = SampleBatch(samples, np.zeros(len(samples)), np.ones(len(samples), dtype=bool))
    rows = rollout_rows(batch, plan, row_tokens=row_tokens, temperature=1.0, comparable=False)
    mine: list[tuple[tuple[int, int], float]] = []
    for row, column in zip(rows, log_probs([model], rows)):
        # Ranks of a tensor-parallel group have the same; those of a context-parallel one have parts of the tokens.
        if column is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
            sums = torch.zeros(len(row.keys), dtype=torch.float64, device="cpu")
            sums.index_add_(0, row.sequence.cpu(), column.double().cpu())
            mine += zip(row.keys, sums.tolist())
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    total: dict[tuple[int, int], float] = {}
    for key, value in (pair for part in parts for pair in part):
        total[key] = total.get(key, 0.0) + value
    return total
