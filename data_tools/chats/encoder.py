"""Text and character spans → token ids and loss mask: the ids of Hugging Face's tokenizers, the offsets counted.

Byte-level BPE loses no byte, so a token's place in the text is the sum of the byte lengths before it, whoever found the
ids: no encoder has to report offsets. Where the tokenizer is no byte-level one, normalises this text or may add to it,
or the sum is not the text's length, the offsets of Hugging Face's tokenizers are used. The sum alone proves nothing:
a normal form may make one character longer and another shorter by as much.

Two short cuts find the same ids sooner: gigatoken (pip install gigatoken), where installed, some hundred times; else,
about twice as fast, a memory of the words of plain text, and of the stretches of any other between special tokens.
Either is compared with Hugging Face's ids of the whole text on the first rows of every shard before it is believed, and
on one row in so many afterwards.
"""

import functools
import importlib.util
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import regex

from data_tools.chats.added_tokens import AddedTokens
from data_tools.chats.conversation import BadRecord
from data_tools.chats.tokenizer import Tokenizer
from data_tools.chats.unknown import CannotEncode, cannot_encode, check_kept, check_unicode
from data_tools.mistake import Problem, UserMistake

ENCODERS = ("auto", "huggingface", "gigatoken")

_GATE_ROWS = 16  # compared at the start of a shard
_CHECK_EVERY = 256  # rows, of which one is compared later on
_WORDS, _STRETCHES = 1 << 16, 512  # remembered at a time
# That of ByteLevel (tokenizers, pre_tokenizers/byte_level.rs).
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def check_encoder(encoder: str) -> list[Problem]:
    """Refuse an encoder that is not installed."""
    if encoder == "gigatoken" and importlib.util.find_spec("gigatoken") is None:
        return [Problem("encoder", "gigatoken is not installed; pip install gigatoken, or set encoder: auto")]
    return []


class Encoder:
    """Encodes texts with the tokenizer; `encoder` is one of ENCODERS."""

    def __init__(self, tokenizer: Tokenizer, encoder: str = "auto"):
        self._tokenizer = tokenizer.name
        self._slow = tokenizer.fast
        self._byte_lengths = _byte_lengths(self._slow)
        self._counts = _keeps_bytes(self._slow)
        self._check_kept = check_kept(self._tokenizer, self._slow)
        self._rows = 0
        self._fast: Callable[[str], np.ndarray] | None = None
        self.name = "huggingface"  # whose ids these are; gigatoken only as long as it passed
        if encoder != "huggingface" and importlib.util.find_spec("gigatoken") is not None:
            self._fast = _gigatoken(self._slow)
            if self._fast is not None:
                self.name = "gigatoken"
            elif encoder == "gigatoken":
                raise UserMistake(f"tokenizer {tokenizer.name}: gigatoken does not know its kind; set encoder: auto")
        if self._fast is None:
            self._fast = _remembering(self._slow, self._reference)

    @property
    def is_byte_level(self) -> bool:
        """Return whether every text has ids of its own, none of them the unknown token's."""
        return self._byte_lengths is not None

    def encode(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids int32[n], mask uint8[n]) of the text; the mask is 1 where a token holds a character of a span.

        Raise BadRecord where the text is no Unicode (JSON may spell half a surrogate pair), or the tokenizer has no
        token for something in it, nor an unknown one.
        """
        try:
            return self._encode(text, spans)
        except CannotEncode as error:
            raise BadRecord(str(error), error.bucket) from None
        except Exception as error:
            if type(error) is not Exception:  # as the library raises for a text
                raise
            told = cannot_encode(self._tokenizer, self._slow, text, error)
            raise BadRecord(str(told), told.bucket) from None

    def _encode(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Return what `encode` does. Raise CannotEncode where the tokenizer has no ids for the text."""
        check_unicode(text)
        size = len(text.encode())
        characters = np.array(spans, dtype=np.int64).reshape(-1, 2)
        if self._byte_lengths is not None:
            ids = self._ids(text)
            lengths = self._byte_lengths[ids]
            stops = np.cumsum(lengths)
            if lengths.sum() == size and self._counts(text):
                bounds = characters if size == len(text) else _byte_bounds(text, spans)
                return ids, _mask(stops - lengths, stops, bounds)
        self._check_kept(text)
        encoded = self._slow.encode(text, add_special_tokens=False)
        starts, stops = np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2).T
        return np.array(encoded.ids, dtype=np.int32), _mask(starts, stops, characters)

    def _ids(self, text: str) -> np.ndarray:
        self._rows += 1
        if self._fast is None:
            return self._reference(text)
        ids = self._fast(text)
        if self._rows <= _GATE_ROWS or self._rows % _CHECK_EVERY == 0:
            reference = self._reference(text)
            if not np.array_equal(ids, reference):
                if self._rows > _GATE_ROWS:
                    raise UserMistake(
                        f"tokenizer {self._tokenizer}: {self.name}'s ids are not Hugging Face's, though "
                        f"those of {_GATE_ROWS} rows were; set encoder: huggingface"
                    )
                self._fast, self.name = None, "huggingface"  # every row so far was compared
            return reference
        return ids

    def _reference(self, text: str) -> np.ndarray:
        return np.array(self._slow.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.int32)


def _mask(starts: np.ndarray, stops: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    mask = np.zeros(len(starts), dtype=np.uint8)
    firsts = np.searchsorted(stops, bounds[:, 0], "right")  # the first token that ends after the span's start
    lasts = np.searchsorted(starts, bounds[:, 1], "left")  # the first that begins at its stop or later
    for first, last in zip(firsts.tolist(), lasts.tolist()):
        mask[first:last] = 1
    return mask


def _byte_bounds(text: str, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the spans, ordered and apart, in bytes of UTF-8."""
    places = [place for span in spans for place in span]
    sizes = [len(text[start:stop].encode()) for start, stop in zip([0, *places], places)]
    return np.cumsum(np.array(sizes, dtype=np.int64)).reshape(-1, 2)


def _byte_lengths(fast: Any) -> np.ndarray | None:
    """Return int64[vocabulary], the bytes each token stands for; None for a tokenizer that is not byte-level BPE.

    Byte-level tokens are spelled with one character a byte.
    """
    spec = json.loads(fast.to_str())
    decoder = spec.get("decoder") or {}
    kinds = {decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", []))}
    if "ByteLevel" not in kinds or spec["model"].get("type") != "BPE":
        return None
    lengths = np.zeros(fast.get_vocab_size(with_added_tokens=True), dtype=np.int64)
    vocabulary = fast.get_vocab(with_added_tokens=True)
    if max(vocabulary.values(), default=-1) >= len(lengths):
        lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, number in vocabulary.items():
        lengths[number] = len(token)
    for added in spec["added_tokens"]:
        lengths[added["id"]] = len(added["content"].encode())
    return lengths


_UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")  # which leave ASCII, and any part of a text in that form, as it is


def _keeps_bytes(fast: Any) -> Callable[[str], bool]:
    """Return how to tell that no step before the tokens changes or adds a byte; it may then lose some, which the sum
    shows."""
    spec = json.loads(fast.to_str())
    normalizer, words = (
        _steps(spec[key], parts) for key, parts in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"))
    )
    if any(step.get("add_prefix_space") or step.get("type") == "Metaspace" for step in words):
        return lambda text: False
    if not normalizer:
        return lambda text: True
    if any(step["type"] not in _UNICODE_FORMS for step in normalizer):
        return lambda text: False
    return lambda text: text.isascii() or fast.normalizer.normalize_str(text) == text


def _steps(step: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or a pre-tokenizer that may be a sequence, or none."""
    if step is None:
        return []
    return [inner for part in step[parts] for inner in _steps(part, parts)] if parts in step else [step]


def _gigatoken(fast: Any) -> Callable[[str], np.ndarray] | None:
    """Return gigatoken's encode for this tokenizer; None where it does not know its kind."""
    import gigatoken

    try:
        encode = gigatoken.Tokenizer.from_json(fast.to_str()).encode
    except Exception:  # its Rust side raises what it likes for what it cannot read
        return None
    return lambda text: encode(text).astype(np.int32)


def _remembering(fast: Any, encode: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
    """Return `encode`, asked once for what comes again: the words of plain text, whole stretches of any other.

    Special tokens are cut out of a text before anything else is done with it, so what lies between two of them is
    encoded by itself. Not so with tokens that look at what stands beside them.
    """
    added = fast.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip or token.single_word or token.normalized for token in added):
        return encode
    pieces = AddedTokens(token.content for token in added)
    word_ids = functools.lru_cache(_WORDS)(lambda word: encode(word).tolist())
    stretch_ids = functools.lru_cache(_STRETCHES)(lambda stretch: encode(stretch).tolist())
    words = _words(fast)

    def ids(text: str) -> np.ndarray:
        found: list[list[int]] = []
        for _, piece, is_added in pieces.cut(text):
            if is_added or words is None or not piece.isascii():
                found.append(stretch_ids(piece))
            else:
                found += map(word_ids, words(piece))
        return np.fromiter(itertools.chain.from_iterable(found), dtype=np.int32)

    return ids


def _words(fast: Any) -> Callable[[str], list[str]] | None:
    """Return how a byte-level tokenizer cuts plain text into words, each of which it encodes by itself; None where it
    does anything else before.

    Of ASCII only: there no normal form and no edition of Unicode can make the expression mean something else here.
    """
    spec = json.loads(fast.to_str())
    parts = spec["pre_tokenizer"] or {}
    parts = parts.get("pretokenizers", [parts])
    *splits, last = parts
    if (
        last.get("type") != "ByteLevel"
        or last["add_prefix_space"]
        or (spec["normalizer"] or {}).get("type") not in (None, "NFC")
    ):
        return None
    if last["use_regex"] and not splits:
        return regex.compile(_GPT2_WORDS).findall
    if last["use_regex"] or len(splits) != 1 or splits[0].get("behavior") != "Isolated" or splits[0]["invert"]:
        return None
    expression = splits[0]["pattern"].get("Regex")
    return regex.compile(f"{expression}|.", regex.DOTALL).findall if expression else None
