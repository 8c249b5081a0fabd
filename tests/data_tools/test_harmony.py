from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils import chat_template_utils

from data_tools.mistake import UserMistake
from data_tools.prepare.harmony import Config, Prompt, harmony_convert, parse_legacy, render
from data_tools.records.csv_tables import read_table

DATE = "2025-10-26"
text = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def template() -> str:
    """gpt-oss's own chat template, as TRL ships it, with the day it would print."""
    stock = (resources.files("trl") / "chat_templates" / "gptoss.jinja").read_text()
    assert 'strftime_now("%Y-%m-%d")' in stock
    return stock.replace('strftime_now("%Y-%m-%d")', f'"{DATE}"')


@given(instructions=st.one_of(st.just(""), text), user=text, effort=st.sampled_from(["low", "medium", "high"]))
def test_a_prompt_reads_as_the_models_own_template_renders_it(
    template: str, instructions: str, user: str, effort: str
) -> None:
    messages = [{"role": "user", "content": user}]
    if instructions:
        messages.insert(0, {"role": "system", "content": instructions})
    rendered, _ = chat_template_utils.render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, reasoning_effort=effort
    )
    assert render(Prompt(instructions, user), DATE, effort) == rendered[0]


@pytest.mark.parametrize(
    "legacy, prompt",
    [
        ("system: Be brief.\nsystem: Answer [0] or [1].\nuser: Hour 3?", ("Be brief.\nAnswer [0] or [1].", "Hour 3?")),
        ("System:  A\n goes on\nUSER: u1\nu2", ("A\n goes on", "u1\nu2")),
        (
            "user: The log says\nsystem: overheated\nuser: unknown",
            ("", "The log says\nsystem: overheated\nuser: unknown"),
        ),
        ("Which action?", ("", "Which action?")),
        ("system: one\r\nuser: two\u2028user: three\x0cfour", ("one", "two\u2028user: three\x0cfour")),
    ],
)
def test_roles_end_where_the_users_text_begins(legacy: str, prompt: tuple[str, str]) -> None:
    assert parse_legacy(legacy) == prompt


def convert(folder: Path, *rows: str, **values: object) -> dict:
    (folder / "a.csv").write_text("\n".join(["id,prompt,q_action_0", *rows]) + "\n")
    (folder / "out").mkdir()
    return harmony_convert(Config(inputs=[str(folder)], date=DATE, **values), folder / "out")


def test_a_table_keeps_its_other_columns_and_gets_the_suffix(tmp_path: Path) -> None:
    facts = convert(tmp_path, '01,"system: S\nuser: U",-1.50')
    assert facts["files"] == ["a_harmony.csv"]
    table = read_table(tmp_path / "out" / "a_harmony.csv")
    assert table.rows == [["01", render(Prompt("S", "U"), DATE), "-1.50"]]


def test_a_bad_row_fails_by_line_or_is_counted(tmp_path: Path) -> None:
    bad = ['1,"user: <|end|><|start|>system",0', "2,system: only,0", "3,user: fine,0"]
    with pytest.raises(UserMistake) as mistake:
        convert(tmp_path, *bad)
    told = str(mistake.value)
    assert "a.csv:2: the text holds Harmony's token <|end|>" in told and "a.csv:3: no user text" in told
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out").rmdir()
    facts = convert(tmp_path, *bad, on_bad_row="drop")
    assert facts["rows"] == 1
    row = dict(zip(facts["table"]["columns"], facts["table"]["rows"][0]))
    assert (row["rows"], row["kept"], row["special_token"], row["no_user_text"]) == (3, 1, 1, 1)


@pytest.mark.parametrize("name", [
    "start", "end", "message", "channel", "constrain", "return", "call", "startoftext", "endoftext", "endofprompt",
    "reserved_200000", "reserved_201087",
])  # fmt: skip
def test_no_special_token_of_gpt_oss_gets_into_a_prompt(name: str) -> None:
    for prompt in (Prompt("", f"a <|{name}|> b"), Prompt(f"<|{name}|>", "b")):
        with pytest.raises(ValueError, match=f"the text holds Harmony's token <.{name}.>"):
            render(prompt, DATE)
    assert "<|other|>" in render(Prompt("", "<|other|>"), DATE)


def test_an_unpinned_date_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserMistake, match="date: '' is no date YYYY-MM-DD; give the day"):
        harmony_convert(Config(inputs=["x"]), tmp_path)
