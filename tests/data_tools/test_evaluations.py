"""What is said of evaluations: each task by itself, side by side by prompt, and in the layout of another harness."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from data_tools.base import durable
from data_tools.evaluations import harness
from data_tools.evaluations.accuracy import accuracy, headline, unclear_names, write_tables
from data_tools.evaluations.lines import lines_of
from data_tools.evaluations.plot import svg_of
from data_tools.evaluations.side_by_side import side_by_side, table_of
from data_tools.mistake import UserMistake
from data_tools.tasks.estimators import majority_at_k, pass_at_k, wilson
from data_tools.tasks.mix import Entry
from data_tools.tasks.task import Item, Source


def line(task: str, number: int, right: bool, votes: list[tuple[str | None, bool]]) -> dict[str, Any]:
    sampled = {"votes": votes, "sampled": len(votes), "sampled_correct": sum(good for _, good in votes)}
    told = {"prompt": f"{task}/{number}", "completion": "c", "said": "4", "correct": right, "seen": None, "kind": task}
    return told | sampled


RIGHT, WRONG = ("4", True), ("5", False)
EASY = [line("easy", n, True, [RIGHT, RIGHT, WRONG, (None, False)]) for n in range(6)]
HARD = [line("hard", n, n == 0, [RIGHT if n < 2 else WRONG] + [WRONG] * 3) for n in range(4)]
RECORDS = {name: {"lines": 9, "rows": 9, "prompts": 4} for name in ("easy", "hard")}


def test_tasks_are_told_each_by_itself_and_never_pooled():
    found = accuracy([*EASY, *HARD], tasks=["easy", "hard"])
    assert found["prompts"] == 10 and found["tasks"] == ["easy", "hard"]
    pooled = [name for name in found if not name.startswith(("easy_", "hard_")) and name not in ("prompts", "tasks")]
    assert not pooled
    assert found["easy_accuracy"] == 1 and found["hard_accuracy"] == 0.25
    assert found["hard_sampled_accuracy"] == 0.125 and found["hard_pass@4"] == 0.5
    assert found["hard_intervals"]["accuracy"] == pytest.approx(wilson(1, 4))
    alone = accuracy(EASY, tasks=["easy"])
    assert alone["accuracy"] == alone["easy_accuracy"] == 1  # of one task nothing is pooled


def test_a_mean_over_tasks_is_made_where_it_is_named_and_counts_each_alike():
    found = accuracy([*EASY, *HARD], tasks=["easy", "hard"], macro={"both": ["easy", "hard"]})
    mean = found["macro"]["both"]
    assert mean["tasks"] == ["easy", "hard"] and mean["accuracy"] == (1 + 0.25) / 2  # of prompts it would be 0.7
    low, high = mean["accuracy_interval"]
    assert 0 <= low < mean["accuracy"] < high <= 1 and "accuracy_normalized" not in mean


def test_a_mean_over_tasks_of_which_one_has_no_accuracy_says_which(tmp_path):
    """In the facts, the headline and the table; another measure does not stand in for the accuracy."""
    unjudged = [{**line("tool", n, True, [RIGHT] * 4), "correct": None, "reward": 0.3} for n in range(3)]
    greedy = [{key: value for key, value in one.items() if "sampled" not in key} for one in HARD]
    tasks = ["easy", "hard", "tool"]
    for lines, pair, missing, said in (
        ([*EASY, *unjudged], ["easy", "tool"], {"accuracy": ["tool"], "sampled_accuracy": ["tool"]},
         "macro both none (mean over easy, tool; no accuracy of tool; no sampled accuracy of tool)"),
        ([*EASY, *greedy], ["easy", "hard"], {"sampled_accuracy": ["hard"]},
         "macro both 0.625 (mean over easy, hard; no sampled accuracy of hard)"),
        ([*EASY, *HARD], ["easy", "hard"], None, "macro both 0.625 (mean over easy, hard)"),
    ):  # fmt: skip
        result = accuracy(lines, tasks=tasks, macro={"both": pair})
        assert result["macro"]["both"].get("missing") == missing
        assert headline(result).endswith(said) and ("accuracy" in result["macro"]["both"]) == ("none" not in said)
        write_tables(tmp_path, {**result, "records": RECORDS}, which="at step 3")
        (label, *cells) = durable.read_json(tmp_path / "tables" / "accuracy.json")["rows"][-1]
        told = said.removeprefix("macro both ").partition("(")[2].removesuffix(")")
        assert label == f"macro both: {told}" and any(cells) == ("none" not in said)


def test_samples_that_cannot_be_scored_count_as_wrong_and_the_headline_says_how_many():
    """A mean reward leaves them out."""
    unread = {"reward": None, "correct": False, "votes": [RIGHT, WRONG, WRONG], "sampled": 3, "sampled_correct": 1}
    lines = [{**one, "reward": 1.0} for one in EASY[:3]] + [{**EASY[3], **unread, "sampled_unscored": 2}]
    found = accuracy(lines)
    assert (found["accuracy"], found["unscored"], found["sampled_unscored"]) == (0.75, 1, 2)
    assert found["sampled_accuracy"] == pytest.approx((3 * 2 / 4 + 1 / 3) / 4)
    told = headline(found)
    assert "(3 of 4), of which 1 could not be scored and count as wrong" in told
    assert "(2 samples could not be scored and count as wrong)" in told
    graded = [{**one, "reward": 0.5, "best": 1.0} for one in EASY[:2]] + [lines[3]]
    assert accuracy(graded)["reward"] == 0.5 and "reward 0.500 of the others" in headline(accuracy(graded))
    assert "scored" not in headline(accuracy(lines[:3]))


def test_no_task_has_facts_under_the_names_of_anothers():
    for name in ("seen", "unseen", "sampled", "reward", "pass@4", "maj@1", "share_4", "sampled_share_4"):
        assert unclear_names([name]) == {name: ""} and unclear_names(["a", f"a_{name}"]) == {f"a_{name}": "a"}
    for names in (["a", "b_seen"], ["a", "a_b"], ["a", "aseen"], ["gsm8k", "gsm8k_hard", "math", "math500"]):
        assert unclear_names(names) == {}
        lines = [line(name, n, name == "a", [RIGHT if n else WRONG] * 2) for name in names for n in range(3)]
        found = accuracy(lines, tasks=names)
        for name in names:
            alone = accuracy([{**one, "kind": ""} for one in lines if one["kind"] == name])
            assert {fact: found[f"{name}_{fact}"] for fact in alone} == alone


def test_a_gain_over_some_prompts_says_over_how_many():
    before = {one["prompt"]: one for one in EASY}
    told = headline(accuracy(EASY, before))
    assert "gain +0.0" in told and "both asked" not in told
    few = accuracy(EASY, dict([*before.items()][:2]))
    assert few["compared_prompts"] == 2 and "of 2 prompts that both asked" in headline(few)
    alone = accuracy(EASY[:1], before)  # of one prompt nobody knows how far it is from others
    assert alone["gain_error"] is None and "gain +0.0 ± unknown points" in headline(alone)
    none = accuracy(HARD, before)
    assert none["compared_prompts"] == 0 and "no gain: compare_with asked none of these prompts" in headline(none)


def test_the_numbers_of_a_task_are_those_of_hand_enumeration():
    found = accuracy(HARD)
    for k in (1, 2, 4):
        assert found[f"pass@{k}"] == pytest.approx(sum(pass_at_k(4, c, k) for c in (1, 1, 0, 0)) / 4)
        each = [majority_at_k([a for a, _ in one["votes"]], [r for _, r in one["votes"]], k) for one in HARD]
        assert found[f"maj@{k}"] == pytest.approx(sum(each) / 4)
    assert set(found["intervals"]) == {"accuracy", "sampled_accuracy"} | {
        f"{kind}@{k}" for kind in ("pass", "maj") for k in (1, 2, 4)
    }
    for measure, (low, high) in found["intervals"].items():
        assert low <= found[measure] <= high and low < high, measure


def test_a_table_has_a_row_for_each_task_and_for_each_named_mean(tmp_path):
    result = accuracy([*EASY, *HARD], tasks=["easy", "hard"], macro={"both": ["easy", "hard"]})
    write_tables(tmp_path, {**result, "records": RECORDS}, which="at step 3")
    table = durable.read_json(tmp_path / "tables" / "accuracy.json")
    assert [row[0] for row in table["rows"]] == ["easy", "hard", "macro both: mean over easy, hard"]
    assert table["columns"][:5] == ["prompts", "distinct", "correct", "greedy accuracy", "95%"]
    assert table["rows"][2][3] == 0.625 and "pass@4" in table["columns"]


# -- side by side -----------------------------------------------------------------------------------------------------


def written(folder: Path, lines: list[dict[str, Any]], **settings: Any) -> Path:
    folder.mkdir()
    entries = {name: Entry(name, source=Source(["rows.jsonl"])) for name in ("gsm8k", "svamp")}
    evaluated = harness.Evaluated(entries, "m", samples=4, seed=0, greedy={"temperature": 0.0}, sampled=settings)
    result = {**accuracy(lines, tasks=list(entries)), "records": dict.fromkeys(entries, RECORDS["easy"])}
    items = {name: [Item(f"{name}/{n}", f"{n}?", "4") for n in range(9)] for name in entries}
    whole = [one | {"completions": ["a", "b", "c", "d"]} for one in lines]
    harness.write_samples(folder, evaluated, whole, harness.documents(evaluated, items))
    harness.write_results(folder, evaluated, lines, result)
    durable.write_json(folder / "result.json", result)
    (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder


def gsm8k(*rights: bool, of: int = 4) -> list[dict[str, Any]]:
    return [line("gsm8k", n, right, [RIGHT if right else WRONG] * of) for n, right in enumerate(rights)]


def test_evaluations_stand_side_by_side_and_gains_are_by_prompt(tmp_path):
    svamp = [line("svamp", 0, True, [RIGHT] * 4)]
    before = written(tmp_path / "a", [*gsm8k(False, False, True, True), *svamp], temperature=1.0)
    after = written(tmp_path / "b", [*gsm8k(True, False, True, True, False, of=2), *svamp], temperature=0.6)
    found = side_by_side({"before": before, "after": after})
    rows = {(row.task, row.measure): row.scores for row in found.rows}
    assert list(rows)[:4] == [("gsm8k", m) for m in ("accuracy", "sampled_accuracy", "pass@2", "maj@2")]
    first, second = rows["gsm8k", "accuracy"]
    assert first.value == 0.5 and first.gain is None and second.value == 0.6 and second.prompts == 5
    # Of the four that both asked, one was gained: not 60% less 50%.
    assert (second.gain.value, second.gain.prompts) == (0.25, 4) and second.gain.error == pytest.approx(0.25)
    assert second.gain.interval[0] <= 0.25 <= second.gain.interval[1]
    assert rows["svamp", "accuracy"][1].gain.interval == pytest.approx([-wilson(0, 1)[1] * 1, wilson(0, 1)[1] * 1])
    assert found.notes == [
        f"{task} was asked otherwise in after than in before: temperature 0.6 for 1.0" for task in ("gsm8k", "svamp")
    ]
    table = table_of(found)
    assert [row[3] for row in table["rows"] if row[:2] == ["svamp", "greedy"]] == [
        "100.0% [20.7, 100.0] of 1; +0.0 ± unknown [-79.3, +79.3]"
    ]
    assert table["columns"] == ["task", "measure", "before", "after"] and table["rows"][0][:2] == ["gsm8k", "greedy"]
    assert table["rows"][0][3].startswith("60.0% [") and "; +25.0 ± 25.0 [" in table["rows"][0][3]
    assert table["rows"][0][3].endswith("of 4 that both asked")
    json.dumps(found.as_json())
    drawn = ElementTree.fromstring(svg_of(found))
    titles = [title.text for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert "before: 50.0% of 4 prompts" in titles and len(titles) == 2 * len(found.rows)


def test_a_folder_that_no_evaluation_wrote_is_named(tmp_path):
    with pytest.raises(UserMistake, match="phase: .* is no output of an evaluation .*; name the folder"):
        lines_of(str(tmp_path), "phase")


# -- the layout of the harness ----------------------------------------------------------------------------------------


def test_results_and_samples_have_the_harness_names(tmp_path):
    lines = [*gsm8k(True, False), line("svamp", 0, True, [RIGHT] * 4)]
    folder = written(tmp_path / "a", lines, temperature=1.0) / "harness"
    results = durable.read_json(folder / "results.json")
    assert {"results", "configs", "versions", "n-shot", "higher_is_better", "n-samples"} <= set(results)
    told = results["results"]["gsm8k"]
    assert told["exact_match,greedy"] == 0.5 and told["exact_match_stderr,greedy"] == pytest.approx(0.5)
    assert told["avg@4,sampled"] == told["pass@4,sampled"] == 0.5 and told["sample_len"] == 2
    assert results["n-shot"]["gsm8k"] == 0 and results["higher_is_better"]["gsm8k"]["exact_match"] is True
    assert results["configs"]["gsm8k"]["output_type"] == "generate_until"
    rows = [json.loads(one) for one in (folder / "samples_gsm8k.jsonl").read_text().splitlines()]
    assert [(row["doc_id"], row["filter"]) for row in rows] == [
        (n, name) for n in (0, 1) for name in ("greedy", "sampled")
    ]
    assert rows[1]["resps"] == [["a", "b", "c", "d"]] and rows[1]["filtered_resps"] == [["4"] * 4]
    assert rows[0]["arguments"]["gen_args_0"]["arg_0"] == "0?" and rows[0]["doc"] == {"prompt": "0?", "answer": "4"}
    for row in rows:
        assert set(row["metrics"]) <= set(row) and row["target"] == "4" and len(row["doc_hash"]) == 64
    assert rows[0]["exact_match"] == 1.0 and rows[2]["exact_match"] == 0.0


@pytest.mark.parametrize("text", ["[]", "null", "1", '"x"', '{"records": []}', '{"records": 1}', "{", ""])
def test_a_result_that_is_none_is_named(text, tmp_path):
    (tmp_path / "samples.jsonl").write_text("")
    (tmp_path / "result.json").write_text(text)
    with pytest.raises((UserMistake, durable.TornFile), match="result.json"):
        side_by_side({"one": tmp_path})
