"""Added tokens are found as `tokenizers` finds them, by work that does not grow with their number."""

import random
import re

import pytest
import tokenizers

from data_tools.chats import added_tokens
from data_tools.chats.added_tokens import AddedTokens
from data_tools.chats.byte_tokenizer import write_byte_tokenizer


@pytest.mark.parametrize("few", [0, added_tokens._FEW])
def test_added_tokens_are_cut_out_as_tokenizers_does(tmp_path, monkeypatch, few):
    """The leftmost first, and the longest of those at one place, whichever way they are looked for."""
    monkeypatch.setattr(added_tokens, "_FEW", few)
    write_byte_tokenizer(tmp_path)
    draw = random.Random(3)

    def text(most: int) -> str:
        return "".join(draw.choices("ab<|>.\n𝕏", k=draw.randint(1, most)))

    for _ in range(40):
        added = {text(4) for _ in range(draw.randint(1, 12))}
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        theirs.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in added])
        ours = AddedTokens(added)
        for _ in range(10):
            said = text(40)
            encoded = theirs.encode(said, add_special_tokens=False)
            expected = [place for place, token in zip(encoded.offsets, encoded.tokens) if token in added]
            assert list(ours.places(said)) == expected
            assert "".join(piece for _, piece, _ in ours.cut(said)) == said


def test_a_tokenizer_without_added_tokens_cuts_nothing():
    assert list(AddedTokens([]).cut("a<b")) == [(0, "a<b", False)]
    assert list(AddedTokens([""]).cut("")) == []


def test_what_is_asked_of_a_text_does_not_grow_with_the_added_tokens(monkeypatch):
    """Of many, one expression has only how they begin: that of all of them took 9 s for a text of 10,000 characters."""
    asked, compiled = [], re.compile
    monkeypatch.setattr(re, "compile", lambda pattern: asked.append(pattern) or compiled(pattern))
    many = AddedTokens(f"{letter}tok{number}z" for letter in "xyz" for number in range(20_000))
    assert max(map(len, asked)) == len("x|y|z")
    assert [piece for _, piece, is_added in many.cut("xtok7z, ytok20000z, ztok19999z") if is_added] == [
        "xtok7z",
        "ztok19999z",
    ]
