"""Ids are Hugging Face's whoever finds them, and the mask is theirs too, though no offsets are asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools import encoder as encoder_module
from data_tools.char_tokenizer import write_char_tokenizer
from data_tools.conversation import BadRecord
from data_tools.encoder import Encoder, check_encoder
from data_tools.mistake import UserMistake
from data_tools.tokenizer import load_tokenizer
from tests.data_tools.chats import nfc_tokenizer, shared, shared_tokenizer, write_tokenizer


@pytest.fixture(scope="module", params=["byte level", "byte level, NFC", "characters"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "characters":
        write_char_tokenizer(folder, "abcé世☕ \n")
    else:
        (nfc_tokenizer if "NFC" in request.param else write_tokenizer)(folder)
    return load_tokenizer(str(folder))


texts = st.text(st.sampled_from("abc 世☕é\u0301e\n"), max_size=40) | st.sampled_from(
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


def test_ids_and_masks_do_not_depend_on_the_encoder(tokenizer):
    texts = ["abc é ☕ <|im_start|>世世\n\n", "e\u0301" * 9, "a" * 3000, ""] * 10
    fast, slow = Encoder(tokenizer, "auto"), Encoder(tokenizer, "huggingface")
    for text in texts:
        for one, other in zip(fast.encode(text, [(0, len(text) // 2)]), slow.encode(text, [(0, len(text) // 2)])):
            assert np.array_equal(one, other)


plain = st.lists(
    st.sampled_from(
        [
            "I'll", "'S", "don't", " ", "  ", "\t", "\n", "\r\n", "a", "B2", "1234", "...", " (x)\n\n", "<",
            "<|im_end|>", "é",
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


def test_an_unknown_encoder_is_refused():
    assert "did you mean gigatoken?" in str(check_encoder("gigatok")[0]) and not check_encoder("auto")


@pytest.mark.parametrize("name", ["qwen3_rebuilt", "gpt2_rebuilt"])
def test_gigatoken_gives_the_ids_of_real_tokenizers(name, tmp_path):
    tokenizer = load_tokenizer(str(shared_tokenizer(tmp_path / "tokenizer", name)))
    fast, slow = Encoder(tokenizer, "gigatoken"), Encoder(tokenizer, "huggingface")
    lines = shared("data", "llamafactory", "c4_demo.jsonl").read_text().splitlines()[:100]
    assert all(np.array_equal(fast.encode(line, [])[0], slow.encode(line, [])[0]) for line in lines)
    assert fast.name == "gigatoken"
