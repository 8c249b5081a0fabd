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

from data_tools.packs.plan import Pack
from megatron_ext.device import device
from megatron_ext.layers.documents import ContextRank, PackedDocuments, packed_documents
from megatron_ext.layers.loss_head import Targets


class TokenRow(Protocol):
    """What `micro_batch` reads of a pack."""

    @property
    def ids(self) -> numpy.ndarray:
        """int64 [L]."""

    @property
    def labels(self) -> numpy.ndarray:
        """int64 [L], the next token of each."""

    @property
    def loss_mask(self) -> numpy.ndarray:
        """float32 [L], 1 where the label counts."""

    @property
    def positions(self) -> numpy.ndarray:
        """int64 [L], in the token's document."""

    @property
    def cu_seqlens(self) -> numpy.ndarray:
        """int32 [documents + 1], where documents begin and, the last, L."""


class Packs(Protocol):
    """What data_tools.packs.plan.PackReader offers."""

    @property
    def n_packs(self) -> int:
        """The number of packs."""

    @property
    def pack_length(self) -> int:
        """Tokens of a pack (L)."""

    @property
    def digest(self) -> str:
        """What names the packs and their tokens."""

    def batch(self, k: int, global_batch: int, seed: int) -> list[int]:
        """Return the packs of global batch `k`, whatever the number of ranks."""

    def share(self, k: int, global_batch: int, seed: int, rank: int, ranks: int) -> list[int]:
        """Return the packs of global batch `k` that data-parallel rank `rank` of `ranks` trains, in order."""

    def pack(self, i: int) -> Pack:
        """Return pack `i`, from 0."""

    def padding(self, i: int) -> int:
        """Return how many tokens of pack `i` are no document's."""


@dataclass(frozen=True)
class MicroBatch:
    """One row on the device, as far as this context rank holds it.

    ids and positions int64 [1, T / c]; supervised int64 [n], places among them, and labels int64 [n].
    """

    ids: torch.Tensor
    positions: torch.Tensor
    documents: PackedDocuments
    supervised: torch.Tensor
    labels: torch.Tensor

    @property
    def targets(self) -> Targets:
        """What the loss head is asked about the supervised tokens."""
        return Targets(self.labels)

    @property
    def chosen(self) -> torch.Tensor | None:
        """The experts that the row's tokens go to (layers/router_replay.py); None: those that the routers choose."""
        return None

    @property
    def held(self) -> numpy.ndarray:
        """int64 [T / c], the tokens of the row that this context rank holds."""
        assert self.documents.held is not None  # packed_documents gives it
        return self.documents.held


def micro_batch(packs: Sequence[TokenRow]) -> MicroBatch:
    """Return packs joined into one row on the device; documents stay what they were.

    Raises ValueError where context ranks cannot share a document evenly (`zigzag`).
    """
    cu_seqlens, start = [numpy.zeros(1, numpy.int64)], 0
    for pack in packs:
        cu_seqlens.append(pack.cu_seqlens[1:].astype(numpy.int64) + start)
        start += int(pack.cu_seqlens[-1])
    target = device()
    context = ContextRank(parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank())
    documents = packed_documents(numpy.concatenate(cu_seqlens), target, context)

    def held(columns: list[numpy.ndarray]) -> numpy.ndarray:
        """Return a column [T / c] of the row's tokens that this rank holds, from those of the packs."""
        return numpy.concatenate(columns)[documents.held]

    supervised = numpy.flatnonzero(held([pack.loss_mask for pack in packs]))
    labels = held([pack.labels for pack in packs])[supervised]
    return MicroBatch(
        ids=torch.from_numpy(held([pack.ids for pack in packs]).astype(numpy.int64))[None].to(target),
        positions=torch.from_numpy(held([pack.positions for pack in packs]).astype(numpy.int64))[None].to(target),
        documents=documents,
        supervised=torch.from_numpy(supervised).to(target),
        labels=torch.from_numpy(labels.astype(numpy.int64)).to(target),
    )
