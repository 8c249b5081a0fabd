"""Prints the log of a phase's element, or follows it until the element ends."""

import codecs
import os
import time
from pathlib import Path

from data_tools.base.printing import clean_log
from data_tools.mistake import UserMistake
from jobs.artifacts.run_folder import RunFolder
from launchers.causes.states import NO_ANSWER
from launchers.observe.sealed import no_phase
from launchers.observe.status import run_status
from launchers.planning.ledger import Ledger

POLL_S = 0.3
READ_BYTES = 1 << 20
QUEUE_EVERY = 10  # polls of the file between two questions to the back end


def newest_log(run: RunFolder, phase: str, index: int | None) -> Path:
    """Return the newest attempt's log of an element (of the lowest that has one, where none is named).

    UserMistake where there is no such phase or no log.
    """
    entries = Ledger(run.ledger).jobs()
    phases = sorted({entry.phase for entry in entries})
    if phase not in phases:
        raise no_phase(run, phase, phases)
    for entry in reversed([entry for entry in entries if entry.phase == phase]):
        for i in [index] if index is not None else entry.elements:
            path = run.log_path(phase, entry.scripted, i)
            if path.exists():
                return path
    elements = {element for entry in entries if entry.phase == phase for element in entry.elements}
    if index is not None and index not in elements:
        has = f"{phase} has elements {min(elements)} to {max(elements)}, not {index}"
        raise UserMistake(f"{has}; see `afterok status {run.path}`")
    raise UserMistake(f"{phase}{'' if index is None else f':{index}'} has no log yet; see `afterok status {run.path}`")


def show_log(run: RunFolder, phase: str, index: int | None, follow: bool) -> None:
    """Print the log that `newest_log` finds; with `follow` wait for it, and go on until the phase ends."""
    path = newest_log(run, phase, index) if not follow else _wait_for_log(run, phase, index)
    with open(path, "rb") as file:
        polls = 0
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may come in two reads
        while True:
            data = file.read(READ_BYTES)
            if data:
                print(clean_log(decoder.decode(data)), end="", flush=True)
                continue
            if not follow:
                return
            polls += 1
            if (
                polls % QUEUE_EVERY == 0
                and not _is_active(run, phase)
                and os.fstat(file.fileno()).st_size == file.tell()
            ):
                return
            time.sleep(POLL_S)


def _wait_for_log(run: RunFolder, phase: str, index: int | None) -> Path:
    """Return what `newest_log` finds, as soon as it finds it. UserMistake where the phase ends without a log."""
    while True:
        try:
            return newest_log(run, phase, index)
        except UserMistake:
            if not _is_active(run, phase):
                raise
            time.sleep(POLL_S)


def _is_active(run: RunFolder, phase: str) -> bool:
    """Return whether a phase may still write to its log."""
    status = run_status(run)
    return any(p.phase == phase and (p.active or (p.state == NO_ANSWER and status.may_answer)) for p in status.phases)
