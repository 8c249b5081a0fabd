"""A table that tests fill and pytest prints at its end."""


class Table:
    def __init__(self, title: str):
        self.title = title
        self.cells: dict[str, dict[str, str]] = {}  # row -> column -> text
        self.notes: list[str] = []

    def add(self, row: str, column: str, text: str) -> None:
        self.cells.setdefault(row, {})[column] = text

    def note(self, text: str) -> str:
        """The mark of a note below the table, one for each text."""
        if text not in self.notes:
            self.notes.append(text)
        return f"[{self.notes.index(text) + 1}]"

    def lines(self) -> list[str]:
        """Empty where no test filled it."""
        if not self.cells:
            return []
        columns = list(dict.fromkeys(column for row in self.cells.values() for column in row))
        rows = [["", *columns], *([row, *(of.get(c, "") for c in columns)] for row, of in self.cells.items())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns) + 1)]
        notes = [f"[{number}] {text}" for number, text in enumerate(self.notes, 1)]
        return ["", self.title, *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows), *notes]
