"""What each task takes from its records, and what it pays for."""

import importlib
import itertools
import json
from fractions import Fraction
from pathlib import Path

import pytest

from data_tools.answers.forms import find_answer, last_boxed
from data_tools.records.hub import is_dataset
from data_tools.tasks.math_answers import Options, is_equal
from data_tools.tasks.mix import Entry, MixConfig, check_mix, compared, load, load_items
from data_tools.tasks.rewards import Score, Scorer, Verifier
from data_tools.tasks.task import Item, Source, load_task, task_names, task_options


def item_of(task: str, record: dict, **options) -> Item:
    module = load_task(task)
    [item] = module.items(record, task_options(module, options))
    return item


def score(task: str, item: Item, completion: str, **options):
    module = load_task(task)
    return module.rewards(item, completion, task_options(module, options))


EQUAL = [("\\frac{1}{2}", "0.5"), ("1/2", "\\dfrac{1}{2}"), ("(3,\\frac{\\pi}{2})", "\\left( 3, \\pi/2 \\right)"),
         ("72", "72.0"), ("70,000", "70000"), ("x^2+2x+1", "(x+1)^2"), ("\\text{Evelyn}", "Evelyn"),
         ("90", "90^\\circ"), ("10", "\\$10"), ("\\{1,2\\}", "\\{2,1\\}"), ("[0,1)", "[0, 1)"), ("4", "x=4"),
         ("10{,}000", "10000"),
         ("042", "42")]  # fmt: skip
DIFFERENT = [
    ("\\frac{1}{2}", "0.49"),
    ("[0,1)", "[0,1]"),
    ("2", "2,3"),
    ("5", "}{"),
    ("5", ""),
    ("5", "five"),
    ("x+1", "x+2"),
]


@pytest.mark.parametrize("gold, answer", EQUAL)
def test_equal_answers_are_right_however_they_are_written(gold, answer):
    assert is_equal(gold, answer)


@pytest.mark.parametrize("gold, answer", DIFFERENT)
def test_other_answers_are_wrong(gold, answer):
    assert not is_equal(gold, answer)


def test_the_last_answer_of_the_form_counts_and_a_box_is_always_accepted():
    text = "First \\boxed{1}, no, \\boxed{\\frac{1}{2} \\} {x}}. <answer> 3 </answer> #### 4\nAnswer: 5\n"
    assert last_boxed(text) == "\\frac{1}{2} \\} {x}"
    assert [find_answer(text, form) for form in ("tagged", "hashes", "answer_line")] == ["3", "4", "5"]
    assert (
        find_answer("\\boxed{7}", "tagged") == "7"
        and find_answer("7", "boxed") is None
        and find_answer("\\boxed{ }", "boxed") is None
    )


@pytest.mark.parametrize("completion, terms", [
    ("\\boxed{0.50}", {"correct": 1.0, "format": 0.0}),
    ("\\boxed{0.51}", {"correct": 0.0, "format": 1.0}),
    ("\\boxed{\\frac{}}", {"correct": 0.0, "format": 1.0}),  # unreadable: the model's fault
    ("one half", {"correct": 0.0, "format": 0.0}),
])  # fmt: skip
def test_wrong_and_unreadable_answers_get_nothing_but_the_format(completion, terms):
    assert score("math500", Item.of("?", "\\frac{1}{2}"), completion) == terms


def test_a_row_whose_own_answer_cannot_be_read_is_not_scorable():
    item = Item.of("?", "}{")
    assert score("math500", item, "\\boxed{1}") is None and score("math500", item, "\\boxed{}{}") is None


def test_format_counts_as_weighted_through_the_scorer():
    verifiers = {"math500": Verifier("math500", weights={"format": 0.1})}
    with Scorer(verifiers, workers=1) as scorer:
        found = [
            scorer.submit("math500", Item.of("?", "1/2"), text).result() for text in ("\\boxed{0.5}", "\\boxed{2}", "")
        ]
    assert [one.reward for one in found] == [1.0, 0.1, 0.0] and found[1].parts == {"correct": 0.0, "format": 1.0}
    assert [one.answer for one in found] == ["1/2", "2", None]


DAPO = {
    "prompt": [{"role": "user", "content":
                "Solve the following math problem step by step. The last line of your response "
                "should be of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
                "What is 2+2?\n\nRemember to put your answer on its own line after \"Answer:\"."}],
    "reward_model": {"ground_truth": "4", "style": "rule"}, "extra_info": {"index": "x"}}  # fmt: skip
RECORDS = {
    "dapo_math": [DAPO, {"prompt": "What is 2+2?", "solution": "4"}],
    "aime": [{"ID": "2024-I-1", "Problem": "What is 2+2?", "Answer": 4}, {"problem": "What is 2+2?", "answer": "4"}],
    "math500": [{"problem": "What is 2+2?", "solution": "It is $4$.", "answer": "4"}],
    "gsm8k": [{"question": "What is 2+2?", "answer": "It is <<2+2=4>>4.\n#### 4"}],
    "math": [
        {"problem": "What is 2+2?", "level": "Level 1", "type": "Algebra", "solution": "Not \\boxed{3}: \\boxed{4}."}
    ],
    "aime25": [{"problem": "What is 2+2?", "answer": "4", "id": "0"}, {"question": "What is 2+2?", "answer": 4}],
    "amc": [{"id": 0, "problem": "What is 2+2?", "answer": 4.0, "url": "x"}],
    "svamp": [{"ID": "chal-1", "Body": "What is", "Question": "2+2?", "Answer": 4.0, "Type": "Addition"}],
}


@pytest.mark.parametrize("task", RECORDS)
def test_questions_are_asked_in_the_form_that_is_wanted(task):
    for record in RECORDS[task]:
        item = item_of(task, record)
        asked = "What is. 2+2?" if task == "svamp" else "What is 2+2?"  # a body is a sentence
        assert item.answer in ("4", "4.0") and item.prompt == [
            {
                "role": "user",
                "content": f"{asked}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
            }
        ]
        text = item_of(task, record, chat=False, answer_format="hashes", instruction="Go.")
        assert (
            text.prompt == f"{asked}\n\nGo.\n"
            and score(task, text, "so\n#### 4", answer_format="hashes")["correct"] == 1.0
        )


def test_gsm8k_answers_lose_their_commas_and_need_their_mark():
    assert item_of("gsm8k", {"question": "?", "answer": "so\n#### 1,234"}).answer == "1234"
    with pytest.raises(ValueError, match="no ####"):
        item_of("gsm8k", {"question": "?", "answer": "1234"})


def test_an_unknown_form_is_refused():
    [message] = load_task("gsm8k").check_options(Options("boxd"))
    assert "unknown answer_format 'boxd' (did you mean boxed?" in message


def test_a_calculator_answers_what_was_begun_and_nothing_else():
    task, item = load_task("gsm8k"), Item.of("?", "24")
    options = task_options(task, {"calculator": True})
    assert task.stop_strings(options) == ["="]
    assert [task.reply(item, text, options)
            for text in ("so <<48/2=", "x =", "<<1/0=", "<<1/3=", "<<a=", "done", "<<1+1=2>> =")] == [
        "24>>", "", "error: division by zero>>", "error: no finite decimal>>", "error: 'a' at character 1 of 'a'>>",
        "", ""]  # fmt: skip
    assert task.stop_strings(task_options(task, {})) is None


CHOICES = {"question": "Which?", "choices": ["one", "two", "three"]}


@pytest.mark.parametrize("record", [
    CHOICES | {"answer": 2}, CHOICES | {"answer": "C"},
    {"question": "Which?", "choices": {"text": ["one", "two", "three"], "label": ["1", "2", "3"]}, "answerKey": "3"},
    {"question": "Which?", "choices": {"text": ["one", "two", "three"], "label": [2, 3, 1]}, "answerKey": 1},
])  # fmt: skip
def test_choices_are_lettered_and_the_letter_counts(record):
    item = item_of("multiple_choice", record)
    assert item.answer == "C" and "Which?\n\nA. one\nB. two\nC. three\n" in item.prompt[0]["content"]
    for right in (
        "\\boxed{C}",
        "\\boxed{(C)}",
        "\\boxed{\\text{C}}",
        "\\boxed{C. three}",
        "C",
        "(C)",
        "no \\boxed{A} \\boxed{C}",
    ):
        assert score("multiple_choice", item, right) == {"correct": 1.0, "format": 0.0}, right
    assert score("multiple_choice", item, "\\boxed{B}") == {"correct": 0.0, "format": 1.0}
    assert score("multiple_choice", item, "Clearly") == {"correct": 0.0, "format": 0.0}


def test_subjects_choose_questions_of_mmlu_and_unknown_ones_are_refused():
    rows = [CHOICES | {"answer": 1, "subject": subject} for subject in ("anatomy", "virology", "college_physics")]
    for subjects, count in (("", 3), ("science", 1), ("stem", 1), ("other", 2), ("anatomy, science", 2)):
        options = task_options(load_task("mmlu"), {"subjects": subjects})
        assert not load_task("mmlu").check_options(options)
        assert sum(len(load_task("mmlu").items(row, options)) for row in rows) == count, subjects
    [told] = load_task("mmlu").check_options(task_options(load_task("mmlu"), {"subjects": "sience"}))
    assert "unknown subject 'sience' (did you mean science?" in told
    with pytest.raises(ValueError, match="'subject' is 'x', none of MMLU's"):
        item_of("mmlu", CHOICES | {"answer": 1, "subject": "x"})


def test_choices_are_worded_for_likelihood_as_the_harness_words_them():
    record = CHOICES | {"answer": 2, "subject": "high_school_physics"}
    item = item_of("mmlu", record, answered_by="likelihood")
    about = "The following are multiple choice questions (with answers) about high school physics.\n\n"
    assert item.prompt == f"{about}Which?\nA. one\nB. two\nC. three\nAnswer:" and item.answer == "C"
    assert item.columns == {"letters": "ABC", "choices": ["A", "B", "C"]}
    for task in ("arc_easy", "arc_challenge"):
        item = item_of(task, record, answered_by="likelihood")
        assert item.prompt == "Question: Which?\nAnswer:" and item.columns["choices"] == ["one", "two", "three"]
    entries = {"arc_easy": Entry("arc_easy", {"answered_by": "likelihood"}, source=Source(["x"]))}
    assert compared(entries) == ["arc_easy"] and not check_mix(MixConfig(entries), comparing=True)
    [problem] = check_mix(MixConfig(entries))
    assert str(problem).startswith("mix.entries.arc_easy.options: compares choices, which only evaluate does")


COUNTDOWN = {"nums": [19, 76, 27], "target": 84}


@pytest.mark.parametrize("answer, right", [
    ("(19 + 76) - 27", False), ("27 * 76 / 19 - 24", False), ("76 + 27 - 19", True), ("27 - 19 + 76 = 84", True),
    ("76+27-19=85", False), ("76 + 8", False), ("76 + 27 - 19 + 0", False), ("76 + 27 - 19 - 19 + 19", False),
    (r"76 + 27 - 19 \times 1", False), (r"\(76 + 27 - 19\)", True), ("84", False), ("7.6 * 10 + 8", False),
    ("__import__('os')", False), ("76 + 27 − 19", True), ("", False), ("168 // 2", False),
])  # fmt: skip
def test_a_countdown_uses_each_number_once_and_reaches_its_target(answer, right):
    item = item_of("countdown", COUNTDOWN)
    found = score("countdown", item, f"I try.\n<answer>{answer}</answer>")
    assert found == {"correct": float(right), "format": float(bool(answer) and not right)}


def test_a_floor_division_is_no_answer_of_a_countdown_even_where_it_is_exact():
    item = item_of("countdown", {"nums": [8, 2], "target": 4})
    assert [score("countdown", item, f"<answer>8 {sign} 2</answer>")["correct"] for sign in ("/", "//", r"\div")] == [
        1.0, 0.0, 1.0]  # fmt: skip
    assert item.prompt[0]["content"].startswith("Using the numbers 8, 2, write an expression that equals 4.")


def test_countdowns_are_made_up_that_can_be_solved_and_training_has_none_that_is_held_out():
    task = load_task("countdown")
    rows = {split: [task.synthetic_row(7, index, split) for index in range(200)] for split in ("train", "heldout")}
    assert task.synthetic_row(7, 3, "train") == rows["train"][3] != task.synthetic_row(8, 3, "train")
    for split, found in rows.items():
        assert all(task.is_heldout(row["nums"], row["target"]) == (split == "heldout") for row in found)
        assert all(_can_reach([Fraction(n) for n in row["nums"]], row["target"]) for row in found[:40])
    entry = Entry("countdown", source=Source(synthetic_rows=5))
    assert not check_mix(MixConfig({"countdown": entry})) and len(load_items("countdown", entry)) == 5


def _can_reach(values: list[Fraction], target: int) -> bool:
    if len(values) == 1:
        return values[0] == target
    for one, other in itertools.permutations(range(len(values)), 2):
        a, b = values[one], values[other]
        rest = [value for place, value in enumerate(values) if place not in (one, other)]
        if any(_can_reach([*rest, value], target) for value in (a + b, a - b, a * b, *([a / b] if b else []))):
            return True
    return False


def test_choices_without_an_answer_among_them_are_malformed():
    for answer in (3, "D", True, None):
        with pytest.raises(ValueError, match="none of the choices A, B, C"):
            item_of("multiple_choice", CHOICES | {"answer": answer})
    assert item_of("multiple_choice", CHOICES | {"answer": None, "answerKey": "C"}).answer == "C"


@pytest.mark.parametrize("texts, labels, words", [
    (["one", "two"], ["A", "B", "C"], "labels A, B, C of 2 texts"), (["one", "two"], ["C"], "labels C of 2"),
    (["one", "two"], ["C", "C"], "labels C, C of 2 texts"), (["one", None], ["A", "C"], "None, which is no"),
    (["one", {"text": "two"}], ["A", "C"], "which is no text"),
])  # fmt: skip
def test_choices_of_which_nobody_can_tell_which_is_meant_are_malformed(texts, labels, words):
    record = {"question": "Which?", "choices": {"text": texts, "label": labels}, "answerKey": "C"}
    with pytest.raises(ValueError, match=words):
        item_of("multiple_choice", record)


@pytest.mark.parametrize("task, record", [
    ("gsm8k", {"question": 10**400, "answer": "#### 3"}), ("math500", {"problem": "p", "answer": 10**400}),
    ("svamp", {"Body": "b", "Question": "q", "Answer": -(10**400)}),
])  # fmt: skip
def test_a_number_that_no_float_holds_is_its_digits(task, record):
    item = item_of(task, record)
    assert str(10**400) in f"{item.prompt} {item.answer}" and score(task, item, f"\\boxed{{{item.answer}}}")["correct"]


ACTIONS = {"prompt": "Which?", "reward_action_0": "0.25", "reward_action_1": 0.75}


def test_an_action_is_worth_what_its_row_says_and_none_is_not_scorable():
    item = item_of("bracketed_action", ACTIONS)
    for completion, reward in (("[0]", 0.25), ("not [0] but [1]", 0.75), ("[ 01 ]", 0.75)):
        assert score("bracketed_action", item, completion) == {"action": reward}
    for completion in ("", "1", "[2]", "[0] or [7]", "[x]"):
        assert score("bracketed_action", item, completion) is None


def test_an_action_of_any_length_is_read_or_invalid():
    """Python makes no number of more than 4,300 digits, and a verifier that raises would mask what has a penalty."""
    item = item_of("bracketed_action", ACTIONS)
    for completion, reward in ((f"[{'0' * 5000}1]", 0.75), (f"[{'9' * 5000}]", -1.0), ("[1000000001]", -1.0)):
        assert score("bracketed_action", item, completion, on_invalid="penalty", penalty=-1.0) == {"action": reward}


def test_the_final_channel_of_a_decision_counts_alone():
    item = item_of("bracketed_action", ACTIONS)
    analysis = "<|channel|>analysis<|message|>I take [1]<|end|><|start|>assistant"
    for completion, reward in (
        (f"{analysis}<|channel|>final<|message|>[0]", 0.25),
        (f"{analysis}<|channel|>final<|message|>[0]<|return|>", 0.25),
        (f'{analysis}<|channel|>final <|constrain|>json<|message|>{{"action": "[0]"}}', 0.25),
        ("<think>maybe [1]</think> so [0]", 0.25), ("maybe [1]</think> so [0]", 0.25),
    ):  # fmt: skip
        assert score("bracketed_action", item, completion) == {"action": reward}, completion
    for completion in (
        analysis, f"{analysis}<|channel|>final<|message|>none", f"{analysis}<|channel|>final<|message|>",
        f"{analysis}<|channel|>commentary<|message|>[0]", "<think>[1]", "<think>[1]</think> none", "I take [1]<|end|>",
        f"{analysis}<|channel|>final<|message|>[1] no, [7]", "<|message|>[1]", "<|start|>assistant<|message|>[1]",
    ):  # fmt: skip
        assert score("bracketed_action", item, completion) is None, completion
        assert score("bracketed_action", item, completion, on_invalid="penalty", penalty=-1.0) == {"action": -1.0}


def test_a_penalty_has_to_have_an_effect():
    task = load_task("bracketed_action")
    for options, message in (
        ({"penalty": -1.0}, "no effect while on_invalid is mask"), ({"on_invalid": "msk"}, "unknown on_invalid 'msk'"),
        ({"on_invalid": "penalty", "penalty": float("nan")}, "no finite number"),
    ):  # fmt: skip
        [found] = task.check_options(task_options(task, options))
        assert message in found
    assert task.check_options(task_options(task, {"on_invalid": "penalty", "penalty": -1})) == []


@pytest.mark.parametrize("change, message", [
    (
        {"reward_action_1": None},
        "needs columns reward_action_0, reward_action_1, .* q_rewards .*; it has prompt, reward_action_0",
    ),
    ({"reward_action_3": 1}, "has reward_action_0, reward_action_1, reward_action_3 but no column reward_action_2"),
    ({"reward_action_0": ""}, "reward_action_0 is '', not a finite number"),
    ({"reward_action_0": "nan"}, "reward_action_0 is 'nan', not a finite number"),
    ({"reward_action_0": "1_0"}, "reward_action_0 is '1_0', not a finite number"),
    ({"reward_action_0": True}, "reward_action_0 is True, not a finite number"),
    ({"prompt": ""}, "no prompt under 'prompt'"),
])  # fmt: skip
def test_a_missing_reward_column_is_named(change, message):
    record = {key: value for key, value in (ACTIONS | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        item_of("bracketed_action", record)


def test_q_values_become_rewards_of_actions(tmp_path):
    """From the table of Q-values, through the phase's function, to a score."""
    from data_tools.prepare import q_rewards

    (tmp_path / "q.csv").write_text("prompt,q_action_0,q_action_1\nWhich?,1.0,1.0\n")
    (tmp_path / "out").mkdir()
    q_rewards.q_rewards(q_rewards.Config([str(tmp_path / "q.csv")]), tmp_path / "out")
    entry = Entry("bracketed_action", source=Source(inputs=[str(tmp_path / "out" / "q.csv")]))
    [item] = load_items("tes", entry)
    with Scorer({"tes": Verifier("bracketed_action")}, workers=1) as scorer:
        assert scorer.submit("tes", item, "so [1]").result() == Score(0.5, {"action": 0.5}, answer="1")


def test_every_task_has_the_names():
    for name in task_names():
        task = load_task(name)
        assert {"Options", "HUB"} <= set(dir(task)) and task.Options() and is_dataset(task.HUB or "none/none"), name
        if hasattr(task, "conversation"):
            continue
        assert {"REWARDS", "items", "rewards"} <= set(dir(task)), name
        assert set(task.REWARDS.values()) <= {0.0, 1.0}
        assert hasattr(task, "final_answer") != hasattr(task, "check_machine"), name  # programs have no majority


def test_a_new_file_is_a_task_and_helpers_are_none(tmp_path, monkeypatch):
    folder = Path(load_task("aime").__file__).parent
    others = {path.stem for path in folder.glob("*.py")} - set(task_names())
    assert {"task", "mix", "rewards", "programs", "math_answers"} <= others and not others & set(RECORDS)
    for name in others:  # a helper that looked like a task would be offered as one
        assert not hasattr(importlib.import_module(f"data_tools.tasks.{name}"), "HUB"), name


# -- real files, where they are ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, file", [
    ("gsm8k", "gsm8k/test.jsonl"), ("math500", "math500/test.jsonl"), ("aime", "qwen_math/aime24.test.jsonl"),
    ("multiple_choice", "qwen_math/mmlu_stem.test.jsonl"), ("mmlu", "qwen_math/mmlu_stem.test.jsonl"),
])  # fmt: skip
def test_real_files_are_read_whole(inputs, task, file):
    items = load_items(task, Entry(task, source=Source(inputs=[str(inputs.data(file))])))
    lines = [json.loads(line) for line in open(inputs.data(file))]
    asked = {json.dumps([line.get("question", line.get("problem", "")).strip(), line.get("choices")]) for line in lines}
    assert len(lines) == inputs.lines(file) and len(items) == len(asked)


def test_svamps_real_rows_are_all_read_and_their_answers_are_right(inputs):
    file = inputs.data("qwen_math/svamp.test.jsonl")
    loaded = load("svamp", Entry("svamp", source=Source(inputs=[str(file)])))
    counts, lines = loaded.counts(), len(file.read_text().splitlines())
    assert counts["lines"] == lines == counts["prompts"] + counts.get("duplicate", 0)
    for item in loaded.items:
        assert score("svamp", item, f"It is \\boxed{{{item.answer.removesuffix('.0')}}}.")["correct"] == 1.0


def test_the_solutions_of_math_500_are_right(inputs):
    lines = [json.loads(line) for line in open(inputs.data("math500/test.jsonl"))][:: 1 if inputs.shipped else 10]
    wrong = [
        line["answer"]
        for line in lines
        if not score("math500", Item.of("?", line["answer"]), line["solution"])["correct"]
    ]
    assert not wrong


def test_the_labelled_solutions_of_gsm8k_and_nemo_skills_are_judged_as_their_labels_say(inputs):
    other, judged, solutions = [], 0, inputs.data("gsm8k/example_model_solutions.jsonl")
    for row in map(json.loads, open(solutions)):
        gold = row["ground_truth"].rpartition("A:")[2].strip().replace(",", "")
        for solved in (row[name] for name in row if name not in ("question", "ground_truth")):
            said, mark, answer = solved["solution"].rpartition("A:")  # the models' own form
            text = f"{said}#### {answer}" if mark else answer
            found = score("gsm8k", Item.of("?", gold), text, answer_format="hashes")
            judged += 1
            other += [(gold, answer)] if found is None or found["correct"] != solved["is_correct"] else []
    names = () if inputs.shipped else ("output-rs0.jsonl", "output-rs1.jsonl", "output-rs2.jsonl")
    for name in names:
        for row in map(json.loads, open(inputs.data(f"nemo_skills/{name}"))):
            found = score("math500", Item.of("?", str(row["expected_answer"])), row["generation"])
            judged += 1
            other += [] if found and found["correct"] == row["is_correct"] else [(row["expected_answer"], name)]
    assert not other and judged == 4 * len(solutions.read_text().splitlines()) + 5 * len(names)


@pytest.mark.soak
def test_all_solutions_of_math_500_and_the_graded_ones_of_qwen_are_judged_right(inputs):
    for line in map(json.loads, open(inputs.data("math500/test.jsonl"))):
        assert score("math500", Item.of("?", line["answer"]), line["solution"])["correct"], line["answer"]
    graded = [(line["gt"], code, right) for line in map(json.loads, open(inputs.data("qwen_math/math_cot_100.jsonl")))
              for code, right in zip(line["code"], line["score"])]  # fmt: skip
    other = [
        gold
        for gold, code, right in graded
        if (score("math500", Item.of("?", gold), code) or {"correct": False})["correct"] != right
    ]
    assert other == ["10{,}000"]  # theirs takes 10000 for another number
