"""What a conversation holds and the chat template leaves out: found by rendering, so that nothing is lost in silence.

Whether a template writes a field at all is asked of a conversation of the same shape whose texts are words of our own,
once a shape. Whether it wrote this row's is asked of the rendered text: the field stands in it as it is or as JSON, or
else the row is rendered again with a mark inside the field, which then turns up or does not.

    field      is
    content    what a message says
    reasoning  what an assistant thought, under a key of its own or between <think> tags at the start of its content.
               Templates leave out that of turns before the last question on purpose (Qwen3), and may, where they would
               write it of a last turn (chat.turns: each trains all of it)
    tool_call  a function's name and the texts among its arguments
    tools      the name of each tool
    name       of a user, a system or an assistant; of a tool's result only where results are not in the order of calls
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from data_tools.chats.conversation import BadRecord, Conversation
from data_tools.chats.spans import Rendered
from data_tools.chats.template import ChatTemplate, TemplateError

LOSABLE = ("reasoning", "tools", "name")  # what a template may leave out, where chat.may_lose says so
REMEDIES = {  # of what is counted: what keeps such rows; of rows of a task, too
    "reasoning_lost": "chat.inline_reasoning: true writes it into the content between <think> tags, chat.may_lose: "
                      "[reasoning] trains without it",
    "tools_lost": "chat.may_lose: [tools] trains without them",
    "name_lost": "chat.may_lose: [name] trains without it",
    "unknown_character": "take a tokenizer that knows its characters, as init_model's with `alphabet: bytes` does",
}  # fmt: skip

_MARK = "xQ7mArK7Qx"  # as JSON and HTML write it too
_INLINE = re.compile(r"\s*<think>(.*)</think>(.*)", re.DOTALL)
_REASONING_KEYS = ("reasoning_content", "thinking")

Path = tuple[str | int, ...]  # of a field within {"messages": …, "tools": …}


class Field(NamedTuple):
    kind: str
    path: Path
    text: str
    instead: str = ""  # what it would be where the order of results told whose they are

    @property
    def message(self) -> int:
        """Return the number of the field's message; -1 for a tool's."""
        place, number = self.path[:2]
        return number if place == "messages" and isinstance(number, int) else -1


class Fields:
    """Finds what a template leaves out of conversations."""

    def __init__(self, template: ChatTemplate, may_lose: Sequence[str] = ()):
        self._template = template
        self._may_lose = frozenset(may_lose)
        self._unwritten: dict[Any, frozenset[Path]] = {}  # of each shape

    def lost(self, conversation: Conversation, rendered: Rendered) -> list[Field]:
        """Return the fields that are not in the text and should be; those of reasoning first."""
        fields = list(_fields(conversation))
        unwritten = self._unwritten_of(conversation, fields)
        lost = [
            field
            for field in fields
            if field.kind not in self._may_lose and self._is_lost(field, conversation, rendered, unwritten)
        ]
        return sorted(lost, key=lambda field: field.kind != "reasoning")

    def check(self, conversation: Conversation, rendered: Rendered) -> None:
        """Raise BadRecord that names a lost field, and the remedy."""
        lost = self.lost(conversation, rendered)
        if lost:
            raise BadRecord(_reason(lost[0]), f"{lost[0].kind}_lost")

    def omits_reasoning(self, conversation: Conversation, message: int) -> bool:
        """Return whether the template leaves out the reasoning of this message, since a question follows or at all."""
        return ("messages", message, "reasoning_content") in self._unwritten_of(
            conversation, list(_fields(conversation))
        )

    def _is_lost(
        self, field: Field, conversation: Conversation, rendered: Rendered, unwritten: frozenset[Path]
    ) -> bool:
        if field.kind == "name" and conversation.messages[field.message]["role"] == "tool":
            return not self._is_used(field, conversation)
        if field.path in unwritten:
            return not self._is_history(field, conversation)
        if field.kind == "tools" or _holds(_region(field, rendered), field.text):
            return False
        if field.path[-1] == "content" and field.kind == "reasoning":  # which the template cut out of the content
            return field.message in conversation.after_last_user()
        return not self._is_marked(field, conversation)

    def _is_history(self, field: Field, conversation: Conversation) -> bool:
        """Return whether this is reasoning that the template leaves out only since a question follows."""
        if field.kind != "reasoning" or field.message in conversation.after_last_user():
            return False
        alone = replace(conversation, messages=conversation.messages[: field.message + 1])
        return field.path not in self._unwritten_of(alone, list(_fields(alone)))

    def _is_marked(self, field: Field, conversation: Conversation) -> bool:
        """Return whether a mark within the field turns up in the text, and changes nothing else there."""
        before, text, after = field.text.partition(field.text.strip())
        try:
            marked = self._template.text(
                _changed(conversation, {field.path: f"{before}{text[:1]}{_MARK}{text[1:]}{after}"})
            )
            return _MARK in marked and marked.replace(_MARK, "") == self._template.text(conversation)
        except TemplateError:
            return False

    def _is_used(self, field: Field, conversation: Conversation) -> bool:
        """Return whether the text would be another one with the other name."""
        try:
            other = self._template.text(_changed(conversation, {field.path: field.instead}))
        except TemplateError:
            return True
        return other != self._template.text(conversation)

    def _unwritten_of(self, conversation: Conversation, fields: list[Field]) -> frozenset[Path]:
        """Return the paths of fields that the template leaves out of any conversation of this shape."""
        words = {field.path: f"FIELD{number}X" for number, field in enumerate(fields) if _is_asked_by_shape(field)}
        roles = tuple(message["role"] for message in conversation.messages)
        shape = (roles, tuple(words), json.dumps(dict(conversation.arguments), sort_keys=True, default=str))
        if shape not in self._unwritten:
            try:
                text = self._template.text(_changed(conversation, words))
                self._unwritten[shape] = frozenset(path for path, word in words.items() if word not in text)
            except TemplateError:  # it wants other texts; each row's own are asked for
                self._unwritten[shape] = frozenset()
        return self._unwritten[shape]


def remedies(buckets: Iterable[str]) -> list[str]:
    """Return what would keep the rows of these buckets, for those where a setting does."""
    return [f"{bucket}: {REMEDIES[bucket]}" for bucket in sorted(buckets) if bucket in REMEDIES]


def inline_reasoning(conversation: Conversation, messages: Sequence[int]) -> Conversation:
    """Return the conversation with the reasoning of these messages in their contents, between <think> tags."""
    changed = list(conversation.messages)
    for number in messages:
        message = changed[number]
        content = f"<think>\n{message['reasoning_content'].strip()}\n</think>\n\n{message['content']}"
        changed[number] = {
            **{key: value for key, value in message.items() if key not in _REASONING_KEYS},
            "content": content,
        }
    return replace(conversation, messages=changed)


def _fields(conversation: Conversation) -> Iterator[Field]:
    for number, message in enumerate(conversation.messages):
        place = ("messages", number)
        reasoning = message.get("reasoning_content", "")
        content = message["content"]
        inline = _INLINE.fullmatch(content) if message["role"] == "assistant" and not reasoning else None
        if inline:
            yield Field("reasoning", (*place, "content"), inline[1])
            yield Field("content", (*place, "content"), inline[2])
        else:
            yield Field("reasoning", (*place, "reasoning_content"), reasoning)
            yield Field("content", (*place, "content"), content)
        for call, given in enumerate(message.get("tool_calls", ())):
            path = (*place, "tool_calls", call, "function")
            yield Field("tool_call", (*path, "name"), given["function"]["name"])
            yield from _texts((*path, "arguments"), given["function"]["arguments"])
        if message["role"] != "tool":
            yield Field("name", (*place, "name"), message.get("name") or "")
    yield from _names_of_results(conversation.messages)
    for number, tool in enumerate(conversation.tools or ()):
        if isinstance(tool.get("function"), dict) and isinstance(tool["function"].get("name"), str):
            yield Field("tools", ("tools", number, "function", "name"), tool["function"]["name"])


def _texts(path: Path, value: Any) -> Iterator[Field]:
    """Yield the texts of a call's arguments, at any depth."""
    if isinstance(value, str):
        yield Field("tool_call", path, value)
    elif isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts((*path, key), item)


def _names_of_results(messages: list[dict[str, Any]]) -> Iterator[Field]:
    """Yield what tells whose result a tool's message is, where its place behind the calls does not."""
    calls: list[dict[str, Any]] = []
    place = 0
    for number, message in enumerate(messages):
        if message["role"] != "tool":
            calls, place = message.get("tool_calls", []), 0
            continue
        expected = calls[place] if place < len(calls) else {"function": {}}
        place += 1
        for key, value in (("tool_call_id", expected.get("id")), ("name", expected["function"].get("name"))):
            if calls and message.get(key) and value and message[key] != value:
                yield Field("name", ("messages", number, key), message[key], value)
                break


def _is_asked_by_shape(field: Field) -> bool:
    """Return whether this is neither what templates look up nor a part of a text."""
    is_inline = field.kind == "reasoning" and field.path[-1] == "content"
    return bool(field.text.strip()) and not field.instead and not is_inline


def _region(field: Field, rendered: Rendered) -> str:
    """Return the text in which a field has to stand: its turn, or all of it for any that is no turn."""
    spans = [span for span in rendered.spans if span.message == field.message and span.start < span.stop]
    return rendered.text[spans[0].start : spans[-1].stop] if spans else rendered.text


def _holds(text: str, part: str) -> bool:
    """Return whether the part is in the text, as it is or as JSON writes it."""
    part = part.strip()
    return part in text or any(
        json.dumps(part, ensure_ascii=ensure_ascii)[1:-1] in text for ensure_ascii in (False, True)
    )


def _changed(conversation: Conversation, texts: "dict[Path, str]") -> Conversation:
    """Return the conversation with other texts at these paths."""
    whole: dict[str, Any] = {"messages": conversation.messages, "tools": conversation.tools}
    for path, text in texts.items():
        whole = _replaced(whole, path, text)
        if path[-1] == "reasoning_content":
            whole = _replaced(whole, (*path[:-1], "thinking"), text)
    return replace(conversation, **whole)


def _replaced(value: Any, path: Path, text: str) -> Any:
    if not path:
        return text
    key, *rest = path
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = _replaced(copy[key] if rest else None, tuple(rest), text)
    return copy


def _reason(field: Field) -> str:
    place = f"message {field.message + 1}: the chat template leaves out "
    if field.kind == "tool_call":
        return f"{place}a call, or a part of one: {field.text.strip()[:60]!r}"
    if field.kind == "tools":
        what = f"the chat template leaves out the tool {field.text!r}; give one that writes tools"
    elif field.kind == "name":
        what = f"{place}the name {field.text!r}; give one that writes it"
    elif field.kind == "reasoning":
        what = f"{place}its reasoning; give one that writes it"
    else:
        what = f"{place}what it says: {field.text.strip()[:60]!r}; give one that writes it"
    return "; ".join(filter(None, [what, REMEDIES.get(f"{field.kind}_lost")]))
