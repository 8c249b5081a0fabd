"""What is wrong with a pipeline file, collected: each with file (or override), key and value, raised all together."""

from collections.abc import Iterable
from pathlib import Path

from data_tools.mistake import Problem, UserMistake, nearest


class Problems:
    """The problems of one pipeline file; a key that an override wrote is told as the override's."""

    def __init__(self, path: Path):
        self.path = path
        self.overridden: dict[str, str] = {}  # keys that overrides wrote: what wrote them
        self.noted: list[Problem] = []

    def note(self, key: str, message: str) -> None:
        """Note what is wrong with the value of a dotted key."""
        problem = Problem(self.overridden.get(key, f"{self.path}: {key}"), message)
        if problem not in self.noted:  # a value may be read twice
            self.noted.append(problem)

    def note_override(self, override: str, message: str) -> None:
        """Note what is wrong with an override as it was typed."""
        self.noted.append(Problem(f"override {override!r}", message))

    def note_variable(self, name: str, message: str) -> None:
        """Note what is wrong with a variable of the environment."""
        self.noted.append(Problem(f"variable {name}", message))

    def note_unknown_keys(self, written: Iterable[object], known: tuple[str, ...], prefix: str) -> None:
        """Note each of the keys `written` below `prefix` that is not `known`."""
        for key in written:
            if key not in known:
                self.note(f"{prefix}{key}", f"unknown key{nearest(str(key), known)}")


def no_such_pipeline(path: Path) -> UserMistake:
    """Return the mistake of naming a pipeline file that is not there; of one of ours it says where that lies."""
    own = Path(__file__).parents[1] / "pipelines" / f"{path.name.removesuffix('.yaml')}.yaml"
    hint = f"; the one that comes with afterok is {own}" if own.is_file() else ""
    return UserMistake(f"{path}: no such pipeline file{hint}")
