"""Ids are Hugging Face's whoever finds them, and the mask is theirs too, though no offsets are asked for."""

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import normalizers

from data_tools.chats import encoder as encoder_module
from data_tools.chats.char_tokenizer import write_char_tokenizer
from data_tools.chats.conversation import BadRecord
from data_tools.chats.encoder import Encoder, check_encoder
from data_tools.chats.tokenizer import load_tokenizer
from data_tools.mistake import UserMistake
from tests.data_tools.chats import nfc_tokenizer, tokenizer_of, write_tokenizer


@pytest.fixture(scope="module", params=["byte level", "byte level, NFC", "characters"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "characters":
        write_char_tokenizer(folder, "abcé世☕ \n")
    else:
        (nfc_tokenizer if "NFC" in request.param else write_tokenizer)(folder)
    return load_tokenizer(str(folder))


# Of these NFC makes \u095c longer and \u212a shorter, by as many bytes.
texts = st.text(st.sampled_from("abc 世☕é\u0301e\n\u095c\u212a\u1100\u1161"), max_size=40) | st.sampled_from(
    ["", "<|im_start|>user\na<|im_end|>"]
)


@given(texts, st.lists(st.integers(0, 40), max_size=6))
def test_the_mask_is_on_the_tokens_that_hold_characters_of_a_span(tokenizer, text, places):
    places = sorted({min(place, len(text)) for place in places})
    spans = [span for span in zip(places[0::2], places[1::2])]
    ids, mask = Encoder(tokenizer, "huggingface").encode(text, spans)
    encoded = tokenizer.fast.encode(text, add_special_tokens=False)
    assert ids.tolist() == encoded.ids and (ids.dtype, mask.dtype) == (np.int32, np.uint8)
    for (start, stop), masked in zip(encoded.offsets, mask.tolist()):
        overlaps = any(start < last and first < stop for first, last in spans)
        # A character of several bytes may be in several tokens, which offsets all name whole.
        assert masked == overlaps or (masked < overlaps and not text[start:stop].isascii())


@example("\u095c\u095c", "\u212a\u212a", "\u212a")
@given(texts, texts, texts)
def test_tokens_of_a_normalised_text_are_told_by_the_normal_form_of_its_parts(tmp_path_factory, before, inside, after):
    folder = tmp_path_factory.getbasetemp() / "nfc"
    tokenizer = load_tokenizer(str(folder if folder.exists() else nfc_tokenizer(folder)))
    parts = [unicodedata.normalize("NFC", part) for part in (before, inside, after)]
    assume(inside and "".join(parts) == unicodedata.normalize("NFC", before + inside + after))
    ids, mask = Encoder(tokenizer, "huggingface").encode(before + inside + after, [(len(before), len(before + inside))])
    start, stop = len(parts[0].encode()), len("".join(parts[:2]).encode())
    stops = np.cumsum([_bytes_of(tokenizer, token) for token in ids.tolist()], dtype=int)
    starts = np.append(0, stops[:-1])[: len(stops)]
    assert mask.tolist() == ((starts < stop) & (stops > start)).astype(int).tolist()


def _bytes_of(tokenizer, token):
    """The bytes a token stands for: one a character, but in special tokens."""
    return len(tokenizer.fast.id_to_token(token)) if token > 5 else len(tokenizer.decode([token]).encode())


def test_a_tokenizer_that_adds_and_normalises_gives_the_masks_of_its_offsets(tmp_path):
    """Replacing makes the text shorter, a space before it longer, by as much."""
    normalizer = normalizers.Replace("世", "aa")
    folder = write_tokenizer(tmp_path, normalizer=normalizer)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(str(folder))
    for text in ("世bb", "bb世", "b世b世b<|im_end|>世b"):
        ids, mask = Encoder(tokenizer, "huggingface").encode(text, [(1, 2)])
        encoded = tokenizer.fast.encode(text, add_special_tokens=False)
        assert ids.tolist() == encoded.ids
        assert mask.tolist() == [int(start < 2 and stop > 1) for start, stop in encoded.offsets]


def test_a_tokenizer_saved_with_a_limit_cuts_no_row(tmp_path):
    folder = write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.fast.enable_truncation(4)
    tokenizer.fast.save(str(folder / "tokenizer.json"))
    ids, mask = Encoder(load_tokenizer(str(folder))).encode("abc d e f g " * 9, [(0, 108)])
    assert len(ids) > 9 and mask.all()


def test_ids_and_masks_do_not_depend_on_the_encoder(tokenizer):
    texts = ["abc é ☕ <|im_start|>世世\n\n", "e\u0301" * 9, "a" * 3000, ""] * 10
    fast, slow = Encoder(tokenizer, "auto"), Encoder(tokenizer, "huggingface")
    for text in texts:
        for one, other in zip(fast.encode(text, [(0, len(text) // 2)]), slow.encode(text, [(0, len(text) // 2)])):
            assert np.array_equal(one, other)


plain = st.lists(
    st.sampled_from(
        [
            "I'll",
            "'S",
            "don't",
            " ",
            "  ",
            "\t",
            "\n",
            "\r\n",
            "a",
            "B2",
            "1234",
            "...",
            " (x)\n\n",
            "<",
            "<|im_end|>",
            "é",
        ]
    )
)


@pytest.mark.parametrize("words", ["GPT-2's", "Qwen's"])
def test_words_are_remembered_as_the_tokenizer_cuts_them(tmp_path_factory, words):
    build = nfc_tokenizer if words == "Qwen's" else write_tokenizer
    tokenizer = load_tokenizer(str(build(tmp_path_factory.mktemp("tokenizer"))))
    encoder = Encoder(tokenizer, "huggingface")
    for number in range(16):  # past the gate, where nothing is compared any more
        encoder.encode(str(number), [])

    @given(plain)
    def check(parts):
        text = "".join(parts)
        assert encoder.encode(text, [])[0].tolist() == tokenizer.fast.encode(text, add_special_tokens=False).ids

    check()


def test_stretches_that_come_again_are_encoded_alike(tokenizer):
    prompt = "abc é ☕\n" * 200
    encoder = Encoder(tokenizer, "huggingface")
    for text in (f"<|im_start|>{prompt}<|im_end|>\na<|im_start|>{prompt}", prompt, f"a{prompt}<|im_end|>", "abc") * 9:
        assert encoder.encode(text, [])[0].tolist() == tokenizer.fast.encode(text, add_special_tokens=False).ids


def wrong_after(rows):
    """A fast encoder that is right so often."""
    counted = [0]

    def build(fast):
        def encode(text):
            counted[0] += 1
            ids = np.array(fast.encode(text, add_special_tokens=False).ids, dtype=np.int32)
            return ids if counted[0] <= rows else ids[::-1]

        return encode

    return build


def test_a_fast_encoder_that_fails_the_gate_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_module, "_gigatoken", wrong_after(5))
    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path)))
    encoder = Encoder(tokenizer)
    assert encoder.name == "gigatoken"
    for _ in range(300):
        assert encoder.encode("abc", [])[0].tolist() == tokenizer.encode("abc")
    assert encoder.name == "huggingface"


def test_one_that_passed_and_is_wrong_later_is_a_mistake(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_module, "_gigatoken", wrong_after(20))
    encoder = Encoder(load_tokenizer(str(write_tokenizer(tmp_path))))
    with pytest.raises(UserMistake, match="set encoder: huggingface"):
        for _ in range(300):
            encoder.encode("abc", [])


def test_half_a_surrogate_pair_is_a_bad_record(tokenizer):
    with pytest.raises(BadRecord, match="not Unicode"):
        Encoder(tokenizer).encode("a\ud800", [])


def test_an_encoder_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "gigatoken is not installed" in str(check_encoder("gigatoken")[0]) and not check_encoder("auto")


@pytest.mark.parametrize("name", ["qwen3_rebuilt", "gpt2_rebuilt"])
def test_gigatoken_gives_the_ids_of_real_tokenizers(name, tmp_path, inputs):
    tokenizer = load_tokenizer(str(tokenizer_of(inputs, tmp_path / "tokenizer", name)))
    fast, slow = Encoder(tokenizer, "gigatoken"), Encoder(tokenizer, "huggingface")
    lines = inputs.data("llamafactory/c4_demo.jsonl").read_text().splitlines()[:100]
    assert all(np.array_equal(fast.encode(line, [])[0], slow.encode(line, [])[0]) for line in lines)
    assert fast.name == "gigatoken"
