"""The vocabulary of a GGUF file, and whether it is a tokenizer's: prompts go to llama.cpp as token ids, and completions
come back as such, so that another vocabulary would be answered and scored without a word.

The format: ggml-org/ggml, docs/gguf.md. No package reads it here: `gguf` is of the extra that only converters need.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.chats.tokenizer import Tokenizer
from data_tools.mistake import Problem, UserMistake

MAGIC, VERSIONS = b"GGUF", (2, 3)
TOKENS = "tokenizer.ggml.tokens"
NUMBERS = "BbHhIif?"  # types 0 to 7, for struct
STRING, ARRAY = 8, 9
WIDE = {10: "Q", 11: "q", 12: "d"}
UNUSED = "[PAD{}]"  # what the converter calls an id that no token has


def tokens(file: Path) -> list[str]:
    """Return the tokens of a GGUF file by id. Raise UserMistake where it is none, is cut short, or has none."""
    try:
        with open(file, "rb") as opened:
            if opened.read(4) != MAGIC:
                raise ValueError("does not begin as a GGUF file")
            version, _, entries = _read(opened, "IQQ")
            if version not in VERSIONS:
                raise ValueError(f"is of version {version} of the format; read are {' and '.join(map(str, VERSIONS))}")
            for _ in range(entries):
                name, value = _string(opened), _value(opened)
                if name == TOKENS:
                    return value
        raise ValueError(f"has no {TOKENS}")
    except (OSError, ValueError, struct.error, RecursionError) as error:
        raise UserMistake(Problem("gguf", f"{file}: {error}; export_gguf makes one")) from None


def _read(opened: BinaryIO, kinds: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{kinds}", _bytes(opened, struct.calcsize(f"<{kinds}")))


def _bytes(opened: BinaryIO, length: int) -> bytes:
    """Return the next bytes. Raise ValueError where the file has not so many, before memory is taken for them."""
    if length > os.fstat(opened.fileno()).st_size - opened.tell():
        raise ValueError("is cut short")
    return opened.read(length)


def _string(opened: BinaryIO) -> str:
    (length,) = _read(opened, "Q")
    return _bytes(opened, length).decode("utf-8", errors="replace")


def _value(opened: BinaryIO) -> Any:
    """Return the value that follows; of arrays a list."""
    (kind,) = _read(opened, "I")
    return _of_kind(opened, kind)()


def _of_kind(opened: BinaryIO, kind: int) -> Callable[[], Any]:
    """Return what reads a value of this kind."""
    if kind == STRING:
        return lambda: _string(opened)
    if kind == ARRAY:
        inner, length = _read(opened, "IQ")
        if inner == STRING or inner == ARRAY:
            return lambda: [_of_kind(opened, inner)() for _ in range(length)]
        return lambda: list(_read(opened, f"{length}{_number(inner)}"))
    return lambda: _read(opened, _number(kind))[0]


def _number(kind: int) -> str:
    """Return the letter of struct for a number's kind."""
    letter = NUMBERS[kind] if kind < len(NUMBERS) else WIDE.get(kind)
    if letter is None:
        raise ValueError(f"has a value of kind {kind}, which the format does not know")
    return letter


def difference(theirs: list[str], tokenizer: Tokenizer) -> str:
    """Return the first difference between the tokens of a file and the tokenizer's, "" where there is none.

    Ids that no token of the tokenizer has are not compared: a model may have more rows than tokens. Of an added token
    the file may have the text that it stands for.
    """
    ours = {number: text for text, number in tokenizer.fast.get_vocab(with_added_tokens=True).items()}
    for number in sorted(ours):
        if number >= len(theirs):
            return f"it has {len(theirs):,} tokens, and the tokenizer has {ours[number]!r} as token {number:,}"
        if theirs[number] not in (ours[number], tokenizer.decode([number])):
            return f"its token {number:,} is {theirs[number]!r}, and the tokenizer's is {ours[number]!r}"
    for number, text in enumerate(theirs):
        if number not in ours and text != UNUSED.format(number):
            return f"its token {number:,} is {text!r}, and the tokenizer has none of that number"
    return ""


def check(file: Path, tokenizer: Tokenizer, folder: str) -> list[Problem]:
    """Refuse a GGUF file whose vocabulary is not that of the tokenizer of `folder`."""
    found = difference(tokens(file), tokenizer)
    remedy = "give the folder that the file was made of"
    return [Problem("gguf", f"{file} has another vocabulary than {folder}: {found}; {remedy}")] if found else []
