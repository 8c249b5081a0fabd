"""The token store: tokenised rows on disk, immutable once closed, memory-mapped for reading.

    tokens.bin, tokens.idx                       int32 token ids      Megatron's IndexedDataset, one row a document
    tokens_loss_mask.bin, tokens_loss_mask.idx   uint8, 1 = in loss   the same lengths
    rows.npz                                     where each row came from, and hashes of its text
    store.json                                   counts, and the SHA-256 of the files above: the store's digest

Layout of an .idx (megatron.core.datasets.indexed_dataset, version 1, little endian):

    "MMIDIDX\\0\\0" | u64 version | u8 dtype code | u64 sequences n | u64 n + 1
    | i32 lengths[n] (tokens) | i64 offsets[n] (bytes in .bin) | i64 documents[n + 1]
"""

import contextlib
import hashlib
import json
import struct
import zipfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np

from data_tools.base import mapped_npz
from data_tools.base.durable import CHUNK, canonical_json, fsync_tree, sha256_bytes, sha256_file, write_json
from data_tools.base.one_file import Files
from data_tools.mistake import UserMistake

TOKENS, LOSS_MASK, ROWS, FACTS = "tokens", "tokens_loss_mask", "rows.npz", "store.json"

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES = {np.dtype(np.uint8): 1, np.dtype(np.int32): 4}  # megatron's DType enum

# One row of provenance; hashes are the first 128 bits of SHA-256, as two words.
RECORD = np.dtype(
    [
        ("length", "<i4"),
        ("source", "<i4"),
        ("line", "<i8"),
        ("turns", "<i4"),
        ("prompt_hash", "<u8", 2),
        ("row_hash", "<u8", 2),
    ]  # fmt: skip
)
_COLUMNS = ("source", "line", "turns", "prompt_hash", "row_hash")
_BATCH = 1 << 16  # rows held in memory at a time while writing


Words = tuple[int, int]


class RowText(NamedTuple):
    """Says what is kept of a row's text: hashes of its prompt, and of prompt and answer."""

    prompt_hash: Words
    row_hash: Words


class Provenance(NamedTuple):
    """Says where a row came from: index of its source, line in it (from 1; of JSON and Parquet the row), its text as
    `row_text` keeps it. `turns` counts the assistant turns in the loss."""

    source: int
    line: int
    text: RowText
    turns: int = 1


def text_hash(text: str) -> Words:
    """Return 128 bits of the SHA-256 over the length-prefixed text, as two unsigned 64-bit words."""
    return row_text(text, "").prompt_hash


def row_text(prompt: str, answer: str) -> RowText:
    """Return the hashes of a row's text; the second is over both parts, each with its length before it."""
    digest, words = hashlib.sha256(), []
    for part in (prompt, answer):
        data = part.encode("utf-8", "surrogatepass")  # JSON may spell lone surrogates
        digest.update(struct.pack("<Q", len(data)))
        digest.update(data)
        words.append(struct.unpack_from("<2Q", digest.digest()))
    return RowText(*words)


class StoreFacts(TypedDict):
    """Holds what store.json says; `sha256` by the name of the file."""

    rows: int
    tokens: int
    supervised: int
    sha256: dict[str, str]


class StoreWriter:
    """Appends rows to a new store in an existing, empty folder. Memory is flat: rows spool to disk.

    Nothing but `close` makes it a store; a folder left behind without it has no store.json.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._tokens = open(self.folder / f"{TOKENS}.bin", "wb")
        self._mask = open(self.folder / f"{LOSS_MASK}.bin", "wb")
        self._spool = open(self.folder / ".rows.spool", "wb+")
        self._pending: list[tuple] = []
        self.rows = self.tokens = self.supervised = 0

    def add(self, ids: np.ndarray, mask: np.ndarray, provenance: Provenance) -> None:
        """Append one row: ids int32[n] and mask uint8[n] (0 or 1), n ≥ 1."""
        if len(ids) != len(mask) or len(ids) == 0:
            raise ValueError(f"a row of {len(ids)} ids and {len(mask)} mask values")
        source, line, text, turns = provenance
        self._pending.append((len(ids), source, line, turns, *text))
        self._write(ids, mask, 1)
        if len(self._pending) >= _BATCH:
            self._flush()

    def add_records(self, ids: np.ndarray, mask: np.ndarray, records: np.ndarray) -> None:
        """Append many rows at once: concatenated ids and mask, and their `RECORD`s, as `Store.records` gives them."""
        if not len(ids) == len(mask) == int(records["length"].sum(dtype=np.int64)):
            raise ValueError(f"{len(ids)} ids, {len(mask)} mask values, {records['length'].sum()} tokens in records")
        self._flush()
        self._write(ids, mask, len(records))
        self._spool.write(np.ascontiguousarray(records, dtype=RECORD).tobytes())

    def _write(self, ids: np.ndarray, mask: np.ndarray, rows: int) -> None:
        self._tokens.write(np.ascontiguousarray(ids, dtype="<i4").tobytes())
        self._mask.write(np.ascontiguousarray(mask, dtype=np.uint8).tobytes())
        self.rows += rows
        self.tokens += len(ids)
        self.supervised += int(np.count_nonzero(mask))

    def _flush(self) -> None:
        if self._pending:
            self._spool.write(np.array(self._pending, dtype=RECORD).tobytes())
            self._pending = []

    def close(self) -> StoreFacts:
        """Write indices, provenance and store.json, make everything durable; return the facts of store.json."""
        self._flush()
        for file in (self._tokens, self._mask, self._spool):
            file.flush()
        spool = self.folder / ".rows.spool"
        records = np.memmap(spool, dtype=RECORD, mode="r") if self.rows else np.empty(0, dtype=RECORD)
        _write_index(self.folder / f"{TOKENS}.idx", records["length"], np.dtype(np.int32))
        _write_index(self.folder / f"{LOSS_MASK}.idx", records["length"], np.dtype(np.uint8))
        _write_npz(self.folder / ROWS, {name: records[name] for name in _COLUMNS})
        del records
        for file in (self._tokens, self._mask, self._spool):
            file.close()
        spool.unlink()
        files = (f"{TOKENS}.bin", f"{TOKENS}.idx", f"{LOSS_MASK}.bin", f"{LOSS_MASK}.idx", ROWS)
        facts: StoreFacts = {
            "rows": self.rows,
            "tokens": self.tokens,
            "supervised": self.supervised,
            "sha256": {name: sha256_file(self.folder / name) for name in files},
        }
        fsync_tree(self.folder)
        write_json(self.folder / FACTS, facts)
        return facts


def _blocks(array: np.ndarray) -> Iterable[np.ndarray]:
    return (array[start : start + _BATCH] for start in range(0, len(array), _BATCH))


def _write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    rows = len(lengths)
    with open(path, "wb") as file:
        file.write(_HEADER.pack(_MAGIC, _VERSION, _DTYPE_CODES[dtype], rows, rows + 1))
        for block in _blocks(lengths):
            file.write(block.astype("<i4").tobytes())
        offset = 0
        for block in _blocks(lengths):
            ends = offset + np.cumsum(block, dtype=np.int64) * dtype.itemsize
            file.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
            offset = int(ends[-1])
        for start in range(0, rows + 1, _BATCH):
            file.write(np.arange(start, min(start + _BATCH, rows + 1), dtype="<i8").tobytes())


def _write_npz(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Write what `np.savez` would, block by block, so that a column need not fit in memory; the same columns give the
    same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, column in columns.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                header = {"descr": column.dtype.str, "fortran_order": False, "shape": column.shape}
                np.lib.format.write_array_header_1_0(file, header)
                for block in _blocks(column):
                    file.write(np.ascontiguousarray(block).tobytes())


class Store:
    """Represents a closed store, memory-mapped. Raise UserMistake naming the file when one is missing, cut short or
    inconsistent.

    A file is mapped when something of it is asked for; what training never asks for costs neither memory nor reading.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        try:
            self._files = Files(self.folder)
            self.facts: StoreFacts = json.loads(self._files.read(FACTS))
            self._rows = self.facts["rows"]
        except FileNotFoundError:
            remedy = "give a materialize output"
            raise UserMistake(f"{self.folder} is no token store: it has no {FACTS}; {remedy}") from None
        except (*mapped_npz.UNREADABLE, TypeError, RecursionError):
            raise _damaged(self.folder / FACTS, "not the JSON of a store") from None
        self.tokens = self._check_indexed(TOKENS, np.dtype("<i4"))
        self._check_indexed(LOSS_MASK, np.dtype(np.uint8))
        masked = _lengths(self._map(f"{LOSS_MASK}.idx"), self._rows)
        if not all(map(np.array_equal, _blocks(self.lengths), _blocks(masked))):
            raise _damaged(self.folder / f"{LOSS_MASK}.idx", "its lengths are not those of tokens.idx")
        self._columns = self._check_rows()
        self._checked: set[str] = set()  # columns that were read whole once

    def close(self) -> None:
        """Give up what is mapped; what is asked for later is mapped anew."""
        for name in ("lengths", "offsets", "all_ids", "all_masks", "_provenance"):
            self.__dict__.pop(name, None)
        self._files.close()

    def __len__(self) -> int:
        return self._rows

    @property
    def digest(self) -> str:
        """Return the SHA-256 over the facts, which hold the SHA-256 of every file: names the content."""
        return sha256_bytes(canonical_json(self.facts))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Return int32[rows], tokens of each row."""
        return _lengths(self._map(f"{TOKENS}.idx"), self._rows)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Return int64[rows], first token of each row: its first byte in the file of masks, of a byte a token."""
        return _offsets(self._map(f"{LOSS_MASK}.idx"), self._rows)

    @cached_property
    def all_ids(self) -> np.ndarray:
        """Return int32[tokens], the token ids of all rows."""
        return self._map(f"{TOKENS}.bin").view("<i4")

    @cached_property
    def all_masks(self) -> np.ndarray:
        """Return uint8[tokens], the loss masks of all rows."""
        return self._map(f"{LOSS_MASK}.bin")

    def ids(self, row: int) -> np.ndarray:
        """Return int32[n] token ids of a row."""
        return self.all_ids[self._slice(row, row + 1)]

    def mask(self, row: int) -> np.ndarray:
        """Return uint8[n], 1 where the token is in the loss."""
        return self.all_masks[self._slice(row, row + 1)]

    def span(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, mask) of rows [start, stop), concatenated."""
        tokens = self._slice(start, stop)
        return self.all_ids[tokens], self.all_masks[tokens]

    def records(self, start: int, stop: int) -> np.ndarray:
        """Return `RECORD`s of rows [start, stop)."""
        records = np.empty(stop - start, dtype=RECORD)
        records["length"] = self.lengths[start:stop]
        for name in _COLUMNS:
            records[name] = self._column(name)[start:stop]
        return records

    @property
    def sources(self) -> np.ndarray:
        """Return int32[rows], index of each row's source in its balance sheet."""
        return self._column("source")

    @property
    def lines(self) -> np.ndarray:
        """Return int64[rows], line in the source, from 1."""
        return self._column("line")

    @property
    def turns(self) -> np.ndarray:
        """Return int32[rows], assistant turns in the loss."""
        return self._column("turns")

    @property
    def prompt_hashes(self) -> np.ndarray:
        """Return uint64[rows, 2], `text_hash` of the prompt."""
        return self._column("prompt_hash")

    @property
    def row_hashes(self) -> np.ndarray:
        """Return uint64[rows, 2], `text_hash` of prompt and answer."""
        return self._column("row_hash")

    @cached_property
    def _provenance(self) -> np.ndarray:
        return self._map(ROWS)

    def _column(self, name: str) -> np.ndarray:
        """Return a column of rows.npz, mapped; the first time its sum (CRC-32) is compared, which reads all of it."""
        if name not in self._checked:
            self._check_column(name)
            self._checked.add(name)
        return mapped_npz.array(self._provenance, self._columns[name])

    def _slice(self, start: int, stop: int) -> slice:
        first = int(self.offsets[start]) if start < len(self) else self.tokens
        last = int(self.offsets[stop]) if stop < len(self) else self.tokens
        return slice(first, last)

    # -- checks ----------------------------------------------------------------------------------------------------

    def _check_indexed(self, name: str, dtype: np.dtype) -> int:
        """Return how many tokens one .idx/.bin pair holds, both checked block by block."""
        index_path, bin_path, rows = self.folder / f"{name}.idx", self.folder / f"{name}.bin", self._rows
        index = self._map(index_path.name)
        if len(index) < _HEADER.size:
            raise _damaged(index_path, f"{len(index)} bytes, less than the {_HEADER.size} of its header")
        magic, version, code, sequences, documents = _HEADER.unpack(index[: _HEADER.size].tobytes())
        expected = (_MAGIC, _VERSION, _DTYPE_CODES[dtype], rows, rows + 1)
        if (magic, version, code, sequences, documents) != expected:
            raise _damaged(index_path, f"header {(magic, version, code, sequences, documents)}, expected {expected}")
        size = _HEADER.size + 4 * rows + 8 * rows + 8 * (rows + 1)
        if len(index) != size:
            raise _damaged(index_path, f"{len(index)} bytes, {size} expected for {rows} rows")
        tokens = 0
        for lengths, offsets in zip(_blocks(_lengths(index, rows)), _blocks(_offsets(index, rows))):
            ends = tokens + np.cumsum(lengths, dtype=np.int64)
            if lengths.min() < 1 or not np.array_equal(offsets, (ends - lengths) * dtype.itemsize):
                raise _damaged(index_path, "its lengths and offsets disagree")
            tokens = int(ends[-1])
        held = self._size(bin_path.name)
        if held != tokens * dtype.itemsize:
            raise _damaged(bin_path, f"{held} bytes, {tokens * dtype.itemsize} expected for {tokens} tokens")
        return tokens

    def _check_rows(self) -> dict[str, mapped_npz.Column]:
        """Return the columns of rows.npz; their headers are checked, values are not read."""
        self._size(ROWS)
        with _naming_damage(self.folder / ROWS), self._files.open(ROWS) as file:
            columns = mapped_npz.columns(file)
            for name in _COLUMNS:
                column, wanted = columns[name], RECORD[name]
                if (column.dtype, column.shape[1:]) != (wanted.base, wanted.shape):
                    raise ValueError(f"{name} is {column.dtype} {column.shape}")
                if column.shape[:1] != (self._rows,):
                    raise ValueError(f"{column.shape[0]} values of {name} for {self._rows} rows")
        return columns

    def _check_column(self, name: str) -> None:
        with _naming_damage(self.folder / ROWS), self._files.open(ROWS) as file:
            with zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as column:
                while column.read(CHUNK):  # at its end the archive compares its sum
                    pass

    def _size(self, name: str) -> int:
        try:
            return self._files.size(name)
        except FileNotFoundError:
            path = self.folder / name
            raise UserMistake(f"{path} is missing from its token store; restore it or run materialize again") from None

    def _map(self, name: str) -> np.ndarray:
        self._size(name)
        try:
            return self._files.mapped(name)
        except EOFError as error:
            raise _damaged(self.folder / name, str(error)) from None


def _damaged(path: Path, what: str) -> UserMistake:
    return UserMistake(f"{path} is damaged: {what}; restore it or run materialize again")


def _lengths(index: np.ndarray, rows: int) -> np.ndarray:
    """Return int32[rows], the lengths that an index has, in tokens."""
    return np.frombuffer(index, "<i4", rows, _HEADER.size)


def _offsets(index: np.ndarray, rows: int) -> np.ndarray:
    """Return int64[rows], the first byte of each row, as an index has it."""
    return np.frombuffer(index, "<i8", rows, _HEADER.size + 4 * rows)


@contextlib.contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Say of an archive that cannot be read that it is damaged."""
    try:
        yield
    except mapped_npz.UNREADABLE as error:
        raise _damaged(path, f"not the provenance of a store ({error})") from None
