"""Every schema met in the wild becomes the one form of conversation; what does not is told with its bucket."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.chats.conversation import REFUSED, SCHEMAS, BadRecord, detect_schema, read_record
from data_tools.chats.messages import IN_LOSS
from tests.data_tools.conversations import CHAT, RECORDS, SOLUTION, THOUGHT, at, said, turns


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_becomes_its_conversation(name):
    record, expected = RECORDS[name]
    assert turns(record) == expected
    assert turns(record, detect_schema(record)) == expected


def test_tools_and_template_arguments_come_along():
    (dolci,) = read_record(RECORDS["dolci"][0])
    (glaive,) = read_record(RECORDS["sharegpt"][0])
    assert dolci.tools == glaive.tools == [{"type": "function", "function": {"name": "add"}}]
    (smoltalk,) = read_record(RECORDS["smoltalk"][0])
    assert smoltalk.arguments == {"enable_thinking": False}


def test_messages_that_the_data_keeps_out_of_the_loss_are_known_by_number():
    messages = [
        {"role": "system", "content": "a"},
        {"role": "system", "content": "b"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "x", "loss_weight": 0.0},
        {"role": "assistant", "content": "y", "weight": 1},
    ]
    (conversation,) = read_record({"messages": messages})
    assert conversation.messages[0]["content"] == "a\n\nb" and conversation.untrained == {2}


CHUNKS = [
    ("system", "<|im_start|>system\nS<|im_end|>\n"),
    ("user", "<|im_start|>user\nQ"),
    ("assistant", "A<|im_end|>\n"),
]
LINE = [{"role": role, "content": text} for role, text in CHUNKS]


def test_a_packed_line_is_several_conversations_and_a_materialized_one_is_one():
    assert read_record({"messages": LINE, "num_generated_tokens": 9}) == [CHUNKS]
    assert read_record({"messages": LINE * 3}, "rendered") == [CHUNKS] * 3


def test_a_schema_is_never_told_by_the_text_of_a_message():
    """A line of pack.py has no key of its own, so a text that looks like one is neither taken for it nor for a chat."""
    chat = [{"role": "system", "content": "<|think|>Answer inside <answer></answer>"}, *CHAT]
    for record in ({"messages": LINE}, {"messages": chat}, {"messages": CHAT, "num_generated_tokens": 9}):
        with pytest.raises(BadRecord, match="name chat.schema: rendered, or messages") as caught:
            read_record(record)
        assert caught.value.bucket == "ambiguous_schema"
    assert turns({"messages": chat}, "messages")[0] == said("system", "<|think|>Answer inside <answer></answer>")
    assert len(turns({"messages": [CHAT[0], {"role": "assistant", "content": "<|x|>"}]})) == 2


@pytest.mark.parametrize("question, answer, schema", [
    ("prompt", "completion", "prompt_completion"), ("query", "response", "query_response"),
    ("instruction", "output", "alpaca"), ("instruction", "response", "dolly"), ("question", "answer", "gsm8k"),
])  # fmt: skip
def test_a_question_that_a_template_may_have_written_is_put_into_no_second_one(question, answer, schema):
    record = {question: "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", answer: "A"}
    with pytest.raises(BadRecord, match=rf"begins with '<\|im_start\|>'.*; name chat.schema: {schema}") as caught:
        read_record(record)
    assert caught.value.bucket == "ambiguous_schema"
    assert turns(record, schema)[0] == said("user", record[question])
    assert turns({question: "what is <|im_start|>?", answer: "<|A|>"})[1] == said("assistant", "<|A|>")


@pytest.mark.parametrize("text, found", [
    (THOUGHT + "\n\n" + SOLUTION, said("assistant", "S <b>", "T")), ("\n" + SOLUTION, said("assistant", "S <b>")),
    (THOUGHT + "\n\nplain", said("assistant", "plain", "T")), (THOUGHT, None), (THOUGHT * 2 + SOLUTION, None),
    ("Well. " + THOUGHT + SOLUTION, None), (THOUGHT + SOLUTION + " Bye.", None), (THOUGHT + SOLUTION * 2, None),
    (THOUGHT + "<|begin_of_solution|>S", None), ("<|begin_of_thought|>T " + SOLUTION, None), (SOLUTION + THOUGHT, None),
    (THOUGHT + "<|begin_of_solution|> <|end_of_solution|>", None), ("<|end_of_thought|>S", None),
])  # fmt: skip
@pytest.mark.parametrize("form", ["messages", "sharegpt", "alpaca"])
def test_markers_of_openthoughts_become_reasoning_and_answer_or_are_told_by_name(form, text, found):
    record = {"messages": {"messages": [CHAT[0], {"role": "assistant", "content": text}]},
              "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}]},
              "alpaca": {"instruction": "q", "output": text}}[form]  # fmt: skip
    if found:
        assert turns(record)[1] == found
        return
    with pytest.raises(BadRecord, match="not one thought and one solution") as caught:
        read_record(record)
    assert caught.value.bucket == "openthoughts_markers"


BAD = [
    ([], "malformed_record", "not a JSON object but a list"),
    ({"text": "x"}, "malformed_record", "no known schema has the keys text"),
    ({"messages": []}, "malformed_record", "messages are no list of messages but empty"),
    ({"messages": ["x"]}, "malformed_record", "message 1 is no mapping but a str"),
    ({"messages": [{"role": "asistant", "content": "x"}]}, "malformed_record",
     "unknown role 'asistant' (did you mean assistant?"),
    ({"messages": [{"role": "user", "content": 3}]}, "malformed_record", "its content is a int"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "malformed_record",
     "a part of type 'image'"),
    ({"messages": [{"role": "user", "content": "q"}]}, "no_assistant", "1 messages, none of an assistant"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}, "empty_assistant",
     "message 2"),
    ({"messages": [{"role": "assistant", "content": "x", "loss_weight": 0.5}]}, "malformed_record",
     "loss_weight 0.5 is no yes or no"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
     "malformed_tool_call", "f: arguments are not JSON"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]}, "malformed_tool_call",
     "without a name"),
    ({"messages": [{"role": "assistant", "function_calls": "f(1"}]}, "malformed_tool_call", "neither JSON nor calls"),
    ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "malformed_tool_call", "tool_calls are no list but a int"),
    ({"conversations": [{"from": "gpt", "value": 1}]}, "malformed_record", "its content is a int"),
    ({"conversations": [{"from": "gpt", "value": "x"}], "tools": "{"}, "malformed_record", "tools are not JSON"),
    ({"instruction": "q", "output": None}, "malformed_record", "has no 'output'"),
    ({"instruction": "q", "output": ""}, "empty_assistant", "message 2"),
    ({"conversations": CHAT, "messages": CHAT}, "malformed_record", "both hold messages; name one in chat.schema"),
    ({"question": "q", "answer": "a", "query": "q", "response": "a"}, "malformed_record", "name one in chat.schema"),
    ({"question": "q", "answer": "B", "choices": ["x", "y"]}, "refused_key", "a part of the question"),
    ({"instruction": "q", "output": "a", "history": [3]}, "malformed_record", "history"),
    ({"question": "q", "answer": 4}, "malformed_record", "its answer is a int"),
    ({"messages": [{"role": "user", "content": "<|x|>"}, {"role": "user"}], "num_generated_tokens": 3},
     "malformed_record", "chunk 2 has no text"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "bucket", "reason"), BAD)
def test_a_bad_record_is_told_with_its_bucket_and_why(record, bucket, reason):
    with pytest.raises(BadRecord) as caught:
        read_record(record)
    assert caught.value.bucket == bucket and reason in str(caught.value)


anything = st.sampled_from(
    [None, True, 0, 1.5, "", "x", "[1]", "{}", [], [3], {}, {"x": [None]}, [["a", "b"]], [{}], {"function": 3}]
)


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


KEYS = [
    *IN_LOSS,
    *REFUSED,
    "role",
    "from",
    "content",
    "value",
    "tool_calls",
    "function_call",
    "function_calls",
    "tools",
    "name",
    "arguments",
    "type",
    "function",
    "thinking",
    "messages",
    "traj",
    "prompt",
    "completion",
    "x",
]


@settings(max_examples=600)
@given(st.sampled_from(list(RECORDS)), st.integers(0, 200), anything, st.none() | st.sampled_from(KEYS),
       st.sampled_from(["auto", *SCHEMAS]))  # fmt: skip
def test_whatever_stands_anywhere_in_a_record_is_read_or_told(name, number, value, key, schema):
    record = copy.deepcopy(RECORDS[name][0])
    paths = list(places(record))
    *above, last = paths[1:][number % (len(paths) - 1)]
    target = at(record, above)
    if key is not None and isinstance(target[last], dict):
        target, last = target[last], key
    target[last] = copy.deepcopy(value)
    try:
        assert all(messages for messages in read_record(record, schema))
    except BadRecord as error:
        assert str(error) and error.bucket
