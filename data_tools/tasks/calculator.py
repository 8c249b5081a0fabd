"""The calculator task: `48/2=` must be continued with `24`.

Rows come from two places of one form:
* JSONL files of GSM8K's schema {"question", "answer"}, whose answers hold calculator marks: `... is <<48/2=24>>24`;
* a seeded generator (calculator_expressions.py) whose marks follow the proportions of GSM8K's training marks
  (calculator_tables.py); calculator_measure.py takes them again from any set of lines, the generator's own included.

An expression is held out when the hash of its canonical spelling says so (1 of HELDOUT_SHARE): the generator's
`train` split never yields one, its `heldout` split yields nothing else.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from data_tools.base.json_text import json_value
from data_tools.tasks.arithmetic import format_number, parse_number, read
from data_tools.tasks.calculator_expressions import Draws, draw_expression
from data_tools.tasks.calculator_tables import MARKS_PER_LINE
from data_tools.tasks.task import SPLITS, Item, Row

ALPHABET = "0123456789.+-*/()="
HELDOUT_SHARE = 16

REWARDS = {"correct": 1.0}
HUB = "openai/gsm8k:main/train-*.parquet"

_MARK = re.compile(r"<<(.*?)>>", re.DOTALL)
_SUM = re.compile(r"[\d.]+[-+][\d.]+=")


@dataclass
class Options:
    """`reverse_digits`: the model writes answers last character first (`24` as `42`), the order of carries."""

    reverse_digits: bool = False


# ---- rows of a file ----------------------------------------------------------------------------------------------


def parse_line(line: str) -> list[Row]:
    """Return the calculator marks of one GSM8K-schema line; none is legal. Raise ValueError where it is malformed."""
    return _marks(json_value(line))


def _marks(record: Any) -> list[Row]:
    """Return the calculator marks of a GSM8K record. Raise ValueError with the reason where it is none."""
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but a {type(record).__name__}")
    if not isinstance(record.get("answer"), str):
        found = "no" if "answer" not in record else f"a {type(record['answer']).__name__} as"
        raise ValueError(f"{found} answer; GSM8K's schema has the strings question and answer")
    rows = []
    for mark in _MARK.findall(record["answer"]):
        expression, equals, answer = mark.rpartition("=")
        rows.append(Row(expression + equals, answer) if equals else Row(mark, ""))
    return rows


def verify(row: Row) -> str | None:
    """Return None when the answer is exactly the expression's value, else `unparsable` or `wrong_answer`.

    The answer may itself be an expression (GSM8K's test split has `3/4=3/4`). A value without a finite decimal has
    no right answer here: all 27,998 marks of GSM8K are exact.
    """
    try:
        value, _ = read(row.prompt.removesuffix("="))
        answer, _ = read(row.answer)
    except ValueError:
        return "unparsable"
    return None if value == answer and format_number(value) is not None else "wrong_answer"


def canonical(row: Row) -> Row:
    """Return numbers in their shortest spelling (75.00 → 75, .5 → 0.5) and nothing around them; for verified rows."""
    value, expression = read(row.prompt.removesuffix("="))
    return Row(expression + "=", format_number(value) or row.answer)


def encode_answer(answer: str, options: Options) -> str:
    return answer[::-1] if options.reverse_digits else answer


def decode_answer(text: str, options: Options) -> str:
    return text[::-1] if options.reverse_digits else text


def is_correct(answer: str, completion: str, options: Options) -> bool:
    """Return whether the completion is one number, numerically equal to the answer (exact rationals, no tolerance).

    An expression is no answer: a model that repeats `48/2` has not calculated.
    """
    written = parse_number(decode_answer(completion, options))
    return written is not None and written == parse_number(answer)


def kind(row: Row) -> str:
    """Return what evaluations tell apart: a sum or difference of two numbers, or anything else."""
    return "single_operation_sums" if _SUM.fullmatch(row.prompt) else "others"


# ---- prompts to score ---------------------------------------------------------------------------------------------


def items(record: "dict[str, Any] | Row", options: Options) -> list[Item]:
    """Return the marks of a GSM8K record that are right, or a row of the generator's."""
    if isinstance(record, Row):
        rows = [record]
    else:
        rows = [canonical(row) for row in _marks(record) if verify(row) is None]
    return [Item.of(row.prompt, row.answer) for row in rows]


def left_out(record: "dict[str, Any] | Row") -> list[str]:
    """Return why marks of a record give no prompt, a bucket each."""
    rows = [] if isinstance(record, Row) else _marks(record)
    return [bucket for row in rows if (bucket := verify(row)) is not None]


def rewards(item: Item, completion: str, options: Options) -> dict[str, float]:
    return {"correct": float(is_correct(item.answer, completion, options))}


def final_answer(item: Item, completion: str, options: Options) -> str | None:
    written = parse_number(decode_answer(completion, options))
    return None if written is None else str(written)


# ---- the generator -----------------------------------------------------------------------------------------------


def is_heldout(expression: str) -> bool:
    """Return whether the generator keeps this expression out of its `train` split: by hash of the canonical spelling.

    `3*4` and `4*3` are two expressions.
    """
    return _is_heldout(read(expression)[1])


def _is_heldout(spelled: str) -> bool:
    return hashlib.blake2b(spelled.encode(), digest_size=8).digest()[0] % HELDOUT_SHARE == 0


def synthetic_row(seed: int, index: int, split: str) -> Row:
    """Return row `index` (from 0) of a split's endless stream: canonical, right, and on its side of `is_heldout`."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}; valid: {', '.join(SPLITS)}")
    draws = Draws("calculator", seed, split, index)
    while True:
        expression = draw_expression(draws)
        if _is_heldout(expression) == (split == "heldout"):
            return Row(expression + "=", format_number(read(expression)[0]) or "")


def synthetic_line(seed: int, index: int, split: str) -> str:
    """Return line `index` of the same stream in GSM8K's schema: line 0 holds rows 0.., line 1 the next ones, and so on.

    The number of marks runs through a fixed cycle of 100 lines (MARKS_PER_LINE), so that a line finds its rows
    without its predecessors.
    """
    cycles, place = divmod(index, len(_LINE_STARTS) - 1)
    first = cycles * _LINE_STARTS[-1] + _LINE_STARTS[place]
    count = _LINE_STARTS[place + 1] - _LINE_STARTS[place]
    rows = [synthetic_row(seed, first + offset, split) for offset in range(count)]
    steps = "\n".join(f"{row.prompt}<<{row.prompt}{row.answer}>>{row.answer}" for row in rows)
    question = "What is " + ", then ".join(row.prompt[:-1] for row in rows) + "?"
    return json.dumps({"question": question, "answer": f"{steps}\n#### {rows[-1].answer}"})


def _line_starts() -> list[int]:
    """Return first row of each line of a cycle, then the rows of a whole cycle; short and long lines well mixed."""
    counts = [count for count, lines in MARKS_PER_LINE.items() for _ in range(lines)]
    mixed = [counts[place * 37 % len(counts)] for place in range(len(counts))]  # 37 is coprime to 100
    return list(accumulate(mixed, initial=0))


_LINE_STARTS = _line_starts()
