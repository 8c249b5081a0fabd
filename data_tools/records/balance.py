"""The balance sheet: what came in is what was kept plus what each named bucket dropped, for every source.

Lines and rows are counted apart, since a line may hold several rows or none; tokens are those of rows that got as far
as having some, and of the kept ones some are in the loss:

    lines in  = lines with rows + dropped lines     rows in = kept + dropped rows
    tokens in = tokens + dropped tokens             tokens  = supervised + masked
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.base.durable import TornFile, write_json
from data_tools.base.one_file import open_part
from data_tools.base.tables import ShownTable

FILE = "balance.json"


@dataclass
class SourceBalance:
    """Represents the counts of one source; `tokens` and `supervised` are those of kept rows."""

    name: str
    lines: int = 0
    lines_with_rows: int = 0
    lines_dropped: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    tokens_in: int = 0
    tokens: int = 0
    tokens_dropped: Counter[str] = field(default_factory=Counter)
    supervised: int = 0

    @classmethod
    def of_rows(cls, name: str, rows: int) -> "SourceBalance":
        """Return a source whose lines hold one row each."""
        return cls(name, lines=rows, lines_with_rows=rows, rows=rows)

    def keep(self, tokens: int, supervised: int) -> None:
        """Count a kept row of so many tokens, some of them in the loss; `rows` is counted where the row is met."""
        self.kept += 1
        self.tokens_in += tokens
        self.tokens += tokens
        self.supervised += supervised

    def refuse(self, bucket: str, tokens: int) -> None:
        """Count a row that is not kept, of so many tokens."""
        self.dropped[bucket] += 1
        if tokens:
            self.tokens_in += tokens
            self.tokens_dropped[bucket] += tokens

    def drop_kept(self, bucket: str, rows: int, tokens: int, supervised: int) -> None:
        """Count rows as dropped that were counted as kept before."""
        self.kept -= rows
        self.dropped[bucket] += rows
        self.tokens -= tokens
        self.tokens_dropped[bucket] += tokens
        self.supervised -= supervised

    def __add__(self, other: "SourceBalance") -> "SourceBalance":
        """Return the sheet of two shares of the same source."""
        if self.name != other.name:
            raise ValueError(f"shares of two sources: {self.name!r} and {other.name!r}")
        theirs = vars(other)
        sums = {key: value + theirs[key] for key, value in vars(self).items() if key != "name"}
        return SourceBalance(self.name, **sums)

    def check(self) -> None:
        """Raise ValueError naming the numbers when they do not add up."""
        sums = (
            ("lines", self.lines, "with rows", self.lines_with_rows, self.lines_dropped),
            ("rows", self.rows, "kept", self.kept, self.dropped),
            ("tokens", self.tokens_in, "kept", self.tokens, self.tokens_dropped),
        )
        for what, total, kept_word, kept, dropped in sums:
            if min([total, kept, *dropped.values()]) < 0 or total != kept + sum(dropped.values()):
                drops = "".join(f" + {count} {bucket}" for bucket, count in sorted(dropped.items()))
                raise ValueError(f"{self.name}: {total} {what} are not {kept} {kept_word}{drops}")
        if not 0 <= self.supervised <= self.tokens:
            raise ValueError(f"{self.name}: {self.supervised} supervised of {self.tokens} tokens")


class Balance:
    """Represents the sheets of all sources, in their order."""

    def __init__(self, sources: Iterable[SourceBalance]):
        self.sources = list(sources)

    def __add__(self, other: "Balance") -> "Balance":
        """Return the sheet of two elements of the same phase."""
        return Balance(own + theirs for own, theirs in zip(self.sources, other.sources, strict=True))

    def check(self) -> None:
        """ValueError when any source does not add up."""
        for source in self.sources:
            source.check()

    def write(self, folder: Path) -> None:
        """Write FOLDER/balance.json. Raise ValueError when it does not add up."""
        self.check()
        write_json(folder / FILE, self.to_json())

    @classmethod
    def read(cls, folder: Path) -> "Balance":
        """Return what `write` left. Raise FileNotFoundError when nothing is there."""
        with open_part(folder / FILE) as file:
            try:
                told = json.load(file)
            except (ValueError, RecursionError):
                raise TornFile(f"{folder / FILE} is not whole JSON (truncated or edited)") from None
        return cls.from_json(told)

    def total(self) -> SourceBalance:
        total = SourceBalance("total")
        for source in self.sources:
            total = total + SourceBalance(**{**vars(source), "name": "total"})
        return total

    def table(self) -> ShownTable:
        """Return the balance for people: one row a source and, of several, their total; a column each bucket."""
        total = self.total()
        line_buckets, buckets = sorted(total.lines_dropped), sorted(total.dropped)
        tokens = ["tokens in", "tokens", "supervised", "masked"]
        columns = ["source", "lines", *line_buckets, "rows", "kept", *buckets, *tokens]
        rows = []
        for source in [*self.sources, total] if len(self.sources) > 1 else self.sources:
            dropped_lines = [source.lines_dropped[bucket] for bucket in line_buckets]
            dropped = [source.dropped[bucket] for bucket in buckets]
            counts = [source.lines, *dropped_lines, source.rows, source.kept, *dropped]
            masked = source.tokens - source.supervised
            rows.append([source.name, *counts, source.tokens_in, source.tokens, source.supervised, masked])
        return {"title": "Balance: rows in = kept + dropped", "columns": columns, "rows": rows}

    def to_json(self) -> dict[str, Any]:
        def plain(value: Any) -> Any:
            return dict(sorted(value.items())) if isinstance(value, Counter) else value

        return {"sources": [{key: plain(value) for key, value in vars(source).items()} for source in self.sources]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Balance":
        counters = ("lines_dropped", "dropped", "tokens_dropped")

        def sheet(counts: dict[str, Any]) -> SourceBalance:
            values: dict[str, Any] = {k: Counter(item) if k in counters else item for k, item in counts.items()}
            return SourceBalance(**values)

        return cls(map(sheet, value["sources"]))
