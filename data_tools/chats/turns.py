"""What of a conversation's text its assistants wrote: from the end of the generation prompt through the stop token.

There are three ways to tell where a turn lies, of which a template gets the first that its probes bear out:

    blocks     `{% generation %}` blocks, but for a header within one
    loop       what one pass through the template's loop over messages wrote; one render a conversation, and right where
               a template writes a message differently once another follows it (stock Qwen3 and gpt-oss do)
    prefixes   the conversation is rendered up to the turn, with the generation prompt, and up to its end: a template
               that loops over numbers, or writes the last turn apart, needs two renders a turn. A turn that is written
               differently once another follows is told by marks around its content, if it has no tool calls. Each row
               is looked at afterwards (data_tools/chats/chat.py), not one in so many

A span is what the model itself has to write, so nothing that follows the stop token (ChatML's line feed) is in it.
What begins and ends a turn is probed with small conversations when the template is loaded:

    header     what the generation prompt already gives (`<|im_start|>assistant\\n`), after a question and after a tool;
               thinking tags stay part of the turn, whoever writes them: whether a model reasons is in the loss
    stop       what follows an answer's own text, amid a conversation, at its end, and after a tool call
    closing    where the template ends a turn with the next message only (GLM, Jamba), the first tag of that message is
               the stop token, and one is added after a last turn
"""

import os
import re
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

from data_tools.chats.conversation import Conversation
from data_tools.chats.spans import Rendered, Span, Stop, Unclear, block_spans, common, loop_pieces
from data_tools.chats.template import ANSWER, ASK, CALL, RESULT, ChatTemplate, TemplateError
from data_tools.mistake import UserMistake

_TAG = re.compile(r"<[^<>\s]+>")  # as special tokens are written
_TAGS = re.compile(r"(?:\s|<[^<>]*>|\[[^\[\]]*\])*")
_THINKING = re.compile(r"[<\[][^<>\[\]]*think[^<>\[\]]*[>\]]", re.IGNORECASE)
_MARK = "xQ7mArK7Qx"  # as JSON and HTML write it too
_SYSTEM = {"role": "system", "content": "Go on."}


class Turns:
    """Represents the assistant's turns under a template. Raise UserMistake where they cannot be told.

    `header`: text at the start of a turn that is not trained; None finds it.
    """

    def __init__(self, template: ChatTemplate, header: str | None = None):
        self.template = template
        self._header = header
        if template.has_blocks:
            self._learn(self._by_blocks)
        elif not template.has_loop:
            self._learn(self._by_prefixes)
        else:
            self._learn_by_loop_or_prefixes()

    def render(self, conversation: Conversation, wanted: AbstractSet[int] | None = None) -> Rendered:
        """Return the text and the spans of the assistant's turns, in order.

        Of messages that are not `wanted` (None: all are) a span may be empty. Raise TemplateError when the template
        refuses the conversation, or a wanted turn cannot be told.
        """
        wanted = frozenset(range(len(conversation.messages))) if wanted is None else wanted
        try:
            return self._render(self._cut, conversation, wanted)
        except Unclear:
            if self._cut != self._by_loop:
                raise
        return self._render(self._by_prefixes, conversation, wanted)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*(stop.text for stop in self.stops), *self.closings.values()]))

    # -- a conversation ------------------------------------------------------------------------------------------

    def _render(self, cut: "Cut", conversation: Conversation, wanted: AbstractSet[int]) -> Rendered:
        text, pieces = cut(conversation, wanted)
        by_prefixes = cut == self._by_prefixes
        if self.template.has_blocks:
            return Rendered(text, self._blocks_through_stop(text, pieces, conversation, wanted))
        spans = []
        for piece in pieces:
            try:
                piece = self._without_header(text, piece, conversation)
            except Unclear:
                if piece.message in wanted:
                    raise
            if piece.message in wanted:
                text, piece = self._through_stop(text, piece, conversation)
            spans.append(piece._replace(stop=max(piece.start, piece.stop)))
        return Rendered(text, spans, by_prefixes)

    def _without_header(self, text: str, piece: Span, conversation: Conversation) -> Span:
        """Raise Unclear where the turn does not begin as a generation prompt ends."""
        for header in self._headers_of(conversation, piece.message):
            if text.startswith(header, piece.start):
                return piece._replace(start=piece.start + len(header))
        if self._header:
            raise Unclear(f"message {piece.message + 1} does not begin with chat.header {self._header!r}")
        raise Unclear(f"message {piece.message + 1} does not begin as its generation prompt does")

    def _headers_of(self, conversation: Conversation, message: int) -> list[str]:
        """Return the headers that a message may have, by what is before it, the likelier first."""
        after_tool = message > 0 and conversation.messages[message - 1]["role"] == "tool"
        likely = [self.headers["tool"], self.headers["user"]] if after_tool else [self.headers["user"]]
        bos = self.template.token("bos_token")
        return [start + header for header in dict.fromkeys(likely) for start in dict.fromkeys(["", bos])]

    def _through_stop(self, text: str, piece: Span, conversation: Conversation) -> tuple[str, Span]:
        """Return the text and the piece cut behind its stop token; the text gets one where the template writes none
        after a last turn. Raise Unclear where nothing ends the turn."""
        is_call = bool(conversation.messages[piece.message].get("tool_calls"))
        is_last = piece.stop == len(text)
        for tag in self.closings.values():
            if text.startswith(tag, piece.stop):
                return text, piece._replace(stop=piece.stop + len(tag))
        end = piece.start + len(text[piece.start : piece.stop].rstrip())
        missing = self.closings.get("tool" if is_call else "user", "") if self.closings else self._missing
        if is_last and missing and not (is_call and not self.closings and self._stop_before(text, piece.start, end)):
            return text + missing, piece._replace(stop=len(text + missing))
        stop = self._stop_before(text, piece.start, end)
        if stop is None:
            raise Unclear(f"nothing that ends a turn is behind message {piece.message + 1}")
        return text, piece._replace(stop=end - len(stop.rest))

    def _blocks_through_stop(
        self, text: str, blocks: list[Span], conversation: Conversation, wanted: AbstractSet[int]
    ) -> list[Span]:
        """Return the blocks without a header, where they have one, and without what is behind the stop token of their
        turn. Raise Unclear where a wanted turn has none."""
        kept: list[Span] = []
        for number in dict.fromkeys(block.message for block in blocks):
            turn = [block for block in blocks if block.message == number]
            turn = self._without_block_header(text, turn, conversation)
            written = "".join(text[start:stop] for _, start, stop in turn)
            stop = self._stop_before(written, 0, len(written.rstrip()))
            if stop is None and number in wanted and written:
                raise Unclear(f"nothing that ends a turn is in the generation blocks of message {number + 1}")
            length = len(written.rstrip()) - len(stop.rest) if stop else len(written)
            for block in turn:
                kept.append(block._replace(stop=min(block.stop, block.start + length)))
                length -= kept[-1].stop - kept[-1].start
        return [block for block in kept if block.start < block.stop]

    def _without_block_header(self, text: str, turn: list[Span], conversation: Conversation) -> list[Span]:
        first, *more = turn
        for header in self._headers_of(conversation, first.message):
            if text.startswith(header, first.start):
                return [first._replace(start=first.start + len(header)), *more]
        return turn

    def _stop_before(self, text: str, start: int, end: int) -> Stop | None:
        return next((stop for stop in self.stops if text.endswith(stop.text + stop.rest, start, end)), None)

    # -- where messages begin and end ----------------------------------------------------------------------------

    def _by_blocks(self, conversation: Conversation, wanted: AbstractSet[int]) -> tuple[str, list[Span]]:
        text, marks = self.template.marked(conversation)
        roles = [message["role"] for message in conversation.messages]
        return text, block_spans(marks, list(loop_pieces(marks, len(text), roles)), roles)

    def _by_loop(self, conversation: Conversation, wanted: AbstractSet[int]) -> tuple[str, list[Span]]:
        text, marks = self.template.marked(conversation)
        roles = [message["role"] for message in conversation.messages]
        return text, [piece for piece in loop_pieces(marks, len(text), roles) if roles[piece.message] == "assistant"]

    def _by_prefixes(self, conversation: Conversation, wanted: AbstractSet[int]) -> tuple[str, list[Span]]:
        """Return the pieces of wanted turns; of any other the place where it begins, where that can be told."""
        text = self.template.text(conversation)
        pieces = []
        for number, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            try:
                start = self._start_by_prefix(text, conversation, number)
                stop = self._stop_by_prefix(text, conversation, number) if number in wanted else start
                piece: Span | None = Span(number, start, stop)
            except TemplateError:
                piece = self._by_content(text, conversation, number)
                if piece is None and number in wanted:
                    raise
            if piece is not None:
                pieces.append(piece)
        return text, pieces

    def _start_by_prefix(self, text: str, conversation: Conversation, number: int) -> int:
        """Return where the header of a turn begins."""
        prompt = self.template.prompt(replace(conversation, messages=conversation.messages[:number]))
        for header in self._headers_of(conversation, number):
            start = prompt.rfind(header)
            end = start + len(header)
            if start >= 0 and text.startswith(prompt[:end]) and self._is_aside(prompt[end:]):
                return start
        raise Unclear(f"message {number + 1} is not written behind its generation prompt")

    def _stop_by_prefix(self, text: str, conversation: Conversation, number: int) -> int:
        if number == len(conversation.messages) - 1:  # some write the next header behind every conversation
            following = next((header for header in self.headers.values() if header and text.endswith(header)), "")
            return len(text) - len(following)
        alone = self.template.text(replace(conversation, messages=conversation.messages[: number + 1]))
        place = common(alone, text)
        rest, after = alone[place:].strip(), place + len(text[place:]) - len(text[place:].lstrip())
        for stop in self.stops:  # behind other spaces
            if rest.startswith(stop.text) and text.startswith(stop.text, after):
                return after + len(stop.text)
        if rest in ("", self.template.token("eos_token")):
            return place
        raise Unclear(f"message {number + 1} is written in another way once a message follows; set chat.turns: each")

    def _by_content(self, text: str, conversation: Conversation, number: int) -> Span | None:
        """Return a turn by where its content stands, which marks in it show; None where that does not tell it, or its
        generation prompt does not give its header.

        Between header and content may be what generation prompts have there, between content and stop token spaces.
        """
        message = conversation.messages[number]
        thought, tag, said = message["content"].rpartition("</think>")
        content = said.strip()
        if message.get("tool_calls") or not content:
            return None
        before, after = said.split(content)[0], said.rpartition(content)[2]
        marked = {**message, "content": f"{thought}{tag}{before}{_MARK}{content}{_MARK}{after}"}
        messages = [*conversation.messages[:number], marked, *conversation.messages[number + 1 :]]
        try:
            opening, *rest = self.template.text(replace(conversation, messages=messages)).split(_MARK)
            prompt = self.template.prompt(replace(conversation, messages=conversation.messages[:number]))
        except TemplateError:
            return None
        if len(rest) != 2 or "".join([opening, *rest]) != text:
            return None
        following = rest[1].lstrip()
        stop = next((stop.text for stop in self.stops if following.startswith(stop.text)), None)
        for header in self._headers_of(conversation, number) if stop else ():
            start, asked = (text.rfind(header) if header else -1 for text in (opening, prompt))
            asides = opening[start + len(header) :], prompt[asked + len(header) :]
            if start >= 0 and asked >= 0 and all(map(self._is_aside, asides)):
                return Span(number, start, len(text) - len(following) + len(stop or ""))
        return None

    # -- probes --------------------------------------------------------------------------------------------------

    def _learn_by_loop_or_prefixes(self) -> None:
        try:
            self._learn(self._by_loop)
            return
        except UserMistake as mistake:
            by_loop = mistake
        try:
            self._learn(self._by_prefixes)
        except UserMistake:
            raise by_loop from None

    def _learn(self, cut: "Cut") -> None:
        """Find headers, stops and closings by probes. Raise UserMistake where there are none."""
        self._cut = cut
        self.headers = {"user": self._header or "", "tool": self._header or ""}
        self.stops: list[Stop] = []
        self.closings: dict[str, str] = {}
        self._asides: set[str] = set()  # what generation prompts have behind the header
        self._missing = ""  # what a last turn lacks and any other has
        if self._header is None:
            self.headers = self._find_headers()
        self._find_stops()

    def _find_headers(self) -> dict[str, str]:
        """Return what the generation prompt already holds of a turn after a question, and after a tool's result."""
        headers = {}
        for role, context in (("user", [ASK]), ("tool", [ASK, CALL, RESULT])):
            try:
                header = self._find_header(context)
            except TemplateError as error:
                if role == "user":
                    raise UserMistake(
                        f"chat template: it refuses a question and an answer ({error}); where it needs "
                        "more, such as a bos_token, give it in chat.arguments"
                    ) from None
                continue  # it knows no tools
            if header is not None:
                headers[role] = header
            elif self.template.has_blocks:
                headers[role] = ""  # its blocks tell
        if "user" not in headers:
            raise UserMistake(
                "chat template: its generation prompt does not begin an assistant's turn, so the header "
                'cannot be told from the answer; name the header in chat.header ("" for none)'
            )
        return {"tool": headers["user"], **headers}

    def _find_header(self, context: list[dict[str, Any]]) -> str | None:
        """Return the header of an answer; None where the generation prompt gives none of what is before its text."""
        prompt = self.template.prompt(self.template.probe(*context))
        conversation = self.template.probe(*context, ANSWER)
        if self._cut != self._by_prefixes:
            text, pieces = self._cut(conversation, frozenset())
            start = next((piece.start for piece in pieces if piece.message == len(context)), None)
        else:
            text, start = (
                self.template.text(conversation),
                common(self.template.text(self.template.probe(*context)), prompt),
            )
        if start is None or not prompt.startswith(text[:start]):
            return None
        header = _THINKING.split(prompt[start : common(prompt, text)], maxsplit=1)[0]
        is_bare = prompt == text[:start] and text[start:].lstrip().startswith(ANSWER["content"])
        aside = prompt[start + len(header) :]
        if text.startswith(ANSWER["content"], start + len(header)):
            self._asides.add(aside)
        return header if is_bare or header and self._is_aside(aside) else None

    def _is_aside(self, text: str) -> bool:
        """Return whether this, behind a header that the turn has too, is what a generation prompt says of thinking."""
        return text in self._asides or _TAGS.fullmatch(text) is not None

    def _find_stops(self) -> None:
        try:
            last = self._tail([ASK, ANSWER])
            amid = self._amid(last)
        except TemplateError as error:
            raise UserMistake(f"chat template: it refuses a question, an answer and a question ({error})") from None
        if not amid.strip() and not self.template.has_blocks:
            self.closings = self._find_closings()
        elif not amid.strip() or (not last.strip() and self.template.has_blocks):
            raise UserMistake(
                "chat template: nothing ends an assistant's turn within what is trained, so the model "
                "would never learn to stop; give a template that does"
            )
        else:
            stop = self._stop_of(amid)
            self._missing = "" if last.strip() else amid[: len(amid.rstrip()) - len(stop.rest)]
            self.stops = list(dict.fromkeys([stop, *([self._stop_of(last, stop.text)] if last.strip() else [])]))
        self._add_call_stop()

    def _stop_of(self, tail: str, known: str = "") -> Stop:
        """Return what ends a turn, of what is written behind it: up to the end token where it is there, and no further
        than a stop that is known."""
        tail = tail.strip()
        eos = self.template.token("eos_token")
        for stop in filter(None, (known, eos)):
            before, found, rest = tail.partition(stop)
            if found and (stop == eos or not before):
                return Stop(before + stop, rest)
        return Stop(tail, "")

    def _amid(self, last: str) -> str:
        """Return the tail of an answer before a question; that of a last one where it cannot be told by prefixes."""
        try:
            return self._tail([ASK, ANSWER, ASK])
        except TemplateError:
            if self._cut != self._by_prefixes or not last.strip():
                raise
            return last

    def _tail(self, messages: list[dict[str, Any]]) -> str:
        """Return what the template writes in the turn behind the text of the answer, which is message 2."""
        text, pieces = self._cut(self.template.probe(*messages), {1})
        turn = "".join(text[piece.start : piece.stop] for piece in pieces if piece.message == 1)
        if ANSWER["content"] not in turn:
            raise TemplateError("it does not write an assistant's answer")
        return turn.rpartition(ANSWER["content"])[2]

    def _add_call_stop(self) -> None:
        """Learn the end that tool calls have in common, where it is one that answers do not have."""
        turns = []
        for arguments in ({"a": 1}, {"b": "x"}):
            function = {"name": "add", "arguments": arguments}
            call = {**CALL, "tool_calls": [{**CALL["tool_calls"][0], "function": function}]}
            try:
                text, pieces = self._cut(self.template.probe(ASK, call, RESULT), {1})
            except TemplateError:
                return
            turn = "".join(text[piece.start : piece.stop] for piece in pieces if piece.message == 1)
            if RESULT["content"] in turn:
                raise UserMistake(
                    "chat template: it writes a tool's result into the assistant's turn, so the model "
                    "would learn to make results up; give a template with {% generation %} blocks"
                )
            turns.append(turn.rstrip())
        is_told = "tool" in self.closings or self._stop_before(turns[0], 0, len(turns[0]))
        if is_told or not all(turns) or turns[0] == turns[1]:  # or it writes no calls
            return
        tags = _TAG.findall(os.path.commonprefix([turn[::-1] for turn in turns])[::-1])
        if tags and turns[0].endswith(tags[-1]):
            self.stops.append(Stop(tags[-1], ""))

    def _find_closings(self) -> dict[str, str]:
        """Return {role: its first tag} of messages that follow a turn, for a template that closes none itself."""
        tags = {}
        for before, message in ((ANSWER, ASK), (CALL, RESULT), (ANSWER, _SYSTEM)):
            try:
                text, pieces = self._cut(self.template.probe(ASK, before, message), {1})
            except TemplateError:
                continue
            stop = next((piece.stop for piece in pieces if piece.message == 1), len(text))
            following, is_written, _ = text[stop:].partition(message["content"])
            tag = _TAG.match(following) if is_written else None
            tags[message["role"]] = tag.group() if tag else ""
        if not tags.get("user"):
            raise UserMistake(
                "chat template: nothing ends an assistant's turn, not even a tag that begins the next "
                "message, so the model would never learn to stop; give a template that does"
            )
        return {role: tag for role, tag in {"tool": tags["user"], **tags}.items() if tag}


Cut = Callable[[Conversation, AbstractSet[int]], tuple[str, list[Span]]]
