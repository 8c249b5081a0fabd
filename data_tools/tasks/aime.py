"""AIME 2024 (Maxwell-Jia/AIME_2024): thirty questions whose answers are whole numbers from 0 to 999. For evaluation."""

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

HUB = "Maxwell-Jia/AIME_2024"


def items(record: dict[str, Any], options: Options) -> list[Item]:
    """Return the prompt of a record, by other spellings of the keys too: Qwen2.5-Math, HuggingFaceH4, math-ai."""
    return [question(text_of(record, "Problem", "problem", "question"), text_of(record, "Answer", "answer"), options)]
