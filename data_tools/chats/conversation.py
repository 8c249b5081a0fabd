"""Records as they are met in the wild → conversations in the one form that chat templates read.

    schema             keys                                            met in
    messages           messages, tools, or a list alone                OpenAI, OpenResearcher, SmolTalk, Dolci-Think,
                                                                       Multilingual-Thinking, nanochat; traj: tau-bench
    sharegpt           conversations, conversation; system, tools      ShareGPT, glaive, OpenThoughts, WildChat
    alpaca             instruction, input, output                      Alpaca
    gsm8k              question, answer                                GSM8K
    prompt_completion  prompt, completion (texts, or messages)         TRL
    query_response     query, response                                 ms-swift
    dolly              instruction, context, response                  Dolly
    openthoughts       problem, deepseek_reasoning, deepseek_solution  OpenThoughts' metadata
    rendered           messages of text that a template wrote          OpenResearcher's materialize.py and pack.py

The schema of a record is told by its keys, never by its text, unless it is named. Lists of messages go before pairs of
texts. What cannot be read is a `BadRecord` with its bucket and the reason; nothing is skipped.

Of a message each key counts (messages.py). Of a record, data sets have columns of any name beside the conversation:
those are not read, but for the ones that would change what is trained (`SYSTEM`, tools and functions,
chat_template_kwargs, history, `IN_LOSS` of messages.py, `REFUSED`). They are carried, or the record is refused by name.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from data_tools.chats.messages import (
    REFUSED_KEY,
    REMEDY,
    ROLES,
    BadRecord,
    Keys,
    Turn,
    kind,
    read_message,
    read_tools,
    role_of,
    take_trained,
    value_of,
)

__all__ = [
    "REFUSED",
    "ROLES",
    "SCHEMAS",
    "BadRecord",
    "Conversation",
    "RenderedChunk",
    "detect_schema",
    "read_prompt",
    "read_record",
]

KWARGS = "chat_template_kwargs"  # SmolTalk's rows carry template arguments
_OWN = ("messages", "tools", "documents", "add_generation_prompt")  # variables of templates that are no arguments
SYSTEM = ("system", "system_prompt")

_PREFERENCE, _MASK = "preferences between answers, which are not learned here", "a mask of tokens that are not given"
_MEDIA, _PIECE = "more than text, which is not read", "a part of the question that this schema does not read"
REFUSED = {  # keys of a record that would change what is trained, and why they have no form here
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages", "margin"), _PREFERENCE),
    **dict.fromkeys(("label", "labels", "kto_tag"), "a verdict on the answer (KTO); keep the rows to learn from"),
    **dict.fromkeys(("mask", "loss_mask", "completion_mask", "assistant_masks", "attention_mask", "input_ids"), _MASK),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios", "objects"), _MEDIA),
    "chat_template": "a template of its own; name one for all rows in chat.template",
    "history": "earlier turns, which only pairs of texts have",
    "finish": "a sample that may be cut off or wrong; the phase reject_filter makes chats of samples",
}  # fmt: skip
_PIECES = {
    **dict.fromkeys(("choices", "options", "context", "passage", "input"), _PIECE),
    **dict.fromkeys(("instruction", "question", "prompt", "query", "problem"), _PIECE),
    **dict.fromkeys(("reasoning_content", "thinking", "reasoning"), "maybe the answer's reasoning; write messages"),
}  # fmt: skip

_LISTS = {"messages": "messages", "traj": "messages", "conversations": "sharegpt", "conversation": "sharegpt"}
_COUNTED = (("num_generated_tokens",), ("question_num_generated_tokens", "answer_num_generated_tokens"))
_TAG = re.compile(r"\s*<\|[^|<>\s]+\|>")


class _Pair(NamedTuple):
    """Names the keys of a schema of one question and one answer; `more` of it and `reasoning` may be absent."""

    question: str
    answer: str
    more: str = ""
    reasoning: str = ""


_PAIRS = {
    "alpaca": _Pair("instruction", "output", more="input"),
    "gsm8k": _Pair("question", "answer"),
    "prompt_completion": _Pair("prompt", "completion"),
    "query_response": _Pair("query", "response"),
    "dolly": _Pair("instruction", "response", more="context"),
    "openthoughts": _Pair("problem", "deepseek_solution", reasoning="deepseek_reasoning"),
}


@dataclass(frozen=True)
class Conversation:
    """Represents one conversation in the form that chat templates read.

    A message has `role` and `content` (text), where given `reasoning_content` and its synonym `thinking`, `tool_calls`
    ({"type", "function": {"name", "arguments": mapping}}), `tool_call_id` and `name`.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)  # for the template, over those of the config
    untrained: frozenset[int] = frozenset()  # messages that the data itself keeps out of the loss

    def turns(self) -> "Iterator[Conversation]":
        """Yield one conversation a user's turn, each up to the next one."""
        users = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        for stop in [*users[1:], len(self.messages)]:
            yield replace(self, messages=self.messages[:stop])

    def after_last_user(self) -> frozenset[int]:
        """Return the messages after the last question."""
        users = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        return frozenset(range(users[-1] + 1 if users else 0, len(self.messages)))


class RenderedChunk(NamedTuple):
    """Represents a piece of text that a template has already written; the loss is on those of role assistant.

    One of an assistant that the data keeps out of the loss has the role context.
    """

    role: str
    text: str


def read_record(
    record: Any, schema: str = "auto", ignored: Sequence[str] = ()
) -> "list[Conversation] | list[list[RenderedChunk]]":
    """Return the conversations of one record: one, but for a packed line, which may hold several. Raise BadRecord.

    Keys in `ignored`, of the record and of its messages, are read as if they were not there.
    """
    if isinstance(record, list) and record:
        record = {"messages": record}  # nanochat's lines
    if not isinstance(record, dict):
        raise BadRecord(f"not a JSON object but a {type(record).__name__}")
    if ignored:
        record = _without(record, ignored)
        given = {key: value_of(value, key) if key in _LISTS else value for key, value in record.items()}
        lists = {key: value for key, value in given.items() if isinstance(value, list)}
        record = {**record, **{key: [_without(item, ignored) for item in value] for key, value in lists.items()}}
    if schema == "auto":
        schema = detect_schema(record)
    if schema == "rendered":
        return _rendered(record)
    conversation = _SCHEMAS[schema](record)
    _check(conversation)
    return [conversation]


def _without(value: Any, ignored: Sequence[str]) -> Any:
    return {key: item for key, item in value.items() if key not in ignored} if isinstance(value, dict) else value


def own_variables(arguments: Mapping[str, Any]) -> list[str]:
    """Return the names among arguments for a template that rendering sets itself, and these would set otherwise."""
    return [name for name in _OWN if name in arguments and arguments[name] is not False]


def read_prompt(messages: list[dict[str, Any]], **more: Any) -> Conversation:
    """Return messages that an assistant is to answer, with `more` keys of their record. Raise BadRecord."""
    return _dialogue("messages", {"messages": messages, **more})


def detect_schema(record: dict[str, Any]) -> str:
    """Return the schema whose keys the record has. Raise BadRecord where there is none, or more than one."""
    present = [key for key in _LISTS if isinstance(record.get(key), (list, str, dict))]
    lists = [key for key in present if record[key]] or present[:1]
    if len(lists) > 1:
        raise BadRecord(f"has {' and '.join(lists)}, which both hold messages; name one in chat.schema")
    if lists:
        return "rendered" if lists == ["messages"] and _is_materialized(record) else _LISTS[lists[0]]
    pairs = [name for name, pair in _PAIRS.items() if pair.question in record and pair.answer in record]
    if len(pairs) > 1:
        raise BadRecord(f"has the keys of {' and '.join(pairs)}; name one in chat.schema")
    if pairs:
        _check_untemplated(record, pairs[0])
        return pairs[0]
    keys = ", ".join(map(str, record)) or "(none)"
    raise BadRecord(f"no known schema has the keys {keys}; known: {', '.join(SCHEMAS)}")


def _is_materialized(record: dict[str, Any]) -> bool:
    """Return whether materialize.py wrote it, which counts its tokens.

    A line of pack.py has nothing but its messages: where only a template's tags speak for one, or their absence speaks
    against the count, raise BadRecord; the settings have to say.
    """
    tag = next(filter(None, map(_tag, record["messages"] if isinstance(record["messages"], list) else [])), "")
    counted = next((keys for keys in _COUNTED if all(key in record for key in keys)), ())
    if bool(tag) == bool(counted):
        return bool(tag)
    found = f"has {counted[0]}, and no message begins with a tag" if counted else f"a message begins with {tag!r}"
    reason = f"{found}: this is text that a template has already written, or it is a chat"
    raise BadRecord(f"{reason}; name chat.schema: rendered, or messages", "ambiguous_schema")


def _check_untemplated(record: dict[str, Any], schema: str) -> None:
    """Raise BadRecord where a question begins with a template's tag: the template would be written around another."""
    key = _PAIRS[schema].question
    if isinstance(text := record[key], str) and (found := _TAG.match(text)):
        reason = f"its {key} begins with {found[0].strip()!r}: a template has already written it, or it is a question"
        raise BadRecord(f"{reason}; name chat.schema: {schema}, or give messages in its place", "ambiguous_schema")


def _tag(message: Any) -> str:
    """Return the tag that begins a message, other than an assistant's; "" where there is none."""
    if not isinstance(message, dict) or message.get("role", message.get("from")) == "assistant":
        return ""
    found = _TAG.match(content) if isinstance(content := message.get("content", message.get("value")), str) else None
    return found[0].strip() if found else ""


def _check(conversation: Conversation) -> None:
    """Raise BadRecord for what is no conversation, or has a turn that would teach to say nothing."""
    messages = conversation.messages
    turns = [message for message in messages if message["role"] == "assistant"]
    if not turns:
        raise BadRecord(f"{len(messages)} messages, none of an assistant", "no_assistant")
    for number, message in enumerate(messages):
        said = message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content")
        if message["role"] == "assistant" and not said:
            raise BadRecord(f"message {number + 1}: the assistant says nothing", "empty_assistant")


# -- schemas ----------------------------------------------------------------------------------------------------------


def _dialogue(schema: str, record: dict[str, Any]) -> Conversation:
    """Read a list of messages, or its JSON text."""
    keys = Keys("record", record)
    names = [key for key, found in _LISTS.items() if found == schema]
    name = next((key for key in names if key in keys.left), names[0])
    given = value_of(keys.take(name), name)
    turns = _turns(name, given)
    keys.left = {key: value for key, value in keys.left.items() if key not in _LISTS}
    return _conversation(keys, turns, REFUSED)


def _turns(name: str, given: Any) -> list[Turn]:
    if not isinstance(given, list) or not given:
        raise BadRecord(f"{name} are no list of messages but {kind(given)}")
    return [read_message(f"message {number}", message) for number, message in enumerate(given, 1)]


def _pair(schema: str, record: dict[str, Any]) -> Conversation:
    """Read a question and its answer, and what was said before. Messages of the question are not in the loss."""
    pair, keys = _PAIRS[schema], Keys("record", record)
    question, answer = keys.need(pair.question), keys.need(pair.answer)
    turns = []
    history = keys.take("history") or []
    for said in history if isinstance(history, list) else [history]:
        if not (isinstance(said, list) and len(said) == 2 and all(isinstance(text, str) for text in said)):
            raise BadRecord("history is no list of [question, answer]")
        turns += [_said("history", "user", said[0]), _said("history", "assistant", said[1])]
    more, reasoning = (keys.text(key) if key else "" for key in (pair.more, pair.reasoning))
    if isinstance(question, list) and isinstance(answer, list) and schema == "prompt_completion":
        turns += [turn._replace(trained=False) for turn in _turns(pair.question, question)]
        turns += _turns(pair.answer, answer)
    else:
        for key, text in ((pair.question, question), (pair.answer, answer)):
            if not isinstance(text, str):
                raise BadRecord(f"record: its {key} is {kind(text)}, not a text")
        turns.append(_said(pair.question, "user", f"{question}\n{more}" if more else question))
        turns.append(_said(pair.answer, "assistant", answer, reasoning_content=reasoning or None))
    return _conversation(keys, turns, REFUSED | _PIECES)


def _said(place: str, role: str, text: str, **more: Any) -> Turn:
    return read_message(place, {"role": role, "content": text, **more})


def _rendered(record: dict[str, Any]) -> list[list[RenderedChunk]]:
    """Read a materialized line, or a packed one: a system chunk begins the next conversation."""
    conversations: list[list[RenderedChunk]] = []
    line = Keys("record", record)
    given, in_loss = line.take("messages"), take_trained(line)
    _refuse(line, REFUSED)
    for number, chunk in enumerate(given if isinstance(given, list) else [], 1):
        keys = Keys(f"chunk {number}", chunk)
        role, text = role_of(keys.place, keys.take("role")), keys.take("content")
        trained = take_trained(keys, role) and in_loss
        if not isinstance(text, str):
            raise BadRecord(f"chunk {number} has no text")
        keys.end()
        if role == "system" or not conversations:
            conversations.append([])
        conversations[-1].append(RenderedChunk(role if trained or role != "assistant" else "context", text))
    if not conversations:
        raise BadRecord(f"messages are no list of chunks but {kind(given)}")
    return conversations


_SCHEMAS: dict[str, Callable[[dict[str, Any]], Conversation]] = {
    **{schema: partial(_dialogue, schema) for schema in ("messages", "sharegpt")},
    **{schema: partial(_pair, schema) for schema in _PAIRS},
}
SCHEMAS = (*_SCHEMAS, "rendered")


# -- a conversation of turns ------------------------------------------------------------------------------------------


def _conversation(keys: Keys, turns: list[Turn], refused: Mapping[str, str]) -> Conversation:
    """Make a conversation of turns and what else the record says of them. Raise BadRecord for keys of it that would
    change what is trained."""
    system = [keys.text(name) for name in SYSTEM]
    tools = [*(read_tools(keys.take(name)) for name in ("tools", "functions")), *(turn.tools for turn in turns)]
    given = [listed for listed in tools if listed]
    if any(listed != given[0] for listed in given):
        raise BadRecord("record: tools stand there twice, and differ")
    arguments = value_of(keys.take(KWARGS) or {}, KWARGS)
    if not isinstance(arguments, dict):
        raise BadRecord(f"{KWARGS} is no mapping but {kind(arguments)}")
    if set_by_us := own_variables(arguments):
        raise BadRecord(f"{KWARGS}: {set_by_us[0]!r} is no argument: it is set for every row; {REMEDY}", REFUSED_KEY)
    if not take_trained(keys):
        turns = [turn._replace(trained=False) for turn in turns]
    _refuse(keys, refused)
    turns = _merged_calls(_merged_system(system, turns))
    untrained = {number for number, turn in enumerate(turns) if not turn.trained}
    return Conversation([turn.message for turn in turns], given[0] if given else None, arguments, frozenset(untrained))


def _refuse(keys: Keys, refused: Mapping[str, str]) -> None:
    """Raise BadRecord for the first key that has a value and would change what is trained."""
    for key, value in keys.left.items():
        if key in refused and value not in ("", [], {}):
            reason = f"record: key {key!r} ({kind(value)}): {refused[key]}; {REMEDY}"
            raise BadRecord(reason, REFUSED_KEY)


def _merged_system(system: Sequence[str], turns: list[Turn]) -> list[Turn]:
    """Make one message of the leading system messages, since templates read the first only; say equal texts once."""
    leading = 0
    while leading < len(turns) and turns[leading].message["role"] == "system":
        leading += 1
    texts = list(dict.fromkeys(filter(None, [*system, *(turn.message["content"] for turn in turns[:leading])])))
    if leading == 1 and not any(system) or not texts and not leading:
        return turns
    for number, turn in enumerate(turns[:leading], 1):
        if more := turn.message.keys() - {"role", "content"}:
            reason = f"message {number}: key {min(more)!r}: the first system messages are made one, which has none"
            raise BadRecord(f"{reason}; {REMEDY}", REFUSED_KEY)
    return [Turn({"role": "system", "content": "\n\n".join(texts)}), *turns[leading:]]


def _merged_calls(turns: list[Turn]) -> list[Turn]:
    """Make one turn of calls that follow one another in messages of their own, but for one that says more."""
    merged: list[Turn] = []
    for turn in turns:
        last = merged[-1] if merged else None
        is_bare = turn.is_call and turn.message.keys() == {"role", "content", "tool_calls"}
        if last and is_bare and last.is_call and turn.trained == last.trained:
            calls = [*last.message["tool_calls"], *turn.message["tool_calls"]]
            merged[-1] = last._replace(message={**last.message, "tool_calls": calls})
        else:
            merged.append(turn)
    return merged
