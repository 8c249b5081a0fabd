"""One render gives what transformers renders, and the spans that TRL's hand-made training templates mark."""

import json
from datetime import date

import numpy as np
import pytest
from transformers import AutoTokenizer

from data_tools.chats.conversation import Conversation, read_record
from data_tools.chats.encoder import Encoder
from data_tools.chats.template import ChatTemplate, TemplateError
from data_tools.chats.tokenizer import load_tokenizer
from data_tools.chats.turns import Turns
from data_tools.mistake import UserMistake
from data_tools.records.shares import open_share
from tests.data_tools.chats import (
    ADDING,
    ASKED,
    CHATML,
    CONVERSATIONS,
    FOUND,
    SOLVED,
    TOOLS,
    message,
    template_of,
    tokenizer_of,
    write_tokenizer,
)
from tests.inputs import QUICK_ON_SHIPPED

DAY = date(2025, 10, 26)
# What TRL's templates have in the loss and ours have not: headers, and line feeds behind stop tokens.
LEFT = ("<|start|>assistant", "<｜Assistant｜", "<｜tool▁outputs▁end｜")
FAMILIES = ["qwen2_5", "qwen3", "gptoss", "nemotron_3_nano", "deepseekv3", "glm4moe", "llama3"]
MORE_FAMILIES = [
    "qwen3_instruct_2507",
    "nemotron_3_super",
    "cohere",
    "gemma3",
    "lfm2_v2",
    "qwen3_5_think",
    "muse_glimmer",
]
FILES = ["tau_bench/gpt-4o-airline.json", "llamafactory/glaive_toolcall_en_demo.json",
         "llamafactory/glaive_toolcall_zh_demo.json", "llamafactory/reason_tool_use_demo_50.jsonl",
         "llamafactory/v1_sft_demo.jsonl", "gsm8k/train.jsonl"]  # fmt: skip


def turns(source, tokens, arguments, day, header=None):
    return Turns(ChatTemplate(source, tokens, arguments, day), header)


def masked(template, encoder, conversation):
    """(ids, mask), None where the template refuses."""
    try:
        text, spans, _ = template.render(conversation)
    except TemplateError:
        return None
    return encoder.encode(text, [span[1:] for span in spans])


def transformers_masks(tokenizer, source, conversation):
    """apply_chat_template(return_assistant_tokens_mask=True); None where it fails."""
    try:
        out = tokenizer.apply_chat_template(
            conversation.messages,
            tools=conversation.tools,
            chat_template=source,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except Exception:
        return None
    return np.array(out["input_ids"]), np.array(out["assistant_masks"])


def same(one, other):
    return (one is None) == (other is None) and (one is None or all(map(np.array_equal, one, other)))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """(transformers' tokenizer, ours, its encoder)."""
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    ours = load_tokenizer(str(folder))
    return AutoTokenizer.from_pretrained(folder), ours, Encoder(ours, "huggingface")


def compare(name, tokenizers, conversations):
    """How many conversations TRL's template writes as the stock one does; asserts the masks are equal.

    Theirs are those of their blocks, but for what the generation prompt gives or follows the stop token.
    """
    theirs, ours, encoder = tokenizers
    tokens = {**theirs.special_tokens_map, "bos_token": theirs.bos_token or "<s>"}
    theirs.bos_token = tokens["bos_token"]
    today = date.today()  # transformers knows no other
    trained = template_of(f"{name}_training")
    stock, blocks = (turns(source, tokens, {}, today) for source in (template_of(name), trained))
    equal_texts = 0
    for conversation in conversations:
        expected = transformers_masks(theirs, trained, conversation)
        found, plain = masked(blocks, encoder, conversation), masked(stock, encoder, conversation)
        assert (found is None) == (expected is None)
        if found is None:
            continue
        assert np.array_equal(found[0], expected[0]) and (found[1] <= expected[1]).all() and found[1].sum() > 0
        edges = np.flatnonzero(np.diff(expected[1] > found[1], prepend=False, append=False)).reshape(-1, 2)
        left = {theirs.decode(found[0][start:stop]).strip() for start, stop in edges}
        assert all(any(header in text and len(text) < len(header) + 3 for header in LEFT) for text in left - {""}), left
        if plain is not None and np.array_equal(plain[0], found[0]):  # Qwen3's training template writes another text
            equal_texts += 1
            assert same(plain, found)
    return equal_texts


@pytest.mark.parametrize("name", FAMILIES + MORE_FAMILIES)
def test_masks_are_those_of_trl_and_of_transformers_generation_blocks(name, tokenizers):
    conversations = [
        Conversation(messages, TOOLS if "tool" in kind else None) for kind, messages in CONVERSATIONS.items()
    ]
    assert compare(name, tokenizers, conversations) >= 1


@pytest.fixture(scope="module", params=["qwen3_rebuilt", "gpt2_rebuilt"])
def real_tokenizers(request, tmp_path_factory, inputs):
    folder = tokenizer_of(inputs, tmp_path_factory.mktemp("real") / "tokenizer", request.param)
    ours = load_tokenizer(str(folder))
    return AutoTokenizer.from_pretrained(folder), ours, Encoder(ours, "huggingface")


@QUICK_ON_SHIPPED
@pytest.mark.parametrize("name", FAMILIES)
def test_masks_of_real_conversations_are_those_of_trl(name, inputs, real_tokenizers):
    for file in FILES:
        share = open_share(inputs.data(file), 0, 1)
        records = [record for record, _ in zip(share, range(10))]
        records = [json.loads(record) if isinstance(record, bytes) else record for record in records]
        conversations = [conversation for record in records for conversation in read_record(record)]
        assert compare(name, real_tokenizers, conversations) > (-1 if name == "qwen3" else 0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_the_text_is_what_transformers_renders_byte_for_byte(name, kind, tokenizers):
    theirs, _, _ = tokenizers
    conversation = Conversation(CONVERSATIONS[kind], TOOLS)
    template = turns(template_of(name), theirs.special_tokens_map, {"enable_thinking": False}, date.today())
    try:
        text, spans, _ = template.render(conversation)
    except TemplateError:
        with pytest.raises(Exception):  # noqa: B017  (which one is transformers' affair)
            theirs.apply_chat_template(
                conversation.messages, tools=TOOLS, chat_template=template_of(name), tokenize=False
            )
        return
    messages = list(map(template.template.form.message, conversation.messages))
    expected = theirs.apply_chat_template(
        messages, tools=TOOLS, chat_template=template_of(name), tokenize=False, enable_thinking=False
    )
    assert text.startswith(expected) and text[len(expected) :] in ("", "<|user|>", "<|observation|>")  # GLM's closing
    assert [span.message for span in spans] == [number for number, m in enumerate(messages) if m["role"] == "assistant"]


def test_a_stop_token_ends_every_turn_and_no_header_begins_one(tokenizers):
    theirs, _, _ = tokenizers
    for name in FAMILIES:
        template = turns(template_of(name), theirs.special_tokens_map, {}, DAY)
        text, spans, _ = template.render(Conversation(CONVERSATIONS["two turns"]))
        for span in spans:
            turn = text[span.start : span.stop]
            assert turn.rstrip().endswith(template.stop_texts)
            assert not turn.startswith(
                ("<|im_start|>", "<|start|>", "<|assistant|>", "<｜Assistant｜>", "<|start_header_id|>")
            )


def test_the_date_stands_still():
    template = turns(template_of("gptoss"), {}, {}, DAY)
    assert "Current date: 2025-10-26" in template.render(Conversation([ASKED, SOLVED])).text


@pytest.mark.parametrize("text", ["\ue000", "\ue0001\ue000", "\ue000\ue001\ue002" * 3, "end\ue000open"])
def test_marker_characters_in_a_conversation_do_no_harm(text):
    template = turns(CHATML, {}, {}, DAY)
    rendered, spans, _ = template.render(Conversation([message("user", text), message("assistant", f"a{text}b")]))
    assert rendered == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\na{text}b<|im_end|>\n"
    assert [rendered[span.start : span.stop] for span in spans] == [f"a{text}b<|im_end|>"]


GENERATION = (
    "{% for m in messages %}{{ m.role }}:{% IF %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endif %}\n{% endfor %}"
)
LOOP = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"


@pytest.mark.parametrize(("source", "reason"), [
    ("{% for %}", "chat template, line 1"),
    ("{{ messages[0].content }}", "generation prompt does not begin"),
    (LOOP, "generation prompt does not begin"),
    ("{% for m in messages %}{{ raise_exception('no') }}{% endfor %}", "refuses a question and an answer (no)"),
    ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>"
     "{% endif %}",
     None),  # each turn ends with the tag of the next
    (GENERATION.replace("IF", "if m.role == 'assistant'"), "would never learn to stop"),
    (GENERATION.replace("IF", "if true"), "a generation block begins before the first assistant's turn"),
])  # fmt: skip
def test_a_template_whose_turns_cannot_be_told_is_refused_in_one_line(source, reason):
    if reason is None:
        text, spans, _ = turns(source, {}, {}, DAY).render(Conversation([ASKED, SOLVED, ASKED, SOLVED]))
        assert [text[span.start : span.stop] for span in spans] == [SOLVED["content"] + "<user>"] * 2
        return
    with pytest.raises(UserMistake) as caught:
        turns(source, {}, {}, DAY)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_header_that_is_named_is_believed():
    text, spans, _ = turns(LOOP.replace("'\n'", "'<end>\n'"), {}, {}, DAY, "assistant: ").render(
        Conversation([ASKED, SOLVED])
    )
    assert [text[span.start : span.stop] for span in spans] == [SOLVED["content"] + "<end>"]
    with pytest.raises(TemplateError, match="message 2 (does not begin with chat.header|is not written behind)"):
        turns(LOOP.replace("'\n'", "'<end>\n'"), {}, {}, DAY, "asistant: ").render(Conversation([ASKED, SOLVED]))


RESULTS_INSIDE = (
    "{% for m in messages %}{% if m.role != 'tool' %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}"
    "{{ m.tool_calls[0].function.name }}={{ (loop.nextitem or m).content }}{% endif %}<end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_tools_result_within_a_turn_is_not_trained():
    template = turns(RESULTS_INSIDE, {}, {}, DAY)
    assert len(template.render(Conversation([ASKED, SOLVED, ASKED, SOLVED])).spans) == 2
    with pytest.raises(TemplateError, match="message 2 is written in another way once a message follows"):
        template.render(Conversation([ASKED, ADDING, FOUND, SOLVED]))


def test_what_a_template_raises_is_one_line():
    template = turns(template_of("gptoss"), {}, {}, DAY)
    with pytest.raises(TemplateError, match="no previous assistant message with a tool call"):
        template.render(Conversation([ASKED, message("tool", "4"), SOLVED]))


def test_templates_cannot_reach_the_interpreter():
    source = CHATML + "{{ ''.__class__.__mro__ }}"
    with pytest.raises(UserMistake, match="unsafe"):
        turns(source, {}, {}, DAY)
