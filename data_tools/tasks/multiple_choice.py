"""Questions with lettered choices, as MMLU and ARC have them.

A record has `question`, `choices` (texts, or {"text", "label"}) and `answer` or `answerKey`: a label, or a place from 0.
"""

import re
from dataclasses import dataclass
from typing import Any, Optional

from data_tools import math_answers
from data_tools.math_answers import REWARDS, check_options, find_answer, text_of
from data_tools.tasks.task import Item

__all__ = ["HUB", "REWARDS", "Options", "check_options", "final_answer", "items", "rewards"]

HUB = "allenai/ai2_arc:ARC-Challenge/train-*.parquet"

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTER = re.compile(r"\W*(?:\\text\w*\s*{)?\W*([A-Z])(?![a-zA-Z])")


@dataclass
class Options(math_answers.Options):
    instruction: str = "Give the letter of the right answer within \\boxed{}."


def items(record: dict[str, Any], options: Options) -> list[Item]:
    choices = record.get("choices")
    labels = choices.get("label") if isinstance(choices, dict) else None
    texts = choices.get("text") if isinstance(choices, dict) else choices
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(_LETTERS):
        raise ValueError(f"'choices' are no list of 2 to {len(_LETTERS)} texts")
    given = record.get("answer", record.get("answerKey"))
    letters = _LETTERS[: len(texts)]
    known = [str(label) for label in labels or letters]
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(texts):
        place = given
    elif str(given) in known:
        place = known.index(str(given))
    else:
        raise ValueError(f"answer {given!r} is none of the choices {', '.join(known)}, nor a place from 0")
    lines = [f"{letter}. {text}" for letter, text in zip(letters, texts)]
    return [math_answers.question("\n".join([text_of(record, "question"), "", *lines]), letters[place], options)]


def rewards(item: Item, completion: str, options: Options) -> dict[str, float]:
    letter = final_answer(item, completion, options)
    return {"correct": float(letter == item.answer), "format": float(letter not in (None, item.answer))}


def final_answer(item: Item, completion: str, options: Options) -> Optional[str]:
    """The letter that the answer begins with: `B`, `(B)`, `\\text{B}`, `B. 42`; also a completion that is only that."""
    answer = find_answer(completion, options.answer_format)
    found = _LETTER.match(completion.strip() if answer is None and len(completion.strip()) <= 3 else answer or "")
    return found[1] if found else None
