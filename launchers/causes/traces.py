"""What the lives of an element leave in the files of its run: leases, the end of its log, the options of its script.

A life is one start of one element: (element, attempt, restart). An attempt is the number of a submission.
"""

import os
import re
from pathlib import Path

from jobs.artifacts.run_folder import FrozenPhase

TAIL_BYTES = 1 << 16  # of a log; a traceback of many ranks fits
LEASE_NAME = re.compile(r"(\d+)\.a(\d+)\.r(\d+)\.g(\d+)")


def lease_times(artifact_folder: Path) -> dict[tuple[int, int, int], float]:
    """Return {(element, attempt, restart): when its lease was taken}, by the filesystem's clock (s since the epoch)."""
    times: dict[tuple[int, int, int], float] = {}
    try:
        with os.scandir(artifact_folder / "leases") as entries:
            for entry in entries:
                if match := LEASE_NAME.fullmatch(entry.name):
                    element, attempt, restart, _ = map(int, match.groups())
                    times[element, attempt, restart] = entry.stat().st_mtime
    except FileNotFoundError:
        pass
    return times


def keep_folder(folder: Path, phase: FrozenPhase, index: int) -> Path:
    """Return where an element keeps what survives attempts."""
    return folder if phase.elements == 1 else folder / "elements" / f"{index:04d}"


def log_tail(path: Path, phase: str, index: int) -> str:
    """Return the end of an element's log, of its newest life only; "" where there is none.

    Jobs that are requeued append to one file, and each worker says hello first.
    """
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    hello = f"{phase}[{index}] attempt "
    return text[text.rindex(hello) :] if hello in text else text


def requested(script: Path) -> dict[str, str]:
    """Return the #SBATCH options of a phase's script, {"time": "240", "mem": "8192M", …}; {} where it is gone."""
    try:
        text = script.read_text()
    except OSError:
        return {}
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.MULTILINE))
