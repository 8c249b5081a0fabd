"""Recognizes ends that the worker itself told of: a user's mistake, no input, a stop when asked, a twin at work."""

from data_tools.mistake import EXIT_MISTAKE
from jobs.retry import EXIT_LEASE_HELD, EXIT_NO_INPUT, Cause
from launchers.causes.evidence import Diagnosis, Evidence


def said_by_worker(e: Evidence) -> Diagnosis | None:
    """Tell of a mistake that the worker found in its input, or of input that is not there."""
    if e.code == EXIT_MISTAKE and e.outcome is not None:
        return Diagnosis(
            Cause.MISTAKE, "was stopped by a mistake in its input", e.message, "correct it and submit again"
        )
    if e.code == EXIT_NO_INPUT and e.outcome is not None:
        return Diagnosis(
            Cause.NO_INPUT,
            "found no sealed input",
            e.message,
            f"seal {' and '.join(e.upstream) or 'what it needs'} first: `afterok submit` runs what is missing",
        )
    return None


def lease_held(e: Evidence) -> Diagnosis | None:
    """Tell of a twin that left the work to another."""
    if e.outcome is None or e.outcome.exit_code != EXIT_LEASE_HELD:
        return None
    return Diagnosis(
        Cause.LEASE_HELD,
        "left the work to another",
        e.message,
        "nothing if that one runs; if it is dead, submit again (a new attempt takes over)",
    )


def stopped(e: Evidence) -> Diagnosis | None:
    """Tell of a worker that stopped at a checkpoint when it was asked to."""
    if e.outcome is None or e.outcome.state != "stopped":
        return None
    return Diagnosis(
        Cause.STOPPED, "was asked to stop and did", e.message, "submit again: it goes on from its newest checkpoint"
    )
