"""What of a text a tokenizer has no token for: a tokenizer without an unknown token raises there, or leaves it out."""

import json
import re
from collections.abc import Callable
from typing import Any

from data_tools.chats.added_tokens import AddedTokens
from data_tools.mistake import UserMistake

_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair: JSON may spell it, UTF-8 cannot
_BYTES = 256  # letters of ByteLevel


class CannotEncode(UserMistake):
    """Raised for a text that a tokenizer has no ids for; str() is one line with the place in the text and a remedy.
    `bucket` is what such a row is counted in."""

    def __init__(self, told: str, bucket: str = "unknown_character"):
        super().__init__(told)
        self.bucket = bucket


def unknown_of(fast: Any) -> int | None:
    """Return the id that the model of a `tokenizers.Tokenizer` gives for what it does not know; None: it has none."""
    model = json.loads(fast.to_str())["model"]
    return fast.token_to_id(model["unk_token"]) if model.get("unk_token") else model.get("unk_id")


def is_unicode(value: Any) -> bool:
    """Return whether this is a text, and holds no half of a surrogate pair."""
    return isinstance(value, str) and not _HALF.search(value)


def check_unicode(text: str) -> None:
    """Raise CannotEncode where the text holds half a surrogate pair."""
    if not text.isascii() and (found := _HALF.search(text)):
        told = f"not Unicode: half a surrogate pair at character {found.start() + 1:,} of the text; leave the row out"
        raise CannotEncode(told, "not_unicode")


def cannot_encode(name: str, fast: Any, text: str, error: Exception) -> CannotEncode:
    """Return what is raised for a text at which the tokenizer `fast` (`tokenizers.Tokenizer`) raised an error."""

    def fails(piece: str) -> bool:
        try:
            fast.encode(piece, add_special_tokens=False)
        except Exception:  # the library raises bare Exception
            return True
        return False

    for start, stretch, is_added in _added(fast).cut(text) if fast is not None else ():
        if not is_added and fails(stretch):
            for place, piece in _pieces(fast, stretch):
                if fails(piece):
                    return _unknown(name, piece, start + place)
            return _unknown(name, stretch, start)
    reason = str(error).strip().partition("\n")[0]
    return CannotEncode(
        f"tokenizer {name}: cannot encode a text of {len(text):,} characters ({reason}); mend its files"
    )


def check_kept(name: str, fast: Any) -> Callable[[str], None]:
    """Return what raises CannotEncode for a text of which the tokenizer would leave out a character in silence: BPE
    without an unknown token, and without the 256 letters that stand for bytes, does."""
    if fast is None:
        return lambda text: None
    spec = json.loads(fast.to_str())
    model = spec["model"]
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model.get("type") != "BPE" or model.get("unk_token") or model.get("byte_fallback") or affixes:
        return lambda text: None
    letters = {token for token in model["vocab"] if len(token) == 1}
    if '"ByteLevel"' in json.dumps(spec["pre_tokenizer"]) and len(letters) >= _BYTES:
        return lambda text: None

    added = _added(fast)

    def check(text: str) -> None:
        for start, stretch, is_added in added.cut(text):
            for place, piece in () if is_added else _pieces(fast, stretch):
                if not letters.issuperset(piece):
                    at = next(number for number, letter in enumerate(piece) if letter not in letters)
                    raise _unknown(name, piece[at : at + 1], start + place + at)

    return check


def _unknown(name: str, piece: str, place: int) -> CannotEncode:
    lack = (
        f"has no token for {piece!r:.40}, at character {place + 1:,} of the text, and no unknown token to stand for it"
    )
    return CannotEncode(f"tokenizer {name}: {lack}; leave the row out, or name an unk_token in tokenizer.json")


def _added(fast: Any) -> AddedTokens:
    return AddedTokens(token.content for token in fast.get_added_tokens_decoder().values())


def _pieces(fast: Any, stretch: str) -> list[tuple[int, str]]:
    """Return the words of a stretch as the model gets them, each with its place in the normalised text."""
    if fast.normalizer is not None:
        stretch = fast.normalizer.normalize_str(stretch)
    if fast.pre_tokenizer is None:
        return [(0, stretch)]
    return [(start, piece) for piece, (start, _) in fast.pre_tokenizer.pre_tokenize_str(stretch)]
