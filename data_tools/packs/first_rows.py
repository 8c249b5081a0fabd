"""Whether a tokenizer of few characters can encode the rows of a materialize phase: asked of the first rows of each
source, before anything runs."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.chats.conversation import BadRecord, Conversation, read_record
from data_tools.mistake import UserMistake
from data_tools.packs.materialize import Config, origins_of
from data_tools.records import readers
from data_tools.records.shares import open_share
from data_tools.records.sources import synthetic_name
from data_tools.tasks.task import load_chat_task, load_row_task, rows_of, task_names, task_options

FIRST = 32  # rows of a source that are asked
_LARGEST_WHOLE = 64 << 20  # bytes of a file that is read whole for its first rows (JSON, CSV)
_SHOWN = 8  # characters that are named


class Unknown(NamedTuple):
    """Says how many of the first rows of a source have characters that the tokenizer does not know."""

    source: str
    rows: int  # that were asked
    strange: int  # of these, rows that would be left out
    characters: str  # some of the unknown ones, as Python spells them

    def __str__(self) -> str:
        which = "each" if self.strange == self.rows else f"{self.strange}"
        return f"{which} of the first {self.rows} rows of {self.source} has others ({self.characters})"


def unknown(config: Config, characters: str) -> list[Unknown]:
    """Return the sources of which some of the first rows have other characters than these; of a source whose rows
    cannot be read, nothing."""
    known, found = frozenset(characters), []
    for name, texts in _sources(config):
        strange = [others for text in texts if (others := "".join(dict.fromkeys(c for c in text if c not in known)))]
        if strange:
            shown = ", ".join(map(repr, list(dict.fromkeys("".join(strange)))[:_SHOWN]))
            found.append(Unknown(name, len(texts), len(strange), shown))
    return found


def _sources(config: Config) -> Iterator[tuple[str, list[str]]]:
    """Yield (name, the texts of its first rows) of each source whose files are here; none of a user's task, whose code
    runs in jobs alone."""
    if config.task and config.task not in task_names():
        return
    origins = []
    with contextlib.suppress(UserMistake):  # of files that are missing, reading says so
        origins = origins_of(config)
    for origin in origins:
        with contextlib.suppress(UserMistake, OSError):  # what cannot be read, reading says
            yield origin.name, list(itertools.islice(_texts(config, origin.path), FIRST))
    if config.task and config.source.synthetic_rows:
        task: Any = load_row_task(config.task)
        wanted = config.source
        numbers = range(min(FIRST, wanted.synthetic_rows))
        rows = [task.synthetic_row(wanted.synthetic_seed, number, wanted.synthetic_split) for number in numbers]
        yield synthetic_name(wanted), [_text_of(task, row, config) for row in rows]


def _texts(config: Config, path: Path) -> Iterator[str]:
    """Yield what the rows of a file say, without what a template writes around it; nothing of a row that is bad."""
    if not path.name.endswith((".jsonl", ".parquet")) and path.stat().st_size > _LARGEST_WHOLE:
        return
    task: Any = load_row_task(config.task) if config.task and load_chat_task(config.task) is None else None
    for raw in open_share(path, format=config.format):
        if task is not None:
            with contextlib.suppress(BadRecord, ValueError):
                rows = [row for row in rows_of(task, raw) if task.verify(row) is None]
                yield from (_text_of(task, task.canonical(row), config) for row in rows)
            continue
        record = readers.record_of(raw)
        if not record.is_blank and not record.problem:
            with contextlib.suppress(BadRecord):
                yield from map(_said, read_record(record.value, config.chat.schema, config.chat.ignored))


def _text_of(task: Any, row: Any, config: Config) -> str:
    return row.prompt + task.encode_answer(row.answer, task_options(task, config.task_options))


def _said(item: Any) -> str:
    if isinstance(item, Conversation):
        return "".join(message["content"].strip() for message in item.messages)
    return "".join(chunk.text for chunk in item)
