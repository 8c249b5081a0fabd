"""Rows of a Parquet file, read a few at a time: some rows lie in memory at once, not a whole group of the file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.base.bounds import LINE, MIB, open_regular
from data_tools.mistake import UserMistake

_ROWS = 16  # read at a time: 440 bytes of a file may be 1 GB of rows
_BUFFER = MIB  # bytes of a column that are read from the file at a time


class ParquetShare:
    """Represents rows of a Parquet file. Absent keys, which its structs spell as null, are left out."""

    unit = "rows"

    def __init__(self, path: Path, index: int, count: int):
        import pyarrow.parquet

        self.path = path
        open_regular(path).close()
        try:
            self.file = pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
            self.groups = [self.file.metadata.row_group(group).num_rows for group in range(self.file.num_row_groups)]
            rows = self.file.metadata.num_rows
        except Exception as error:  # ArrowException, OSError, and whatever else it meets in a damaged footer
            raise UserMistake(f"{path} is no whole Parquet file ({_first_line(error)}); restore it") from None
        if min(self.groups, default=0) < 0 or sum(self.groups) != rows:
            raise UserMistake(f"{path} is no whole Parquet file (its groups have other rows than it); restore it")
        self.start, self.stop = index * rows // count, (index + 1) * rows // count
        self.done, self.total = 0, self.stop - self.start

    def __iter__(self) -> Iterator[dict[str, Any]]:
        position = 0
        for group, rows in enumerate(self.groups):
            first, last = max(self.start - position, 0), min(self.stop - position, rows)
            if first < last:
                for row in self._rows(group, first, last):
                    self.done += 1
                    yield _without_nulls(row)
            position += rows

    def _rows(self, group: int, first: int, last: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of a group from `first` to before `last`. Raise UserMistake where it is damaged or too
        large."""
        place = given = 0
        batches = self.file.iter_batches(batch_size=_ROWS, row_groups=[group])
        while place < last:
            try:
                batch = next(batches, None)
                rows = self._values(batch, first - place, last - place) if batch is not None else []
            except UserMistake:
                raise
            except Exception as error:  # of damaged pages, and of values that Python has nothing for
                damage = f"{self.path}: row group {group + 1} is damaged ({_first_line(error)})"
                raise UserMistake(f"{damage}; restore it") from None
            if batch is None:
                break
            place, given = place + batch.num_rows, given + len(rows)
            yield from rows
        if given != last - first:
            raise UserMistake(f"{self.path}: row group {group + 1} is damaged (rows are missing); restore it")

    def _values(self, batch: Any, first: int, last: int) -> list[dict[str, Any]]:
        """Return the rows of a batch from `first` to before `last`, as far as these are in it."""
        first, last = max(first, 0), min(last, batch.num_rows)
        if batch.nbytes > LINE.most:
            for number in range(batch.num_rows):
                if batch.slice(number, 1).nbytes > LINE.most:
                    raise UserMistake(f"{self.place(self.done + 1 + max(number - first, 0))}: has {LINE.exceeded()}")
        return batch.slice(first, last - first).to_pylist() if first < last else []

    def place(self, number: int) -> str:
        """Return FILE: row N of a record."""
        return f"{self.path}: row {self.start + number}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
