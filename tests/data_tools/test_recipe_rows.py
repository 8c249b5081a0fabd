"""What becomes of each row of a recipe: held out, trained on, or told; with files of one's own."""

import json
from pathlib import Path

import pytest

from data_tools.base.durable import read_json
from data_tools.mistake import UserMistake
from data_tools.packs.materialize import Config, check
from data_tools.packs.store import Store
from data_tools.recipes.recipe import Files, resolve
from data_tools.records.balance import Balance
from jobs.phases import materialize as phase
from tests.data_tools.chats import write_tokenizer
from tests.data_tools.conftest import build
from tests.data_tools.test_recipes import ASKED, chat


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def own(folder: Path, tokenizer: Path, text: str, rows: dict[str, list[dict]], **more: object) -> Config:
    """Return the config of a recipe of one's own, and of files with these rows of its sources."""
    (folder / "own.yaml").write_text(text)
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {name: Files([str(folder / f"{name}.jsonl")]) for name in rows}
    return Config(recipe=str(folder / "own.yaml"), recipe_sources=files, tokenizer=str(tokenizer), **more)


@pytest.mark.parametrize("text", [
    "sources: {a: {held_out: 4}}", "sources: {a: {}}\nvalidation: {v: {stop: 4}}", "sources: {b: {held_out: 4}, a: {}}",
])  # fmt: skip
def test_no_text_that_is_held_out_is_trained_on_however_often_it_stands_and_whatever_its_loss(
    tmp_path: Path, tokenizer: Path, text: str
) -> None:
    rows = [chat(f"Ask {n}", "Yes.") for n in range(8)]
    turn = {"role": "assistant", "content": "Yes.", "weight": 0}
    other_loss = [{"messages": [ASKED, turn, *row["messages"]]} for row in rows]
    trained = [{"messages": [ASKED, {**turn, "weight": 1}, *row["messages"]]} for row in rows]
    rows = {"a": [*trained, *other_loss], "b": trained, "v": trained}
    used = {name: lines for name, lines in rows.items() if f"{name}: {{" in text}
    for dedupe in (True, False):
        store, facts = build(own(tmp_path, tokenizer, text, used, dedupe=dedupe), tmp_path / str(dedupe), 2)
        assert facts["validation"]["rows"] == 4
        sets = [
            {tuple(words) for words in Store(folder).row_hashes.tolist()} for folder in (store, store / "validation")
        ]
        assert sets[0].isdisjoint(sets[1]) and len(sets[0] | sets[1]) == 8, dedupe
        Balance.from_json(read_json(store / "balance.json")).check()


CATEGORY = "{where: {category: [Short]}}"


@pytest.mark.parametrize("text, said", [
    (f"sources: {{a: {{}}, b: {CATEGORY}}}", ["no row of b"]),
    ("sources: {none: {}, a: {}}\nvalidation: {b: {stop: 30}}", ["12 rows held out for validation", "no row of none"]),
    ("sources: {a: {}}\nvalidation: {none: {}}", ["no row of none"]),
    ("sources: {b: {held_out: 12}, a: {}}", ["12 rows held out for validation", "no row of b"]),
    ("sources: {a: {share: rest}, b: {share: 1.0e-6}}", ["no row of b"]),
    ("sources: {a: {share: rest}, b: {share: 0}}", []),
])  # fmt: skip
def test_a_source_that_gives_no_row_is_told_or_refused(
    tmp_path: Path, tokenizer: Path, text: str, said: list[str]
) -> None:
    rows = {"none": [], "a": [chat(f"A {n}", "Yes.") for n in range(9)],
            "b": [chat(f"B {n}", "Yes.", category="short") for n in range(12)]}  # fmt: skip
    used = {name: lines for name, lines in rows.items() if f"{name}: {{" in text}
    _, facts = build(own(tmp_path, tokenizer, text, used), tmp_path, 1)
    assert phase._recipe(facts) == said
    if said:
        with pytest.raises(UserMistake, match=f"{said[-1]} is drawn; "):
            build(own(tmp_path, tokenizer, f"short: fail\n{text}", used), tmp_path / "fails", 2)


def test_without_a_row_of_the_source_that_has_the_rest_there_is_no_mix(tmp_path: Path, tokenizer: Path) -> None:
    rows = {"a": [], "b": [chat("B", "Yes.")], "c": [chat("C", "Yes.")]}
    config = own(tmp_path, tokenizer, "sources: {a: {share: rest}, b: {share: 0.3}, c: {}}", rows)
    with pytest.raises(UserMistake, match="a has no row to be trained on, and with `share: rest`"):
        build(config, tmp_path, 2)


def test_a_file_of_a_source_that_is_given_twice_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    config = own(
        tmp_path, tokenizer, "sources: {a: {}, b: {files_of: a, view: answer_only}}", {"a": [chat("A", "Yes.")]}
    )
    config.recipe_sources["a"].inputs *= 2
    (problem,) = check(config)
    assert str(problem).startswith("recipe_sources.a.inputs: ") and "is given twice; name each file once" in str(
        problem
    )


def test_shares_of_a_group_may_leave_nothing_to_its_rest(tmp_path: Path) -> None:
    lists = {"b": [0.3, 0.9], "c": [0.3, 0.1], "d": [0.3, "rest"]}
    text = json.dumps({"sources": {"a": {"share": "rest"}} | {name: {"share": share} for name, share in lists.items()}})
    (tmp_path / "own.yaml").write_text(text)
    assert {s.name: s.share for s in resolve(str(tmp_path / "own.yaml"), {}).sources}["d"] == 0
