"""Reads what the lives of an element leave in its run: leases, the end of its log, the options of its script.

A life is one start of one element: (element, attempt, restart). An attempt is the number of a submission.
"""

import contextlib
import os
import re
from pathlib import Path

from jobs.artifacts.layout import ArtifactLayout, read_lease_name
from jobs.artifacts.run_folder import FrozenPhase

TAIL_BYTES = 1 << 16  # of a log; a traceback of many ranks fits


def lease_times(artifact_folder: Path) -> dict[tuple[int, int, int], float]:
    """Return {(element, attempt, restart): when its lease was taken}, by the filesystem's clock (s since the epoch)."""
    times: dict[tuple[int, int, int], float] = {}
    for folder in ArtifactLayout(artifact_folder).lease_folders():
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                lease = read_lease_name(entry.name)
                if lease is not None and lease[0].isdigit():  # `finish` is no element
                    with contextlib.suppress(FileNotFoundError):  # what a sealed phase left is gathered
                        times[int(lease[0]), lease[1].attempt, lease[1].restart] = entry.stat().st_mtime
    return times


def lease_time(artifact: ArtifactLayout, element: int, attempt: int, restart: int) -> float | None:
    """Return when the newest lease of one life was taken, as `lease_times` does; None where there is none."""
    leases = {owner: path for owner, path in artifact.leases(element, attempt).items() if owner.restart == restart}
    with contextlib.suppress(FileNotFoundError):  # what a sealed phase left is gathered
        return leases[max(leases)].stat().st_mtime if leases else None
    return None


def keep_folder(folder: Path, phase: FrozenPhase, index: int) -> Path:
    """Return where an element keeps what survives attempts."""
    return ArtifactLayout(folder).keep_folder(index, phase.elements)


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
