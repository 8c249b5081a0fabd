"""`afterok inspect` on the store and the packs of a real run."""

import re
from pathlib import Path

import pytest

from tests.command import afterok, afterok_json, one_line

TINY = Path(__file__).parents[2] / "jobs" / "pipelines" / "tiny.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The data half of the quick start."""
    text = TINY.read_text()
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "data.yaml").write_text(text[: text.index("  sft:")])
    afterok("run", folder / "data.yaml", "params.train_rows=400", "cluster=local", "--run", folder / "run")
    return folder / "run"


def test_a_store_shows_its_balance_lengths_and_text_with_the_mask(run: Path) -> None:
    found = afterok_json("inspect", run, "data", "--documents", "2")
    assert sum(row[2] for row in found["lengths"]) == found["facts"]["rows"]
    assert len(found["documents"]) == 2 and found["balance"]["columns"][0] == "source"
    for document in found["documents"]:
        prompt, answer = document["spans"]
        assert not prompt["trained"] and prompt["text"].endswith("=") and answer["trained"]
    shown = afterok("inspect", run, "data", "--documents", "1").stdout
    assert "in the loss: ⟦ ⟧" in shown and "=⟦" in shown and "Lengths" in shown and "more token" not in shown
    cut, whole = afterok("inspect", run, "data", "--documents", "1", "--tokens", "2").stdout, found["documents"][0]
    assert f"… {whole['tokens'] - 2} more tokens (--tokens {whole['tokens']})" in cut


def test_a_pack_shows_its_documents(run: Path) -> None:
    found = afterok_json("inspect", run, "packs", "--pack", "1")
    assert found["title"].startswith("pack 1 of ") and len(found["documents"]) == 3


@pytest.mark.parametrize(
    "words, told",
    [
        (["pack"], r"'pack' is no phase of .* that makes a token store or packs \(did you mean packs\?"),
        (["packs", "--pack", "99999"], "packs has packs 0 to "),
        (["data", "--pack", "1"], "data is a token store, not a pack plan"),
    ],
)
def test_wrong_words_are_one_line(run: Path, words: list[str], told: str) -> None:
    assert re.search(told, one_line(afterok("inspect", run, *words, check=2)))


def test_a_sealed_store_is_shown_where_another_phase_failed(tmp_path: Path) -> None:
    row = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
    (tmp_path / "rows.jsonl").write_text(row)
    (tmp_path / "empty.jsonl").write_text("5")
    phase = "  {}: {{uses: materialize, with: {{source: {{inputs: [{}]}}, tokenizer: '${{phases.init.out}}'}}}}\n"
    (tmp_path / "two.yaml").write_text(
        "name: two\nphases:\n  init: {uses: init_model, with: {alphabet: bytes}}\n"
        + phase.format("failed", tmp_path / "empty.jsonl")
        + phase.format("kept", tmp_path / "rows.jsonl")
    )
    afterok("run", tmp_path / "two.yaml", "cluster=local", "--run", tmp_path / "run", check=2)
    assert "⟦a" in afterok("inspect", tmp_path / "run", "kept").stdout
