"""OpenThoughts (open-thoughts/OpenThoughts-114k; its metadata rows and OpenThoughts3's too): questions with long
thoughts before their answers. To learn.

With `answer_only` each thought is left out, of what is trained and of what stands before it, and so is the system
message that asks for thoughts.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from data_tools.base.declared import setting
from data_tools.chats.conversation import BadRecord, Conversation

__all__ = ["HUB", "Options", "conversation"]

HUB = "open-thoughts/OpenThoughts-114k:data/train-*.parquet"

_ASKS_FOR_THOUGHTS = "<|begin_of_thought|>"
_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
_REASONING = ("reasoning_content", "thinking")


@dataclass
class Options:
    answer_only: bool = setting(False, "thoughts are left out, of what is trained and of its context")


def conversation(given: Conversation, options: Options) -> Conversation:
    """Return the conversation with its thoughts, or without. Raise BadRecord where an answer has none but a thought
    that does not end."""
    if not options.answer_only:
        return given
    messages: list[dict[str, Any]] = []
    untrained = set()
    for number, message in enumerate(given.messages):
        if message["role"] == "system" and _ASKS_FOR_THOUGHTS in message["content"]:
            continue
        if number in given.untrained:
            untrained.add(len(messages))
        messages.append(_answer(number, message) if message["role"] == "assistant" else message)
    return replace(given, messages=messages, untrained=frozenset(untrained))


def _answer(number: int, message: dict[str, Any]) -> dict[str, Any]:
    content = _THOUGHT.sub("", message["content"])
    if "<think>" in content or "</think>" in content:
        raise BadRecord(f"message {number + 1}: its thought does not begin or does not end", "unfinished_thought")
    if not content.strip() and not message.get("tool_calls"):
        raise BadRecord(f"message {number + 1}: it is a thought without an answer", "empty_assistant")
    return {**{key: value for key, value in message.items() if key not in _REASONING}, "content": content}
