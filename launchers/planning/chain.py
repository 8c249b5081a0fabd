"""A phase as a chain of links, where its Slurm job may not be requeued: how many links, and which of them are left.

A link is one task of an array throttled to one at a time; each goes on from the checkpoint of the one before, and
dependents wait on the last. The number comes from the measured time of a step. It is corrected as links end: a link
takes surplus ones out of the middle of the chain (launchers/backends/restart.py), and `afterok submit` appends what is
missing.
"""

import math
from collections.abc import Sequence

from jobs.artifacts.run_folder import FrozenPhase, Outcome

FIRST_LINKS = 4  # where no step was measured yet; the first link to end corrects it
SPARE_LINKS = 2  # for preemptions and lost nodes, which no step time foretells
MOST_LINKS = 100


def links_needed(phase: FrozenPhase, outcomes: Sequence[Outcome], link_s: float) -> int:
    """Return the links that finish the phase, spare ones included; a link is asked to stop after `link_s` seconds.

    `outcomes` are of all attempts at the phase in this run, oldest first; other settings count for the step time too.
    """
    told = [outcome for outcome in outcomes if outcome.total]
    step_s = seconds_a_step(told)
    if step_s is None:
        return FIRST_LINKS
    own = [outcome for outcome in told if outcome.key == phase.key]
    done = max((outcome.done or 0 for outcome in own), default=0)
    left_s = (((own or told)[-1].total or 0) - done) * step_s
    return min(max(1, math.ceil(left_s / max(link_s, 1.0))) + SPARE_LINKS, MOST_LINKS)


def seconds_a_step(outcomes: Sequence[Outcome]) -> float | None:
    """Return the seconds of a step that lasts, with its share of loading and saving; None where nobody told any."""
    steps, seconds, reached = 0.0, 0.0, dict[str, float]()
    for outcome in outcomes:
        done = outcome.done or 0
        made = done - reached.get(outcome.key, 0)
        if made > 0:
            steps, seconds = steps + made, seconds + outcome.ended - outcome.started
            reached[outcome.key] = done
    return max(seconds, 0.0) / steps if steps else None


def last_link(job: str, links: int) -> str:
    """Return what dependents of a job wait on: its last link where it is a chain ("12_7"), else all of it."""
    return f"{job}_{links - 1}" if links else job


def surplus(link: int, last: int, needed: int) -> list[int]:
    """Return the links after `link` that are not needed. The last is not among them: dependents wait on it."""
    return list(range(link + 1, max(link + 1, last + 1 - needed)))
