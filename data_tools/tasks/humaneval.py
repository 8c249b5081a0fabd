"""HumanEval (openai/openai_humaneval): 164 functions to be completed from their head; tests call them. For evaluation.

A base model (chat: false) goes on from the head, up to the first line that is no longer the function's, as in
lm-evaluation-harness.
"""

from typing import Any

from data_tools.tasks.math_answers import text_of
from data_tools.tasks.programs import (
    REWARDS,
    Options,
    check_machine,
    code_of,
    defines,
    ended_at,
    passed,
    verdict_s,
    warm_up,
)
from data_tools.tasks.task import Item

__all__ = ["HUB", "REWARDS", "Options", "check_machine", "items", "rewards", "verdict_s", "warm_up"]

HUB = "openai/openai_humaneval:openai_humaneval/test-*.parquet"

_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_ASKED = (
    "Complete the following Python function. Answer with the whole function in one ```python block.\n\n"
    "```python\n{head}\n```"
)


def items(record: dict[str, Any], options: Options) -> list[Item]:
    head, test, name = (text_of(record, key) for key in ("prompt", "test", "entry_point"))
    columns = {"setup": head, "tests": [test, f"check({name})"], "calls": [name]}
    prompt = [{"role": "user", "content": _ASKED.format(head=head.strip("\n"))}] if options.chat else head
    return [Item.of(prompt, None, columns)]


def rewards(item: Item, completion: str, options: Options) -> dict[str, float] | None:
    head, names = item.columns["setup"], item.columns["calls"]
    if not options.chat:
        return passed(item, head + ended_at(completion, _STOPS), options)
    code = code_of(completion, names)
    return passed(item, f"{head}\n{code}" if defines(code, names) else head + code, options)
