"""Every schema met in the wild becomes the one form of conversation; what does not is told with its bucket."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.chats.conversation import REFUSED, SCHEMAS, BadRecord, detect_schema, read_record
from data_tools.chats.messages import IN_LOSS, ROLES, WITHOUT_MEANING


def turns(record, schema="auto"):
    """(role, content, reasoning, [(function, arguments)]) of each message."""
    (conversation,) = read_record(record, schema)
    return [(message["role"], message["content"], message.get("reasoning_content", ""),
             [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])])
            for message in conversation.messages]  # fmt: skip


def said(role, content, reasoning="", calls=()):
    return role, content, reasoning, list(calls)


ANSWER = said("assistant", "4")
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
THOUGHT = "<|begin_of_thought|>\nT\n<|end_of_thought|>"
SOLUTION = "<|begin_of_solution|>S <b><|end_of_solution|>"
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
    "sharegpt with fields": (
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "So:", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]},
                           {"from": "tool", "value": "4"},
                           {"from": "gpt", "value": "4", "reasoning_content": "Two."}]},
        [said("user", "2+2?"), said("assistant", "So:", calls=[("add", {"a": 2})]), said("tool", "4"),
         said("assistant", "4", "Two.")]),
    "openai's old functions": (
        {"messages": [{"role": "user", "content": "2+2?"},
                      {"role": "assistant", "content": None,
                       "function_call": {"name": "add", "arguments": '{"a": 2}'}},
                      {"role": "function", "name": "add", "content": "4"}, {"role": "assistant", "content": "4"}],
         "functions": [{"name": "add"}]},
        [said("user", "2+2?"), said("assistant", "", calls=[("add", {"a": 2})]), said("tool", "4"), ANSWER]),
    "ms-swift": (
        {"messages": [{"role": "user", "content": "2+2?"},
                      {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 2}}'},
                      {"role": "tool_call", "content": '{"name": "sub", "arguments": {"a": 1}}'},
                      {"role": "tool_response", "content": {"sum": 4, "é": [1]}},
                      {"role": "assistant", "content": "4"}],
         "tools": '[{"name": "add"}]'},
        [said("user", "2+2?"), said("assistant", "", calls=[("add", {"a": 2}), ("sub", {"a": 1})]),
         said("tool", '{"sum": 4, "é": [1]}'), ANSWER]),
    "messages as text": (
        {"messages": '[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]'},
        [said("user", "2+2?"), ANSWER]),
    "query and response": (
        {"query": "2+2?", "response": "4", "system": "S", "history": [["Hi", "Hello"]]},
        [said("system", "S"), said("user", "Hi"), said("assistant", "Hello"), said("user", "2+2?"), ANSWER]),
    "prompt and completion": ({"prompt": "2+2?", "completion": "4"}, [said("user", "2+2?"), ANSWER]),
    "prompt and completion as messages": (
        {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]},
        [said("user", "2+2?"), ANSWER]),
    "openthoughts' metadata": (
        {"problem": "2+2?", "deepseek_reasoning": "Two.", "deepseek_solution": "4", "ground_truth_solution": "$4$",
         "domain": "math"}, [said("user", "2+2?"), said("assistant", "4", "Two.")]),
    "wildchat": (
        {"conversation": [{"role": "user", "content": "2+2?", "language": "English", "toxic": False, "country": "CH",
                           "hashed_ip": "x", "header": {"a": 1}, "turn_identifier": 1, "timestamp": None},
                          {"role": "assistant", "content": "4", "redacted": False}]}, [said("user", "2+2?"), ANSWER]),
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


# -- every key counts -------------------------------------------------------------------------------------------------


def mappings(value, path=()):
    """(path, mapping) of all messages, parts, calls and tools within a record, but not what templates print whole."""
    if isinstance(value, dict):
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if key not in ("arguments", "parameters", "header") and path[-2:-1] != ("function",):
            yield from mappings(item, (*path, key))


def inner(record):
    """Those mappings of a record that are read key by key: all but itself and what stands in a tool's function."""
    for path, mapping in mappings(record):
        wholes = path[0:1] in (("tools",), ("functions",), ("chat_template_kwargs",)) or path[-1:] == ("content",)
        if path and not wholes:
            yield path, mapping


MESSAGES = [(name, path) for name in RECORDS for path, _ in inner(RECORDS[name][0])]


def at(record, path):
    for key in path:
        record = record[key]
    return record


def test_the_sweep_reaches_messages_parts_calls_and_functions_of_every_schema():
    depths = {name: {len(path) for found, path in MESSAGES if found == name} for name in RECORDS}
    assert {2} <= depths["tau-bench"] and {2, 4, 5} <= depths["openai"] and {2, 4} <= depths["typed parts"]
    lists = [
        name
        for name, (record, _) in RECORDS.items()
        if any(isinstance(value, list) and key != "history" for key, value in record.items())
    ]
    assert all(depths[name] for name in lists)


@pytest.mark.parametrize(("name", "path"), MESSAGES, ids=str)
def test_a_key_that_is_not_understood_is_refused_by_name_wherever_it_stands(name, path):
    record = copy.deepcopy(RECORDS[name][0])
    at(record, path)["emphasis"] = None
    assert turns(record) == RECORDS[name][1]  # Parquet spells what is absent as null
    at(record, path)["emphasis"] = 1
    with pytest.raises(BadRecord, match=r"key 'emphasis' \(a int\): is not understood; take it out") as caught:
        read_record(record)
    assert caught.value.bucket == "refused_key"


VALUES = {"reasoning_content": "WHY", "name": "WHO", "tool_call_id": "WHOSE"}  # what a message may hold beside a text
MERGED = {  # messages of which one is made, each with the keys that it may have
    "calls": ([{"role": "function_call", "content": json.dumps({"name": name})} for name in ("f", "g", "h")], VALUES),
    "systems": ([{"role": "system", "content": text} for text in "abc"], ("name", "tool_call_id")),
}  # fmt: skip


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, (_, keys) in MERGED.items() for key in keys])
def test_what_messages_hold_that_are_made_one_is_carried_or_refused_by_name(kind, key, place):
    messages = copy.deepcopy(MERGED[kind][0])
    (whole,) = read_record({"messages": [*messages, *CHAT]})
    messages[place][key] = VALUES[key]
    try:
        assert VALUES[key] in json.dumps(read_record({"messages": [*messages, *CHAT]})[0].messages)
    except BadRecord as error:  # a tool_call_id of any but a tool is refused alike
        assert error.bucket == "refused_key" and f"message {place + 1}: key {key!r}" in str(error)
    assert len(whole.messages) == 1 + len(CHAT)


@pytest.mark.parametrize(
    "name, key",
    [
        ("query and response", "instruction"),
        ("gsm8k", "prompt"),
        ("gsm8k", "messages"),
        ("prompt and completion", "conversations"),
    ],
)
def test_another_question_beside_a_pair_of_texts_is_not_dropped(name, key):
    given = {"role": ["user"], "content": ["Q"]} if key in ("messages", "conversations") else "Into French:"
    with pytest.raises(BadRecord, match=rf"{key}.*\ba (str|dict)"):
        read_record({**RECORDS[name][0], key: given})


@pytest.mark.parametrize("key", ["messages", "tools", "documents", "add_generation_prompt"])
def test_a_row_does_not_set_what_rendering_sets_for_every_row(key):
    for value, is_refused in ((True, True), (False, False)):
        record = {"messages": CHAT, "chat_template_kwargs": {key: value}}
        if is_refused:
            with pytest.raises(BadRecord, match=f"chat_template_kwargs: '{key}' is no argument"):
                read_record(record)
        elif key == "add_generation_prompt":
            assert read_record(record)[0].arguments == {key: False}


@pytest.mark.parametrize("tool, told", [
    ({"type": "function", "function": {"name": "f"}, "emphasis": 1}, "tool 2: key 'emphasis'"),
    ({"type": "retrieval", "name": "f"}, "tool 2: its type is 'retrieval'"),
    ({"parameters": {}}, "tool 2 is no function"),
])  # fmt: skip
def test_what_wraps_a_tool_is_understood_or_refused(tool, told):
    with pytest.raises(BadRecord, match=told):
        read_record({"messages": CHAT, "tools": [{"type": "function", "name": "g"}, tool]})


@pytest.mark.parametrize("key", [key for key in WITHOUT_MEANING])
def test_keys_without_meaning_are_left_out(key):
    assert turns({"messages": [CHAT[0], {**CHAT[1], key: "x"}]}) == turns({"messages": CHAT})


@pytest.mark.parametrize("key", ["role", "content"])
def test_a_message_without_its_role_or_its_text_is_malformed_and_never_empty(key):
    for name, other in (("messages", {"role": "user", "content": "q"}), ("sharegpt", {"from": "human", "value": "q"})):
        place = "messages" if name == "messages" else "conversations"
        own = list(other)[("role", "content").index(key)]
        for value in ({}, {own: None}, {"text": "q"}):
            spoiled = {**{k: v for k, v in other.items() if k != own}, **value}
            for record in ({place: [spoiled, CHAT[1]]}, {place: [*CHAT, spoiled, CHAT[1]]}):
                with pytest.raises(BadRecord, match=f"has no '{'role' if own == 'from' else own}'"):
                    read_record(record)


def speakers(record):
    """The paths of what assistants say, in any schema."""
    for path, mapping in inner(record):
        if ROLES.get(str(mapping.get("role", mapping.get("from")))) == "assistant":
            yield path


@pytest.mark.parametrize("key", IN_LOSS)
@pytest.mark.parametrize("name", RECORDS)
def test_what_the_data_keeps_out_of_the_loss_is_known_by_number_in_every_schema(name, key):
    record, expected = RECORDS[name]
    numbers = [number for number, (role, *_) in enumerate(expected) if role == "assistant"]
    (whole,) = read_record({**record, key: False})
    assert set(numbers) <= whole.untrained
    (plain,) = read_record({**record, key: 1.0})
    assert plain == read_record(record)[0]
    places = [path for path in speakers(record)]
    if name == "ms-swift":
        places = places[1:]  # two calls that are one turn
    for path, number in zip(places, numbers):
        for value in (0, 0.0, False):
            spoiled = copy.deepcopy(record)
            at(spoiled, path)[key] = value
            if name == "ms-swift" and path == places[0]:
                at(spoiled, (path[0], path[1] - 1))[key] = value
            (conversation,) = read_record(spoiled)
            assert conversation.untrained & set(numbers) == {number}
        for value in (0.5, "0", "false", 2, [0]):
            spoiled = copy.deepcopy(record)
            at(spoiled, path)[key] = value
            with pytest.raises(BadRecord, match=f"{key} .* is no yes or no"):
                read_record(spoiled)


@pytest.mark.parametrize("message, told", [
    ({"role": "user", "content": "q", "train": True}, "train puts a user's text into the loss"),
    ({"role": "assistant", "content": "a", "weight": 1, "loss": False}, "weight and loss contradict one another"),
    ({"role": "assistant", "content": "a", "label": False}, "key 'label' .* no yes or no to the loss"),
    ({"role": "assistant", "content": "a", "train_detail": [{"begin_offset": 0}]}, "parts of a turn are in the loss"),
    ({"role": "user", "content": "q", "reasoning_content": "r"}, "only an assistant has any"),
    ({"role": "assistant", "content": "a", "thinking": "x", "reasoning": "y"}, "its reasoning stand there twice"),
    ({"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "reasoning", "text": "b"}]},
     "reasoning after text"),
    ({"role": "assistant", "content": "", "function_calls": "f(1)"}, "calls with named arguments"),
    ({"role": "assistant", "content": "", "function_calls": "x = f(a=1)"}, "calls with named arguments"),
    ({"role": "tool_call", "content": []}, "no call, though its role says that it is one"),
    ({"role": "assistant", "tool_calls": [{"type": "custom", "name": "f"}]}, "its type is 'custom'"),
])  # fmt: skip
def test_what_has_no_form_here_is_refused_with_the_reason(message, told):
    with pytest.raises(BadRecord, match=told):
        read_record({"messages": [*CHAT, message, CHAT[1]]})


@pytest.mark.parametrize("key", REFUSED)
@pytest.mark.parametrize("name", ["openai", "tau-bench", "sharegpt", "gsm8k", "query and response"])
def test_columns_that_would_change_what_is_trained_are_refused_by_name_and_others_are_not_read(name, key):
    record = {**RECORDS[name][0], "category": "x", "reward": 0.0, "score": [1]}
    record.pop("history", None)
    for nothing in (None, "", [], {}):
        assert read_record({**record, key: nothing}) == read_record(record)
    if key == "history" and name not in ("openai", "tau-bench", "sharegpt"):
        return  # is read there
    with pytest.raises(BadRecord, match=f"record: key '{key}'") as caught:
        read_record({**record, key: "x"})
    assert caught.value.bucket == "refused_key"


@pytest.mark.parametrize("name", ["openai", "sharegpt", "prompt and completion as messages"])
def test_keys_that_the_settings_name_are_left_out_of_records_and_messages(name):
    record = copy.deepcopy(RECORDS[name][0])
    for path in list(speakers(record)):
        at(record, path)["emphasis"] = at(record, path)["label"] = 1
    record["chosen"] = record["emphasis"] = [1]
    (left,) = read_record(record, "auto", ["emphasis", "label", "chosen"])
    assert left == read_record(RECORDS[name][0])[0]
    for ignored in (["emphasis", "label"], ["emphasis", "chosen"], ["label", "chosen"]):
        with pytest.raises(BadRecord, match="name it in chat.ignored"):
            read_record(record, "auto", ignored)


def test_a_systems_text_beside_the_messages_comes_first_and_is_said_once():
    for key in ("system", "system_prompt"):
        assert turns({"messages": CHAT, key: "S"})[0] == said("system", "S")
        inside = [{"role": "system", "content": "S"}, *CHAT]
        assert turns({"messages": inside, key: "S"}) == turns({"messages": inside})


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
