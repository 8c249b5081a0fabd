"""The journal of a submission, submissions/N/journal.json: all its steps, durable before the first call to the cluster.

A submitter that dies anywhere leaves held jobs, their dependents and this journal; `afterok repair` finishes what it
says, or takes it back. What was done of it stands in the ledger, a line a step.
"""

from dataclasses import dataclass, field
from typing import Any

from data_tools.base import durable
from jobs.artifacts.run_folder import RunFolder
from launchers.backends.contract import Backend
from launchers.submission.steps import Rewire, Step, Submit, step_of


@dataclass
class Journal:
    """The steps of a submission and the jobs of earlier ones that stay as they are."""

    steps: list[Step]
    live: dict[str, str]  # phase -> job, or several joined by ":" as Slurm's dependencies take them
    not_applied: list[str] = field(default_factory=list)  # what was asked for and reaches no job, a line each

    @property
    def submits(self) -> list[Submit]:
        """The steps that send a job, in the order in which they do."""
        return [step for step in self.steps if isinstance(step, Submit)]

    @property
    def rewired(self) -> list[str]:
        """The phase of each step that rewires a job."""
        return [step.phase for step in self.steps if isinstance(step, Rewire)]

    def write(self, run: RunFolder, number: int) -> None:
        """Write the journal of submission `number` durably."""
        steps = [step.record() for step in self.steps]
        told: dict[str, Any] = {"steps": steps, "live": self.live, "not_applied": self.not_applied}
        durable.write_checked(run.journal_path(number), told)

    @staticmethod
    def read(run: RunFolder, number: int) -> "Journal":
        """Return the journal of submission `number`.

        Raises:
            TornFile: the file is torn or altered, or no journal of this version of afterok.
        """
        path = run.journal_path(number)
        told = durable.read_checked(path)
        try:
            return Journal([step_of(record) for record in told["steps"]], told["live"])
        except (LookupError, TypeError, AttributeError, ValueError):
            raise durable.TornFile(f"{path} is no journal (edited, or of another version of afterok)") from None

    def shown(self, backend: Backend, number: int) -> list[str]:
        """Return the calls that the steps stand for, as one would type them; a job not yet sent reads <phase>."""
        if not self.steps:
            return []
        jobs, new, lines = dict(self.live), list[str](), list[str]()
        for step in self.steps:
            lines.append(step.shown(backend, number, jobs, new))
            if isinstance(step, Submit):
                new.append(step.phase)
                jobs[step.phase] = f"<{step.phase}>"
        return [*lines, f"scontrol release {' '.join(f'<{phase}>' for phase in new)}"]
