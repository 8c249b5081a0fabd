"""THE way from what an input names, files and folders, to the files that are read of it."""

from collections.abc import Sequence
from pathlib import Path

from data_tools.mistake import Problem, UserMistake

CSV, PARQUET, JSONL = (".csv",), (".parquet",), (".jsonl", ".jsonl.gz", ".jsonl.zst")


def files_of(inputs: Sequence[str], endings: Sequence[str], where: str = "inputs") -> list[Path]:
    """Return the files that `inputs` names: files of any name, and of folders, such as a phase's, those with one of
    these endings in any case, by name. Raise UserMistake for all that name none.
    """
    files, problems = list[Path](), list[Problem]()
    for name in inputs:
        path = Path(name).expanduser()
        inside = list(path.iterdir()) if path.is_dir() else []
        named = sorted(file for file in inside if file.is_file() and file.name.lower().endswith(tuple(endings)))
        if path.is_file():
            named = [path]
        if not named:
            kinds = [ending.removeprefix(".") for ending in endings if ending.count(".") == 1]
            message = (
                f"{name} is neither a file nor a folder with a file of records ({', '.join(kinds)}); give what exists"
            )
            problems.append(Problem(where, message))
        files += named
    if problems:
        raise UserMistake(problems)
    return files
