"""Views: what a recipe takes of a record, before it is read as a conversation.

answer_only   the assistants' reasoning is left out, in whatever way the schema spells it; so is it of the context
choices       a question with lettered choices, asked as the task multiple_choice asks it, with the right letter
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from data_tools.chats.conversation import KWARGS, BadRecord, Conversation, read_record
from data_tools.tasks import multiple_choice

KINDS = ("answer_only", "choices")

_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)


class View(NamedTuple):
    """Says which records are taken, and as what."""

    kind: str = ""
    where: dict[str, list[Any]] = {}

    def apply(self, value: Any, ignored: Sequence[str] = ()) -> Any:
        """Return the record to read, None for one that is left out. Raise BadRecord where it is none of the kind."""
        for column, values in self.where.items():
            if not isinstance(value, dict) or column not in value:
                raise BadRecord(f"no column {column!r}, by which the recipe chooses rows")
            if value[column] not in values:
                return None
        if self.kind == "answer_only":
            return _answer_only(value, ignored)
        return _choices(value) if self.kind == "choices" else value


def _answer_only(value: Any, ignored: Sequence[str]) -> dict[str, Any]:
    (conversation, *more) = read_record(value, ignored=ignored)
    if more or not isinstance(conversation, Conversation):
        raise BadRecord("text that a template has written, whose reasoning cannot be told; give chats")
    messages = []
    for number, message in enumerate(conversation.messages):
        kept = {key: item for key, item in message.items() if key not in ("reasoning_content", "thinking")}
        if message["role"] == "assistant":
            text = _THINKING.sub("", message["content"]).strip()
            if "<think>" in text or "</think>" in text:
                raise BadRecord(f"message {number + 1}: half of <think> … </think>, so its answer cannot be told")
            kept["content"] = text
            if number in conversation.untrained:
                kept["weight"] = 0
        messages.append(kept)
    whole = {"tools": conversation.tools, KWARGS: dict(conversation.arguments)}
    return {"messages": messages, **{key: item for key, item in whole.items() if item}}


def _choices(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRecord(f"not a JSON object but a {type(value).__name__}")
    try:
        (item,) = multiple_choice.items(value, multiple_choice.Options())
    except ValueError as error:
        raise BadRecord(str(error)) from None
    answer = {"role": "assistant", "content": f"\\boxed{{{item.answer}}}"}
    return {"messages": [*item.prompt, answer]}
