"""MATH (EleutherAI/hendrycks_math, or Hendrycks' own files): competition questions; the answer is the last box of the
row's solution. The hub's files here are those of training, 7,500 questions in seven subjects."""

from typing import Any

from data_tools.answers.forms import last_boxed
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

HUB = "EleutherAI/hendrycks_math:*/train-*.parquet"


def items(record: dict[str, Any], options: Options) -> list[Item]:
    answer = last_boxed(text_of(record, "solution"))
    if not answer or not answer.strip():
        raise ValueError("its solution has no box with the answer")
    return [question(text_of(record, "problem"), answer, options)]
