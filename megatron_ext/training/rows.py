"""What a rank trains on: packs of the plan, joined into THD rows on the device.

The packs of a rank in step k: the plan gives the global batch, whatever the number of ranks, and deals it to them by
predicted cost (data_tools/packs/batches.py). A rank takes `micro_batch` of them at a time, joined into one row of THD
(tokens, heads, head dimension: no batch dimension). Context ranks share a row and hold some of its tokens each; of a
pipeline's ranks the first reads the ids, the last the labels.

Shapes below: L tokens of a pack, T of a row, c context ranks, n supervised tokens that this rank holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy
import torch
from megatron.core import parallel_state

from megatron_ext.device import device
from megatron_ext.layers.documents import ContextRank, PackedDocuments, packed_documents
from megatron_ext.layers.loss_head import Targets


class Pack(Protocol):
    """One row of L tokens: ids, labels (the next token), positions int64 [L]; loss_mask [L], 1 where the label counts;
    cu_seqlens int32 [documents + 1], the last L."""

    ids: numpy.ndarray
    labels: numpy.ndarray
    loss_mask: numpy.ndarray
    positions: numpy.ndarray
    cu_seqlens: numpy.ndarray


class Packs(Protocol):
    """What data_tools.packs.pack.PackReader offers."""

    n_packs: int
    pack_length: int
    digest: str

    def batch(self, k: int, global_batch: int, seed: int) -> list[int]:
        """The packs of global batch `k`, whatever the number of ranks."""

    def share(self, k: int, global_batch: int, seed: int, rank: int, ranks: int) -> list[int]:
        """The packs of global batch `k` that data-parallel rank `rank` of `ranks` trains, in order."""

    def pack(self, i: int) -> Pack: ...

    def padding(self, i: int) -> int:
        """Tokens of pack `i` that are no document's."""


@dataclass(frozen=True)
class MicroBatch:
    """One THD row on the device, what this context rank holds of it.

    ids and positions int64 [1, T / c]; supervised positions among them and their labels int64 [n].
    """

    ids: torch.Tensor
    positions: torch.Tensor
    documents: PackedDocuments
    supervised: torch.Tensor
    labels: torch.Tensor

    @property
    def targets(self) -> Targets:
        return Targets(self.labels)


def micro_batch(packs: Sequence[Pack]) -> MicroBatch:
    """Join packs into one row; documents stay what they were.

    Raises ValueError where context ranks cannot share a document evenly (`zigzag`).
    """
    cu_seqlens, start = [numpy.zeros(1, numpy.int64)], 0
    for pack in packs:
        cu_seqlens.append(pack.cu_seqlens[1:].astype(numpy.int64) + start)
        start += int(pack.cu_seqlens[-1])
    target = device()
    context = ContextRank(parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank())
    documents = packed_documents(numpy.concatenate(cu_seqlens), target, context)

    def row(name: str) -> numpy.ndarray:
        return numpy.concatenate([getattr(pack, name) for pack in packs])[documents.held]

    supervised = numpy.flatnonzero(row("loss_mask"))
    return MicroBatch(
        ids=torch.from_numpy(row("ids").astype(numpy.int64))[None].to(target),
        positions=torch.from_numpy(row("positions").astype(numpy.int64))[None].to(target),
        documents=documents,
        supervised=torch.from_numpy(supervised).to(target),
        labels=torch.from_numpy(row("labels")[supervised].astype(numpy.int64)).to(target),
    )
