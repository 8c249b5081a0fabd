"""What a person wants to see of a token store or a pack plan: sizes, a histogram of lengths, and text with its mask."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.base.seeded import permutation
from data_tools.base.tables import ShownTable
from data_tools.chats.tokenizer import Tokenizer
from data_tools.packs.plan import PLAN, PackReader
from data_tools.packs.store import Store
from data_tools.records.balance import Balance


class Span(NamedTuple):
    """Represents tokens in a row that are all in the loss, or all not."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Document:
    """Represents one document as the model sees it. `tokens` counts all of it, `spans` show at most the tokens asked
    for."""

    where: str
    tokens: int
    supervised: int
    spans: list[Span]


def is_plan(folder: Path) -> bool:
    return (folder / PLAN).is_file()


def balance_table(folder: Path) -> ShownTable:
    """Return the balance sheet beside a store or a plan, as a table."""
    return Balance.read(folder).table()


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Return (least, most, documents, tokens) of lengths from one power of two to below the next, the empty ones left
    out."""
    exponent = np.frexp(lengths.astype(np.float64))[1] - 1  # floor(log2), exact
    counts = np.bincount(exponent)
    tokens = np.bincount(exponent, lengths.astype(np.float64))
    return [(1 << e, (2 << e) - 1, int(counts[e]), int(tokens[e])) for e in np.flatnonzero(counts).tolist()]


def spans_of(ids: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer, limit: int) -> list[Span]:
    """Return the first `limit` tokens, decoded run by run. A character whose bytes two runs share shows as U+FFFD."""
    ids, mask = ids[:limit], mask[:limit]
    borders = [0, *(np.flatnonzero(np.diff(mask.astype(np.int8))) + 1).tolist(), len(ids)]
    return [Span(tokenizer.decode(ids[a:b].tolist()), bool(mask[a])) for a, b in zip(borders, borders[1:])]


def store_documents(store: Store, tokenizer: Tokenizer, count: int, seed: int, limit: int) -> list[Document]:
    """Return `count` documents, drawn with `seed`."""
    rows = permutation("inspect", seed, 0, len(store))[:count].tolist()
    return [
        _document(store, row, store.mask(row), spans_of(store.ids(row), store.mask(row), tokenizer, limit))
        for row in rows
    ]


def pack_documents(reader: PackReader, pack: int, tokenizer: Tokenizer, limit: int) -> list[Document]:
    """Return the documents of one pack, in their order."""
    return [
        _document(reader.store, row, mask, spans_of(ids, mask, tokenizer, limit))
        for row, ids, mask in reader.documents(pack)
    ]


def _document(store: Store, row: int, mask: np.ndarray, spans: list[Span]) -> Document:
    where = f"document {row}, source {store.sources[row]}, line {store.lines[row]}"
    return Document(where, len(mask), int(np.count_nonzero(mask)), spans)
