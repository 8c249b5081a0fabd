"""Samples of models, read with their types: what the phase `generate` writes, and any tool that writes the same keys.

    key          value
    prompt_id    text or whole number; one names one prompt
    prompt       text                                           ┐ what was asked:
    messages     messages, as conversation.py reads them        ┘ one of the two
    completion   text
    finish       `WHOLE` or `CUT_OFF`                           whether it came to an end by itself
    tokens       whole number, from 0
    correct      true, false; null: not scorable                (may be absent)
    reward       number, null                                   (may be absent)
    sample, seed whole number                                   (may be absent)
    weights      text                                           (may be absent)
    sampling     mapping: temperature, top_p, …                 (may be absent)
    `ASKED_WITH`: what else was asked, and whether it is trained (may be absent): as a record of messages has it

A value of another type is no sample: `"false"` is neither true nor false. What a completion says outside its text
(`_BESIDE`) is refused. Other keys are not read.
"""

import math
from collections.abc import Callable
from typing import Any

from data_tools.chats.conversation import KWARGS, SYSTEM, BadRecord, read_prompt
from data_tools.chats.messages import IN_LOSS

WHOLE = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")
CUT_OFF = ("length", "max_tokens", "turns", "abort", "timeout")
ASKED_WITH = (*SYSTEM, "tools", "functions", KWARGS, *IN_LOSS)

_BESIDE = ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call", "function_calls")


def prompt_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a sample was asked, as messages."""
    return row["messages"] if isinstance(row.get("messages"), list) else [{"role": "user", "content": row["prompt"]}]


def problem_of_sample(row: Any) -> str:
    """Return why a value is no sample, "" when it is one."""
    if not isinstance(row, dict):
        return f"a {type(row).__name__}, not an object"
    if beside := next((key for key in _BESIDE if row.get(key)), ""):
        return f"{beside!r} stands beside the completion; write it into its text, as the model did"
    if (row.get("prompt") is None) == (row.get("messages") is None):
        return "neither a text under 'prompt' nor a list under 'messages', or both"
    needed = ("prompt" if row.get("prompt") is not None else "messages", "completion", "prompt_id", "tokens", "finish")
    return _wrong(row, needed, _SAMPLE)


def problem_of_evaluated(row: Any) -> str:
    """Return why a value is no line of an evaluation's samples with its counts, "" when it is one."""
    if not isinstance(row, dict):
        return f"a {type(row).__name__}, not an object"
    if wrong := _wrong(row, ("prompt",), _EVALUATED):
        return wrong
    sampled, right = row.get("sampled"), row.get("sampled_correct")
    if (sampled is None) != (right is None) or sampled is not None and not (0 < sampled and right <= sampled):
        return f"'sampled_correct' {right!r} of 'sampled' {sampled!r} are no counts"
    return ""


def _wrong(row: dict[str, Any], needed: tuple[str, ...], kinds: dict[str, "Kind"]) -> str:
    for key in needed:
        if row.get(key) is None:
            return f"no {kinds[key][0]} under {key!r}"
    for key, (what, is_kind) in kinds.items():
        value = row.get(key)
        if value is not None and not is_kind(value):
            return f"{key!r} is {str(value)[:40]!r}, a {type(value).__name__}, not {what}"
    more = {key: row[key] for key in ASKED_WITH if key in row}
    if more or isinstance(row.get("messages"), list):
        try:
            read_prompt(prompt_messages(row), **more)
        except BadRecord as error:
            return f"messages: {error}"
    return ""


def _is_text(value: Any) -> bool:
    """Return whether it is a text, and Unicode: JSON may spell half of a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float) and math.isfinite(value)


Kind = tuple[str, Callable[[Any], bool]]  # what a value is called, and whether it is one
_TEXT, _WHOLE = ("text", _is_text), ("whole number", _is_whole)
_COUNT: Kind = ("whole number from 0", lambda value: _is_whole(value) and value >= 0)
_TRUTH: Kind = ("true or false", lambda value: isinstance(value, bool))
_SAMPLE: dict[str, Kind] = {
    "prompt": _TEXT, "messages": ("list", lambda value: isinstance(value, list)), "completion": _TEXT,
    "prompt_id": ("text or whole number", lambda value: _is_text(value) or _is_whole(value)), "tokens": _COUNT,
    "finish": (f"one of {', '.join((*WHOLE, *CUT_OFF))}", lambda value: value in (*WHOLE, *CUT_OFF)), "correct": _TRUTH,
    "reward": ("finite number", _is_number), "sample": _WHOLE, "seed": _WHOLE, "weights": _TEXT,
    "sampling": ("mapping", lambda value: isinstance(value, dict)),
}  # fmt: skip
_EVALUATED: dict[str, Kind] = {
    "prompt": _TEXT,
    "prompt_id": _TEXT,
    "correct": _TRUTH,
    "sampled": _COUNT,
    "sampled_correct": _COUNT,
}
