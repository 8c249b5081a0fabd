"""What every task module offers, and how one is found by name.

A task is a module `data_tools/tasks/NAME.py` with the names of the `Task` protocol below. Data flows

    JSONL line ──parse_line──> rows ──verify──> None or a drop bucket ──canonical──> row ──encode_answer──> text
"""

import importlib
import pkgutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Protocol

from data_tools.mistake import Problem, UserMistake, nearest


class Row(NamedTuple):
    """One training or test example: the model reads `prompt` and must continue with `answer`."""

    prompt: str
    answer: str


@dataclass
class Source:
    """Where rows come from; files and synthetic rows add up."""

    inputs: List[str] = field(default_factory=list, metadata={"input": True})  # JSONL files
    synthetic_rows: int = 0
    synthetic_seed: int = 0
    synthetic_split: str = "train"  # train | heldout


SPLITS = ("train", "heldout")


class Task(Protocol):
    """The names a task module exports."""

    Options: type  # a dataclass of plain types
    ALPHABET: str  # every character a canonical row may hold: the char tokenizer's vocabulary

    def parse_line(self, line: str) -> list[Row]:
        """The rows of one JSONL line, unverified. ValueError with the reason where the line is malformed."""

    def verify(self, row: Row) -> Optional[str]:
        """None when the answer is right, else the drop bucket it belongs to."""

    def canonical(self, row: Row) -> Row:
        """The one spelling of a verified row."""

    def encode_answer(self, answer: str, options: Any) -> str:
        """The text the model learns to write."""

    def decode_answer(self, text: str, options: Any) -> str:
        """The answer in what the model wrote."""

    def is_correct(self, answer: str, completion: str, options: Any) -> bool:
        """Whether `completion`, as the model wrote it and without its end token, gives `answer`."""

    def synthetic_row(self, seed: int, index: int, split: str) -> Row:
        """Row `index` of the seeded stream of a split: a pure function, random access, canonical and right."""


def task_names() -> list[str]:
    folder = str(Path(__file__).parent)
    return sorted(module.name for module in pkgutil.iter_modules([folder]) if module.name != "task")


def load_task(name: str) -> Task:
    """The module of task `name`. UserMistake with the nearest valid name when there is none."""
    if name not in task_names():
        raise UserMistake(f"unknown task {name!r}{nearest(name, task_names())}")
    return importlib.import_module(f"data_tools.tasks.{name}")  # type: ignore[return-value]


def task_options(task: Task, values: dict[str, Any]) -> Any:
    """The task's `Options` filled from a mapping. UserMistake naming unknown keys and wrong types."""
    valid = {item.name: item.type for item in fields(task.Options)}
    for key, value in values.items():
        if key not in valid:
            raise UserMistake(f"unknown task option {key!r}{nearest(key, sorted(valid))}")
        if type(value) is not valid[key]:
            raise UserMistake(f"task option {key}={value!r} is a {type(value).__name__}, not {valid[key].__name__}")
    return task.Options(**values)


def check_rows(name: str, options: dict[str, Any], source: Source) -> list[Problem]:
    """Wrong values of the settings `task`, `task_options` and `source`; opens no file."""
    problems: list[Problem] = []
    try:
        task_options(load_task(name), options)
    except UserMistake as mistake:
        problems.append(Problem("task_options" if name in task_names() else "task", str(mistake)))
    return problems + check_source(source)


def check_source(source: Source) -> list[Problem]:
    """Wrong values of the setting `source`; opens no file."""
    problems: list[Problem] = []
    if not source.inputs and source.synthetic_rows == 0:
        problems.append(Problem("source", "no rows: neither inputs nor synthetic_rows; give one of them"))
    if source.synthetic_rows < 0:
        message = f"{source.synthetic_rows} is negative; give a number of rows, or 0"
        problems.append(Problem("source.synthetic_rows", message))
    if source.synthetic_split not in SPLITS:
        message = f"unknown split {source.synthetic_split!r}{nearest(source.synthetic_split, SPLITS)}"
        problems.append(Problem("source.synthetic_split", message))
    for place, file in enumerate(source.inputs):
        if file in source.inputs[:place]:
            problems.append(Problem(f"source.inputs[{place}]", f"{file} is given twice; name each file once"))
    return problems
