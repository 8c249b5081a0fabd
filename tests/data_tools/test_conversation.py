"""Every schema met in the wild becomes the one form of conversation; what does not is told with its bucket."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.conversation import BadRecord, detect_schema, read_record


def turns(record, schema="auto"):
    """(role, content, reasoning, [(function, arguments)]) of each message."""
    (conversation,) = read_record(record, schema)
    return [(message["role"], message["content"], message.get("reasoning_content", ""),
             [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])])
            for message in conversation.messages]  # fmt: skip


def said(role, content, reasoning="", calls=()):
    return role, content, reasoning, list(calls)


ANSWER = said("assistant", "4")
RECORDS = {
    "openai": (
        {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "2+2?"},
                      {"role": "assistant", "content": None, "tool_calls": [
                          {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}]},
                      {"role": "tool", "tool_call_id": "c1", "content": "4"}, {"role": "assistant", "content": "4"}]},
        [said("system", "Be brief."), said("user", "2+2?"), said("assistant", "", calls=[("add", {"a": 2})]),
         said("tool", "4"), ANSWER]),
    "openai parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+"}, "2?"]},
                      {"role": "assistant", "content": [{"type": "output_text", "text": "4"}]}]},
        [said("user", "2+2?"), ANSWER]),
    "typed parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "value": "2+2?"}]},
                      {"role": "assistant", "content": [
                          {"type": "reasoning", "value": "Hm."},
                          {"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 2}}'}]}]},
        [said("user", "2+2?"), said("assistant", "", "Hm.", [("add", {"a": 2})])]),
    "tau-bench": ({"task_id": 1, "traj": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
                  [said("user", "2+2?"), ANSWER]),
    "openresearcher": (
        {"messages": [{"content": "Search.", "reasoning_content": None, "role": "system", "tool_call_id": None,
                       "tool_calls": None},
                      {"content": "2+2?", "reasoning_content": None, "role": "user", "tool_call_id": None,
                       "tool_calls": None},
                      {"content": "", "reasoning_content": "Look.", "role": "assistant", "tool_call_id": None,
                       "tool_calls": [
                           {"function": {"arguments": '{"q": "2"}', "name": "browser.search"}, "id": "call_00000001",
                            "type": "function"}]},
                      {"content": "4", "reasoning_content": None, "role": "tool", "tool_call_id": "call_00000001",
                       "tool_calls": None},
                      {"content": "4", "reasoning_content": "So.", "role": "assistant", "tool_call_id": None,
                       "tool_calls": None}],
         "tools": [], "correct": True},
        [said("system", "Search."), said("user", "2+2?"),
         said("assistant", "", "Look.", [("browser.search", {"q": "2"})]), said("tool", "4"),
         said("assistant", "4", "So.")]),
    "multilingual-thinking": (
        {"messages": [{"role": "system", "content": "reasoning language: German", "thinking": None},
                      {"role": "user", "content": "2+2?", "thinking": None},
                      {"role": "assistant", "content": "4", "thinking": "Zwei."}], "reasoning_language": "German"},
        [said("system", "reasoning language: German"), said("user", "2+2?"), said("assistant", "4", "Zwei.")]),
    "smoltalk": (
        {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], "source": "x",
         "chat_template_kwargs": {"enable_thinking": False}}, [said("user", "2+2?"), ANSWER]),
    "dolci": (
        {"messages": [{"role": "system", "content": "S", "functions": '[{"name": "add"}]', "function_calls": None},
                      {"role": "user", "content": "2+2?", "functions": None, "function_calls": None},
                      {"role": "assistant", "content": "", "function_calls": "add(a=2, b=[1])\nmath.sub(x='y')",
                       "functions": None},
                      {"role": "environment", "content": "4", "functions": None, "function_calls": None}],
         "source": "x"},
        [said("system", "S"), said("user", "2+2?"),
         said("assistant", "", calls=[("add", {"a": 2, "b": [1]}), ("math.sub", {"x": "y"})]),
         said("tool", "4")]),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "2+2?"},
                           {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                           {"from": "observation", "value": "4"}, {"from": "gpt", "value": "4"}],
         "tools": '[{"name": "add"}]', "system": "S"},
        [said("system", "S"), said("user", "2+2?"), said("assistant", "", calls=[("add", {"a": 2})]), said("tool", "4"),
         ANSWER]),
    "openthoughts": (
        {"system": "Think.", "conversations": [{"from": "user", "value": "2+2?"}, {
            "from": "assistant",
            "value": "<|begin_of_thought|>\n\nTwo.\n\n<|end_of_thought|>\n\n"
                     "<|begin_of_solution|>\n\n4\n\n<|end_of_solution|>"}]},
        [said("system", "Think."), said("user", "2+2?"), said("assistant", "4", "Two.")]),
    "alpaca": (
        {"instruction": "Add.", "input": "2, 2", "output": "4", "history": [["Hi", "Hello"]]},
        [said("user", "Hi"), said("assistant", "Hello"), said("user", "Add.\n2, 2"), ANSWER]),
    "gsm8k": ({"question": "2+2?", "answer": "4"}, [said("user", "2+2?"), ANSWER]),
}  # fmt: skip


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
    messages = [{"role": "system", "content": "a"}, {"role": "system", "content": "b"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "x", "loss_weight": 0.0},
                {"role": "assistant", "content": "y", "weight": 1}]
    (conversation,) = read_record({"messages": messages})
    assert conversation.messages[0]["content"] == "a\n\nb" and conversation.untrained == {2}


def test_a_packed_line_is_several_conversations_and_a_materialized_one_is_one():
    chunks = [("system", "<|im_start|>system\nS<|im_end|>\n"), ("user", "<|im_start|>user\nQ"),
              ("assistant", "A<|im_end|>\n")]
    line = {"messages": [{"role": role, "content": text} for role, text in chunks], "num_generated_tokens": 9}
    assert read_record(line) == [chunks]
    assert read_record({"messages": line["messages"] * 3}) == [chunks] * 3


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
    ({"messages": [{"role": "assistant", "content": "x", "loss_weight": 0.5}]}, "malformed_record", "loss weight 0.5"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
     "malformed_tool_call", "f: arguments are not JSON"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]}, "malformed_tool_call",
     "without a name"),
    ({"messages": [{"role": "assistant", "function_calls": "f(1"}]}, "malformed_tool_call", "neither JSON nor calls"),
    ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "malformed_tool_call", "tool_calls are no list but a int"),
    ({"conversations": [{"from": "gpt", "value": 1}]}, "malformed_record", "its value is a int"),
    ({"conversations": [{"from": "gpt", "value": "x"}], "tools": "{"}, "malformed_record", "tools are not JSON"),
    ({"instruction": "q", "output": None}, "empty_assistant", "message 2"),
    ({"instruction": "q", "output": "a", "history": [3]}, "malformed_record", "history"),
    ({"question": "q", "answer": 4}, "malformed_record", "its answer is a int"),
    ({"messages": [{"role": "user", "content": "<|x|>"}, {"role": "user"}]}, "malformed_record", "chunk 2 has no text"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "bucket", "reason"), BAD)
def test_a_bad_record_is_told_with_its_bucket_and_why(record, bucket, reason):
    with pytest.raises(BadRecord) as caught:
        read_record(record)
    assert caught.value.bucket == bucket and reason in str(caught.value)


anything = st.sampled_from(
    [None, True, 0, 1.5, "", "x", "[1]", "{}", [], [3], {}, {"x": [None]}, [["a", "b"]], [{}], {"function": 3}])


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@settings(max_examples=300)
@given(st.sampled_from(list(RECORDS)), st.integers(0, 200), anything)
def test_whatever_stands_anywhere_in_a_record_is_read_or_told(name, number, value):
    record = copy.deepcopy(RECORDS[name][0])
    *above, last = list(places(record))[1:][number % (len(list(places(record))) - 1)]
    target = record
    for key in above:
        target = target[key]
    target[last] = value
    try:
        assert all(messages for messages in read_record(record))
    except BadRecord as error:
        assert str(error) and error.bucket
