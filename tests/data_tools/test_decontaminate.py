"""No question of an evaluated task stays in training data: found however it is spelled, told where, dropped or not."""

import datetime
import json
import random
from decimal import Decimal
from pathlib import Path

import pytest

from data_tools.mistake import UserMistake
from data_tools.prepare.contamination import Contamination, every_text, words
from data_tools.recipes.decontaminate import Config, asked, check, decontaminate, finish, without_template
from data_tools.tasks.mix import Entry, MixConfig, load_items
from data_tools.tasks.task import Source
from tests.inputs import Inputs

LONG = "A train leaves the old station at nine and needs three hours and ten minutes to reach the northern coast"


def known(*questions: str, ngram: int = 13) -> Contamination:
    found = Contamination(ngram)
    found.add("set", questions)
    return found


@pytest.mark.parametrize(
    "text, hit",
    [
        (f"Well... {LONG.upper()}?!", True),
        ("the old STATION, at nine; and needs three hours and ten minutes to", True),  # 13 words in a row
        ("the old station at nine and needs three hours and ten minutes", False),  # 12
        (LONG.replace("three", "four"), False),  # no run is longer than eleven
        ("First: how many apples are left now? Four.", True),  # all of a short question
        ("how many pears are left now", False),
        ("Prove it!", True),  # of a very short one, only where it is all there is
        ("Prove it by induction.", False),
        ("", False),
    ],
)
def test_a_text_holds_a_question_by_its_words_in_a_row(text: str, hit: bool) -> None:
    assert known(LONG, "How many apples are left now", "Prove it").touches(text) == hit


def test_questions_may_be_added_between_two_texts() -> None:
    held = known(LONG)
    assert not held.touches("how many apples are left now")
    held.add("other", ["How many apples are left now?"])
    hit = held.find("how many apples are left now, then")
    assert hit is not None and (hit.evaluation, hit.number, hit.is_whole) == ("other", 0, True) and held.touches(LONG)


def runs_of(text: str, size: int) -> set[tuple[str, ...]]:
    spelled = words(text)
    return {tuple(spelled[i : i + size]) for i in range(len(spelled) - size + 1)}


@pytest.mark.parametrize("seed", range(5))
def test_every_hit_is_one_and_none_is_missed_among_few_words(seed: int) -> None:
    """The same as sets of tuples say, where the words are so few that runs and parts of runs meet often."""
    draw = random.Random(seed)
    spell = lambda length: " ".join(draw.choice("abc") for _ in range(length))  # noqa: E731
    questions = [spell(draw.randint(0, 14)) for _ in range(60)]
    held = known(*questions, ngram=8)
    for _ in range(400):
        text = spell(draw.randint(0, 30))
        expected = any(
            words(text) == words(question)
            or len(words(question)) >= 5
            and runs_of(text, min(8, len(words(question)))) & runs_of(question, min(8, len(words(question))))
            for question in questions
            if question
        )
        hit = held.find(text)
        assert (hit is not None) == expected
        if hit is not None:
            assert f" {hit.shared} " in f" {text} " and f" {hit.shared} " in f" {questions[hit.number]} "


def test_what_all_prompts_begin_and_end_with_is_no_part_of_their_questions() -> None:
    prompts = [
        f"Solve this. {text} Put your answer within \\boxed{{}}." for text in (LONG, "Why is 3 odd?", "Why not?")
    ]
    assert without_template(prompts) == [" ".join(words(LONG)), "why is 3 odd", "why not"]
    assert without_template(prompts[:1] * 2) == [" ".join(words(prompts[0]))] * 2  # nothing tells question from form


def test_the_template_of_a_task_makes_no_training_row_of_another_question_a_hit(inputs: Inputs) -> None:
    entry = Entry("gsm8k", source=Source(inputs=[str(inputs.data("gsm8k/test.jsonl"))]))
    held = Contamination(13)
    held.add("gsm8k", without_template([asked(item.prompt) for item in load_items("gsm8k", entry)]))
    train = Entry("gsm8k", source=Source(inputs=[str(inputs.data("gsm8k/train.jsonl"))]))
    prompts = [asked(item.prompt) for item in load_items("gsm8k", train)]
    hits = [hit for hit in map(held.find, prompts) if hit]
    assert len(hits) <= 0.01 * len(prompts)  # with the template it would be all
    own = [asked(item.prompt) for item in load_items("gsm8k", entry)]
    assert all(map(held.touches, own))


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def cleaned(config: Config, folder: Path, count: int) -> dict:
    parts, out = [folder / f"part_{count}_{index}" for index in range(count)], folder / f"out_{count}"
    for path in (*parts, out):
        path.mkdir(parents=True)
    for index, part in enumerate(parts):
        decontaminate(config, part, index, count)
    return finish(config, parts, out)


def data(folder: Path) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    questions = [
        {"question": LONG, "answer": "so #### 3"},
        {"question": "Why is it so, then, my dear?", "answer": "#### 1"},
    ]
    tasks = write(folder / "test.jsonl", questions)
    said = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "No."}]
    chats: list[dict] = [{"messages": [dict(message) for message in said], "number": number} for number in range(30)]
    chats[7]["messages"][1]["content"] = f"It goes\u2028like this: {LONG.lower()}!"
    chats[21]["messages"][0]["content"] = [{"type": "text", "text": "Hm: why is it so then, my dear"}]
    pairs = [{"problem": "one", "deepseek_solution": LONG}, {"problem": "two", "deepseek_solution": "x"}]
    return Config(
        inputs=[write(folder / "chats.jsonl", chats), write(folder / "ot.jsonl", pairs)],
        mix=MixConfig({"gsm8k_test": Entry("gsm8k", source=Source(inputs=[tasks]), evaluation_only=True)}),
    )


@pytest.mark.parametrize("count", [1, 4])
def test_rows_with_a_question_go_and_are_told_the_same_for_any_number_of_elements(tmp_path: Path, count: int) -> None:
    config = data(tmp_path)
    facts = cleaned(config, tmp_path, count)
    out = tmp_path / f"out_{count}"
    assert (facts["rows"], facts["kept"], facts["contaminated"]) == (32, 29, 3)
    assert (facts["by_evaluation"], facts["questions"]) == ({"gsm8k_test": 3}, 2)
    found = [json.loads(line) for line in open(out / "found.jsonl")]
    assert [(Path(row["input"]).name, row["row"], row["question"]) for row in found] == [
        ("chats.jsonl", 8, 1), ("chats.jsonl", 22, 2), ("ot.jsonl", 1, 1),
    ]  # fmt: skip
    lines = Path(config.inputs[0]).read_text().split("\n")
    assert (out / "chats.jsonl").read_text().split("\n") == lines[:7] + lines[8:21] + lines[22:]
    assert facts["tables"]["contamination"]["rows"] == [["gsm8k_test", 2, 2, 3, 2]]
    assert len(facts["tables"]["examples"]["rows"]) == 3


def test_a_row_is_reported_or_fails_where_that_is_asked_for(tmp_path: Path) -> None:
    config = data(tmp_path)
    config.on_found = "report"
    facts = cleaned(config, tmp_path, 2)
    assert (facts["kept"], facts["contaminated"]) == (32, 3)
    config.on_found = "fail"
    with pytest.raises(UserMistake, match=r"chats.jsonl:8: holds question 1 of gsm8k_test: 'a train leaves .*; take"):
        cleaned(config, tmp_path / "fail", 1)


def test_its_questions_are_an_evaluation_set_for_other_phases(tmp_path: Path) -> None:
    config = data(tmp_path)
    cleaned(config, tmp_path, 1)
    again = Config(inputs=config.inputs, evaluation_sets=[str(tmp_path / "out_1/questions.jsonl")])
    assert cleaned(again, tmp_path / "again", 1)["contaminated"] == 3


def test_settings_that_keep_nothing_out_or_write_one_file_twice_are_refused(tmp_path: Path) -> None:
    (problem,) = check(Config(inputs=["a.jsonl"]))
    assert problem.where == "mix.entries" and "nothing to keep out" in problem.message
    (problem,) = check(Config(inputs=["x/a.jsonl", "y/a.parquet"], evaluation_sets=["e.jsonl"]))
    assert problem.where == "inputs[1]" and "would both be a.jsonl" in problem.message
    assert check(Config(inputs=["found.jsonl"], evaluation_sets=["e.jsonl"]))


def test_every_text_of_a_record_counts_at_any_depth() -> None:
    assert list(every_text({"a": ["b", {"c": "d", "e": 3}], "f": None})) == ["b", "d"]


ASKED = "Which of these is a mammal?"
CHOICES = {"question": ASKED, "choices": ["a dog", "a frog"], "answer": 0, "subject": "anatomy"}
WITH_MORE = {  # tasks whose prompts have more than the question, at options that word it otherwise
    "arc_easy": (CHOICES, {}),
    "arc_challenge": (CHOICES, {"answered_by": "likelihood"}),
    "mmlu": (CHOICES, {"answered_by": "likelihood"}),
    "mbpp": ({"text": ASKED, "code": "def f(): pass", "test_list": ["assert f() is None"]}, {}),
}


@pytest.mark.parametrize("task", WITH_MORE)
def test_a_question_is_found_without_the_choices_and_tests_of_its_prompt(tmp_path: Path, task: str) -> None:
    record, options = WITH_MORE[task]
    key = "text" if task == "mbpp" else "question"
    records = [record, record | {key: "What are the units of an electric current?", "subject": "virology"}]
    rows = [record, {"messages": [{"role": "user", "content": ASKED}]}, {"text": f"Q: {ASKED} A:"}, {"text": "mammal"}]
    entry = Entry(task, options, source=Source([write(tmp_path / "test.jsonl", records)]), evaluation_only=True)
    config = Config(inputs=[write(tmp_path / "rows.jsonl", rows)], mix=MixConfig({task: entry}))
    assert cleaned(config, tmp_path, 1)["contaminated"] == 3


def test_a_question_that_is_asked_with_other_choices_counts_with_its_own(tmp_path: Path) -> None:
    others = [CHOICES | {"choices": ["a cow", "a bee"]}, CHOICES | {"question": "What are the units of a current?"}]
    records = [CHOICES, *others]
    rows = [{"text": ASKED}, {"text": f"{ASKED} A) a cow B) a bee"}]
    entry = Entry("arc_easy", source=Source([write(tmp_path / "test.jsonl", records)]), evaluation_only=True)
    config = Config(inputs=[write(tmp_path / "rows.jsonl", rows)], mix=MixConfig({"arc_easy": entry}), ngram=8)
    cleaned(config, tmp_path, 1)
    assert [row["row"] for row in map(json.loads, open(tmp_path / "out_1/found.jsonl"))] == [2]


@pytest.mark.parametrize("text", ["cafe\u0301 on the fifth street", "ｃａｆé ｏｎ the \ufb01fth street"], ids=ascii)
def test_a_question_is_found_in_any_form_of_unicode(text: str) -> None:
    assert known("Café on the fifth street").touches(text)


def test_a_row_with_half_of_a_surrogate_pair_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "\\ud800"}\n')
    config = Config(inputs=[str(tmp_path / "rows.jsonl")], evaluation_sets=[write(tmp_path / "q.jsonl", [CHOICES])])
    assert cleaned(config, tmp_path, 1)["kept"] == 1
    assert json.loads((tmp_path / "out_1/rows.jsonl").read_text()) == {"text": "\ud800"}


@pytest.mark.parametrize("value", [b"\xff", datetime.date(2026, 1, 1), Decimal("1.5")], ids=str)
def test_a_row_that_is_no_json_is_named(tmp_path: Path, value: object) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    pq.write_table(pa.table({"text": ["hi"], "more": [value]}), tmp_path / "rows.parquet")
    config = Config(inputs=[str(tmp_path / "rows.parquet")], evaluation_sets=[write(tmp_path / "q.jsonl", [CHOICES])])
    with pytest.raises(
        UserMistake, match="rows.parquet: row 1: cannot be written as JSON Lines: .*; write that column"
    ):
        cleaned(config, tmp_path, 1)
