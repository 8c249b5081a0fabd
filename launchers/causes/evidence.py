"""Defines what goes into a rule and what comes out: evidence about an element that is not sealed, and a diagnosis."""

import re
from dataclasses import dataclass

from jobs.artifacts.run_folder import Outcome
from jobs.retry import SIGNAL_BASE, Cause
from launchers.causes.log_lines import NODE_NAMES
from launchers.causes.states import FAILED
from slurm.printed import AccountingRow

SIGNAL_NO_OUTPUT = 53  # Slurm's "signal" of a batch script whose output file it could not open
LAUNCHER_NOISE = re.compile(r"srun: (Job step aborted|got SIG|forcing|Force Terminated|Terminating)")


@dataclass(frozen=True)
class Evidence:
    """All that is known of one element that is not sealed; a rule reads nothing else."""

    phase: str
    index: int = 0
    job: str = ""
    state: str = FAILED  # Slurm's word, or UNKNOWN
    reason: str = ""
    exit_code: int | None = None
    outcome: Outcome | None = None
    log: str = ""  # the end of its log, of its newest life
    log_path: str = ""
    log_folder_exists: bool = True
    row: AccountingRow | None = None  # from sacct, or scontrol where there is no slurmdbd
    on_slurm: bool = True
    upstream: tuple[str, ...] = ()  # phases it needs that are not sealed and not under way
    cancelled_at: float | None = None  # by afterok
    asked_minutes: int | None = None
    asked_memory: str = ""
    down_nodes: tuple[str, ...] = ()  # of its nodes, those that Slurm calls down

    @property
    def said(self) -> str:
        """Return its state and reason as a sentence of who told them."""
        if not self.on_slurm:
            return f"{self.state} {self.reason}".strip()
        return f"Slurm says {self.state}" + (f", reason {self.reason}" if self.reason else "")

    @property
    def message(self) -> str:
        """Return the worker's last word; "" where it left none."""
        return self.outcome.message if self.outcome is not None else ""

    @property
    def code(self) -> int | None:
        """Return the exit code of its worker, else of its job; None where neither is known."""
        if self.outcome is not None:
            return self.outcome.exit_code
        return self.exit_code if self.exit_code is not None else exit_code_of(self.row) if self.row else None

    @property
    def log_name(self) -> str:
        """Return where a person finds its log."""
        return self.log_path or "its log"

    def lines(self) -> list[str]:
        """Return the lines of the end of its log."""
        return self.log.splitlines()

    def find(self, pattern: re.Pattern[str]) -> str:
        """Return the worker's last words where they match, else the first line of the log that does, else ""."""
        if pattern.search(self.message):
            return self.message
        return next((line.strip() for line in self.lines() if pattern.search(line)), "")


def exit_code_of(row: AccountingRow) -> int:
    """Return a shell's view of Slurm's "code:signal": 128 and the signal where only that is known."""
    return SIGNAL_BASE + row.exit_signal if row.exit_signal and not row.exit_code else row.exit_code


def guilty_node(e: Evidence) -> str:
    """Return the node that srun names, else the only one of the job's nodes that Slurm calls down, else ""."""
    for line in e.lines():
        match = NODE_NAMES.search(line)
        if match and "," not in (name := (match[1] or match[2])):
            return name.rstrip(":.")
    return e.down_nodes[0] if len(e.down_nodes) == 1 else ""


def last_line(e: Evidence) -> str:
    """Return the last line of its log that is not srun's own about the end; "" where there is none."""
    lines = (line.strip() for line in reversed(e.lines()))
    return next((line for line in lines if line and not LAUNCHER_NOISE.search(line)), "")


@dataclass(frozen=True)
class Diagnosis:
    """Why an element is not sealed, what shows it, and what to do."""

    cause: Cause
    what: str  # continues "sft[3] …"
    evidence: str
    remedy: str
    node: str = ""  # the one guilty node, where Slurm or the log names it
    certain: bool = True  # False: the likeliest reading of evidence that has others
