"""Conversations, or a task's rows → a token store and its balance sheet, split over any number of array elements.

Every element takes its share of every input file (data_tools/records/readers.py) and the like share of the synthetic rows, and
writes a shard. `finish` joins the shards source by source, so the store has the same bytes for every number of
elements, workers and chunk sizes.

    record ──schema──> conversation ──template──> text and spans ──tokenise──> store
       │ malformed_line   │ no_assistant,            │ template_error,   │ too_long, (finish) duplicate
       │ malformed_record │ empty_assistant,         │ turn_unclear, reasoning_lost, tool_call_lost,
       │ ambiguous_schema │ malformed_tool_call,     │ nothing_trained, …
                          │ refused_key, openthoughts_markers
"""

import contextlib
import functools
import hashlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Union

import numpy as np

from data_tools.base.declared import setting
from data_tools.chats.chat import ChatConfig, ChatRows, Encoded, Refused, Result, check_chat, encode_row
from data_tools.chats.conversation import BadRecord
from data_tools.chats.encoder import ENCODERS, Encoder, check_encoder
from data_tools.chats.fields import remedies
from data_tools.chats.tokenizer import Tokenizer, is_path, load_tokenizer
from data_tools.mistake import Problem, UserMistake
from data_tools.packs.store import Provenance, RowText, Store, StoreWriter, row_text
from data_tools.progress import Progress, silent
from data_tools.records import readers, sources
from data_tools.records.balance import Balance, SourceBalance
from data_tools.tasks.task import Row, Source, check_rows, check_source, load_row_task, rows_of, task_options

ON_BAD_ROW = ("fail", "bucket")

_REPORT_EVERY = 500  # lines or rows between two calls of progress
_MERGE_ROWS = 1 << 14  # rows copied at a time by finish
_CHUNKS_AHEAD = 4  # a worker; what is read ahead of the oldest unfinished chunk


@dataclass
class Config:
    """The config of the phase materialize."""

    source: Source = setting(Source, "where the rows come from")
    tokenizer: str = setting("", "a folder or a hub name", needed=True, input="hub")
    task: str = setting("", 'the task whose rows these are; "": they are conversations', module=True)
    task_options: dict[str, Any] = setting(dict, "options of the task", free=True)
    chat: ChatConfig = setting(ChatConfig, "how conversations become tokens")
    format: str = setting("auto", "format of the files, plain or under gzip or zstd", choices=readers.FORMATS)
    max_tokens: int = setting(0, "tokens of a row, end token included; 0: no limit", unit="tokens", least=0)
    dedupe: bool = setting(True, "of equal rows, the same text with the same loss mask, the first is kept")
    on_bad_row: str = setting("fail", "what a malformed record does: bucket counts it", choices=ON_BAD_ROW)
    encoder: str = setting("auto", "what encodes; all give the same ids", choices=ENCODERS, keyed=False)
    workers: int = setting(1, "processes of an element", unit="processes", least=1, keyed=False)
    chunk_size: int = setting(16, "records handed to a worker at a time", unit="records", least=1, keyed=False)

    @staticmethod
    def meaning(config: "Config") -> dict[str, Any]:
        """Return what the settings have come to mean since stores were first sealed, for the key (jobs/kind.py)."""
        return {} if config.task else {"loss": "through the stop token"}


def check(config: Config) -> list[Problem]:
    """Wrong values, all at once; opens no file, since upstream phases may have yet to make them."""
    if config.task:
        problems = check_rows(config.task, config.task_options, config.source)
    else:
        problems = _check_conversations(config)
    problems += check_encoder(config.encoder)
    return problems


def _check_conversations(config: Config) -> list[Problem]:
    problems = [Problem(f"chat.{problem.where}", problem.message) for problem in check_chat(config.chat)]
    problems += check_source(config.source)
    if config.source.synthetic_rows:
        message = "only a task makes rows; name one in task, or give inputs alone"
        problems.append(Problem("source.synthetic_rows", message))
    if config.task_options:
        problems.append(Problem("task_options", "no task takes them; name one in task"))
    return problems


def _check_files(config: Config) -> Iterator[Problem]:
    for place, name in enumerate(config.source.inputs):
        if not Path(name).expanduser().is_file():
            yield Problem(f"source.inputs[{place}]", f"no file {name}; give files that exist")
    if is_path(config.tokenizer) and not Path(config.tokenizer).expanduser().is_dir():
        yield Problem("tokenizer", f"no folder {config.tokenizer}; give a tokenizer's folder or a hub name")


def materialize(config: Config, out: Path, index: int, count: int, progress: Progress = silent) -> dict[str, Any]:
    """Write the shard of element `index` of `count` into the empty folder `out`; returns its facts.

    UserMistake `FILE:LINE: reason` for a malformed record unless they are counted, and for every problem of `check`.
    """
    if not 0 <= index < count:
        raise ValueError(f"element {index} of {count}")
    problems = [*check(config), *_check_files(config)]
    if problems:
        raise UserMistake(problems)
    writer = StoreWriter(out)
    with _line_maker(config) as lines_of:
        element = _Element(config, lines_of, writer, progress)
        sheets = [element.add_file(place, name, index, count) for place, name in enumerate(config.source.inputs)]
        if config.source.synthetic_rows:
            sheets.append(element.add_synthetic(len(sheets), index, count))
    facts = writer.close()
    return _write_balance(Balance(sheets), facts, out)


# -- records to rows, in this process or in workers --------------------------------------------------------------------


class Malformed(NamedTuple):
    """A record that gives no rows; a `fatal` one is a fault of the settings, whatever on_bad_row says."""

    bucket: str
    reason: str = ""
    fatal: bool = False


class Kept(NamedTuple):
    """What the store gets of a row: `Encoded` with its text as hashes, so that a worker's text does not travel."""

    ids: np.ndarray
    mask: np.ndarray
    text: RowText
    turns: int


Line = Union[Malformed, list[Kept | Refused]]  # what became of one record


class _Rows:
    """One shard's rows of conversations or of a task; made once in every process that works on it."""

    def __init__(self, config: Config):
        self.max_tokens, self.is_task = config.max_tokens, bool(config.task)
        tokenizer = load_tokenizer(config.tokenizer)
        tokenizer.check_end()
        if config.task:
            self._rows_of = TaskRows(config, tokenizer).rows
        else:
            self._rows_of = ChatRows(config.chat, tokenizer, Encoder(tokenizer, config.encoder)).rows

    def lines(self, chunk: list[Any]) -> list[Line]:
        return [self._line(raw) for raw in chunk]

    def _line(self, raw: Any) -> Line:
        """`raw` is a line as bytes, or a value that was read from JSON or Parquet."""
        if readers.is_blank(raw):
            return Malformed("blank_line")
        try:
            record = raw if self.is_task else readers.value_of(raw)  # a task parses its lines itself
        except ValueError as error:
            return Malformed("malformed_line", str(error))
        try:
            return [self._kept(row) for row in self._rows_of(record)] or Malformed("no_rows")
        except BadRecord as error:
            return Malformed(error.bucket, str(error))
        except UserMistake as mistake:
            return Malformed("", str(mistake), fatal=True)

    def _kept(self, row: Result) -> "Kept | Refused":
        if isinstance(row, Refused):
            return row
        if self.max_tokens and len(row.ids) > self.max_tokens:
            return Refused("too_long", len(row.ids))
        return Kept(row.ids, row.mask, row_text(row.prompt, row.answer), row.turns)


class TaskRows:
    """The rows of a task's records."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        self.task = load_row_task(config.task)
        self.options = task_options(self.task, config.task_options)
        self.split, self.seed = config.source.synthetic_split, config.source.synthetic_seed
        self.tokenizer = tokenizer

    def rows(self, record: Any) -> Iterator[Result]:
        """Those of a record as a share gives it, or of a synthetic row's number. Raises BadRecord."""
        if isinstance(record, SyntheticRow):
            yield self._result(self.task.synthetic_row(self.seed, record.number, self.split))
            return
        try:
            rows = rows_of(self.task, record)
        except ValueError as error:
            raise BadRecord(str(error), "malformed_line") from None
        yield from map(self._result, rows)

    def _result(self, row: Row) -> Result:
        bucket = self.task.verify(row)
        if bucket is not None:
            return Refused(bucket)
        row = self.task.canonical(row)
        ids, mask = encode_row(self.tokenizer, row.prompt, self.task.encode_answer(row.answer, self.options))
        if self.tokenizer.unk_id is not None and (ids[:-1] == self.tokenizer.unk_id).any():  # GPT-2 ends with its unk
            return Refused("unknown_character", len(ids))
        return Encoded(ids, mask, row.prompt, row.answer, 1)


class SyntheticRow(NamedTuple):
    number: int


LinesOf = Callable[[Iterable[list[Any]]], Iterator[list[Line]]]


@contextlib.contextmanager
def _line_maker(config: Config) -> Iterator[LinesOf]:
    """Gives a function from chunks of records to chunks of lines, in the same order."""
    if config.workers == 1:
        rows = _Rows(config)
        yield lambda chunks: map(rows.lines, chunks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.workers, context, _start_worker, (config,)) as pool:
        try:
            yield lambda chunks: _in_order(pool, chunks, _CHUNKS_AHEAD * config.workers)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, chunks: Iterable[list[Any]], ahead: int) -> Iterator[list[Line]]:
    waiting: deque[Future] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(_work, chunk))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _start_worker(config: Config) -> None:
    """In a worker: remember the config, and leave when the element's process is gone."""
    global _rows
    _rows = functools.cache(lambda: _Rows(config))
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (multiprocessing.connection.wait([parent]), os._exit(1)), daemon=True).start()


def _work(chunk: list[Any]) -> list[Line]:
    return _rows().lines(chunk)


# -- an element -------------------------------------------------------------------------------------------------------


class _Element:
    """One element at work: rows of its shares go to the writer, their counts to a sheet a source."""

    def __init__(self, config: Config, lines_of: LinesOf, writer: StoreWriter, progress: Progress):
        self.config = config
        self.lines_of = lines_of
        self.writer = writer
        self.progress = progress

    def add_file(self, source: int, name: str, index: int, count: int) -> SourceBalance:
        path = Path(name).expanduser()
        share = readers.open_share(path, index, count, self.config.format)
        sheet = SourceBalance(name)
        for line in self._lines(share):
            sheet.lines += 1
            if sheet.lines % _REPORT_EVERY == 0:
                self.progress(share.done, share.total, share.unit, name)
            self._add_line(line, source, sheet, share)
        self.progress(share.total, share.total, share.unit, name)
        return sheet

    def add_synthetic(self, source: int, index: int, count: int) -> SourceBalance:
        wanted = self.config.source
        sheet = SourceBalance(sources.synthetic_name(wanted))
        start, stop = index * wanted.synthetic_rows // count, (index + 1) * wanted.synthetic_rows // count
        for line in self._lines(map(SyntheticRow, range(start, stop))):
            sheet.lines += 1
            self._add_line(line, source, sheet)
            if sheet.lines % _REPORT_EVERY == 0 or sheet.lines == stop - start:
                self.progress(sheet.lines, stop - start, "rows", sheet.name)
        return sheet

    def _lines(self, records: Iterable[Any]) -> Iterator[Line]:
        records = iter(records)
        chunks = iter(lambda: list(itertools.islice(records, self.config.chunk_size)), [])
        return itertools.chain.from_iterable(self.lines_of(chunks))

    def _add_line(self, line: Line, source: int, sheet: SourceBalance, share: readers.Share | None = None) -> None:
        """`sheet.lines` is this line's number within the share."""
        if isinstance(line, Malformed):
            self._refuse(line.reason, line.fatal, sheet, share)
            sheet.lines_dropped[line.bucket] += 1
            return
        sheet.lines_with_rows += 1
        for row in line:
            sheet.rows += 1
            if isinstance(row, Refused):
                self._refuse(row.reason, False, sheet, share)
                sheet.refuse(row.bucket, row.tokens)
                continue
            self.writer.add(row.ids, row.mask, Provenance(source, sheet.lines, row.text, row.turns))
            sheet.keep(len(row.ids), int(np.count_nonzero(row.mask)))

    def _refuse(self, reason: str, fatal: bool, sheet: SourceBalance, share: readers.Share | None) -> None:
        """UserMistake with the place, where the data is at fault and may not be, or the settings are."""
        if reason and (fatal or self.config.on_bad_row == "fail"):
            place = share.place(sheet.lines) if share else f"{sheet.name}, row {sheet.lines}"
            remedy = "" if fatal else "; mend the record, or set on_bad_row: bucket"
            raise UserMistake(Problem(place, f"{reason}{remedy}"))


# -- the balance and the fan-in ---------------------------------------------------------------------------------------


def _write_balance(balance: Balance, store: dict[str, Any], out: Path) -> dict[str, Any]:
    """Check the sheet, against the store too, and write it; returns the facts: counts, buckets and the table."""
    total = balance.total()
    counted = {"rows": total.kept, "tokens": total.tokens, "supervised": total.supervised}
    if any(store[name] != value for name, value in counted.items()):
        raise ValueError(f"the balance counts {counted}, the store holds {[store[name] for name in counted]}")
    balance.write(out)
    facts = {name: getattr(total, name) for name in ("lines", "rows", "kept", "tokens_in", "tokens", "supervised")}
    return {**facts, "buckets": dict(total.lines_dropped + total.dropped), "table": balance.table()}


def finish(config: Config, parts: list[Path], out: Path) -> dict[str, Any]:
    """Join the shards of all elements, in element order, into one store in the empty folder `out`; returns its facts.

    Rows come source by source and in the order of the source; of equal rows the first is kept when `dedupe`. Rows of
    one text that train different parts of it are not equal. One that trains nothing was dropped before, as such.
    UserMistake when no row is left.
    """
    stores = [Store(part) for part in parts]
    sheets = [Balance.read(part) for part in parts]
    balance = sheets[0]
    for sheet in sheets[1:]:
        balance = balance + sheet
    pieces = _source_major(stores, sheets)
    keep = _first_of_equals(pieces) if config.dedupe else None
    writer = StoreWriter(out)
    done = 0
    for piece in pieces:
        for start in range(piece.start, piece.stop, _MERGE_ROWS):
            stop = min(start + _MERGE_ROWS, piece.stop)
            kept = keep[done : done + stop - start] if keep is not None else np.ones(stop - start, dtype=bool)
            piece.copy(start, stop, kept, writer, balance.sources[piece.source])
            done += stop - start
    if writer.rows == 0:
        buckets = balance.total().dropped + balance.total().lines_dropped
        advice = "; ".join(remedies(buckets)) or "check inputs and tokenizer"
        raise UserMistake(f"no row is left of {balance.total().rows}: {_spell(buckets)}; {advice}")
    return _write_balance(balance, writer.close(), out)


def _spell(buckets: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(buckets.items())) or "the inputs are empty"


@dataclass
class _Piece:
    """The rows of one source in one element's store, and how many lines of the source precede them."""

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
    """Source by source, and within a source element by element: the order of one element that does it all."""
    pieces = []
    for source in range(len(sheets[0].sources)):
        lines = 0
        for store, sheet in zip(stores, sheets):
            start, stop = np.searchsorted(store.sources, [source, source + 1])  # an element writes sources in order
            pieces.append(_Piece(store, source, int(start), int(stop), lines))
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
