"""Conversation → token ids and loss mask.

A conversation is rendered once (data_tools/chats/template.py) and tokenised once (data_tools/chats/encoder.py); the
mask is 1 on what its assistants wrote (data_tools/chats/turns.py), through their stop tokens, as far as the options
train it. A row of which the template leaves something out (data_tools/chats/fields.py) is refused. A task's row is
`prompt` + `answer` + the end token, with mask 0 on the prompt; the two are tokenised apart, so that the model sees at
inference the very prompt ids it was trained on.
"""

import datetime
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from data_tools.base.declared import setting
from data_tools.base.inside import expanded
from data_tools.chats.conversation import SCHEMAS, BadRecord, Conversation, RenderedChunk, own_variables, read_record
from data_tools.chats.encoder import Encoder
from data_tools.chats.fields import LOSABLE, Fields, inline_reasoning
from data_tools.chats.spans import Rendered, Span, Unclear
from data_tools.chats.template import ChatTemplate, TemplateError
from data_tools.chats.tokenizer import Tokenizer, read_template
from data_tools.chats.turn_parts import (
    Part,
    calls_of,
    thinking_of,
    thinking_tags,
    without,
    written_calls,
    written_thinking,
)
from data_tools.chats.turns import Turns
from data_tools.mistake import Problem, UserMistake

TURNS = ("all", "last", "each")

_VERIFY_EVERY = 128  # rows, of which one is decoded and looked at
_QUOTE = 40  # characters that an assistant does not repeat by chance


@dataclass
class ChatConfig:
    """How conversations become tokens."""

    schema: str = setting("auto", "schema of the records", choices=("auto", *SCHEMAS))
    template: str = setting(
        "", 'chat template, a Jinja file; "": the tokenizer\'s own', example="chat.jinja", input=True
    )
    arguments: dict[str, Any] = setting(
        dict,
        "variables of the template, such as enable_thinking or reasoning_effort",
        example={"enable_thinking": True},
        free=True,
    )
    date: str = setting("2026-01-01", "what templates are told today is, YYYY-MM-DD", example="2026-07-01", free=True)
    header: str | None = setting(
        None,
        "start of a turn that is not trained; null: found from the generation prompt",
        example="<|im_start|>",
        free=True,
    )
    turns: str = setting(
        "all", "which turns are trained: all, those after the last question, or each question's in a row of its own",
        choices=TURNS,
    )  # fmt: skip
    train_thinking: bool = setting(True, "the reasoning of trained turns is trained")
    train_tool_calls: bool = setting(True, "the tool calls of trained turns are trained")
    ignored: list[str] = setting(
        list, "keys of records and messages that are left out on purpose", example=["label"], free=True, keyed="if_set"
    )
    inline_reasoning: bool = setting(
        False, "reasoning that the template leaves out is put into the content, between <think> tags", keyed="if_set"
    )
    may_lose: list[str] = setting(
        list, "what the template may leave out of a row that is kept", choices=LOSABLE, keyed="if_set"
    )


def check_chat(config: ChatConfig) -> list[Problem]:
    """Refuse template arguments that are set for every row, and a date that is none."""
    problems = [
        Problem(f"arguments.{name}", "is no argument: it is set for every row; leave it out")
        for name in own_variables(config.arguments)
    ]
    try:
        datetime.date.fromisoformat(config.date)
    except ValueError:
        problems.append(Problem("date", f"{config.date!r} is no date; write it as 2026-01-31"))
    return problems


class Encoded(NamedTuple):
    """Represents a row of the store. `prompt` and `answer` are its text, before and from the first assistant's turn."""

    ids: np.ndarray  # int32[n]
    mask: np.ndarray  # uint8[n]
    prompt: str
    answer: str
    turns: int  # assistant turns in the loss


class Refused(NamedTuple):
    """Represents a row that is not kept: its bucket, its tokens if it got any, and the reason where the data is at
    fault."""

    bucket: str
    tokens: int = 0
    reason: str = ""


Result = Encoded | Refused


class ChatRows:
    """Represents the rows of records. Raise UserMistake when there is no template, or none whose turns can be told."""

    def __init__(self, config: ChatConfig, tokenizer: Tokenizer, encoder: Encoder):
        self.config = config
        # Makes of a conversation as it was read the one that is learned; may raise BadRecord.
        self.change: Callable[[Conversation], Conversation] = lambda conversation: conversation
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.turns = None if config.schema == "rendered" else _load_turns(config, tokenizer)
        self.fields = Fields(self.turns.template, config.may_lose) if self.turns else None
        self.tags = thinking_tags(self.turns.template) if self.turns else ()
        self._seen = 0

    def _template(self) -> tuple[Turns, Fields]:
        """Return what knows the chat template. Raise ValueError where there is none, since a template has written."""
        if self.turns is None or self.fields is None:
            raise ValueError("a conversation that is to be rendered, with schema rendered")
        return self.turns, self.fields

    def rows(self, record: Any) -> Iterator[Result]:
        """Raise BadRecord where the record is no conversation, and UserMistake where the verifier finds a fault."""
        for item in read_record(record, self.config.schema, self.config.ignored):
            item = self.change(item) if isinstance(item, Conversation) else item
            if self.config.turns == "each" and isinstance(item, Conversation):
                yield from map(self._result, item.turns())
            else:
                yield self._result(item)

    def _result(self, item: "Conversation | list[RenderedChunk]") -> Result:
        try:
            item, rendered = (item, _join(item)) if isinstance(item, list) else self._render(item)
            text, spans = rendered.text, rendered.spans
            turns = [span for span in spans if self._is_trained(span.message, item) and span.start < span.stop]
            trained = self._pieces(text, turns, item)
            if not trained:
                return Refused("nothing_trained")
            ids, mask = self.encoder.encode(text, [piece[1:] for piece in trained])
        except Unclear as error:
            return Refused("turn_unclear", reason=f"what its assistant wrote cannot be told: {error}")
        except TemplateError as error:
            return Refused("template_error", reason=f"the chat template refuses it: {error}")
        except BadRecord as error:
            return Refused(error.bucket, reason=str(error))
        unknown = None if self.encoder.is_byte_level else self.tokenizer.unk_id
        if unknown is not None and (ids == unknown).any():
            return Refused("unknown_character", len(ids))
        if fault := self._padding_fault(ids, mask):
            return Refused("padding_token", len(ids), reason=fault)
        if isinstance(item, Conversation) and (fault := self._mask_fault(rendered, trained, ids, mask, item=item)):
            return Refused("turn_unclear", len(ids), reason=fault)
        start, turns_trained = spans[0].start, len({span.message for span in trained})
        return Encoded(ids, mask, prompt=text[:start], answer=text[start:], turns=turns_trained)

    def _render(self, conversation: Conversation) -> tuple[Conversation, Rendered]:
        """Return the conversation as it was rendered, and that. Raise BadRecord where the template leaves something
        out."""
        turns, fields = self._template()
        wanted = {number for number in range(len(conversation.messages)) if self._is_trained(number, conversation)}
        rendered = turns.render(conversation, wanted)
        if self.config.inline_reasoning:
            lost = fields.lost(conversation, rendered)
            to_inline = [field.message for field in lost if field.path[-1] == "reasoning_content"]
            if to_inline:
                conversation = inline_reasoning(conversation, to_inline)
                rendered = turns.render(conversation, wanted)
        written = {number: "" for number in sorted(wanted) if conversation.messages[number]["role"] == "assistant"}
        for message, start, stop in rendered.spans:
            if message in written:
                written[message] += rendered.text[start:stop]
        for number, said in written.items():
            if not said:
                raise BadRecord(f"message {number + 1}: the chat template leaves out this turn", "turn_lost")
            names = [call["function"]["name"] for call in conversation.messages[number].get("tool_calls", ())]
            for name in set(names):
                if said.count(name) < names.count(name):
                    reason = f"message {number + 1}: the chat template leaves out a call of {name}"
                    raise BadRecord(reason, "tool_call_lost")
        fields.check(conversation, rendered)
        return conversation, rendered

    def _is_trained(self, message: int, item: "Conversation | list[RenderedChunk]") -> bool:
        if isinstance(item, list):
            return True
        if message in item.untrained:
            return False
        return self.config.turns == "all" or message in item.after_last_user()

    def _pieces(self, text: str, turns: list[Span], item: "Conversation | list[RenderedChunk]") -> list[Span]:
        """Return what of the turns is in the loss: all of it, or without reasoning, or without tool calls.

        Raise BadRecord where there is some that was not found, since its template writes it in another way.
        """
        if self.config.train_thinking and self.config.train_tool_calls:
            return turns
        pieces = []
        for number in dict.fromkeys(span.message for span in turns):
            spans = [span for span in turns if span.message == number]
            turn = Part(spans[0].start, spans[-1].stop)
            try:
                parts = (
                    self._rendered_parts(text, turn)
                    if isinstance(item, list)
                    else self._parts(text, turn, number, item)
                )
            except BadRecord as error:
                raise BadRecord(f"message {number + 1}: {error}", error.bucket) from None
            pieces += without(spans, parts)
        return pieces

    def _parts(self, text: str, turn: Part, number: int, conversation: Conversation) -> list[Part]:
        """Return the parts of a turn that are not in the loss."""
        message = conversation.messages[number]
        is_written = not self._template()[1].omits_reasoning(conversation, number)
        reasoning = message.get("reasoning_content", "") if is_written else ""
        thinking = thinking_of(text, turn, reasoning, self.tags)
        parts = [] if self.config.train_thinking else [thinking]
        if not self.config.train_tool_calls:
            parts.append(calls_of(text, turn, thinking, message))
        return [part for part in parts if part]

    def _rendered_parts(self, text: str, turn: Part) -> list[Part]:
        thinking = [] if self.config.train_thinking else written_thinking(text, turn)
        return thinking + ([] if self.config.train_tool_calls else written_calls(text, turn))

    def _padding_fault(self, ids: np.ndarray, mask: np.ndarray) -> str:
        """Return what is wrong where an answer holds the padding token's text; "" where that token ends turns."""
        pad = self.tokenizer.pad_id
        if pad is None or pad == self.tokenizer.eos_id or not (ids[mask == 1] == pad).any():
            return ""
        text = self.tokenizer.decode([pad])
        stops = self.turns.stop_texts if self.turns else ()
        return "" if text in stops else f"what is learned holds the padding token {text!r}"

    def _mask_fault(
        self, rendered: Rendered, trained: list[Span], ids: np.ndarray, mask: np.ndarray, *, item: Conversation
    ) -> str:
        """Return what is wrong with the mask of a row whose turns prefixes told, each of which is looked at; "" if
        nothing. Of other rows one in so many is, and raises UserMistake: their template's turns are told wrong."""
        self._seen += 1
        if not rendered.by_prefixes and self._seen % _VERIFY_EVERY != 1:
            return ""
        faults = self._faults(rendered.text, trained, ids=ids, mask=mask, item=item)
        said = f"the loss mask is wrong: {'; '.join(faults)}"
        if faults and not rendered.by_prefixes:
            remedy = "give a chat template with {% generation %} blocks, or name chat.header"
            raise UserMistake(f"{said}; {remedy}")
        return said if faults else ""

    def _faults(
        self, text: str, trained: list[Span], ids: np.ndarray, mask: np.ndarray, item: Conversation
    ) -> list[str]:
        """Return what of the loss does not read as the assistants' turns, each with its stop token."""
        edges = np.flatnonzero(np.diff(mask, prepend=0, append=0)).reshape(-1, 2)
        learnt = _letters("".join(self.tokenizer.decode(ids[start:stop].tolist()) for start, stop in edges))
        problems = [
            f"message {message + 1} is not in the loss as it was written"
            for message, start, stop in trained
            if _letters(text[start:stop]) not in learnt
        ]
        last = {piece.message: piece for piece in trained}
        if self.config.train_thinking and self.config.train_tool_calls:
            stop_texts = self._template()[0].stop_texts
            problems += [
                f"the stop token of message {number + 1} is not in the loss"
                for number, piece in last.items()
                if not text[piece.start : piece.stop].rstrip().endswith(stop_texts)
            ]
        said = _letters(
            "".join(
                f"{message['content']}{message.get('reasoning_content')}{message.get('tool_calls')}"
                for message in item.messages
                if message["role"] == "assistant"
            )
        )
        for number, message in enumerate(item.messages):
            heard = _letters(message["content"])
            if message["role"] != "assistant" and len(heard) > _QUOTE and heard in learnt and heard not in said:
                problems.append(f"message {number + 1}, of role {message['role']}, is in the loss")
        return problems


def _letters(text: str) -> str:
    """Return the text as far as every tokenizer keeps it: composed, without spaces, quotes and escapes."""
    return re.sub(r"[\s\\'\"]+", "", unicodedata.normalize("NFKC", text))


def _load_turns(config: ChatConfig, tokenizer: Tokenizer) -> Turns:
    source = read_template(expanded(config.template)) if config.template else tokenizer.chat_template
    if not source:
        raise UserMistake(f"tokenizer {tokenizer.name} has no chat template; name a file in chat.template")
    day = datetime.date.fromisoformat(config.date)
    return Turns(ChatTemplate(source, tokenizer.special_tokens, config.arguments, day), config.header)


def _join(chunks: list[RenderedChunk]) -> Rendered:
    """Return chunks that a template has written as one text; a chunk of the assistant is a turn."""
    text, spans = "", []
    for number, (role, piece) in enumerate(chunks):
        if role == "assistant" and piece:
            spans.append(Span(number, len(text), len(text) + len(piece)))
        text += piece
    return Rendered(text, spans)


def encode_row(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids int32[n], mask uint8[n]) of prompt + answer + end token; the prompt's mask is 0, the rest is 1.

    Raise UserMistake when the tokenizer has no end token.
    """
    tokenizer.check_end()
    prompt_ids, answer_ids = tokenizer.encode_opened(prompt), tokenizer.encode(answer)
    ids = np.array([*prompt_ids, *answer_ids, tokenizer.eos_id], dtype=np.int32)
    mask = np.ones(len(ids), dtype=np.uint8)
    mask[: len(prompt_ids)] = 0
    return ids, mask
