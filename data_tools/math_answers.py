"""Answers to mathematical questions: asked for in a form, found in a completion, compared by math-verify.

    form          asked for and found as                      form          asked for and found as
    boxed         \\boxed{42}                                  hashes        a last line #### 42
    tagged        <answer> 42 </answer>                       answer_line   a last line Answer: 42

The last one of the asked form counts; where there is none, the last \\boxed{}. What a completion is worth:

    correct  1 when its answer equals the row's, as numbers, expressions, sets, intervals, …; 0 when it differs, cannot be
             read, or there is none: that is the model's fault. A row whose own answer cannot be read is not scorable.
    format   1 when there is an answer in an accepted form that is not correct (Megatron-LM's format_reward)

The process of verifiers has the time limit, so math-verify's own, which need signals, are off.
"""

import functools
import logging
import re
from dataclasses import dataclass
from typing import Any, Optional

from data_tools.mistake import nearest
from data_tools.tasks.task import Item

REWARDS = {"correct": 1.0, "format": 0.0}
INSTRUCTIONS = {
    "boxed": "Please reason step by step, and put your final answer within \\boxed{}.",
    "tagged": "Please reason step by step, and put your final answer between <answer> and </answer>.",
    "hashes": "Please reason step by step, and write your final answer on a last line that begins with ####.",
    "answer_line": "Please reason step by step, and write your final answer on a last line that begins with Answer:.",
}
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_LINES = {
    "hashes": re.compile(r"####[ \t]*(.+)"), "answer_line": re.compile(r"^[ \t*]*Answer:[ \t*]*(.+)", re.MULTILINE)
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
    """The item that asks a question in the form that the options want."""
    asked = f"{text.strip()}\n\n{options.instruction or INSTRUCTIONS[options.answer_format]}"
    return Item.of([{"role": "user", "content": asked}] if options.chat else f"{asked}\n", answer)


def text_of(record: dict[str, Any], *keys: str) -> str:
    """The text, or the number as text, under the first of the keys that there is. ValueError when there is none."""
    for key in keys:
        value = record.get(key)
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
    raise ValueError(
        f"no text under {' or '.join(map(repr, keys))}; it has {', '.join(map(repr, record)) or 'nothing'}"
    )


def rewards(item: Item, completion: str, options: Options) -> Optional[dict[str, float]]:
    answer = find_answer(completion, options.answer_format)
    correct = answer is not None and is_equal(item.answer, answer)
    if not correct and not _read(item.answer):
        return None
    return {"correct": float(correct), "format": float(answer is not None and not correct)}


def final_answer(item: Item, completion: str, options: Options) -> Optional[str]:
    answer = find_answer(completion, options.answer_format)
    if answer is None:
        return None
    parsed = _read(answer)
    return str(parsed[0]) if parsed else _plain(answer)


def warm_up() -> None:
    """Import what answers are read with."""
    _read("1")


def find_answer(completion: str, form: str) -> Optional[str]:
    """What the completion answers, as it is written; None when there is no answer in an accepted form."""
    if form == "tagged":
        found = _TAGGED.findall(completion)
    elif form in _LINES:
        found = _LINES[form].findall(completion)
    else:
        found = []
    answer = found[-1] if found else last_boxed(completion)
    return answer.strip() or None if answer is not None else None


def last_boxed(text: str) -> Optional[str]:
    """What the last \\boxed{…} whose braces are closed holds."""
    for start in reversed([match.end() for match in re.finditer(r"\\f?boxed\s*{", text)]):
        depth = 1
        for place in range(start, len(text)):
            escaped = place and text[place - 1] == "\\"
            depth += 0 if escaped else {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place]
    return None


def is_equal(gold: str, answer: str) -> bool:
    """Whether two answers are the same mathematically."""
    if _plain(gold) == _plain(answer):
        return True
    from math_verify import verify

    mine, theirs = _read(gold), _read(answer)
    return bool(mine and theirs) and verify(list(mine), list(theirs), timeout_seconds=None)


def _plain(text: str) -> str:
    """The text without what makes no difference: spaces, dollars, \\left, \\text{}, a last point."""
    text = re.sub(r"\\(?:text|mathrm|textbf)\s*{([^{}]*)}", r"\1", text)
    text = re.sub(r"\\(?:left|right|,|;|!|displaystyle)|\\\s|[$\s]", "", text)
    return text.replace("dfrac", "frac").replace("tfrac", "frac").removesuffix(".").strip()


@functools.lru_cache(maxsize=4096)
def _read(text: str) -> tuple[Any, ...]:
    """What math-verify makes of an answer, empty where it makes nothing."""
    from math_verify import parse

    for name in ("math_verify", "latex2sympy2_extended"):
        # it warns that its time limits are off, and of every failure
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return tuple(parse(f"\\boxed{{{text.strip().strip('$')}}}", parsing_timeout=None))
