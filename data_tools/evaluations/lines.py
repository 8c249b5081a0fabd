"""The lines that an evaluation writes of its prompts, one each, and how they are read again.

A line is a prompt with its greedy completion. Where it was sampled at a temperature too, it has the counts `sampled`
and `sampled_correct`, the `votes` of its samples, and the `graded` ones.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.chats.samples import problem_of_evaluated
from data_tools.mistake import Problem, UserMistake
from data_tools.records import readers

SAMPLES, RESULT = "samples.jsonl", "result.json"
Line = dict[str, Any]  # of SAMPLES: which keys it has depends on its task and on what was asked


def asked(line: Mapping[str, Any]) -> str:
    """Return what names the prompt of a line."""
    name = line.get("prompt_id", line["prompt"])
    return name if isinstance(name, str) else json.dumps(name, ensure_ascii=False)


def is_evaluation(folder: Path) -> bool:
    """Return whether an evaluation wrote a folder."""
    return (folder / SAMPLES).is_file() and (folder / RESULT).is_file()


def lines_of(folder: str, where: str) -> dict[str, Line]:
    """Return the lines that an evaluation wrote into a folder, by prompt.

    Raise UserMistake, of the setting `where`, where there are none, or two of a prompt.
    """
    file, lines = Path(folder).expanduser() / SAMPLES, {}
    records = readers.records(file) if file.is_file() else [readers.Record(file, None, "there is no such file")]
    for record in records:
        if record.is_blank:
            continue
        if wrong := record.problem or problem_of_evaluated(record.value):
            message = f"{folder} is no output of an evaluation ({record.place}: {wrong}); name the folder"
            raise UserMistake(Problem(where, f"{message} with {SAMPLES}"))
        if (key := asked(record.value)) in lines:
            message = f"{folder} has two lines of prompt {key!r}, the second at {record.place}"
            raise UserMistake(Problem(where, f"{message}; evaluate it again, which tells them apart"))
        lines[key] = record.value
    return lines


def compared_lines(compare_with: str | None, samples: int) -> dict[str, Line]:
    """Return the lines of an evaluation's output, which `samples` samples are compared with, by prompt.

    Raise UserMistake where there are none, or two of a prompt.
    """
    if not compare_with:
        return {}
    lines = lines_of(compare_with, "compare_with")
    if not any("sampled" in line for line in lines.values()):
        message = f"{compare_with} has greedy answers alone; evaluate it again with samples: {samples}"
        raise UserMistake(Problem("compare_with", message))
    return lines
