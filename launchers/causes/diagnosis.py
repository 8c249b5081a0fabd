"""Says why one element of a phase is not sealed: evidence in, diagnosis out; nothing is read and nobody is asked.

The rules of `classify` are tried in order, the cause before its symptoms: a rank that was killed makes its peers report
a broken collective, and srun then kills those.
"""

from collections.abc import Callable
from dataclasses import replace

from jobs.retry import Cause
from launchers.causes import crashes, last_words, memory, slurm_ends, waiting
from launchers.causes.evidence import Diagnosis, Evidence, last_line

EVIDENCE_CHARACTERS = 240  # of a diagnosis: a line of a report


def classify(evidence: Evidence) -> Diagnosis:
    """Return what the first rule that applies says."""
    for rule in RULES:
        if (diagnosis := rule(evidence)) is not None:
            return replace(diagnosis, evidence=_shortened(diagnosis.evidence))
    return otherwise(evidence)


RULES: tuple[Callable[[Evidence], Diagnosis | None], ...] = (
    waiting.still_waits,
    waiting.never_ran,
    slurm_ends.time_limit,
    slurm_ends.preempted,
    slurm_ends.node_lost,
    slurm_ends.out_of_memory,
    slurm_ends.no_log_folder,
    slurm_ends.environment,
    last_words.said_by_worker,
    memory.gpu_memory,
    memory.host_memory_in_log,
    crashes.engine_died,
    crashes.exception,
    crashes.hung,
    crashes.killed,
    last_words.lease_held,  # after what the log shows: a twin started by hand may have been the first to leave a word
    crashes.collective,
    slurm_ends.driver_gone,
    slurm_ends.cancelled,
    last_words.stopped,
    slurm_ends.lost,
)


def otherwise(e: Evidence) -> Diagnosis:
    """Say what little is known where no rule applies."""
    code = "" if e.code is None else f" with exit code {e.code}"
    before = "before its worker spoke" if e.outcome is None and not e.log.strip() else ""
    return Diagnosis(
        Cause.UNKNOWN,
        f"ended{code} {before}".rstrip(),
        e.message or last_line(e) or f"{e.state} {e.reason}".strip(),
        f"see {e.log_name}",
        certain=False,
    )


def _shortened(line: str) -> str:
    """Return a line of evidence with single spaces, cut at EVIDENCE_CHARACTERS."""
    line = " ".join(line.split())
    return line if len(line) <= EVIDENCE_CHARACTERS else line[: EVIDENCE_CHARACTERS - 1] + "…"
