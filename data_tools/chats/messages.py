"""One message of a conversation, in any form that data sets have → the one form that chat templates read.

The rule is that of config.json (megatron_ext/models/config_meaning.py). Each key of a message, of a part of its
content, of a tool call and of what wraps a tool is carried over, or means nothing for training (`WITHOUT_MEANING`), or
makes a `BadRecord` that names the key, its place and the remedy. A key whose value is null is absent: Parquet spells so
what is not there. A text that is absent is refused; only a turn of tool calls or reasoning may do without.

    who, text      role, content │ from, value                       a tool's content may be any value: its JSON
    reasoning      reasoning_content, thinking, reasoning, and parts of these types
    tool calls     tool_calls │ function_call │ function_calls (JSON, or Python calls: Dolci) │ parts of type
                   tool_call │ the text of a message of role function_call or tool_call
    of a tool      tool_call_id, name
    tools          functions, tools on a message (Dolci)
    in the loss    `IN_LOSS`: 1 or true keeps a turn of the assistant in the loss, 0 or false leaves it out
"""

import ast
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from data_tools.base.json_text import RepeatedKey, json_value
from data_tools.mistake import nearest

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "environment": "tool",
    "tool_response": "tool",
}  # fmt: skip
CALLING = ("function_call", "tool_call")  # roles whose text is a call: LLaMA-Factory's, ms-swift's

# Whether a turn is in the loss, as OpenAI and OpenHermes (weight), LLaMA-Factory (loss_weight), ms-swift (loss,
# loss_scale) and axolotl's examples (train, training, train_on_turn) spell it.
IN_LOSS = ("weight", "loss_weight", "loss", "loss_scale", "train", "training", "trainable", "train_on_turn")

REMEDY = "take it out of the data, or name it in chat.ignored to leave it out"
_REFUSED = {  # keys that are known, and why they have no form here
    "train_detail": "parts of a turn are in the loss or not (axolotl); here a turn is, as a whole",
    "training_detail": "parts of a turn are in the loss or not (axolotl); here a turn is, as a whole",
    "label": "a verdict (KTO) or attributes (SteerLM), no yes or no to the loss; write loss: false",
    "prefix": "the text is the beginning of an answer",
    "partial": "the text is the beginning of an answer",
}

WITHOUT_MEANING = {  # keys of a message that change nothing that is trained
    **dict.fromkeys(("id", "message_id", "msg_id", "uuid", "parent_id", "conversation_id"), "names of messages"),
    **dict.fromkeys(("turn", "turn_id", "turn_identifier", "idx", "index"), "its place, which the list says"),
    **dict.fromkeys(("timestamp", "time", "date", "created", "created_at", "create_time"), "when it was written"),
    **dict.fromkeys(("model", "model_name", "author", "user_id", "hashed_ip", "header", "state", "country"),
                    "who wrote it (WildChat)"),
    **dict.fromkeys(("language", "lang", "toxic", "redacted"), "what it was found to be (WildChat, OASST)"),
    **dict.fromkeys(("tokens", "token_count", "num_tokens"), "how long it is"),
    **dict.fromkeys(("annotations", "logprobs", "cache_control"), "what an API says beside the text"),
}  # fmt: skip
_PARTS_WITHOUT_MEANING = ("id", "index", "annotations", "logprobs", "cache_control", "signature")
_CALLS_WITHOUT_MEANING = ("index",)

_REASONING = ("reasoning_content", "thinking", "reasoning")
_NO_CALLS: tuple[Any, ...] = (None, "", [], {})  # 0 and false are none of these, and no calls either
_PART_TYPES = {"input_text": "text", "output_text": "text", "thinking": "reasoning"}
_PART_ORDER = ("reasoning", "text", "tool_call")  # in which templates write what a turn says
_PART_VALUES = ("text", "value", "thinking", "reasoning")
_MALFORMED, _BAD_CALL, REFUSED_KEY = "malformed_record", "malformed_tool_call", "refused_key"

_MARKERS = re.compile(r"<\|(?:begin|end)_of_(?:thought|solution)\|>")
_OPEN_THOUGHTS = re.compile(
    r"\s*(?:<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>\s*)?"
    r"(?:<\|begin_of_solution\|>(.*?)<\|end_of_solution\|>|(.+?))\s*",
    re.DOTALL,
)


class BadRecord(ValueError):
    """Raised for a record that gives no conversation, with the bucket that it is counted in, and why."""

    def __init__(self, reason: str, bucket: str = _MALFORMED):
        super().__init__(reason)
        self.bucket = bucket


class Turn(NamedTuple):
    """Holds a message in the form of templates, whether it may be in the loss, what tools it names, and whether its
    role alone says that it is a call."""

    message: dict[str, Any]
    trained: bool = True
    tools: list[dict[str, Any]] | None = None
    is_call: bool = False


class Keys:
    """Reads a mapping key by key; `end` refuses what nobody took."""

    def __init__(self, place: str, given: Any, bucket: str = _MALFORMED):
        if not isinstance(given, dict):
            raise BadRecord(f"{place} is no mapping but {kind(given)}", bucket)
        self.place, self.bucket, self.given = place, bucket, given
        self.left = {key: value for key, value in given.items() if value is not None}

    @property
    def names(self) -> str:
        """Return all keys, to be told."""
        return ", ".join(map(str, self.given)) or "(none)"

    def take(self, key: str) -> Any:
        """Return the key's value, None where it is absent."""
        return self.left.pop(key, None)

    def text(self, key: str) -> str:
        """Return the key's text, "" where it is absent. Raise BadRecord where it is something else."""
        value = self.take(key)
        if value is not None and not isinstance(value, str):
            raise BadRecord(f"{self.place}: its {key} is {kind(value)}, not a text", self.bucket)
        return value or ""

    def need(self, key: str) -> Any:
        """Return the key's value. Raise BadRecord where it is absent: what is not said is not empty."""
        if key not in self.left:
            raise BadRecord(f"{self.place} has no {key!r}; its keys are {self.names}", self.bucket)
        return self.take(key)

    def end(self, without_meaning: Any = (), known: Mapping[str, str] = {}) -> None:
        """Raise BadRecord for the first key that was not taken and has a meaning, or one that is not known."""
        for key in self.left:
            if key not in without_meaning:
                why = known.get(key, "is not understood")
                raise BadRecord(f"{self.place}: key {key!r} ({kind(self.left[key])}): {why}; {REMEDY}", REFUSED_KEY)


def read_message(place: str, given: Any) -> Turn:
    """Return the message that stands at `place`, such as "message 3". Raise BadRecord for what is not understood."""
    keys = Keys(place, given)
    who, key = ("from", "value") if "from" in keys.left else ("role", "content")
    said = keys.need(who)
    role = role_of(place, said)
    content, is_call = keys.take(key), said in CALLING
    if not (keys.left or is_call) and isinstance(content, str) and not _MARKERS.search(content):
        return Turn({"role": role, "content": content})  # as most are
    trained = take_trained(keys, role)
    given_tools = [read_tools(keys.take(name)) for name in ("tools", "functions") if name in keys.left]
    tools = _the_one(place, given_tools, "tools")
    text, reasoning, calls = _said_in(keys, role, content, is_call)
    name, call_id = keys.text("name"), keys.text("tool_call_id")
    if content is None and not (reasoning or calls):
        raise BadRecord(f"{place} has no {key!r}, the text that goes with {who!r}; its keys are {keys.names}")
    keys.end(WITHOUT_MEANING, _REFUSED)
    if role != "assistant" and (reasoning or calls):
        what = "tool calls" if calls else "reasoning"
        raise BadRecord(f"{place}: {what} of {said!r}: only an assistant has any")
    if role != "tool" and call_id:
        raise BadRecord(f"{place}: key 'tool_call_id' of {said!r}: only a tool's result has one; {REMEDY}", REFUSED_KEY)
    more = {"reasoning_content": reasoning, "thinking": reasoning, "tool_calls": calls}
    more |= {"tool_call_id": call_id, "name": name}
    message = {"role": role, "content": text, **{key: value for key, value in more.items() if value}}
    return Turn(message, trained, tools, is_call and bool(calls))


def _said_in(keys: Keys, role: str, content: Any, is_call: bool) -> tuple[str, str, list[dict[str, Any]]]:
    """Return (text, reasoning, tool calls) of a message, from its content and from the keys for them, which are taken.

    Raise BadRecord where two places say different things.
    """
    place = keys.place
    said = _Said() if content is None else _calling(place, content) if is_call else _content(place, role, content)
    said.reasoning += [keys.text(name) for name in _REASONING if name in keys.left]
    calling = [name for name in ("tool_calls", "function_call") if name in keys.left]
    said.calls += [_calls(place, name, keys.take(name)) for name in calling]
    said.calls += [_function_calls(place, keys.take("function_calls"))]
    reasoning = _the_one(place, [text for text in said.reasoning if text], "its reasoning") or ""
    calls = _the_one(place, [calls for calls in said.calls if calls], "its tool calls") or []
    return said.text, reasoning, calls


def role_of(place: str, given: Any) -> str:
    """Return the role in the words of templates. Raise BadRecord for one that is not known."""
    if not isinstance(given, str) or given not in ROLES:
        raise BadRecord(f"{place}: unknown role {given!r}{nearest(str(given), list(ROLES))}")
    return ROLES[given]


def take_trained(keys: Keys, role: str = "assistant") -> bool:
    """Return whether the turn may be in the loss. Raise BadRecord for what is no yes or no, and where a message that
    is none of an assistant's asks for it."""
    said = {}
    for name in IN_LOSS if not keys.left.keys().isdisjoint(IN_LOSS) else ():
        value = keys.take(name)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            what = f"{keys.place}: {name} {value!r}"
            raise BadRecord(f"{what} is no yes or no: a turn is in the loss (1, true) or it is not (0, false)")
        said[name] = bool(value)
    if len(set(said.values())) > 1:
        raise BadRecord(f"{keys.place}: {' and '.join(said)} contradict one another")
    if role != "assistant" and any(said.values()):
        raise BadRecord(f"{keys.place}: {next(iter(said))} puts a {role}'s text into the loss; only assistants' are")
    return all(said.values())


def _the_one(place: str, given: list[Any], what: str) -> Any:
    """Return what was found, if anything was. Raise BadRecord where several things were that are not the same."""
    given = [item for item in given if item is not None]
    if any(item != given[0] for item in given):
        raise BadRecord(f"{place}: {what} stand there twice, and differ")
    return given[0] if given else None


# -- content ----------------------------------------------------------------------------------------------------------


class _Said:
    """Collects what a message says; of reasoning and calls a list for each place that they may stand in."""

    def __init__(self, text: str = "", reasoning: str = "", calls: list[dict[str, Any]] | None = None):
        self.text, self.reasoning, self.calls = text, [reasoning], [calls or []]


def _calling(place: str, content: Any) -> _Said:
    """Read the text of a message whose role says that it is a call, or several."""
    given = value_of(content, f"{place}: function call", _BAD_CALL)
    if not given:
        raise BadRecord(f"{place}: no call, though its role says that it is one", _BAD_CALL)
    return _Said(calls=_calls(place, "its call", given if isinstance(given, list) else [given]))


def _content(place: str, role: str, content: Any) -> _Said:
    """Read a text, a list of typed parts, or what a tool gave as an object."""
    if isinstance(content, str):
        return _thoughts(place, content) if role == "assistant" and _MARKERS.search(content) else _Said(content)
    if role == "tool" and not _is_parts(content):
        return _Said(_json_of(place, content))
    if not isinstance(content, list) or not content:
        raise BadRecord(f"{place}: its content is {kind(content)}, neither a text nor parts")
    said: dict[str, list[Any]] = {name: [] for name in _PART_ORDER}
    last = 0
    for number, given in enumerate(content, 1):
        part = Keys(f"{place}: part {number}", given if isinstance(given, dict) else {"type": "text", "text": given})
        name, value = _part(part)
        if _PART_ORDER.index(name) < last:
            raise BadRecord(f"{part.place}: {name} after {_PART_ORDER[last]}; templates write {', '.join(_PART_ORDER)}")
        last = _PART_ORDER.index(name)
        said[name].append(value)
    return _Said("".join(said["text"]), "".join(said["reasoning"]), said["tool_call"])


def _is_parts(content: Any) -> bool:
    """Return whether a tool's content is a list of texts and typed parts, and not a value that it gave."""
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(part, str) or isinstance(part, dict) and "type" in part for part in content)
    )


def _json_of(place: str, value: Any) -> str:
    """Return the JSON of what a tool gave, as templates write it. Raise BadRecord where it is nested too deep."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise BadRecord(f"{place}: its content is nested too deep") from None


def _part(part: Keys) -> tuple[str, Any]:
    """Return (what it is, its text or call) of a part. Raise BadRecord for pictures and the like."""
    given = part.need("type")
    name = _PART_TYPES.get(str(given), str(given))
    if name not in _PART_ORDER:
        raise BadRecord(f"{part.place}: a part of type {name!r}; text, reasoning and tool_call are known")
    values = [part.take(key) for key in _PART_VALUES if key in part.left]
    part.end(_PARTS_WITHOUT_MEANING, _REFUSED)
    if len(values) != 1:
        raise BadRecord(
            f"{part.place} has {len(values)} of the keys {', '.join(_PART_VALUES)}; its keys are {part.names}"
        )
    if name == "tool_call":
        return name, _call(part.place, value_of(values[0], f"{part.place}: tool call", _BAD_CALL))
    if not isinstance(values[0], str):
        raise BadRecord(f"{part.place}: a part of type {name!r} that is {kind(values[0])}, not a text")
    return name, values[0]


def _thoughts(place: str, text: str) -> _Said:
    """Read a turn of OpenThoughts: a thought between markers or none, then a solution between markers or plain text."""
    match = _OPEN_THOUGHTS.fullmatch(text)
    parts = [(part or "").strip() for part in match.groups()] if match else []
    answer = parts[1] or parts[2] if parts else ""
    if not answer or any(_MARKERS.search(part) for part in parts):
        reason = "its <|begin_of_thought|> … <|end_of_solution|> markers are not one thought and one solution"
        raise BadRecord(f"{place}: {reason}", "openthoughts_markers")
    return _Said(answer, parts[0])


# -- tools ------------------------------------------------------------------------------------------------------------


def read_tools(given: Any) -> list[dict[str, Any]] | None:
    """Return tools in OpenAI's form, None where there are none; what stands in a function is its template's affair."""
    tools = value_of(given, "tools") if given else None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise BadRecord(f"tools are no list of mappings but {kind(tools)}")
    return [_tool(f"tool {number}", tool) for number, tool in enumerate(tools, 1)]


def _tool(place: str, given: Any) -> dict[str, Any]:
    keys = Keys(place, given)
    if keys.left.get("type", "function") != "function":
        raise BadRecord(f"{place}: its type is {keys.left['type']!r}; tools of type 'function' are known")
    function = given
    if "function" in keys.left:
        keys.take("type")
        function = keys.take("function")
        keys.end()
    elif "type" in given:
        function = {key: value for key, value in given.items() if key != "type"}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecord(f"{place} is no function with a name but has the keys {keys.names}")
    return {"type": "function", "function": function}


def _calls(place: str, key: str, given: Any) -> list[dict[str, Any]]:
    given = value_of([] if given in _NO_CALLS else given, f"{place}: {key}", _BAD_CALL)
    if key == "function_call" and isinstance(given, dict):
        given = [given]
    if not isinstance(given, list):
        raise BadRecord(f"{place}: {key} are no list but {kind(given)}", _BAD_CALL)
    return [_call(place, call) for call in given]


def _call(place: str, given: Any) -> dict[str, Any]:
    """Return a tool call in OpenAI's form, its arguments a mapping."""
    keys = Keys(f"{place}: a tool call", given, _BAD_CALL)
    function = keys
    if "function" in keys.left:
        function = Keys(f"{place}: a tool call's function", keys.take("function"), _BAD_CALL)
    name = function.take("name")
    if not isinstance(name, str):
        raise BadRecord(f"{place}: a tool call without a name", _BAD_CALL)
    what, call_id, arguments = keys.take("type"), keys.take("id"), function.take("arguments")
    if what not in (None, "function"):
        raise BadRecord(f"{place}: call of {name}: its type is {what!r}; calls of type 'function' are known", _BAD_CALL)
    for part in (function, keys):
        part.end(_CALLS_WITHOUT_MEANING)
    try:
        arguments = value_of({} if arguments in (None, "", []) else arguments, "arguments")
    except BadRecord as error:
        raise BadRecord(f"{place}: call of {name}: {error}", _BAD_CALL) from None
    if not isinstance(arguments, dict):
        raise BadRecord(f"{place}: call of {name}: its arguments are {kind(arguments)}", _BAD_CALL)
    identity = {"id": call_id} if call_id else {}
    return {"type": "function", **identity, "function": {"name": name, "arguments": arguments}}


def _function_calls(place: str, given: Any) -> list[dict[str, Any]]:
    """Read Dolci's `function_calls`: JSON, or lines of Python calls with keyword arguments."""
    if given in _NO_CALLS:
        return []
    try:
        calls = json_value(given) if isinstance(given, str) else given
    except RepeatedKey as error:
        raise BadRecord(f"{place}: function_calls: {error}", _BAD_CALL) from None
    except ValueError:
        calls = _python_calls(place, given)
    return [_call(place, call) for call in (calls if isinstance(calls, list) else [calls])]


def _python_calls(place: str, given: str) -> list[dict[str, Any]]:
    try:
        return [_python_call(statement) for statement in ast.parse(given).body]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        reason = f"{place}: function_calls are neither JSON nor calls with named arguments: {given[:60]!r}"
        raise BadRecord(reason, _BAD_CALL) from None


def _python_call(statement: ast.stmt) -> dict[str, Any]:
    """Return the call. Raise ValueError for what is none by itself, or has an argument without a name."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not isinstance(call, ast.Call):
        raise ValueError("no call")
    if call.args or any(item.arg is None for item in call.keywords):
        raise ValueError("an argument without a name")
    for mapping in (node for node in ast.walk(call) if isinstance(node, ast.Dict)):
        if len({ast.dump(key) for key in mapping.keys if key}) < len(mapping.keys):
            raise ValueError("a key that stands twice")
    arguments = {item.arg: ast.literal_eval(item.value) for item in call.keywords}
    return {"name": ast.unparse(call.func), "arguments": arguments}


# -- values -----------------------------------------------------------------------------------------------------------


def value_of(given: Any, what: str, bucket: str = _MALFORMED) -> Any:
    """Return what JSON text stands for, anything else as it is. Raise BadRecord for a text that is no JSON."""
    if not isinstance(given, str):
        return given
    try:
        return json_value(given)
    except ValueError as error:
        are = ": " if isinstance(error, RepeatedKey) else " are "
        raise BadRecord(f"{what}{are}{error}", bucket) from None


def kind(value: Any) -> str:
    return "missing" if value is None else "empty" if value == [] else f"a {type(value).__name__}"
