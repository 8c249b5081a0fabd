"""Chat template → text, and the places in it where each message's turn in the loop begins and generation blocks lie.

The template's syntax tree gets a marker at the start of the body of its loop over messages and one after the loop;
`{% generation %}` blocks, where a template has them, are marked too. The markers are cut out of the rendered text,
which is then what the template writes, byte for byte. data_tools/chats/turns.py tells what of it an assistant wrote.

Templates read messages in several forms (a tool call's arguments as JSON text, contents as lists of parts, reasoning
under one name or another). Which one this template takes is found by rendering small conversations.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context, LoopContext
from jinja2.utils import Namespace

from data_tools.base import bounds
from data_tools.chats.conversation import Conversation
from data_tools.chats.template_bounds import BoundedSandbox, OverBound
from data_tools.mistake import UserMistake

LOOP_END, OPEN, CLOSE = "end", "open", "close"  # marks; any other is the number of a message

_MARK = "__mark"  # the marker's name within the template
_MESSAGES = "messages"
_SENTINELS = [chr(code) for code in range(0xE000, 0xE100)]  # private use; the first that a text does not hold


class TemplateError(ValueError):
    """Raised where the template refuses a conversation; str() is one line."""


class Overdone(TemplateError):
    """Raised where rendering a conversation would take more than a template may (data_tools/chats/template_bounds.py);
    str() is one line."""


@dataclass(frozen=True)
class Form:
    """Says how this template reads messages."""

    text_arguments: bool = False  # a tool call's arguments are JSON text (DeepSeek)
    parts: bool = False  # a content is a list of typed parts (SmolVLM)
    reasoning: bool = False  # reasoning has the name `reasoning` alone (Solar)

    def message(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the message in this form, an object of its own, which marks tell from any other."""
        message = dict(given)
        if self.text_arguments and message.get("tool_calls"):
            message["tool_calls"] = list(map(_with_text_arguments, message["tool_calls"]))
        if self.parts and isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        if self.reasoning and message.get("reasoning_content"):
            message["reasoning"] = message["reasoning_content"]
        return message


class ChatTemplate:
    """Represents a compiled template. Raise UserMistake when it cannot be parsed. `day` stands for today."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], arguments: Mapping[str, Any], day: date):
        self._variables = {**special_tokens, **arguments}
        self._environment = _environment(day)
        if len(source) > bounds.TEMPLATE.most:
            raise UserMistake(f"chat template: has {bounds.TEMPLATE.exceeded()}")
        try:
            self._compile(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserMistake(f"chat template, line {error.lineno}: {error.message}; mend the template") from None
        except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
            reason = "is nested too deep" if isinstance(error, (RecursionError, MemoryError)) else _one_line(error)
            raise UserMistake(f"chat template: cannot be compiled ({reason}); mend the template") from None
        self.form = Form()
        self.probe_tools: list[dict[str, Any]] | None = None  # tools without which it refuses any conversation
        try:
            self._find_form()
        except Overdone as error:
            raise UserMistake(f"chat template: {error}; mend the template") from None

    def _compile(self, source: str) -> None:
        tree = self._environment.parse(source)
        self.has_blocks = any(node.name == _MARK for node in tree.find_all(nodes.Filter))
        self.has_loop = bool(_instrument(tree, self._environment))
        self._environment.count(tree)
        code = self._environment.compile(tree)
        self._template = jinja2.Template.from_code(self._environment, code, self._environment.make_globals(None))

    def token(self, name: str) -> str:
        """Return the text of a special token, such as bos_token; "" where there is none."""
        return self._variables.get(name) or ""

    def text(self, conversation: Conversation) -> str:
        """Return the text of a conversation. Raise TemplateError when the template refuses it."""
        return self.marked(conversation)[0]

    def prompt(self, conversation: Conversation) -> str:
        """Return the text up to where the assistant's next turn begins.

        Raise TemplateError when the template refuses.
        """
        return self.marked(conversation, add_generation_prompt=True)[0]

    def marked(self, conversation: Conversation, **more: Any) -> tuple[str, list[tuple[int, str]]]:
        """Return (text, [(place in it, mark)]); a mark is a message's number, LOOP_END, OPEN or CLOSE."""
        messages = list(map(self.form.message, conversation.messages))
        variables = {"add_generation_prompt": False, **self._variables, **conversation.arguments, **more}
        numbers = {id(message): str(number) for number, message in enumerate(messages)}
        for sentinel in _SENTINELS:
            writer = _MarkWriter(sentinel, numbers)
            self._environment.marks = writer
            self._environment.begin()
            try:
                rendered = self._template.render(
                    messages=messages, tools=conversation.tools, documents=None, **variables
                )
            except OverBound as error:
                raise Overdone(str(error)) from None
            except Exception as error:  # whatever a template does with data it does not expect
                raise TemplateError(_one_line(error)) from None
            parts = rendered.split(sentinel)
            if len(parts) == 2 * writer.written + 1:
                break
        else:
            raise TemplateError("the text holds every marker character")
        place, marks = 0, []
        for before, mark in zip(parts[0::2], parts[1::2]):
            place += len(before)
            marks.append((place, mark))
        return "".join(parts[0::2]), marks

    def probe(self, *messages: dict[str, Any]) -> Conversation:
        """Return a small conversation that this template can be tried with."""
        return Conversation(list(messages), self.probe_tools)

    def _find_form(self) -> None:
        """Choose the form in which the template writes what messages hold; the plain one where none does."""
        for messages in ([ASK, CALL, RESULT, ANSWER], [ASK, ANSWER]):
            for self.probe_tools, parts, text_arguments in itertools.product(
                (None, [TOOL]), (False, True), (False, True)
            ):
                self.form = Form(text_arguments, parts)
                if self._writes(messages, *(message["content"] for message in messages)):
                    self._find_reasoning()
                    return
        self.form, self.probe_tools = Form(), None

    def _find_reasoning(self) -> None:
        plain = self.form
        for reasoning in (False, True):
            self.form = replace(plain, reasoning=reasoning)
            if any(self._writes([ASK, {**message, **THOUGHT}], THOUGHT["thinking"]) for message in (ANSWER, CALL)):
                return
        self.form = plain

    def _writes(self, messages: list[dict[str, Any]], *wanted: str) -> bool:
        try:
            text = self.text(self.probe(*messages))
        except Overdone:
            raise
        except TemplateError:
            return False
        return all(part in text for part in wanted)


# What templates are tried with.
ASK: dict[str, Any] = {"role": "user", "content": "2+2?"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "ANSWER4"}
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": 2}}}],
}
RESULT: dict[str, Any] = {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "RESULT4"}
THOUGHT: dict[str, Any] = {"reasoning_content": "THOUGHT4", "thinking": "THOUGHT4"}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "description": "What to add."}},
            "required": ["a"],
        },
    },
}


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    return {**call, "function": {**call["function"], "arguments": _to_json(call["function"]["arguments"])}}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# -- marks ------------------------------------------------------------------------------------------------------------


class _MarkWriter:
    """Writes the marks of one render, each between two sentinels, and counts them."""

    def __init__(self, sentinel: str, numbers: dict[int, str]):
        self.sentinel, self.numbers, self.written = sentinel, numbers, 0

    def mark(self, code: str) -> str:
        self.written += 1
        return f"{self.sentinel}{code}{self.sentinel}"

    def __call__(self, item: Any) -> str:
        """Return the mark of a message that the loop holds, or the mark of this name; "" for anything else."""
        if type(item) is str:
            return self.mark(item)
        return self.mark(self.numbers[id(item)]) if id(item) in self.numbers else ""


# -- the syntax tree --------------------------------------------------------------------------------------------------


def _instrument(tree: nodes.Template, environment: jinja2.Environment) -> int:
    """Put marks into every loop over messages that writes something; return how many loops there are."""
    names = _names_of_messages(tree)
    loops = [
        loop
        for loop in tree.find_all(nodes.For)
        if _item(loop) and _base(loop.iter) in names and next(loop.find_all(nodes.Output), None)
    ]
    loops = _outermost(tree, loops)
    for loop in loops:
        loop.body.insert(0, _mark(nodes.Name(_item(loop), "load")))
    for parent in [tree, *tree.find_all(nodes.Node)]:
        for _, body in parent.iter_fields():
            if isinstance(body, list):
                for loop in [item for item in body if any(item is one for one in loops)]:
                    body.insert(body.index(loop) + 1, _mark(nodes.Const(LOOP_END)))
    tree.set_environment(environment)
    return len(loops)


def _item(loop: nodes.For) -> str:
    """Return the name that a loop gives its items; "" where it takes them apart."""
    return loop.target.name if isinstance(loop.target, nodes.Name) else ""


def _outermost(tree: nodes.Template, loops: list[nodes.For]) -> list[nodes.For]:
    """Return the loops that are in no other one, nor in a macro which one of them may call: those write parts of a
    message."""
    inner = [node for loop in loops for node in loop.find_all(nodes.For)]
    outer = [loop for loop in loops if not any(loop is node for node in inner)]
    in_macros = [node for macro in tree.find_all(nodes.Macro) for node in macro.find_all(nodes.For)]
    free = [loop for loop in outer if not any(loop is node for node in in_macros)]
    return free or outer


def _names_of_messages(tree: nodes.Template) -> set[str]:
    """Return `messages`, and what the template sets from it, or from a part of it."""
    names, before = {_MESSAGES}, 0
    while len(names) > before:
        before = len(names)
        names |= {
            node.target.name
            for node in tree.find_all(nodes.Assign)
            if isinstance(node.target, nodes.Name) and _base(node.node) in names
        }
    return names


def _base(node: nodes.Node | None) -> str:
    """Return the name that a list of messages comes from, through slices and filters; "" where it comes from none."""
    while isinstance(node, nodes.Filter) or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)):
        node = node.node
    return node.name if isinstance(node, nodes.Name) else ""


def _mark(item: nodes.Expr) -> nodes.Output:
    """Return what writes a mark: a filter, since a call goes through the sandbox's questions."""
    return nodes.Output([nodes.Filter(item, _MARK, [], [], None, None)])  # its fields have no keywords


# -- the environment of transformers' apply_chat_template --------------------------------------------------------------


class _Generation(Extension):
    """Reads `{% generation %}` blocks, marked where they begin and end."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Scope:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        scope = nodes.Scope([_mark(nodes.Const(OPEN)), *body, _mark(nodes.Const(CLOSE))])
        scope.set_lineno(line)
        return scope


class _Sandbox(BoundedSandbox):
    """Asks less than Jinja's sandbox, which asks a dozen questions before it gives `message.role`; here plain data's
    keys and texts' methods are given at once."""

    marks: _MarkWriter  # of the render that is going on

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict and attribute not in _DICT_NAMES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if kind is str and attribute in _TEXT_NAMES or kind is LoopContext and attribute in _LOOP_NAMES:
            return getattr(obj, attribute)
        if kind is Namespace and not attribute.startswith("_") and hasattr(obj, attribute):
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, as Jinja's own
        if type(__obj) is BuiltinMethodType and type(__obj.__self__) is str and __obj.__name__ in _TEXT_NAMES:
            __self.ask(__obj, args, kwargs)
            return __obj(*args, **{name: value for name, value in kwargs.items() if name not in _SCOPES})
        return super().call(__context, __obj, *args, **kwargs)


_DICT_NAMES = frozenset(dir(dict))
_TEXT_NAMES = frozenset(name for name in dir(str) if not name.startswith(("_", "format")))  # formats reach into objects
_LOOP_NAMES = frozenset(name for name in dir(LoopContext) if not name.startswith("_"))
_SCOPES = ("_loop_vars", "_block_vars")  # which compiled templates give to every call


def _environment(day: date) -> _Sandbox:
    """Return what templates are written for (transformers.utils.chat_template_utils), with a day that stands still."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.add_filter("tojson", _to_json)
    environment.filters[_MARK] = jinja2.pass_context(lambda _, item: environment.marks(item))  # hence not folded away
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = environment.date(day)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
