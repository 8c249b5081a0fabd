"""What a phase of a rehearsal runs in place of its own work: a sleep of its planned time, scaled.

All else is as ever: the job, its size, its dependencies, the lease, checkpoints, stops, restarts, the merging of
elements, the seal. One process a node sleeps for all its ranks, so that many nodes fit on a small machine. The seal
says that it is a rehearsal's, and its key is another than the real phase's.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.progress import Stopped
from jobs.kind import PhaseKind
from jobs.task import Task

STEPS = 1000  # of a sleep, whatever its length
CHECKPOINTS = 20
NAP_S = 0.1  # between two looks at whether to stop
KEPT = "rehearsed.json"


@dataclass
class Config:
    """How long an element sleeps, and whether its phase can stop on the way and go on later."""

    seconds: float = 0.0
    stops: bool = False


def rehearsed_kind() -> PhaseKind:
    """Return this module as the kind of a phase that is rehearsed."""
    return PhaseKind("rehearsal", sys.modules[__name__])


def run(config: Config, task: Task) -> dict[str, Any]:
    """Sleep; what was slept by the last checkpoint counts after a restart, where the phase could go on too."""
    kept = task.keep / KEPT
    done = durable.read_json(kept)["done"] if config.stops and kept.exists() else 0
    resumed, began = done, time.monotonic()
    saved = done
    while done < STEPS:
        left_s = (STEPS - resumed) / STEPS * config.seconds - (time.monotonic() - began)
        time.sleep(max(0.0, min(NAP_S, left_s)))
        slept_s = time.monotonic() - began
        done = min(STEPS, resumed + int(slept_s / config.seconds * STEPS)) if config.seconds else STEPS
        task.progress(done, STEPS, "steps", "a rehearsal")
        stop = config.stops and task.stop()
        if task.rank == 0 and config.stops and (stop or done - saved >= STEPS // CHECKPOINTS):
            durable.write_json(kept, {"done": done})
            saved = done
        if stop and done < STEPS:
            raise Stopped(done, STEPS)
    on = f", resumed at {resumed:,} of {STEPS:,}" if resumed else ""
    return {"headline": f"a rehearsal: {config.seconds:.1f} s of sleep{on}", "seconds": config.seconds}


def finish(parts: list[Path], config: Config, task: Task) -> dict[str, Any]:
    """Merge nothing."""
    return {"headline": f"a rehearsal: {len(parts)} elements", "seconds": config.seconds}
