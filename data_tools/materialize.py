"""Task rows → a token store and its balance sheet, split over any number of array elements.

Element i of n takes bytes [i·size/n, (i+1)·size/n) of every input file, where a line belongs to the element that holds
its first byte, and the like share of the synthetic rows. `finish` joins the shards source by source, so the store has
the same bytes for every n.

    line ──parse──> rows ──verify──> canonical ──tokenise──> store
      │ malformed     │ unparsable, wrong_answer   │ unknown_character, too_long, (finish) duplicate
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterator, Optional

import numpy as np

from data_tools.balance import Balance, SourceBalance
from data_tools.chat import Tokenizer, encode_row, is_path, load_tokenizer
from data_tools.durable import CHUNK, read_json, write_json
from data_tools.mistake import Problem, UserMistake, nearest
from data_tools.progress import Progress, silent
from data_tools.store import Provenance, Store, StoreWriter
from data_tools.tasks.task import Row, Source, Task, check_rows, load_task, task_options

BALANCE = "balance.json"
ON_BAD_ROW = ("fail", "drop")

_REPORT_EVERY = 2000  # lines or rows between two calls of progress
_MERGE_ROWS = 1 << 14  # rows copied at a time by finish


@dataclass
class Config:
    task: str = "calculator"
    task_options: Dict[str, Any] = field(default_factory=dict)
    source: Source = field(default_factory=Source)
    tokenizer: str = field(default="", metadata={"input": "hub"})  # folder or hub name
    max_tokens: int = 0  # of a row, end token included; 0 = no limit
    dedupe: bool = True  # keep the first of equal (prompt, answer)
    on_bad_row: str = "fail"  # fail | drop: what a malformed line does


def check(config: Config) -> list[Problem]:
    """Wrong values, all at once; opens no file, since upstream phases may have yet to make them."""
    problems = check_rows(config.task, config.task_options, config.source)
    if config.on_bad_row not in ON_BAD_ROW:
        problems.append(Problem("on_bad_row", f"unknown value {config.on_bad_row!r}{nearest(config.on_bad_row, ON_BAD_ROW)}"))
    if config.max_tokens < 0:
        problems.append(Problem("max_tokens", f"{config.max_tokens} is negative; give a limit, or 0 for none"))
    if not config.tokenizer:
        problems.append(Problem("tokenizer", "no tokenizer; give a folder or a hub name"))
    return problems


def _check_files(config: Config) -> Iterator[Problem]:
    for place, name in enumerate(config.source.inputs):
        if not Path(name).expanduser().is_file():
            yield Problem(f"source.inputs[{place}]", f"no file {name}; give JSONL files that exist")
    if is_path(config.tokenizer) and not Path(config.tokenizer).expanduser().is_dir():
        yield Problem("tokenizer", f"no folder {config.tokenizer}; give a tokenizer's folder or a hub name")


def materialize(config: Config, out: Path, index: int, count: int, progress: Progress = silent) -> dict[str, Any]:
    """Write the shard of element `index` of `count` into the empty folder `out`; returns its facts.

    UserMistake `FILE:LINE: reason` for a malformed line unless they are dropped, and for every problem of `check`.
    """
    if not 0 <= index < count:
        raise ValueError(f"element {index} of {count}")
    problems = [*check(config), *_check_files(config)]
    if problems:
        raise UserMistake(problems)
    tokenizer = load_tokenizer(config.tokenizer)
    tokenizer.check_end()
    writer = StoreWriter(out)
    element = _Element(config, load_task(config.task), tokenizer, writer, progress)
    sheets = [element.add_file(place, name, index, count) for place, name in enumerate(config.source.inputs)]
    if config.source.synthetic_rows:
        sheets.append(element.add_synthetic(len(sheets), index, count))
    writer.close()
    return _write_balance(Balance(sheets), out)


class _Element:
    """One element at work: rows of its shares go to the writer, their counts to a sheet a source."""

    def __init__(self, config: Config, task: Task, tokenizer: Tokenizer, writer: StoreWriter, progress: Progress):
        self.config = config
        self.task = task
        self.options = task_options(task, config.task_options)
        self.tokenizer = tokenizer
        self.writer = writer
        self.progress = progress

    def add_file(self, source: int, name: str, index: int, count: int) -> SourceBalance:
        sheet = SourceBalance(name)
        path = Path(name).expanduser()
        size = path.stat().st_size
        start, stop = index * size // count, (index + 1) * size // count
        with open(path, "rb") as file:
            first = position = _first_line(file, start)
            while position < stop and (line := file.readline()):
                position += len(line)
                sheet.lines += 1
                if sheet.lines % _REPORT_EVERY == 0:
                    self.progress(position - first, stop - first, "bytes", name)
                self._add_line(line, source, path, first, sheet)
        self.progress(stop - start, stop - start, "bytes", name)
        return sheet

    def _add_line(self, line: bytes, source: int, path: Path, first: int, sheet: SourceBalance) -> None:
        """`sheet.lines` is this line's number within the share, which starts at byte `first`."""
        if not line.strip():
            sheet.lines_dropped["blank_line"] += 1
            return
        try:
            rows = self.task.parse_line(line.decode("utf-8"))
        except ValueError as error:  # UnicodeDecodeError is one
            if self.config.on_bad_row == "fail":
                number = _count_lines(path, first) + sheet.lines
                reason = f"not UTF-8: {error.reason}" if isinstance(error, UnicodeDecodeError) else str(error)
                remedy = "mend the line, or set on_bad_row: drop"
                raise UserMistake(Problem(f"{path}:{number}", f"{reason}; {remedy}")) from None
            sheet.lines_dropped["malformed_line"] += 1
            return
        if not rows:
            sheet.lines_dropped["no_rows"] += 1
            return
        sheet.lines_with_rows += 1
        for row in rows:
            self._add_row(row, source, sheet.lines, sheet)

    def add_synthetic(self, source: int, index: int, count: int) -> SourceBalance:
        wanted = self.config.source
        sheet = SourceBalance(f"synthetic {wanted.synthetic_split} rows, seed {wanted.synthetic_seed}")
        start, stop = index * wanted.synthetic_rows // count, (index + 1) * wanted.synthetic_rows // count
        for number in range(start, stop):
            row = self.task.synthetic_row(wanted.synthetic_seed, number, wanted.synthetic_split)
            sheet.lines += 1
            sheet.lines_with_rows += 1
            self._add_row(row, source, sheet.lines, sheet)
            if sheet.lines % _REPORT_EVERY == 0 or number + 1 == stop:
                self.progress(sheet.lines, stop - start, "rows", sheet.name)
        return sheet

    def _add_row(self, row: Row, source: int, line: int, sheet: SourceBalance) -> None:
        sheet.rows += 1
        bucket = self.task.verify(row)
        if bucket is None:
            row = self.task.canonical(row)
            answer = self.task.encode_answer(row.answer, self.options)
            ids, mask = encode_row(self.tokenizer, row.prompt, answer)
            bucket = self._refusal(ids)
        if bucket is not None:
            sheet.dropped[bucket] += 1
            return
        self.writer.add(ids, mask, Provenance(source, line, row.prompt, row.answer))
        sheet.kept += 1
        sheet.tokens += len(ids)
        sheet.supervised += int(mask.sum())

    def _refusal(self, ids: np.ndarray) -> Optional[str]:
        if self.tokenizer.unk_id is not None and (ids[:-1] == self.tokenizer.unk_id).any():  # GPT-2 ends with its unk
            return "unknown_character"
        if self.config.max_tokens and len(ids) > self.config.max_tokens:
            return "too_long"
        return None


def _first_line(file: BinaryIO, start: int) -> int:
    """Seek to the first line that begins at byte `start` or after it; returns where it begins."""
    if start == 0:
        return 0
    file.seek(start - 1)
    return start - 1 + len(file.readline())


def _count_lines(path: Path, stop: int) -> int:
    """Line feeds in the first `stop` bytes; read only when an error needs a line number of the whole file."""
    lines = 0
    with open(path, "rb") as file:
        while stop > 0 and (block := file.read(min(CHUNK, stop))):
            lines += block.count(b"\n")
            stop -= len(block)
    return lines


def _write_balance(balance: Balance, out: Path) -> dict[str, Any]:
    """Check and write the sheet; returns the facts: rows, kept, tokens, supervised and each bucket's rows."""
    balance.check()
    write_json(out / BALANCE, balance.to_json())
    total = balance.total()
    facts = {name: getattr(total, name) for name in ("lines", "rows", "kept", "tokens", "supervised")}
    return {**facts, "buckets": dict(total.lines_dropped + total.dropped), "table": balance.table()}


def finish(config: Config, parts: list[Path], out: Path) -> dict[str, Any]:
    """Join the shards of all elements, in element order, into one store in the empty folder `out`; returns its facts.

    Rows come source by source and in the order of the source; of equal rows the first is kept when `dedupe`.
    UserMistake when no row is left.
    """
    stores = [Store(part) for part in parts]
    sheets = [Balance.from_json(read_json(part / BALANCE)) for part in parts]
    balance = sheets[0]
    for sheet in sheets[1:]:
        balance = balance + sheet
    pieces = _source_major(stores, sheets)
    keep = _first_of_equals([piece.row_hashes() for piece in pieces]) if config.dedupe else None
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
        raise UserMistake(f"no row is left of {balance.total().rows}: {_spell(buckets)}; check inputs and tokenizer")
    writer.close()
    return _write_balance(balance, out)


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
        if kept.all():
            return
        sheet.kept -= int((~kept).sum())
        sheet.dropped["duplicate"] += int((~kept).sum())
        sheet.tokens -= int((~tokens).sum())
        sheet.supervised -= int(np.count_nonzero(mask[~tokens]))


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


def _first_of_equals(hashes: list[np.ndarray]) -> np.ndarray:
    """bool[rows]: whether no earlier row has the same 128-bit hash; 40 bytes a row at the peak."""
    words = np.concatenate(hashes)
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable: equal rows stay in their order
    ordered = words[order]
    first = np.ones(len(words), dtype=bool)
    first[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return first
