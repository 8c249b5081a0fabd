"""THE way from what an input names, files, folders and patterns (data/*.jsonl), to the files that are read of it."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_tools.base.inside import expanded
from data_tools.mistake import Problem, UserMistake

CSV, PARQUET, JSONL = (".csv",), (".parquet",), (".jsonl", ".jsonl.gz", ".jsonl.zst")
RECORDS, JSON = (*CSV, ".csv.gz", ".csv.zst", *PARQUET, *JSONL), (".json", ".json.gz", ".json.zst")


def named_by(name: str, endings: Sequence[str]) -> list[Path]:
    """Return the files of an input: a file of any name; what a pattern matches, where `**` is any folder below; of a
    folder, such as a phase's, those with one of these endings in any case. Sorted.
    """
    path = expanded(name)
    if path.is_file():
        return [path]
    found = path.iterdir() if path.is_dir() else []
    return sorted(file for file in found if file.is_file() and file.name.lower().endswith(tuple(endings))) or matching(
        name
    )


def matching(pattern: str) -> list[Path]:
    """Return the files that a pattern matches, sorted; none where it is no pattern."""
    path = str(expanded(pattern))
    found = map(Path, glob.glob(path, recursive=True)) if glob.has_magic(path) else []
    return sorted(file for file in found if file.is_file())


def records_of(name: str) -> list[Path]:
    """Return the files of records of an input, or what it says where there is none: opening that tells.

    JSON files of a folder are some where it has no others: phases write JSON of other kinds beside their records.
    """
    return named_by(name, RECORDS) or named_by(name, JSON) or [expanded(name)]


def missing(named: Iterable[tuple[str, Path]]) -> list[Problem]:
    """Refuse what is no file, and names that are no Unicode; each is (the setting that names it, path)."""
    problems = []
    for where, path in named:
        if not path.is_file():
            of = "file of records in" if path.is_dir() else "file"
            problems.append(Problem(where, f"no {of} {path}; give files that exist"))
        elif not str(path).isascii() and os.fsencode(path).decode("utf-8", "replace") != str(path):
            problems.append(
                Problem(where, f"{ascii(str(path))}: its name is no Unicode, which no report can say; rename it")
            )
    return problems


def named_twice(named: Sequence[tuple[str, Path]]) -> list[Problem]:
    """Refuse a file that a file, a folder or a pattern names again; each is (the setting that names it, path)."""
    paths = [path for _, path in named]
    again = [(where, path) for place, (where, path) in enumerate(named) if path in paths[:place]]
    return [Problem(where, f"{path} is given twice; name each file once") for where, path in again]


def files_of(inputs: Sequence[str], endings: Sequence[str], where: str = "inputs") -> list[Path]:
    """Return the files that `inputs` names. Raise UserMistake for all that name none."""
    files, problems = list[Path](), list[Problem]()
    for name in inputs:
        named = named_by(name, endings)
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
