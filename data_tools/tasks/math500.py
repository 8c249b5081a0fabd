"""MATH-500 (HuggingFaceH4/MATH-500): questions whose answers are LaTeX. For evaluation."""

from typing import Any

from data_tools.tasks.math_answers import (
    REWARDS,
    Options,
    check_options,
    final_answer,
    question,
    rewards,
    text_of,
    warm_up,
)
from data_tools.tasks.task import Item

__all__ = ["HUB", "REWARDS", "Options", "check_options", "final_answer", "items", "rewards", "warm_up"]

HUB = "HuggingFaceH4/MATH-500:test.jsonl"


def items(record: dict[str, Any], options: Options) -> list[Item]:
    return [question(text_of(record, "problem"), text_of(record, "answer"), options)]
