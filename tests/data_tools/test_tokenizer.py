"""char_tokenizer.py and chat.py: text to ids and back, with and without transformers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.base.durable import read_json, write_json
from data_tools.chats.char_tokenizer import CHAT_TEMPLATE, write_char_tokenizer
from data_tools.chats.chat import ChatConfig, ChatRows, Encoded, encode_row
from data_tools.chats.encoder import Encoder
from data_tools.chats.tokenizer import has_template, load_tokenizer, stop_ids
from data_tools.mistake import UserMistake
from data_tools.tasks.calculator import ALPHABET
from tests.data_tools.chats import tokenizer_of, write_tokenizer
from tests.inputs import Inputs

texts = st.text(st.sampled_from(ALPHABET), max_size=40)


@given(texts)
def test_ids_are_one_a_character_and_decode_to_the_text(tokenizer_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    ids = tokenizer.encode(text)
    assert ids == [3 + ALPHABET.index(character) for character in text]
    assert tokenizer.decode(ids) == text


def test_transformers_loads_the_folder_with_the_same_ids_and_an_exact_round_trip(tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(tokenizer_folder), load_tokenizer(str(tokenizer_folder))
    for text in ("48/2=24", "", ALPHABET, "1 + x\n2", "(3.5-2)*10=15"):
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ids == ours.encode(text)
        if set(text) <= set(ALPHABET):
            assert theirs.decode(ids) == text
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (ours.pad_id, ours.eos_id, ours.unk_id)
    assert len({ours.pad_id, ours.eos_id, ours.unk_id}) == 3
    assert len(theirs) == ours.vocab_size == len(ALPHABET) + 3


def test_an_unknown_character_is_visible_and_special_tokens_can_be_skipped(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    for character in (" ", "x", "\n", "é", "🙂", "０"):
        assert tokenizer.encode(f"1{character}2") == [4, tokenizer.unk_id, 5]
    assert tokenizer.decode([4, tokenizer.eos_id, tokenizer.pad_id], skip_special_tokens=True) == "1"


def test_a_model_folder_has_the_tokenizer_of_its_files(tokenizer_folder: Path, tmp_path: Path) -> None:
    """A phase may name the output of import_hf where it wants a tokenizer."""
    shutil.copytree(tokenizer_folder, tmp_path / "model" / "hf")
    (tmp_path / "model" / "model.json").write_text("{}")
    assert load_tokenizer(str(tmp_path / "model")).encode("1+2") == load_tokenizer(str(tokenizer_folder)).encode("1+2")
    assert has_template(tmp_path / "model") == has_template(tokenizer_folder) is not None


def test_the_same_alphabet_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_char_tokenizer(tmp_path / name, "01+=")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(UserMistake, match="more than once"):
        write_char_tokenizer(tmp_path / "c", "010")


def test_a_real_bpe_folder_gives_the_ids_of_transformers(tmp_path: Path, inputs: Inputs) -> None:
    folder = tokenizer_of(inputs, tmp_path / "tokenizer", "qwen3_rebuilt")
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(str(folder))
    for text in ("48/2=24", "Größe 1 234,5 €\n\n  naïve <|im_end|> e\u0301", " leading"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids


def test_a_local_folder_needs_no_transformers(tokenizer_folder: Path) -> None:
    code = (
        "import sys; from data_tools.chats.tokenizer import load_tokenizer; "
        f"load_tokenizer({str(tokenizer_folder)!r}).encode('1'); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "no-such-owner/no-such-model"])
def test_a_tokenizer_that_is_not_there_is_a_mistake_with_a_remedy(name: str) -> None:
    with pytest.raises(UserMistake, match=f"tokenizer {name}: no such folder") as caught:
        load_tokenizer(name)
    assert "\n" not in str(caught.value) and "give a folder" in str(caught.value)


def test_a_folder_without_a_tokenizer_and_a_damaged_one_are_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserMistake, match=f"tokenizer {tmp_path / 'empty'}"):
        load_tokenizer(str(tmp_path / "empty"))
    write_char_tokenizer(tmp_path / "cut", ALPHABET)
    path = tmp_path / "cut" / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserMistake, match="tokenizer.json is damaged"):
        load_tokenizer(str(tmp_path / "cut"))


@given(texts, texts)
def test_a_row_masks_its_prompt_and_supervises_answer_and_end(tokenizer_folder: Path, prompt: str, answer: str) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    ids, mask = encode_row(tokenizer, prompt, answer)
    assert ids.dtype == np.int32 and mask.dtype == np.uint8
    assert ids.tolist() == [*tokenizer.encode(prompt), *tokenizer.encode(answer), tokenizer.eos_id]
    assert mask.tolist() == [0] * len(prompt) + [1] * (len(answer) + 1)


def test_a_chat_of_a_prompt_and_its_completion_has_the_ids_of_a_tasks_row(tmp_path: Path) -> None:
    write_char_tokenizer(tmp_path, ALPHABET, CHAT_TEMPLATE)
    tokenizer = load_tokenizer(str(tmp_path))
    chats = ChatRows(ChatConfig(), tokenizer, Encoder(tokenizer))
    said = [{"role": "user", "content": "48/2="}, {"role": "assistant", "content": "42"}]
    (row,) = chats.rows({"messages": said, "prompt_id": "48/2=", "pass_rate": 0.5})
    ids, mask = encode_row(tokenizer, "48/2=", "42")
    assert isinstance(row, Encoded) and (row.ids.tolist(), row.mask.tolist()) == (ids.tolist(), mask.tolist())
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(said, tokenize=False) == "48/2=42<eos>"


def test_a_row_needs_an_end_which_padding_may_be_too(tmp_path: Path) -> None:
    write_char_tokenizer(tmp_path, ALPHABET)
    config = tmp_path / "tokenizer_config.json"
    rows = []
    for change in ({}, {"pad_token": "<eos>"}):
        write_json(config, {**read_json(config), **change})
        rows.append([part.tolist() for part in encode_row(load_tokenizer(str(tmp_path)), "1+1=", "2")])
    assert rows[0] == rows[1] and rows[0][1] == [0, 0, 0, 0, 1, 1]
    write_json(config, {**read_json(config), "eos_token": None})
    with pytest.raises(UserMistake, match="has no eos token"):
        encode_row(load_tokenizer(str(tmp_path)), "1+1=", "2")


@pytest.mark.parametrize("named", ["x", True, -1, 1.5, [[1]], ["x"], {}, {"a": 1}, 10**30, [2, None, False]])
def test_end_tokens_that_are_no_ids_are_refused(named, tmp_path):
    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    with pytest.raises(UserMistake, match="generation_config.json: eos_token_id is .*, no id of a token"):
        stop_ids(tmp_path, tokenizer)


@pytest.mark.parametrize("ids", [{0: 1}, {0: 1, 1: 0}, {5: 10**6}])
def test_an_added_token_with_another_id_than_the_library_gives_it_is_refused(ids, tmp_path):
    folder = write_tokenizer(tmp_path)
    text = read_json(folder / "tokenizer.json")
    for place, number in ids.items():
        text["added_tokens"][place]["id"] = number
    write_json(folder / "tokenizer.json", text)
    with pytest.raises(UserMistake, match="tokenizer.json: the added token .* has id"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("times", [0, 1, 2])
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_template_around_texts_without_the_text_is_refused(times, is_nested, tmp_path):
    folder = write_tokenizer(tmp_path)
    text = read_json(folder / "tokenizer.json")
    single = [{"Sequence": {"id": "A", "type_id": 0}}] * times
    template = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    text["post_processor"] = {"type": "Sequence", "processors": [template]} if is_nested else template
    write_json(folder / "tokenizer.json", text)
    if times == 1:
        assert load_tokenizer(str(folder)).encode("12")
        return
    with pytest.raises(UserMistake, match=f"has the text .* {times} times instead of once"):
        load_tokenizer(str(folder))
