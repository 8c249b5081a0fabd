"""Tasks whose answers are Python programs: code found in a completion, and run against the row's tests in a sandbox
(data_tools/answers/sandbox.py).

    correct  1 when the program passes all tests of its row; 0 for whatever else it does, or when there is no program. A
             row whose tests cannot be run here is not scorable.
"""

import ast
import re
from dataclasses import dataclass

from data_tools.answers import sandbox
from data_tools.answers.forms import final_text
from data_tools.base.declared import setting
from data_tools.mistake import UserMistake
from data_tools.tasks.task import Item

REWARDS = {"correct": 1.0}
_OPENING = re.compile(r"^(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})[^`]*$|(?P<after_text>`{3})[ \t]*\w*[ \t]*$")


@dataclass
class Options:
    chat: bool = True  # the prompt is a user's message for the chat template; false: text for a base model
    time_limit_s: float = setting(6.0, "time of a program from when its tests begin", unit="s", above=0)
    memory_gib: float = setting(1.0, "memory of each process of a program", unit="GiB", least=1 / 16, most=1 << 16)


def check_machine() -> str:
    """Return why this machine runs no programs, "" where it does."""
    return sandbox.why_not()


def warm_up() -> None:
    """Raise UserMistake where this machine runs no programs: before anything is sampled."""
    if why := sandbox.why_not():
        raise UserMistake(why)


def verdict_s(options: Options) -> float:
    """Return how long a verdict may take, in seconds."""
    return options.time_limit_s + 1


def passed(item: Item, program: str, options: Options) -> dict[str, float] | None:
    """Return what a program is worth. Raise sandbox.NoSandbox where nothing can be said of it."""
    columns = item.columns
    limits = sandbox.Limits(options.time_limit_s, memory_gib=options.memory_gib)
    found = sandbox.verdict(program, columns["tests"], columns["calls"], setup=columns["setup"], limits=limits)
    return None if found.passed is None else {"correct": float(found.passed)}


def code_of(completion: str, names: list[str]) -> str:
    """Return the code that a completion gives: its last fenced block that defines one of the names, or else its last
    block, or else all of it; of a completion that thinks, what follows its thoughts."""
    text = final_text(completion) or ""
    blocks = [block for block in _blocks(text) if block.strip()]
    return next((block for block in reversed(blocks) if defines(block, names)), blocks[-1] if blocks else text)


def _blocks(text: str) -> list[str]:
    """Return the contents of Markdown's fenced blocks, without the indentation of their fences; the last may be cut
    off.

    A fence that is indented by four more than the one that opened it is a line of the code, as in CommonMark.
    """
    blocks: list[list[str]] = []
    indent, fence = 0, ""
    for line in text.replace("\r\n", "\n").split("\n"):
        inside = line.lstrip(" \t")
        if not fence:
            if opening := _OPENING.search(line):
                indent, fence = len(opening["indent"] or ""), opening["fence"] or opening["after_text"]
                blocks.append([])
        elif inside.startswith(fence) and len(line) - len(inside) < indent + 4:
            fence = ""
            blocks[-1].append("")
        else:
            blocks[-1].append(line[:indent].lstrip(" \t") + line[indent:])
    return ["\n".join(lines) for lines in blocks]


def defines(code: str, names: list[str]) -> bool:
    """Return whether code defines one of the names at its outermost level."""
    return bool(re.search(rf"^(?:(?:async )?def|class) (?:{'|'.join(map(re.escape, names))})\b", code, re.MULTILINE))


def defined_by(code: str) -> tuple[list[str], str]:
    """Return (the functions and classes that code defines at its outermost level, its imports there). Raise ValueError
    for what is no Python."""
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        raise ValueError(f"its code is no Python: {error.msg}, line {error.lineno}") from None
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    imports = [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return [node.name for node in tree.body if isinstance(node, kinds)], "\n".join(imports)


def ended_at(text: str, stops: tuple[str, ...]) -> str:
    """Return the text up to the first of `stops`, where a base model is to end."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
