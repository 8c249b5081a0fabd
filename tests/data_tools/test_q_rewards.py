import csv
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from data_tools.base import declared
from data_tools.mistake import UserMistake
from data_tools.prepare import harmony
from data_tools.prepare.q_rewards import Config, boltzmann, q_rewards
from data_tools.tasks import mix
from data_tools.tasks.task import Source
from tests.inputs import Inputs


def table(path: Path, header: str, *lines: str) -> Path:
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_published_rows_are_reproduced_to_the_last_digit(tmp_path: Path, inputs: Inputs) -> None:
    golden = json.loads(inputs.data("boltzmann_golden.json").read_text())
    lines = [",".join(["a prompt", *map(repr, row["q"])]) for row in golden["rows"]]
    source = table(tmp_path / "q.csv", "prompt,q_action_0,q_action_1,q_action_2,q_action_3", *lines)
    out = tmp_path / "out"
    out.mkdir()
    facts = q_rewards(Config(inputs=[str(source)], tau=golden["tau"]), out)
    assert (facts["rows"], facts["actions"]) == (len(golden["rows"]), [4])
    for row, expected in zip(read(out / "q.csv"), golden["rows"], strict=True):
        ours = [float(row[f"reward_action_{i}"]) for i in range(4)]
        assert np.abs(np.subtract(ours, expected["reward"])).max() < 1e-15
        assert [float(row[f"q_action_{i}"]) for i in range(4)] == expected["q"]


@given(arrays(np.float64, (3, 4), elements=st.floats(-1e6, 1e6)), st.floats(1e-3, 1e3))
def test_rewards_sum_to_one_and_order_as_the_values_do(q: np.ndarray, tau: float) -> None:
    rewards = boltzmann(q, tau)
    assert np.allclose(rewards.sum(axis=1), 1) and np.isfinite(rewards).all()
    for values, mine in zip(q, rewards):
        assert (np.diff(mine[np.argsort(values, kind="stable")]) >= 0).all()


def test_values_further_apart_than_floats_reach_are_rewarded_without_a_warning() -> None:
    with warnings.catch_warnings(action="error"):
        assert boltzmann(np.array([[1e308, -1e308], [-1e308, 0.0]]), 0.05).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_other_columns_keep_their_text_and_old_rewards_go_only_when_asked(tmp_path: Path) -> None:
    text = '"two\nlines, and a ""quote"""'
    source = table(tmp_path / "q.csv", "note,reward_action_0,q_action_0,q_action_1,prompt", f"007,9,1.0,1.0,{text}")
    (out := tmp_path / "out").mkdir()
    with pytest.raises(UserMistake, match="q.csv: has reward_action_0 already; set overwrite: true"):
        q_rewards(Config(inputs=[str(tmp_path)]), out)
    assert list(out.iterdir()) == []
    q_rewards(Config(inputs=[str(tmp_path)], overwrite=True), out)
    assert read(out / "q.csv") == [
        {
            "note": "007",
            "q_action_0": "1.0",
            "q_action_1": "1.0",
            "prompt": 'two\nlines, and a "quote"',
            "reward_action_0": "0.5",
            "reward_action_1": "0.5",
        }
    ]
    assert source.read_text().startswith("note,reward_action_0")


@pytest.mark.parametrize(
    "header, line, told",
    [
        ("prompt,q_action_0,q_action_2", "x,1,2", "has q_action_2 but no q_action_1"),
        ("prompt,action", "x,1", "needs columns q_action_0, q_action_1, …; it has prompt, action"),
        ("prompt,q_action_0", "x,1", "needs columns q_action_0, q_action_1, …; it has prompt, q_action_0"),
        ("prompt,q_action_0,q_action_1", "x,1,", "q.csv:2: q_action_1 is '', not a finite number"),
        ("prompt,q_action_0,q_action_1", "x,1,nan", "q.csv:2: q_action_1 is 'nan', not a finite number"),
        ("prompt,q_action_0,q_action_1", "x,1,1_000", "q.csv:2: q_action_1 is '1_000', not a finite number"),
        ("prompt,q_action_0,q_action_1", "x,one,2", "q.csv:2: q_action_0 is 'one', not a finite number"),
        ("prompt,q_action_0,q_action_1", "x,1", "q.csv:2: 2 values under 3 columns"),
        ("prompt,prompt,q_action_0", "x,1,2", "has two columns 'prompt'"),
        ("", "", "is empty"),
    ],
)
def test_a_wrong_table_is_named_with_its_line_and_nothing_is_written(
    tmp_path: Path, header: str, line: str, told: str
) -> None:
    source = table(tmp_path / "q.csv", header, line) if header else tmp_path / "q.csv"
    source.touch()
    good = table(tmp_path / "good.csv", "prompt,q_action_0,q_action_1", "x,1,2")
    (out := tmp_path / "out").mkdir()
    with pytest.raises(UserMistake) as mistake:
        q_rewards(Config(inputs=[str(good), str(source)]), out)
    assert told in str(mistake.value) and list(out.iterdir()) == []


def test_wrong_settings_are_told_at_once(tmp_path: Path) -> None:
    assert [problem.where for problem in declared.check(Config(tau=0.0))] == ["inputs", "tau"]
    with pytest.raises(UserMistake, match=r"absent.csv is neither a file nor a folder with a file of records \(csv\)"):
        q_rewards(Config(inputs=[str(tmp_path / "absent.csv")]), tmp_path)


LONG = "word " * 40_000  # 200,000 characters
GOOD = {  # prompts that are rows like any other, and the user's text of each
    "system: Be brief.\nuser: What now?": "What now?",
    "No role at all": "No role at all",
    "user: Quoted:\nSystem: is no role here\n": "Quoted:\nSystem: is no role here",
    f"user: {LONG}": LONG.strip(),
    'user: "quoted", and\r\nlines': '"quoted", and\nlines',
}


def rows_of(path: Path, rows: list[dict[str, object]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_odd_prompts_of_four_actions_all_become_prompts_with_rewards(tmp_path: Path) -> None:
    """Through harmony_convert, q_rewards and the task, as the pipeline tes_grpo has them: each row is there once."""
    values = {f"q_action_{action}": float(action == 2) for action in range(4)}
    rows = [{"prompt": prompt, **values} for prompt in GOOD]
    rows += [rows[0], {**rows[0], "q_action_3": 2.0}]  # once more, and once with other rewards
    source = rows_of(tmp_path / "q.csv", rows)
    (harmonised := tmp_path / "harmony").mkdir()
    (rewarded := tmp_path / "rewards").mkdir()
    facts = harmony.harmony_convert(harmony.Config([str(source)], date="2026-01-01"), harmonised)
    assert facts["rows"] == len(rows)
    assert q_rewards(Config(inputs=[str(harmonised)]), rewarded)["rows"] == len(rows)
    loaded = mix.load("decisions", mix.Entry("bracketed_action", source=Source(inputs=[str(rewarded)])))
    sheet = loaded.sheet
    assert (sheet.lines, sheet.kept, sheet.dropped["duplicate"]) == (len(rows), len(rows) - 1, 1)
    texts = [item.prompt for item in loaded.items]
    for text, said in zip(texts, GOOD.values()):
        assert text.endswith(f"<|start|>user<|message|>{said}<|end|><|start|>assistant")
    assert texts[0] == texts[-1] and loaded.items[0].uid != loaded.items[-1].uid
    best = [int(np.argmax(item.columns["rewards"])) for item in loaded.items]
    assert best == [2] * len(GOOD) + [3]
