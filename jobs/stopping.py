"""The signals that ask a worker to stop, from its first moment on.

* SIGUSR2: the time limit comes near (sbatch --signal=USR2@N sends it to all tasks of a job's steps). Never deadly: a
  phase that does not ask `asked` runs on.
* SIGTERM: preemption, scancel, the time limit itself, `afterok cancel`. Deadly until the phase asks for the first
  time; from then on it is expected to stop by itself, and a second one changes nothing.

Between fork and the handlers both can be held back (`hold`): a held signal waits, also through exec and in children,
until `install` or `release`.
"""

import signal
from types import FrameType

HELD = (signal.SIGTERM, signal.SIGUSR2)


def hold() -> None:
    """Let stop signals wait, here and in processes started from now on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def release() -> None:
    """Deliver what waited."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


class StopSignals:
    """The stop signals that a process was sent. Python runs the handler in the main thread."""

    def __init__(self) -> None:
        self.received: set[int] = set()
        self.listens = False

    def install(self) -> None:
        """Note SIGUSR2 from now on, and deliver what a parent held back."""
        signal.signal(signal.SIGUSR2, self._note)
        release()

    def asked(self) -> bool:
        """Return whether to stop. Who asks takes over from SIGTERM, and so has to ask again soon. Main thread only."""
        if not self.listens:
            signal.signal(signal.SIGTERM, self._note)
            self.listens = True
        return bool(self.received)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received.add(number)


SIGNALS = StopSignals()  # this process's
