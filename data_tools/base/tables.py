"""Small tables that the report shows: KEEP/tables/NAME.json = {"title", "columns", "rows"}. Pure Python."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from data_tools.base import durable


class ShownTable(TypedDict):
    """Holds a table for people; a row has as many JSON values as there are columns."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


def write_table(keep: Path, name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table for people; every row has as many JSON values as there are columns."""
    folder = keep / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"table {name}: a row of {len(row)} values under {len(columns)} columns")
    table: ShownTable = {"title": title, "columns": list(columns), "rows": [list(row) for row in rows]}
    durable.write_json(folder / f"{name}.json", table)


def read_tables(keep: Path) -> dict[str, ShownTable]:
    """Return {name: table} of a phase; what is torn, or no table, is left out."""
    found = {}
    for path in sorted((keep / "tables").glob("*.json")):
        with contextlib.suppress(durable.TornFile, FileNotFoundError):
            if _is_table(table := durable.read_json(path)):
                found[path.stem] = table
    return found


def _is_table(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("title"), str):
        return False
    columns, rows = value.get("columns"), value.get("rows")
    if not isinstance(columns, list) or not isinstance(rows, list):
        return False
    return all(isinstance(row, list) for row in rows)
