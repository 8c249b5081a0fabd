"""The shards that materialize's elements wrote → one token store, without rows that are equal, and its balance
sheet."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.chats.fields import remedies
from data_tools.mistake import UserMistake
from data_tools.packs.store import Store, StoreFacts, StoreWriter
from data_tools.records.balance import Balance, SourceBalance

_MERGE_ROWS = 1 << 14  # rows copied at a time


def write_balance(balance: Balance, store: StoreFacts, out: Path) -> dict[str, Any]:
    """Check the sheet, against the store too, and write it; return the facts: counts, buckets and the table."""
    total = balance.total()
    counted = [total.kept, total.tokens, total.supervised]
    held = [store["rows"], store["tokens"], store["supervised"]]
    if counted != held:
        raise ValueError(f"the balance counts {counted} rows, tokens and supervised ones, the store holds {held}")
    balance.write(out)
    facts = {name: getattr(total, name) for name in ("lines", "rows", "kept", "tokens_in", "tokens", "supervised")}
    return {**facts, "buckets": dict(total.lines_dropped + total.dropped), "table": balance.table()}


def join(parts: list[Path], out: Path, dedupe: bool) -> dict[str, Any]:
    """Join the shards of all elements, in element order, into one store in the empty folder `out`; return its facts.

    Rows come source by source and in the order of the source; of equal rows the first is kept when `dedupe`. Rows of
    one text that train different parts of it are not equal. One that trains nothing was dropped before, as such.
    Raise UserMistake when no row is left.
    """
    stores = [Store(part) for part in parts]
    sheets = [Balance.read(part) for part in parts]
    balance = sheets[0]
    for sheet in sheets[1:]:
        balance = balance + sheet
    pieces = _source_major(stores, sheets)
    keep = _first_of_equals(pieces) if dedupe else None
    writer = StoreWriter(out)
    done = 0
    for piece in pieces:
        for start in range(piece.start, piece.stop, _MERGE_ROWS):
            stop = min(start + _MERGE_ROWS, piece.stop)
            kept = keep[done : done + stop - start] if keep is not None else np.ones(stop - start, dtype=bool)
            piece.copy(start, stop, kept, writer=writer, sheet=balance.sources[piece.source])
            done += stop - start
    if writer.rows == 0:
        buckets = balance.total().dropped + balance.total().lines_dropped
        advice = "; ".join(remedies(buckets)) or "check inputs and tokenizer"
        raise UserMistake(f"no row is left of {balance.total().rows}: {_spell(buckets)}; {advice}")
    return write_balance(balance, writer.close(), out)


def _spell(buckets: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(buckets.items())) or "the inputs are empty"


@dataclass
class _Piece:
    """Represents the rows of one source in one element's store, and how many lines of the source precede them."""

    store: Store
    source: int
    start: int
    stop: int
    lines_before: int

    def row_hashes(self) -> np.ndarray:
        return self.store.row_hashes[self.start : self.stop]

    def copy(self, start: int, stop: int, kept: np.ndarray, writer: StoreWriter, sheet: SourceBalance) -> None:
        """Append the rows of [start, stop) that `kept` bool[stop - start] names; the others are duplicates."""
        ids, mask = self.store.span(start, stop)
        records = self.store.records(start, stop)
        records["line"] += self.lines_before
        tokens = np.repeat(kept, records["length"])  # (tokens,)
        writer.add_records(ids[tokens], mask[tokens], records[kept])
        if not kept.all():
            sheet.drop_kept("duplicate", int((~kept).sum()), int((~tokens).sum()), int(np.count_nonzero(mask[~tokens])))


def _source_major(stores: list[Store], sheets: list[Balance]) -> list[_Piece]:
    """Return the pieces source by source, and within a source by element: the order of one element that does it all."""
    pieces = []
    for source in range(len(sheets[0].sources)):
        lines = 0
        for store, sheet in zip(stores, sheets):
            start, stop = np.searchsorted(store.sources, [source, source + 1])  # an element writes sources in order
            pieces.append(_Piece(store, source, start=int(start), stop=int(stop), lines_before=lines))
            lines += sheet.sources[source].lines
    return pieces


def _first_of_equals(pieces: list[_Piece]) -> np.ndarray:
    """Return bool[rows]: whether no earlier row has the same text, by its 128-bit hash, and the same loss mask.

    Takes 40 bytes a row at the peak.
    """
    words = np.concatenate([piece.row_hashes() for piece in pieces])
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable: equal rows stay in their order
    ordered = words[order]
    repeats = np.zeros(len(words), dtype=bool)  # of the row before, in that order
    repeats[1:] = (ordered[1:] == ordered[:-1]).all(axis=1)
    first = np.ones(len(words), dtype=bool)
    ends = np.cumsum([piece.stop - piece.start for piece in pieces])
    seen: set[bytes] = set()
    for place in np.flatnonzero(repeats | np.append(repeats[1:], False)).tolist():
        if not repeats[place]:
            seen = set()
        row = int(order[place])
        number = int(np.searchsorted(ends, row, side="right"))
        mask = _mask_hash(pieces[number], row - int(ends[number]))
        first[row] = mask not in seen
        seen.add(mask)
    return first


def _mask_hash(piece: _Piece, from_end: int) -> bytes:
    """Return 16 bytes that name the loss mask of a row, counted from the piece's last one: -1."""
    return hashlib.blake2b(piece.store.mask(piece.stop + from_end).tobytes(), digest_size=16).digest()
