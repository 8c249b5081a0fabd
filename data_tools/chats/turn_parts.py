"""Where reasoning and tool calls lie within a turn, by what the message holds and not by what a text speaks of.

Reasoning is what a turn begins with, between tags: the message's own, word for word, or else up to the tag that closes
the first. An answer that speaks of `<think>` further on keeps its loss. Tool calls are what lies between tags outside
the message's content and reasoning.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from data_tools.chats.conversation import BadRecord
from data_tools.chats.template import ANSWER, ASK, CALL, THOUGHT, ChatTemplate, TemplateError

# How templates write reasoning and tool calls within a turn: the opening and the closing text.
_THINKING = (
    ("<think>", "</think>"), ("<|channel|>analysis<|message|>", "<|end|>"), ("<|channel>thought\n", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"),
    ("<|begin|>assistant<|think|>", "<|end|>"), ("<|think|>", "<|end|>"), ("<think:opensource>", "</think:opensource>"),
)  # fmt: skip
_TOOL_CALLS = (
    ("<tool_call>", "</tool_call>"), ("<|tool_call_start|>", "<|tool_call_end|>"), (" to=functions.", "<|call|>"),
    ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"), ("<｜tool▁call▁begin｜>", "<｜tool▁calls▁end｜>"),
)  # fmt: skip


Tags = tuple[tuple[str, str], ...]


class Part(NamedTuple):
    """Stands for text[start:stop]."""

    start: int
    stop: int


def thinking_tags(template: ChatTemplate) -> Tags:
    """Return the tags that reasoning may be between: those that the template writes, and <think> in a content."""
    tags = [_THINKING[0]]
    for message in (ANSWER, CALL):
        try:
            text = template.text(template.probe(ASK, {**message, **THOUGHT}))
        except TemplateError:
            continue
        before, _, after = text.partition(THOUGHT["thinking"])
        tags += [
            pair
            for pair in _THINKING
            if before.rstrip().endswith(pair[0].rstrip()) and after.lstrip().startswith(pair[1])
        ]
    return tuple(dict.fromkeys(tags))


def thinking_of(text: str, turn: Part, reasoning: str, tags: Tags) -> Part | None:
    """Return where the reasoning of a turn lies, its tags included; None where there is none.

    `reasoning` is the message's own, where the template wrote it. Raise BadRecord where it cannot be told.
    """
    start = turn.start + len(text[turn.start : turn.stop]) - len(text[turn.start : turn.stop].lstrip())
    opening, closing = next((pair for pair in tags if text.startswith(pair[0], start)), ("", ""))
    if reasoning.strip():
        return _known_thinking(text, turn, reasoning.strip(), start=start, opening=opening, closing=closing)
    if not opening:
        return None
    depth = 0
    for tag in re.finditer(f"{re.escape(opening)}|{re.escape(closing)}", text[start : turn.stop]):
        depth += 1 if tag.group() == opening else -1
        if depth == 0:
            return Part(start, start + tag.end())
    raise BadRecord(f"its {opening} is never closed", "unknown_thinking")


def _known_thinking(text: str, turn: Part, reasoning: str, start: int, opening: str, closing: str) -> Part:
    inner = start + len(opening)
    if not opening:  # its generation prompt ends with it
        before = text[: turn.start].rstrip()
        _, closing = next((pair for pair in _THINKING if before.endswith(pair[0].rstrip())), ("", ""))
    place = text.find(reasoning, inner, turn.stop)
    after = text[place + len(reasoning) : turn.stop]
    if not closing or place < 0 or text[inner:place].strip() or not after.lstrip().startswith(closing):
        raise BadRecord("its reasoning is between no known tags", "unknown_thinking")
    return Part(start, place + len(reasoning) + len(after) - len(after.lstrip()) + len(closing))


def calls_of(text: str, turn: Part, thinking: Part | None, message: Mapping[str, Any]) -> Part | None:
    """Return where the tool calls of a turn lie, from the first tag to the last; None where the message has none.

    Raise BadRecord where they cannot be told from what the message says.
    """
    if not message.get("tool_calls"):
        return None
    start = thinking.stop if thinking else turn.start
    said = _said(text, Part(start, turn.stop), message["content"].strip())
    tagged = []
    for opening, closing in _TOOL_CALLS:
        begins = _outside(text, opening, Part(start, turn.stop), said)
        ends = _outside(text, closing, Part(start, turn.stop), said)
        if begins and ends and ends[-1] > begins[0]:
            tagged.append(Part(begins[0], ends[-1] + len(closing)))
    if not tagged:
        raise BadRecord("its tool calls are between no known tags", "unknown_tool_call")
    calls = Part(min(part.start for part in tagged), max(part.stop for part in tagged))
    if said and calls.start < said.stop and said.start < calls.stop:
        raise BadRecord("what it says lies among its tool calls", "unknown_tool_call")
    return calls


def _said(text: str, turn: Part, content: str) -> Part | None:
    """Return where the content lies; None where it holds no tag, which then does not matter."""
    tags = [tag for pair in _TOOL_CALLS for tag in pair if tag in content]
    if not tags:
        return None
    if text.count(content, turn.start, turn.stop) != 1:
        raise BadRecord(f"it speaks of {tags[0]} where its tool calls cannot be told from it", "unknown_tool_call")
    place = text.index(content, turn.start, turn.stop)
    return Part(place, place + len(content))


def _outside(text: str, tag: str, turn: Part, said: Part | None) -> list[int]:
    """Return the places of a tag in the turn, but for those in what is said."""
    places = [turn.start + match.start() for match in re.finditer(re.escape(tag), text[turn.start : turn.stop])]
    return [place for place in places if not (said and said.start <= place < said.stop)]


def written_thinking(text: str, turn: Part) -> list[Part]:
    """Return what lies between thinking tags anywhere in a turn that was rendered by others; an open one to its end."""
    return _between(text, turn, _THINKING[:2])


def written_calls(text: str, turn: Part) -> list[Part]:
    """Return what lies between the tags of tool calls in a turn that was rendered by others."""
    return _between(text, turn, _TOOL_CALLS)


def _between(text: str, turn: Part, pairs: Tags) -> list[Part]:
    parts = []
    for opening, closing in pairs:
        depth, start = 0, turn.start
        for tag in re.finditer(f"{re.escape(opening)}|{re.escape(closing)}", text[turn.start : turn.stop]):
            if tag.group() == opening:
                start = start if depth else turn.start + tag.start()
                depth += 1
            elif depth:
                depth -= 1
                if not depth:
                    parts.append(Part(start, turn.start + tag.end()))
        if depth:
            parts.append(Part(start, turn.stop))
    return sorted(parts)


def without(spans: "list[Any]", parts: list[Part]) -> "list[Any]":
    """Return the spans without these parts; each is a named tuple with start and stop."""
    for part in parts:
        spans = [
            piece
            for span in spans
            for piece in (
                span._replace(stop=min(span.stop, part.start)),
                span._replace(start=max(span.start, part.stop)),
            )
            if piece.start < piece.stop
        ]
    return spans
