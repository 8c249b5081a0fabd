"""Does a parallel layout compute what one process computes?

`measure` takes a small random model through one update on these ranks, and `differences` compares two measurements:
the loss, the whole gradient, and the loss after the update, which has been through the distributed optimizer.
`isolation` shows that a document of a pack reaches no other one, by gradient and by perturbation.

The same functions make the equivalence certificate of a training phase (entrypoints/certify.py) and the table of
tests/megatron_ext/test_certify.py.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    is_main_replica,
)
from safetensors.torch import save_file

from data_tools.packs.plan import Pack
from megatron_ext.models.layouts import default_start, hf_rules, hf_shapes
from megatron_ext.models.registry import Family, stages
from megatron_ext.parallel import ranks
from megatron_ext.parallel.parts import OURS, Parts
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.training.rows import MicroBatch, micro_batch
from megatron_ext.training.update import AdamW, Trainer
from megatron_ext.weights import checkpoint, convert

RATE = 1e-3  # of the one update
SETTINGS = AdamW(weight_decay=0.1)
DISTURBANCE = 1e-4  # of an embedded token


# ---------------------------------------------------------------- a small problem


def random_pack(lengths: Sequence[int], vocabulary: int, seed: int, supervised: Sequence[bool] | None = None) -> Pack:
    """Return documents of these lengths with random tokens.

    Of each document that is `supervised` (None: of all) the labels of a random part count, in some more than in
    others.
    """
    random = numpy.random.default_rng(seed)
    total, cu_seqlens = sum(lengths), numpy.concatenate([[0], numpy.cumsum(lengths)])
    ids = random.integers(0, vocabulary, total)
    labels, mask, positions = numpy.zeros_like(ids), numpy.zeros(total, numpy.float32), numpy.zeros_like(ids)
    for document, (start, end) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:])):
        labels[start : end - 1] = ids[start + 1 : end]
        positions[start:end] = numpy.arange(end - start)
        if supervised is None or supervised[document]:
            mask[start : end - 1] = random.random(end - start - 1) < random.uniform(0.2, 0.9)
    return Pack(
        ids=ids,
        labels=labels,
        loss_mask=mask,
        positions=positions,
        cu_seqlens=cu_seqlens.astype(numpy.int32),
        doc_ids=numpy.arange(len(lengths)),
    )


def write_random_weights(family: Family, dims: Any, folder: Path, seed: int = 0) -> None:
    """Write weights that any layout can load: those of a random model, with noise that no part of it is deaf to.

    One rank calls it.
    """
    rules = family.mapping.rules(dims)
    shapes, generator = hf_shapes(rules), torch.Generator().manual_seed(seed)

    tensors = {}
    for name, entries in hf_rules(rules).items():
        start = entries[0][0].start or default_start(name)
        tensors[name] = start(shapes[name], generator) + 0.25 * torch.randn(shapes[name], generator=generator)
    (model,) = family.build(dims, ParallelPlan(), torch.float32)
    with tempfile.TemporaryDirectory() as hf:
        save_file(tensors, Path(hf) / "model.safetensors", metadata={"format": "pt"})
        convert.import_weights(model, Path(hf), family, dims)
    checkpoint.save_weights(model, folder)


# ---------------------------------------------------------------- what a layout computes


@dataclass(frozen=True)
class Measured:
    """One update: mean loss before and after it, gradient norm, and the gradients by checkpoint key (rank 0 only)."""

    loss: float
    later_loss: float
    norm: float
    gradients: dict[str, torch.Tensor]


def trainer_of(
    family: Family,
    dims: Any,
    plan: ParallelPlan,
    weights: Path,
    *,
    made_of: Parts = OURS,
    settings: AdamW = SETTINGS,
) -> Trainer:
    """Return a trainer of these weights under a layout."""
    parts = family.build(dims, plan, torch.float32, made_of)
    checkpoint.load_weights(parts, weights)
    return Trainer(parts, plan, settings)


def rows_of(packs: Sequence[Pack], plan: ParallelPlan) -> list[MicroBatch]:
    """Return this rank's micro-batches of a global batch of `packs`."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    share = packs[rank::size]
    return [micro_batch(share[i : i + plan.micro_batch]) for i in range(0, len(share), plan.micro_batch)]


def measure(
    family: Family,
    dims: Any,
    plan: ParallelPlan,
    weights: Path,
    *,
    packs: Sequence[Pack],
    made_of: Parts = OURS,
    settings: AdamW = SETTINGS,
) -> Measured:
    """Make one update on `packs` from `weights`. All ranks of the process group take part; started here."""
    with ranks.started(plan):
        trainer = trainer_of(family, dims, plan, weights, made_of=made_of, settings=settings)
        rows = rows_of(packs, plan)
        before = trainer.gradient(rows, everywhere=True).reduced()
        gradients = whole_gradients(trainer.model)
        _, norm = trainer.step(rows, RATE)
        after = trainer.gradient(rows).reduced()
    return Measured(before.mean_loss, after.mean_loss, norm, gradients)


def whole_gradients(model: checkpoint.Model) -> dict[str, torch.Tensor]:
    """Return the gradient of every parameter by checkpoint key, whole, on rank 0; {} on the others."""
    gradients = {id(p): p.main_grad for part in stages(model) for p in part.parameters()}

    def as_gradient(leaf: Any) -> Any:
        if isinstance(leaf, (ShardedTensor, ShardedTensorFactory)):
            leaf.data = gradients.get(id(leaf.data))
        return leaf

    state = checkpoint.model_state(model)
    dict_list_map_inplace(as_gradient, state)
    apply_factories(state)
    shards = [
        (shard.key, shard.global_shape, shard.global_slice(), shard.data.cpu())
        for shard in nested_values(state)
        if isinstance(shard, ShardedTensor) and shard.data is not None and is_main_replica(shard.replica_id)
    ]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, shards)
    whole: dict[str, torch.Tensor] = {}
    for key, shape, place, part in (entry for rank in everywhere for entry in rank):
        if dist.get_rank() == 0:
            whole.setdefault(key, torch.zeros(shape))[place] = part
    vocabulary = {"embedding.word_embeddings.weight", "output_layer.weight"}
    rows = stages(model)[0].vocabulary_rows
    return {key: value[:rows] if key in vocabulary else value for key, value in whole.items()}


@dataclass(frozen=True)
class Difference:
    """How far a layout is from one process, relative: losses to the loss, a gradient to its largest element."""

    loss: float
    gradient: float
    tensor: str  # whose gradient differs most
    norm: float
    later_loss: float

    @property
    def largest(self) -> float:
        """The largest of the differences."""
        return max(self.loss, self.gradient, self.norm, self.later_loss)


def difference(ours: Measured, theirs: Measured) -> Difference:
    """Return how far one measurement is from another. ValueError where they do not have the same tensors."""
    if ours.gradients.keys() != theirs.gradients.keys():
        raise ValueError(f"other tensors: {sorted(ours.gradients.keys() ^ theirs.gradients.keys())}")

    def relative(a: float, b: float) -> float:
        return abs(a - b) / abs(b) if b else abs(a)

    by_tensor = {
        key: relative((ours.gradients[key] - expected).abs().max().item() + (top := expected.abs().max().item()), top)
        for key, expected in theirs.gradients.items()
    }
    tensor = max(by_tensor, key=by_tensor.__getitem__)
    return Difference(
        loss=relative(ours.loss, theirs.loss),
        gradient=by_tensor[tensor],
        tensor=tensor,
        norm=relative(ours.norm, theirs.norm),
        later_loss=relative(ours.later_loss, theirs.later_loss),
    )


# ---------------------------------------------------------------- isolation


@dataclass(frozen=True)
class Isolation:
    """What the document numbered `document` has to do with each document of its pack, itself included.

    `gradients`: the largest absolute gradient of its loss by a number of their inputs. `changes`: the largest absolute
    change of one of their losses when its own input is disturbed.
    """

    document: int
    gradients: list[float]
    changes: list[float]

    @property
    def holds(self) -> bool:
        """Whether it does exactly nothing to others, and something to itself, lest the test be empty."""
        return all(
            (value != 0.0) == (number == self.document)
            for values in (self.gradients, self.changes)
            for number, value in enumerate(values)
        )


def isolation(
    family: Family, dims: Any, plan: ParallelPlan, weights: Path, lengths: Sequence[int], document: int
) -> Isolation:
    """Return gradients and disturbances of one document of a pack with these `lengths`; the same on every rank.

    Inputs are the embedded tokens. The disturbance is small, so that no expert is chosen anew: with other tokens for
    an expert the others' sums would be taken in another order.
    """
    only = [number == document for number in range(len(lengths))]
    with ranks.started(plan):
        trainer = trainer_of(family, dims, plan, weights)
        gradients, _ = _observe(trainer, random_pack(lengths, dims.vocabulary, 1, only), document, 0.0)
        everybody = random_pack(lengths, dims.vocabulary, 1)
        losses, disturbed = (_observe(trainer, everybody, document, size)[1] for size in (0.0, DISTURBANCE))
    ends = numpy.cumsum(lengths)
    by_document = (
        [float(values[end - length : end].max()) for end, length in zip(ends, lengths)]
        for values in (gradients, numpy.abs(disturbed - losses))
    )
    return Isolation(document, *by_document)


def _observe(trainer: Trainer, pack: Pack, document: int, disturb: float) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return of each token of a pack, [T] each: the largest gradient by a number of its input, and its loss.

    Noise of size `disturb` is added to the inputs of `document`.
    """
    row = micro_batch([pack])
    losses: list[tuple[numpy.ndarray, torch.Tensor]] = []  # (tokens of the row, a number of each)
    inputs: list[tuple[numpy.ndarray, torch.Tensor]] = []

    def read(found: torch.Tensor, _: MicroBatch) -> torch.Tensor:
        losses.append((row.held[row.supervised.cpu().numpy()], found.detach()))
        return found.sum()

    def at_embedding(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        tokens = row.held
        if trainer.plan.sequence_parallel:
            tokens = numpy.split(tokens, trainer.plan.tensor)[parallel_state.get_tensor_model_parallel_rank()]
        is_own = (pack.cu_seqlens[document] <= tokens) & (tokens < pack.cu_seqlens[document + 1])
        noise = torch.randn(len(tokens), 1, output.size(-1), generator=torch.Generator().manual_seed(0))
        output = output + (disturb * noise * torch.from_numpy(is_own)[:, None, None]).to(output)
        output.retain_grad()
        inputs.append((tokens, output))
        return output

    first = [part for part in stages(trainer.model) if part.pre_process]
    hooks = [part.embedding.register_forward_hook(at_embedding) for part in first]
    trainer.gradient([row] * trainer.plan.pipeline, read)
    for hook in hooks:
        hook.remove()
    gradients = []
    for tokens, output in inputs:
        assert output.grad is not None  # which was retained
        gradients.append((tokens, output.grad.abs().amax(dim=(1, 2))))
    total = row.documents.total_tokens
    return _by_token(gradients, total), _by_token(losses, total)


def _by_token(numbers: list[tuple[numpy.ndarray, torch.Tensor]], total: int) -> numpy.ndarray:
    """Return float32 [total], the numbers that all ranks found for tokens of a row, 0 where there are none."""
    arrays = [(tokens, values.float().cpu().numpy()) for tokens, values in numbers]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, arrays)
    whole = numpy.zeros(total, numpy.float32)
    for tokens, values in (entry for rank in everywhere for entry in rank):
        whole[tokens] = values
    return whole
