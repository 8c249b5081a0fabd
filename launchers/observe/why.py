"""Answers `afterok why`: gathers what is known of each element that is not sealed, and has it diagnosed."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from data_tools.base.indices import Indices
from data_tools.base.printing import count_of
from data_tools.mistake import UserMistake
from jobs.artifacts.layout import indices_of_logs, log_name
from jobs.artifacts.run_folder import FrozenPhase, Outcome, RunFolder
from jobs.retry import Cause
from jobs.schema.pipeline import NEED_SEALS
from launchers.causes.diagnosis import classify
from launchers.causes.evidence import Diagnosis, Evidence
from launchers.causes.log_lines import ENVIRONMENT_LINE
from launchers.causes.states import ACTIVE_STATES, LOST_NODE_STATES, RUNNING
from launchers.causes.traces import log_tail, requested
from launchers.observe.look import Element, Look, look_at
from launchers.observe.sealed import no_phase
from launchers.planning.ledger import Ledger
from slurm.client import Slurm, SlurmError
from slurm.printed import SHOWN_RANGES, AccountingRow, format_indices
from slurm.profile.check import contact_note
from slurm.profile.files import load

MAX_ASKED = 8  # elements of a phase whose end is asked of scontrol one by one; the rest are judged by their logs
SAMPLED = 200  # logs that are read of elements that nothing else tells apart
ASK_THE_SITE = (Cause.NEVER_STARTS, Cause.NODE, Cause.ENVIRONMENT)  # what a profile's contact has to hear of


@dataclass
class Finding:
    """One diagnosis, and the elements of a phase that it holds for."""

    phase: str
    elements: Indices
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
            "elements": list(self.elements),
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
        done = f"{self.sealed} of {count_of(self.phases, 'phase')} {'are' if self.phases != 1 else 'is'} sealed"
        if self.not_submitted:
            done += f", {', '.join(self.not_submitted)} not submitted"
        if not self.healthy:
            return f"{self.run}: {done}"
        if self.sealed == self.phases:
            all_ = f"all {self.phases} phases are" if self.phases != 1 else "its one phase is"
            return f"{self.run}: nothing is wrong: {all_} sealed"
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
        raise no_phase(run, phase, list(look.phases))
    named = [frozen for name, frozen in look.phases.items() if phase in (None, name)]
    chosen = [frozen for frozen in named if look.whole_seal(frozen) or not look.not_needed(frozen)]
    unsealed = [frozen for frozen in chosen if look.whole_seal(frozen) is None]
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
    examination = Examination(look, phase, cancels)
    for element in look.open_elements(phase):
        examination.examine(element)
    findings = examination.findings()
    if not findings and look.whole_seal(phase) is None and look.elements(phase):
        diagnosis = _diagnose_fan_in(phase, look.last_words(phase))
        return [Finding(phase.name, Indices(), job="", diagnosis=diagnosis, log="")]
    return findings


def _diagnose_fan_in(phase: FrozenPhase, outcomes: Iterable[Outcome]) -> Diagnosis:
    """Say why a phase is not sealed whose elements all are.

    The fan-in ran in one of the elements' tasks; its complaint stands in that one's name.
    """
    complaints = [outcome for outcome in outcomes if outcome.state != "sealed"]
    if not complaints:
        what = "has all its elements sealed, but their fan-in is not"
        return Diagnosis(Cause.LOST, what, "no seal.json", "submit again")
    last = max(complaints, key=lambda outcome: (outcome.attempt, outcome.restart))
    return classify(Evidence(phase.name, exit_code=last.exit_code, outcome=last))


@dataclass
class Alike:
    """Elements that cannot be told apart without their logs."""

    findings: Counter[tuple] = field(default_factory=Counter)  # where those belong that were looked at one by one
    rest: list[Indices] = field(default_factory=list)  # those that were not


class Examination:
    """Finds what is wrong with the elements of one phase. What they share is looked up once, and logs are sampled."""

    def __init__(self, look: Look, phase: FrozenPhase, cancels: dict[str, float]):
        self.look, self.phase, self.cancels = look, phase, cancels
        self.groups: dict[tuple, Finding] = {}
        self.alike: defaultdict[tuple, Alike] = defaultdict(Alike)
        self.asked = 0  # of scontrol
        self._options: dict[int, dict[str, str]] = {}  # of the script of a submission
        folder = look.run.logs_folder(phase.name)
        self._has_log_folder = folder.is_dir()
        self._logs = indices_of_logs(os.listdir(folder)) if self._has_log_folder else {}
        self._found: defaultdict[tuple, list[Indices]] = defaultdict(list)  # of groups: their elements

    @cached_property
    def upstream(self) -> tuple[str, ...]:
        return _unsealed_needs(self.look, self.phase)

    def examine(self, element: Element) -> None:
        """Diagnose one element, or several of which the same is known; or count them among those like others."""
        logged = self._logged(element) if element.state().state != RUNNING else Indices()
        for indices in (logged, element.indices - logged):
            if indices:
                self._examine(element.only(indices), has_log=indices is logged)

    def _examine(self, element: Element, has_log: bool) -> None:
        state, outcome, row = element.state(), element.outcome, element.accounting
        may_ask = element.entry.job in self.look.slurms and state.state not in ACTIVE_STATES
        message = _without_numbers(outcome.message) if outcome else ""
        ended = (outcome.state, outcome.exit_code, message, outcome.cause, outcome.node) if outcome else None
        said = (row.state, row.exit_code, row.exit_signal, row.nodelist) if row else None
        looks = (element.entry.job, state.state, state.reason, state.exit_code, ended, said, has_log)
        alike = self.alike[looks]
        sampled = SAMPLED if has_log or may_ask else 1
        left = element.indices
        while left and alike.findings.total() < sampled:
            own, left = left.apart(1 if has_log or may_ask else len(left))
            self._diagnose(element.only(own), has_log, alike)
        if left:
            alike.rest.append(left)

    def _diagnose(self, element: Element, has_log: bool, alike: Alike) -> None:
        """Put an element into the group of those that ended as it did."""
        evidence = self.gather(element, has_log)
        diagnosis = classify(evidence)
        # Elements alike share a sentence: same cause and, but for numbers, the same words.
        key = (diagnosis.cause, _without_numbers(diagnosis.what + diagnosis.evidence), diagnosis.node)
        alike.findings[key] += 1
        if key not in self.groups:
            self.groups[key] = self._finding(diagnosis, element.entry.job, evidence.log_path)
        self._found[key].append(element.indices)

    def _finding(self, diagnosis: Diagnosis, job: str, log: str) -> Finding:
        is_array = self.phase.array is not None
        return Finding(self.phase.name, Indices(), job=job, diagnosis=diagnosis, log=log, is_array=is_array)

    def findings(self) -> list[Finding]:
        """Return a finding for each kind of trouble; each element is in one."""
        unread = 0
        for looks, alike in self.alike.items():
            if not alike.rest:
                continue
            unread += sum(map(len, alike.rest)) if looks[-1] else 0
            key = next(iter(alike.findings))
            if len(alike.findings) > 1:
                key = (*key, "not looked at", looks)
                self.groups[key] = self._of_rest(alike)
            self._found[key] += alike.rest
        for key, finding in self.groups.items():
            finding.elements = Indices.of_spans(span for indices in self._found[key] for span in indices.spans)
        if unread:
            self.look.notes.append(
                f"{self.phase.name}: of elements that look alike {SAMPLED} logs were read, {unread:,} others were not"
            )
        return list(self.groups.values())

    def _of_rest(self, alike: Alike) -> Finding:
        """Return a finding for elements like others that ended in several ways; which of those, their logs tell."""
        causes: Counter[Cause] = Counter()
        for key, count in alike.findings.items():
            causes[key[0]] += count
        told = ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
        like = self.groups[alike.findings.most_common(1)[0][0]]
        evidence = f"of {alike.findings.total()} that look alike: {told}; the logs of these were not read"
        remedy = f"see `afterok logs {self.look.run.path} {self.phase.name}:INDEX`"
        diagnosis = Diagnosis(causes.most_common(1)[0][0], "ended like others", evidence, remedy, certain=False)
        return self._finding(diagnosis, like.job, log="")

    def _logged(self, element: Element) -> Indices:
        """Return which elements have a log, of their own or of the task that they share, by the listing of all."""
        entry = element.entry
        logs = self._logs.get((entry.scripted, False), Indices())
        if shared := self._logs.get((entry.scripted, True)):
            logs = logs | Indices.of_spans((first * entry.batch, end * entry.batch) for first, end in shared.spans)
        return element.indices & logs

    def gather(self, element: Element, has_log: bool) -> Evidence:
        """Collect what is known of one element: files, and scontrol where they and accounting do not tell its end."""
        look, phase, entry, state = self.look, self.phase, element.entry, element.state()
        path = look.run.log_path(phase.name, entry.scripted, element.index)
        slurm = look.slurms.get(entry.job)
        outcome = (
            element.outcome if element.outcome is None or not element.outcome.cause else None
        )  # its own words only
        row, down_nodes = element.accounting, tuple[str, ...]()
        asked: dict[str, str] = {}
        if slurm is not None:
            asked = self._requested(entry.scripted)
            ended = state.state not in ACTIVE_STATES
            if self.asked < MAX_ASKED and ended and element.task is not None and outcome is None and row is None:
                row = _job_row(look, slurm, element)
                self.asked += row is not None
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
            log=log_tail(path, phase.name, element.index) + _shared_log(path, element) if has_log else "",
            log_path=str(path),
            log_folder_exists=self._has_log_folder,
            row=row,
            on_slurm=slurm is not None,
            upstream=self.upstream,
            cancelled_at=self.cancels.get(entry.job),
            asked_minutes=int(asked["time"]) if asked.get("time", "").isdigit() else None,
            asked_memory=asked.get("mem", ""),
            down_nodes=down_nodes,
        )

    def _requested(self, scripted: int) -> dict[str, str]:
        if scripted not in self._options:
            self._options[scripted] = requested(self.look.run.script_path(scripted, self.phase.name))
        return self._options[scripted]


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+", "#", text)


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


def _task(element: Element) -> str:
    """Return what names the log that Slurm writes of a task which several elements share."""
    return f"tasks{element.index // element.entry.batch}"


def _shared_log(path: Path, element: Element) -> str:
    """Return what Slurm says in the log of a shared task.

    What its sruns say there is left out: it may be of another element.
    """
    if element.entry.batch == 1:
        return ""
    return "".join(
        f"{line}\n"
        for line in log_tail(path.with_name(log_name(element.entry.scripted, _task(element))), "", -1).splitlines()
        if re.search(r"slurmstepd.*\*\*\* JOB ", line) or ENVIRONMENT_LINE.search(line)
    )
