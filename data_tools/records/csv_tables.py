"""CSV prompt tables (`prompt`, `q_action_0` … `reward_action_0` …): read whole, checked by file and line, written back.

Other columns keep their text. Numbers are written so that reading gives the same float64.
"""

import csv
import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.base.bounds import CSV as CSV_BOUND
from data_tools.base.bounds import LINE, NoFile, open_regular
from data_tools.mistake import Problem, UserMistake, nearest
from data_tools.records.inputs import CSV, files_of

PROMPT = "prompt"
_NUMBER = "(0|[1-9][0-9]{0,8})"  # of a column; others are columns of their own
_MOST_PROBLEMS = 20  # told of one file


@dataclass(frozen=True)
class Table:
    """Represents one CSV file. `lines` are the numbers of the lines that the rows begin on, from 1."""

    path: Path
    columns: list[str]
    rows: list[list[str]]
    lines: list[int]

    def column(self, name: str) -> list[str]:
        """Raise UserMistake with the nearest name when there is none."""
        if name not in self.columns:
            raise UserMistake(Problem(str(self.path), f"has no column {name!r}{nearest(name, self.columns)}"))
        place = self.columns.index(name)
        return [row[place] for row in self.rows]

    def numbered(self, prefix: str) -> list[str]:
        """Return the columns PREFIX0, PREFIX1, … in that order. Raise UserMistake when there are fewer than two or one
        is left out."""
        numbers = {int(m[1]) for name in self.columns if (m := re.fullmatch(re.escape(prefix) + _NUMBER, name))}
        if len(numbers) < 2:
            columns = ", ".join(self.columns)
            raise UserMistake(Problem(str(self.path), f"needs columns {prefix}0, {prefix}1, …; it has {columns}"))
        if max(numbers) >= len(numbers):
            missing = next(number for number in range(len(numbers)) if number not in numbers)
            raise UserMistake(Problem(str(self.path), f"has {prefix}{max(numbers)} but no {prefix}{missing}"))
        return [f"{prefix}{number}" for number in sorted(numbers)]

    def floats(self, names: Sequence[str]) -> np.ndarray:
        """Return float64[rows, names]. Raise UserMistake naming every line (of the first 20) with something else than a
        number."""
        values = np.empty((len(self.rows), len(names)))
        problems = []
        for place, name in enumerate(names):
            for row, text in enumerate(self.column(name)):
                values[row, place] = number_of(text)
                if not np.isfinite(values[row, place]):
                    problems.append((self.lines[row], name, text))
        if problems:
            told = [
                Problem(f"{self.path}:{line}", f"{name} is {text!r}, not a finite number")
                for line, name, text in sorted(problems)[:_MOST_PROBLEMS]
            ]
            if len(problems) > len(told):
                told.append(Problem(str(self.path), f"and {len(problems) - len(told)} more"))
            raise UserMistake(told)
        return values


def number_of(value: object) -> float:
    """Return the number that a cell is or spells, nan for what is none. Python alone reads 1_000 as a number."""
    if isinstance(value, bool) or isinstance(value, str) and "_" in value:
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]  # what it cannot be made of raises
    except (OverflowError, TypeError, ValueError):
        return math.nan


def read_table(path: Path) -> Table:
    """Raise UserMistake for a file that is absent, empty, too large, not UTF-8 or has a row of another width than its
    header."""
    csv.field_size_limit(LINE.most)  # of characters; Python's own limit refuses prompts from 131,073 on
    try:
        with open_regular(path) as raw, io.TextIOWrapper(raw, newline="", encoding="utf-8-sig") as file:
            if os.fstat(raw.fileno()).st_size > CSV_BOUND.most:
                raise UserMistake(Problem(str(path), f"has {CSV_BOUND.exceeded()}; or write it as JSON Lines"))
            reader = csv.reader(file, strict=True)
            columns = next(reader, [])
            rows, lines, line = [], [], reader.line_num + 1
            for row in reader:
                if row:
                    rows.append(row)
                    lines.append(line)
                line = reader.line_num + 1
    except FileNotFoundError:
        raise UserMistake(Problem(str(path), "no such file")) from None
    except NoFile as error:
        raise UserMistake(Problem(str(path), str(error.strerror))) from None
    except UnicodeDecodeError as error:
        raise UserMistake(Problem(str(path), f"not UTF-8 at byte {error.start}: {error.reason}")) from None
    except csv.Error as error:
        why = f"has {LINE.exceeded()}" if "field limit" in str(error) else f"not CSV: {error}"
        raise UserMistake(Problem(f"{path}:{reader.line_num}", why)) from None
    if not columns:
        raise UserMistake(Problem(str(path), "is empty; a CSV file with a header was expected"))
    problems = [
        Problem(str(path), f"has two columns {name!r}") for name in sorted({c for c in columns if columns.count(c) > 1})
    ]
    problems += [
        Problem(f"{path}:{line}", f"{len(row)} values under {len(columns)} columns")
        for row, line in zip(rows, lines)
        if len(row) != len(columns)
    ]
    if problems:
        raise UserMistake(problems[:_MOST_PROBLEMS])
    return Table(path, columns, rows, lines)


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a CSV file, floats as their shortest text that reads back equal (`repr`)."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([repr(float(v)) if isinstance(v, float) else v for v in row] for row in rows)


def table_files(inputs: Sequence[str]) -> list[Path]:
    """Return the CSV files that `inputs` names. Raise UserMistake also when two share a name: their tables would."""
    files = files_of(inputs, CSV)
    names = [file.name for file in files]
    problems = [
        Problem("inputs", f"two files are called {name}") for name in sorted({n for n in names if names.count(n) > 1})
    ]
    if problems:
        raise UserMistake(problems)
    return files
