"""Asks an OpenAI-compatible server, by the official client library: what is tried again, and what is final.

Tried again, after a pause: a connection that fails or ends early, an answer that comes too late or is none, and the
statuses 408, 409, 425, 429 and 5xx; where the server says how long to wait, every request waits. Final, in one
sentence: any other status, since the same request would be refused again.
"""

import asyncio
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_tools.base.json_text import json_value
from data_tools.mistake import Problem, UserMistake
from megatron_ext.foreign.answers import Answer, BadAnswer, Refused, read
from megatron_ext.foreign.pace import Limit, Pace, expected_tokens
from megatron_ext.rollout.endpoint import CHAT, SEED, Endpoint, key_variable, unknown_model

if TYPE_CHECKING:
    from openai import AsyncOpenAI

AGAIN = (408, 409, 425, 429)
_QUOTA = ("insufficient_quota", "billing_hard_limit_reached")  # 429, and waiting does not help
_TOO_LONG = re.compile(r"context.?(length|window|size)|maximum context|too (long|large)|max_model_len|exceed", re.I)
_SAID, _MODELS_TOLD, _NAME = 300, 20, 100
LONGEST_PAUSE_S = 3600.0  # that a server may ask for: a job that waits longer does better to end
_KEPT = "what it answered is kept and not asked again"
_CERTIFICATE = "CERTIFICATE_VERIFY_FAILED"
_NAP_S = 0.2  # between two looks at a clock, of a request that waits


@dataclass(frozen=True)
class Question:
    """One request: what a message calls its prompt, what is sent, and how many characters the prompt has."""

    name: str
    sent: dict[str, Any]
    characters: int
    most: int  # new tokens
    stop_strings: tuple[str, ...] = ()


class Trouble(Exception):
    """Raised for what may be better the next time: why, and how many seconds the server wants to be left alone."""

    def __init__(self, why: str, wait_s: float | None = None):
        super().__init__(why)
        self.wait_s = wait_s


def check_installed() -> None:
    """Raise UserMistake where the client library is not there."""
    try:
        import openai  # noqa: F401
    except ImportError:
        message = "openai asks by the client library openai, which is not installed here: pip install 'afterok[openai]'"
        raise UserMistake(Problem("backend", message)) from None


def key_of(endpoint: Endpoint) -> str:
    """Return the API key from the environment; "" where none is sent. Raise UserMistake where it is not there."""
    name = key_variable(endpoint)
    if not name or os.environ.get(name):
        key = os.environ.get(name, "").strip()
        if odd := next((place for place, letter in enumerate(key, 1) if not "!" <= letter <= "~"), 0):
            message = f"what lies at {endpoint.key} is no key: its character {odd} of {len(key)} can be in no header"
            raise UserMistake(Problem("endpoint.key", f"{message}; is it the key alone, in one line?"))
        return key
    if endpoint.key.startswith("env:"):
        remedy = f"name where it lies under env.secrets of the profile ({name}: file:PATH), or export it"
        raise UserMistake(Problem("endpoint.key", f"{name} is not set where this runs; {remedy}"))
    kind = endpoint.key.partition(":")[0]
    message = f"{kind}: is read by afterok's worker, and this runs by hand; export the key, and write env:NAME"
    raise UserMistake(Problem("endpoint.key", message))


class Client:
    """A server, within one event loop. `tried_again` counts requests that were sent again, by reason."""

    def __init__(self, endpoint: Endpoint, key: str, seconds: Callable[[], float] = time.monotonic):
        self.endpoint, self._key, self._seconds = endpoint, key, seconds
        self.pace = Pace(Limit(endpoint.requests_per_minute), Limit(endpoint.tokens_per_minute))
        self.tried_again: dict[str, int] = {}
        self._api: AsyncOpenAI | None = None
        self._headers: dict[str, Any] = {}

    async def __aenter__(self) -> "Client":
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Omit

        # Of the environment the library would take these, for whatever server it is.
        nothing: Any = {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
        self._headers = {} if self._key else {"Authorization": Omit()}  # a server without keys is sent none
        try:
            self._api = AsyncOpenAI(
                base_url=self.endpoint.url,
                api_key=self._key or "none",
                organization="",
                project="",
                max_retries=0,  # ours heed a stop, and the limits
                timeout=self.endpoint.timeout_s,
                default_headers=nothing,
                # A prompt goes where the settings say, and nowhere else; and a POST never becomes a GET.
                http_client=DefaultAsyncHttpxClient(follow_redirects=False),
            )
        except Exception as error:  # InvalidURL of httpx or httpx2, whichever the library has
            if type(error).__name__ != "InvalidURL":
                raise
            message = f"{self.endpoint.url!r} is no address ({error}); write http://HOST:PORT/v1"
            raise UserMistake(Problem("endpoint.url", message)) from None
        return self

    async def __aexit__(self, *_: Any) -> None:
        assert self._api is not None
        await self._api.close()

    async def check_model(self) -> None:
        """Ask for the list of models, once: whether address, key and name of the model are good. UserMistake if not.

        A server without such a list is not refused for it.
        """
        name = self.endpoint.model
        body = await self._again("the list of models", lambda: self._get_models(), self._refused_models)
        known = _names(body)
        if known and name not in known:
            told = [" ".join(each.split())[:_NAME] for each in known[:_MODELS_TOLD]]
            raise UserMistake(Problem("endpoint.model", unknown_model(name, self.endpoint.url, told)))

    async def ask(self, question: Question) -> Answer:
        """Return the answer to a question. Raise UserMistake where there is none, and trying again cannot help."""
        expected = expected_tokens(question.characters, question.most)

        async def once() -> Answer:
            await self._turn(expected)
            body = await self._post(question.sent)
            answer = read(body, self.endpoint, question.stop_strings)
            self.pace.answered(self._seconds(), expected, answer.tokens + answer.prompt_tokens)
            return answer

        return await self._again(question.name, once, lambda error: self._refused(question, error))

    async def _turn(self, tokens: float) -> None:
        """Wait until a request of so many tokens may be sent, and count it."""
        while (wait := self.pace.ready_in(self._seconds())) > 0:
            await asyncio.sleep(min(wait, _NAP_S))  # another's answer may give tokens back meanwhile
        self.pace.send(self._seconds(), tokens)

    async def _again(self, what: str, once: Callable[[], Any], refused: Callable[[Any], Any]) -> Any:
        """Return what `once` gives, which is tried again where that can help; `refused` gives what a status is final
        as."""
        for tries in range(1, self.endpoint.retries + 2):
            try:
                return await self._told(once, refused)
            except Trouble as trouble:
                why, wait_s = self._masked(str(trouble)), trouble.wait_s
            if tries > self.endpoint.retries:
                break
            reason = why.partition(":")[0]
            self.tried_again[reason] = self.tried_again.get(reason, 0) + 1
            if wait_s is not None and wait_s > LONGEST_PAUSE_S:
                message = f"{self.endpoint.url} asks to be left alone for {wait_s:,.0f} s ({why})"
                raise UserMistake(Problem("endpoint.url", f"{message}; submit again then: {_KEPT}"))
            if wait_s is not None:
                self.pace.pause(self._seconds(), wait_s)
            until = self._seconds() + max(wait_s or 0.0, self.pace.back_off(tries))
            while (left := until - self._seconds()) > 0:
                await asyncio.sleep(min(left, _NAP_S))
        times = "once" if tries == 1 else f"{tries} times"
        message = f"{self.endpoint.url} was asked {times} for {what} and did not answer ({why})"
        raise UserMistake(Problem("endpoint.url", f"{message}; see to the server, then submit again: {_KEPT}"))

    async def _told(self, once: Callable[[], Any], refused: Callable[[Any], Any]) -> Any:
        """Return what `once` gives; what the library raises becomes Trouble or a mistake."""
        import openai

        try:
            return await once()
        except TimeoutError:
            raise Trouble(f"too late: not whole within {self.endpoint.timeout_s:g} s (endpoint.timeout_s)") from None
        except BadAnswer as error:
            raise Trouble(f"no answer: {error}") from None
        except openai.APITimeoutError:
            raise Trouble(f"too late: nothing within {self.endpoint.timeout_s:g} s (endpoint.timeout_s)") from None
        except openai.APIStatusError as error:
            wait_s = retry_after(error.response.headers)
            if error.status_code in AGAIN and error.code not in _QUOTA or error.status_code >= 500:
                raise Trouble(f"status {error.status_code}: {self._said(error)}", wait_s) from None
            return refused(error)
        except openai.APIConnectionError as error:
            cause = error.__cause__
            why = f"{type(cause).__name__} {cause}".strip() if cause else str(error)
            if _CERTIFICATE in why:
                remedy = "name the file of who signed it as SSL_CERT_FILE in the profile's env.set"
                message = f"{self.endpoint.url} has a certificate that is not trusted here ({why}); {remedy}"
                raise UserMistake(Problem("endpoint.url", message)) from None
            raise Trouble(f"no connection: {why}") from None

    async def _get_models(self) -> Any:
        assert self._api is not None
        async with asyncio.timeout(self.endpoint.timeout_s):  # the library's own begins anew with each piece
            raw = await self._api.models.with_raw_response.list(extra_headers=self._headers)
        return _json(raw.content)

    async def _post(self, sent: dict[str, Any]) -> Any:
        assert self._api is not None
        of = self._api.chat.completions if self.endpoint.api == CHAT else self._api.completions
        async with asyncio.timeout(self.endpoint.timeout_s):
            raw = await of.with_raw_response.create(**sent, extra_headers=self._headers)
        return _json(raw.content)

    def _refused_models(self, error: Any) -> Any:
        """Return an empty list for a server without one. Raise UserMistake for a key that is refused."""
        self._refuse_way(error)
        self._refuse_key(error)
        if error.status_code in (404, 405, 501):
            return {}
        message = f"{self.endpoint.url}/models answers {error.status_code}: {self._said(error)}"
        raise UserMistake(Problem("endpoint.url", f"{message}; is it the address of an OpenAI-compatible API?"))

    def _refused(self, question: Question, error: Any) -> Any:
        """Raise the UserMistake of a request that would be refused again."""
        self._refuse_way(error)
        self._refuse_key(error)
        said, where = self._said(error), "endpoint"
        if error.status_code == 429:
            raise UserMistake(Problem("endpoint.key", f"its quota is used up ({said}); raise it, then submit again"))
        if error.status_code == 404:
            path = "chat/completions" if self.endpoint.api == CHAT else "completions"
            message = f"404 for model {self.endpoint.model!r} at {self.endpoint.url}/{path}: {said}"
            remedy = "see which models it has (endpoint.model), and whether it has this API (endpoint.api)"
            raise UserMistake(Problem("endpoint.model", f"{message}; {remedy}"))
        if error.code == "context_length_exceeded" or _TOO_LONG.search(said):
            limit = f"beside {question.most:,} new tokens"
            remedy = "leave the prompt out, or lower the limit on new tokens"
            message = f"{question.name} is too long for {self.endpoint.model} {limit}: {said}; {remedy}"
            raise UserMistake(Problem(where, message))
        sent = ", ".join(sorted(set(question.sent) - {"messages", "prompt", "extra_body"}))
        more = ", ".join(sorted(question.sent.get("extra_body") or ()))
        asked = f"it was sent {sent}{f' and {more}' if more else ''}"
        message = f"{self.endpoint.url} refuses {question.name} with {error.status_code}: {said}; {asked}"
        raise UserMistake(Problem(where, message))

    def _refuse_way(self, error: Any) -> None:
        """Raise UserMistake for a server that sends requests on: prompts are for nobody else, and go no other way."""
        if not 300 <= error.status_code < 400:
            return
        to = " ".join(self._masked(error.response.headers.get("location") or "nowhere").split())[:_SAID]
        message = (
            f"{self.endpoint.url} sends requests on to {to} with status {error.status_code}, and none is sent there"
        )
        raise UserMistake(Problem("endpoint.url", f"{message}; write the address that answers by itself"))

    def _refuse_key(self, error: Any) -> None:
        if error.status_code not in (401, 403):
            return
        reference, status = self.endpoint.key, error.status_code
        if not reference:
            message = f"{self.endpoint.url} wants a key ({status}), and none is named; write where it lies: env:NAME"
        else:
            message = f"{self.endpoint.url} refuses the key of {reference} ({status}): {self._said(error)}"
        raise UserMistake(Problem("endpoint.key", message))

    def _said(self, error: Any) -> str:
        """Return what a server says of a status, in one line, without the key."""
        body = error.body
        said = body.get("message") if isinstance(body, dict) else None
        text = said if isinstance(said, str) and said else json.dumps(body) if body else error.response.reason_phrase
        return self._masked(" ".join(str(text).split()))[:_SAID]

    def _masked(self, text: str) -> str:
        """Return a text without the key, which some servers say back."""
        return text.replace(self._key, f"***{key_variable(self.endpoint)}***") if self._key else text


def refused_answer(question: Question, error: Refused) -> UserMistake:
    """Return the mistake of an answer that cannot be a completion."""
    return UserMistake(Problem("endpoint", f"the answer to {question.name} is refused: {error}"))


def retry_after(headers: Any) -> float | None:
    """Return how many seconds a server asks to wait, None where it does not say: Retry-After, in seconds or a date, or
    retry-after-ms."""
    from email.utils import parsedate_to_datetime

    for name, divisor in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers[name]) / divisor
        except (KeyError, ValueError):
            continue
        return max(seconds, 0.0) if math.isfinite(seconds) else None
    try:
        return max(parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time(), 0.0)
    except (KeyError, ValueError, TypeError):
        return None


def request(endpoint: Endpoint, prompt: Any, *, sampling: Any, seed: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what one sample of a prompt (messages, or a text for api completions) is asked with."""
    from megatron_ext.rollout.endpoint import MIN_P, TEMPERATURE, TEMPLATE, TOP_K, TOP_P, WITH_STOP

    sent: dict[str, Any] = {"model": endpoint.model, endpoint.limit_as: sampling.max_tokens}
    sent["messages" if endpoint.api == CHAT else "prompt"] = prompt
    said = {TEMPERATURE: sampling.temperature, TOP_P: sampling.top_p, SEED: seed}
    sent |= {name: value for name, value in said.items() if name not in endpoint.leave_out}
    # A server's own defaults may filter (llama.cpp: top_k 40, min_p 0.05): who takes these is told, off or on.
    body: dict[str, Any] = {TOP_K: sampling.top_k, MIN_P: sampling.min_p, TEMPLATE: arguments, WITH_STOP: True}
    body = {name: value for name, value in body.items() if name in endpoint.takes}
    if WITH_STOP in endpoint.takes and sampling.stop_strings:
        sent["stop"] = list(sampling.stop_strings)
    else:
        body.pop(WITH_STOP, None)
    if not arguments:
        body.pop(TEMPLATE, None)
    if endpoint.logprobs:
        sent["logprobs"] = True if endpoint.api == CHAT else 1  # beside the likeliest one
    body |= endpoint.extra
    if endpoint.api != CHAT and "max_completion_tokens" in sent:
        body["max_completion_tokens"] = sent.pop("max_completion_tokens")
    return {**sent, **({"extra_body": body} if body else {})}


def _names(body: Any) -> list[str]:
    """Return the names in a list of models; none where it is of another form."""
    data = body.get("data") if isinstance(body, dict) else None
    data = data if isinstance(data, list) else []
    return [each["id"] for each in data if isinstance(each, dict) and isinstance(each.get("id"), str) and each["id"]]


def _json(content: bytes) -> Any:
    try:
        return json_value(content.decode())
    except ValueError as error:
        raise BadAnswer(f"{error} ({len(content):,} bytes)") from None
