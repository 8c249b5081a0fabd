"""Training data → the same without the rows that hold a question of an evaluated task, and what was found.

The questions are those of tasks, as a mix names them, and of files (prepare/contamination.py has the rule). Choices and
tests are no part of a question, unless others of the task ask the same. Of a task that does not tell its questions
apart, its prompts are, without what all of them begin and end with. Of a training row every text counts, at any
depth. An array takes shares of every file; `finish` joins them: the same bytes for any number of
elements.

    OUT/NAME.jsonl        the rows of input NAME.* that stay, in their order
    OUT/questions.jsonl   the questions, for `evaluation_sets` of other phases
    OUT/found.jsonl       which rows hold which question, and the words that they share
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.base.declared import setting
from data_tools.base.durable import fsync_tree
from data_tools.base.inside import expanded
from data_tools.base.json_text import json_line
from data_tools.base.one_file import open_part
from data_tools.mistake import Problem, UserMistake
from data_tools.prepare.contamination import (
    NGRAM,
    SHORTEST,
    Contamination,
    Hit,
    every_text,
    questions_of,
    texts_of,
    words,
)
from data_tools.progress import Progress, silent
from data_tools.records import readers
from data_tools.records.balance import Balance, SourceBalance
from data_tools.records.shares import open_share
from data_tools.tasks.mix import MixConfig, check_mix, entries_of, load_items
from data_tools.tasks.task import Item, Prompt

QUESTIONS, FOUND = "questions.jsonl", "found.jsonl"
ON_FOUND, ON_BAD_ROW = ("drop", "report", "fail"), ("fail", "drop")

_REPORT_EVERY = 2000


@dataclass
class Config:
    """The config of the phase decontaminate."""

    inputs: list[str] = setting(
        list, "files of training data, of any format and schema; none: the questions are collected, for other phases",
        example=["chats.jsonl"],
        input=True,
    )  # fmt: skip
    mix: MixConfig = setting(MixConfig, "the tasks that are evaluated: their prompts are the questions")
    evaluation_sets: list[str] = setting(list, "files of further questions", example=["gsm8k/test.jsonl"], input=True)
    ngram: int = setting(
        NGRAM, "words in a row that a row shares with a question when it holds it", unit="words", least=SHORTEST
    )
    on_found: str = setting("drop", "what a row that holds a question does; report keeps it", choices=ON_FOUND)
    examples: int = setting(20, "rows that the table shows", unit="rows", least=0, keyed=False)
    on_bad_row: str = setting("fail", "what a line that is no record does", choices=ON_BAD_ROW)


def check(config: Config) -> list[Problem]:
    """Refuse a phase without questions, and inputs whose outputs would have one name."""
    problems = []
    if config.mix.entries or config.mix.environments:
        problems += check_mix(config.mix, training=False, comparing=True)  # prompts are all that is read
    elif not config.evaluation_sets:
        problems.append(
            Problem("mix.entries", "nothing to keep out: name evaluated tasks, or files in evaluation_sets")
        )
    names: dict[str, str] = {}
    for place, file in enumerate(config.inputs):
        name = out_name(file)
        if name in names or name in (QUESTIONS, FOUND):
            taken = f"{names.get(name, 'what this phase writes')} and {file} would both be {name} in its folder"
            problems.append(Problem(f"inputs[{place}]", f"{taken}; rename one"))
        names[name] = file
    return problems


def out_name(file: str) -> str:
    """Return the name of what stays of an input: JSONL, whatever it was."""
    name = Path(file).name
    for suffix in (".gz", ".zst", ".jsonl", ".json", ".parquet", ".csv"):
        name = name.removesuffix(suffix)
    return f"{name}.jsonl"


def questions(config: Config) -> dict[str, list[str]]:
    """Return the questions of each evaluation set: tasks by their names in the mix, files by theirs."""
    has_tasks = bool(config.mix.entries or config.mix.environments)
    found = {
        name: questions_of_items(load_items(name, entry))
        for name, entry in (entries_of(config.mix) if has_tasks else {}).items()
    }
    for name in config.evaluation_sets:
        path = expanded(name)
        key = path.name if path.name not in found else str(path)
        found[key] = [text for record in readers.records(path) for text in questions_of(record)]
    return found


def questions_of_items(items: Sequence[Item]) -> list[str]:
    """Return the question of each item as words: the one that its task tells apart, so that training data has it
    without its choices and tests, too; where there is none, or others have it with other choices, its prompt's."""
    alone = [" ".join(words(item.question)) for item in items]
    asking, prompts = Counter(alone), without_template([asked(item.prompt) for item in items])
    found = [text if text and asking[text] == 1 else prompt for text, prompt in zip(alone, prompts)]
    return [text for text in found if text]


def asked(prompt: Prompt) -> str:
    """Return what a prompt asks: its text, or what its user says."""
    return prompt if isinstance(prompt, str) else "\n".join(texts_of(prompt, ("user", "human")))


def without_template(prompts: Sequence[str]) -> list[str]:
    """Return prompts as words, without those that all begin and end with; of a lone prompt, or equal ones, all stay."""
    spelled = [words(prompt) for prompt in prompts]
    if len({tuple(each) for each in spelled}) < 2:
        return [" ".join(each) for each in spelled]
    begins = len(os.path.commonprefix(spelled))
    left = [each[begins:] for each in spelled]
    ends = len(os.path.commonprefix([each[::-1] for each in left]))
    return [" ".join(each[: len(each) - ends]) for each in left]


def decontaminate(config: Config, out: Path, index: int, count: int, progress: Progress = silent) -> dict[str, Any]:
    """Write what stays of element `index` of `count` into the empty folder `out`, with what was found; return counts.

    Raise UserMistake for every problem of `check`, for a line that is no record, unless those are dropped, and for a
    row that holds a question where that fails.
    """
    problems = check(config)
    if problems:
        raise UserMistake(problems)
    known, sets = Contamination(config.ngram), questions(config)
    for name, texts in sets.items():
        known.add(name, texts)
    if index == 0:
        _write_lines(out / QUESTIONS, ({"question": t, "evaluation": n} for n, texts in sets.items() for t in texts))
    sheets = []
    with open(out / FOUND, "w", encoding="utf-8") as found:
        for name in config.inputs:
            share, sheet = open_share(expanded(name), index, count), SourceBalance(name)
            sheets.append(sheet)
            with open(out / out_name(name), "w", encoding="utf-8") as kept:
                for record in readers.records_of(share):
                    sheet.lines += 1
                    if sheet.lines % _REPORT_EVERY == 0:
                        progress(share.done, share.total, share.unit, name)
                    if not _is_row(record, sheet, config):
                        continue
                    hit = next(filter(None, map(known.find, every_text(record.value))), None)
                    if hit:
                        found.write(json_line(_told(hit, record, name, number=sheet.lines, config=config)))
                        sheet.dropped["contaminated"] += config.on_found == "drop"
                    if not hit or config.on_found == "report":
                        sheet.keep(0, 0)
                        kept.write(record.line(record.value))
            sheet.dropped += Counter()  # without the buckets of nothing
            progress(share.total, share.total, share.unit, name)
    balance = Balance(sheets)
    balance.write(out)
    return {"rows": balance.total().rows, "kept": balance.total().kept, "questions": len(known)}


def _is_row(record: readers.Record, sheet: SourceBalance, config: Config) -> bool:
    """Return whether a line is a record, and count it. Raise UserMistake where it is none and that fails."""
    bucket = "blank_line" if record.is_blank else "malformed_line" if record.problem else ""
    if record.problem and config.on_bad_row == "fail":
        raise record.mistake(remedy="mend it, or set on_bad_row: drop")
    if bucket:
        sheet.lines_dropped[bucket] += 1
        return False
    sheet.lines_with_rows += 1
    sheet.rows += 1
    return True


def _told(hit: Hit, record: readers.Record, name: str, *, number: int, config: Config) -> dict[str, Any]:
    """Return what is written down of the row of this number. Raise UserMistake where that fails."""
    if config.on_found == "fail":
        reason = f"holds question {hit.number + 1} of {hit.evaluation}: {hit.shared[:120]!r}"
        raise record.mistake(reason, "take the row out, or set on_found: drop")
    return {
        "input": name,
        "row": number,
        "evaluation": hit.evaluation,
        "question": hit.number + 1,
        "whole": hit.is_whole,
        "shared": hit.shared,
    }


def finish(config: Config, parts: Sequence[Path], out: Path) -> dict[str, Any]:
    """Join the elements' files in their order into the empty folder `out`; return counts and tables."""
    for name in map(out_name, config.inputs):
        with open(out / name, "wb") as whole:
            for part in parts:
                with open_part(part / name) as file:
                    shutil.copyfileobj(file, whole)
    with open_part(parts[0] / QUESTIONS) as file, open(out / QUESTIONS, "wb") as whole:
        shutil.copyfileobj(file, whole)
    sheets = [Balance.read(part) for part in parts]
    found = _found(config, parts, sheets)
    _write_lines(out / FOUND, found)
    balance = sum(sheets[1:], sheets[0])
    balance.write(out)
    fsync_tree(out)
    asked_of = Counter(line["evaluation"] for line in _lines(out / QUESTIONS))
    rows = Counter(row["evaluation"] for row in found)
    all_of_it = Counter(row["evaluation"] for row in found if row["whole"])
    hit = Counter(name for name, _ in {(row["evaluation"], row["question"]) for row in found})
    by_set = [[name, asked_of[name], hit[name], rows[name], all_of_it[name]] for name in asked_of]
    shown = [
        [
            f"{row['input']}:{row['row']}",
            row["evaluation"],
            row["question"],
            "yes" if row["whole"] else "no",
            row["shared"][:200],
        ]
        for row in found[: config.examples]
    ]
    total = balance.total()
    return {
        "rows": total.rows,
        "kept": total.kept,
        "questions": sum(asked_of.values()),
        "contaminated": len(found),
        "by_evaluation": {name: rows[name] for name in asked_of},
        "tables": {
            "balance": balance.table(),
            "contamination": {
                "title": f"Questions that training rows hold: {config.ngram} words in a row, or all of one",
                "columns": ["evaluation", "questions", "of them found", "rows with one", "with all of it"],
                "rows": by_set,
            },
            "examples": {
                "title": f"The first {len(shown)} of {len(found):,} rows that hold a question",
                "columns": ["row", "evaluation", "question", "all of it", "words they share"],
                "rows": shown,
            },
        },
    }


def _found(config: Config, parts: Sequence[Path], sheets: Sequence[Balance]) -> list[dict[str, Any]]:
    """Return what the elements found, input by input, with the numbers that rows have in the whole file."""
    rows, before = [], [0] * len(config.inputs)
    for part, sheet in zip(parts, sheets):
        for row in _lines(part / FOUND):
            rows.append({**row, "row": row["row"] + before[config.inputs.index(row["input"])]})
        before = [lines + source.lines for lines, source in zip(before, sheet.sources)]
    return sorted(rows, key=lambda row: config.inputs.index(row["input"]))  # stable: one file's rows stay in order


def _write_lines(path: Path, rows: Iterable[Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(map(json_line, rows))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open_part(path) as file:
        yield from map(json.loads, file)
