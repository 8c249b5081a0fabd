"""Countdown (Jiayi-Pan/Countdown-Tasks-3to4, or made up): some numbers and a target that an expression of all of them,
each once, is to equal.

A record has `nums` and `target`. Synthetic rows have 3 or 4 numbers from 1 to 99 and a target from 10 to 999 that can
be reached; one of HELDOUT_SHARE is held out, by hash of its numbers and target.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from data_tools.answers.forms import find_answer
from data_tools.tasks import math_answers
from data_tools.tasks.arithmetic import parse_number, read, tokenize
from data_tools.tasks.calculator_expressions import Draws
from data_tools.tasks.math_answers import REWARDS, check_options
from data_tools.tasks.task import SPLITS, Item

__all__ = ["HUB", "REWARDS", "Options", "check_options", "final_answer", "items", "rewards", "synthetic_row"]

HUB = "Jiayi-Pan/Countdown-Tasks-3to4:data/train-*.parquet"
HELDOUT_SHARE = 16

_ASKED = (
    "Using the numbers {numbers}, write an expression that equals {target}. You can use +, -, *, / and parentheses, "
    "and have to use each number exactly once."
)
_SPELLED = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")"})
_TEX = ((r"\times", "*"), (r"\cdot", "*"), (r"\div", "/"), (r"\left", ""), (r"\right", ""))


@dataclass
class Options(math_answers.Options):
    answer_format: str = "tagged"
    instruction: str = (
        "Show your work, and write the expression between <answer> and </answer>, such as <answer>(1 + 2) / 3</answer>."
    )


def items(record: dict[str, Any], options: Options) -> list[Item]:
    numbers, target = record.get("nums"), record.get("target")
    if not isinstance(numbers, list) or not numbers or not all(map(_is_whole, numbers)):
        raise ValueError(f"'nums' are {numbers!r}, no list of whole numbers from 0")
    if not _is_whole(target):
        raise ValueError(f"'target' is {target!r}, no whole number from 0")
    asked = _ASKED.format(numbers=", ".join(map(str, numbers)), target=target)
    item = math_answers.question(asked, str(target), options)
    return [replace(item, columns={"numbers": sorted(numbers)})]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def rewards(item: Item, completion: str, options: Options) -> dict[str, float]:
    answer = find_answer(completion, options.answer_format)
    correct = answer is not None and reaches(answer, item.columns["numbers"], int(item.answer))
    return {"correct": float(correct), "format": float(answer is not None and not correct)}


def final_answer(item: Item, completion: str, options: Options) -> str | None:
    """Return the expression in one spelling, whatever spaces it was written with; None where it is none."""
    found = _expression(find_answer(completion, options.answer_format) or "")
    return None if found is None else found[1]


def reaches(answer: str, numbers: list[int], target: int) -> bool:
    """Return whether an answer is an expression of exactly these numbers that equals the target; `= target` may stand
    behind it."""
    found = _expression(answer)
    return found is not None and found[0] == target and found[2] == sorted(numbers)


def _expression(answer: str) -> tuple[Fraction, str, list[Fraction]] | None:
    """Return (value, one spelling, numbers in order of size) of an expression; None for anything else, for // too."""
    for written, meant in _TEX:
        answer = answer.replace(written, meant)
    text, equals, result = re.sub(r"\s+", " ", answer.translate(_SPELLED)).partition("=")
    try:
        value, spelled = read(text)
    except ValueError:
        return None
    if "//" in text or equals and parse_number(result) != value:
        return None
    numbers = [number for token in tokenize(spelled) if (number := parse_number(token)) is not None]
    return value, spelled, sorted(numbers)


def is_heldout(numbers: list[int], target: int) -> bool:
    """Return whether synthetic rows of training never ask this."""
    return hashlib.blake2b(repr((sorted(numbers), target)).encode(), digest_size=8).digest()[0] % HELDOUT_SHARE == 0


def synthetic_row(seed: int, index: int, split: str) -> dict[str, Any]:
    """Return record `index` (from 0) of a split's endless stream; it can be solved."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}; valid: {', '.join(SPLITS)}")
    draws = Draws("countdown", seed, split, index)
    while True:
        numbers = [draws.integer(1, 99) for _ in range(draws.integer(3, 4))]
        target = _joined(draws, list(numbers))
        if target is not None and 10 <= target <= 999 and is_heldout(numbers, target) == (split == "heldout"):
            return {"nums": numbers, "target": target}


def _joined(draws: Draws, values: list[int]) -> int | None:
    """Return the value of a drawn expression of all values, None where a division on the way has a remainder."""
    while len(values) > 1:
        one, other = (values.pop(draws.integer(0, len(values) - 1)) for _ in range(2))
        sign = "+-*/"[draws.integer(0, 3)]
        if sign == "/" and (other == 0 or one % other):
            return None
        values.append(one // other if sign == "/" else {"+": one + other, "-": one - other, "*": one * other}[sign])
    return values[0]
