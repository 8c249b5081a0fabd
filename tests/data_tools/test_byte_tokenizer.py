"""The tokenizer of bytes: any text has ids and comes back, and a chat with tools is trained as it was written."""

import json

import pytest

from data_tools.chats.byte_tokenizer import CHAT_TEMPLATE, END, write_byte_tokenizer
from data_tools.chats.chat import ChatConfig, ChatRows, Encoded
from data_tools.chats.encoder import Encoder
from data_tools.chats.tokenizer import load_tokenizer
from tests.data_tools.chats import CONVERSATIONS, TOOLS

TEXTS = ["", "plain words", "Ärger, 世界 ☕ 👩‍👩‍👧 \x00\x7f\r\n\t  two", "<|im_start|", "".join(map(chr, range(256)))]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(folder)
    return load_tokenizer(str(folder))


def test_any_text_has_an_id_a_byte_and_comes_back(tokenizer):
    tokenizer.check_end()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("turns", ["all", "last", "each"])
def test_a_chat_with_tools_and_reasoning_is_trained_as_it_was_written(tokenizer, name, turns):
    record = {"messages": CONVERSATIONS[name], "tools": TOOLS}
    rows = list(ChatRows(ChatConfig(turns=turns), tokenizer, Encoder(tokenizer)).rows(record))
    kept = [row for row in rows if isinstance(row, Encoded)]
    assert bool(kept) == (turns != "last" or name != "ends with a question") and all(
        isinstance(row, Encoded) or row.bucket == "nothing_trained" for row in rows
    )
    learnt = "".join(tokenizer.decode(row.ids[row.mask == 1].tolist()) for row in kept)
    said = [message for message in CONVERSATIONS[name] if message["role"] == "assistant"]
    said = said[-1:] * bool(kept) if turns == "last" else said
    for message in said:
        assert message["content"] in learnt and message.get("reasoning_content", "") in learnt
        for call in message.get("tool_calls", ()):
            assert json.dumps(call["function"], ensure_ascii=False) in learnt
    assert learnt.count(END) >= len(said)
    assert not any(message["content"] in learnt for message in CONVERSATIONS[name] if message["role"] == "user")


def test_transformers_reads_it_alike(tokenizer):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer.name)
    for text in TEXTS[1:]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    chat = theirs.apply_chat_template(CONVERSATIONS["tools"], tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert chat.startswith("<|im_start|>tools\n{") and chat.endswith("<|im_start|>assistant\n")
    assert theirs.eos_token == END and CHAT_TEMPLATE == theirs.chat_template
