"""Samples as packed rows on the device, their log-probs, and the policy loss over them.

Shapes below: T tokens of a row, n trained ones among those that this context rank holds.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.distributed.nn.functional import all_reduce

from data_tools.packs.plan import padded_to
from megatron_ext.device import device, plain_torch
from megatron_ext.layers.loss_head import Targets
from megatron_ext.layers.router_replay import Routers
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rl.losses import Reduce, Tokens, Totals, alone, mismatch_sums, policy_loss
from megatron_ext.rl.samples import Key, SampleBatch, deal
from megatron_ext.rl.settings import Loss
from megatron_ext.training.rows import MicroBatch, micro_batch
from megatron_ext.training.update import LossFunction, losses_of


@dataclass(frozen=True)
class RolloutRow(MicroBatch):
    """A row of whole documents, prompt and completion each; supervised are the trained tokens, n of them on this rank.

    keys: the rollouts' prompts and numbers. sequence int64 [n]: the token's rollout in this row. lengths [rollouts]:
    trained tokens of each, over all context ranks. advantage, behaviour, old, reference fp32 [n]: see losses.Tokens.
    `old` None: those of the weights as they are. `routing` int64 [T, r]: the experts that the rollout chose
    (layers/router_replay.py), which training takes; None: its routers choose.
    """

    temperature: float
    keys: tuple[tuple[int, int], ...]
    sequence: torch.Tensor
    lengths: torch.Tensor
    advantage: torch.Tensor
    behaviour: torch.Tensor | None
    old: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    routing: torch.Tensor | None = None

    @property
    def chosen(self) -> torch.Tensor | None:
        return self.routing

    @property
    def targets(self) -> Targets:
        """What the loss head is asked about the trained tokens."""
        return Targets(self.labels, self.temperature, entropy=True)


@dataclass(frozen=True)
class _Packed:
    """A row of T tokens as `micro_batch` reads it, and what else belongs to each token, [T] each."""

    ids: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    positions: np.ndarray
    cu_seqlens: np.ndarray
    sequence: np.ndarray
    advantage: np.ndarray
    behaviour: np.ndarray
    routing: np.ndarray | None  # [T, r]


def document_tokens(batch: SampleBatch, places: np.ndarray, unit: int) -> np.ndarray:
    """Return int64, the tokens that each of these samples takes in a row. The last token is only a label."""
    samples = (batch.samples[place] for place in places)
    lengths = np.array([len(sample.prompt) + sample.length - 1 for sample in samples], dtype=np.int64)
    return -(-lengths // unit) * unit


@dataclass(frozen=True)
class Shares:
    """Says which rows of a batch each data-parallel rank trains: places of samples in the batch, and the row's width in
    tokens. Each rank has as many rows, and knows those of all.
    """

    batch: SampleBatch
    unit: int  # of which a document takes a multiple
    rows: list[list[tuple[np.ndarray, int]]]

    def keys(self, rank: int) -> set[Key]:
        """Return the samples of a rank's rows."""
        return {self.batch.samples[place].key for places, _ in self.rows[rank] for place in places}

    def own_rows(self, temperature: float, comparable: bool, routers: Routers | None = None) -> list[RolloutRow]:
        """Return this rank's rows, whose samples are here (Sample.is_here).

        `comparable`: whether the recorded log-probs are of the distribution that is trained. With `routers` they go to
        the experts that were chosen for the samples.
        """
        return [
            _on_device(
                _pack(self.batch, places, self.unit, width, routers=routers),
                tuple(self.batch.samples[place].key for place in places),
                temperature,
                comparable,
            )
            for places, width in self.rows[parallel_state.get_data_parallel_rank()]
        ]


def shares_of(batch: SampleBatch, plan: ParallelPlan, row_tokens: int) -> Shares:
    """Return the rows of all ranks. The lengths of all samples are enough to know them."""
    places = np.flatnonzero(batch.trained)
    tokens = document_tokens(batch, places, plan.document_unit())
    size = parallel_state.get_data_parallel_world_size()
    dealt = deal(tokens, size, row_tokens, plan.pipeline if plan.virtual > 1 else 1)
    unit = plan.token_unit()

    def width(row: list[int]) -> int:
        return -(-max(int(tokens[row].sum()), 1) // unit) * unit

    widest = max(width(row) for rows in dealt for row in rows) if plan.pipeline > 1 else 0  # stages pass equal rows on
    return Shares(
        batch, plan.document_unit(), [[(places[row], max(width(row), widest)) for row in rows] for rows in dealt]
    )


def rollout_rows(
    batch: SampleBatch, plan: ParallelPlan, row_tokens: int, temperature: float, comparable: bool
) -> list[RolloutRow]:
    """Return this rank's rows of `batch`, whose samples are all here, as many as every other rank has."""
    return shares_of(batch, plan, row_tokens).own_rows(temperature, comparable)


def _pack(batch: SampleBatch, places: np.ndarray, unit: int, width: int, *, routers: Routers | None = None) -> _Packed:
    """Return a row of `width` tokens with the samples at these places of the batch, each from a multiple of `unit`."""
    lengths = document_tokens(batch, places, unit)
    ends = np.cumsum(lengths)
    cu_seqlens = padded_to(np.concatenate([[0], ends]).astype(np.int64), width, unit)
    ids, labels, sequence = (np.zeros(width, dtype=np.int64) for _ in range(3))
    mask, advantage, behaviour = (np.zeros(width, dtype=np.float32) for _ in range(3))
    routing = routers.any_experts(width) if routers else None
    for number, (place, end, length) in enumerate(zip(places, ends, lengths)):
        sample, start = batch.samples[place], end - length
        assert sample.is_here, f"sample {sample.key} was not brought"
        whole = np.concatenate([np.asarray(sample.prompt, dtype=np.int64), sample.tokens])
        ids[start : start + len(whole) - 1] = whole[:-1]
        own = slice(start + len(sample.prompt) - 1, start + len(whole) - 1)
        labels[own], mask[own], sequence[own] = sample.tokens, sample.own, number
        advantage[own], behaviour[own] = batch.advantages[place], sample.logprobs
        if routing is not None:
            here = () if sample.routing is None else sample.routing[: len(whole) - 1]
            if len(here) < len(whole) - 1:  # the others would go to experts that nothing chose
                said = f"the experts of {len(here)} of its {len(whole) - 1} tokens are recorded"
                raise ValueError(f"sample {sample.key}: {said}, and routing_replay trains with those of all")
            routing[start : start + len(here)] = here
    positions = np.arange(width) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
    return _Packed(
        ids=ids,
        labels=labels,
        loss_mask=mask,
        positions=positions,
        cu_seqlens=cu_seqlens,
        sequence=sequence,
        advantage=advantage,
        behaviour=behaviour,
        routing=routing,
    )


def _on_device(packed: _Packed, keys: tuple, temperature: float, comparable: bool) -> RolloutRow:
    """Return a row as this context rank holds it."""
    base = micro_batch([packed])
    held, target = base.held, device()
    trained = held[packed.loss_mask[held] > 0]
    counts = np.bincount(packed.sequence[packed.loss_mask > 0], minlength=len(keys)).astype(np.float32)

    def column(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(target)

    return RolloutRow(
        **vars(base),
        temperature=temperature,
        keys=keys,
        sequence=column(packed.sequence[trained]),
        lengths=column(counts),
        advantage=column(packed.advantage[trained]),
        behaviour=column(packed.behaviour[trained]) if comparable else None,
        routing=None if packed.routing is None else column(packed.routing[held].astype(np.int64)),
    )


@torch.no_grad()
def log_probs(parts: Sequence[torch.nn.Module], rows: Sequence[RolloutRow]) -> list[torch.Tensor | None]:
    """Return fp32 [n] of each row's trained tokens under the model `parts`. Every rank takes part.

    They are None on a pipeline's stages before the last.
    """
    by_row: list[torch.Tensor | None] = []

    def forward(iterator: Iterator[RolloutRow], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        row = next(iterator)

        def keep(out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
            by_row.append(-out[0])
            return out.sum(), out.new_full((), 1, dtype=torch.int), {}

        with plain_torch():
            return losses_of(model, row), keep

    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(rows) for _ in parts],
        model=list(parts),
        num_microbatches=len(rows),
        seq_length=rows[0].documents.total_tokens,
        micro_batch_size=1,
        forward_only=True,
    )
    return by_row or [None] * len(rows)


def with_old(rows: Sequence[RolloutRow], columns: Sequence[torch.Tensor | None]) -> list[RolloutRow]:
    """Return the rows with the log-probs of the weights at the beginning of the update."""
    return [replace(row, old=column) for row, column in zip(rows, columns)]


def with_reference(rows: Sequence[RolloutRow], columns: Sequence[torch.Tensor | None]) -> list[RolloutRow]:
    """Return the rows with the log-probs of the reference model."""
    return [replace(row, reference=column) for row, column in zip(rows, columns)]


class Measures:
    """Sums, and maxima where the name begins with max_, over rows and ranks.

    By sample, also how far the recorded log-probs are from the trained ones. All on the device until `reduced`.
    """

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self.differences: list[tuple[tuple, torch.Tensor]] = []

    def add(self, measured: dict[str, torch.Tensor]) -> None:
        """Add what a row's loss measured."""
        for name, value in measured.items():
            held, value = self.values.get(name), value.detach().double()
            self.values[name] = value if held is None else _joined(name, held, value, torch.maximum)

    def compare(self, row: RolloutRow, difference: torch.Tensor) -> None:
        """Add |Δ log p| [n] of the row's trained tokens."""
        sums = difference.new_zeros(2, len(row.keys))
        sums[0].index_add_(0, row.sequence, difference)
        sums[1].scatter_reduce_(0, row.sequence, difference, "amax")
        self.differences.append((row.keys, sums))

    def reduced(self) -> tuple[dict[str, float], dict[tuple[int, int], tuple[float, float]]]:
        """Return the values over all ranks, and by sample the sum and the largest of |Δ log p|.

        They are the same on each rank.
        """
        own = dict(zip(self.values, torch.stack([*self.values.values()]).tolist())) if self.values else {}
        keys = [key for keys, _ in self.differences for key in keys]
        compared = [*zip(keys, *torch.cat([sums for _, sums in self.differences], 1).tolist())] if keys else []
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (own, compared))
        total: dict[str, float] = {}
        differences: dict[tuple[int, int], tuple[float, float]] = {}
        for values, compared in parts:
            for name, value in values.items():
                total[name] = _joined(name, total[name], value, max) if name in total else value
            for key, added, largest in compared:
                before = differences.get(key, (0.0, 0.0))
                differences[key] = before[0] + added, max(before[1], largest)
        return total, differences


def _joined(name: str, a: Any, b: Any, largest: Callable[[Any, Any], Any]) -> Any:
    return largest(a, b) if name.startswith("max_") else a + b


def policy_loss_function(config: Loss, totals: Totals, measures: Measures, is_first: bool) -> LossFunction[RolloutRow]:
    """Return, for Trainer.step, a row's loss times the trained tokens of the whole batch, by which the step divides.

    In the first update after a rollout the weights are still those that sampled: there the recorded log-probs are
    compared with training's.
    """
    reduce: Reduce = _over_context_ranks if parallel_state.get_context_parallel_world_size() > 1 else alone
    counts = parallel_state.get_tensor_model_parallel_rank() == 0  # the others have the same numbers

    def function(out: torch.Tensor, row: RolloutRow) -> torch.Tensor:
        logp, entropy = -out[0], out[1]
        now = logp.detach()
        old = now if row.old is None else row.old
        tokens = Tokens(
            logp,
            old,
            advantage=row.advantage,
            sequence=row.sequence,
            lengths=row.lengths,
            behaviour=row.behaviour,
            reference=row.reference,
            entropy=entropy,
        )
        loss, sums = policy_loss(tokens, config, totals, reduce)
        if counts:
            measures.add({**sums, "entropy": entropy.sum(), "counted": logp.new_full((), len(logp))})
            if is_first and row.behaviour is not None:
                measures.add({**mismatch_sums(replace(tokens, old=now)), "compared": logp.new_full((), len(logp))})
                measures.compare(row, (now - row.behaviour).abs())
        return loss * totals.tokens

    return function


def _over_context_ranks(sums: torch.Tensor) -> torch.Tensor:
    return all_reduce(sums, group=parallel_state.get_context_parallel_group())
