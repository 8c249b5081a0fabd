"""Rejection sampling: sampled completions → the ones worth training on, as JSONL chat.

A sample is a record of the `generate` phase, or of any tool that writes the same keys (samples.py); sample, seed,
weights and reward are carried along. Each ends in exactly one bucket, the first rule that turns it away, in this order:

    unscored, wrong, truncated, ill_formed, too_short, too_long, contaminated      on its own
    pass_rate                                                                      with its prompt's other samples
    duplicate, near_duplicate, over_limit                                          beside better ones of its prompt

Memory holds a few numbers a sample; texts that passed their own rules wait in a file, for their prompt's turn.
"""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_tools.base.declared import setting
from data_tools.base.durable import fsync_tree
from data_tools.chats.conversation import SYSTEM
from data_tools.chats.messages import IN_LOSS, ROLES
from data_tools.chats.samples import ASKED_WITH, CUT_OFF, problem_of_sample, prompt_messages
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, silent
from data_tools.records import readers
from data_tools.records.balance import Balance, SourceBalance
from data_tools.records.shares import open_share

CHAT = "chat.jsonl"
PREFER = ("shortest", "longest", "diverse", "first")
THINKING = ("any", "required", "forbidden")
ON_BAD_ROW = ("fail", "drop")
QUESTIONS = ("question", "problem", "prompt", "instruction", "input")  # keys of an evaluation set's questions

_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_CARRIED = ("sample", "seed", "weights", "reward", "tokens", *ASKED_WITH)  # keys of a sample that its chat row keeps
_SHINGLE = 5  # words; what two completions have in common is counted in runs of so many
_SHORTEST_QUESTION = 5  # words; a shorter one is in too many texts
_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힯]|[^\W_぀-ヿ㐀-鿿가-힯]+")  # a character of a script without spaces is a word
_REPORT_EVERY = 5000


@dataclass
class Config:
    """The config of the phase reject_filter."""

    inputs: list[str] = setting(list, "JSONL files of samples, or folders of them", needed=True, input=True)
    correct: bool = setting(True, "only samples whose verifier said so; false: also unscored and wrong ones")
    truncated: bool = setting(False, "samples that reached their length limit are kept")
    thinking: str = setting("any", "<think> … </think> before the answer; half of it is never kept", choices=THINKING)
    answer_pattern: str = setting("", "regular expression that the answer, after the thinking, contains", free=True)
    min_tokens: int = setting(0, "tokens of a sample, at least", unit="tokens", least=0)
    max_tokens: int = setting(0, "tokens of a sample, at most; 0: no limit", unit="tokens", least=0)
    min_pass_rate: float = setting(
        0.0, "prompts go of whose scored samples a smaller share is correct: too hard", least=0, most=1
    )
    max_pass_rate: float = setting(
        1.0, "prompts go of whose scored samples a larger share is correct: too easy", least=0, most=1
    )
    evaluation_sets: list[str] = setting(
        list, "files of evaluation sets; samples that hold one of their questions go", input=True
    )
    ngram: int = setting(
        13, "words in a row that a text shares with an evaluation question when it holds it",
        unit="words", least=_SHORTEST_QUESTION,
    )  # fmt: skip
    near_duplicate: float = setting(
        0.8, "Jaccard similarity of 5-word runs at which the second sample of a prompt goes; 1: never", above=0, most=1
    )
    per_prompt: int = setting(0, "samples of a prompt that are kept, at most; 0: all", unit="samples", least=0)
    prefer: str = setting("shortest", "which samples of a prompt are kept first", choices=PREFER)
    on_bad_row: str = setting("fail", "what a line that is no sample does", choices=ON_BAD_ROW)


def check(config: Config) -> list[Problem]:
    """Refuse a pattern that is none, and limits with nothing between them."""
    problems = []
    try:
        re.compile(config.answer_pattern)
    except re.error as error:
        problems.append(Problem("answer_pattern", f"{config.answer_pattern!r} is no regular expression: {error}"))
    if config.max_tokens and config.min_tokens > config.max_tokens:
        problems.append(Problem("min_tokens", f"{config.min_tokens} is above max_tokens {config.max_tokens}"))
    if config.min_pass_rate > config.max_pass_rate:
        values = f"{config.min_pass_rate} to {config.max_pass_rate}"
        problems.append(Problem("min_pass_rate", f"{values} is no range of shares: 0 <= min <= max <= 1"))
    return problems


class Place(NamedTuple):
    """Says where a sample that passed its own rules waits: the number of its file, its first byte among those that
    wait."""

    file: int
    offset: int
    tokens: int


@dataclass
class Group:
    """Represents the samples of one prompt."""

    asked: Any = None  # a hash of its prompt or messages
    scored: int = 0
    right: int = 0
    places: list[Place] = field(default_factory=list)


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def shingles(text: str, size: int = _SHINGLE) -> frozenset[tuple[str, ...]]:
    """Runs of `size` words; of a shorter text its one run."""
    in_order = words(text)
    return frozenset(tuple(in_order[i : i + size]) for i in range(max(1, len(in_order) - size + 1)))


def similarity(a: frozenset, b: frozenset) -> float:
    """Return the Jaccard similarity: what both have, of all that either has."""
    return len(a & b) / len(a | b)


class Contamination:
    """Runs of words that occur in an evaluation set's questions."""

    def __init__(self, files: Sequence[Path], ngram: int):
        self._runs: dict[int, set[tuple[str, ...]]] = defaultdict(set)
        for file in files:
            for record in readers.records(file):
                for question in _questions(record):
                    size = min(ngram, len(words(question)))
                    if size >= _SHORTEST_QUESTION:
                        self._runs[size] |= shingles(question, size)

    def touches(self, text: str) -> bool:
        return any(not runs.isdisjoint(shingles(text, size)) for size, runs in self._runs.items())


def _questions(record: readers.Record) -> list[str]:
    """Return the questions of a record of an evaluation set. Raise UserMistake where it has none and would keep nothing
    out."""
    if record.is_blank:
        return []
    row, found = record.value, []
    if isinstance(row, dict):
        found = [value for key, value in row.items() if key.lower() in QUESTIONS and isinstance(value, str)]
        found += _texts(row.get("messages"), ("user", "human")) + _texts(row.get("prompt"), ("user", "human"))
    if not found:
        reason = record.problem or f"no question under {', '.join(QUESTIONS)} or in messages"
        raise record.mistake(reason, "mend the evaluation set, or name its questions so")
    return found


def _texts(messages: Any, roles: Sequence[str] = ()) -> list[str]:
    """Return the texts of messages of these roles, or of all; of contents in parts, those of the parts."""
    said = []
    for message in messages if isinstance(messages, list) else []:
        if isinstance(message, dict) and (not roles or message.get("role") in roles):
            content = message.get("content")
            parts = content if isinstance(content, list) else [content]
            texts = [part.get("text", part.get("value")) if isinstance(part, dict) else part for part in parts]
            said += [text for text in texts if isinstance(text, str)]
    return said


def split_thinking(completion: str) -> tuple[str, str] | None:
    """Return (thinking, answer) of a completion, the thinking empty where there is none; None where it is not closed
    once.

    Templates that write `<think>` into the prompt leave only its end in the completion.
    """
    begins, ends = completion.count("<think>"), completion.count("</think>")
    if not ends:
        return None if begins else ("", completion.strip())
    if ends > 1 or begins > 1 or (begins and completion.index("<think>") > completion.index("</think>")):
        return None
    thinking, answer = completion.split("</think>")
    return thinking.replace("<think>", "").strip(), answer.strip()


def own_bucket(row: dict[str, Any], config: Config, contamination: Contamination) -> str:
    """Return the bucket of the first rule that turns a sample away without looking at others, "" when none does."""
    if config.correct and row.get("correct") is None:
        if row.get("reward") is not None:
            raise UserMistake(_unjudged(row))
        return "unscored"
    if config.correct and not row["correct"]:
        return "wrong"
    if not config.truncated and row["finish"] in CUT_OFF:
        return "truncated"
    parts = split_thinking(row["completion"])
    if parts is None or not parts[1] or not re.search(config.answer_pattern, parts[1]):
        return "ill_formed"
    if config.thinking != "any" and bool(parts[0]) != (config.thinking == "required"):
        return "ill_formed"
    if row["tokens"] < config.min_tokens:
        return "too_short"
    if config.max_tokens and row["tokens"] > config.max_tokens:
        return "too_long"
    texts = [*_texts(prompt_messages(row)), *(row.get(key) or "" for key in SYSTEM), row["completion"]]
    return "contaminated" if any(map(contamination.touches, texts)) else ""


def _unjudged(row: dict[str, Any]) -> Problem:
    task = f"task {row['task']}" if "task" in row else "its task"
    reason = f"a sample has reward {row['reward']} and no verdict: {task} does not say which rewards are right"
    return Problem("correct", f"{reason}; let its module say RIGHT = the least right one, or set correct: false")


def buckets_of(completions: Sequence[str], tokens: Sequence[int], config: Config) -> list[str]:
    """Return for each sample of one prompt the bucket that it goes to beside the others, "" for those to keep."""
    order = list(range(len(completions)))
    if config.prefer != "first":
        order.sort(key=lambda place: tokens[place], reverse=config.prefer == "longest")
    runs = [shingles(text) for text in completions]
    buckets = [""] * len(completions)
    unlike: list[int] = []
    for place in order:
        if any(completions[place] == completions[other] for other in unlike):
            buckets[place] = "duplicate"
        elif config.near_duplicate < 1 and any(
            similarity(runs[place], runs[other]) >= config.near_duplicate for other in unlike
        ):
            buckets[place] = "near_duplicate"
        else:
            unlike.append(place)
    limit = config.per_prompt or len(unlike)
    kept = _spread(unlike, runs, limit) if config.prefer == "diverse" else unlike[:limit]
    for place in set(unlike) - set(kept):
        buckets[place] = "over_limit"
    return buckets


def _spread(places: list[int], runs: Sequence[frozenset], limit: int) -> list[int]:
    """Return the first, then again and again the one least like any chosen before."""
    chosen, left = places[:1], places[1:]
    while left and len(chosen) < limit:
        least = min(left, key=lambda place: max(similarity(runs[place], runs[other]) for other in chosen))
        chosen.append(least)
        left.remove(least)
    return chosen


def sample_files(inputs: Sequence[str], key: str = "inputs") -> list[Path]:
    """Return the files that `inputs` names: of any kind, and the JSONL files of folders. Raise UserMistake for what is
    neither."""
    files: list[Path] = []
    problems = []
    for name in inputs:
        path = Path(name).expanduser()
        inside = sorted(file for end in _JSONL for file in path.glob(f"*{end}"))
        named = [path] if path.is_file() else inside
        if not named:
            problems.append(Problem(key, f"{name} is neither a JSONL file nor a folder of some"))
        files += named
    if problems:
        raise UserMistake(problems)
    return files


def reject_filter(config: Config, out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Write the kept samples as chat.jsonl, with balance.json, into the empty folder `out`.

    Facts: kept, prompts, prompts_left, weights and seeds of the samples, table. Prompts and samples keep the order of
    the inputs. UserMistake `FILE:LINE: reason` for a line that is no sample, unless those are dropped.
    """
    problems = check(config)
    if problems:
        raise UserMistake(problems)
    files = sample_files(config.inputs)
    contamination = Contamination(sample_files(config.evaluation_sets, "evaluation_sets"), config.ngram)
    sheets = [SourceBalance(file.name) for file in files]
    groups: dict[str, Group] = defaultdict(Group)
    origins: dict[str, set[str]] = {"weights": set(), "seed": set()}
    with tempfile.TemporaryFile(dir=out) as waiting:
        for number, (file, sheet) in enumerate(zip(files, sheets)):
            for row in _samples(file, sheet, groups, config=config, progress=progress):
                for key in origins.keys() & row.keys():
                    origins[key].add(str(row[key]))
                group = groups[_name(row)]
                group.scored += row.get("correct") is not None
                group.right += row.get("correct") is True
                if bucket := own_bucket(row, config, contamination):
                    sheet.refuse(bucket, row["tokens"])
                else:
                    group.places.append(Place(number, waiting.tell(), row["tokens"]))
                    waiting.write(json.dumps(row).encode() + b"\n")
        left = _write(groups, waiting, sheets, config=config, out=out, progress=progress)
    balance = Balance(sheets)
    balance.write(out)
    fsync_tree(out)
    total = balance.total()
    return {
        "kept": total.kept,
        "samples": total.rows,
        "tokens": total.tokens,
        "prompts": len(groups),
        "prompts_left": left,
        **{key: sorted(values) for key, values in origins.items()},
        "table": balance.table(),
    }


def _samples(
    file: Path, sheet: SourceBalance, groups: dict[str, Group], config: Config, progress: Progress
) -> Iterator[dict[str, Any]]:
    """Yield the samples of a file, each counted on its sheet. Raise UserMistake `FILE:LINE: reason` for what is none,
    unless those are dropped."""
    share = open_share(file)
    for record in readers.records_of(share):
        sheet.lines += 1
        if sheet.lines % _REPORT_EVERY == 0:
            progress(share.done, share.total, share.unit, file.name)
        if record.is_blank:
            sheet.lines_dropped["blank_line"] += 1
            continue
        row = record.value
        wrong = record.problem or problem_of_sample(row)
        if not wrong:
            asked = hash(json.dumps([row.get(key) for key in ("prompt", "messages", *ASKED_WITH)]))
            group = groups[_name(row)]
            if group.asked not in (None, asked):
                wrong = f"prompt_id {row['prompt_id']!r} named another prompt before; name each by itself"
            group.asked = asked
        if wrong:
            if config.on_bad_row == "fail":
                raise record.mistake(wrong, "mend it, or set on_bad_row: drop")
            sheet.lines_dropped["malformed_line" if record.problem else "malformed_sample"] += 1
            continue
        sheet.lines_with_rows += 1
        sheet.rows += 1
        yield row


def _name(row: dict[str, Any]) -> str:
    """Return what its prompt's group is called: 1 and "1" are two."""
    return json.dumps(row["prompt_id"])


def _write(
    groups: dict[str, Group],
    waiting: BinaryIO,
    sheets: Sequence[SourceBalance],
    config: Config,
    out: Path,
    progress: Progress,
) -> int:
    """Choose among each prompt's samples and write them; returns how many prompts have any left."""
    left = 0
    with open(out / CHAT, "w", encoding="utf-8") as chat:
        for done, group in enumerate(groups.values()):
            if done % _REPORT_EVERY == 0:
                progress(done, len(groups), "prompts")
            rate = group.right / group.scored if group.scored else None
            if rate is not None and not config.min_pass_rate <= rate <= config.max_pass_rate:
                for place in group.places:
                    sheets[place.file].refuse("pass_rate", place.tokens)
                continue
            rows = [_read(waiting, place.offset) for place in group.places]
            buckets = buckets_of([row["completion"] for row in rows], [p.tokens for p in group.places], config)
            left += "" in buckets
            for place, row, bucket in zip(group.places, rows, buckets):
                if bucket:
                    sheets[place.file].refuse(bucket, place.tokens)
                else:
                    sheets[place.file].keep(place.tokens, place.tokens)
                    chat.write(json.dumps(_chat_row(row, rate), ensure_ascii=False) + "\n")
    progress(len(groups), len(groups), "prompts")
    return left


def _read(file: BinaryIO, offset: int) -> dict[str, Any]:
    file.seek(offset)
    return json.loads(file.readline())


def _chat_row(row: dict[str, Any], pass_rate: float | None) -> dict[str, Any]:
    """Return a chat row, with what tells where it came from. Of its messages the completion alone is in the loss."""
    carried = {key: row[key] for key in _CARRIED if key in row}
    messages = [*map(_untrained, prompt_messages(row)), {"role": "assistant", "content": row["completion"]}]
    return {"messages": messages, "prompt_id": row["prompt_id"], "pass_rate": pass_rate, **carried}


def _untrained(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message of a prompt; an assistant's, which nobody judged, is kept out of the loss."""
    said = message["from"] if "from" in message else message["role"]
    given = {key: value for key, value in message.items() if key not in IN_LOSS}
    return {**given, "weight": 0} if ROLES[said] == "assistant" else message
