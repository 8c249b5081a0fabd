import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_tools.base import declared
from data_tools.chats.conversation import read_record
from data_tools.mistake import UserMistake
from data_tools.prepare.rejection import Band, Config, buckets_of, check, split_thinking
from data_tools.prepare.rejection_element import Share, reject_filter
from data_tools.prepare.rejection_finish import finish
from data_tools.progress import silent
from jobs.kind import Placement
from jobs.phases import reject_filter as reject_phase
from tests.inputs import Inputs


def sample(prompt_id: object = 0, completion: str = "<think>add</think>4", **values: object) -> dict:
    row = {
        "prompt_id": prompt_id,
        "prompt": f"Question {prompt_id}",
        "completion": completion,
        "tokens": len(completion),
        "finish": "stop",
        "correct": True,
        "seed": 7,
        "weights": "abc",
    }
    return {**row, **values}


def filtered(folder: Path, rows: list[dict], **values: object) -> tuple[dict, list[dict]]:
    folder.mkdir(exist_ok=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rejected(Config(inputs=[str(folder / "samples.jsonl")], **values), folder)


def rejected(config: Config, folder: Path, count: int = 1) -> tuple[dict, list[dict]]:
    """What `count` elements leave, and finish makes of it, in FOLDER/out."""
    parts, out = [folder / f"part_{count}_{index}" for index in range(count)], folder / "out"
    for index, part in enumerate(parts):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        reject_filter(config, part, Share(index, count))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    facts = finish(config, parts, out)
    return facts, [json.loads(line) for line in (out / "chat.jsonl").read_text().splitlines()]


def buckets(facts: dict) -> dict[str, int]:
    balance = facts["tables"]["balance"]
    row = dict(zip(balance["columns"], balance["rows"][0]))
    others = ("source", "lines", "rows", "tokens in", "tokens", "supervised", "masked")
    return {key: value for key, value in row.items() if value and key not in others}


def test_a_phase_that_keeps_nothing_is_refused_with_what_left_all_out(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(sample(n, finish="length")) + "\n" for n in range(3)))
    config, part, out = Config(inputs=[str(tmp_path / "in.jsonl")]), tmp_path / "part", tmp_path / "out"
    part.mkdir()
    out.mkdir()
    reject_filter(config, part)
    task: Any = SimpleNamespace(out=out, keep=tmp_path, progress=silent)
    with pytest.raises(UserMistake, match=r"none of 3 samples is kept \(3 \w+\); change what leaves them out"):
        reject_phase.finish([part], config, task)


def test_each_sample_ends_in_one_bucket_and_they_add_up(tmp_path: Path) -> None:
    question = "If a train leaves at nine and needs three hours to the coast when does it arrive there"
    (tmp_path / "aime.jsonl").write_text(json.dumps({"problem": question}) + "\n")
    rows = [
        sample(0, correct=None),
        sample(0, correct=False),
        sample(0, finish="length"),
        sample(0, "<think>never closed"),
        sample(0, "<think>thought, but no answer</think> "),
        sample(0, "7"),
        sample(0, "<think>" + "so " * 40 + "</think>4"),
        sample(1, prompt=f"Well: {question.upper()}?!"),
        sample(2),
        sample(2),
    ]
    facts, chats = filtered(
        tmp_path, rows, min_tokens=5, max_tokens=100, evaluation_sets=[str(tmp_path / "aime.jsonl")]
    )
    assert buckets(facts) == {
        "unscored": 1,
        "wrong": 1,
        "truncated": 1,
        "ill_formed": 2,
        "too_short": 1,
        "too_long": 1,
        "contaminated": 1,
        "duplicate": 1,
        "kept": 1,
    }
    assert (facts["kept"], facts["prompts"], facts["prompts_left"]) == (1, 3, 1)
    assert chats == [
        {
            "messages": [
                {"role": "user", "content": "Question 2"},
                {"role": "assistant", "content": "<think>add</think>4"},
            ],
            "prompt_id": 2,
            "pass_rate": 1.0,
            "seed": 7,
            "weights": "abc",
            "tokens": 19,
        }
    ]
    assert (facts["seed"], facts["weights"]) == (["7"], ["abc"])


def test_rewards_without_a_verdict_are_refused_with_the_setting_to_change(tmp_path: Path) -> None:
    rows = [sample(0, correct=None, reward=0.88, task="decide")]
    with pytest.raises(
        UserMistake, match="reward 0.88 and no verdict: task decide does not say .* RIGHT .* correct: false"
    ):
        filtered(tmp_path, rows)
    facts, _ = filtered(tmp_path, rows, correct=False)
    assert facts["kept"] == 1


def test_a_prompts_pass_rate_counts_all_its_scored_samples(tmp_path: Path) -> None:
    texts = ["one way to do this sum is so", "another quite different path leads here", "third"]
    rows = [sample("easy", text) for text in texts]
    rows += [sample("fair", texts[0]), sample("fair", texts[1], correct=False), sample("fair", texts[2], correct=None)]
    rows += [sample("hard", text, correct=False) for text in texts]
    facts, chats = filtered(tmp_path, rows, min_pass_rate=0.1, max_pass_rate=0.9)
    assert [(chat["prompt_id"], chat["pass_rate"]) for chat in chats] == [("fair", 0.5)]
    assert buckets(facts) == {"pass_rate": 3, "wrong": 4, "unscored": 1, "kept": 1}


LONG = "we add the first number and the second number and then we look at what is left over"
TEXTS = [LONG + " twice", LONG, "subtract them", "multiply both of these and check the sign of it all", "divide"]


@pytest.mark.parametrize(
    "prefer, kept",
    [("shortest", [2, 4]), ("longest", [0, 3]), ("first", [0, 2]), ("diverse", [2, 4])],
)
def test_at_most_k_of_a_prompt_are_kept_as_preferred(prefer: str, kept: list[int]) -> None:
    config = Config(near_duplicate=0.5, per_prompt=2, prefer=prefer)
    found = buckets_of(TEXTS, [len(text) for text in TEXTS], config)
    assert [place for place, bucket in enumerate(found) if not bucket] == kept
    assert found.count("near_duplicate") == 1 and found.count("over_limit") == 2


def test_diverse_takes_what_is_least_like_the_chosen_ones() -> None:
    texts = ["a b c d e f g h", "a b c d e f g h i", "a b c d e f x y z w", "p q r s t u v w x y z"]
    config = Config(near_duplicate=1.0, per_prompt=2, prefer="diverse")
    assert buckets_of(texts, [1, 2, 3, 4], config) == ["", "over_limit", "over_limit", ""]


@pytest.mark.parametrize(
    "completion, parts",
    [
        ("<think>a</think>b", ("a", "b")),
        ("a</think>\n\nb", ("a", "b")),  # the template wrote the beginning
        ("only an answer", ("", "only an answer")),
        ("<think>a", None),
        ("<think>a</think>b</think>c", None),
        ("</think>a<think>", None),
    ],
)
def test_thinking_is_whole_or_the_sample_is_ill_formed(completion: str, parts: tuple[str, str] | None) -> None:
    assert split_thinking(completion) == parts


def test_contamination_sees_scripts_without_spaces_and_short_questions_whole(tmp_path: Path) -> None:
    sets = tmp_path / "sets"
    sets.mkdir()
    (sets / "zh.jsonl").write_text(json.dumps({"question": "小明有三个苹果又买了五个苹果现在一共有几个苹果"}) + "\n")
    (sets / "svamp.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "How many apples are left now"}]}) + "\n"
    )
    rows = [
        sample(0, prompt="请问：小明有三个苹果，又买了五个苹果，现在一共有几个苹果？"),
        sample(1, completion="First: how many apples are left now? Four."),
        sample(2, completion="How many pears are left now? Four."),
    ]
    facts, chats = filtered(tmp_path, rows, evaluation_sets=[str(sets)])
    assert buckets(facts)["contaminated"] == 2 and [chat["prompt_id"] for chat in chats] == [2]


def test_a_line_that_is_no_sample_is_named_or_counted(tmp_path: Path) -> None:
    lines = ["{not json", "[1]", '{"completion": "x"}', json.dumps(sample())]
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    config = Config(inputs=[str(tmp_path / "s.jsonl")])
    with pytest.raises(UserMistake, match=r"s.jsonl:1: not JSON: .*; mend it, or set on_bad_row: drop"):
        rejected(config, tmp_path)
    config.on_bad_row = "drop"
    facts, _ = rejected(config, tmp_path)
    assert buckets(facts) == {"malformed_line": 1, "malformed_sample": 2, "kept": 1}
    with pytest.raises(UserMistake, match="inputs: .*absent is neither a file nor a folder with"):
        rejected(Config(inputs=[str(tmp_path / "absent")]), tmp_path)


KINDS = {  # of each key, values of other types than it has
    "prompt_id": [None, True, 1.0, [1]], "prompt": [None, 3, ["q"]], "completion": [None, 3, "half \ud83d"],
    "tokens": [None, True, "3", 3.0, -1], "finish": [None, "", "done", True],
    "correct": ["false", "true", 0, 1, 1.0, []],
    "reward": ["1", True, float("nan"), float("inf")], "sample": ["0", 0.0, True], "seed": ["7", 7.5], "weights": [7],
    "sampling": ["0.7"],
    "messages": [[], "q", [{"role": "user", "content": "q"}]],
}  # fmt: skip


@pytest.mark.parametrize("key, value", [(key, value) for key, values in KINDS.items() for value in values])
def test_a_value_of_another_type_is_no_sample_whatever_the_key(tmp_path: Path, key: str, value: object) -> None:
    """`"false"` is neither true nor false."""
    rows = [sample(), {**sample(1), key: value}]
    with pytest.raises(UserMistake, match=rf"samples.jsonl:2: .*{key}.*; mend it, or set on_bad_row: drop"):
        filtered(tmp_path / "fail", rows)
    facts, chats = filtered(tmp_path / "drop", rows, on_bad_row="drop", truncated=True, correct=False)
    assert buckets(facts) == {"malformed_sample": 1, "kept": 1} and [chat["prompt_id"] for chat in chats] == [0]


@pytest.mark.parametrize("key, value", [
    ("system", "Be brief."), ("tools", [{"type": "function", "function": {"name": "add"}}]), ("weight", 0),
    ("chat_template_kwargs", {"enable_thinking": False}), ("reasoning_content", "Two and two."),
    ("tool_calls", [{"function": {"name": "add"}}]), ("loss", 0.5), ("tools", "{"),
])  # fmt: skip
def test_what_a_sample_was_asked_with_is_in_its_chat_and_what_it_says_beside_its_text_is_refused(
    tmp_path: Path, key: str, value: object
) -> None:
    rows = [sample(), sample(1, **{key: value})]
    if key in ("reasoning_content", "tool_calls", "loss") or value == "{":
        with pytest.raises(UserMistake, match=rf"samples.jsonl:2: .*{key}"):
            filtered(tmp_path, rows)
        return
    plain, asked = (read_record(chat)[0] for chat in filtered(tmp_path, rows)[1])
    assert (asked.messages, asked.tools, asked.arguments, asked.untrained) != (
        [{**plain.messages[0], "content": "Question 1"}, plain.messages[1]],
        None,
        {},
        frozenset(),
    )


@pytest.mark.parametrize(
    "who, text, roles", [("role", "content", ("user", "assistant")), ("from", "value", ("human", "gpt"))]
)
def test_of_a_chat_the_sampled_answer_alone_is_in_the_loss(
    tmp_path: Path, who: str, text: str, roles: tuple[str, str]
) -> None:
    said = [{who: role, text: f"{role} {number}"} for number in range(2) for role in roles]
    said[1]["loss"] = True
    _, (chat,) = filtered(tmp_path, [sample(prompt=None, messages=said[:3])])
    assert read_record(chat)[0].untrained == {1} and len(chat["messages"]) == 4


def test_a_name_is_of_one_prompt_and_one_and_its_text_are_two(tmp_path: Path) -> None:
    facts, chats = filtered(tmp_path / "two", [sample(1, prompt="a"), sample("1", prompt="b", correct=False)])
    assert [chat["pass_rate"] for chat in chats] == [1.0] and facts["prompts"] == 2
    with pytest.raises(UserMistake, match=r"samples.jsonl:2: prompt_id 1 named another prompt before"):
        filtered(tmp_path / "one", [sample(1, prompt="a"), sample(1, prompt="b")])


@pytest.mark.parametrize("line", ['{"title": "x"}', "[1]", "{", '{"question": 3}', '{"question": "?"}'])
def test_an_evaluation_set_that_would_keep_nothing_out_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "set.jsonl").write_text(json.dumps({"Problem": "How many apples are left now"}) + f"\n{line}\n")
    with pytest.raises(UserMistake, match="set.jsonl:2: .*; mend the evaluation set"):
        filtered(tmp_path / "s", [sample()], evaluation_sets=[str(tmp_path / "set.jsonl")])
    (tmp_path / "set.jsonl").write_text(json.dumps({"Problem": "How many apples are left now"}))
    parts = [{"role": "user", "content": [{"type": "text", "text": "Say: how many apples are left now?"}]}]
    rows = [sample(0, prompt=None, messages=parts)]
    facts, _ = filtered(tmp_path / "t", rows, evaluation_sets=[str(tmp_path / "set.jsonl")])
    assert buckets(facts) == {"contaminated": 1}


def test_wrong_settings_are_told_at_once() -> None:
    config = Config(
        prefer="short", answer_pattern="(", per_prompt=-1, min_pass_rate=0.9, max_pass_rate=0.1, near_duplicate=0
    )
    assert [problem.where for problem in declared.check_with(config, check)] == [
        "inputs",
        "near_duplicate",
        "per_prompt",
        "prefer",
        "answer_pattern",
        "min_pass_rate",
    ]


def test_model_solutions_of_gsm8k_are_filtered_as_they_are_marked(tmp_path: Path, inputs: Inputs) -> None:
    rows, right = [], 0
    lines = inputs.data("gsm8k/example_model_solutions.jsonl").read_text().splitlines()
    for number, line in enumerate(lines[:300]):
        row = json.loads(line)
        for key in [key for key in row if isinstance(row[key], dict) and "is_correct" in row[key]]:
            solution = row[key]
            rows.append(sample(number, solution["solution"], correct=solution["is_correct"], prompt=row["question"]))
            right += solution["is_correct"]
    facts, chats = filtered(tmp_path, rows, near_duplicate=1.0)
    found = buckets(facts)
    assert (
        len(rows) == (16 if inputs.shipped else 1200) and 0 < right < len(rows) and found["wrong"] == len(rows) - right
    )
    assert found["kept"] + found.get("duplicate", 0) == right and len(chats) == found["kept"]


# -- prompts beside one another ----------------------------------------------------------------------------------------


def many_samples() -> list[dict]:
    """Samples of 40 prompts of two tasks, with verdicts or answers, some alike, as generate leaves them in an array."""
    rows = []
    for place, number in itertools.product(range(40), range(4)):
        right = (place * 7 + number * 5) % 8 > place % 4
        text = f"<think>way {number % 3} for {place % 5}</think>the answer is {place + right}"
        answer = {"correct": right} if place % 5 else {"correct": None, "answer": str((place + number) % 3)}
        more = {"task": "ab"[place % 2], "place": place, "sample": number, "reward": None, **answer}
        rows.append(sample(f"p{place}", text, prompt=f"What is question {place % 33} of the set", **more))
    return rows


EVERYTHING = {
    "majority": 0.5,
    "one_of_a_method": "run",
    "one_of_a_question": True,
    "bands": {"hard": Band(0, 0.5, 5), "easy": Band(0.5, 1.0, 9)},
    "per_task": 8,
    "most": 12,
    "seed": 3,
}


@pytest.mark.parametrize("values", [{}, EVERYTHING, {"near_duplicate": 1.0, "majority": 0.1}], ids=["", "all", "few"])
def test_any_number_of_elements_leaves_the_same_bytes(tmp_path: Path, values: dict) -> None:
    rows = [*many_samples(), {"prompt_id": 3}, "\n", [4]]
    values = {**values, "on_bad_row": "drop"}
    one, _ = filtered(tmp_path, rows, **values)
    bytes_of_one = (tmp_path / "out/chat.jsonl").read_bytes()
    assert bytes_of_one and sum(buckets(one).values()) == len(rows)
    for count in (2, 7, 60):  # more elements than prompts, too
        many, _ = rejected(Config(inputs=[str(tmp_path / "samples.jsonl")], **values), tmp_path, count)
        assert (tmp_path / "out/chat.jsonl").read_bytes() == bytes_of_one and many == one


@pytest.mark.parametrize("place", [0, True], ids=str)
def test_any_number_of_elements_leaves_the_same_bytes_where_places_are_not_of_one_prompt(
    tmp_path: Path, place: object
) -> None:
    """Of a tool whose `place` says something else, such as a rank."""
    filtered(tmp_path, [{**row, "place": place} for row in many_samples()])
    bytes_of_one = (tmp_path / "out/chat.jsonl").read_bytes()
    for count in (2, 7):
        rejected(Config(inputs=[str(tmp_path / "samples.jsonl")]), tmp_path, count)
        assert (tmp_path / "out/chat.jsonl").read_bytes() == bytes_of_one


def test_behind_generate_element_by_element_the_bytes_are_those_of_all_samples_at_once(tmp_path: Path) -> None:
    """Element i of n sampled prompts i, i + n, …; its part is one element's, whatever its prompts' hashes are."""
    rows, parts, out = many_samples(), [tmp_path / f"filtered_{index}" for index in range(3)], tmp_path / "joined"
    filtered(tmp_path / "whole", rows, **EVERYTHING)
    for index, part in enumerate(parts):
        sampled = tmp_path / f"sampled_{index}"
        sampled.mkdir()
        own = [row for row in rows if row["place"] % 3 == index]
        (sampled / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
        part.mkdir()
        reject_filter(Config(inputs=[str(sampled)], **EVERYTHING), part, Share(index, 3, (str(sampled),)))
    out.mkdir()
    finish(Config(inputs=[], **EVERYTHING), parts, out)
    assert (out / "chat.jsonl").read_bytes() == (tmp_path / "whole/out/chat.jsonl").read_bytes()
    twice = tmp_path / "twice"
    twice.mkdir()
    with pytest.raises(UserMistake, match="samples of 14 prompts lie in two elements"):
        finish(Config(inputs=[], **EVERYTHING), [parts[0], parts[0]], twice)


def test_fewer_elements_than_the_samples_have_are_refused_before_anything_runs() -> None:
    """Element by element behind more of them, some samples would be read by none."""
    partners = {"/run/sampled/k": 3}
    (problem,) = reject_phase.check(Config(["/run/sampled/k"]), Placement(ranks=1, elements=2, partners=partners))
    assert "/run/sampled/k has 3 elements, of which 2 would be read one by one (aftercorr); say" in str(problem)
    assert not reject_phase.check(Config(["/run/sampled/k"]), Placement(ranks=1, elements=3, partners=partners))


def test_without_labels_the_answer_of_most_is_right_and_a_tie_is_none(tmp_path: Path) -> None:
    def voted(name: str, *answers: str | None, **more: object) -> list[dict]:
        texts = (f"{name} way {number} to {answer}" for number, answer in enumerate(answers))
        return [sample(name, text, correct=None, answer=a, **more) for text, a in zip(texts, answers)]

    rows = [*voted("clear", "4", "4", "5", "4"), *voted("tie", "1", "1", "2", "2"), *voted("weak", "1", "2", "3", "1")]
    rows += [*voted("silent", None, None, None, "7"), sample("labelled", "so 3", answer="3")]
    rows += voted("labelled", "3", prompt="Question labelled") + voted("cut", "1", "1", "2", finish="length")
    facts, chats = filtered(tmp_path / "half", rows, majority=0.5, near_duplicate=1.0)
    assert {chat["prompt_id"] for chat in chats} == {"clear", "weak", "labelled"}
    assert {chat.get("agreement") for chat in chats} == {0.75, 0.5, None}
    assert buckets(facts) == {
        "kept": 6, "minority": 3, "no_majority": 8, "unscored": 1, "truncated": 3,
    }  # fmt: skip
    facts, chats = filtered(tmp_path / "most", rows, majority=0.75, near_duplicate=1.0)
    assert {chat["prompt_id"] for chat in chats} == {"clear", "labelled"}
    with pytest.raises(UserMistake, match="'answer' is '4', a int, not a text to vote with"):
        filtered(tmp_path / "number", [sample(answer=4)], majority=0.5)


def test_one_of_a_method_is_kept_whatever_its_numbers(tmp_path: Path) -> None:
    def texts(number: int) -> list[str]:
        return [
            f"Add {number} and {number + 1.5}, so {2 * number}.",
            f"add {number + 8} and 1,000: so {number}",
            "No, count.",
        ]

    rows = [sample(name, text) for name, number in (("a", 3), ("b", 4)) for text in texts(number)]
    kept = {
        of: [(chat["prompt_id"], chat["messages"][1]["content"][:3]) for chat in filtered(
            tmp_path / f"m{of}", rows, one_of_a_method=of, prefer="first", near_duplicate=1.0
        )[1]]
        for of in ("", "prompt", "run")
    }  # fmt: skip
    assert len(kept[""]) == 6
    assert kept["prompt"] == [("a", "Add"), ("a", "No,"), ("b", "Add"), ("b", "No,")]
    assert kept["run"] == [("a", "Add"), ("a", "No,")]


def test_bands_keep_so_many_prompts_each_and_caps_so_many_samples(tmp_path: Path) -> None:
    rows = [
        sample(f"{right}/{number}", f"{right} of {number} sample {place}", correct=place < right, task="ab"[number % 2])
        for right in range(1, 5)
        for number in range(6)
        for place in range(4)
    ]
    bands = {"hard": Band(0, 0.25, 2), "fair": Band(0.25, 0.75), "easy": Band(0.9, 1.0, 3)}
    facts, chats = filtered(tmp_path / "bands", rows, bands=bands, near_duplicate=1.0)
    prompts = {chat["prompt_id"]: chat["pass_rate"] for chat in chats}
    assert [list(prompts.values()).count(rate) for rate in (0.25, 0.5, 0.75, 1.0)] == [2, 6, 6, 3]
    assert [row[2:] for row in facts["tables"]["bands"]["rows"]] == [[6, 2], [12, 12], [6, 3]]
    assert buckets(facts)["over_band"] == 4 * 1 + 3 * 4
    facts, chats = filtered(tmp_path / "caps", rows, per_task=7, most=10, near_duplicate=1.0)
    assert len(chats) == 10 and buckets(facts)["over_most"] == 4
    other, _ = filtered(tmp_path / "seed", rows, per_task=7, most=10, near_duplicate=1.0, seed=1)
    assert (tmp_path / "seed/out/chat.jsonl").read_bytes() != (tmp_path / "caps/out/chat.jsonl").read_bytes()
    facts, chats = filtered(tmp_path / "none", rows, bands={"mid": Band(0.4, 0.6)}, near_duplicate=1.0)
    assert {chat["pass_rate"] for chat in chats} == {0.5} and buckets(facts)["no_band"] == 6 * (1 + 3 + 4)


def test_a_question_asked_under_two_names_is_kept_once(tmp_path: Path) -> None:
    rows = [sample("a", "x y", prompt="What is 2+2?"), sample("b", "z w", prompt="what is 2 + 2"), sample("c", "v")]
    facts, chats = filtered(tmp_path, rows, one_of_a_question=True)
    assert [chat["prompt_id"] for chat in chats] == ["a", "c"] and buckets(facts)["same_question"] == 1
