"""MBPP (google-research-datasets/mbpp, full and sanitized): short Python functions, each with some assertions that it
has to pass; the prompt shows them. The hub's file here is that of training.

What the assertions call is what the row's own solution defines, and what it imports they may use.
"""

from typing import Any

from data_tools.tasks.math_answers import text_of
from data_tools.tasks.programs import (
    REWARDS,
    Options,
    check_machine,
    code_of,
    defined_by,
    ended_at,
    passed,
    verdict_s,
    warm_up,
)
from data_tools.tasks.task import Item

__all__ = ["HUB", "REWARDS", "Options", "check_machine", "items", "rewards", "verdict_s", "warm_up"]

HUB = "google-research-datasets/mbpp:full/train-*.parquet"

_ASKED = (
    "You are an expert Python programmer, and here is your task: {task} Your code should pass these tests:\n\n{tests}\n"
)
_FORM, _BEGIN, _DONE = "\nAnswer with the code in one ```python block.", "[BEGIN]\n", "[DONE]"


def items(record: dict[str, Any], options: Options) -> list[Item]:
    tests = record.get("test_list")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError("'test_list' is no list of assertions")
    imported, code = record.get("test_imports") or [], record.get("test_setup_code") or ""
    if not isinstance(imported, list) or not all(isinstance(line, str) for line in [*imported, code]):
        raise ValueError("'test_imports' is no list of lines, or 'test_setup_code' is no text")
    calls, imports = defined_by(text_of(record, "code").replace("\r\n", "\n"))
    setup = "\n".join([imports, *imported, code])
    if not calls:
        raise ValueError("its code defines no function")
    task = text_of(record, "text", "prompt").strip()
    asked = _ASKED.format(task=task, tests="\n".join(tests))
    prompt = [{"role": "user", "content": asked + _FORM}] if options.chat else asked + _BEGIN
    return [Item.of(prompt, None, {"setup": setup, "tests": tests, "calls": calls}, question=task)]


def rewards(item: Item, completion: str, options: Options) -> dict[str, float] | None:
    text = completion if options.chat else ended_at(completion, (_DONE,))
    return passed(item, code_of(text, item.columns["calls"]), options)
