"""How a life of an element ended, written down once, whatever the number of its ranks.

What all ranks hear from rank 0, it writes before it speaks: the end of the first rank ends the others, itself too. What
a rank meets by itself, it writes before it leaves, if none has: the others fail only then, for want of it. Where
thousands meet the same at the same moment, they look one after another.
"""

import random
import socket
import sys
import time
from dataclasses import dataclass

from data_tools.mistake import EXIT_MISTAKE, disk_problem
from jobs.artifacts.owner import Owner
from jobs.artifacts.run_folder import FrozenPhase, Outcome, RunFolder
from jobs.ranks import Rank
from jobs.retry import EXIT_LEASE_HELD, EXIT_NOT_NEEDED, EXIT_SEALED, EXIT_UNFINISHED

APART_S = 0.0005  # from one rank's look to the next one's: thousands are through long before they are killed
STATES = {
    EXIT_SEALED: "sealed",
    EXIT_MISTAKE: "mistake",
    EXIT_LEASE_HELD: "skipped",
    EXIT_NOT_NEEDED: "skipped",
    EXIT_UNFINISHED: "stopped",
}


@dataclass
class LastWord:
    """Writes the outcome of one life of an element, on any of its ranks."""

    run: RunFolder
    phase: FrozenPhase
    element: int
    owner: Owner
    rank: Rank
    started: float  # seconds since the epoch

    def say(self, code: int, message: str, reached: tuple[float | None, int | None] = (None, None)) -> None:
        """Write down an exit code and why; `reached` are steps done and in all, where the phase told.

        The first rank is believed. Where nothing can be written, the log and the exit code say it all the same.
        """
        outcome = Outcome(
            element=self.element,
            attempt=self.owner.attempt,
            restart=self.owner.restart,
            state=STATES.get(code, "failed"),
            exit_code=code,
            message=message,
            host=socket.gethostname(),
            job=self.owner.job,
            started=self.started,
            done=reached[0],
            total=reached[1],
            key=self.phase.key,
        )
        if self.rank.rank:
            time.sleep(random.uniform(0, APART_S * self.rank.world_size))
        try:
            self.run.record_outcome(self.phase.name, outcome)
        except OSError as error:
            print(f"afterok: outcome not recorded: {disk_problem(error) or error}", file=sys.stderr, flush=True)
