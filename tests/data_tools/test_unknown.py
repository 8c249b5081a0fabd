"""What a tokenizer has no token for is never a traceback and never left out in silence: over the kinds of models."""

import pytest
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Fast

from data_tools.chats.encoder import Encoder
from data_tools.chats.messages import BadRecord
from data_tools.chats.tokenizer import Tokenizer
from data_tools.chats.unknown import CannotEncode, unknown_of

VOCABULARY = {"a": 0, "b": 1, "ab": 2}
WITHOUT = {  # models that have no unknown token, or one that is not there
    "WordLevel": models.WordLevel(VOCABULARY),
    "WordLevel, named": models.WordLevel(VOCABULARY, unk_token="zz"),
    "WordPiece": models.WordPiece(VOCABULARY),
    "BPE": models.BPE(VOCABULARY, [("a", "b")]),  # raises nothing: it leaves out the letter
    "BPE, named": models.BPE(VOCABULARY, [("a", "b")], unk_token="zz"),
    "Unigram": models.Unigram([("a", 0.0), ("b", -1.0), ("ab", -0.5)]),
}
WORDS = {
    "words": pre_tokenizers.Whitespace(),
    "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "no words": None,
}


def tokenizer(model, words=WORDS["words"], normalizer=None):
    fast = Fast(model)
    if words is not None:
        fast.pre_tokenizer = words
    if normalizer is not None:
        fast.normalizer = normalizer
    fast.add_special_tokens([AddedToken("<|x|>", normalized=False)])
    return Tokenizer("small", 4, None, None, unknown_of(fast), fast)


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("kind", WITHOUT)
@pytest.mark.parametrize("text, place", [("ab<|x|>q", 8), ("q", 1), ("ab \u00e9", 4), ("a\ud800", 2)])
def test_the_place_of_what_has_no_token_is_told(kind, words, text, place):
    small = tokenizer(WITHOUT[kind], WORDS[words])
    bucket = "not_unicode" if "\ud800" in text else "unknown_character"
    with pytest.raises(CannotEncode) as told:
        small.encode(text)
    assert told.value.bucket == bucket and "\n" not in str(told.value) and "leave the row out" in str(told.value)
    if words == "words":
        assert f"at character {place} of the text" in str(told.value)
    with pytest.raises(BadRecord) as refused:
        Encoder(small, "huggingface").encode(text, [])
    assert refused.value.bucket == bucket and str(refused.value) == str(told.value)


@pytest.mark.parametrize("kind", WITHOUT)
def test_what_has_tokens_keeps_them(kind):
    small = tokenizer(WITHOUT[kind], normalizer=normalizers.Lowercase())
    assert small.encode("AB a<|x|>") == [2, 0, 3] == Encoder(small, "huggingface").encode("AB a<|x|>", [])[0].tolist()
    assert small.opening == []


@pytest.mark.parametrize("model", [
    models.WordLevel({**VOCABULARY, "?": 3}, unk_token="?"), models.BPE({**VOCABULARY, "?": 3}, [], unk_token="?"),
    models.Unigram([("a", 0.0), ("b", -1.0), ("ab", -2.0), ("?", -9.0)], unk_id=3),
])  # fmt: skip
def test_the_unknown_token_of_a_model_is_known_where_its_settings_name_none(model):
    small = tokenizer(model)
    assert small.unk_id == 3 and small.encode("q") == [3]
