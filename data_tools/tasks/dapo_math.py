"""DAPO-Math-17k (BytedTsinghua-SIA): competition questions whose answers are whole numbers.

A record has `prompt` (messages, or their text), and the answer under reward_model.ground_truth, solution or answer. The
file of the hub repeats its 17,917 prompts a hundred times; equal prompts are one here.
"""

import re
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

HUB = "BytedTsinghua-SIA/DAPO-Math-17k:data/*.parquet"

# What the data set itself asks for around each question; `options.answer_format` says it here.
_BEFORE = re.compile(r"^Solve the following math problem step by step\..*?answer to the problem\.\s*", re.DOTALL)
_AFTER = re.compile(r'\s*Remember to put your answer on its own line after "Answer:"\.\s*$')


def items(record: dict[str, Any], options: Options) -> list[Item]:
    prompt = record.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        prompt = prompt[-1].get("content")
    text = text_of({"prompt": prompt} if prompt else record, "prompt", "problem", "question")
    model = record.get("reward_model")
    answer = text_of({**record, **(model if isinstance(model, dict) else {})}, "ground_truth", "solution", "answer")
    return [question(_AFTER.sub("", _BEFORE.sub("", text)), answer, options)]
