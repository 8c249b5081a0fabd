"""Records as they are met in the wild → conversations in the one form that chat templates read.

    schema        keys                                            met in
    messages      messages, tools                                 OpenAI, OpenResearcher, SmolTalk, Dolci-Think,
                                                                  Multilingual-Thinking; traj: tau-bench
    sharegpt      conversations (from, value), system, tools      ShareGPT, glaive, OpenThoughts
    alpaca        instruction, input, output, history, system     Alpaca
    gsm8k         question, answer                                GSM8K
    rendered      messages whose contents are a template's text   materialize.py and pack.py of examples/openresearcher

The schema of a record is told by its keys unless it is named. What cannot be read is a `BadRecord` with its bucket and
the reason; nothing is skipped.
"""

import ast
import json
import re
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Optional

from data_tools.mistake import nearest

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "environment": "tool",
}  # fmt: skip
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which messages carry it
_PART_TYPES = {"input_text": "text", "output_text": "text", "thinking": "reasoning"}
_OPEN_THOUGHTS = re.compile(
    r"<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>\s*<\|begin_of_solution\|>(.*?)<\|end_of_solution\|>", re.DOTALL)
_KWARGS = "chat_template_kwargs"  # SmolTalk's rows carry template arguments


class BadRecord(ValueError):
    """A record that gives no conversation: the bucket it is counted in, and why."""

    def __init__(self, reason: str, bucket: str = "malformed_record"):
        super().__init__(reason)
        self.bucket = bucket


@dataclass(frozen=True)
class Conversation:
    """One conversation in the form that chat templates read.

    A message has `role` and `content` (text), where given `reasoning_content` and its synonym `thinking`, `tool_calls`
    ({"type", "function": {"name", "arguments": mapping}}), `tool_call_id` and `name`.
    """

    messages: list[dict[str, Any]]
    tools: Optional[list[dict[str, Any]]] = None
    arguments: Mapping[str, Any] = field(default_factory=dict)  # for the template, over those of the config
    untrained: frozenset[int] = frozenset()  # messages that the data itself keeps out of the loss

    def turns(self) -> "Iterator[Conversation]":
        """One conversation a user's turn, each up to the next one."""
        users = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        for stop in [*users[1:], len(self.messages)]:
            yield replace(self, messages=self.messages[:stop])

    def after_last_user(self) -> frozenset[int]:
        """The messages after the last question."""
        users = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        return frozenset(range(users[-1] + 1 if users else 0, len(self.messages)))


class RenderedChunk(NamedTuple):
    """A piece of text that a template has already written; the loss is on those of the assistant."""

    role: str
    text: str


def read_record(record: Any, schema: str = "auto") -> "list[Conversation] | list[list[RenderedChunk]]":
    """The conversations of one record: one, but for a packed line, which may hold several. Raises BadRecord."""
    if not isinstance(record, dict):
        raise BadRecord(f"not a JSON object but a {type(record).__name__}")
    if schema == "auto":
        schema = detect_schema(record)
    if schema == "rendered":
        return _rendered(record)
    conversation = _SCHEMAS[schema](record)
    _check(conversation)
    return [conversation]


def read_prompt(messages: list[dict[str, Any]]) -> Conversation:
    """Messages that an assistant is to answer. Raises BadRecord."""
    return _messages({"messages": messages})


def detect_schema(record: dict[str, Any]) -> str:
    """The schema whose keys the record has. Raises BadRecord."""
    if isinstance(record.get("messages"), list):
        return "rendered" if _looks_rendered(record) else "messages"
    for key, schema in (("traj", "messages"), ("conversations", "sharegpt"), ("instruction", "alpaca")):
        if key in record:
            return schema
    if "question" in record and "answer" in record:
        return "gsm8k"
    keys = ", ".join(map(str, record)) or "(none)"
    raise BadRecord(f"no known schema has the keys {keys}; known: {', '.join(SCHEMAS)}")


def _looks_rendered(record: dict[str, Any]) -> bool:
    """The chunks of a materialized line, or of several packed ones, have role tags in their text."""
    first = next((message.get("content") for message in record["messages"] if isinstance(message, dict)), None)
    return isinstance(first, str) and first.startswith("<|") and first.rstrip().endswith(">")


def _check(conversation: Conversation) -> None:
    """BadRecord for what is no conversation, or has a turn that would teach to say nothing."""
    messages = conversation.messages
    turns = [message for message in messages if message["role"] == "assistant"]
    if not turns:
        raise BadRecord(f"{len(messages)} messages, none of an assistant", "no_assistant")
    for number, message in enumerate(messages):
        said = message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content")
        if message["role"] == "assistant" and not said:
            raise BadRecord(f"message {number + 1}: the assistant says nothing", "empty_assistant")


# -- schemas ----------------------------------------------------------------------------------------------------------


def _messages(record: dict[str, Any]) -> Conversation:
    given = record.get("messages", record.get("traj"))
    if not isinstance(given, list) or not given:
        raise BadRecord(f"messages are no list of messages but {_kind(given)}")
    messages = [_message(number, message) for number, message in enumerate(given)]
    tools = record.get("tools") or next(
        (message["functions"] for message in given if message.get("functions")), None)  # Dolci: on its system message
    untrained = {number for number, message in enumerate(given) if not _is_trained(number, message)}
    arguments = _value(record.get(_KWARGS) or {}, _KWARGS)
    if not isinstance(arguments, dict):
        raise BadRecord(f"{_KWARGS} is no mapping but {_kind(arguments)}")
    return _conversation(messages, tools, arguments, untrained)


def _message(number: int, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise BadRecord(f"message {number + 1} is no mapping but {_kind(given)}")
    place = f"message {number + 1}"
    role = _role(place, given.get("role"))
    text, reasoning, calls = _parts(place, given.get("content"))
    for key in _REASONING:
        reasoning = reasoning or _text(place, key, given.get(key))
    given_calls = _value(given.get("tool_calls") or [], f"{place}: tool_calls")
    if not isinstance(given_calls, list):
        raise BadRecord(f"{place}: tool_calls are no list but {_kind(given_calls)}", "malformed_tool_call")
    calls += [_call(place, call) for call in given_calls]
    calls += [_call(place, call) for call in _function_calls(place, given.get("function_calls"))]
    message = {"role": role, "content": text}
    if reasoning:
        message |= {"reasoning_content": reasoning, "thinking": reasoning}
    if calls:
        message["tool_calls"] = calls
    return message | {key: given[key] for key in ("tool_call_id", "name") if given.get(key)}


def _parts(place: str, content: Any) -> tuple[str, str, list[dict[str, Any]]]:
    """(text, reasoning, tool calls) of a content, which may be a text or a list of typed parts."""
    if content is None or isinstance(content, str):
        return content or "", "", []
    if not isinstance(content, list):
        raise BadRecord(f"{place}: its content is {_kind(content)}, neither a text nor parts")
    texts: dict[str, str] = {"text": "", "reasoning": ""}
    calls = []
    for part in content:
        part = part if isinstance(part, dict) else {"type": "text", "text": part}
        kind = _PART_TYPES.get(str(part.get("type")), str(part.get("type")))
        value = part.get("text", part.get("value", part.get("thinking")))
        if kind == "tool_call":
            calls.append(_call(place, _value(value, f"{place}: tool call")))
        elif kind in texts and isinstance(value, str):
            texts[kind] += value
        else:
            raise BadRecord(f"{place}: a part of type {kind!r}; text, reasoning and tool_call are known")
    return texts["text"], texts["reasoning"], calls


def _is_trained(number: int, message: dict[str, Any]) -> bool:
    weight = message.get("loss_weight", message.get("weight"))
    if weight not in (None, 0, 1):
        raise BadRecord(f"message {number + 1}: loss weight {weight!r}; a token is in the loss (1) or not (0)")
    return weight != 0


def _sharegpt(record: dict[str, Any]) -> Conversation:
    given = record.get("conversations")
    if not isinstance(given, list) or not given:
        raise BadRecord(f"conversations are no list of messages but {_kind(given)}")
    messages = _system(record)
    for number, turn in enumerate(given):
        place = f"message {number + 1}"
        if not isinstance(turn, dict):
            raise BadRecord(f"{place} is no mapping but {_kind(turn)}")
        if "from" not in turn:
            messages.append(_message(number, turn))
            continue
        role, value = _role(place, turn["from"]), _text(place, "value", turn.get("value"))
        if turn["from"] == "function_call":
            calls = _value(value, f"{place}: function call")
            calls = [_call(place, call) for call in (calls if isinstance(calls, list) else [calls])]
            messages.append({"role": role, "content": "", "tool_calls": calls})
        elif role == "assistant" and (thought := _OPEN_THOUGHTS.fullmatch(value.strip())):
            reasoning, answer = (part.strip() for part in thought.groups())
            messages.append({"role": role, "content": answer, "reasoning_content": reasoning, "thinking": reasoning})
        else:
            messages.append({"role": role, "content": value})
    return _conversation(messages, record.get("tools"))


def _alpaca(record: dict[str, Any]) -> Conversation:
    instruction, more, output = (_text("record", key, record.get(key)) for key in ("instruction", "input", "output"))
    messages = _system(record)
    history = record.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRecord("history is no list of [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = f"{instruction}\n{more}" if more else instruction
    return _conversation([*messages, {"role": "user", "content": question}, {"role": "assistant", "content": output}])


def _gsm8k(record: dict[str, Any]) -> Conversation:
    question, answer = (_text("record", key, record.get(key)) for key in ("question", "answer"))
    return _conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def _rendered(record: dict[str, Any]) -> list[list[RenderedChunk]]:
    """A materialized line, or a packed one: a system chunk begins the next conversation."""
    conversations: list[list[RenderedChunk]] = []
    given = record.get("messages")
    for number, chunk in enumerate(given if isinstance(given, list) else []):
        if not isinstance(chunk, dict) or not isinstance(chunk.get("content"), str):
            raise BadRecord(f"chunk {number + 1} has no text")
        role = _role(f"chunk {number + 1}", chunk.get("role"))
        if role == "system" or not conversations:
            conversations.append([])
        conversations[-1].append(RenderedChunk(role, chunk["content"]))
    if not conversations:
        raise BadRecord(f"messages are no list of chunks but {_kind(given)}")
    return conversations


_SCHEMAS: dict[str, Callable[[dict[str, Any]], Conversation]] = {
    "messages": _messages, "sharegpt": _sharegpt, "alpaca": _alpaca, "gsm8k": _gsm8k}  # fmt: skip
SCHEMAS = (*_SCHEMAS, "rendered")


# -- pieces -----------------------------------------------------------------------------------------------------------


def _conversation(messages: list[dict[str, Any]], tools: Any = None, arguments: Mapping[str, Any] = {},
                  untrained: "set[int] | frozenset[int]" = frozenset()) -> Conversation:
    """Leading system messages become one, since templates read the first only; tools become OpenAI's form."""
    system = 0
    while system < len(messages) and messages[system]["role"] == "system":
        system += 1
    if system > 1:
        texts = [message["content"] for message in messages[:system]]
        messages = [{"role": "system", "content": "\n\n".join(filter(None, texts))}, *messages[system:]]
        untrained = {number - system + 1 for number in untrained if number >= system}
    return Conversation(messages, _tools(tools), arguments, frozenset(untrained))


def _tools(given: Any) -> Optional[list[dict[str, Any]]]:
    tools = _value(given, "tools") if given else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRecord(f"tools are no list of mappings but {_kind(tools)}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _call(place: str, given: Any) -> dict[str, Any]:
    """A tool call in OpenAI's form, its arguments a mapping."""
    function = given.get("function", given) if isinstance(given, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecord(f"{place}: a tool call without a name", "malformed_tool_call")
    try:
        arguments = _value(function.get("arguments") or {}, "arguments")
    except BadRecord as error:
        raise BadRecord(f"{place}: call of {function['name']}: {error}", "malformed_tool_call") from None
    if not isinstance(arguments, dict):
        reason = f"{place}: call of {function['name']}: its arguments are {_kind(arguments)}"
        raise BadRecord(reason, "malformed_tool_call")
    identity = {"id": given["id"]} if given.get("id") else {}
    return {"type": "function", **identity, "function": {"name": function["name"], "arguments": arguments}}


def _function_calls(place: str, given: Any) -> list[Any]:
    """Dolci's `function_calls`: JSON, or lines of Python calls with keyword arguments."""
    if not given:
        return []
    try:
        calls = json.loads(given) if isinstance(given, str) else given
        return calls if isinstance(calls, list) else [calls]
    except ValueError:
        pass
    try:
        return [_python_call(statement.value) for statement in ast.parse(given).body]
    except (SyntaxError, ValueError, AttributeError, RecursionError):
        reason = f"{place}: function_calls are neither JSON nor calls: {given[:60]!r}"
        raise BadRecord(reason, "malformed_tool_call") from None


def _python_call(call: Any) -> dict[str, Any]:
    arguments = {item.arg: ast.literal_eval(item.value) for item in call.keywords}
    return {"name": ast.unparse(call.func), "arguments": arguments}


def _system(record: dict[str, Any]) -> list[dict[str, Any]]:
    text = _text("record", "system", record.get("system"))
    return [{"role": "system", "content": text}] if text else []


def _role(place: str, given: Any) -> str:
    if not isinstance(given, str) or given not in ROLES:
        raise BadRecord(f"{place}: unknown role {given!r}{nearest(str(given), list(ROLES))}")
    return ROLES[given]


def _text(place: str, key: str, value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise BadRecord(f"{place}: its {key} is {_kind(value)}, not a text")
    return value or ""


def _value(given: Any, what: str) -> Any:
    """What JSON text stands for; anything else as it is."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{what} are not JSON: {error}") from None


def _kind(value: Any) -> str:
    return "missing" if value is None else "empty" if value == [] else f"a {type(value).__name__}"
