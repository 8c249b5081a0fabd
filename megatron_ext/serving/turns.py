"""What a chat template writes around each turn, found by rendering conversations, and the same as a template of Go.

Ollama's templates are of Go's text/template, and no program turns Jinja into it. Most chat templates, Harmony's among
them, write a turn as something before it, its content, and something after it. Whether a template is like that is
tried: what was found has to render other conversations to the letter, else there is no template for Ollama.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

Messages = Sequence[Mapping[str, str]]
Render = Callable[[Messages], str]  # up to where the model goes on
_SYSTEM, _FIRST, _ANSWER, _SECOND = "Sysxtext", "Onextext", "Answxtext", "Twoxtext"


@dataclass(frozen=True)
class Turns:
    """Represents what stands before and after the content of a turn."""

    start: str  # where there is no system message
    system: tuple[str, str] | None  # in the place of `start`; None where the template takes none
    user: tuple[str, str]
    assistant: tuple[str, str]
    goes_on: str  # after the last user's turn
    keeps_edges: bool = True  # False: the template takes spaces off the ends of a content
    keeps_thoughts: bool = True  # False: it takes what was thought out of earlier answers

    def text(self, messages: Messages) -> str:
        """Return a conversation as the template writes it."""
        said = [message["content"] for message in messages if message["role"] == "system"]
        text = self.system[0] + said[0] + self.system[1] if said and self.system else self.start
        around = {"user": self.user, "assistant": self.assistant}
        for message in messages:
            if before_after := around.get(message["role"]):
                text += before_after[0] + message["content"] + before_after[1]
        return text + self.goes_on

    def go_template(self, today: str = "") -> str:
        """Return the template of Go's, on one line. Where `today` stands in it, Ollama writes the day."""

        def words(text: str) -> str:
            parts = text.split(today) if today else [text]
            quoted = ["{{ " + _go_string(part) + " }}" if part else "" for part in parts]
            return "{{ currentDate }}".join(quoted)

        (before_user, after_user), (before_answer, after_answer) = self.user, self.assistant
        begin = words(self.start)
        if self.system:
            told = words(self.system[0]) + "{{ .System }}" + words(self.system[1])
            begin = "{{ if .System }}" + told + "{{ else }}" + begin + "{{ end }}"
        return (
            begin
            + '{{ range .Messages }}{{ if eq .Role "user" }}'
            + f"{words(before_user)}{{{{ .Content }}}}{words(after_user)}"
            + '{{ else if eq .Role "assistant" }}'
            + f"{words(before_answer)}{{{{ .Content }}}}{words(after_answer)}"
            + "{{ end }}{{ end }}"
            + words(self.goes_on)
        )


def _go_string(text: str) -> str:
    """Return a text as Go spells it, all of it printable: of a Modelfile Ollama drops what is not."""
    spelled = json.dumps(text, ensure_ascii=False)
    return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in spelled)


def find(render: Render) -> Turns | None:
    """Return what a template writes around turns; None where it writes more than that. `render` may raise ValueError
    for a conversation that the template refuses."""
    try:
        before, tail = render(_talk(_FIRST)).split(_FIRST)
        _, to_answer, from_answer, last = _cut(render(_talk(_FIRST, _ANSWER, _SECOND)), _FIRST, _ANSWER, _SECOND)
    except ValueError:
        return None
    around = _around_system(render)
    after_user = os.path.commonprefix([to_answer, tail])
    before_user = _common_end(before, from_answer, *(around[1:] if around else ()))
    found = Turns(
        start=before.removesuffix(before_user),
        system=(around[0], around[1].removesuffix(before_user)) if around else None,
        user=(before_user, after_user),
        assistant=(to_answer.removeprefix(after_user), from_answer.removesuffix(before_user)),
        goes_on=tail.removeprefix(after_user),
    )
    if last != tail or not all(_agree(render, found, talk) for talk in _talks("word", bool(found.system))):
        return None
    if not all(_agree(render, found, talk) for talk in _talks("two\nlines, {{ braces }} and é", bool(found.system))):
        return None
    edges = all(_agree(render, found, talk) for talk in _talks(" \n spaces around \n", bool(found.system)))
    thoughts = _agree(render, found, _talk(_FIRST, f"<think>\n{_SECOND}\n</think>\n\n{_ANSWER}", _SECOND))
    return replace(found, keeps_edges=edges, keeps_thoughts=thoughts)


def _talk(*contents: str) -> list[dict[str, str]]:
    """Return a conversation in which user and assistant take turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _talks(content: str, with_system: bool) -> list[list[dict[str, str]]]:
    """Return conversations of one to three questions, whose contents are told apart by a number."""
    talks = [_talk(*(f"{content}{i}{content}" for i in range(count))) for count in (1, 3, 5)]
    system = [{"role": "system", "content": content}]
    return talks + ([system + talk for talk in talks] if with_system else [])


def _cut(text: str, *marks: str) -> list[str]:
    """Return what stands around the marks, each of which occurs once. Raise ValueError otherwise."""
    parts = []
    for mark in marks:
        part, text = text.split(mark)
        parts.append(part)
    return [*parts, text]


def _common_end(*texts: str) -> str:
    return os.path.commonprefix([text[::-1] for text in texts])[::-1]


def _around_system(render: Render) -> tuple[str, str] | None:
    """Return what stands before a system message, and from it to the user's; None where the template refuses one, or
    leaves it out."""
    try:
        before, after, _ = _cut(render([{"role": "system", "content": _SYSTEM}, *_talk(_FIRST)]), _SYSTEM, _FIRST)
    except ValueError:
        return None
    return before, after


def _agree(render: Render, turns: Turns, messages: Messages) -> bool:
    try:
        return render(messages) == turns.text(messages)
    except ValueError:
        return False
