"""No field of a message is lost in silence: a template that leaves one out has the row refused by the field's name."""

import functools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.base import declared
from data_tools.chats.chat import ChatConfig, ChatRows, Encoded
from data_tools.chats.encoder import Encoder
from data_tools.chats.tokenizer import load_tokenizer
from tests.data_tools.chats import TEMPLATES, TOOLS, call, message, write_tokenizer

# Writes everything, but what the argument `drop` names.
LEAKY = """
{%- for tool in tools or [] %}{% if drop != 'tools' %}<tool>{{ tool.function.name }}</tool>{% endif %}{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{%- if m.name and drop != 'name' %} {{ m.name }}{% endif %}
{% if m.reasoning_content and drop != 'reasoning' and (drop != 'reasoning of calls' or not m.tool_calls) -%}
<think>{{ m.reasoning_content }}</think>{% endif %}
{%- if drop != m.role and (drop != 'content of calls' or not m.tool_calls) %}{{ m.content }}{% endif %}
{%- for c in m.tool_calls or [] %}<tool_call>{{ c.function.name if drop != 'calls' }}
{%- if drop != 'arguments' %}{{ c.function.arguments | tojson }}{% endif %}</tool_call>{% endfor %}
{%- if drop == 'second call' and m.tool_calls %}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
FULL = [
    message("system", "be terse"),
    message("user", "what is it?"),
    message(
        "assistant",
        "let me see",
        reasoning_content="a sum",
        thinking="a sum",
        tool_calls=[{**call("add", a=2, b="two"), "id": "c1"}],
    ),
    message("tool", "four", name="add", tool_call_id="c1"),
    message("assistant", "it is 4", reasoning_content="done", thinking="done"),
]
WITHOUT = {  # of FULL: what is to be left out of it so that the leaky template loses nothing
    "tools": "tools", "reasoning": "reasoning", "reasoning of calls": "reasoning", "system": "content",
    "user": "content", "assistant": "turn", "tool": "content", "content of calls": "content", "calls": "tool_call",
    "arguments": "tool_call"}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(write_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture(scope="module")
def leaky(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("template") / "leaky.jinja"
    path.write_text(LEAKY)

    @functools.cache
    def chats(drop, may_lose):
        config = ChatConfig(schema="messages", template=str(path), arguments={"drop": drop}, may_lose=list(may_lose))
        return ChatRows(config, tokenizer, Encoder(tokenizer))

    def rows(drop, messages, tools=TOOLS, may_lose=()):
        return list(chats(drop, tuple(may_lose)).rows({"messages": messages, "tools": tools}))

    return rows


def test_a_template_that_writes_everything_loses_nothing(leaky):
    (row,) = leaky("nothing", FULL)
    assert isinstance(row, Encoded) and row.turns == 2


@pytest.mark.parametrize("drop", WITHOUT)
def test_a_field_that_is_left_out_is_named(leaky, drop):
    if drop == "assistant":  # then no answer is written at all
        with pytest.raises(Exception, match="does not write an assistant's answer|generation prompt does not begin"):
            leaky(drop, FULL)
        return
    (row,) = leaky(drop, FULL)
    assert row.bucket == f"{WITHOUT[drop]}_lost" and "leaves out" in row.reason, row


@given(
    st.lists(
        st.sampled_from(["a", "word", " ", "\n", '"', "\\", "é", "<think>", "</think>", "{", "4"]),
        min_size=1,
        max_size=6,
    )
    .map("".join)
    .filter(str.strip),
    st.sampled_from(["user", "tool", "reasoning", "arguments"]),
)
def test_short_and_odd_texts_are_found_lost_too(leaky, text, drop):
    """A text that by chance stands in what the template writes anyway is no proof that the field was written."""
    thought = {"reasoning_content": text, "thinking": text}
    messages = [
        message("user", text),
        message("assistant", "a", tool_calls=[call("add", a=text)], **thought),
        message("tool", text),
        message("assistant", "word 4"),
    ]
    (row,) = leaky(drop, messages)
    assert row.bucket == {"arguments": "tool_call_lost", "reasoning": "reasoning_lost"}.get(drop, "content_lost")
    (row,) = leaky("nothing", messages)
    assert isinstance(row, Encoded), row


def test_a_tools_result_may_be_written_as_json(tmp_path, tokenizer):
    (tmp_path / "t.jinja").write_text(LEAKY.replace("{{ m.content }}", "{{ m.content | tojson }}"))
    config = ChatConfig(template=str(tmp_path / "t.jinja"))
    (row,) = ChatRows(config, tokenizer, Encoder(tokenizer)).rows(
        {"messages": [message("user", 'say "é\n"'), message("assistant", '"é"')]}
    )
    assert isinstance(row, Encoded), row


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3_instruct_2507", "llama3_1", "cohere2", "gemma3", ""])
def test_reasoning_that_a_template_does_not_write_is_refused_put_into_the_content_or_left_out_as_asked(
    tokenizer, template
):
    messages = [message("user", "2+2?"), message("assistant", "It is 4.", reasoning_content="Two and\ntwo.")]
    file = str(TEMPLATES / f"{template}.jinja") if template else ""

    def row_of(**options):
        (row,) = ChatRows(ChatConfig(template=file, **options), tokenizer, Encoder(tokenizer)).rows(
            {"messages": messages}
        )
        return row

    refused = row_of()
    assert refused.bucket == "reasoning_lost" and "chat.inline_reasoning: true" in refused.reason
    assert "chat.may_lose: [reasoning]" in refused.reason
    inline, without = row_of(inline_reasoning=True), row_of(may_lose=["reasoning"])
    assert _learnt(inline, tokenizer).startswith("<think>\nTwo and\ntwo.\n</think>\n\nIt is 4.")
    assert _learnt(without, tokenizer).startswith("It is 4.")
    answer_alone = row_of(inline_reasoning=True, train_thinking=False)
    assert answer_alone.ids.tolist() == inline.ids.tolist()
    assert _learnt(answer_alone, tokenizer).strip().startswith("It is 4.")


def _learnt(row, tokenizer):
    assert isinstance(row, Encoded), row
    return tokenizer.decode(row.ids[row.mask == 1].tolist())


def test_reasoning_that_a_template_cuts_out_of_the_content_is_lost_in_the_last_turn_alone(tmp_path, tokenizer):
    (tmp_path / "t.jinja").write_text(LEAKY.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"))
    chats = ChatRows(ChatConfig(template=str(tmp_path / "t.jinja")), tokenizer, Encoder(tokenizer))
    thinking = message("assistant", "<think>so be it</think>yes")
    plain = message("assistant", "yes")
    (row,) = chats.rows({"messages": [message("user", "?"), plain, message("user", "?"), thinking]})
    assert row.bucket == "reasoning_lost"
    (row,) = chats.rows({"messages": [message("user", "?"), thinking, message("user", "?"), plain]})
    assert isinstance(row, Encoded)


def test_names_matter_where_people_have_them_and_where_results_are_out_of_order(leaky):
    named = [message("user", "who?", name="ann"), message("assistant", "you")]
    calls = [{**call("add", a=number), "id": f"c{number}"} for number in (1, 2)]
    results = [message("tool", f"result {number}", tool_call_id=f"c{number}") for number in (1, 2)]
    turns = [message("user", "?"), message("assistant", "", tool_calls=calls)]
    for messages, options, bucket in (
        (named, {}, "name_lost"),
        (named, {"may_lose": ["name"]}, None),
        ([*turns, *results], {}, None),
        ([*turns, *results[::-1]], {}, "name_lost"),
        ([*turns, *results[::-1]], {"may_lose": ["name"]}, None),
    ):
        (row,) = leaky("name", messages, **options)
        assert getattr(row, "bucket", None) == bucket, row
    assert isinstance(leaky("nothing", named)[0], Encoded)


@pytest.mark.parametrize(("template", "is_told"), [("qwen2_5", False), ("gemma4_v5", True), ("gptoss", False)])
def test_results_out_of_order_are_kept_where_the_template_says_whose_they_are(tokenizer, template, is_told):
    calls = [{**call(name, a=1), "id": f"c{name}"} for name in ("add", "multiply")]
    results = [message("tool", f"result of {name}", tool_call_id=f"c{name}") for name in ("multiply", "add")]
    messages = [message("user", "?"), message("assistant", "", tool_calls=calls), *results, message("assistant", "yes")]
    config = ChatConfig(template=str(TEMPLATES / f"{template}.jinja"), may_lose=["tools"])
    (row,) = ChatRows(config, tokenizer, Encoder(tokenizer)).rows({"messages": messages})
    assert isinstance(row, Encoded) if is_told else row.bucket in ("name_lost", "tool_call_lost"), row


def test_what_becomes_of_a_row_does_not_depend_on_the_rows_before_it(tmp_path, tokenizer):
    """Shapes are remembered, so rows of one shape with other texts come in both orders."""
    (tmp_path / "t.jinja").write_text(LEAKY.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"))
    config = ChatConfig(template=str(tmp_path / "t.jinja"))
    records = [
        {"messages": [message("user", asked), message("assistant", said)]}
        for asked, said in (("2", "4"), ("a</think>2", "4"), ("2", "<think>a</think>4"), ("4", "2"), ("</think>", "4"))
    ]
    found = []
    for order in (records, records[::-1]):
        chats = ChatRows(config, tokenizer, Encoder(tokenizer))
        rows = {json.dumps(record): list(chats.rows(record))[0] for record in order}
        found.append([getattr(rows[json.dumps(record)], "bucket", "kept") for record in records])
    assert found[0] == found[1] == ["kept", "content_lost", "reasoning_lost", "kept", "content_lost"]


def test_an_unknown_field_is_named():
    (problem,) = declared.check(ChatConfig(may_lose=["resoning"]))
    assert problem.where == "may_lose[0]" and "did you mean reasoning?" in problem.message
