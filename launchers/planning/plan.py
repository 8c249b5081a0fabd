"""What a plan is: of each phase what becomes of it and why, which elements run, and with what resources.

reuse   the key is sealed in this run, upstream digests agree
run     never sealed here (or some elements are missing)
rerun   sealed before under other settings, inputs or upstream results; the reasons say which
skip    not sealed and not needed: it follows the failure of a phase that is sealed
"""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

from data_tools.mistake import Problem
from jobs.artifacts import standing
from jobs.artifacts.run_folder import FrozenPhase, RunFolder
from jobs.schema.pipeline import Pipeline
from launchers.planning.hours import GpuHours, gpu_hours, total
from slurm.checks import finding
from slurm.detect import Cluster
from slurm.profile.check import forwarding_notes
from slurm.profile.schema import Resources

RUNS = ("run", "rerun")  # actions of a phase that gets a job


@dataclass
class PlannedPhase:
    """One phase of a plan: as its job would run it, and what becomes of it."""

    frozen: FrozenPhase
    resources: Resources
    role: str
    action: str  # reuse, run, rerun, skip
    reasons: list[str] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)  # elements to run
    anew: list[int] = field(default_factory=list)  # of those, the ones that may be sealed with other results
    code_changed: list[str] = field(default_factory=list)  # files, of a phase that is reused all the same
    survey: standing.Survey = field(default_factory=standing.Survey)  # what of it stands
    conditional: bool = False  # may turn out not to be needed, and its job has to go then
    last: bool = True  # no other phase needs it
    planned_s: float | None = None  # seconds that one element will take, where that is known
    planned_by: str = ""  # how that is known

    @property
    def name(self) -> str:
        """The phase's name."""
        return self.frozen.name

    @property
    def gpu_hours(self) -> GpuHours:
        """What its jobs would use; nothing where it does not run."""
        missing = self.missing if self.action in RUNS else []
        return gpu_hours(self.frozen, self.resources, missing, self.planned_s)


@dataclass
class Plan:
    """What would run of a pipeline in a run folder on a cluster, and what is reused."""

    pipeline: Pipeline
    run: RunFolder
    cluster: Cluster
    phases: list[PlannedPhase]
    verified: bool = False  # whether every sealed file was hashed
    again: str = ""  # a phase that runs anew though it is sealed
    told: list[Problem] = field(default_factory=list)  # findings that refuse nothing
    waived: list[Problem] = field(default_factory=list)  # findings that would refuse it, and were waived
    not_asked: list[str] = field(default_factory=list)  # what could not be checked, and why
    budget: float | None = None  # GPU-hours
    remarks: list[str] = field(default_factory=list)  # what phases say of themselves beside what they run

    @property
    def to_run(self) -> list[PlannedPhase]:
        """The phases that get a job."""
        return [phase for phase in self.phases if phase.action in RUNS]

    @property
    def gpu_hours(self) -> GpuHours:
        """What all phases would use."""
        return total([phase.gpu_hours for phase in self.to_run])

    @property
    def notes(self) -> list[str]:
        """What of the submitter's environment sets a value; what leaves it: names, and a warning for what is called a
        secret there; findings that refuse nothing, or were waived; what was not asked; what phases say of themselves.
        """
        variables = [str(variable) for variable in self.pipeline.variables]
        waived = [f"waived: {problem}" for problem in self.waived]
        unknown = [f"not asked: {line}" for line in self.not_asked]
        forwarded = forwarding_notes(self.cluster.profile, os.environ)
        return [*variables, *forwarded, *map(str, self.told), *waived, *unknown, *self.remarks]

    def as_json(self) -> dict[str, Any]:
        """Return what `afterok plan --json` prints."""
        return {
            "notes": self.notes,
            "variables": {variable.name: variable.override for variable in self.pipeline.variables},
            "pipeline": self.pipeline.name,
            "run": str(self.run.path),
            "cluster": self.cluster.name,
            "profile": self.cluster.as_json(),
            "findings": [
                finding(problem) | {"waived": problem in self.waived} for problem in (*self.told, *self.waived)
            ],
            "not_asked": self.not_asked,
            "gpu_hours": vars(self.gpu_hours),
            "phases": [
                {
                    "phase": p.name,
                    "uses": p.frozen.uses,
                    "key": p.frozen.key,
                    "action": p.action,
                    "reasons": p.reasons,
                    "elements": p.frozen.elements,
                    "missing": p.missing,
                    "links": p.frozen.links,
                    "gpu_hours": vars(p.gpu_hours),
                    "planned_seconds": p.planned_s,
                    "role": p.role,
                    "resources": dataclasses.asdict(p.resources),
                    "code_changed": p.code_changed,
                }
                for p in self.phases
            ],
        }
