"""SVAMP (ChilleD/SVAMP): school questions of one step, worded so that cues mislead; a body and a question. The hub's
file here is that of training."""

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

HUB = "ChilleD/SVAMP:data/train-*.parquet"


def items(record: dict[str, Any], options: Options) -> list[Item]:
    body = text_of(record, "Body").strip()
    asked = f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {text_of(record, 'Question').strip()}"
    return [question(asked, text_of(record, "Answer"), options)]
