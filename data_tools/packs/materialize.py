"""Conversations, or a task's rows → a token store and its balance sheet, split over any number of array elements.

Every element takes its share of every input file (data_tools/records/readers.py) and the like share of the synthetic
rows, and writes a shard. `finish` (join.py) joins the shards source by source, so the store has the same bytes for
every number of elements, workers and chunk sizes.

    record ──schema──> conversation ──template──> text and spans ──tokenise──> store
       │ malformed_line   │ no_assistant,            │ template_error,   │ too_long, (finish) duplicate
       │ malformed_record │ empty_assistant,         │ turn_unclear, reasoning_lost, tool_call_lost,
       │ ambiguous_schema │ malformed_tool_call,     │ nothing_trained,
       │ not_chosen       │                          │ contaminated, …
                          │ refused_key, openthoughts_markers
"""

import contextlib
import functools
import itertools
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.base.declared import FILE_OR_NAME, setting
from data_tools.base.inside import expanded
from data_tools.chats.chat import ChatConfig, ChatRows, Encoded, Refused, Result, check_chat, encode_row
from data_tools.chats.conversation import BadRecord
from data_tools.chats.encoder import ENCODERS, Encoder, check_encoder
from data_tools.chats.tokenizer import Tokenizer, is_path, load_tokenizer
from data_tools.chats.unknown import CannotEncode
from data_tools.mistake import Problem, UserMistake
from data_tools.packs.join import join, write_balance
from data_tools.packs.left_out import FILE as LIST
from data_tools.packs.left_out import LeftOut
from data_tools.packs.lines import Kept, Line, Malformed, SyntheticRow, Viewed
from data_tools.packs.store import Provenance, StoreWriter, row_text
from data_tools.prepare.contamination import NGRAM, Contamination
from data_tools.progress import Progress, silent
from data_tools.recipes import recipe as recipes
from data_tools.recipes.recipe import Files, Origin, Recipe
from data_tools.records import readers, sources
from data_tools.records.balance import Balance, SourceBalance
from data_tools.records.hub import dataset_files
from data_tools.records.inputs import missing, named_twice, records_of
from data_tools.records.shares import FORMATS, Share, open_share
from data_tools.tasks.task import (
    ChatTask,
    Row,
    Source,
    check_chats,
    check_rows,
    check_source,
    load_chat_task,
    load_row_task,
    rows_of,
    task_options,
)

ON_BAD_ROW = ("fail", "bucket")
NO_CHATS = "no rows; give files in source.inputs, or name a task or a recipe"
_REPORT_EVERY = 500  # lines or rows between two calls of progress
_CHUNKS_AHEAD = 4  # a worker; what is read ahead of the oldest unfinished chunk


@dataclass
class Config:
    """The config of the phase materialize."""

    source: Source = setting(Source, "where the rows come from")
    tokenizer: str = setting("", "a folder or a hub name", example="Qwen/Qwen2.5-0.5B", needed=True, input="hub")
    task: str = setting(
        "", 'the task whose rows these are, or a data set of conversations; "": any conversations',
        example="gsm8k", module=True,
    )  # fmt: skip
    task_options: dict[str, Any] = setting(dict, "options of the task", example={"reverse_digits": True}, free=True)
    chat: ChatConfig = setting(ChatConfig, "how conversations become tokens")
    recipe: str = setting(
        "", "or a recipe: one that comes with afterok, or a YAML file; it names sources, shares and validation rows",
        example="r1_ot", input=FILE_OR_NAME, keyed=False, free=True,
    )  # fmt: skip
    recipe_params: dict[str, Any] = setting(
        dict, "parameters of the recipe, over its own", example={"ot_stop": 100000}, free=True, keyed=False
    )
    recipe_sources: dict[str, Files] = setting(
        dict, "files of the recipe's sources, by their names, in place of the hub's cache", keyed="if_set"
    )
    format: str = setting("auto", "format of the files, plain or under gzip or zstd", choices=FORMATS)
    max_tokens: int = setting(0, "tokens of a row, end token included; 0: no limit", unit="tokens", least=0)
    evaluation_sets: list[str] = setting(
        list, "files of evaluation sets; rows that hold one of their questions go (phase decontaminate has the rule)",
        example=["gsm8k/test.jsonl"], input=True, keyed="if_set",
    )  # fmt: skip
    dedupe: bool = setting(True, "of equal rows, the same text with the same loss mask, the first is kept")
    on_bad_row: str = setting("fail", "what a malformed record does: bucket counts it", choices=ON_BAD_ROW)
    encoder: str = setting("auto", "what encodes; all give the same ids", choices=ENCODERS, keyed=False)
    workers: int = setting(1, "processes of an element", unit="processes", least=1, keyed=False)
    chunk_size: int = setting(16, "records handed to a worker at a time", unit="records", least=1, keyed=False)

    @staticmethod
    def meaning(config: "Config") -> dict[str, Any]:
        """Return what the settings have come to mean since stores were first sealed, for the key (jobs/kind.py)."""
        loss = {} if config.task and _chats_of(config) is None else {"loss": "through the stop token"}
        try:
            return {**loss, "recipe": recipe_of(config).plain()} if config.recipe else loss
        except UserMistake:  # which `check` tells
            return loss


def check(config: Config) -> list[Problem]:
    """Wrong values, all at once; opens no file, since upstream phases may have yet to make them."""
    if config.task and _chats_of(config) is None:
        problems = _check_no_recipe(config) + check_rows(config.task, config.task_options, config.source)
    else:
        problems = _check_conversations(config)
    problems += check_encoder(config.encoder)
    return problems


def _chats_of(config: Config) -> ChatTask | None:
    """Return the data set of conversations that is the config's task; None where that is another one, or none."""
    return load_chat_task(config.task) if config.task else None


def datasets(config: Config) -> list[str]:
    """Return the datasets of the hub that are read, since the config names no files."""
    chats = _chats_of(config)
    return [chats.HUB] if chats and not config.source.inputs else []


def needs_template(config: Config) -> bool:
    """Return whether conversations are rendered by the tokenizer's own chat template."""
    conversations = not config.task or _chats_of(config) is not None
    return conversations and not config.chat.template and config.chat.schema != "rendered"


def _check_no_recipe(config: Config) -> list[Problem]:
    """Refuse a recipe beside a task."""
    given = [name for name in ("recipe", "recipe_params", "recipe_sources") if getattr(config, name)]
    return [Problem(name, "says itself what its sources are; leave out task, or this") for name in given]


def recipe_of(config: Config) -> Recipe:
    """Return the recipe of a config that has one, its parameters put in. Raise UserMistake with all that is wrong."""
    return recipes.resolve(config.recipe, config.recipe_params)


def _check_recipe(config: Config) -> list[Problem]:
    """Refuse what is wrong with a recipe, what stands beside one, and files that nobody has."""
    if not config.recipe:
        given = [name for name in ("recipe_params", "recipe_sources") if getattr(config, name)]
        return [Problem(name, "there is no recipe; name one in recipe, or leave this out") for name in given]
    beside = config.source.inputs or config.source.synthetic_rows
    problems = [Problem("source", "is given beside a recipe; give its files in recipe_sources")] if beside else []
    if config.chat.schema not in ("auto", "messages"):
        own = f"{config.chat.schema}: the sources of a recipe have schemas of their own; leave it auto"
        problems.append(Problem("chat.schema", own))
    try:
        recipe = recipe_of(config)
        recipes.unread(recipe, config.recipe_sources)
        recipes.origins(recipe, config.recipe_sources)
    except UserMistake as mistake:
        problems += mistake.problems
    return problems


def origins_of(config: Config) -> list[Origin]:
    """Return the files that rows come from. Raise UserMistake where those of a recipe's sources are missing, or a
    dataset is not in the hub's cache."""
    if config.recipe:
        return recipes.origins(recipe_of(config), config.recipe_sources)
    names = config.source.inputs or [str(path) for spec in datasets(config) for path in dataset_files(spec)]
    named = [(name, expanded(name), file) for name in names for file in records_of(name)]
    return [Origin(name if file == path else str(file), file) for name, path, file in named]


def forecast(config: Config) -> list[str] | None:
    """Return the names that the sources of the store will have; None where that shows only once files are read."""
    if not config.recipe:
        return None if datasets(config) else sources.forecast(config.source)
    try:
        return [origin.name for origin in origins_of(config)]
    except UserMistake:
        return None


def _check_conversations(config: Config) -> list[Problem]:
    problems = [Problem(f"chat.{problem.where}", problem.message) for problem in check_chat(config.chat)]
    if config.task:
        return problems + _check_no_recipe(config) + check_chats(config.task, config.task_options, config.source)
    problems += _check_recipe(config)
    problems += [] if config.recipe else check_source(config.source, NO_CHATS)
    if config.source.synthetic_rows:
        problems.append(Problem("source.synthetic_rows", "only a task makes rows; name it, or give inputs alone"))
    if config.task_options:
        problems.append(Problem("task_options", "no task takes them; name one in task"))
    return problems


def _check_files(config: Config) -> Iterator[Problem]:
    where = "recipe_sources ({})" if config.recipe else "source.inputs"
    named = [(where.format(origin.name), origin.path) for origin in origins_of(config)]
    yield from missing(named) + ([] if config.recipe else named_twice(named))
    if is_path(config.tokenizer) and not expanded(config.tokenizer).is_dir():
        yield Problem("tokenizer", f"no folder {config.tokenizer}; give a tokenizer's folder or a hub name")


def materialize(config: Config, out: Path, index: int, count: int, progress: Progress = silent) -> dict[str, Any]:
    """Write the shard of element `index` of `count` into the empty folder `out`; returns its facts.

    UserMistake `FILE:LINE: reason` for a malformed record unless they are counted, and for every problem of `check`.
    """
    if not 0 <= index < count:
        raise ValueError(f"element {index} of {count}")
    problems = check(config)
    problems += [] if problems and config.recipe else _check_files(config)
    if problems:
        raise UserMistake(problems)
    writer = StoreWriter(out)
    with _line_maker(config) as lines_of, contextlib.closing(LeftOut(out, config.max_tokens)) as left_out:
        element = _Element(config, lines_of, writer, left_out, progress)
        sheets = [element.add_file(place, origin, index, count) for place, origin in enumerate(origins_of(config))]
        if config.source.synthetic_rows:
            sheets.append(element.add_synthetic(len(sheets), index, count))
    facts = writer.close()
    return write_balance(Balance(sheets), facts, out)


def finish(config: Config, parts: list[Path], out: Path) -> dict[str, Any]:
    """Join the shards of all elements, in element order, into one store in the empty folder `out`; return its facts.

    With a recipe its rows are drawn, and those held out make a store of their own in OUT/validation.
    """
    if not config.recipe:
        return join(parts, out, config.dedupe)
    origins = origins_of(config)
    return join(
        parts,
        out,
        config.dedupe,
        recipe=recipe_of(config),
        source_of=[origin.source for origin in origins],
        names=[str(origin.path) for origin in origins],
    )


# -- records to rows, in this process or in workers --------------------------------------------------------------------


class _Rows:
    """Represents one shard's rows of conversations or of a task; made once in every process that works on it."""

    def __init__(self, config: Config):
        chats = _chats_of(config)
        self.max_tokens, self.is_task = config.max_tokens, bool(config.task) and chats is None
        self.ignored = config.chat.ignored
        self.evaluated = Contamination(NGRAM).add_files([expanded(name) for name in config.evaluation_sets])
        tokenizer = load_tokenizer(config.tokenizer)
        tokenizer.check_end()
        if self.is_task:
            self._rows_of = TaskRows(config, tokenizer).rows
            return
        rows = ChatRows(config.chat, tokenizer, Encoder(tokenizer, config.encoder))
        if chats is not None:
            options = task_options(chats, config.task_options)
            rows.change = functools.partial(chats.conversation, options=options)
        self._rows_of = rows.rows

    def lines(self, chunk: list[Any]) -> list[Line]:
        return list(map(self._line, chunk))

    def _line(self, raw: Any) -> Line:
        """Return what became of a record; `raw` is a line as bytes, or a value that was read from JSON or Parquet."""
        view, raw = (raw.view, raw.raw) if isinstance(raw, Viewed) else (None, raw)
        if readers.is_blank(raw):
            return Malformed("blank_line")
        record = readers.Record(None, raw) if self.is_task else readers.record_of(raw)  # a task parses its lines itself
        if record.problem:
            return Malformed("malformed_line", record.problem)
        try:
            value = view.apply(record.value, self.ignored) if view else record.value
            if view and value is None:
                return Malformed("not_chosen")
            return [self._kept(row) for row in self._rows_of(value)] or Malformed("no_rows")
        except BadRecord as error:
            return Malformed(error.bucket, str(error))
        except UserMistake as mistake:
            return Malformed("", str(mistake), fatal=True)

    def _kept(self, row: Result) -> "Kept | Refused":
        if isinstance(row, Refused):
            return row
        if self.max_tokens and len(row.ids) > self.max_tokens:
            return Refused("too_long", len(row.ids))
        if any(map(self.evaluated.touches, (row.prompt, row.answer))):
            return Refused("contaminated", len(row.ids))
        return Kept(row.ids, row.mask, row_text(row.prompt, row.answer), row.turns)


class TaskRows:
    """Represents the rows of a task's records."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        self.task, self.tokenizer = load_row_task(config.task), tokenizer
        self.options = task_options(self.task, config.task_options)
        self.split, self.seed = config.source.synthetic_split, config.source.synthetic_seed

    def rows(self, record: Any) -> Iterator[Result]:
        """Yield those of a record as a share gives it, or of a synthetic row's number. Raise BadRecord."""
        if isinstance(record, SyntheticRow):
            yield self._result(self.task.synthetic_row(self.seed, record.number, self.split))
            return
        try:
            rows = rows_of(self.task, record)
        except ValueError as error:
            raise BadRecord(str(error), "malformed_line") from None
        yield from map(self._result, rows)

    def _result(self, row: Row) -> Result:
        if (bucket := self.task.verify(row)) is not None:
            return Refused(bucket)
        row = self.task.canonical(row)
        try:
            ids, mask = encode_row(self.tokenizer, row.prompt, self.task.encode_answer(row.answer, self.options))
        except CannotEncode as error:
            return Refused(error.bucket, reason=str(error))
        if self.tokenizer.unk_id is not None and (ids[:-1] == self.tokenizer.unk_id).any():  # GPT-2 ends with its unk
            return Refused("unknown_character", len(ids))
        return Encoded(ids, mask, prompt=row.prompt, answer=row.answer, turns=1)


LinesOf = Callable[[Iterable[list[Any]]], Iterator[list[Line]]]


@contextlib.contextmanager
def _line_maker(config: Config) -> Iterator[LinesOf]:
    """Gives a function from chunks of records to chunks of lines, in the same order."""
    if config.workers == 1:
        yield functools.partial(map, _Rows(config).lines)
        return
    with ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn"), _start_worker, (config,)) as pool:
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


_rows: Callable[[], _Rows]  # of a worker, made at the first chunk


def _start_worker(config: Config) -> None:
    """Begin a worker: remember the config, and leave when the element's process is gone."""
    global _rows
    _rows = functools.cache(lambda: _Rows(config))
    if (element := multiprocessing.parent_process()) is None:
        raise ValueError("this is no worker: it has no parent")
    threading.Thread(target=_leave_with, args=(element.sentinel,), daemon=True).start()


def _leave_with(process: int) -> None:
    """End this process when another one, named by its sentinel, is gone."""
    multiprocessing.connection.wait([process])
    os._exit(1)


def _work(chunk: list[Any]) -> list[Line]:
    return _rows().lines(chunk)


# -- an element -------------------------------------------------------------------------------------------------------


class _Element:
    """Represents one element at work: rows of its shares go to the writer, their counts to a sheet a source."""

    def __init__(self, config: Config, lines_of: LinesOf, writer: StoreWriter, left_out: LeftOut, progress: Progress):
        self.config, self.lines_of, self.progress = config, lines_of, progress
        self.writer, self.left_out = writer, left_out

    def add_file(self, source: int, origin: Origin, index: int, count: int) -> SourceBalance:
        name, view = origin.name, origin.view
        share = open_share(origin.path, index, count, self.config.format)
        sheet = SourceBalance(name)
        for line in self._lines((Viewed(view, raw) for raw in share) if view else share):
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

    def _add_line(self, line: Line, source: int, sheet: SourceBalance, share: Share | None = None) -> None:
        """Count a line and write its rows; `sheet.lines` is this line's number within the share."""
        if isinstance(line, Malformed):
            self._refuse(line.reason, line.fatal, sheet, share)
            sheet.lines_dropped[line.bucket] += 1
            self.left_out.add(source, sheet.lines, line.bucket, line.reason)
            return
        sheet.lines_with_rows += 1
        for row in line:
            sheet.rows += 1
            if isinstance(row, Refused):
                self._refuse(row.reason, False, sheet, share)
                sheet.refuse(row.bucket, row.tokens)
                self.left_out.add(source, sheet.lines, row.bucket, row.reason, row.tokens)
                continue
            self.writer.add(row.ids, row.mask, Provenance(source, sheet.lines, row.text, row.turns))
            sheet.keep(len(row.ids), int(np.count_nonzero(row.mask)))

    def _refuse(self, reason: str, fatal: bool, sheet: SourceBalance, share: Share | None) -> None:
        """Raise UserMistake with the place, where the data is at fault and may not be, or the settings are."""
        if reason and (fatal or self.config.on_bad_row == "fail"):
            place = share.place(sheet.lines) if share else f"{sheet.name}, row {sheet.lines}"
            remedy = "" if fatal else f"; mend the record, or set on_bad_row: bucket, which lists all such in {LIST}"
            raise UserMistake(Problem(place, f"{reason}{remedy}"))
