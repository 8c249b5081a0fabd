"""`afterok why`: gathers what is known of each element that is not sealed, and has launchers/causes/diagnosis.py read it."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data_tools.mistake import UserMistake, nearest
from jobs.artifacts.run_folder import FrozenPhase, RunFolder
from jobs.retry import Cause
from jobs.schema.pipeline import NEED_SEALS
from launchers.backends.contract import ACTIVE_STATES
from launchers.causes.diagnosis import Diagnosis, classify
from launchers.causes.evidence import ENVIRONMENT_LINE, Evidence
from launchers.observe.status import Element, Look, look_at, open_elements, script_of
from launchers.planning.ledger import JobEntry, Ledger
from slurm.client import SlurmError
from slurm.printed import format_indices
from slurm.profile.check import contact_note
from slurm.profile.files import load

TAIL_BYTES = 1 << 16  # of a log; a traceback of many ranks fits
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
        return not self.given_up and not any(finding.diagnosis.cause.is_trouble for finding in self.findings)

    @property
    def headline(self) -> str:
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
    """What is wrong with a run, or one of its phases; failures first, then what waits.

    Raises:
        UserMistake: no such phase, or its cluster cannot be asked.
    """
    look = look_at(run)
    if phase is not None and phase not in look.phases:
        raise UserMistake(f"{run.path} has no phase {phase!r}{nearest(phase, list(look.phases))}")
    chosen = [
        found
        for name, found in look.phases.items()
        if phase in (None, name) and (run.seal(name, found.key) is not None or not look.not_needed(found))
    ]
    cancels = {
        job.partition("_")[0]: event["time"]
        for event in Ledger(run.ledger).events()
        if event["event"] == "cancel"
        for job in event["jobs"]
    }
    sealed = sum(run.seal(p.name, p.key) is not None for p in chosen)
    if look.unasked and sealed < len(chosen):
        raise look.unasked[0]
    findings: list[Finding] = []
    for found in chosen:
        findings += _findings(look, found, cancels)
    idle = [p.name for p in chosen if run.seal(p.name, p.key) is None and not look.of_phase(p)]
    findings.sort(key=lambda f: (f.diagnosis.cause is Cause.WAITING, f.diagnosis.cause is Cause.UPSTREAM))
    given_up = Ledger(run.ledger).given_up() if sealed < len(chosen) else ""
    if contact := _contact(run, look.number):
        for finding in findings:
            if finding.diagnosis.cause in ASK_THE_SITE:
                finding.diagnosis = replace(finding.diagnosis, remedy=finding.diagnosis.remedy + contact)
    return Report(str(run.path), look.number, findings, sealed, len(chosen), idle, look.notes, given_up)


def _contact(run: RunFolder, number: int) -> str:
    """What names the contact of the profile that a submission was made with; "" where nobody can be named."""
    try:
        return contact_note(load(str(run.submission_folder(number) / "profile.yaml")))
    except (UserMistake, OSError):
        return ""


def _findings(look: Look, phase: FrozenPhase, cancels: dict[str, float]) -> Iterator[Finding]:
    groups: dict[tuple, Finding] = {}
    asked = 0
    for i, element in open_elements(look, phase).items():
        evidence = gather(look, phase, element, cancels, ask_slurm=asked < MAX_ASKED)
        asked += evidence.row is not None and element.accounting is None
        diagnosis = classify(evidence)
        # Elements alike share a sentence: same cause and, but for numbers, the same words.
        key = (diagnosis.cause, re.sub(r"\d+", "#", diagnosis.what + diagnosis.evidence), diagnosis.node)
        if key in groups:
            groups[key].elements.append(i)
        else:
            groups[key] = Finding(
                phase.name, [i], element.entry.job, diagnosis, evidence.log_path, phase.array is not None
            )
    if not groups and look.run.seal(phase.name, phase.key) is None and look.of_phase(phase):
        # The fan-in ran in one of the elements' tasks; its complaint stands in that one's name.
        ends = [element.outcome for element in look.of_phase(phase).values() if element.outcome is not None]
        said = max((end for end in ends if end.state != "sealed"), key=lambda e: (e.attempt, e.restart), default=None)
        if said is not None:
            diagnosis = classify(Evidence(phase.name, exit_code=said.exit_code, outcome=said))
        else:
            what = "has all its elements sealed, but their fan-in is not"
            diagnosis = Diagnosis(Cause.LOST, what, "no seal.json", "submit again")
        groups[()] = Finding(phase.name, [], "", diagnosis, "")
    yield from groups.values()


def gather(
    look: Look, phase: FrozenPhase, element: Element, cancels: dict[str, float], ask_slurm: bool = True
) -> Evidence:
    """Collect what is known of one element: files, and scontrol where neither they nor accounting tell how it ended."""
    run, entry, state = look.run, element.entry, element.state()
    path = run.log_path(phase.name, script_of(entry), element.index)
    slurm = look.slurms.get(entry.job)
    outcome = element.outcome if element.outcome is None or not element.outcome.cause else None  # its own words only
    row, down = element.accounting, ()
    ended = state.state not in ACTIVE_STATES
    if slurm is not None and ask_slurm and ended and element.task is not None and outcome is None and row is None:
        try:
            row = slurm.job_row(f"{entry.job}_{element.index // entry.batch}" if entry.is_array else entry.job)
        except SlurmError as error:
            look.notes.append(f"scontrol was not asked about job {entry.job}: {error.message}")
    if slurm is not None and state.state in ("NODE_FAIL", "BOOT_FAIL") and row is not None and row.nodelist:
        try:
            down = tuple(slurm.down_nodes(row.nodelist))
        except SlurmError as error:
            look.notes.append(f"Slurm was not asked which node is down: {error.message}")
    asked = (
        requested(run.submission_folder(script_of(entry)) / "scripts" / f"{phase.name}.sh") if slurm is not None else {}
    )
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
        down_nodes=down,
    )


def _unsealed_needs(look: Look, phase: FrozenPhase) -> tuple[str, ...]:
    """The phases at the root of a chain of unsealed needs: what has to be cured first."""
    found: dict[str, None] = {}
    for name, type_ in phase.needs.items():
        up = look.phases[name]
        if type_ in NEED_SEALS and look.run.seal(name, up.key) is None:
            found |= dict.fromkeys(_unsealed_needs(look, up) or (name,))
    return tuple(found)


def requested(script: Path) -> dict[str, str]:
    """The #SBATCH options of a phase's script: {"time": "240", "mem": "8192M", …}."""
    try:
        text = script.read_text()
    except OSError:
        return {}
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.MULTILINE))


def log_tail(path: Path, phase: str, index: int) -> str:
    """The end of a log, of its newest life only: requeued jobs append to one file, and each worker says hello first."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    hello = f"{phase}[{index}] attempt "
    return text[text.rindex(hello) :] if hello in text else text


def _shared_log(path: Path, entry: JobEntry, index: int) -> str:
    """What Slurm wrote of the whole task where elements share one; what their sruns say there is each other's."""
    if entry.batch == 1:
        return ""
    task = path.with_name(path.name.replace(f".{index}.out", f".tasks{index // entry.batch}.out"))
    return "".join(
        f"{line}\n"
        for line in log_tail(task, "", -1).splitlines()
        if re.search(r"slurmstepd.*\*\*\* JOB ", line) or ENVIRONMENT_LINE.search(line)
    )
