"""Fixtures of the data tests: the project's tokenizer, small GSM8K-schema files, the real ones where they are."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.chats.char_tokenizer import write_char_tokenizer
from data_tools.packs.materialize import Config, finish, materialize
from data_tools.tasks.calculator import ALPHABET
from data_tools.tasks.task import Source


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_char_tokenizer(folder, ALPHABET)
    return folder


def line(*marks: str) -> str:
    """One GSM8K-schema line with these calculator marks."""
    return json.dumps({"question": "How many?", "answer": " so ".join(f"<<{mark}>>" for mark in marks)})


def build(config: Config, folder: Path, count: int = 1) -> tuple[Path, dict]:
    """materialize + finish over `count` elements; returns the finished store's folder and facts."""
    parts = []
    for index in range(count):
        part = folder / f"part{index}of{count}"
        part.mkdir(parents=True)
        materialize(config, part, index, count)
        parts.append(part)
    out = folder / f"out{count}"
    out.mkdir()
    return out, finish(config, parts, out)


@pytest.fixture
def synthetic_store(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., Path]:
    def make(rows: int = 300, **changes: object) -> Path:
        config = Config(
            task="calculator", tokenizer=str(tokenizer_folder), source=Source(synthetic_rows=rows), **changes
        )
        return build(config, tmp_path / "store")[0]

    return make
