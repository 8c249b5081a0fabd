"""An OpenAI-compatible server that makes the samples of a phase, as its settings name it. No torch, no network.

What changes the samples is the name of the model (with `revision`, where the name says too little), what the requests
say, and how the answers are read. The address is not among it: a server comes up on another node and port each time it
is started, and what was paid for must not be asked again for that.
"""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from data_tools.base.declared import setting
from data_tools.mistake import Problem, nearest

CHAT, COMPLETIONS = "chat", "completions"
TOP_K, MIN_P, TEMPLATE, WITH_STOP = "top_k", "min_p", "chat_template_kwargs", "include_stop_str_in_output"
TAKES = (TOP_K, MIN_P, TEMPLATE, WITH_STOP)
TEMPERATURE, TOP_P, SEED = "temperature", "top_p", "seed"
LEFT_OUT = (TEMPERATURE, TOP_P, SEED)
LIMITS = ("max_tokens", "max_completion_tokens")
KEY_VARIABLE = "AFTEROK_ENDPOINT_KEY"  # where the worker puts a key that lies in a file, or that a command prints

_REFERENCE = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*|file:[/~].*|cmd:.*\S.*", re.DOTALL)
_SECRET = ("key", "apikey", "token", "secret", "password", "authorization", "bearer", "credential", "credentials")
_OURS = {  # names of a request that are settings, or that would change what an answer is
    TEMPERATURE: "sampling.temperature", TOP_P: "sampling.top_p",
    TOP_K: "sampling.top_k and endpoint.takes", MIN_P: "sampling.min_p and endpoint.takes",
    TEMPLATE: "chat_arguments and endpoint.takes", WITH_STOP: "endpoint.takes",
    "max_tokens": "sampling.max_tokens", "max_completion_tokens": "sampling.max_tokens and endpoint.limit_as",
    "stop": "sampling.stop_strings", SEED: "seed", "n": "samples", "best_of": "samples", "model": "endpoint.model",
    "messages": "mix", "prompt": "mix", "logprobs": "endpoint.logprobs", "top_logprobs": "endpoint.logprobs",
}  # fmt: skip
_REFUSED = {
    **dict.fromkeys(("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls"),
                    "an answer that calls a tool is no completion"),
    **dict.fromkeys(("stream", "stream_options"), "answers are read whole"),
    **dict.fromkeys(("echo", "suffix"), "a completion is what follows the prompt, and nothing else"),
}  # fmt: skip


@dataclass
class Endpoint:
    """The server that backend openai asks."""

    url: str = setting(
        "", "address of the server's API, which is not in the key of the phase",
        example="http://node7:8000/v1", free=True, keyed=False,
    )  # fmt: skip
    model: str = setting("", "what the server calls the model", example="Qwen/Qwen3-32B", free=True)
    revision: str = setting(
        "", "what else tells the model from others of this name; nobody is sent it", example="fp8", free=True
    )
    key: str = setting(
        "", 'where the API key lies, never the key: env:NAME, file:PATH or cmd:COMMAND; "": none is sent',
        example="env:OPENAI_API_KEY", free=True, keyed=False,
    )  # fmt: skip
    api: str = setting(
        CHAT, "chat: a text prompt is sent as one message of the user; completions: texts as they are, no messages",
        choices=(CHAT, COMPLETIONS),
    )  # fmt: skip
    takes: list[str] = setting(
        list, "what this server takes beyond the API: vLLM all four, llama.cpp all but include_stop_str_in_output",
        choices=TAKES, example=[TOP_K, MIN_P],
    )  # fmt: skip
    leave_out: list[str] = setting(list, "what this server does not take", choices=LEFT_OUT, example=[SEED])
    limit_as: str = setting(LIMITS[0], "what this server calls the limit on new tokens", choices=LIMITS)
    logprobs: bool = setting(False, "log-probs of the tokens are asked for, and written where the server gives them")
    ignored: list[str] = setting(
        list, "keys of an answer's message that are left out; others that are not understood are refused",
        example=["reasoning_details"], free=True,
    )  # fmt: skip
    extra: dict[str, Any] = setting(dict, "more that each request says", example={"reasoning_effort": "low"}, free=True)
    concurrency: int = setting(
        32, "requests of an element that are under way together", unit="requests", least=1, keyed=False
    )
    requests_per_minute: float = setting(
        0, "requests of an element, at most; 0: no limit", unit="requests a minute", least=0, keyed=False
    )
    tokens_per_minute: float = setting(
        0, "tokens of an element, prompts and answers, at most; 0: no limit", unit="tokens a minute", least=0,
        keyed=False,
    )  # fmt: skip
    timeout_s: float = setting(600.0, "time that an answer may take", unit="s", above=0, keyed=False)
    retries: int = setting(
        8, "times that a request is sent again, at most, where that can help", unit="times", least=0, keyed=False
    )


def meaning(endpoint: Endpoint) -> dict[str, Any]:
    """Return what changes the samples, without what has its default: a setting that is new leaves old keys alone."""
    plain = Endpoint()
    names = ("model", "revision", "api", "takes", "leave_out", "limit_as", "logprobs", "ignored", "extra")
    told = {name: getattr(endpoint, name) for name in names if getattr(endpoint, name) != getattr(plain, name)}
    return {name: sorted(value) if isinstance(value, list) else value for name, value in told.items()}


def key_variable(endpoint: Endpoint) -> str:
    """Return the environment variable that has the key; "" where none is sent."""
    kind, _, name = endpoint.key.partition(":")
    return (name if kind == "env" else KEY_VARIABLE) if endpoint.key else ""


def secrets(endpoint: Endpoint) -> dict[str, str]:
    """Return {variable: reference} of the key, as jobs/secrets.py reads them; nothing for what is no reference."""
    return {key_variable(endpoint): endpoint.key} if _REFERENCE.fullmatch(endpoint.key) else {}


def check(endpoint: Endpoint, where: str = "endpoint") -> list[Problem]:
    """Refuse an address, a key or an extra that cannot be meant. No message shows what may be a secret."""
    problems = _check_url(endpoint.url, f"{where}.url")
    if not endpoint.model:
        problems.append(Problem(f"{where}.model", "is missing: what the server calls the model"))
    if endpoint.key and not _REFERENCE.fullmatch(endpoint.key):
        message = "is no reference; write env:NAME, file:/PATH or cmd:COMMAND, never the key itself"
        problems.append(Problem(f"{where}.key", message))
    problems += _check_extra(endpoint.extra, f"{where}.extra")
    if endpoint.api == COMPLETIONS and TEMPLATE in endpoint.takes:
        problems.append(
            Problem(f"{where}.takes", f"{TEMPLATE}: a text has no template; leave it out, or use api: chat")
        )
    if endpoint.ignored and endpoint.api == COMPLETIONS:
        problems.append(Problem(f"{where}.ignored", "api completions answers no messages; leave it out"))
    return problems


def _check_url(url: str, where: str) -> list[Problem]:
    if not url:
        return [Problem(where, "is missing: the address of the server's API, such as http://node7:8000/v1")]
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  which is read from the text here
    except ValueError:
        return [Problem(where, "is no address; write http://HOST:PORT/v1")]
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        message = "holds a user, a password or a query, which may be secret; write the address alone, and endpoint.key"
        return [Problem(where, message)]
    is_plain = url.isprintable() and not re.search(r"\s", url)
    if parts.scheme not in ("http", "https") or not is_plain or not _is_host(parts.hostname or ""):
        return [Problem(where, f"{url!r} is no address; write http://HOST:PORT/v1")]
    return []


def _is_host(host: str) -> bool:
    """Return whether a host is of letters and digits of any script, and what stands between them: no signs."""
    return bool(host) and all(one.isalnum() or one in "-._:%" or unicodedata.category(one)[0] == "M" for one in host)


def _check_extra(extra: Mapping[str, Any], where: str) -> list[Problem]:
    problems = []
    for name in extra:
        if set(re.split(r"[^a-z]+", str(name).lower())) & {*_SECRET}:
            message = "says that it is a secret, and settings are written down; a key goes by endpoint.key"
            problems.append(Problem(f"{where}.{name}", message))
        elif name in _OURS:
            problems.append(Problem(f"{where}.{name}", f"is said by {_OURS[name]}; leave it out here"))
        elif name in _REFUSED:
            problems.append(Problem(f"{where}.{name}", f"{_REFUSED[name]}; leave it out"))
    return problems


def unknown_model(name: str, url: str, known: list[str]) -> str:
    """Return what is wrong with the name of a model that a server does not have."""
    return (
        f"{url} has no model {name!r}{nearest(name, known)}" if known else f"{url} says that it has no model {name!r}"
    )
