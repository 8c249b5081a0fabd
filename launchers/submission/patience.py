"""Asking a cluster that may fall silent: how long, how often, and what is said when the answer never comes."""

import time
from collections.abc import Callable
from typing import TypeVar

from data_tools.mistake import UserMistake
from launchers.backends.contract import OutcomeOpen

Answer = TypeVar("Answer")

LOOK_AGAIN_S = 1.0
OPEN_LIMIT_S = 90.0  # how long a controller that does not answer is asked about a job whose sbatch has an open outcome


class Unfinished(UserMistake):
    """The submission could not be finished now; nothing of it runs, and `afterok repair` goes on with it."""

    exit_code = 1


def patiently(call: Callable[[], Answer]) -> Answer:
    """Return what an idempotent call returns, asking again for OPEN_LIMIT_S seconds while the back end is silent.

    Raises:
        OutcomeOpen: it stayed silent.
    """
    end = time.monotonic() + OPEN_LIMIT_S
    while True:
        try:
            return call()
        except OutcomeOpen:
            if time.monotonic() > end:
                raise
            time.sleep(LOOK_AGAIN_S)
