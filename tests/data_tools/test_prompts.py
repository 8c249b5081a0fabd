"""Prompts become the ids that transformers gives for them."""

from dataclasses import replace

import pytest

from data_tools.chats.char_tokenizer import write_char_tokenizer
from data_tools.chats.chat import encode_row
from data_tools.chats.prompts import PromptEncoder
from data_tools.chats.tokenizer import load_tokenizer, told_opening
from data_tools.mistake import UserMistake

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


@pytest.mark.parametrize("form", [None, "<pad> $A", "$A <end>", "<pad> $A <end>", "<pad> <end> $A"])
def test_texts_begin_as_transformers_begins_them_once_and_messages_as_the_template_does(folder, form):
    """What follows a text is the model's to write: of the special tokens of tokenizer(text) the first ones alone count."""
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    (folder / "chat_template.jinja").write_text(TEMPLATE)
    bos, eos = (load_tokenizer(str(folder)).special_tokens[name] for name in ("pad_token", "eos_token"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if form:
        names = [(token, tokenizer.token_to_id(token)) for token in (bos, eos)]
        form = form.replace("<pad>", bos).replace("<end>", eos)
        tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=names)
        tokenizer.save(str(folder / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(str(folder))
    for text in ("why", "a", " ", "b a"):
        whole = theirs(text)["input_ids"]
        expected = whole[: len(whole) - whole[::-1].index(ours.encode(text)[-1])]
        for tokenizer in (ours, replace(ours, backend=theirs)):
            assert PromptEncoder(tokenizer).encode(text) == expected
            assert PromptEncoder(tokenizer).encode(tokenizer.decode(expected)) == expected  # not once more
            assert PromptEncoder(tokenizer, bos="never").encode(text) == ours.encode(text)
        ids, mask = encode_row(replace(ours, pad_id=None), text, "b")
        assert ids.tolist() == [*expected, *ours.encode("b"), ours.eos_id] and not mask[: len(expected)].any()
    assert PromptEncoder(ours).encode(MESSAGES) == ours.encode(PromptEncoder(ours).text(MESSAGES))
    opening = ours.decode(ours.opening)
    assert told_opening(ours, "") == ({"texts_begin": f"with {opening}"} if opening else {})
    assert told_opening(ours, "never") == ({"texts_begin": f"without {opening}"} if opening else {})


def test_messages_without_a_template_are_a_mistake(folder):
    encoder = PromptEncoder(load_tokenizer(str(folder)))
    assert encoder.text("why") == "why"
    with pytest.raises(UserMistake, match="no chat template for prompts that are messages; have the task write texts"):
        encoder.encode(MESSAGES)
