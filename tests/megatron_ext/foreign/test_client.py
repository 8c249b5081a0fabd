"""What a server does wrong is tried again where that can help, and told in one sentence where it cannot."""

import asyncio
import re
import ssl
import subprocess
from typing import Any

import pytest

from data_tools.mistake import UserMistake
from megatron_ext.foreign import answers, client
from megatron_ext.foreign.client import Client, Question
from megatron_ext.rollout.endpoint import Endpoint, check
from megatron_ext.rollout.settings import Sampling
from tests.megatron_ext.foreign.server import CUT, SILENT, Fault, Server, dripping, serving

pytest.importorskip("openai")
KEY = "sk-never-to-be-seen-0123456789"


def ask(server, secret: str = "", checked: bool = False, **settings: Any) -> tuple[answers.Answer, dict[str, int]]:
    """Ask once, after the list of models where it is wanted; returns what was tried again too."""
    endpoint = Endpoint(**{"url": server.url, "model": "judge", "timeout_s": 5.0, "retries": 1, **settings})
    endpoint.key = "env:TEACHER_KEY" if secret else ""

    async def run() -> tuple[answers.Answer, dict[str, int]]:
        async with Client(endpoint, secret) as asked:
            if checked:
                await asked.check_model()
            sent = client.request(
                endpoint, answers.messages_of("2+2="), sampling=Sampling(max_tokens=9), seed=7, arguments={}
            )
            return await asked.ask(Question("prompt p1", sent, 4, 9)), asked.tried_again

    return asyncio.run(run())


def refusal(server, **settings: Any) -> str:
    with pytest.raises(UserMistake) as caught:
        ask(server, **settings)
    assert "\n" not in str(caught.value) and KEY not in str(caught.value)
    return str(caught.value)


def failing(status: int, code: Any = None, message: str = "no", **headers: str) -> Fault:
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, {
        "error": {"message": message, "code": code}
    }  # fmt: skip


@pytest.mark.parametrize(
    "fault, reason",
    [
        (failing(429, Retry_After="0.2"), "status 429"),
        (failing(429, retry_after_ms="200"), "status 429"),
        (failing(503, Retry_After="Mon, 30 Nov 2020 10:00:00 GMT"), "status 503"),
        ((500, {}, "<html>oops"), "status 500"),
        (failing(408), "status 408"),
        (CUT, "no connection"),
        ((200, {}, "{nope"), "no answer"),
        ((200, {"Content-Type": "text/html"}, "<html>"), "no answer"),
        ((200, {}, {"choices": []}), "no answer"),
    ],
)  # fmt: skip
def test_what_may_be_better_the_next_time_is_asked_again(fault, reason):
    with serving(faults=[fault]) as server:
        answer, again = ask(server)
        assert answer.text.startswith("said ") and again == {reason: 1}
        assert len(server.asked) == 2 and server.asked[0] == server.asked[1]


def test_a_server_that_says_nothing_is_given_up_after_a_while():
    with serving(faults=[SILENT, SILENT]) as server:
        assert "asked 2 times for prompt p1" in (said := refusal(server, timeout_s=0.3))
        assert "endpoint.timeout_s" in said and "not asked again" in said
    assert "did not answer (no connection" in refusal(server, checked=True, retries=0)  # nobody listens there


@pytest.mark.parametrize(
    "fault, told",
    [
        (
            failing(400, "context_length_exceeded", "8192 tokens at most"),
            "prompt p1 is too long for judge beside 9 new",
        ),
        (failing(400, 400, "This model's maximum context length is 64"), "is too long"),
        (
            failing(400, None, "Unsupported parameter: 'top_p'"),
            "Unsupported parameter: 'top_p'; it was sent max_tokens",
        ),
        (failing(404, None, "no model judge"), "404 for model 'judge'"),
        (failing(403, None, f"not for {KEY}"), "refuses the key of env:TEACHER_KEY (403): not for ***TEACHER_KEY***"),
        (failing(429, "insufficient_quota"), "quota is used up"),
        (failing(422), "refuses prompt p1 with 422"),
        (failing(429, Retry_After="86400"), "asks to be left alone for 86,400 s (status 429: no); submit again then"),
        ((307, {}, ""), "sends requests on to nowhere with status 307"),
        ((302, {"Location": "/v1/models"}, ""), "sends requests on to /v1/models with status 302, and none is sent"),
        ((308, {"Location": "/v1/chat/completions"}, ""), "write the address that answers by itself"),
        ((302, {"Location": "ftp://x"}, ""), "sends requests on to ftp://x"),
    ],
)
def test_what_would_be_refused_again_is_final(fault, told):
    with serving(faults=[fault]) as server:
        assert told in refusal(server, secret=KEY, retries=3)
        assert len(server.asked) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_neither_prompt_nor_key_goes_to_where_a_server_sends_on(status):
    with serving() as other:
        away: Fault = (status, {"Location": f"{other.url.replace('127.0.0.1', 'localhost')}/chat/completions"}, "")
        with serving(faults=[away]) as server:
            assert f"/chat/completions with status {status}, and none is sent there" in refusal(server, secret=KEY)
        assert not other.asked


@pytest.mark.parametrize("begun", ["HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", "HTTP/1.1 200 OK\r\nX: ", ""])
def test_an_answer_that_never_becomes_whole_is_given_up_in_time(begun):
    with dripping(begun) as server:
        told = r"once for prompt p1 .*too late: not whole within 0.3 s \(endpoint.timeout_s\)"
        assert re.search(told, refusal(server, timeout_s=0.3, retries=0))


@pytest.mark.parametrize("url", ["http://☃.invalid/v1", "http://xn--☃/v1", "http://a/\0", "http://a\x7f/v1"])
def test_an_address_that_no_request_can_have_is_refused_by_plan_and_by_the_client(url):
    assert any("is no address" in problem.message for problem in check(Endpoint(url=url, model="m")))
    assert "endpoint.url: " in refusal(Server(url=url), retries=0) and "is no address" in refusal(Server(url=url))


def test_an_address_in_another_script_is_one():
    assert not check(Endpoint(url="http://bücher.example/v1", model="m"))
    assert not check(Endpoint(url="http://[fe80::1%25eth0]:8000/v1", model="m"))


@pytest.mark.parametrize(
    "told", [3, "abc", {}, [3], [{"logprob": 10**400}], [{"logprob": True}], [None], {"content": 3}]
)
def test_log_probs_of_another_form_are_none(told):
    body = {"choices": [{"finish_reason": "stop", "message": {"content": "4"}, "logprobs": {"content": told}}]}
    body |= {"usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    assert answers.read(body, Endpoint(logprobs=True), ()).logprobs is None
    text = {"finish_reason": "stop", "text": "4", "logprobs": {"token_logprobs": told}}
    body["choices"] = [text]  # type: ignore[list-item]
    assert answers.read(body, Endpoint(logprobs=True, api="completions"), ()).logprobs in (None, [3.0])


@pytest.mark.parametrize("models", [3, "judge", [3], [{"id": 3}], [{"id": {}}], [{"id": "a\nb" * 999}]])
def test_a_list_of_models_of_another_form_is_no_traceback(models):
    known = client._names({"data": models})
    assert known == [each["id"] for each in models if len(str(each)) > 99] if isinstance(models, list) else not known
    with serving(models=["a\nb" * 999]) as server:
        assert len(refusal(server, checked=True)) < 400


@pytest.mark.parametrize("pause", ["inf", "nan", "-3", "soon", "Mon, 99 Nov"])
def test_a_pause_that_is_no_time_is_as_if_none_were_asked_for(pause):
    assert client.retry_after({"retry-after": pause}) in (None, 0.0)


@pytest.mark.parametrize("key", ["schlüssel-123", "line-one\nline-two", "with space", "nul\0"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key, monkeypatch):
    monkeypatch.setattr(client.os, "environ", {"TEACHER_KEY": key})
    with pytest.raises(UserMistake, match=r"at env:TEACHER_KEY is no key: its character \d+ of \d+") as caught:
        client.key_of(Endpoint(key="env:TEACHER_KEY"))
    assert key[:5] not in str(caught.value)


def test_a_certificate_that_nobody_signed_is_final_and_says_what_to_set(tmp_path):
    made = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {tmp_path}/k -out {tmp_path}/c -days 1 -subj /CN=localhost"
    )
    subprocess.run(made.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "c", tmp_path / "k")
    with serving(tls=context) as server:
        said = refusal(server, checked=True, retries=3)
        assert "certificate that is not trusted here" in said and "SSL_CERT_FILE" in said and not server.asked


def test_address_key_and_model_are_checked_before_anything_is_spent():
    with serving(key=KEY) as server:
        assert "wants a key (401), and none is named" in refusal(server, checked=True)
        said = refusal(server, secret="sk-another-key", checked=True)
        assert "refuses the key of env:TEACHER_KEY (401)" in said and "sk-another-key" not in said
        assert "no model 'teacher-7' (did you mean teacher-7b?" in refusal(
            server, secret=KEY, checked=True, model="teacher-7"
        )
        assert not server.asked
        assert ask(server, secret=KEY, checked=True)[0].text
        server.models = None  # a server without such a list
        assert ask(server, secret=KEY, checked=True)[0].text
    with serving() as server:
        ask(server)
        assert "authorization" not in server.headers[0]  # where no key is named, none is sent


def test_a_request_says_what_was_set_and_no_more():
    sampling = Sampling(temperature=0.5, top_p=0.9, top_k=3, max_tokens=9, stop_strings=["."])

    def sent(**settings: Any) -> dict[str, Any]:
        endpoint = Endpoint(model="m", **settings)
        return client.request(endpoint, "2+2=", sampling=sampling, seed=7, arguments={"thinking": False})

    usual = {"model": "m", "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 7}
    assert sent(api="completions") == {**usual, "prompt": "2+2="}
    assert sent(api="completions", leave_out=["seed"], logprobs=True) == {
        **{name: value for name, value in usual.items() if name != "seed"},
        "prompt": "2+2=",
        "logprobs": 1,
    }
    body = {"top_k": 3, "min_p": 0.0, "chat_template_kwargs": {"thinking": False}, "include_stop_str_in_output": True}
    whole = sent(takes=[*body], extra={"effort": "low"}, limit_as="max_completion_tokens")
    told = {name: value for name, value in usual.items() if name != "max_tokens"}
    assert whole == {
        **told,
        "max_completion_tokens": 9,
        "messages": "2+2=",
        "stop": ["."],
        "extra_body": {**body, "effort": "low"},
    }
