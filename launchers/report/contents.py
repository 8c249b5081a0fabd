"""Gathers all that the report of a run tells, from the owners of what a run has on disk."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from data_tools.base.durable import TornFile
from data_tools.base.printing import clean_log
from data_tools.evaluations.side_by_side import SideBySide
from data_tools.mistake import UserMistake
from data_tools.records.balance import Balance, SourceBalance
from jobs.artifacts.run_folder import FrozenPhase, RunFolder
from jobs.schema.references import substitute
from launchers.causes.states import COMPLETED
from launchers.causes.traces import log_tail
from launchers.observe.evaluated import KINDS
from launchers.observe.look import Look, look_at
from launchers.observe.sampled import SampledGroups, groups_of
from launchers.observe.scores import scores
from launchers.observe.status import PhaseStatus, RunStatus, status_of
from launchers.observe.why import Finding, why_of
from launchers.report.attempts import Attempt, attempts_of
from launchers.report.curves import Curves, curves_of
from launchers.report.graph import Graph, graph_of
from launchers.report.lineage import Link, lineage_of
from launchers.report.timeline import Timeline, timeline_of

Found = TypeVar("Found")
LOG_LINES = 30  # of a failed element


@dataclass(frozen=True)
class Failure:
    """What is wrong with some elements of a phase, and the end of the log of the first of them."""

    finding: Finding
    log: str


@dataclass
class Contents:
    """All that a report tells; the notes say what could not be read or was left out."""

    status: RunStatus
    pipeline: str
    kinds: dict[str, str]  # of phases
    settings: dict[str, dict[str, Any]]
    written: float  # seconds since the epoch
    attempts: dict[str, list[Attempt]]
    graph: Graph
    timeline: Timeline | None
    failures: list[Failure]
    curves: list[Curves]
    groups: list[SampledGroups]
    balances: dict[str, SourceBalance]
    scores: SideBySide | None
    lineage: list[Link]
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return the run's name, which is that of its folder."""
        return Path(self.status.run).name

    @property
    def state(self) -> str:
        """Return the state of the whole run in a word or two."""
        if self.status.finished:
            return "finished"
        if self.status.active:
            return "in progress"
        return "failed" if any(phase.failed for phase in self.status.phases) else "not finished"

    @property
    def phases(self) -> list[PhaseStatus]:
        """Return the phases in the order of the pipeline."""
        return self.status.phases


def contents_of(run: RunFolder) -> Contents:
    """Return what the report of a run tells now. UserMistake where nothing was submitted, or a file is damaged."""
    now, look = time.time(), look_at(run)
    status = status_of(look)
    attempts = attempts_of(look, now)
    notes = list(status.notes)
    curves = _each(look, curves_of)
    groups = _each(look, groups_of)
    found = Contents(
        status=status,
        pipeline=run.pipeline_name(look.number),
        kinds={name: phase.uses for name, phase in look.phases.items()},
        settings=_settings(look.phases),
        written=now,
        attempts=attempts,
        graph=graph_of({name: phase.needs for name, phase in look.phases.items()}),
        timeline=timeline_of(attempts),
        failures=_failures(look, notes),
        curves=curves,
        groups=groups,
        balances=_balances(status.phases, notes),
        scores=_scores(look, notes),
        lineage=lineage_of(run, look.phases),
        notes=notes,
    )
    notes += [note for each in curves for note in each.notes]
    notes += [note for each in groups for note in each.notes]
    found.notes = list(dict.fromkeys(notes))
    return found


def _settings(phases: Mapping[str, FrozenPhase]) -> dict[str, dict[str, Any]]:
    """Return the settings of each phase, with its references as the pipeline's file writes them."""
    written = {name: f"${{phases.{name}.out}}" for name in phases}
    return {name: substitute(phase.own_settings, written) for name, phase in phases.items()}


def _each(look: Look, read: Callable[[RunFolder, Any], Found | None]) -> list[Found]:
    """Return what a reader finds of each phase, without those that have nothing of it."""
    return [found for phase in look.phases.values() if (found := read(look.run, phase)) is not None]


def _failures(look: Look, notes: list[str]) -> list[Failure]:
    """Return what `afterok why` says, with the ends of logs."""
    try:
        report = why_of(look)
    except UserMistake as mistake:  # its cluster does not answer: the status says so, too
        notes.append(f"why phases failed is not told: {mistake.problems[0].message}")
        return []
    troubles = [finding for finding in report.findings if finding.diagnosis.cause.is_trouble]
    return [Failure(finding, _end_of_log(finding)) for finding in troubles]


def _end_of_log(finding: Finding) -> str:
    if not finding.log or not finding.elements:
        return ""
    text = clean_log(log_tail(Path(finding.log), finding.phase, finding.elements[0]))
    return "\n".join(text.splitlines()[-LOG_LINES:])


def _balances(phases: Sequence[PhaseStatus], notes: list[str]) -> dict[str, SourceBalance]:
    """Return {phase: what became of all rows that it read} of the sealed phases that keep a balance sheet."""
    found: dict[str, SourceBalance] = {}
    for phase in phases:
        if phase.state == COMPLETED:
            try:
                found[phase.phase] = Balance.read(Path(phase.folder)).total()
            except FileNotFoundError:
                continue
            except (TornFile, TypeError, KeyError):
                notes.append(f"{phase.phase}: its balance sheet is torn or altered, and is not shown")
    return found


def _scores(look: Look, notes: list[str]) -> SideBySide | None:
    """Return the evaluations side by side; None where there is none, or one cannot be read, which is noted."""
    evaluations = [phase for phase in look.phases.values() if phase.uses in KINDS]
    if not any(look.seal(phase) is not None for phase in evaluations):
        return None
    try:
        return scores(look.run)
    except UserMistake as mistake:
        notes.append(f"evaluations are not shown: {mistake.problems[0]}")
        return None
