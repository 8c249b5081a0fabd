"""Prompts become the ids that transformers gives for them."""

import pytest

from data_tools.char_tokenizer import write_char_tokenizer
from data_tools.mistake import UserMistake
from data_tools.prompts import PromptEncoder
from data_tools.tokenizer import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if quick %}!{% endif %}{% endif %}"
)
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why"}]


@pytest.fixture
def folder(tmp_path):
    write_char_tokenizer(tmp_path, "<>/! abcdefghijklmnopqrstuvwxyz")
    return tmp_path


def test_messages_are_written_by_the_template_up_to_the_assistants_turn(folder):
    from transformers import AutoTokenizer

    (folder / "chat_template.jinja").write_text(TEMPLATE)
    encoder = PromptEncoder(load_tokenizer(str(folder)), {"quick": True})
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(MESSAGES, add_generation_prompt=True, quick=True)
    assert encoder.encode(MESSAGES) == theirs["input_ids"]
    assert encoder.text(MESSAGES).endswith("<user>why</><assistant>!")
    assert encoder.encode("why") == encoder.tokenizer.encode("why")


def test_messages_without_a_template_are_a_mistake(folder):
    encoder = PromptEncoder(load_tokenizer(str(folder)))
    assert encoder.text("why") == "why"
    with pytest.raises(UserMistake, match="no chat template for prompts that are messages; have the task write texts"):
        encoder.encode(MESSAGES)
