"""A run's folder: the frozen submissions that a worker reads instead of the user's files, outcomes, and seals.

Where the files lie says jobs/artifacts/layout.py.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import secrets
import shutil
import stat
import time
import unicodedata
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.base.indices import Indices
from data_tools.mistake import UserMistake
from jobs.artifacts.artifact import Artifact
from jobs.artifacts.gathered import Gathered, is_outcome, read_gathered, sums_up
from jobs.artifacts.layout import ArtifactLayout, RunLayout, element_name
from jobs.artifacts.owner import ENVIRONMENT
from jobs.artifacts.seal import DamagedSeal, Seal, read_seal
from jobs.schema.pipeline import NEED_SEALS

# What a run's path must not hold, and why; on Slurm the latter, too (tried with 22.05).
UNFIT = {
    ":": "Python separates the folders of PYTHONPATH by it, so that other code than the run's would be imported",
    "${": "a setting that names a folder of the run would be read as a reference",
}
UNFIT_ON_SLURM = {
    "%": "Slurm reads it as a pattern in the names of logs",
    "\\": "Slurm drops it from the names of logs and of jobs",
}
LONGEST_NAME = 255  # bytes of one folder's name, on every filesystem in use
LONGEST_PATH = 4095  # bytes of a whole path that Linux takes (PATH_MAX)


def path_problem(path: Path, on_slurm: bool) -> str:
    """Return why a run cannot lie at an absolute path, "" where it can: the one place that says so."""
    text = str(path)
    unfit = UNFIT | (UNFIT_ON_SLURM if on_slurm else {})
    wrong = [(part, why) for part, why in unfit.items() if part in text]
    wrong += [
        (char, "no line of a script or of a listing can hold it")
        for char in text
        if unicodedata.category(char) in ("Cc", "Zl", "Zp")
    ]
    wrong += [(char, "it is no Unicode") for char in text if unicodedata.category(char) == "Cs"]
    wrong += [
        (part, f"a name of {len(os.fsencode(part))} bytes is longer than {LONGEST_NAME}")
        for part in path.parts
        if len(os.fsencode(part)) > LONGEST_NAME
    ]
    if len(os.fsencode(path)) > LONGEST_PATH:
        wrong.append((path.name, f"the whole path has {len(os.fsencode(path)):,} bytes, more than {LONGEST_PATH:,}"))
    if not wrong:  # no filesystem can be asked of what is wrong above
        there = [place for place in (path, *path.parents) if os.path.lexists(place) and not os.path.isdir(place)]
        wrong += [(str(place), f"that is {'a file' if place.is_file() else 'no folder'}") for place in there]
    if not wrong:
        return ""
    part, why = wrong[0]
    return f"{text!r:.300} cannot be a run's folder: it has {part!r:.60}, and {why}; choose another one with --run DIR"


@dataclass
class FrozenPhase:
    """One phase of a submission, complete: the worker needs no pipeline file, profile or environment."""

    name: str
    uses: str
    key: str
    material: dict[str, Any]
    settings: dict[str, Any]  # resolved but for references `@{phases.NAME.out}`
    array: Any
    elements: int
    fans_in: bool
    needs: dict[str, str]  # phase -> dependency type
    inputs: dict[str, str]  # external file or folder -> SHA-256 when planned
    ranks_per_node: int
    nodes: int
    gpus_per_node: int
    throttle: int = 0  # elements that may run at once; 0: as many as fit
    batch: int = 1  # consecutive elements that share an array task, where the cluster's arrays are too short
    image: dict[str, str] = field(
        default_factory=dict
    )  # of its container: name, and sha256 where it is a file or folder
    role: str = ""  # whose environment it has; "" of a submission of before: the profile's
    links: int = 0  # array tasks that go on one from another, where the job may not be requeued; 0: no such chain
    rehearsal: dict[str, Any] = field(default_factory=dict)  # of one: jobs/rehearsal.py's settings; {}: it is real

    @property
    def ranks(self) -> int:
        """The ranks of one element."""
        return self.ranks_per_node * self.nodes

    @property
    def processes(self) -> int:
        """The processes of one element: one for each rank, or in a rehearsal one a node, which sleeps for its ranks."""
        return self.nodes if self.rehearsal else self.ranks

    @property
    def own_settings(self) -> dict[str, Any]:
        """The settings of what its workers run: the phase's, or of its rehearsal."""
        return self.rehearsal or self.settings


@dataclass
class Outcome:
    """How one attempt at one element ended, for status, why and the summary."""

    element: int
    attempt: int
    restart: int
    state: str  # sealed, mistake, failed, skipped, stopped
    exit_code: int
    message: str
    host: str
    job: str
    started: float
    ended: float = field(default_factory=time.time)
    done: float | None = None  # durable steps of one that was stopped, or all of one that was sealed
    total: int | None = None
    key: str = ""
    cause: str = ""  # of one whose worker could not say: what launchers/backends/restart.py read from other evidence
    node: str = ""  # the one guilty node, where it was a node


def in_order(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Return outcomes in the order of attempts and restarts; who worked comes after the twin who did not."""
    return sorted(outcomes, key=lambda o: (o.attempt, o.restart, o.state != "skipped", o.ended))


class RunFolder(RunLayout):
    """A run: what was frozen, how attempts ended, and what is sealed."""

    def make(self, group: str = "") -> None:
        """Make the folder, closed to all others, or readable for `group` too; one that was there keeps its mode.

        What lies below needs no modes of its own: nobody gets past the folder. Raises UserMistake for a group that the
        user is not in.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700)
        except FileExistsError:
            pass
        if group:
            try:
                shutil.chown(self.path, group=group)
                self.path.chmod(0o2750)  # what is made below belongs to the group too
            except (LookupError, PermissionError):
                raise UserMistake(f"--group {group}: no group of yours; `id -nG` lists them") from None
        self.heed_group()

    def heed_group(self) -> None:
        """Have this process and its children make files that the group of a shared run can read."""
        with contextlib.suppress(OSError):
            if self.path.stat().st_mode & stat.S_ISGID:
                os.umask(os.umask(0o077) & ~0o050)

    # -- submissions ---------------------------------------------------------------------------------------------

    def submissions(self) -> list[int]:
        """Return the numbers of the submissions that have a plan, in order."""
        return [number for number in self.submission_numbers() if self.plan_path(number).exists()]

    def newest_submission(self) -> int:
        """Return the number of the newest submission. Raises UserMistake where there is none."""
        numbers = self.submissions()
        if not numbers:
            raise UserMistake(f"{self.path}: nothing was submitted there yet; start with `afterok submit PIPELINE`")
        return numbers[-1]

    def freeze(self, number: int, pipeline: str, phases: list[FrozenPhase]) -> None:
        """Write the plan of a submission."""
        plan = {"pipeline": pipeline, "phases": [_frozen_as_json(phase) for phase in phases]}
        durable.write_checked(self.plan_path(number), plan)
        self.link_latest(*(phase.name for phase in phases))

    def link_latest(self, *names: str) -> None:
        """Have RUN/PHASE/latest lead to what is sealed of phases as the newest submission has them, or be gone.

        It is for people: where a filesystem has no links, or a newer plan is torn, what is sealed stays sealed.
        """
        number = 0
        with contextlib.suppress(OSError, UserMistake):
            while number != self.newest_submission():  # one that was frozen meanwhile has other keys, perhaps
                number = self.newest_submission()
                phases = self.frozen(number)
                for name in phases.keys() & set(names):
                    with contextlib.suppress(OSError):
                        self._link(self.latest_link(name), self.whole_seal(name, phases[name].key))

    @staticmethod
    def _link(link: Path, seal: Seal | None) -> None:
        if seal is None:
            link.unlink(missing_ok=True)
            return
        new = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
        new.symlink_to(os.path.relpath(seal.folder, link.parent))
        new.replace(link)

    def frozen(self, number: int) -> dict[str, FrozenPhase]:
        """Return {name: phase} as a submission froze them. Raises UserMistake where its plan is torn or not there."""
        plan = self._frozen_plan(number)
        try:
            return {entry["name"]: _frozen_of_json(entry) for entry in plan["phases"]}
        except (KeyError, TypeError):
            raise self._torn_plan(number) from None

    def pipeline_name(self, number: int) -> str:
        """Return the name of the pipeline that a submission is of."""
        return self._frozen_plan(number)["pipeline"]

    def _frozen_plan(self, number: int) -> dict[str, Any]:
        try:
            return durable.read_checked(self.plan_path(number))
        except FileNotFoundError:
            raise UserMistake(f"{self.path}: there is no submission {number} (have {self.submissions()})") from None
        except ValueError:
            raise self._torn_plan(number) from None

    def _torn_plan(self, number: int) -> UserMistake:
        return UserMistake(
            f"{self.plan_path(number)} is no plan (truncated or edited); delete "
            "that file and submit again: what is sealed stays"
        )

    def meeting_key(self, number: int) -> bytes:
        """Return what the ranks of a submission's jobs prove themselves with; nobody but the user may read its file.

        Raise UserMistake where the file is torn: with less than the whole key, strangers could prove themselves too.
        """
        path = self.meeting_key_path(number)
        if not path.exists():  # submit writes it; a run of before has none
            durable.create_file(path, secrets.token_hex(32) + "\n", mode=0o600)
        told = path.read_bytes().strip()
        if re.fullmatch(rb"[0-9a-f]{64}", told) is None:
            raise UserMistake(
                f"{path} holds no key (truncated or edited); delete that file and submit again: what is sealed stays"
            )
        return bytes.fromhex(told.decode())

    def redirect(self, number: int, phase: str, to: int) -> None:
        """Have a job whose script belongs to submission `number` run `phase` as submission `to` froze it."""
        path = self.redirects_path(number)
        redirects = durable.read_checked(path) if path.exists() else {}
        if number != to:
            durable.write_checked(path, {**redirects, _redirect_of(phase): to})

    def redirected(self, number: int, phase: str) -> int:
        """Return the submission that a job of submission `number` runs for `phase`."""
        path = self.redirects_path(number)
        return durable.read_checked(path).get(_redirect_of(phase), number) if path.exists() else number

    # -- phases --------------------------------------------------------------------------------------------------

    def artifact(self, phase: FrozenPhase) -> Artifact:
        """Return the artifact of a phase under its key."""
        return Artifact(self.artifact_folder(phase.name, phase.key), phase.elements, phase.fans_in)

    def seal(self, phase: str, key: str) -> Seal | None:
        """Return the seal of a phase under a key, None where there is none. Raises DamagedSeal."""
        return read_seal(ArtifactLayout(self.artifact_folder(phase, key)).seal_path)

    def whole_seal(self, phase: str, key: str) -> Seal | None:
        """Return what `seal` does, but None for a damaged one.

        It is for those who ask about jobs, or about other keys than a plan's.
        """
        with contextlib.suppress(DamagedSeal):
            return self.seal(phase, key)
        return None

    def not_needed(self, phases: dict[str, FrozenPhase], name: str, asked: set[str] | None = None) -> str:
        """Return why a phase without a seal never has to run (what it was to follow `afternotok` is sealed), or "".

        `asked` are phases that were found to have no reason, so that none is asked twice.
        """
        if not any("afternotok" in phase.needs.values() for phase in phases.values()):
            return ""  # without a look at seals: those who watch a run ask of every phase, again and again
        asked = set() if asked is None else asked
        asked.add(name)
        for need, type_ in phases[name].needs.items():
            if type_ == "afternotok" and self.seal(need, phases[need].key) is not None:
                return f"{need} is sealed"
            if type_ not in NEED_SEALS or need in asked or self.seal(need, phases[need].key) is not None:
                continue
            if why := self.not_needed(phases, need, asked):
                return why
        return ""

    def seals(self, phase: str) -> list[Seal]:
        """Return all seals of a phase in this run, in the order they were submitted: hosts' clocks may differ.

        A damaged one is left out: under the key of a plan it is refused where that is surveyed, and those of other keys
        only tell what was different.
        """
        seals = [self.whole_seal(phase, path.parent.name) for path in self.seal_paths(phase)]
        return sorted(
            (seal for seal in seals if seal),
            key=lambda seal: tuple(seal.content.get(name, 0) for name in ("submission", "restart", "sealed_at")),
        )

    def sealed_before(self, phase: FrozenPhase) -> Path | None:
        """Return the PHASE/KEY folder that was sealed last under another key of a phase; None where there is none."""
        sealed = [
            (path.stat().st_mtime, path.parent)
            for path in self.seal_paths(phase.name)
            if path.parent.name != phase.key and not path.parent.is_symlink()
        ]
        return max(sealed)[1] if sealed else None

    def record_outcome(self, phase: str, outcome: Outcome) -> None:
        """Write how a life of an element ended.

        The first of an attempt's ranks to say so is believed; a twin that left the work to it is no rank.
        """
        life = (outcome.element, outcome.attempt, outcome.restart)
        path = self.outcome_path(phase, life, is_twin=outcome.state == "skipped")
        if path.exists() or self._is_gathered(phase, outcome):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.create_file(path, json.dumps(durable.with_sum(dataclasses.asdict(outcome)), indent=1) + "\n")

    def _is_gathered(self, phase: str, outcome: Outcome) -> bool:
        """Return whether a life is among those that were summed up when its phase was sealed: it started again."""
        path = self.gathered_outcomes_path(phase, outcome.key, outcome.attempt)
        return not outcome.restart and path.exists() and sums_up(path, outcome.element, outcome.attempt)

    def outcomes(
        self, phase: str, attempt: int | None = None, element: int | None = None, *, but: Container[int] = ()
    ) -> list[Outcome]:
        """Return the outcomes of a phase, of one attempt or element or all; an element's later ones after its earlier.

        Of elements in `but` no file is read.

        Order is that of attempts and restarts, not of the hosts' clocks; who worked comes after the twin who did not.
        A torn or altered file is as good as none. Which files are read, their names decide.
        """
        asked = "" if attempt is None else f".a{attempt}."
        begins = "" if element is None else f"{element_name(element)}."
        outcomes: dict[tuple[int, int, int, bool], Outcome] = {}
        files = (told for _, told in self.outcome_files(phase, asked, begins, but))
        # Files first: one that is gone when it is read is in what was gathered by then. What was gathered is believed:
        # where a life has a file again, another of its ranks made it later.
        for told in itertools.chain(files, self._gathered(phase)):
            with contextlib.suppress(TypeError):
                outcome = Outcome(**told)
                if element in (None, outcome.element) and attempt in (None, outcome.attempt):
                    life = (outcome.element, outcome.attempt, outcome.restart, outcome.state == "skipped")
                    outcomes[life] = outcome
        return in_order(outcomes.values())

    def outcomes_in_brief(self, phase: str) -> tuple[list[Outcome], list[Gathered]]:
        """Return what `outcomes` does but for those that were gathered and have nothing of their own to tell.

        Of 100,000 sealed elements it reads a line.
        """
        found, gathered = list[dict[str, Any]](), list[Gathered]()
        files = [told for _, told in self.outcome_files(phase)]  # first, as `outcomes` does
        for path in self.gathered_outcomes(phase):
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as lines:
                some, others = read_gathered(lines.readline())
                gathered += some
                lines.seek(0 if others is None else lines.tell())
                for line in itertools.islice(lines, others):
                    with contextlib.suppress(ValueError):
                        if is_outcome(told := durable.parse_checked(line, path)):
                            found.append(told)
        of_attempt: dict[int, list[Indices]] = {}
        for lives in gathered:
            of_attempt.setdefault(lives.attempt, []).append(lives.elements)
        outcomes = {}
        for told in (*files, *found):
            with contextlib.suppress(TypeError):
                outcome = Outcome(**told)
                is_twin, known = outcome.state == "skipped", of_attempt.get(outcome.attempt, ())
                if not is_twin and not outcome.restart and any(outcome.element in elements for elements in known):
                    continue  # another rank made the file after what was gathered
                outcomes[outcome.element, outcome.attempt, outcome.restart, is_twin] = outcome
        return list(outcomes.values()), gathered

    def outcome_files(
        self, phase: str, asked: str = "", begins: str = "", but: Container[int] = ()
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the name and content of each outcome with a file, if its name begins and has in it what is asked.

        None of elements in `but`. Tens of thousands are read, so no Path is made for each.
        """
        folder = self.outcomes_folder(phase)
        for name in os.listdir(folder) if folder.is_dir() else []:
            if name.endswith(".json") and asked in name and name.startswith(begins) and not name.startswith("."):
                if but and (number := name.partition(".")[0]).isdigit() and int(number) in but:
                    continue
                with contextlib.suppress(ValueError, FileNotFoundError), open(f"{folder}/{name}", "rb") as file:
                    if is_outcome(told := durable.parse_checked(file.read(), name)):
                        yield name, told

    def _gathered(self, phase: str) -> Iterator[dict[str, Any]]:
        """Yield the outcomes that were gathered in one file once a phase was sealed (consolidate.py)."""
        for path in self.gathered_outcomes(phase):
            for line in path.read_bytes().splitlines():
                with contextlib.suppress(ValueError):
                    if is_outcome(told := durable.parse_checked(line, path)):
                        yield told

    def environment(self, phase: FrozenPhase, element: int, attempt: int, restart: int) -> dict[str, Any]:
        """Return the SLURM_* variables that a life of an element found, as its newest lease tells; {} if none does.

        Runs of before have them in a file beside the outcomes.
        """
        old = self.environment_path(phase.name, (element, attempt, restart))
        leases = self.artifact(phase).leases(element, attempt)
        newest = max((owner for owner in leases if owner.restart == restart), default=None)
        with contextlib.suppress(durable.TornFile, FileNotFoundError):  # nothing is known of it, or it goes just now
            if old.exists():
                return durable.read_checked(old)
            return durable.read_checked(leases[newest]).get(ENVIRONMENT, {}) if newest else {}
        return {}


def _frozen_as_json(phase: FrozenPhase) -> dict[str, Any]:
    """Return what plan.json says of a phase: the values of its elements once, though its key is made of them too."""
    entry = dataclasses.asdict(phase)
    if isinstance(phase.array, list) and phase.material.get("array") == phase.array:
        del entry["material"]["array"]
    return entry


def _frozen_of_json(entry: dict[str, Any]) -> FrozenPhase:
    """Return a phase that plan.json has; plans of before have the values of its elements twice."""
    phase = FrozenPhase(**entry)
    if isinstance(phase.array, list):
        phase.material.setdefault("array", phase.array)
    return phase


def _redirect_of(phase: str) -> str:
    """Return where redirects.json has a phase: under its name, which must not be that of the file's sum."""
    return phase if phase != durable.SUM else f"phase {phase}"
