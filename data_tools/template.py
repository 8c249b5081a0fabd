"""Chat template → text and the character spans that assistants wrote, from one render of each conversation.

Rendering prefixes to find where a message ends costs a render a turn, and is wrong where a template writes a message
differently once another follows it (stock Qwen3 and gpt-oss do). Here the template's syntax tree gets a marker at the
start of the body of its loop over messages and one after the loop; `{% generation %}` blocks, where a template has
them, are marked instead. The markers are cut out of the rendered text, which is then what the template writes, byte
for byte.

A span is what the model itself has to write. Two things about that are probed with small conversations when the
template is loaded:

    header    what the generation prompt already gives (`<|im_start|>assistant\\n`) is no part of a span
    closing   where the template closes no turn itself (GLM), the next message's role tag is the stop token, and one is
              added after a last turn
"""

import json
import os
from bisect import bisect
from datetime import date
from types import BuiltinMethodType
from typing import Any, Iterator, Mapping, NamedTuple, Optional

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from data_tools.conversation import Conversation
from data_tools.mistake import UserMistake

THINK = "<think>"

_MARK = "__mark"  # the marker's name within the template
_MESSAGES = "messages"
_LOOP_END, _OPEN, _CLOSE = "end", "open", "close"
_SENTINELS = [chr(code) for code in range(0xE000, 0xE100)]  # private use; the first that a text does not hold


class TemplateError(ValueError):
    """The template refused a conversation; str() is one line."""


class Span(NamedTuple):
    """text[start:stop] is what the assistant wrote in message `message`, its stop token included."""

    message: int
    start: int
    stop: int


class Rendered(NamedTuple):
    text: str
    spans: list[Span]


class ChatTemplate:
    """A compiled template. UserMistake when it cannot be parsed, or its assistant turns cannot be told.

    `header`: text at the start of a turn that is not trained; None finds it. `day` stands for today.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], arguments: Mapping[str, Any], day: date,
                 header: Optional[str] = None):
        self._variables = {**special_tokens, **arguments}
        self._environment = _environment(day)
        try:
            tree = self._environment.parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserMistake(f"chat template, line {error.lineno}: {error.message}; mend the template") from None
        self.has_blocks = any(node.name == _MARK for node in tree.find_all(nodes.Filter))
        loops = _instrument(tree)
        if not loops and not self.has_blocks:
            raise UserMistake("chat template: no loop over messages and no {% generation %} block, so what the "
                              "assistant wrote cannot be told; give a template that has one of them")
        code = self._environment.compile(tree)
        self._template = jinja2.Template.from_code(self._environment, code, self._environment.make_globals(None))
        self.text_arguments = False
        self.text_arguments = self._wants_text_arguments()
        self._headers: list[str] = [] if self.has_blocks else self._find_headers() if header is None else [header]
        self._closings: dict[str, str] = {}
        self.stops = self._find_stops()

    def render(self, conversation: Conversation) -> Rendered:
        """The text and the spans of its assistant turns, in order. TemplateError when the template refuses."""
        text, marks = self._marked(conversation)
        roles = [message["role"] for message in conversation.messages]
        pieces = list(_pieces(marks, len(text), roles))
        if self.has_blocks:
            spans = _block_spans(marks, pieces, roles)
        else:
            spans = [self._without_header(text, span) for span in pieces if roles[span.message] == "assistant"]
        spans = [span for span in spans if span.start < span.stop]
        return self._closed(text, spans, pieces, conversation) if self._closings else Rendered(text, spans)

    def prompt(self, conversation: Conversation) -> str:
        """The text up to where the assistant's next turn begins. TemplateError when the template refuses."""
        return self._marked(conversation, add_generation_prompt=True)[0]

    # -- one render ----------------------------------------------------------------------------------------------

    def _marked(self, conversation: Conversation, **more: Any) -> tuple[str, list[tuple[int, str]]]:
        """(text, [(place in it, mark)]); a mark is a message's index, the loop's end, or a block's open or close."""
        messages = [dict(message) for message in conversation.messages]  # each an object of its own, which marks tell
        if self.text_arguments:
            messages = [_with_text_arguments(message) for message in messages]
        variables = {"add_generation_prompt": False, **self._variables, **conversation.arguments, **more}
        numbers = {id(message): str(number) for number, message in enumerate(messages)}
        for sentinel in _SENTINELS:
            writer = _MarkWriter(sentinel, numbers)
            self._environment.marks = writer
            try:
                rendered = self._template.render(
                    messages=messages, tools=conversation.tools, documents=None, **variables)
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

    def _without_header(self, text: str, span: Span) -> Span:
        for header in self._headers:
            if text.startswith(header, span.start):
                return span._replace(start=span.start + len(header))
        return span

    def _closed(self, text: str, spans: list[Span], pieces: list[Span], conversation: Conversation) -> Rendered:
        """Each span with the next message's role tag; the last turn gets one of its own."""
        messages = conversation.messages
        following = {piece.message: following for piece, following in zip(pieces, pieces[1:])}
        closed = []
        for span in spans:
            tag, stop = "", span.stop
            if span.message in following:
                tag = self._closings.get(messages[following[span.message].message]["role"], "")
            elif span.stop == len(text):
                tag = self._closings["tool" if messages[span.message].get("tool_calls") else "user"]
                text += tag
            if tag and text.startswith(tag, span.stop):
                stop += len(tag)
            closed.append(span._replace(stop=stop))
        return Rendered(text, closed)

    # -- probes --------------------------------------------------------------------------------------------------

    def _wants_text_arguments(self) -> bool:
        """Whether the template takes a tool call's arguments as JSON text only (DeepSeek)."""
        for text_arguments in (False, True):
            self.text_arguments = text_arguments
            try:
                self._marked(Conversation([_ASK, _CALL, _RESULT, _ANSWER]))
                return text_arguments
            except TemplateError:
                pass
        return False  # it knows no tools

    def _find_headers(self) -> list[str]:
        """What the generation prompt already holds of a turn after a question, and of one after a tool's result.

        Thinking tags stay part of the turn, whoever writes them: whether a model reasons is in the loss.
        """
        found = []
        for context in ([_ASK], [_ASK, _CALL, _RESULT]):
            try:
                prompt, _ = self._marked(Conversation(context), add_generation_prompt=True)
                text, marks = self._marked(Conversation([*context, _ANSWER]))
            except TemplateError as error:
                if context == [_ASK]:
                    raise UserMistake(f"chat template: it refuses a question and an answer ({error}); where it needs "
                                      "more, such as a bos_token, give it in chat.arguments") from None
                continue  # it knows no tools
            starts = [place for place, mark in marks if mark == str(len(context))]
            if starts and prompt.startswith(text[: starts[-1]]):
                found.append(os.path.commonprefix([prompt[starts[-1]:], text[starts[-1]:]]).partition(THINK)[0])
        if not found or not found[0]:
            raise UserMistake("chat template: its generation prompt does not begin an assistant's turn, so the header "
                              "cannot be told from the answer; name the header in chat.header (\"\" for none)")
        bos = self._variables.get("bos_token") or ""
        return [start + header for start in ("", bos) for header in dict.fromkeys(found) if header]

    def _find_stops(self) -> list[str]:
        """The texts that end a turn: amid a conversation, at its end, and after a tool call."""
        try:
            amid, last = (self._tail([_ASK, _ANSWER, *more], 1) for more in ([_ASK], []))
        except TemplateError as error:
            raise UserMistake(f"chat template: it refuses a question, an answer and a question ({error})") from None
        if not amid.strip() and not self.has_blocks:
            self._closings = self._find_closings()
            return list(dict.fromkeys(self._closings.values()))
        if not amid.strip() or not last.strip():
            raise UserMistake("chat template: nothing ends an assistant's turn within what is trained, so the model "
                              "would never learn to stop; give a template that does")
        return list(dict.fromkeys([amid.strip(), last.strip(), *self._call_stop()]))

    def _tail(self, messages: list[dict[str, Any]], turn: int) -> str:
        """What the template writes after the answer's own text."""
        text, spans = self.render(Conversation(messages))
        span = next((span for span in spans if span.message == turn), None)
        if span is None or _ANSWER["content"] not in text[span.start : span.stop]:
            raise TemplateError("it does not write an assistant's answer")
        return text[span.start : span.stop].rpartition(_ANSWER["content"])[2]

    def _call_stop(self) -> Iterator[str]:
        """The end that tool calls have in common."""
        ends = []
        for arguments in ({"a": 1}, {"b": "x"}):
            function = {"name": "add", "arguments": arguments}
            call = {**_CALL, "tool_calls": [{**_CALL["tool_calls"][0], "function": function}]}
            try:
                text, spans = self.render(Conversation([_ASK, call, _RESULT]))
            except TemplateError:
                return
            if not spans:
                return
            turn = text[spans[0].start : spans[0].stop]
            if _RESULT["content"] in turn:
                raise UserMistake("chat template: it writes a tool's result into the assistant's turn, so the model "
                                  "would learn to make results up; give a template with {% generation %} blocks")
            ends.append(turn[::-1])
        yield os.path.commonprefix(ends)[::-1].lstrip('"}').strip()

    def _find_closings(self) -> dict[str, str]:
        """{role: its tag}, the first word of such a message, for a template that closes no turn."""
        tags = {}
        for before, message in ((_ANSWER, _ASK), (_CALL, _RESULT), (_ANSWER, {"role": "system", "content": "Go on."})):
            try:
                text, marks = self._marked(Conversation([_ASK, before, message]))
            except TemplateError:
                continue
            start = next((place for place, mark in marks if mark == "2"), len(text))
            tags[message["role"]] = text[start:].partition(message["content"])[0].split(maxsplit=1)[0:1]
        tags = {role: words[0] for role, words in tags.items() if words}
        if "user" not in tags:
            raise UserMistake("chat template: nothing ends an assistant's turn, not even the tag of the next message, "
                              "so the model would never learn to stop; give a template that does")
        return {"tool": tags["user"], **tags}


_ASK = {"role": "user", "content": "2+2?"}
_ANSWER = {"role": "assistant", "content": "ANSWER4"}
_CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": 2}}}]}
_RESULT = {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "RESULT4"}


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = [{**call, "function": {**call["function"], "arguments": _to_json(call["function"]["arguments"])}}
             for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


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
        """The template filters with this what its loop holds, or the mark itself."""
        if type(item) is str:
            return self.mark(item)
        return self.mark(self.numbers[id(item)]) if id(item) in self.numbers else ""


def _pieces(marks: list[tuple[int, str]], end: int, roles: list[str]) -> Iterator[Span]:
    """What each message's pass through the loop wrote; several loops may pass over a message, most write nothing."""
    bounds = [(place, mark) for place, mark in marks if mark not in (_OPEN, _CLOSE)]
    written: dict[int, Span] = {}
    for (start, mark), (stop, _) in zip(bounds, [*bounds[1:], (end, _LOOP_END)]):
        if mark == _LOOP_END or start == stop:
            continue
        message = int(mark)
        if message in written and roles[message] == "assistant":
            raise TemplateError(f"it writes message {message + 1} twice")
        written[message] = Span(message, start, stop)
    yield from sorted(written.values(), key=lambda span: span.start)


def _block_spans(marks: list[tuple[int, str]], pieces: list[Span], roles: list[str]) -> list[Span]:
    """The generation blocks, each with the last turn that began before it; without a loop the turns in their order."""
    opens = [place for place, mark in marks if mark == _OPEN]
    closes = [place for place, mark in marks if mark == _CLOSE]
    turns = [number for number, role in enumerate(roles) if role == "assistant"]
    begun = [piece for piece in pieces if roles[piece.message] == "assistant"]
    if begun:
        starts = [piece.start for piece in begun]
        if opens and opens[0] < starts[0]:
            raise TemplateError("a generation block begins before the first assistant's turn")
        turns = [begun[bisect(starts, place) - 1].message for place in opens]
    if len(turns) != len(opens):
        raise TemplateError(f"{len(opens)} generation blocks for {len(turns)} assistant turns")
    return [Span(*span) for span in zip(turns, opens, closes)]


# -- the syntax tree --------------------------------------------------------------------------------------------------


def _instrument(tree: nodes.Template) -> int:
    """Put marks into every loop over messages that writes something; returns how many there are."""
    names = _names_of_messages(tree)
    loops = [loop for loop in tree.find_all(nodes.For) if isinstance(loop.target, nodes.Name)
             and _base(loop.iter) in names and next(loop.find_all(nodes.Output), None)]
    for loop in loops:
        loop.body.insert(0, _mark(nodes.Name(loop.target.name, "load")))
    for parent in [tree, *tree.find_all(nodes.Node)]:
        for _, body in parent.iter_fields():
            if isinstance(body, list):
                for loop in [item for item in body if item in loops]:
                    body.insert(body.index(loop) + 1, _mark(nodes.Const(_LOOP_END)))
    tree.set_environment(tree.environment)
    return len(loops)


def _names_of_messages(tree: nodes.Template) -> set[str]:
    """`messages`, and what the template sets from it, or from a part of it."""
    names, before = {_MESSAGES}, 0
    while len(names) > before:
        before = len(names)
        names |= {node.target.name for node in tree.find_all(nodes.Assign)
                  if isinstance(node.target, nodes.Name) and _base(node.node) in names}
    return names


def _base(expression: nodes.Expr) -> Optional[str]:
    """The name a list of messages comes from, through slices and filters."""
    while isinstance(expression, nodes.Filter) or (
            isinstance(expression, nodes.Getitem) and isinstance(expression.arg, nodes.Slice)):
        expression = expression.node
    return expression.name if isinstance(expression, nodes.Name) else None


def _mark(item: nodes.Expr) -> nodes.Output:
    """A filter, since a call goes through the sandbox's questions."""
    return nodes.Output([nodes.Filter(item, _MARK, [], [], None, None)])


# -- the environment of transformers' apply_chat_template --------------------------------------------------------------


class _Generation(Extension):
    """`{% generation %}` blocks, marked where they begin and end."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Scope:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope([_mark(nodes.Const(_OPEN)), *body, _mark(nodes.Const(_CLOSE))]).set_lineno(line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's, which asks a dozen questions before it gives `message.role`; plain data's keys and texts' methods are
    given at once."""

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
            return __obj(*args, **{name: value for name, value in kwargs.items() if name not in _SCOPES})
        return super().call(__context, __obj, *args, **kwargs)


_DICT_NAMES = frozenset(dir(dict))
_TEXT_NAMES = frozenset(name for name in dir(str) if not name.startswith(("_", "format")))  # formats reach into objects
_LOOP_NAMES = frozenset(name for name in dir(LoopContext) if not name.startswith("_"))
_SCOPES = ("_loop_vars", "_block_vars")  # which compiled templates give to every call


def _environment(day: date) -> ImmutableSandboxedEnvironment:
    """What templates are written for (transformers.utils.chat_template_utils), with a day that stands still."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.filters[_MARK] = jinja2.pass_context(lambda _, item: environment.marks(item))  # hence not folded away
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = day.strftime
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: Optional[int] = None,
             separators: Optional[tuple[str, str]] = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
