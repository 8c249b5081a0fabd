"""Answers to mathematical questions: asked for in a form, found in a completion, compared by what they say.

Where an answer stands is said in answers/forms.py, what it says in answers/values.py, and when two are equal in
answers/equality.py. What a completion is worth:

    correct  1 when its answer equals the row's, as numbers, expressions, sets, intervals, …; 0 when it differs, cannot
             be read, or there is none: that is the model's fault. A row whose own answer cannot be read is not
             scorable.
    format   1 when there is an answer in an accepted form that is not correct (Megatron-LM's format_reward)

The process of verifiers has the time limit, so math-verify's own, which need signals, are off.
"""

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from data_tools.answers.equality import is_same, key
from data_tools.answers.forms import find_answer
from data_tools.answers.spelling import spelled
from data_tools.answers.values import read
from data_tools.mistake import nearest
from data_tools.tasks.task import Item

REWARDS = {"correct": 1.0, "format": 0.0}
INSTRUCTIONS = {
    "boxed": "Please reason step by step, and put your final answer within \\boxed{}.",
    "tagged": "Please reason step by step, and put your final answer between <answer> and </answer>.",
    "hashes": "Please reason step by step, and write your final answer on a last line that begins with ####.",
    "answer_line": "Please reason step by step, and write your final answer on a last line that begins with Answer:.",
}


@dataclass
class Options:
    answer_format: str = "boxed"  # boxed | tagged | hashes | answer_line
    chat: bool = True  # the prompt is a user's message for the chat template; false: text for a base model
    instruction: str = ""  # after the question; "" = the form's own


def check_options(options: Options) -> list[str]:
    if options.answer_format in INSTRUCTIONS:
        return []
    return [f"unknown answer_format {options.answer_format!r}{nearest(options.answer_format, list(INSTRUCTIONS))}"]


def question(text: str, answer: str, options: Options) -> Item:
    """Return the item that asks a question in the form that the options want."""
    asked = f"{text.strip()}\n\n{options.instruction or INSTRUCTIONS[options.answer_format]}"
    return Item.of([{"role": "user", "content": asked}] if options.chat else f"{asked}\n", answer)


def text_of(record: dict[str, Any], *keys: str) -> str:
    """Return the text, or the number as text, under the first of the keys that there is. Raise ValueError when there is
    none."""
    for name in keys:
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, int) and not isinstance(value, bool):  # of any size: 10**400 is no float
            return str(value)
        if isinstance(value, float) and math.isfinite(value):
            return format(Decimal(repr(value)), "f")  # 0.00001, which is 1e-05 to str
    raise ValueError(
        f"no text under {' or '.join(map(repr, keys))}; it has {', '.join(map(repr, record)) or 'nothing'}"
    )


def rewards(item: Item, completion: str, options: Options) -> dict[str, float] | None:
    answer = find_answer(completion, options.answer_format)
    correct = answer is not None and is_equal(item.answer, answer)
    if not correct and read(item.answer) is None:
        return None
    return {"correct": float(correct), "format": float(answer is not None and not correct)}


def final_answer(item: Item, completion: str, options: Options) -> str | None:
    """Return the key of the answer: one for all that are equal as answers to this question."""
    answer = find_answer(completion, options.answer_format)
    return None if answer is None else vote(item.answer, answer)


def warm_up() -> None:
    """Import what answers are read with."""
    read("x+1")


def is_equal(gold: str, answer: str) -> bool:
    """Return whether an answer says what the row's own does."""
    if _plain(gold) == _plain(answer):
        return True
    mine, theirs = read(gold), read(answer)
    return mine is not None and theirs is not None and is_same(mine, theirs)


def vote(gold: str, answer: str) -> str:
    """Return the one spelling of an answer among all that are equal to it; of one that cannot be read, its text."""
    mine, theirs = read(gold), read(answer)
    return _plain(answer) if theirs is None else key(theirs, theirs if mine is None else mine)


def _plain(text: str) -> str:
    """Return the text in one spelling, with spaces only where they part letters or digits."""
    return re.sub(r"(?<![\w.]) | (?![\w.])", "", spelled(text).replace("⟦", "").replace("⟧", "")).strip(".")
