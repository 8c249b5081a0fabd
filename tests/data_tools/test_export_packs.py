"""The exports, read again by the rules of the trainers they are for."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_tools.base import declared
from data_tools.chats.tokenizer import Tokenizer, load_tokenizer
from data_tools.mistake import UserMistake
from data_tools.packs.export_packs import export
from data_tools.packs.pack import Config, check, pack
from data_tools.packs.plan import PackReader
from data_tools.packs.store import Provenance, StoreWriter, row_text

Document = tuple[list[int], list[int]]


def documents_of_line(messages: list[dict], tokenizer: Tokenizer) -> list[Document]:
    """(ids, mask) of each conversation of a line, by Megatron-LM's rule: a system message begins one
    (sft_dataset.py), each message is tokenized by itself, system and user are masked, and an assistant follows a user
    (sft_tokenizer.py, `identity`)."""
    conversations: list[list[dict]] = []
    for message in messages:
        if message["role"] == "system":
            conversations.append([])
        conversations[-1].append(message)
    found = []
    for conversation in conversations:
        ids: list[int] = []
        mask: list[int] = []
        for place, message in enumerate(conversation):
            if message["role"] == "assistant":
                assert conversation[place - 1]["role"] == "user" and message["content"]
            part = tokenizer.encode(message["content"])
            ids += part
            mask += [int(message["role"] == "assistant")] * len(part)
        assert ids == tokenizer.encode("".join(message["content"] for message in conversation))
        found.append((ids, mask))
    return found


@pytest.fixture
def documents() -> list[Document]:
    """One begins with its answer, one has several turns, one teaches nothing."""
    return [([5, 6, 7, 8, 3], [0, 0, 0, 1, 1]), ([9, 4], [1, 1]), ([6] * 7, [0, 1, 1, 0, 0, 1, 1]), ([7, 7], [0, 0])]


@pytest.fixture
def config(tmp_path: Path, tokenizer_folder: Path, documents: list[Document]) -> Config:
    store = tmp_path / "store"
    store.mkdir()
    writer = StoreWriter(store)
    for line, (ids, mask) in enumerate(documents):
        writer.add(np.array(ids, np.int32), np.array(mask, np.uint8), Provenance(0, line + 1, row_text(str(line), "")))
    writer.close()
    return Config(
        str(store), pack_length=10, export=["megatron_lm", "megatron_bridge"], tokenizer=str(tokenizer_folder)
    )


def packed(config: Config, folder: Path) -> list[list[Document]]:
    """Pack and export; the documents of each pack, in order."""
    folder.mkdir()
    pack(config, folder)
    reader = PackReader(Path(config.store), folder)
    return [[(ids.tolist(), mask.tolist()) for _, ids, mask in reader.documents(i)] for i in range(reader.n_packs)]


def test_megatron_lm_reads_the_same_documents_also_without_a_system_message(tmp_path: Path, config: Config) -> None:
    expected = packed(config, tmp_path / "plan")
    facts = export(config, tmp_path / "plan")["megatron_lm"]
    assert {type(value) for value in facts.values()} == {int}
    tokenizer = load_tokenizer(config.tokenizer)
    lines = [json.loads(line)["messages"] for line in (tmp_path / "plan" / "packed.jsonl").read_text().splitlines()]
    assert [documents_of_line(line, tokenizer) for line in lines] == expected
    ends = sum(ids[-1] == tokenizer.eos_id for one in expected for ids, _ in one)
    assert facts == {"documents": 4, "unstable": 0, "without_end": 4 - ends}


def test_megatron_bridge_reads_the_same_documents(tmp_path: Path, config: Config) -> None:
    """By packed_sequence.py: a segment of n tokens gives n - 1 inputs and labels; the mask lies on the labels."""
    expected = packed(config, tmp_path / "plan")
    assert export(config, tmp_path / "plan")["megatron_bridge"] == {"documents": 4}
    rows = pq.read_table(tmp_path / "plan" / "packed.idx.parquet").to_pylist()
    assert len(rows) == len(expected)
    for row, documents in zip(rows, expected):
        bounds = [*row["seq_start_id"], len(row["input_ids"])]
        for (start, stop), (ids, mask) in zip(zip(bounds, bounds[1:]), documents, strict=True):
            assert row["input_ids"][start:stop] == ids
            assert row["loss_mask"][start : stop - 1] == mask[1:]


def test_text_that_gives_other_tokens_is_named_or_left_out(tmp_path: Path, config: Config, monkeypatch) -> None:
    packed(config, tmp_path / "plan")
    decode = Tokenizer.decode
    monkeypatch.setattr(
        Tokenizer, "decode", lambda self, ids, **rest: "" if ids == [9, 4] else decode(self, ids, **rest)
    )
    with pytest.raises(
        UserMistake, match=r"document 1 \(source 0, line 2\) has no form for Megatron-LM: its text gives"
    ):
        export(config, tmp_path / "plan")
    config.on_unstable = "drop"
    assert export(config, tmp_path / "plan")["megatron_lm"]["unstable"] == 1


def test_an_export_as_text_needs_the_tokenizer() -> None:
    problems = declared.check_with(Config("s", export=["megatron_lm", "megatron"]), check)
    assert [problem.where for problem in problems] == ["export[1]", "tokenizer"]
    assert "did you mean megatron_lm?" in problems[0].message
