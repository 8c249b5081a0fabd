"""What an OpenAI-compatible server answers → the text of a completion, or why there is none. Pure, no network.

Each key of an answer's message is carried or refused by name, by the reader of our own chats (data_tools/chats): the
reasoning under `reasoning_content` or `reasoning` goes before the text, between <think> tags, as chats without a
template for it have it. What stands around the message (usage, ids, fingerprints) is read where it says something here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

from data_tools.chats.conversation import read_prompt
from data_tools.chats.messages import BadRecord, read_message
from megatron_ext.rollout.endpoint import CHAT, WITH_STOP, Endpoint

STOP, LENGTH, ABORT = "stop", "length", "abort"  # how a completion ends, in the engine's words
FILTERED = "content_filter"
_MOST_TOKENS = 2**24  # of an answer or a prompt, whatever a server counts
_CALLS = ("tool_calls", "function_call")


class BadAnswer(Exception):
    """Raised for an answer that says nothing of the kind, and that may be another one the next time."""


class Refused(Exception):
    """Raised for an answer that is understood and cannot be a completion, whenever it is asked again."""


@dataclass(frozen=True)
class Answer:
    """One completion. `tokens` and `prompt_tokens` are the server's counts, hidden reasoning among them; `logprobs` of
    its tokens, None where the server gave none. `note`: why it cannot be scored. `model`, `fingerprint`: what the
    server says that it ran."""

    text: str
    finish: str
    tokens: int
    prompt_tokens: int = 0
    logprobs: list[float] | None = None
    note: str = ""
    model: str = ""
    fingerprint: str = ""

    def plain(self) -> dict[str, Any]:
        """Return what differs from an empty answer, for a journal."""
        return {name: value for name, value in asdict(self).items() if name in ("text", "finish", "tokens") or value}


def read(body: Any, endpoint: Endpoint, stop_strings: Sequence[str]) -> Answer:
    """Return the completion of a response. Raise BadAnswer or Refused, with the reason."""
    if not isinstance(body, dict):
        raise BadAnswer(f"the answer is {type(body).__name__}, not an object")
    if body.get("error"):  # of servers that answer 200 all the same
        raise BadAnswer(f"the answer is an error: {str(body['error'])[:200]}")
    choices = body.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        count = len(choices) if isinstance(choices, list) else "no"
        raise BadAnswer(f"the answer has {count} choices, and one was asked for")
    choice = choices[0]
    ended, note = _finish(choice.get("finish_reason"))
    text = _message(choice.get("message"), ended, endpoint.ignored) if endpoint.api == CHAT else choice.get("text")
    if not isinstance(text, str):
        raise BadAnswer("the answer has no text")
    if WITH_STOP not in endpoint.takes:
        text, ended = _cut(text, ended, stop_strings)
    used = body.get("usage") or {}
    return Answer(
        text=_whole(text),
        finish=ended,
        tokens=_count(used, "completion_tokens"),
        prompt_tokens=_count(used, "prompt_tokens"),
        logprobs=_logprobs(choice.get("logprobs"), endpoint.api) if endpoint.logprobs else None,
        note=note,
        model=_whole(str(body.get("model") or "")),
        fingerprint=_whole(str(body.get("system_fingerprint") or "")),
    )


def _whole(text: str) -> str:
    """Return a text with U+FFFD in place of each half of a character, which JSON can spell and no file hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _finish(reason: Any) -> tuple[str, str]:
    """Return how a completion ended, and a note where it cannot be scored."""
    if reason in (STOP, LENGTH):
        return reason, ""
    if reason == FILTERED:
        return ABORT, f"finish_reason {FILTERED}: the server withheld the rest"
    if reason in _CALLS:
        raise Refused(f"finish_reason {reason}: the model called a tool, and none was offered")
    if reason in (None, "", "error"):
        raise BadAnswer(f"the answer has finish_reason {reason!r}: it is not whole")
    raise Refused(f"finish_reason {reason!r} is not understood; known: {STOP}, {LENGTH}, {FILTERED}")


def _message(message: Any, ended: str, ignored: Sequence[str]) -> str:
    """Return what a message says, its reasoning before the text."""
    if not isinstance(message, dict):
        raise BadAnswer("the answer has no message")
    said = {name: value for name, value in message.items() if name not in ignored and value not in (None, [], {})}
    said.setdefault("role", "assistant")  # whose else
    refusal = said.pop("refusal", None)
    if refusal and not said.get("content"):  # what the model says in place of an answer
        said["content"] = refusal
    if not said.get("content"):
        said["content"] = ""  # all was reasoning, or nothing was said
    for name in _CALLS:
        if name in said:
            raise Refused(f"its message has {name}: the model called a tool, and none was offered")
    try:
        turn = read_message("its message", said).message
    except BadRecord as error:
        remedy = "; endpoint.ignored leaves a key out" if error.bucket == "refused_key" else ""
        raise Refused(f"{str(error).partition('; take it out')[0]}{remedy}") from None
    if turn["role"] != "assistant":
        raise Refused(f"its message is of role {turn['role']}")
    reasoning, text = turn.get("reasoning_content", ""), turn["content"]
    if not reasoning:
        return text
    if ended != STOP and not text:  # cut off while it reasoned
        return f"<think>\n{reasoning.strip()}"
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{text}"


def _cut(text: str, ended: str, stop_strings: Sequence[str]) -> tuple[str, str]:
    """Return a text up to where the first of these strings is complete, as our engine ends it, and how it ended."""
    ends = [text.index(string) + len(string) for string in stop_strings if string in text]
    return (text[: min(ends)], STOP) if ends else (text, ended)


def _count(used: Any, name: str) -> int:
    count = used.get(name) if isinstance(used, Mapping) else None
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise BadAnswer(f"the answer does not say its usage.{name}")
    if count > _MOST_TOKENS:
        raise BadAnswer(f"the answer says {count:,} as its usage.{name}, and {_MOST_TOKENS:,} are the most that can be")
    return count


def _logprobs(told: Any, api: str) -> list[float] | None:
    """Return the log-probs of a choice's tokens, None where the server gave none, or not all."""
    given = told.get("content" if api == CHAT else "token_logprobs") if isinstance(told, dict) else None
    if not isinstance(given, list):
        return None
    values = [each.get("logprob") if isinstance(each, dict) else None for each in given] if api == CHAT else given
    numbers = [float(value) for value in values if _is_number(value)]
    return numbers if numbers and len(numbers) == len(values) else None


def _is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value of JSON is a finite number that a float can hold."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def messages_of(prompt: "str | list[dict[str, Any]]") -> list[dict[str, Any]]:
    """Return a prompt as the messages of a request: a text is one of the user's. Raise Refused for more than texts."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    try:
        conversation = read_prompt(prompt)  # as our engine's chat template is given it
    except BadRecord as error:
        raise Refused(str(error)) from None
    for number, message in enumerate(conversation.messages, 1):
        if more := sorted(message.keys() - {"role", "content", "name"}):
            raise Refused(f"message {number} has {', '.join(more)}, which no server is sent: ask in texts alone")
    if conversation.tools:
        raise Refused("it offers tools, which no server is sent: ask in texts alone")
    return list(conversation.messages)
