"""GSM8K (openai/gsm8k): school questions; the answer stands after #### in the row's solution.

With `calculator`, the model may write <<48/2= and is told 24>>: a conversation of several turns with a tool.
"""

import re
from dataclasses import dataclass
from typing import Any

from data_tools.tasks import math_answers
from data_tools.tasks.arithmetic import evaluate, format_number
from data_tools.tasks.math_answers import REWARDS, check_options, final_answer, question, rewards, text_of, warm_up
from data_tools.tasks.task import Item

__all__ = [
    "HUB",
    "REWARDS",
    "Options",
    "check_options",
    "final_answer",
    "items",
    "reply",
    "rewards",
    "stop_strings",
    "warm_up",
]

HUB = "openai/gsm8k:main/train-*.parquet"

_ASKED = re.compile(r"<<([^<>=]*)=$")


@dataclass
class Options(math_answers.Options):
    calculator: bool = False


def items(record: dict[str, Any], options: Options) -> list[Item]:
    solution, mark, answer = text_of(record, "answer").rpartition("####")
    if not mark or not answer.strip():
        raise ValueError("its answer has no #### before the final number")
    return [question(text_of(record, "question"), answer.strip().replace(",", ""), options)]


def stop_strings(options: Options) -> list[str] | None:
    return ["="] if options.calculator else None


def reply(item: Item, transcript: str, options: Options) -> str:
    """Return the value of an expression that was begun; nothing said ("") after anything else."""
    asked = _ASKED.search(transcript)
    if not asked:
        return ""
    try:
        value = format_number(evaluate(asked[1]))
    except ValueError as error:
        return f"error: {error}>>"
    return f"{value}>>" if value else "error: no finite decimal>>"
