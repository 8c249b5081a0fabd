"""A pack plan on disk, and its packs as training reads them.

    plan.npz    pack_ptr int64[packs + 1]; of the pieces, pack after pack: doc_ids int64, starts int64, lengths int32
                (tokens of the document from `start`; whole documents unless they were cut); source int16[packs]
    plan.json   pack_length, align, order, seed, weights, group, cost, counts, digest of the store

Which packs make up global batch k, and who trains which: batches.py.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from data_tools.base import mapped_npz
from data_tools.base.durable import canonical_json, read_json, sha256_bytes
from data_tools.mistake import UserMistake
from data_tools.packs import batches
from data_tools.packs.store import Store

PLAN, FACTS = "plan.npz", "plan.json"
_ARRAYS = ("pack_ptr", "doc_ids", "starts", "lengths", "source")
_BLOCK = 1 << 20  # values worked on at a time
PADDING_SLOT = 1024  # tokens at most: attention over a slot costs the square of its length, and padding is for nothing


class PlanFacts(TypedDict):
    """Holds what plan.json says; counts are of documents, tokens or packs."""

    pack_length: int
    align: int
    order: str
    seed: int
    weights: list[float]
    group: int
    cost: list[float]  # linear, quadratic
    packs: int
    documents: int
    overlong: int
    tokens: int
    padded: int
    targets: int
    store: str  # digest of the store
    plan: str  # digest of the plan
    crc32: NotRequired[dict[str, int]]  # of each array as it lies in plan.npz; plans of before have none


@dataclass(frozen=True)
class Pieces:
    """Says what there is to pack: `length` tokens of document `doc` from token `start` on. Arrays of one length."""

    doc: np.ndarray  # int64
    start: np.ndarray  # int64
    length: np.ndarray  # int32

    def __getitem__(self, places: np.ndarray) -> "Pieces":
        return Pieces(self.doc[places], self.start[places], self.length[places])

    def __len__(self) -> int:
        return len(self.doc)


@dataclass(frozen=True)
class PackPlan:
    """Pack i holds pieces[pack_ptr[i]:pack_ptr[i + 1]]; `source` int16[packs] says whose it is, 0 without weights."""

    pack_ptr: np.ndarray
    pieces: Pieces
    source: np.ndarray

    def digest(self) -> str:
        """Return the SHA-256 over the arrays."""
        digest = hashlib.sha256()
        for each in (self.pack_ptr, self.pieces.doc, self.pieces.start, self.pieces.length, self.source):
            for start in range(0, len(each), _BLOCK):
                digest.update(each[start : start + _BLOCK].astype("<i8").tobytes())
        return digest.hexdigest()

    def costs(self, linear: float, quadratic: float) -> np.ndarray:
        """Return float64[packs], the predicted cost of each. Takes 8 bytes a pack, and a block of pieces."""
        costs = np.empty(len(self.source))
        first = 0
        while first < len(costs):
            begin = int(self.pack_ptr[first])
            last = max(first + 1, int(np.searchsorted(self.pack_ptr, begin + _BLOCK, side="right")) - 1)
            length = self.pieces.length[begin : int(self.pack_ptr[last])].astype(np.float64)
            each = linear * length + quadratic * length * length
            costs[first:last] = np.add.reduceat(each, self.pack_ptr[first:last] - begin)
            first = last
        return costs

    def write(self, folder: Path) -> None:
        """Write FOLDER/plan.npz."""
        np.savez(
            folder / PLAN,
            pack_ptr=self.pack_ptr,
            doc_ids=self.pieces.doc,
            starts=self.pieces.start,
            lengths=self.pieces.length,
            source=self.source,
        )


def stream_of(facts: PlanFacts, plan: PackPlan, seed: int) -> batches.Stream:
    """Return the endless order of a plan's packs."""
    linear, quadratic = facts["cost"]
    costs = plan.costs(linear, quadratic)
    return batches.Stream(costs, plan.source, tuple(facts["weights"]), group=facts["group"], seed=seed)


@dataclass(frozen=True)
class Pack:
    """Represents one training sequence of L tokens. A document fills a slot of a multiple of `align`; a slot sees only
    itself."""

    ids: np.ndarray  # int64[L]; padding holds the pad id
    labels: np.ndarray  # int64[L], the next token of the same document; the pad id where there is none
    loss_mask: np.ndarray  # float32[L], 1 where the label is in the loss; 0 on each document's last token and padding
    positions: np.ndarray  # int64[L], from 0 in every slot
    cu_seqlens: np.ndarray  # int32[slots + 1], slot boundaries from 0 to L; after the documents' slots those of padding
    doc_ids: np.ndarray  # int64[documents], rows of the store, in the order of slots; fewer where there is tail padding


class PackReader:
    """Represents the packs of a plan over its store. Raise UserMistake when either is damaged or the plan is another
    store's.

    `pad_id` fills ids and labels where there is no token; its value is never in the loss nor seen by a document.
    """

    def __init__(self, store: Path, plan: Path, pad_id: int = 0):
        self.store = Store(store)
        self.pad_id = pad_id
        self.facts, self.plan = read_plan(Path(plan))
        if self.facts["store"] != self.store.digest:
            raise UserMistake(f"plan {plan} was made for another store than {store}; run pack on that store")
        self.pack_length, self.align = self.facts["pack_length"], self.facts["align"]
        self.digest = sha256_bytes(canonical_json(self.facts))
        self._streams: dict[int, batches.Stream] = {}

    @property
    def n_packs(self) -> int:
        return len(self.plan.source)

    def stream(self, seed: int) -> batches.Stream:
        """Return the endless order of the packs; the stream of a seed is made once."""
        if seed not in self._streams:
            self._streams[seed] = stream_of(self.facts, self.plan, seed)
        return self._streams[seed]

    def batch(self, k: int, global_batch: int, seed: int) -> list[int]:
        """Return the packs of global batch k (from 0), whatever the number of ranks."""
        return self.stream(seed).batch(k, global_batch).tolist()

    def share(self, k: int, global_batch: int, seed: int, rank: int, ranks: int) -> list[int]:
        """Return those of them that data-parallel rank `rank` of `ranks` trains, in order, dealt by predicted cost."""
        packs, stream = self.stream(seed).batch(k, global_batch), self.stream(seed)
        return packs[batches.deal(stream.costs[packs], ranks)[:, rank]].tolist()

    def padding(self, i: int) -> int:
        """Return tokens of pack i that are no document's."""
        own = slice(int(self.plan.pack_ptr[i]), int(self.plan.pack_ptr[i + 1]))
        return self.pack_length - int(self.plan.pieces.length[own].sum(dtype=np.int64))

    def documents(self, i: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (row of the store, ids int32[n], mask uint8[n]) of each document of pack i, as far as it lies in the
        pack."""
        pieces, store = self.plan.pieces, self.store
        for place in range(int(self.plan.pack_ptr[i]), int(self.plan.pack_ptr[i + 1])):
            row, start, length = int(pieces.doc[place]), int(pieces.start[place]), int(pieces.length[place])
            yield row, store.ids(row)[start : start + length], store.mask(row)[start : start + length]

    def pack(self, i: int) -> Pack:
        """Pack i, from 0."""
        length, pieces = self.pack_length, self.plan.pieces
        own = slice(int(self.plan.pack_ptr[i]), int(self.plan.pack_ptr[i + 1]))
        doc_ids, lengths = np.array(pieces.doc[own]), pieces.length[own].astype(np.int64)  # copies: those lie in a file
        slots = -(-lengths // self.align) * self.align
        cu_seqlens = np.concatenate([[0], np.cumsum(slots)])
        ids = np.full(length, self.pad_id, dtype=np.int64)
        mask = np.zeros(length + 1, dtype=np.float32)
        firsts = self.store.offsets[doc_ids] + pieces.start[own]
        for start, first, n in zip(cu_seqlens.tolist(), firsts.tolist(), lengths.tolist()):
            ids[start : start + n] = self.store.all_ids[first : first + n]
            mask[start + 1 : start + n] = self.store.all_masks[first + 1 : first + n]
        labels = np.append(ids[1:], self.pad_id)
        labels[cu_seqlens[1:] - 1] = self.pad_id
        cu_seqlens = padded_to(cu_seqlens, length, self.align)
        positions = np.arange(length, dtype=np.int64) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
        return Pack(
            ids=ids,
            labels=labels,
            loss_mask=mask[1:],
            positions=positions,
            cu_seqlens=cu_seqlens.astype(np.int32),
            doc_ids=doc_ids,
        )


def padded_to(cu_seqlens: np.ndarray, length: int, unit: int) -> np.ndarray:
    """Return the ends of documents (from 0 on), and after them of the slots that fill a row of `length` tokens up;
    multiples of `unit` as they are."""
    slot = -(-PADDING_SLOT // unit) * unit
    ends = np.concatenate([cu_seqlens, np.arange(cu_seqlens[-1] + slot, length, slot)])
    return np.append(ends, length) if ends[-1] < length else ends


def read_plan(folder: Path) -> tuple[PlanFacts, PackPlan]:
    """Return (facts, plan) of a pack output, whose pieces are mapped. Raise UserMistake when it is none or damaged.

    All is read once, for its sums: SHA-256 where plan.json has no others.
    """
    remedy = "restore it or run pack again"
    for name in (FACTS, PLAN):
        if not (folder / name).is_file():
            raise UserMistake(f"{folder} is no pack plan: it has no {name}; give a pack output")
    try:
        facts = read_json(folder / FACTS)
        digest = [facts[name] for name in ("pack_length", "align", "weights", "group", "cost", "store", "plan")][-1]
    except (ValueError, KeyError, TypeError):
        raise UserMistake(f"{folder / FACTS} is damaged: not the JSON of a plan; {remedy}") from None
    try:
        with open(folder / PLAN, "rb") as file:
            columns = mapped_npz.columns(file)
        data = mapped_npz.mapped(folder / PLAN)
        ptr, doc, start, length, source = (mapped_npz.array(data, columns[name]) for name in _ARRAYS)
        plan = PackPlan(np.array(ptr), Pieces(doc, start, length), np.array(source))
        sums = {name: mapped_npz.crc32(data, columns[name]) for name in _ARRAYS}
        if any(sums[name] != columns[name].crc32 for name in _ARRAYS):
            raise ValueError("a sum is wrong")
    except mapped_npz.UNREADABLE as error:
        raise UserMistake(f"{folder / PLAN} is damaged ({error}); {remedy}") from None
    if sums != facts["crc32"] if "crc32" in facts else plan.digest() != digest:
        raise UserMistake(f"{folder / PLAN} is damaged: its content is not what plan.json names; {remedy}")
    return facts, plan


def sums_of(folder: Path) -> dict[str, int]:
    """Return the CRC-32 of each array in FOLDER/plan.npz, as its directory has them."""
    with open(folder / PLAN, "rb") as file:
        columns = mapped_npz.columns(file)
    return {name: columns[name].crc32 for name in _ARRAYS}
