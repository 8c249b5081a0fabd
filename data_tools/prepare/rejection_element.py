"""One element of rejection: of its prompts, the samples that their own rules and their prompt's other samples leave.

All samples of a prompt lie in one element. Behind a `generate` of as many elements that it follows one by one
(aftercorr), an element takes what its partner sampled; of other files each element takes the prompts whose names' hash
is its own. What looks across prompts is left to `rejection_finish`.

Memory holds a few numbers a sample; texts that passed their own rules wait in a file, for their prompt's turn.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_tools.base.durable import write_json
from data_tools.base.json_text import json_line
from data_tools.chats.messages import IN_LOSS, ROLES
from data_tools.chats.samples import ASKED_WITH, CUT_OFF, problem_of_sample, prompt_messages
from data_tools.mistake import UserMistake
from data_tools.prepare.contamination import Contamination, texts_of, words
from data_tools.prepare.rejection import Config, buckets_of, check, method_of, own_bucket
from data_tools.progress import Progress, silent
from data_tools.records import readers
from data_tools.records.balance import Balance, SourceBalance
from data_tools.records.inputs import JSONL, files_of
from data_tools.records.shares import open_share

LEFT, PROMPTS, ORIGINS = "left.jsonl", "prompts.npy", "origins.json"

# Keys of a sample that its chat row keeps.
_CARRIED = ("sample", "seed", "sampling", "weights", "reward", "tokens", *ASKED_WITH)
_REPORT_EVERY = 5000


class Place(NamedTuple):
    """Says where a sample that passed its own rules waits: the number of its file, its first byte among those that
    wait."""

    file: int
    offset: int
    tokens: int
    judged: bool  # whether it has a verdict


@dataclass
class Group:
    """Represents the samples of one prompt."""

    order: tuple[int, int]  # number of its file, its place or line there
    asked: Any = None  # a hash of its prompt or messages
    scored: int = 0
    right: int = 0
    unjudged: int = 0
    votes: Counter[str] = field(default_factory=Counter)  # answers of whole samples without a verdict
    places: list[Place] = field(default_factory=list)

    def majority(self, least: float) -> tuple[str | None, float]:
        """Return (the answer of most samples, its share); None where it has less than `least`, or a tie."""
        ranked = self.votes.most_common(2)
        if not ranked or len(ranked) > 1 and ranked[0][1] == ranked[1][1]:
            return None, 0.0
        share = ranked[0][1] / self.unjudged
        return (ranked[0][0] if share >= least else None), share


@dataclass(frozen=True)
class Share:
    """Says which prompts are an element's: all of the files in the folders of its partners, of others those whose
    names' hash is `index` modulo `count`."""

    index: int = 0
    count: int = 1
    partners: tuple[str, ...] = ()

    def is_partners(self, file: Path) -> bool:
        return any(Path(folder) in (file, *file.parents) for folder in self.partners)

    def has(self, row: dict[str, Any]) -> bool:
        return self.count == 1 or _number(_name(row)) % self.count == self.index


ALL = Share()


def reject_filter(config: Config, out: Path, share: Share = ALL, progress: Progress = silent) -> None:
    """Write what an element leaves for `rejection_finish` into the empty folder `out`: samples by prompts, and counts.

    UserMistake `FILE:LINE: reason` for a line that is no sample, unless those are dropped.
    """
    problems = check(config)
    if problems:
        raise UserMistake(problems)
    files = files_of(config.inputs, JSONL)
    contamination = Contamination(config.ngram)
    contamination.add_files(files_of(config.evaluation_sets, JSONL, "evaluation_sets"))
    sheets = [SourceBalance(file.name) for file in files]
    groups: dict[str, Group] = {}
    origins: dict[str, set[str]] = {"weights": set(), "seed": set()}
    with tempfile.TemporaryFile(dir=out) as waiting:
        for number, (file, sheet) in enumerate(zip(files, sheets)):
            reader = _Reader(config, groups, number, None if share.is_partners(file) else share, progress)
            for row, group in reader.samples(file, sheet):
                for key in origins.keys() & row.keys():
                    origins[key].add(str(row[key]))
                group.scored += row.get("correct") is not None
                group.right += row.get("correct") is True
                if row.get("correct") is None:
                    group.unjudged += 1
                    if row.get("answer") is not None and row["finish"] not in CUT_OFF:
                        group.votes[str(row["answer"])] += 1
                if bucket := own_bucket(row, config, contamination):
                    sheet.refuse(bucket, row["tokens"])
                else:
                    judged = row.get("correct") is not None
                    group.places.append(Place(number, waiting.tell(), row["tokens"], judged))
                    waiting.write(json.dumps(row).encode() + b"\n")
        _write(groups, waiting, sheets, config=config, out=out, progress=progress)
    np.save(out / PROMPTS, np.array([_number(name) for name in groups], dtype=np.uint64))
    write_json(out / ORIGINS, {key: sorted(values) for key, values in origins.items()})
    Balance(sheets).write(out)


@dataclass
class _Reader:
    """Reads the samples of one file."""

    config: Config
    groups: dict[str, Group]
    number: int  # of the file
    share: Share | None  # None: all of the file is the element's
    progress: Progress

    def samples(self, file: Path, sheet: SourceBalance) -> Iterator[tuple[dict[str, Any], Group]]:
        """Yield the element's samples of a file with their groups, each counted on its sheet.

        Raise UserMistake `FILE:LINE: reason` for what is none, unless those are dropped.
        """
        share, first = open_share(file), self.share is None or self.share.index == 0
        for line, record in enumerate(readers.records_of(share), 1):
            if line % _REPORT_EVERY == 0:
                self.progress(share.done, share.total, share.unit, file.name)
            row = record.value
            wrong = "" if record.is_blank else record.problem or problem_of_sample(row) or self._problem(row)
            if record.is_blank or wrong:
                if wrong and self.config.on_bad_row == "fail":
                    raise record.mistake(wrong, "mend it, or set on_bad_row: drop")
                if first:  # a line without a prompt is the first element's
                    bucket = "malformed_line" if record.problem else "malformed_sample" if wrong else "blank_line"
                    sheet.lines += 1
                    sheet.lines_dropped[bucket] += 1
                continue
            if self.share is not None and not self.share.has(row):
                continue
            sheet.lines += 1
            place = row["place"] if isinstance(row.get("place"), int) else line
            asked = hash(json.dumps([row.get(key) for key in ("prompt", "messages", *ASKED_WITH)]))
            group = self.groups.setdefault(_name(row), Group((self.number, place), asked))
            if group.asked != asked:
                wrong = f"prompt_id {row['prompt_id']!r} named another prompt before; name each by itself"
                if self.config.on_bad_row == "fail":
                    raise record.mistake(wrong, "mend it, or set on_bad_row: drop")
                sheet.lines_dropped["malformed_sample"] += 1
                continue
            sheet.lines_with_rows += 1
            sheet.rows += 1
            yield row, group

    def _problem(self, row: dict[str, Any]) -> str:
        """Return why a sample has no vote, where there are votes."""
        answer = row.get("answer")
        if self.config.majority and answer is not None and not isinstance(answer, str):
            return f"'answer' is {str(answer)[:40]!r}, a {type(answer).__name__}, not a text to vote with"
        return ""


def _name(row: dict[str, Any]) -> str:
    """Return what its prompt's group is called: 1 and "1" are two."""
    return json.dumps(row["prompt_id"])


def _number(name: str) -> int:
    """Return 64 bits that name a prompt."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _write(
    groups: dict[str, Group],
    waiting: BinaryIO,
    sheets: Sequence[SourceBalance],
    config: Config,
    out: Path,
    progress: Progress,
) -> None:
    """Choose among each prompt's samples and write those that are left, prompts in their order."""
    with open(out / LEFT, "w", encoding="utf-8") as left:
        in_order = sorted(groups.items(), key=lambda pair: (pair[1].order, _number(pair[0])))  # as `finish` merges
        for done, (name, group) in enumerate(in_order):
            if done % _REPORT_EVERY == 0:
                progress(done, len(groups), "prompts")
            rows = [_read(waiting, place.offset) for place in group.places]
            rate, agreement, buckets = _judged(group, rows, config)
            chosen = [number for number, bucket in enumerate(buckets) if not bucket]
            texts, tokens = [rows[n]["completion"] for n in chosen], [group.places[n].tokens for n in chosen]
            for number, bucket in zip(chosen, buckets_of(texts, tokens, config)):
                buckets[number] = bucket
            for place, row, bucket in zip(group.places, rows, buckets):
                if bucket:
                    sheets[place.file].refuse(bucket, place.tokens)
                    continue
                sheets[place.file].keep(place.tokens, place.tokens)
                line = {
                    "prompt": _number(name),
                    "order": group.order,
                    "file": place.file,
                    "tokens": place.tokens,
                    "task": str(row.get("task", "")),
                    "rate": agreement if rate is None else rate,
                    "asked": words("\n".join(texts_of(prompt_messages(row)))) if config.one_of_a_question else [],
                    "method": method_of(row["completion"]) if config.one_of_a_method == "run" else "",
                    "chat": _chat_row(row, rate, agreement),
                }
                left.write(json_line(line))
    progress(len(groups), len(groups), "prompts")


def _judged(
    group: Group, rows: Sequence[dict[str, Any]], config: Config
) -> tuple[float | None, float | None, list[str]]:
    """Return (share of right samples, share that the answer of most has, the bucket of each sample, "" for none).

    One of the shares is None: a prompt has verdicts, or, where it has none, a majority.
    """
    rate = group.right / group.scored if group.scored else None
    if rate is not None:
        outside = not config.min_pass_rate <= rate <= config.max_pass_rate
        bucket = "pass_rate" if outside else ""
        return rate, None, ["unscored" if config.correct and not p.judged else bucket for p in group.places]
    if not config.majority or not group.unjudged:
        return None, None, [""] * len(rows)
    answer, share = group.majority(config.majority)
    if answer is None:
        return None, share, ["no_majority"] * len(rows)
    bucket = "" if config.min_pass_rate <= share <= config.max_pass_rate else "pass_rate"
    return None, share, [bucket if row.get("answer") == answer else "minority" for row in rows]


def _read(file: BinaryIO, offset: int) -> dict[str, Any]:
    file.seek(offset)
    return json.loads(file.readline())


def _chat_row(row: dict[str, Any], pass_rate: float | None, agreement: float | None) -> dict[str, Any]:
    """Return a chat row, with what tells where it came from. Of its messages the completion alone is in the loss."""
    carried = {key: row[key] for key in _CARRIED if key in row}
    messages = [*map(_untrained, prompt_messages(row)), {"role": "assistant", "content": row["completion"]}]
    judged = {"pass_rate": pass_rate, **({} if agreement is None else {"agreement": agreement})}
    return {"messages": messages, "prompt_id": row["prompt_id"], **judged, **carried}


def _untrained(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message of a prompt; an assistant's, which nobody judged, is kept out of the loss."""
    said = message["from"] if "from" in message else message["role"]
    given = {key: value for key, value in message.items() if key not in IN_LOSS}
    return {**given, "weight": 0} if ROLES[said] == "assistant" else message
