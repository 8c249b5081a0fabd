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

from jobs.artifacts import standing
from jobs.artifacts.run_folder import FrozenPhase, RunFolder
from jobs.schema.pipeline import Pipeline
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

    @property
    def name(self) -> str:
        """The phase's name."""
        return self.frozen.name


@dataclass
class Plan:
    """What would run of a pipeline in a run folder on a cluster, and what is reused."""

    pipeline: Pipeline
    run: RunFolder
    cluster: Cluster
    phases: list[PlannedPhase]
    verified: bool = False  # whether every sealed file was hashed
    again: str = ""  # a phase that runs anew though it is sealed
    missing: list[str] = field(default_factory=list)  # datasets that are not on this machine, each with its command
    remarks: list[str] = field(default_factory=list)  # what phases say of themselves beside what they run

    @property
    def to_run(self) -> list[PlannedPhase]:
        """The phases that get a job."""
        return [phase for phase in self.phases if phase.action in RUNS]

    @property
    def notes(self) -> list[str]:
        """What of the submitter's environment sets a value; what leaves it: names, and a warning for what is called a
        secret there; which datasets are not on this machine; and what phases say of themselves."""
        variables = [str(variable) for variable in self.pipeline.variables]
        return [*variables, *forwarding_notes(self.cluster.profile, os.environ), *self.missing, *self.remarks]

    def as_json(self) -> dict[str, Any]:
        """Return what `afterok plan --json` prints."""
        return {
            "notes": self.notes,
            "variables": {variable.name: variable.override for variable in self.pipeline.variables},
            "pipeline": self.pipeline.name,
            "run": str(self.run.path),
            "cluster": self.cluster.name,
            "profile": self.cluster.as_json(),
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
                    "role": p.role,
                    "resources": dataclasses.asdict(p.resources),
                    "code_changed": p.code_changed,
                }
                for p in self.phases
            ],
        }
