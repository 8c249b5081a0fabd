"""What of a conversation is in the loss, under every option, and what is counted instead of trained."""

import functools
import json

import pytest

from data_tools.base import declared
from data_tools.chats.chat import ChatConfig, ChatRows, Encoded, Refused, check_chat
from data_tools.chats.encoder import Encoder
from data_tools.chats.tokenizer import load_tokenizer
from data_tools.mistake import UserMistake
from tests.data_tools.chats import (
    ADDING,
    ASKED,
    CONVERSATIONS,
    FOUND,
    GREEDY,
    SOLVED,
    TEMPLATES,
    THOUGHT,
    TOOLS,
    call,
    message,
    write_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(write_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture(scope="module")
def rows(tokenizer):
    """The rows of one record under a template and options."""

    @functools.cache
    def chats(template, options):
        config = ChatConfig(template=str(TEMPLATES / f"{template}.jinja") if template else "", **json.loads(options))
        return ChatRows(config, tokenizer, Encoder(tokenizer))

    def rows(messages, template="", tools=None, **options):
        return list(chats(template, json.dumps(options)).rows({"messages": messages, "tools": tools}))

    return rows


def learnt(row, tokenizer):
    """The text in the loss, a bar for what is between."""
    assert isinstance(row, Encoded), row
    parts, before = [], 0
    for number, masked in enumerate(row.mask.tolist()):
        if masked and not before:
            parts.append([])
        if masked:
            parts[-1].append(int(row.ids[number]))
        before = masked
    return "|".join(tokenizer.decode(part) for part in parts)


def test_every_turn_with_its_stop_token_is_in_the_loss_and_nothing_else(rows, tokenizer):
    (row,) = rows(CONVERSATIONS["two turns"])
    assert learnt(row, tokenizer) == SOLVED["content"] + "<|im_end|>|Yes.<|im_end|>"
    assert row.turns == 2 and row.prompt.endswith("<|im_start|>assistant\n")
    assert row.prompt + row.answer == tokenizer.decode(row.ids.tolist())


def test_the_last_turn_is_what_follows_the_last_question(rows, tokenizer):
    (row,) = rows(CONVERSATIONS["tools"], "qwen3", TOOLS, turns="last")
    text = learnt(row, tokenizer)
    assert '"arguments": {"a": 3, "b": 3}' in text and "Six." in text and "Four" not in text
    assert row.turns == 2


@pytest.mark.parametrize("template", ["qwen3", "gemma4_v5"])
def test_the_prompt_of_a_row_ends_behind_the_first_header_whichever_turns_are_trained(rows, template):
    messages = [message("user", "2?"), SOLVED, message("user", "3?"), SOLVED]
    prompts = {rows(messages, template, turns=turns)[0].prompt for turns in ("all", "last", "each")}
    assert len(prompts) == 1 and prompts.pop().endswith(("assistant\n", "model\n"))


def test_each_gives_a_row_a_question_so_that_reasoning_stays_where_a_template_would_drop_it(rows, tokenizer):
    (together,) = rows(CONVERSATIONS["thinking"], "qwen3")
    assert learnt(together, tokenizer).count("Two and two.") == 1
    apart = rows(CONVERSATIONS["thinking"], "qwen3", turns="each")
    assert ["Two and two." in learnt(row, tokenizer) for row in apart] == [True, True]
    assert [row.turns for row in apart] == [1, 1]
    assert rows(CONVERSATIONS["ends with a question"], turns="each")[1] == Refused("nothing_trained")


@pytest.mark.parametrize(
    ("template", "thought"), [("qwen3", "<think>"), ("gptoss", "analysis"), ("nemotron_3_nano", "<think>")]
)
def test_without_thinking_the_answer_alone_is_in_the_loss(rows, tokenizer, template, thought):
    (row,) = rows([ASKED, THOUGHT], template, train_thinking=False)
    text = learnt(row, tokenizer)
    assert "Two and two" not in text and thought not in text and "It is 4." in text
    assert "Two and two" in tokenizer.decode(row.ids.tolist())


THINKING = ["qwen3", "nemotron_3_nano", "glm4moe", "gptoss", "gemma4_v5"]
# Answers and thoughts that speak of tags.
SPOKEN = [
    "Use <think> to open. It ends with a slash.",
    "a </think> b",
    "<|channel|>analysis<|message|> opens, <|end|>",
    "x <think>y</think> z",
    "say <tool_call>{}</tool_call>",
    "<channel|> closes <|channel>thought",
]


@pytest.mark.parametrize("template", THINKING)
@pytest.mark.parametrize("said", SPOKEN)
def test_an_answer_that_speaks_of_tags_keeps_its_loss(rows, tokenizer, template, said):
    for messages in ([ASKED, message("assistant", said)], [ASKED, {**THOUGHT, "content": said}]):
        (whole,), (row,) = rows(messages, template), rows(messages, template, train_thinking=False)
        if not isinstance(whole, Encoded):
            assert whole.bucket in ("content_lost", "reasoning_lost", "template_error")
            continue  # the template takes the tag for its own, as below
        if said not in learnt(whole, tokenizer):
            continue
        text = learnt(row, tokenizer)
        assert said in text and "Two and two" not in text
        assert text.endswith(learnt(whole, tokenizer)[-6:])  # the stop token
        assert learnt(rows(messages, template, train_tool_calls=False)[0], tokenizer) == learnt(whole, tokenizer)


@pytest.mark.parametrize("template", THINKING)
@pytest.mark.parametrize(
    "thought", ["a <think> b", "a </think> b", "<think>a</think>", "<think>b</think></think>", "4"]
)
def test_tags_within_thoughts_let_nothing_of_them_leak(rows, tokenizer, template, thought):
    messages = [ASKED, message("assistant", "It is 5.", reasoning_content=f"first {thought} last")]
    (whole,), (row,) = rows(messages, template), rows(messages, template, train_thinking=False)
    if isinstance(whole, Encoded):
        text = learnt(row, tokenizer)
        assert "first" not in text and "last" not in text and "It is 5." in text


def test_thoughts_in_the_content_end_with_the_tag_that_closes_the_first(rows, tokenizer):
    (row,) = rows([ASKED, message("assistant", "<think>a <think>b</think> c</think>It is 4.")], train_thinking=False)
    assert learnt(row, tokenizer) == "It is 4.<|im_end|>"
    (row,) = rows([ASKED, message("assistant", "<think>a <think>b</think> It is 4.")], train_thinking=False)
    assert (row.bucket, row.reason) == ("unknown_thinking", "message 2: its <think> is never closed")


def test_calls_are_told_from_an_answer_and_from_arguments_that_speak_of_them(rows, tokenizer):
    calls = {"tool_calls": [call("add", a="</tool_call> <tool_call>"), call("add", a=2)]}
    (row,) = rows(
        [ASKED, message("assistant", "I <tool_call> now", **calls), FOUND, SOLVED],
        "qwen2_5",
        TOOLS,
        train_tool_calls=False,
    )
    text = learnt(row, tokenizer)
    assert text.split("<|im_end|>")[0].strip("\n|") == "I <tool_call> now" and "add" not in text
    unclear = message("assistant", "<tool_call>", tool_calls=[call("add", a="<tool_call>")])
    (row,) = rows([ASKED, unclear, FOUND, SOLVED], "qwen2_5", TOOLS, train_tool_calls=False)
    assert row.bucket == "unknown_tool_call"


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "gptoss", "nemotron_3_nano", "glm4moe"])
def test_without_tool_calls_the_rest_of_the_turns_is_in_the_loss(rows, tokenizer, template):
    (row,) = rows(CONVERSATIONS["tools"], template, TOOLS, train_tool_calls=False)
    text = learnt(row, tokenizer)
    assert "add" not in text and "Four" in text and "Six." in text
    assert "add" in learnt(rows(CONVERSATIONS["tools"], template, TOOLS)[0], tokenizer)


def test_thinking_and_tool_calls_that_are_not_found_are_counted_not_trained(rows):
    (row,) = rows(CONVERSATIONS["tools"], "muse_glimmer", TOOLS, train_tool_calls=False)
    assert row.bucket == "unknown_tool_call"
    (row,) = rows([ASKED, THOUGHT], "muse_glimmer", train_thinking=False)
    assert row.bucket == "unknown_thinking"


def test_messages_that_the_data_weighs_0_are_not_in_the_loss(rows, tokenizer):
    messages = [
        ASKED,
        {**SOLVED, "loss_weight": 0.0},
        message("user", "Sure?"),
        message("assistant", "Yes.", loss_weight=1.0),
    ]
    assert learnt(rows(messages)[0], tokenizer) == "Yes.<|im_end|>"


def test_template_arguments_come_from_the_config_and_over_it_from_the_row(tokenizer):
    config = ChatConfig(
        template=str(TEMPLATES / "gptoss.jinja"), arguments={"reasoning_effort": "low"}, date="2025-10-26"
    )
    chats = ChatRows(config, tokenizer, Encoder(tokenizer))
    plain, own = (
        {"messages": [ASKED, SOLVED], **more} for more in ({}, {"chat_template_kwargs": {"reasoning_effort": "high"}})
    )
    assert (
        "Reasoning: low" in next(chats.rows(plain)).prompt
        and "Current date: 2025-10-26" in next(chats.rows(plain)).prompt
    )
    assert "Reasoning: high" in next(chats.rows(own)).prompt


def test_rows_that_a_template_has_written_are_trained_by_their_chunks(tokenizer):
    chunks = [
        ("system", "<|im_start|>system\nS<|im_end|>\n"),
        ("user", "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"),
        ("assistant", "A<|im_end|>\n"),
        ("tool", "x"),
    ]
    record = {"messages": [{"role": role, "content": text} for role, text in chunks * 2]}
    found = list(ChatRows(ChatConfig(schema="rendered"), tokenizer, Encoder(tokenizer)).rows(record))
    assert [learnt(row, tokenizer) for row in found] == ["A<|im_end|>\n"] * 2
    assert tokenizer.decode(found[0].ids.tolist()) == "".join(text for _, text in chunks)


@pytest.mark.parametrize(("messages", "template", "bucket", "reason"), [
    ([ASKED, message("tool", "4"), SOLVED], "gptoss", "template_error",
     "the chat template refuses it: Message has tool role"),
    ([ASKED, ADDING, FOUND, SOLVED], "", "tool_call_lost", "message 2: the chat template leaves out a call of add"),
    ([ASKED, message("assistant", "", tool_calls=[call("add"), call("add")])], "gptoss", "tool_call_lost",
     "leaves out a call of add"),
    ([ASKED, {**SOLVED, "content": "a\ud800"}], "", "not_unicode", "not Unicode"),
    ([ASKED, {**SOLVED, "weight": 0}], "", "nothing_trained", ""),
])  # fmt: skip
def test_what_would_be_trained_wrongly_is_counted_with_the_reason(rows, messages, template, bucket, reason):
    (row,) = rows(messages, template)
    assert (row.bucket, reason in row.reason) == (bucket, True)


def test_the_verifier_finds_a_tools_result_in_the_loss(tmp_path, tokenizer):
    (tmp_path / "t.jinja").write_text(GREEDY)
    chats = ChatRows(ChatConfig(template=str(tmp_path / "t.jinja")), tokenizer, Encoder(tokenizer))
    with pytest.raises(UserMistake, match="message 3, of role tool, is in the loss"):
        list(chats.rows({"messages": [ASKED, SOLVED, FOUND, SOLVED]}))


def test_the_verifier_finds_a_mask_that_is_off(tokenizer, monkeypatch):
    chats = ChatRows(ChatConfig(), tokenizer, Encoder(tokenizer))
    encode = chats.encoder.encode
    monkeypatch.setattr(chats.encoder, "encode", lambda text, spans: encode(text, [(a + 9, b) for a, b in spans]))
    with pytest.raises(UserMistake, match="message 2 is not in the loss as it was written"):
        list(chats.rows({"messages": [ASKED, SOLVED]}))


UNENDED = (  # its block holds no stop token where a text stands beside a call
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{% if not (m.content and m.tool_calls) %}<|im_end|>{% endif %}{% endgeneration %}{% else %}{{ m.content }}"
    "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_turn_whose_generation_blocks_hold_no_stop_token_is_trained_in_no_row(tmp_path, tokenizer):
    (tmp_path / "t.jinja").write_text(UNENDED)
    chats = ChatRows(ChatConfig(template=str(tmp_path / "t.jinja")), tokenizer, Encoder(tokenizer))
    ended, unended = ([ASKED, {**ADDING, "content": text}, FOUND, SOLVED] for text in ("", "Let me add."))
    for _ in range(3):  # the verifier looks at one row of many
        (row,) = chats.rows({"messages": ended})
        assert learnt(row, tokenizer).count("<|im_end|>") == 2
        (refused,) = chats.rows({"messages": unended})
        assert refused.bucket == "turn_unclear" and "generation blocks of message 2" in refused.reason
    (row,) = chats.rows({"messages": [ASKED, {**unended[1], "weight": 0}, FOUND, SOLVED]})
    assert learnt(row, tokenizer) == SOLVED["content"] + "<|im_end|>"


def test_a_tokenizer_without_a_template_is_told_what_to_name(tmp_path):
    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path, template=None)))
    with pytest.raises(UserMistake, match="has no chat template; name a file in chat.template"):
        ChatRows(ChatConfig(), tokenizer, Encoder(tokenizer))


def test_wrong_values_are_told_at_once():
    problems = declared.check_with(ChatConfig(schema="openai", turns="lsat", date="today"), check_chat)
    assert [problem.where for problem in problems] == ["schema", "turns", "date"]
    assert "did you mean last?" in problems[1].message
    problems = check_chat(ChatConfig(arguments={"add_generation_prompt": True, "enable_thinking": False, "tools": []}))
    assert [problem.where for problem in problems] == ["arguments.tools", "arguments.add_generation_prompt"]
    assert not check_chat(ChatConfig())
