"""Every key of a record and its messages is carried over, has no meaning for training, or is refused by its name."""

import copy
import json

import pytest

from data_tools.chats.conversation import REFUSED, BadRecord, read_record
from data_tools.chats.messages import IN_LOSS, ROLES, WITHOUT_MEANING
from tests.data_tools.conversations import CHAT, RECORDS, at, said, turns


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
        ("query and response", "problem"),
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


@pytest.mark.parametrize("key", list(WITHOUT_MEANING))
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
    places = list(speakers(record))
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
