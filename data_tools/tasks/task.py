"""What every task module offers, and how one is found by name.

A task is a module `data_tools/tasks/NAME.py`, a user's module `my.module` of the same names, or a user's function
`my.module:reward`. It has prompts that completions are scored on:

    record ──items──> items        item, completion ──rewards──> terms        item, transcript ──reply──> observation

and, where its answers are to be learned too (materialize), rows:

    JSONL line ──parse_line──> rows ──verify──> None or a drop bucket ──canonical──> row ──encode_answer──> text
"""

import ast
import functools
import hashlib
import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol, get_type_hints

from data_tools.base import declared, users_code
from data_tools.base.declared import setting
from data_tools.chats.conversation import Conversation
from data_tools.mistake import Problem, UserMistake, nearest
from data_tools.records import readers

_OF_TASKS = re.compile(r"^HUB = ", re.MULTILINE)  # what a task's file says, and no other of the folder


class Row(NamedTuple):
    """Represents one training or test example: the model reads `prompt` and must continue with `answer`."""

    prompt: str
    answer: str


Prompt = str | list[dict]  # text, or messages for the tokenizer's chat template


@dataclass(frozen=True)
class Item:
    """Represents one prompt, and what its task needs to score completions of it. `uid` names the prompt among all of a
    run's."""

    uid: str
    prompt: Prompt
    answer: Any = None
    columns: Mapping[str, Any] = field(default_factory=dict)  # of its row, for a task that wants more than the answer
    question: str = ""  # what is asked, without instructions, choices and tests; "": the task does not tell it apart

    @classmethod
    def of(cls, prompt: Prompt, answer: Any = None, columns: Mapping[str, Any] = {}, question: str = "") -> "Item":
        """Return an item that is named by its prompt, so that the order of files and rows does not matter and equal
        prompts are one."""
        return cls(_name_of(prompt), prompt, answer, columns, question=question)

    @property
    def scoring(self) -> str:
        """Return 16 hex digits that name all that a completion is scored with: answer and columns."""
        return _name_of([self.answer, dict(self.columns)])


def _name_of(value: Any) -> str:
    """Return 16 hex digits that name a value, the same in any process."""
    text = json.dumps(value, sort_keys=True, default=_spelled)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _spelled(value: Any) -> str:
    """Return what `value` calls itself, without where in memory it lies."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


SPLITS = ("train", "heldout")


@dataclass
class Source:
    """Where rows come from; files and synthetic rows add up."""

    inputs: list[str] = setting(
        list,
        "files: JSONL, JSON, Parquet or CSV; of prompts also folders of them",
        example=["prompts.jsonl"],
        input=True,
    )
    synthetic_rows: int = setting(0, "rows that the task makes up, besides those of the files", unit="rows", least=0)
    synthetic_seed: int = setting(0, "draw of the synthetic rows", free=True)
    synthetic_split: str = setting("train", "whether synthetic rows are of training or held out", choices=SPLITS)


Terms = float | Mapping[str, float | None] | None


class Task(Protocol):
    """Represents the names a task module exports."""

    Options: type  # a dataclass of plain types
    REWARDS: Mapping[str, float]  # the weight of each reward term, where a mix does not say otherwise
    HUB: str  # where on the hub its prompts are (data_tools/records/hub.py), "" for nowhere

    def items(self, record: dict[str, Any], options: Any) -> list[Item]:
        """Return the prompts of one record. Raise ValueError with the reason where it is malformed."""

    def left_out(self, record: dict[str, Any]) -> list[str]:
        """Return the bucket of each row of a record that gives no prompt since it is wrong. May be left out."""

    def rewards(self, item: Item, completion: str, options: Any) -> Terms:
        """Return the reward terms of a completion, without its end token; a lone number is the term `reward`.

        None for what cannot be scored, a whole completion or one of its terms. Runs in a process of its own.
        """

    def warm_up(self) -> None:
        """Do what takes long the first time, such as imports: outside the time limit of a sample. May be left out."""

    def final_answer(self, item: Item, completion: str, options: Any) -> str | None:
        """Return the one spelling of what the completion answers, for majority votes; None when it answers nothing.

        A task without the name has no majority.
        """

    RIGHT: (
        float  # the least reward that is right, where there is no term `correct`; left out, 1 is right, 0 and -1 wrong
    )

    def best(self, item: Item, options: Any) -> Mapping[str, float]:
        """Return the terms of the best completion there can be, which alone is right; for rewards that are no yes or
        no.

        A task that cannot tell leaves the name out. A pure function, called in the run's own process.
        """

    def cut_off(self, item: Item, options: Any) -> Terms:
        """Return the terms of a completion that did not end; a task that scores such as they stand leaves the name
        out."""

    def check_options(self, options: Any) -> list[str]:
        """What is wrong with values of the right type; a task where nothing can be leaves the name out."""

    def check_machine(self) -> str:
        """Return why completions cannot be scored on this machine, "" where they can; of tasks that need a sandbox."""

    def verdict_s(self, options: Any) -> float:
        """Return how long a verdict may take, in seconds, where the task itself limits it; may be left out."""

    def compares(self, options: Any) -> bool:
        """Return whether nothing is generated with these options: the likeliest of the texts in the item's column
        `choices` answers, after a prompt that is a text. The column `letters` names them, and the item's answer is the
        letter of the right one. Only `evaluate` asks so; a task without choices leaves the name out."""

    def reply(self, item: Item, transcript: str, options: Any) -> str | None:
        """Return what the environment answers to the completion so far, earlier replies included; None when it is over.

        Asked after each of `stop_strings(options)`, and where the model ends a completion by itself; there "" is the
        end, elsewhere it lets the model go on. For tasks of several turns; the others leave both names out. The tokens
        of a reply count toward max_tokens and are not the model's: they are not trained. Runs in a process of its own,
        under the same time limit as `rewards`. The same transcript should have the same reply: one that a kill lost is
        asked for again.
        """

    def stop_strings(self, options: Any) -> list[str] | None:
        """Return texts after which the model waits for a reply; the token that completes one may go on with other
        characters.

        None where there is one turn with these options.
        """


class RowTask(Task, Protocol):
    """Represents a task whose answers can be learned, too: what materialize reads, and evaluate with `task`."""

    ALPHABET: str  # every character of its rows, for init_model's char tokenizer; may be left out

    def parse_line(self, line: str) -> list[Row]:
        """Return the rows of one JSONL line, unverified.

        Raise ValueError with the reason where the line is malformed.
        """

    def verify(self, row: Row) -> str | None:
        """Return None when the answer is right, else the drop bucket it belongs to."""

    def canonical(self, row: Row) -> Row:
        """Return the one spelling of a verified row."""

    def encode_answer(self, answer: str, options: Any) -> str:
        """Return the text the model learns to write."""

    def decode_answer(self, text: str, options: Any) -> str:
        """Return the answer in what the model wrote."""

    def is_correct(self, answer: str, completion: str, options: Any) -> bool:
        """Return whether `completion`, as the model wrote it and without its end token, gives `answer`."""

    def synthetic_row(self, seed: int, index: int, split: str) -> Row:
        """Return row `index` of the seeded stream of a split: a pure function, random access, canonical and right.

        May be left out; then `source.synthetic_rows` is refused.
        """


class ChatTask(Protocol):
    """Represents a data set of conversations to learn: what materialize reads as chats, with its own options. The
    records are read by data_tools/chats/conversation.py, whichever of its schemas they have."""

    Options: type
    HUB: str

    def conversation(self, given: Conversation, options: Any) -> Conversation:
        """Return the conversation as it is to be learned. Raise BadRecord for one that is not."""


@functools.cache
def task_names() -> list[str]:
    """Return the names of our own tasks: of the files beside this one that say where on the hub their prompts are."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if _OF_TASKS.search(path.read_text()))


def load_task(name: str) -> Task:
    """Return the module of task `name`, or a user's.

    Raise UserMistake with the nearest valid name when there is none.
    """
    if ":" in name:
        return FunctionTask(name)  # type: ignore[return-value]  # it has those names that it needs
    if "." in name:
        return users_code.load(name)
    if name not in task_names():
        raise UserMistake(f"unknown task {name!r}{nearest(name, task_names())}")
    return importlib.import_module(f"data_tools.tasks.{name}")


def load_row_task(name: str) -> RowTask:
    """Return a task with rows. Raise UserMistake for one that has prompts only."""
    task = load_task(name)
    if not hasattr(task, "parse_line"):
        rows = ", ".join(known for known in task_names() if hasattr(load_task(known), "parse_line"))
        raise UserMistake(
            f"task {name!r} has prompts to score, no rows to learn: evaluate, generate and grpo take it in mix.entries"
            f" (tasks with rows: {rows})"
        )
    return task  # type: ignore[return-value]  # which has parse_line, and so the other names


def load_chat_task(name: str) -> ChatTask | None:
    """Return one of our tasks of conversations by its name; None for any other name."""
    task: Any = load_task(name) if name in task_names() else None
    return task if hasattr(task, "conversation") else None


def check_chats(name: str, options: dict[str, Any], source: Source) -> list[Problem]:
    """Return wrong values of a task of conversations: its options, and a `source` that may be empty, for the hub's."""
    problems = check_options(load_task(name), options)
    if source.synthetic_rows:
        problems.append(Problem("source.synthetic_rows", f"task {name} makes no rows; give files in source.inputs"))
    return problems + (check_source(source) if source.inputs else [])


def rows_of(task: RowTask, raw: Any) -> list[Row]:
    """Return the rows of a record as a share of its file gives it (data_tools/records/readers.py). Raise ValueError
    with the reason."""
    return task.parse_line(readers.text_of(raw))


def check_task(name: str) -> str | None:
    """Return why there is no such task, None when there is one. Runs no code of a user's module but its packages'."""
    if ":" not in name and "." not in name:
        own = "; one of your own is my.module, or my.module:function"
        return None if name in task_names() else f"unknown task {name!r}{nearest(name, task_names())}{own}"
    module, _, function = name.partition(":")
    try:
        spec = users_code.find(module)
    except UserMistake as mistake:
        return str(mistake)
    if spec is None:
        looked = users_code.not_there(module)
        return f"there is no module {module!r}{looked}; it has to be importable where the run is submitted"
    if ":" in name and not function.isidentifier():
        return f"{function!r} is no name of a function"
    names = _names_in(spec.origin)
    if function and names and function not in names:
        return f"module {module!r} has no function {function!r}{nearest(function, sorted(names))}"
    if not function and names and not ({"Options", "items", "rewards"} <= names or {"Options", "parse_line"} <= names):
        needed = "Options, REWARDS, items and rewards (data_tools/README.md, “A task of your own”)"
        return f"module {module!r} is no task, which has {needed}; of a function alone say {module}:FUNCTION"
    return None


def _names_in(file: str | None) -> set[str]:
    """Return the names that a module's file gives at its top, without running it; none where that cannot be told."""
    try:
        body = ast.parse(Path(file or "").read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return set()
    names = set[str]()
    for part in body:
        if isinstance(part, (ast.If, ast.Try, ast.With, ast.For, ast.While)):
            return set()  # what is defined there depends
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(part.name)
        elif isinstance(part, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in part.names}
        names |= {node.id for node in ast.walk(part) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return names if not names & {"*", "__getattr__"} else set()


def code_digest(name: str) -> str:
    """Return the SHA-256 of the file of a user's `my.module` or `my.module:function`, "" for a task of ours.

    Runs no code of the module but its packages'.
    """
    if ":" not in name and "." not in name:
        return ""
    spec = users_code.find(name.partition(":")[0])
    file = Path(spec.origin) if spec and spec.origin else None
    return hashlib.sha256(file.read_bytes()).hexdigest() if file and file.is_file() else ""


class FunctionTask:
    """Represents a user's function as a task: `my.module:reward` is called with (item, completion) and gives reward
    terms.

    A record has `prompt` (text or messages) or `messages`, and whatever else the function reads from item.columns.
    RIGHT of the module, or of the function, is the least reward that is right.
    """

    HUB = ""

    @dataclass
    class Options:
        prompt_key: str = "prompt"
        answer_key: str = "answer"

    def __init__(self, path: str):
        module, _, name = path.partition(":")
        function = getattr(users_code.load(module), name, None)
        if not callable(function):
            raise UserMistake(f"module {module!r} has no function {name!r}")
        self._function: Callable[[Item, str], Any] = function
        self.REWARDS: dict[str, float] = {}
        for place in (sys.modules[module], self._function):
            if hasattr(place, "RIGHT"):
                self.RIGHT = place.RIGHT

    def items(self, record: dict[str, Any], options: Any) -> list[Item]:
        prompt = record.get(options.prompt_key, record.get("messages"))
        if not isinstance(prompt, (str, list)):
            raise ValueError(f"no text or messages under {options.prompt_key!r}")
        return [Item.of(prompt, record.get(options.answer_key), record)]

    def rewards(self, item: Item, completion: str, options: Any) -> Any:
        return self._function(item, completion)


def task_options(task: Any, values: Mapping[str, Any]) -> Any:
    """Return the task's `Options` filled from a mapping. Raise UserMistake naming unknown keys and wrong types."""
    types = get_type_hints(task.Options)
    valid = {item.name: types[item.name] for item in fields(task.Options)}
    given = {}
    for key, value in values.items():
        if key not in valid:
            raise UserMistake(f"unknown task option {key!r}{nearest(key, sorted(valid))}")
        if valid[key] is float and type(value) is int:
            value = float(value)
        if valid[key] is not Any and type(value) is not valid[key]:
            raise UserMistake(f"task option {key}={value!r} is a {type(value).__name__}, not {valid[key].__name__}")
        given[key] = value
    return task.Options(**given)


def declared_options(name: str) -> Any:
    """Return what stands for a user's task in `check_options`, its `Options` read from its file, which is not run.

    None where that cannot be told: they are no plain dataclass of the file's own. Types other than texts, numbers and
    truth values are left open.
    """
    spec = users_code.find(name)
    try:
        tree = ast.parse(Path(spec.origin if spec and spec.origin else "").read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
    known = [part for part in tree.body if isinstance(part, ast.ClassDef) and part.name == "Options"]
    if len(known) != 1 or known[0].bases or known[0].keywords or not known[0].decorator_list:
        return None
    plain = {kind.__name__: kind for kind in (bool, int, float, str)}
    options = [
        (part.target.id, plain.get(ast.unparse(part.annotation).strip("'\""), Any), None)
        for part in known[0].body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    ]
    return SimpleNamespace(Options=make_dataclass("Options", options))


def check_rows(name: str, options: dict[str, Any], source: Source) -> list[Problem]:
    """Wrong values of the settings `task`, `task_options` and `source` of what learns rows; opens no file."""
    problems: list[Problem] = []
    try:
        task = load_row_task(name)
    except UserMistake as mistake:
        problems.append(Problem("task", str(mistake)))
    else:
        problems += check_options(task, options)
        if source.synthetic_rows and not hasattr(task, "synthetic_row"):
            message = f"task {name} makes no rows; give files in source.inputs"
            problems.append(Problem("source.synthetic_rows", message))
        problems += check_source(source, f"no rows; give {rows_from(task)}")
        return problems
    return problems + check_source(source)


def rows_from(task: Any) -> str:
    """Return where the rows of a task may come from, for the remedy of a source that names none."""
    made = ", or a number in source.synthetic_rows" if hasattr(task, "synthetic_row") else ""
    return f"files in source.inputs{made}"


def check_options(task: Any, values: Mapping[str, Any], where: str = "task_options") -> list[Problem]:
    """Return wrong names and types of options, and whatever else the task's own `check_options` refuses."""
    try:
        options = task_options(task, values)
    except UserMistake as mistake:
        return [Problem(where, str(mistake))]
    own: Callable[[Any], list[str]] = getattr(task, "check_options", lambda options: [])
    refused = declared.check(options, where) if is_dataclass(options) else []
    why_not = getattr(task, "check_machine", lambda: "")()
    refused += [Problem(where.rpartition(".")[0] or "task", why_not)] if why_not else []
    return refused or [Problem(where, message) for message in own(options)]


def check_source(source: Source, none: str = "") -> list[Problem]:
    """Wrong values of the setting `source`; opens no file.

    `none` is what to say of one that names no rows, with the remedy, which depends on the task; "": nothing.
    """
    problems: list[Problem] = []
    if none and not source.inputs and source.synthetic_rows == 0:
        problems.append(Problem("source", none))
    for place, file in enumerate(source.inputs):
        if file in source.inputs[:place]:
            problems.append(Problem(f"source.inputs[{place}]", f"{file} is given twice; name each file once"))
    return problems
