"""What a phase's `run` and `finish` are handed: one element, one rank, and the folders it may write."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.progress import Stop, never, stopping

PROGRESS_LINE_S = 5.0  # at most one log line in so many seconds
PROGRESS_FILE_S = 0.5


@dataclass
class Task:
    """One element of a phase on one rank.

    `out` is this attempt's own empty folder (the artifact); `keep` survives attempts (checkpoints/, metrics.jsonl,
    tables/). Only rank 0 writes into either, unless ranks write a sharded checkpoint together.
    """

    phase: str
    index: int
    count: int
    value: Any
    out: Path
    keep: Path
    rank: int
    world_size: int
    stop: Stop = never
    """True once the element should end early. A phase that can go on later asks it often, on every rank, makes what it
    did durable in `keep` and raises data_tools.progress.Stopped, on all ranks. Who never asks dies of SIGTERM."""
    partners: tuple[str, ...] = ()  # of the phases followed element by element (aftercorr), this element's folders
    lineage: Callable[[], list[dict[str, Any]]] = (
        list  # of the phases that this one's inputs were made by, the first first
    )
    reached: tuple[int | None, int | None] = (None, None)  # the last progress that was told: done, total

    @property
    def shared_keep(self) -> Path:
        """What all elements of the phase may share, and what its `finish` gets as `keep`; for an element's `run`."""
        return self.keep.parent.parent if self.count > 1 else self.keep

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Tell progress: a plain line in the log every few seconds, and a small file that `run` and `status` show."""
        self.reached = (done, total)
        if self.rank != 0:
            return
        now = time.monotonic()
        state = self.__dict__.setdefault("_progress", {"first": (now, done), "line": 0.0, "file": 0.0})
        finished = done >= total
        if finished or now - state["file"] >= PROGRESS_FILE_S:
            state["file"] = now
            self._write_progress({"done": done, "total": total, "unit": unit, "note": note})
        if finished or now - state["line"] >= PROGRESS_LINE_S:
            state["line"] = now
            began, first = state["first"]
            rate = (done - first) / (now - began) if now > began and done > first else 0.0
            left = f", {(total - done) / rate:.0f} s left" if rate and not finished else ""
            speed = f"  {rate:.3g} {unit}/s{left}" if rate else ""
            print(f"{self.phase}: {done:,}/{total:,} {unit}{speed}  {note}".rstrip(), flush=True)

    def progress_or_stop(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Tell `progress` of work that lies in `out` alone: one rank may leave it at any of these calls, to begin anew.

        Raises Stopped when asked to stop. Several ranks would have to agree first, so they go on.
        """
        told = stopping(self.progress, self.stop) if self.world_size == 1 else self.progress
        told(done, total, unit, note)

    def _write_progress(self, value: dict[str, Any]) -> None:
        path = progress_path(self.keep, self.index)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(value))  # for eyes only: lost in a power cut, never believed
            os.replace(temporary, path)
        except OSError as error:
            print(f"progress not shown: {error}", file=sys.stderr)


def progress_path(keep: Path, index: int) -> Path:
    """Return where an element's progress stands, in what it keeps."""
    return keep / "progress" / f"{index:04d}.json"


def forget_progress(keep: Path, index: int) -> None:
    """Take away what a sealed element told of its progress, and the folder that it kept, if there is no more in it."""
    progress = progress_path(keep, index)
    with contextlib.suppress(OSError):  # not empty; or a late twin looks in
        progress.unlink(missing_ok=True)
        progress.parent.rmdir()
        keep.rmdir()
