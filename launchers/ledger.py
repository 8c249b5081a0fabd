"""The append-only record of what was submitted: one JSON object a line, fsynced, in RUN/ledger.jsonl.

    {"event": "submission", "submission": 2, "backend": "slurm", "cluster": "dev", "time": …}
    {"event": "job", "submission": 2, "phase": "sft", "job": "17", "elements": [0], "needs": {"pack": "16"}, …}
    {"event": "cancel", "jobs": ["17"], …}
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

from data_tools import durable


@dataclass(frozen=True)
class JobEntry:
    """One job that carries a phase (or some of its elements), as the ledger recorded it."""

    submission: int
    phase: str
    key: str
    job: str
    elements: list[int]
    is_array: bool


class Ledger:
    def __init__(self, path: Path):
        self.path = path

    def append(self, event: str, **fields: Any) -> None:
        durable.append_line(self.path, durable.canonical_json({"event": event, "time": time.time(), **fields}))

    def events(self) -> Iterator[dict[str, Any]]:
        """All events, oldest first; a torn last line (power cut in an append) is dropped."""
        try:
            lines = self.path.read_text().splitlines()
        except FileNotFoundError:
            return
        for number, line in enumerate(lines):
            try:
                yield json.loads(line)
            except ValueError:
                if number != len(lines) - 1:
                    raise

    def jobs(self) -> list[JobEntry]:
        return [JobEntry(e["submission"], e["phase"], e["key"], e["job"], e["elements"], e["is_array"])
                for e in self.events() if e["event"] == "job"]

    def backend(self, submission: int) -> dict[str, Any]:
        """The submission event: which back end and cluster it went to."""
        for event in self.events():
            if event["event"] == "submission" and event["submission"] == submission:
                return event
        return {}
