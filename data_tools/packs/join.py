"""The shards that materialize's elements wrote → one token store, without rows that are equal, and its balance sheet.

With a recipe, of the rows that it draws; those that it holds out become a second store, in OUT/validation.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.base.open_cache import OPEN_AT_ONCE, OpenCache
from data_tools.chats.fields import remedies
from data_tools.mistake import UserMistake
from data_tools.packs.left_out import FILE as LEFT_OUT
from data_tools.packs.left_out import join_left_out
from data_tools.packs.store import Store, StoreFacts, StoreWriter
from data_tools.recipes.draw import BUCKETS, DUPLICATE, KEPT, VALIDATION, draw, empty, undrawn
from data_tools.recipes.recipe import Recipe
from data_tools.records.balance import Balance, SourceBalance

VALIDATION_STORE = "validation"

_MERGE_ROWS = 1 << 14  # rows copied at a time
_STORES_OPEN = OPEN_AT_ONCE // 5  # each has five files


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


def join(
    parts: list[Path],
    out: Path,
    dedupe: bool,
    *,
    recipe: Recipe | None = None,
    source_of: Sequence[int] = (),
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """Join the shards of all elements, in element order, into one store in the empty folder `out`; return its facts.

    Rows come source by source and in the order of the source; of equal rows the first is kept when `dedupe`. Rows of
    one text that train different parts of it are not equal. One that trains nothing was dropped before, as such. Of a
    recipe, `source_of` gives the number of its source that each source of the store belongs to. `names` are the files
    that the list of rows left out has, by default the names of the balance sheet.
    Raise UserMistake when no row is left.
    """
    sheets = [Balance.read(part) for part in parts]
    balance = sheets[0]
    for sheet in sheets[1:]:
        balance = balance + sheet
    pieces = _source_major(parts, sheets)
    first = _first_of_equals(pieces) if dedupe else np.ones(sum(piece.stop - piece.start for piece in pieces), bool)
    fate, drawn = np.where(first, KEPT, DUPLICATE).astype(np.uint8), dict[str, Any]()
    if recipe is not None:
        fate, drawn = _draw(pieces, first, recipe, source_of=source_of, dedupe=dedupe)
    writer = StoreWriter(out)
    _copy(pieces, fate, KEPT, writer)
    held_out = _validation(pieces, fate, out, balance) if (fate == VALIDATION).any() else {}
    equal = [_lines_of(pieces, fate, source) for source in range(len(balance.sources))]
    drawn |= _left_out(parts, sheets, equal, names=names, out=out)
    _drop(pieces, fate, balance)
    if writer.rows == 0:
        buckets = balance.total().dropped + balance.total().lines_dropped
        advice = "; ".join(remedies(buckets)) or "check inputs and tokenizer"
        listed = f"; {out / LEFT_OUT} lists each with line and reason" if (out / LEFT_OUT).exists() else ""
        raise UserMistake(f"no row is left of {balance.total().rows}: {_spell(buckets)}{listed}; {advice}")
    return {**write_balance(balance, writer.close(), out), **held_out, **drawn}


def _draw(
    pieces: "list[_Piece]", first: np.ndarray, recipe: Recipe, *, source_of: Sequence[int], dedupe: bool
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return (the fate uint8[rows] of each row by a recipe, its facts), from which rows are the first of their text."""
    numbers = np.repeat([source_of[piece.source] for piece in pieces], [p.stop - p.start for p in pieces])
    hashes = np.concatenate([piece.row_hashes() for piece in pieces])
    lengths = np.concatenate([np.array(piece.store.lengths[piece.start : piece.stop]) for piece in pieces])
    if dedupe:  # a row that a validation set has and does not take may be trained on
        left = undrawn(recipe, numbers, hashes, first)
        is_validation = np.array([source.is_validation for source in recipe.sources])[numbers]
        first = np.where(is_validation, first, _first_of_equals(pieces, left))
    fate, table, short = draw(recipe, numbers, hashes, lengths.astype(np.int64), first)
    drawn = {"recipe": {"name": recipe.name, **recipe.plain()}, "short": short, "recipe_table": table}
    return fate, {**drawn, "empty": empty(recipe, numbers, fate)}


def _copy(pieces: "list[_Piece]", fate: np.ndarray, wanted: int, writer: StoreWriter) -> None:
    """Append the rows whose fate is the wanted one to a store."""
    done = 0
    for piece in pieces:
        for start in range(piece.start, piece.stop, _MERGE_ROWS):
            stop = min(start + _MERGE_ROWS, piece.stop)
            piece.copy(start, stop, fate[done : done + stop - start] == wanted, writer)
            done += stop - start


def _left_out(
    parts: list[Path], sheets: list[Balance], equal: list[Iterator[int]], names: Sequence[str], out: Path
) -> dict[str, Any]:
    """List the rows that the elements left out, and of each source the lines that are `equal` to one before; return the
    fact of it, none where there is no such row."""
    lines = [[source.lines for source in sheet.sources] for sheet in sheets]
    names = names or [source.name for source in sheets[0].sources]
    listed = join_left_out(parts, lines, equal, names=names, out=out)
    return {"left_out": {"file": LEFT_OUT, "rows": listed}} if listed else {}


def _lines_of(pieces: "list[_Piece]", fate: np.ndarray, source: int) -> Iterator[int]:
    """Yield the lines of a source whose rows equal one before them."""
    done = 0
    for piece in pieces:
        here, done = fate[done : done + piece.stop - piece.start], done + piece.stop - piece.start
        for start in range(piece.start, piece.stop if piece.source == source else piece.start, _MERGE_ROWS):
            stop = min(start + _MERGE_ROWS, piece.stop)
            equal = here[start - piece.start : stop - piece.start] == DUPLICATE
            if equal.any():
                yield from (piece.store.records(start, stop)["line"][equal] + piece.lines_before).tolist()


def _validation(pieces: "list[_Piece]", fate: np.ndarray, out: Path, balance: Balance) -> dict[str, Any]:
    """Write the rows that are held out into a store of their own; return its counts."""
    folder = out / VALIDATION_STORE
    folder.mkdir()
    writer = StoreWriter(folder)
    _copy(pieces, fate, VALIDATION, writer)
    sheets = [SourceBalance(source.name) for source in balance.sources]
    for source, bucket, rows, tokens, supervised in _counts(pieces, fate):
        if bucket == VALIDATION:
            sheet = sheets[source]
            for name in ("lines", "lines_with_rows", "rows", "kept"):
                setattr(sheet, name, getattr(sheet, name) + rows)
            for name in ("tokens_in", "tokens"):
                setattr(sheet, name, getattr(sheet, name) + tokens)
            sheet.supervised += supervised
    facts = write_balance(Balance(sheets), writer.close(), folder)
    return {VALIDATION_STORE: {name: facts[name] for name in ("rows", "tokens", "supervised")}}


def _drop(pieces: "list[_Piece]", fate: np.ndarray, balance: Balance) -> None:
    """Count on the sheet what is not kept."""
    for source, bucket, rows, tokens, supervised in _counts(pieces, fate):
        if bucket != KEPT:
            balance.sources[source].drop_kept(BUCKETS[bucket], rows, tokens, supervised)


def _counts(pieces: "list[_Piece]", fate: np.ndarray) -> list[tuple[int, int, int, int, int]]:
    """Return (source, fate, rows, tokens, supervised tokens) of each piece and fate that has rows."""
    counts, done = [], 0
    for piece in pieces:
        for start in range(piece.start, piece.stop, _MERGE_ROWS):
            stop = min(start + _MERGE_ROWS, piece.stop)
            here = fate[done : done + stop - start]
            done += stop - start
            if not here.any():  # all are kept
                continue
            _, mask = piece.store.span(start, stop)
            lengths = piece.store.lengths[start:stop]
            for bucket in np.unique(here).tolist():
                rows = here == bucket
                tokens = np.repeat(rows, lengths)
                supervised = int(np.count_nonzero(mask[tokens]))
                counts.append((piece.source, bucket, int(rows.sum()), int(tokens.sum()), supervised))
    return counts


def _spell(buckets: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(buckets.items())) or "the inputs are empty"


@dataclass
class _Piece:
    """Represents the rows of one source in one element's store, and how many lines of the source precede them."""

    stores: OpenCache[int, Store]
    part: int
    source: int
    start: int
    stop: int
    lines_before: int

    @property
    def store(self) -> Store:
        return self.stores[self.part]

    def row_hashes(self) -> np.ndarray:
        """Return uint64[rows, 2], a copy: the store's would keep its file open."""
        return np.array(self.store.row_hashes[self.start : self.stop])

    def copy(self, start: int, stop: int, chosen: np.ndarray, writer: StoreWriter) -> None:
        """Append the rows of [start, stop) that `chosen` bool[stop - start] names."""
        if not chosen.any():
            return
        ids, mask = self.store.span(start, stop)
        records = self.store.records(start, stop)
        records["line"] += self.lines_before
        tokens = np.repeat(chosen, records["length"])  # (tokens,)
        writer.add_records(ids[tokens], mask[tokens], records[chosen])


def _source_major(parts: Sequence[Path], sheets: Sequence[Balance]) -> list[_Piece]:
    """Return the pieces source by source, and within a source by element: the order of one element that does it all."""
    closed: list[Store] = []
    stores = OpenCache[int, Store](closed.__getitem__, _STORES_OPEN)  # which maps its files when it is asked
    bounds, sources = [], len(sheets[0].sources)
    for part in parts:
        store = Store(part)
        bounds.append(np.searchsorted(store.sources, range(sources + 1)).tolist())  # it wrote sources in order
        store.close()
        closed.append(store)
    pieces = []
    for source in range(sources):
        lines = 0
        for number, (places, sheet) in enumerate(zip(bounds, sheets)):
            start, stop = places[source : source + 2]
            pieces.append(_Piece(stores, number, source, start=start, stop=stop, lines_before=lines))
            lines += sheet.sources[source].lines
    return pieces


def _first_of_equals(pieces: list[_Piece], passed: np.ndarray | None = None) -> np.ndarray:
    """Return bool[rows]: whether no earlier row has the same text, by its 128-bit hash, and the same loss mask.

    Rows that are `passed` over, bool[rows], are earlier than none. Takes 40 bytes a row at the peak.
    """
    words = np.concatenate([piece.row_hashes() for piece in pieces])
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable: equal rows stay in their order
    order = order if passed is None else order[~passed[order]]
    ordered = words[order]
    repeats = np.zeros(len(order), dtype=bool)  # of the row before, in that order
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
