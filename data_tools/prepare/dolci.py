"""Dolci-Think (or any chat data with a `source`) → a stratified sample: English, of bounded length, in five categories.

One pass, as an array over the shards, in any order and number: a row's place in its category's draw is a hash of
(seed, row), and the draw takes the smallest. So elements need not know of one another, `finish` merges what they leave,
and the result is the same for every number of elements.

    row ──> malformed │ duplicate │ not_english │ too_short, too_long │ not_drawn ──> sample of its category

A category that has too few rows says by how many, and `redistribute` says who takes its share.
"""

import hashlib
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_tools.base.declared import SEEDS, setting
from data_tools.base.durable import canonical_json, fsync_tree
from data_tools.base.inside import expanded
from data_tools.base.one_file import open_part
from data_tools.base.open_cache import OpenCache
from data_tools.chats.conversation import BadRecord, Conversation, read_record
from data_tools.chats.encoder import Encoder
from data_tools.chats.tokenizer import load_tokenizer
from data_tools.mistake import Problem, UserMistake, nearest
from data_tools.progress import Progress, silent
from data_tools.records import readers
from data_tools.records.balance import Balance, SourceBalance
from data_tools.records.shares import open_share

SAMPLE = "sample.jsonl"
ROWS, INDEX = "rows.jsonl", "index.npy"
REDISTRIBUTE = ("proportional", "none", "fail")
ON_BAD_ROW = ("fail", "bucket")

# The R1 recipe: 40% structured reasoning, 20% code, 15% chat, 10% safety, 15% short reasoning.
SHARES = {"reasoning": 0.40, "code": 0.20, "chat": 0.15, "safety": 0.10, "short": 0.15}
# Parts of source names, lower case, as they stand under dataset_source or source. The first category that has one gets
# the row, but a part within a longer one does not count. A source that none is in (TableGPT) is decided by the text.
SOURCES = {
    "safety": ["wildguard", "wildjailbreak", "coconot", "safety", "refus"],
    "code": ["code", "python", "algorithm", "swe", "program", "nemotron-post-training-dataset-subset"],
    "reasoning": ["math", "science", "logic", "puzzle", "synthetic-2", "synthetic2", "reason", "numina", "stem"],
    "chat": [
        "wildchat",
        "openassistant",
        "oasst",
        "persona",
        "aya",
        "tulu",
        "chat",
        "flan",
        "instruct",
        "if_qwq_reasoning",
    ],
}

INDEX_RECORD = np.dtype(
    [("priority", "<u8"), ("offset", "<i8"), ("tokens", "<i4"), ("source", "<i4"), ("category", "i1")]
)

_ENTRY = struct.Struct("<Qqiib")  # the same, for one record

# ISO 639-1's codes of the languages that py3langid tells apart.
LANGUAGES = (
    "af am an ar as az ba be bg bn br bs ca cs cy da de dz el en eo es et eu fa fi fo fr fy ga gd gl gu ha he hi hr ht "
    "hu hy id ig is it ja jv ka kk km kn ko ku ky la lb lg ln lo lt lv mg mk ml mn mr ms mt my ne nl nn no oc om or pa "
    "pl ps pt qu ro ru rw sa se si sk sl sn so sq sr st sv sw ta te tg th tk tl tr tt ug uk ur uz vi vo wa xh yo zh zu"
).split()

_THINKING = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_CODE_FENCE = re.compile(r"```.*?```", re.DOTALL)
_MATHS = re.compile(r"\\boxed|\\frac|\\\(|\\\[|\$[^$\n]+\$")
_REFUSAL = re.compile(
    r"\s*(?:i'?m sorry|i am sorry|sorry,|i (?:cannot|can't|can not|won't|will not)\b|i'm (?:not able|unable))", re.I
)
_SENTENCE = re.compile(r"[^.!?\n]*[^\W\d_][^.!?\n]*[.!?\n]?")
_WORD = re.compile(r"[^\W\d_]{2,}")
_LEAST_LETTERS = 60  # of prose; below it the language is not asked
_SHORT_SENTENCES, _SHORT_ANSWER = 3, 600  # sentences of thinking; characters of the answer
_REPORT_EVERY = 2000


@dataclass
class Config:
    """The config of the phase dolci_prepare."""

    inputs: list[str] = setting(
        list,
        "shards of the data set: JSONL, JSON or Parquet files",
        example=["train-00000.parquet"],
        needed=True,
        input=True,
    )
    tokenizer: str = setting(
        "", "what counts tokens: a folder or a hub name", example="Qwen/Qwen2.5-0.5B", needed=True, input="hub"
    )
    target_rows: int = setting(800_000, "rows of the sample", unit="rows", least=1)
    shares: dict[str, float] = setting(
        lambda: dict(SHARES), "share of the sample that each category gets; together 1", least=0, most=1, names=SHARES
    )
    redistribute: str = setting(
        "proportional", "who takes the rows of a share that cannot be filled", choices=REDISTRIBUTE
    )
    min_tokens: int = setting(1, "tokens of all messages of a row, at least", unit="tokens", least=0)
    max_tokens: int = setting(1500, "tokens of all messages of a row, at most; 0: no limit", unit="tokens", least=0)
    language: str = setting("en", 'language of the rows, ISO 639-1; "": any', example="de", free=True)
    sources: dict[str, list[str]] = setting(
        lambda: {name: list(parts) for name, parts in SOURCES.items()},
        "parts of source names, in lower case, by the category that they mean",
        example={"code": ["code", "python"]}, free=True, names=SHARES,
    )  # fmt: skip
    seed: int = setting(0, "draw of the sample", **SEEDS)
    on_bad_row: str = setting("fail", "what a malformed row does: bucket counts it", choices=ON_BAD_ROW)


def check(config: Config) -> list[Problem]:
    """Refuse shares that do not add up to 1, no room between the limits of tokens, and what no row would ever match."""
    problems = []
    if not np.isclose(sum(config.shares.values()), 1):
        problems.append(Problem("shares", f"they add up to {sum(config.shares.values()):g}, not 1"))
    if config.max_tokens and config.min_tokens > config.max_tokens:
        problems.append(Problem("min_tokens", f"{config.min_tokens} is above max_tokens {config.max_tokens}"))
    if config.language and config.language not in LANGUAGES:
        near = nearest(config.language.lower(), LANGUAGES)
        problems.append(Problem("language", f"{config.language!r} is no language that is told apart{near}"))
    for name, parts in config.sources.items():
        problems += [
            Problem(
                f"sources.{name}", f"{part!r} is in no source's name; write it in lower case, with no spaces around"
            )
            for part in parts
            if not part or part != part.lower().strip()
        ]
    return problems


# -- one row ----------------------------------------------------------------------------------------------------------


def thinking_and_answer(conversation: Conversation) -> tuple[str, str]:
    """Return (thinking, answer) of the last assistant message, its thinking from a field or between <think> tags."""
    message = next(m for m in reversed(conversation.messages) if m["role"] == "assistant")
    content = message["content"]
    thinking = message.get("reasoning_content") or " ".join(_THINKING.findall(content))
    return thinking.strip(), _THINKING.sub("", content).strip()


def category_of(conversation: Conversation, source: str, sources: dict[str, list[str]]) -> str:
    """Return the category: safety and short by source or text first, then what the source says, then what the text
    looks like."""
    thinking, answer = thinking_and_answer(conversation)
    named = named_by(source.lower(), sources)
    if named == "safety" or _REFUSAL.match(answer):
        return "safety"
    sentences = [s for s in _SENTENCE.findall(thinking) if s.strip()]
    if 1 <= len(sentences) <= _SHORT_SENTENCES and len(answer) <= _SHORT_ANSWER:
        return "short"
    if named:
        return named
    if _CODE_FENCE.search(answer):
        return "code"
    return "reasoning" if thinking or _MATHS.search(answer) else "chat"


def named_by(source: str, sources: dict[str, list[str]]) -> str:
    """Return the category that a source's name means, "" where it means none."""
    parts = [(part, name) for name, parts in sources.items() for part in parts if part in source]
    return next((name for part, name in parts if not any(part != more and part in more for more, _ in parts)), "")


def prose(text: str) -> str:
    """Return what of a text is sentences: no code, formulas, numbers or one-letter names."""
    return " ".join(_WORD.findall(_MATHS.sub(" ", _CODE_FENCE.sub(" ", text))))


def is_language(text: str, language: str) -> bool:
    """Return whether prose is in `language` (ISO 639-1). Abstains, saying yes, where there is too little of it: code,
    maths."""
    words = prose(text)
    return len(words) < _LEAST_LETTERS or _identifier().classify(words)[0] == language


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # its table takes a second to load

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def priority(seed: int, conversation: Conversation) -> int:
    """Return 64 bits, the same for equal messages with equal tools, loss and arguments: place in the draw, and what a
    duplicate is known by."""
    more: list[Any] = (
        [conversation.tools, sorted(conversation.untrained)] if conversation.tools or conversation.untrained else []
    )
    more += [dict(conversation.arguments)] if conversation.arguments else []
    data = struct.pack("<q", seed) + canonical_json(conversation.messages).encode("utf-8", "surrogatepass")
    data += canonical_json(more).encode("utf-8", "surrogatepass") if more else b""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


# -- an element -------------------------------------------------------------------------------------------------------


def sample_shard(config: Config, out: Path, index: int, count: int, progress: Progress = silent) -> dict[str, Any]:
    """Write what may be drawn of element `index` of `count` into the empty folder `out`: rows, and an index of them.

    Raise UserMistake for every problem of `check`, and `FILE:LINE: reason` for a record that is none, unless those go
    to a bucket.
    """
    problems = check(config)
    problems += [Problem("inputs", f"no file {name}") for name in config.inputs if not expanded(name).is_file()]
    if problems:
        raise UserMistake(problems)
    encoder = Encoder(load_tokenizer(config.tokenizer))
    names = list(SHARES)
    sheets, entries = [], bytearray()
    with open(out / ROWS, "wb") as rows:
        for number, name in enumerate(config.inputs):
            share = open_share(expanded(name), index, count)
            sheet = SourceBalance(name)
            sheets.append(sheet)
            for record in readers.records_of(share):
                sheet.lines += 1
                if sheet.lines % _REPORT_EVERY == 0:
                    progress(share.done, share.total, share.unit, name)
                chat = _chat(record, sheet, config, encoder)
                if chat is None:
                    continue
                sheet.lines_with_rows += 1
                sheet.rows += 1
                row, conversation, tokens = chat
                bucket = _bucket(conversation, tokens, config)
                if bucket:
                    sheet.refuse(bucket, tokens)
                    continue
                source = row.get("source") or row.get("dataset_source") or ""
                category = category_of(conversation, str(source), config.sources)
                place = priority(config.seed, conversation)
                entries += _ENTRY.pack(place, rows.tell(), tokens, number, names.index(category))
                rows.write(record.line({**row, "category": category}).encode())
                sheet.keep(tokens, 0)
            progress(share.total, share.total, share.unit, name)
    np.save(out / INDEX, np.frombuffer(entries, dtype=INDEX_RECORD))
    balance = Balance(sheets)
    balance.write(out)
    return {"rows": balance.total().rows, "kept": balance.total().kept}


def _chat(
    record: readers.Record, sheet: SourceBalance, config: Config, encoder: Encoder
) -> tuple[dict[str, Any], Conversation, int] | None:
    """Return (the record's value, its conversation, tokens of that), or None for a line that went to a bucket."""
    if record.is_blank:
        sheet.lines_dropped["blank_line"] += 1
        return None
    bucket, reason = "malformed_line", record.problem
    if not reason:
        try:
            row, conversation = _row(record.value)
            return row, conversation, sum(len(encoder.encode(text, [])[0]) for text in _texts(conversation))
        except BadRecord as error:
            bucket, reason = error.bucket, str(error)
    if config.on_bad_row == "fail":
        raise record.mistake(reason, "mend the record, or set on_bad_row: bucket")
    sheet.lines_dropped[bucket] += 1
    return None


def _row(value: Any) -> tuple[dict[str, Any], Conversation]:
    (conversation, *more) = read_record(value)
    if not isinstance(value, dict) or more or not isinstance(conversation, Conversation):
        raise BadRecord("a list of messages alone, or text that a template has written; give chats with a source")
    return value, conversation


def _texts(conversation: Conversation) -> list[str]:
    return [text for m in conversation.messages for text in (m.get("reasoning_content") or "", m["content"]) if text]


def _bucket(conversation: Conversation, tokens: int, config: Config) -> str:
    """Return why a row cannot be drawn, "" when it can."""
    if tokens < config.min_tokens:
        return "too_short"
    if config.max_tokens and tokens > config.max_tokens:
        return "too_long"
    if config.language and not is_language("\n".join(_texts(conversation)), config.language):
        return f"not_{config.language}"
    return ""


# -- the draw ---------------------------------------------------------------------------------------------------------


def quotas(available: dict[str, int], shares: dict[str, float], target: int, redistribute: str) -> dict[str, int]:
    """Return rows to draw of each category: its share of the target, or all it has; the rest as `redistribute` says.

    proportional: again and again to the categories with rows left, by their shares, until the target or the rows are
    reached. none: it stays undrawn. Shares are rounded so that they add up (largest remainder).
    """
    drawn = dict.fromkeys(shares, 0)
    open_ = {name: share for name, share in shares.items() if share > 0}
    while open_ and (left := target - sum(drawn.values())):
        for name, more in _apportion(left, open_).items():
            drawn[name] += min(more, available.get(name, 0) - drawn[name])
        if redistribute != "proportional":
            break
        open_ = {name: share for name, share in open_.items() if available.get(name, 0) > drawn[name]}
    return drawn


def _apportion(rows: int, shares: dict[str, float]) -> dict[str, int]:
    """Return `rows` by shares, whole numbers that add up: the largest remainders get what rounding down left."""
    exact = {name: rows * share / sum(shares.values()) for name, share in shares.items()}
    given = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: given[name] - exact[name])[: rows - sum(given.values())]:
        given[name] += 1
    return given


def draw(config: Config, parts: Sequence[Path], out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Draw the sample from the elements' folders and write it, its balance and facts into the empty folder `out`.

    Rows come in the order of the draw, categories mixed. UserMistake, with the numbers, where a share cannot be filled
    and `redistribute` is fail.
    """
    indices = list(map(_index, parts))
    entries, part_of = np.concatenate(indices), np.repeat(np.arange(len(parts)), list(map(len, indices)))
    # Of equal rows the first counts: of the first file, and in it of the first element.
    order = np.lexsort((part_of, entries["source"], entries["priority"]))
    entries, part_of = entries[order], part_of[order]
    first = np.append(True, entries["priority"][1:] != entries["priority"][:-1]) if len(entries) else np.empty(0, bool)
    names = list(SHARES)
    available = {name: int((first & (entries["category"] == i)).sum()) for i, name in enumerate(names)}
    wanted = _apportion(config.target_rows, config.shares)
    short = {name: wanted[name] - available[name] for name in wanted if wanted[name] > available[name]}
    if short and config.redistribute == "fail":
        told = [f"{name} has {available[name]:,} of {wanted[name]:,} rows" for name in short]
        remedy = "lower target_rows, change shares, or set redistribute: proportional"
        raise UserMistake(Problem("target_rows", f"{'; '.join(told)}; {remedy}"))
    drawn = quotas(available, config.shares, config.target_rows, config.redistribute)
    chosen = np.zeros(len(entries), dtype=bool)
    for i, name in enumerate(names):
        chosen[np.flatnonzero(first & (entries["category"] == i))[: drawn.get(name, 0)]] = True
    balance = _balance(parts, entries, first, chosen)
    if not chosen.any():
        buckets = balance.total().lines_dropped + balance.total().dropped
        lost = ", ".join(f"{count:,} {bucket}" for bucket, count in sorted(buckets.items())) or "the inputs are empty"
        raise UserMistake(Problem("inputs", f"no row can be drawn ({lost}); give other files, or other limits"))
    _write(parts, entries[chosen], part_of[chosen], out=out, progress=progress)
    balance.write(out)
    fsync_tree(out)
    table = [
        [n, f"{config.shares.get(n, 0):.0%}", wanted.get(n, 0), available[n], drawn.get(n, 0), short.get(n, 0)]
        for n in names
    ]
    strata = {
        "title": "Categories",
        "columns": ["category", "share", "wanted", "available", "drawn", "short"],
        "rows": table,
    }
    return {
        "rows": int(chosen.sum()),
        "drawn": drawn,
        "short": short,
        "tables": {"balance": balance.table(), "categories": strata},
    }


def _index(part: Path) -> np.ndarray:
    """Return the index of the rows that an element left."""
    with open_part(part / INDEX) as file:
        return np.load(file)


def _balance(parts: Sequence[Path], entries: np.ndarray, first: np.ndarray, chosen: np.ndarray) -> Balance:
    """Return the elements' sheets together, less what the draw left."""
    sheets = [Balance.read(part) for part in parts]
    balance = sum(sheets[1:], sheets[0])
    for number, sheet in enumerate(balance.sources):
        is_own = entries["source"] == number
        for bucket, gone in (("duplicate", is_own & ~first), ("not_drawn", is_own & first & ~chosen)):
            if gone.any():
                sheet.drop_kept(bucket, int(gone.sum()), int(entries["tokens"][gone].sum(dtype=np.int64)), 0)
    return balance


def _write(parts: Sequence[Path], entries: np.ndarray, part_of: np.ndarray, out: Path, progress: Progress) -> None:
    with (
        OpenCache[int, IO[bytes]](lambda part: open_part(parts[part] / ROWS)) as files,
        open(out / SAMPLE, "wb") as sample,
    ):
        for done, (offset, part) in enumerate(zip(entries["offset"].tolist(), part_of.tolist())):
            files[part].seek(offset)
            sample.write(files[part].readline())
            if done % _REPORT_EVERY == 0:
                progress(done, len(entries), "rows")
    progress(len(entries), len(entries), "rows")
