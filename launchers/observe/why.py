"""Answers `afterok why`: gathers what is known of each element that is not sealed, and has it diagnosed."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data_tools.mistake import UserMistake, nearest
from jobs.artifacts.run_folder import FrozenPhase, RunFolder
from jobs.retry import Cause
from jobs.schema.pipeline import NEED_SEALS
from launchers.causes.diagnosis import classify
from launchers.causes.evidence import Diagnosis, Evidence
from launchers.causes.log_lines import ENVIRONMENT_LINE
from launchers.causes.states import ACTIVE_STATES, LOST_NODE_STATES
from launchers.causes.traces import log_tail, requested
from launchers.observe.look import Element, Look, look_at
from launchers.planning.ledger import JobEntry, Ledger
from slurm.client import Slurm, SlurmError
from slurm.printed import AccountingRow, format_indices
from slurm.profile.check import contact_note
from slurm.profile.files import load

MAX_ASKED = 8  # elements of a phase whose end is asked of scontrol one by one; the rest are judged by their logs
SHOWN_RANGES = 6  # of elements, in a sentence
ASK_THE_SITE = (Cause.NEVER_STARTS, Cause.NODE, Cause.ENVIRONMENT)  # what a profile's contact has to hear of


@dataclass
class Finding:
    """One diagnosis, and the elements of a phase that it holds for."""

    phase: str
    elements: list[int]
    job: str
    diagnosis: Diagnosis
    log: str
    is_array: bool = False

    @property
    def sentence(self) -> str:
        """Return the finding as one sentence: what, why, what shows it, and what to do."""
        d = self.diagnosis
        place = f"{self.phase}[{format_indices(self.elements, SHOWN_RANGES)}]" if self.is_array else self.phase
        return f"{place} {d.what} ({d.cause}): {d.evidence.rstrip('.')}. → {d.remedy}"

    def as_json(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "elements": self.elements,
            "job": self.job,
            "log": self.log,
            **asdict(self.diagnosis),
            "trouble": self.diagnosis.cause.is_trouble,
            "sentence": self.sentence,
        }


@dataclass
class Report:
    """What is wrong with a run, or with one of its phases."""

    run: str
    submission: int
    findings: list[Finding]
    sealed: int  # phases
    phases: int
    not_submitted: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    given_up: str = ""  # why the newest submission did not come to run

    @property
    def healthy(self) -> bool:
        """Return whether nothing is wrong: all is sealed, or waits and runs as it should."""
        return not self.given_up and not any(finding.diagnosis.cause.is_trouble for finding in self.findings)

    @property
    def headline(self) -> str:
        """Return one line about the whole: how much is sealed, and whether anything is wrong."""
        done = f"{self.sealed} of {self.phases} phases are sealed"
        if self.not_submitted:
            done += f", {', '.join(self.not_submitted)} not submitted"
        if not self.healthy:
            return f"{self.run}: {done}"
        if self.sealed == self.phases:
            return f"{self.run}: nothing is wrong: all {self.phases} phases are sealed"
        return f"{self.run}: nothing is wrong: {done}, the rest is under way"

    def as_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "submission": self.submission,
            "healthy": self.healthy,
            "headline": self.headline,
            "findings": [finding.as_json() for finding in self.findings],
            "given_up": self.given_up,
            "notes": self.notes,
        }


def why(run: RunFolder, phase: str | None = None) -> Report:
    """Say what is wrong with a run, or one of its phases; failures first, then what waits.

    Raises:
        UserMistake: no such phase, or its cluster cannot be asked.
    """
    return why_of(look_at(run), phase)


def why_of(look: Look, phase: str | None = None) -> Report:
    """Say what `why` says, as one look found the run."""
    run = look.run
    if phase is not None and phase not in look.phases:
        raise UserMistake(f"{run.path} has no phase {phase!r}{nearest(phase, list(look.phases))}")
    named = [frozen for name, frozen in look.phases.items() if phase in (None, name)]
    chosen = [frozen for frozen in named if run.seal(frozen.name, frozen.key) or not look.not_needed(frozen)]
    unsealed = [frozen for frozen in chosen if run.seal(frozen.name, frozen.key) is None]
    if look.unasked and unsealed:
        raise look.unasked[0]
    cancels = _cancel_times(run)
    findings = [finding for frozen in chosen for finding in _findings(look, frozen, cancels)]
    findings.sort(key=lambda f: (f.diagnosis.cause is Cause.WAITING, f.diagnosis.cause is Cause.UPSTREAM))
    _name_contact(findings, run, look.number)
    return Report(
        run=str(run.path),
        submission=look.number,
        findings=findings,
        sealed=len(chosen) - len(unsealed),
        phases=len(chosen),
        not_submitted=[frozen.name for frozen in unsealed if not look.elements(frozen)],
        notes=look.notes,
        given_up=Ledger(run.ledger).given_up() if unsealed else "",
    )


def _cancel_times(run: RunFolder) -> dict[str, float]:
    """Return {job: when afterok cancelled it, or an element of it}."""
    return {
        job.partition("_")[0]: event["time"]
        for event in Ledger(run.ledger).events()
        if event["event"] == "cancel"
        for job in event["jobs"]
    }


def _name_contact(findings: list[Finding], run: RunFolder, number: int) -> None:
    """Name the contact of the profile that submission `number` was made with where the site has to act."""
    try:
        contact = contact_note(load(str(run.profile_path(number))))
    except (UserMistake, OSError):  # nobody can be named
        return
    for finding in findings:
        if finding.diagnosis.cause in ASK_THE_SITE:
            finding.diagnosis = replace(finding.diagnosis, remedy=finding.diagnosis.remedy + contact)


def _findings(look: Look, phase: FrozenPhase, cancels: dict[str, float]) -> list[Finding]:
    """Return what is wrong with a phase's elements that are not sealed; elements alike share a finding."""
    groups: dict[tuple, Finding] = {}
    asked = 0
    for i, element in look.open_elements(phase).items():
        evidence = gather(look, phase, element, cancels, ask_slurm=asked < MAX_ASKED)
        asked += evidence.row is not None and element.accounting is None
        diagnosis = classify(evidence)
        # Elements alike share a sentence: same cause and, but for numbers, the same words.
        key = (diagnosis.cause, re.sub(r"\d+", "#", diagnosis.what + diagnosis.evidence), diagnosis.node)
        if key in groups:
            groups[key].elements.append(i)
        else:
            groups[key] = Finding(
                phase=phase.name,
                elements=[i],
                job=element.entry.job,
                diagnosis=diagnosis,
                log=evidence.log_path,
                is_array=phase.array is not None,
            )
    if not groups and look.run.seal(phase.name, phase.key) is None and look.elements(phase):
        diagnosis = _diagnose_fan_in(phase, look.elements(phase).values())
        return [Finding(phase.name, [], job="", diagnosis=diagnosis, log="")]
    return list(groups.values())


def _diagnose_fan_in(phase: FrozenPhase, elements: Iterable[Element]) -> Diagnosis:
    """Say why a phase is not sealed whose elements all are.

    The fan-in ran in one of the elements' tasks; its complaint stands in that one's name.
    """
    outcomes = [element.outcome for element in elements if element.outcome is not None]
    complaints = [outcome for outcome in outcomes if outcome.state != "sealed"]
    if not complaints:
        what = "has all its elements sealed, but their fan-in is not"
        return Diagnosis(Cause.LOST, what, "no seal.json", "submit again")
    last = max(complaints, key=lambda outcome: (outcome.attempt, outcome.restart))
    return classify(Evidence(phase.name, exit_code=last.exit_code, outcome=last))


def gather(
    look: Look, phase: FrozenPhase, element: Element, cancels: dict[str, float], ask_slurm: bool = True
) -> Evidence:
    """Collect what is known of one element: files, and scontrol where neither they nor accounting tell how it ended."""
    run, entry, state = look.run, element.entry, element.state()
    path = run.log_path(phase.name, entry.scripted, element.index)
    slurm = look.slurms.get(entry.job)
    outcome = element.outcome if element.outcome is None or not element.outcome.cause else None  # its own words only
    row, down_nodes = element.accounting, tuple[str, ...]()
    asked: dict[str, str] = {}
    if slurm is not None:
        asked = requested(run.script_path(entry.scripted, phase.name))
        ended = state.state not in ACTIVE_STATES
        if ask_slurm and ended and element.task is not None and outcome is None and row is None:
            row = _job_row(look, slurm, element)
        if state.state in LOST_NODE_STATES and row is not None and row.nodelist:
            down_nodes = _down_nodes(look, slurm, row.nodelist)
    return Evidence(
        phase=phase.name,
        index=element.index,
        job=entry.job,
        state=state.state,
        reason=state.reason,
        exit_code=state.exit_code,
        outcome=outcome,
        log=log_tail(path, phase.name, element.index) + _shared_log(path, entry, element.index),
        log_path=str(path),
        log_folder_exists=path.parent.is_dir(),
        row=row,
        on_slurm=slurm is not None,
        upstream=_unsealed_needs(look, phase),
        cancelled_at=cancels.get(entry.job),
        asked_minutes=int(asked["time"]) if asked.get("time", "").isdigit() else None,
        asked_memory=asked.get("mem", ""),
        down_nodes=down_nodes,
    )


def _job_row(look: Look, slurm: Slurm, element: Element) -> AccountingRow | None:
    """Ask scontrol how an element's job ended; the look notes where nobody answers."""
    entry = element.entry
    try:
        return slurm.job_row(f"{entry.job}_{element.index // entry.batch}" if entry.is_array else entry.job)
    except SlurmError as error:
        look.notes.append(f"scontrol was not asked about job {entry.job}: {error.message}")
        return None


def _down_nodes(look: Look, slurm: Slurm, nodelist: str) -> tuple[str, ...]:
    """Ask Slurm which of these nodes are down; the look notes where nobody answers."""
    try:
        return tuple(slurm.down_nodes(nodelist))
    except SlurmError as error:
        look.notes.append(f"Slurm was not asked which node is down: {error.message}")
        return ()


def _unsealed_needs(look: Look, phase: FrozenPhase) -> tuple[str, ...]:
    """Return the phases at the root of a chain of unsealed needs: what has to be cured first."""
    roots: dict[str, None] = {}
    for name, type_ in phase.needs.items():
        up = look.phases[name]
        if type_ in NEED_SEALS and look.run.seal(name, up.key) is None:
            roots |= dict.fromkeys(_unsealed_needs(look, up) or (name,))
    return tuple(roots)


def _shared_log(path: Path, entry: JobEntry, index: int) -> str:
    """Return what Slurm wrote of the whole task where elements share one.

    What their sruns say there is left out: it may be of another element.
    """
    if entry.batch == 1:
        return ""
    task = path.with_name(path.name.replace(f".{index}.out", f".tasks{index // entry.batch}.out"))
    return "".join(
        f"{line}\n"
        for line in log_tail(task, "", -1).splitlines()
        if re.search(r"slurmstepd.*\*\*\* JOB ", line) or ENVIRONMENT_LINE.search(line)
    )
