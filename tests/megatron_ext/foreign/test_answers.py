"""All that an answer says is in the completion, or the answer is refused by name; how fast a server is asked."""

from typing import Any

import pytest

from megatron_ext.foreign import answers
from megatron_ext.foreign.answers import Answer, BadAnswer, Refused
from megatron_ext.foreign.pace import Limit, Pace
from megatron_ext.rollout.endpoint import Endpoint

USAGE = {"prompt_tokens": 5, "completion_tokens": 3}


def read(message: Any, finish: Any = "stop", stops: tuple[str, ...] = (), **settings) -> Answer:
    endpoint = Endpoint(**settings)
    said = {"text": message} if endpoint.api == "completions" else {"message": message}
    choice = {"index": 0, "finish_reason": finish, **said}
    body = {"model": "m", "system_fingerprint": "fp", "choices": [choice], "usage": USAGE}
    return answers.read(body, endpoint, stops)


def said(**message: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, **message}


@pytest.mark.parametrize(
    "message, finish, text",
    [
        (said(content="42"), "stop", "42"),
        (said(content="42", tool_calls=[], annotations=[], audio=None, function_call=None), "stop", "42"),
        (said(content="42", reasoning_content=" 6 x 7 \n"), "stop", "<think>\n6 x 7\n</think>\n\n42"),
        (said(content="42", reasoning="6 x 7"), "stop", "<think>\n6 x 7\n</think>\n\n42"),
        (said(content="42", reasoning="6 x 7", reasoning_content="6 x 7"), "stop", "<think>\n6 x 7\n</think>\n\n42"),
        (said(reasoning="6 x"), "length", "<think>\n6 x"),
        (said(reasoning="6 x"), "stop", "<think>\n6 x\n</think>\n\n"),
        (said(refusal="I will not."), "stop", "I will not."),
        (said(content=""), "stop", ""),
        (said(content=[{"type": "thinking", "thinking": "6 x 7"}, {"type": "text", "text": "42"}]), "stop",
         "<think>\n6 x 7\n</think>\n\n42"),
    ],
)  # fmt: skip
def test_what_a_message_says_is_in_the_completion(message, finish, text):
    assert read(message, finish) == Answer(text, finish, 3, 5, model="m", fingerprint="fp")


@pytest.mark.parametrize(
    "message, finish, named",
    [
        (said(content="42", tool_calls=[{"function": {"name": "f", "arguments": "{}"}}]), "stop", "tool_calls"),
        (said(function_call={"name": "f", "arguments": "{}"}), "stop", "function_call"),
        (said(content="42"), "tool_calls", "tool_calls"),
        (said(content="42"), "eaten", "'eaten'"),
        (said(content="42", audio={"data": "…"}), "stop", "'audio'"),
        (said(content="42", confidence=0.5), "stop", "'confidence' (a float): is not understood; endpoint.ignored"),
        (said(content=[{"type": "image", "image": "…"}]), "stop", "'image'"),
        ({"role": "user", "content": "42"}, "stop", "role user"),
        (said(content="42", reasoning="a", reasoning_content="b"), "stop", "differ"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(message, finish, named):
    with pytest.raises(Refused) as caught:
        read(message, finish)
    assert named in str(caught.value)


def test_a_key_that_is_named_is_left_out():
    assert read(said(content="42", confidence=0.5), ignored=["confidence"]).text == "42"


@pytest.mark.parametrize(
    "body",
    [
        "<html>", [], {}, {"choices": []}, {"choices": [{}]}, {"error": {"message": "overloaded"}},
        {"choices": [{"finish_reason": "stop", "message": {"role": "assistant", "content": "4"}}]},  # no usage
        {"choices": [{"finish_reason": None, "message": {"role": "assistant", "content": "4"}}], "usage": USAGE},
        {"choices": [{"finish_reason": "stop"}], "usage": USAGE},
        {"choices": [{"finish_reason": "stop", "message": {"content": "4"}}], "usage": {"completion_tokens": "3"}},
        {"choices": [{"finish_reason": "stop", "message": {"content": "4"}}], "usage": {"completion_tokens": 10**11}},
    ],
)  # fmt: skip
def test_an_answer_that_is_none_may_be_asked_for_again(body):
    with pytest.raises(BadAnswer):
        answers.read(body, Endpoint(), ())


def test_half_a_character_in_an_answer_can_be_written_down():
    told = read(said(content="a\ud83d b \ud83d\ude00", reasoning="\ude00"))
    assert told.text == "<think>\n\ufffd\n</think>\n\na\ufffd b \U0001f600" and told.text.encode()


def test_a_completion_ends_where_the_first_stop_string_is_complete_and_keeps_it():
    told = read("so <a>4</a> and </answer> more", "length", ("</answer>", "</a>"), api="completions")
    assert (told.text, told.finish) == ("so <a>4</a>", "stop")
    kept = read("so </a> x", "length", ("</a>",), api="completions", takes=["include_stop_str_in_output"])
    assert (kept.text, kept.finish) == ("so </a> x", "length")  # the server saw to it


def test_a_withheld_answer_is_no_answer_and_says_why():
    told = read(said(content="4"), "content_filter")
    assert told.finish == "abort" and "content_filter" in told.note


@pytest.mark.parametrize(
    "api, given, known",
    [
        ("chat", {"content": [{"logprob": -0.5}, {"logprob": -1.0}]}, [-0.5, -1.0]),
        ("completions", {"token_logprobs": [-0.5, -1.0]}, [-0.5, -1.0]),
        ("completions", {"token_logprobs": [None, -1.0]}, None),
        ("chat", None, None),
        ("chat", {"content": None}, None),
    ],
)
def test_logprobs_are_there_where_the_server_gives_them_and_absent_elsewhere(api, given, known):
    choice = {"finish_reason": "stop", "text": "4", "message": said(content="4"), "logprobs": given}
    body = {"choices": [choice], "usage": USAGE}
    assert answers.read(body, Endpoint(api=api, logprobs=True), ()).logprobs == known
    assert answers.read(body, Endpoint(api=api), ()).logprobs is None  # which nobody asked for


def test_prompts_are_sent_as_texts_alone():
    assert answers.messages_of("2+2=") == [{"role": "user", "content": "2+2="}]
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2="}]
    assert answers.messages_of(asked) == asked
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    with pytest.raises(Refused, match="message 2 has tool_calls"):
        answers.messages_of([asked[1], call])


def test_no_more_than_so_many_a_minute_and_unused_tokens_are_given_back():
    pace = Pace(Limit(60), Limit(6000))  # one a second, 100 tokens a second
    assert pace.ready_in(0) == 0
    pace.send(0, 500)
    assert pace.ready_in(0) == 5
    pace.answered(1, 500, 200)
    assert pace.ready_in(1) == 1 and pace.ready_in(2) == 0
    pace.send(2, 0)
    assert pace.ready_in(2) == 1  # by the requests
    unlimited = Pace(Limit(0), Limit(0))
    unlimited.send(0, 10**9)
    assert unlimited.ready_in(0) == 0
    unlimited.pause(0, 7)
    assert unlimited.ready_in(3) == 4 and unlimited.ready_in(8) == 0


def test_each_further_try_waits_longer_up_to_a_limit():
    pace = Pace(Limit(0), Limit(0))
    longest = [max(pace.back_off(tries) for _ in range(50)) for tries in (1, 3, 20)]
    assert longest[0] <= 0.5 < 1 <= longest[1] <= 2 and 30 <= longest[2] <= 60
