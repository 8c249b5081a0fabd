"""Harmony, the chat format of gpt-oss: prompts rendered with a pinned date, and legacy prompt tables converted.

    <|start|>system<|message|>identity, date, reasoning effort, channels<|end|>
    <|start|>developer<|message|># Instructions … <|end|>        where there are instructions
    <|start|>user<|message|> … <|end|><|start|>assistant         the model goes on from here

It is the text of gpt-oss's chat template. OpenAI's library openai-harmony gives the same tokens, but for two line
breaks that the template has after the instructions (tests/data_tools/test_openai_harmony.py).

Legacy prompts are lines `system: …` (several add up) and then `user: …`, each with the lines that follow it. After the
first `user:` everything is the user's text, also a line that looks like a role; a prompt without roles is all user.
"""

import datetime
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.base.declared import setting
from data_tools.base.durable import fsync_tree
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, silent
from data_tools.records.balance import Balance, SourceBalance
from data_tools.records.csv_tables import PROMPT, Table, read_table, table_files, write_table

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
EFFORTS = ("low", "medium", "high")
SUFFIX = "_harmony"
ON_BAD_ROW = ("fail", "drop")

_ROLE = re.compile(r"^[ \t]*(system|user)[ \t]*:[ \t]*", re.IGNORECASE)
_SPECIAL = re.compile(  # every special token of gpt-oss, from 199998 on: its tokenizer reads them in any text
    r"<\|(?:start|end|message|channel|constrain|return|call|(?:start|end)oftext|endofprompt|reserved_20[01][0-9]{3})\|>"
)
_MOST_PROBLEMS = 20


class Prompt(NamedTuple):
    """Represents a prompt; `instructions` is empty where there are none."""

    instructions: str
    user: str


@dataclass
class Config:
    """The config of the phase harmony_convert."""

    inputs: list[str] = setting(
        list, "CSV files with a prompt column, or folders of them", example=["decisions.csv"], needed=True, input=True
    )
    date: str = setting(
        "",
        "what the prompts say today is, YYYY-MM-DD: pinned, so that they stay the same",
        example="2026-07-01",
        needed=True,
        free=True,
    )
    reasoning: str = setting("medium", "effort that the prompts ask for", choices=EFFORTS)
    identity: str = setting(
        IDENTITY, "first line of the system message", example="You are a helpful assistant.", free=True
    )
    on_bad_row: str = setting(
        "fail", "what an empty prompt does, or one with Harmony's own tokens in it", choices=ON_BAD_ROW
    )


def check(config: Config) -> list[Problem]:
    """Refuse a date that is none."""
    try:
        datetime.date.fromisoformat(config.date)
    except ValueError:
        remedy = "give the day the prompts shall name, such as 2025-10-26"
        return [Problem("date", f"{config.date!r} is no date YYYY-MM-DD; {remedy}")]
    return []


def parse_legacy(text: str) -> Prompt:
    """Return the roles of a legacy prompt. Raise ValueError with the reason when no user text is in it."""
    system: list[str] = []
    user: list[str] = []
    now = user
    for line in re.split(r"\r\n?|\n", text):  # U+2028 and its like belong to a line
        role = None if user else _ROLE.match(line)
        if role:
            now = system if role[1].lower() == "system" else user
            line = line[role.end() :]
        now.append(line)
    prompt = Prompt("\n".join(system).strip(), "\n".join(user).strip())
    if not prompt.user:
        raise ValueError("no user text")
    return prompt


def render(prompt: Prompt, date: str, reasoning: str = "medium", identity: str = IDENTITY) -> str:
    """Return the text that gpt-oss continues; ends in `<|start|>assistant`. As its chat template renders on that date.

    Raise ValueError when the prompt holds one of Harmony's own tokens: it would end a message or begin another role.
    """
    for part in prompt:
        if found := _SPECIAL.search(part):
            raise ValueError(f"the text holds Harmony's token {found[0]}")
    system = f"{identity}\nKnowledge cutoff: 2024-06\nCurrent date: {date}\n\nReasoning: {reasoning}\n\n"
    system += "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    text = f"<|start|>system<|message|>{system}<|end|>"
    if prompt.instructions:
        text += f"<|start|>developer<|message|># Instructions\n\n{prompt.instructions}\n\n<|end|>"
    return f"{text}<|start|>user<|message|>{prompt.user}<|end|><|start|>assistant"


def _convert(table: Table, config: Config, problems: list[Problem]) -> tuple[list[list[str]], SourceBalance]:
    """Return the table's rows with their prompts rendered, without the bad ones; those are counted or, failing,
    named."""
    place = table.columns.index(PROMPT)
    sheet = SourceBalance.of_rows(table.path.name, len(table.rows))
    rows = []
    for row, text, line in zip(table.rows, table.column(PROMPT), table.lines):
        try:
            rendered = render(parse_legacy(text), config.date, config.reasoning, config.identity)
        except ValueError as error:
            sheet.dropped["no_user_text" if str(error) == "no user text" else "special_token"] += 1
            if config.on_bad_row == "fail":
                problems.append(Problem(f"{table.path}:{line}", f"{error}; mend the row, or set on_bad_row: drop"))
            continue
        rows.append([*row[:place], rendered, *row[place + 1 :]])
    sheet.kept = len(rows)
    return rows, sheet


def harmony_convert(config: Config, out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Write every input NAME.csv as NAME_harmony.csv into `out`. Facts: files, rows, table.

    Raise UserMistake for all wrong files and rows at once, before anything is written.
    """
    problems = check(config)
    if problems:
        raise UserMistake(problems)
    done, sheets = [], []
    for path in table_files(config.inputs):
        try:
            table = read_table(path)
            table.column(PROMPT)
        except UserMistake as mistake:
            problems += mistake.problems
            continue
        rows, sheet = _convert(table, config, problems)
        done.append((f"{path.stem}{SUFFIX}.csv", table.columns, rows))
        sheets.append(sheet)
    if problems:
        raise UserMistake(problems[:_MOST_PROBLEMS])
    for place, (name, columns, rows) in enumerate(done):
        write_table(out / name, columns, rows)
        progress(place + 1, len(done), "files", name)
    balance = Balance(sheets)
    balance.write(out)
    fsync_tree(out)
    kept = sum(sheet.kept for sheet in sheets)
    return {"files": [name for name, *_ in done], "rows": kept, "table": balance.table()}
