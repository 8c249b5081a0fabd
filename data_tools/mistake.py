"""What a user did wrong, as one line that names the values and the remedy.

Every package raises and returns these two; the command line and the worker turn them into exit code 2
without a traceback.
"""

import difflib
from dataclasses import dataclass
from typing import Sequence

EXIT_MISTAKE = 2


@dataclass(frozen=True)
class Problem:
    """One violated rule. `where` is the place the user can edit: a file and a dotted key, or a file and line."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class UserMistake(Exception):
    """Wrong input. Carries all problems found at once; `str()` gives one line a problem."""

    exit_code = EXIT_MISTAKE

    def __init__(self, problems: "str | Problem | list[Problem]"):
        if isinstance(problems, str):
            problems = [Problem("", problems)]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems: list[Problem] = problems
        super().__init__("\n".join(map(str, problems)))


def nearest(word: str, known: Sequence[str]) -> str:
    """' (did you mean X? known: ...)' for an error about an unknown word."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return f" ({hint}known: {', '.join(known)})"
