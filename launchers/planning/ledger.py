"""The append-only record of what was submitted: one JSON object a line, fsynced, in RUN/ledger.jsonl.

{"event": "submission", "submission": 2, "backend": "slurm", "cluster": "dev", "cluster_name": "dev",
 "profile": "dev", "profile_file": "/…/dev.yaml", "run": "/where/it/lay", "time": …}
{"event": "sending", "submission": 2, "name": "sft.tiny.a2.1f6e…", …}     an sbatch is about to happen
{"event": "job", "submission": 2, "phase": "sft", "job": "17", "name": …, "waits": {"packs": "16"}, …}
{"event": "rewire", "submission": 2, "phase": "trained", "job": "12", "waits": {"sft": "17"}, …}
{"event": "submission", "submission": 3, …}, "released"                   of one without jobs: all sealed already
{"event": "released", "submission": 2} or {"event": "abandoned", "submission": 2, "why": …}
{"event": "cancel", "jobs": ["17"], …}
{"event": "job", …, "elements": "0-19,23"}     ranges, as Slurm writes them; ledgers of before list every element
{"event": "bundle", "submission": 4, …}       of one that submit.sh sends; what it sent stands in submissions/4/sent
"""

import functools
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.base.indices import Indices
from data_tools.mistake import UserMistake
from jobs.artifacts.layout import RunLayout
from launchers.planning.chain import last_link
from slurm.printed import format_indices, read_indices


@dataclass(frozen=True)
class JobEntry:
    """One job that carries a phase (or some of its elements), as the ledger recorded it."""

    submission: int  # whose frozen plan it runs: that of its script, or a later one that rewired it
    phase: str
    key: str
    job: str
    elements: Sequence[int]
    is_array: bool
    name: str = ""
    waits: dict[str, str] = field(default_factory=dict)  # phase -> job it waits on
    request: str = ""  # digest of what its script asks Slurm for
    scripted: int = 0  # the submission whose script it is: names its log
    batch: int = 1  # elements per array task
    links: int = 0  # of a chain: its tasks all work on the one element

    @property
    def awaited(self) -> str:
        """The job, or the last link of a chain, that dependents wait on."""
        return last_link(self.job, self.links)

    def elements_of(self, tasks: Indices | None) -> Indices:
        """Return the elements that some array tasks (None: a job that is no array) work on."""
        if tasks is None or self.links:
            return Indices.of(self.elements)
        if self.batch == 1:
            return tasks
        spans = ((first * self.batch, end * self.batch) for first, end in tasks.spans)
        return Indices.of_spans(spans) & Indices.of(self.elements)


SENT_LINE = re.compile(  # of what submit.sh of a bundle notes (launchers/submission/bundle_script.py)
    r"begin|released|cancelled (?P<why>.+)|sending (?P<next>\d+)|job (?P<step>\d+) (?P<id>\d+)"
)
OF_A_JOB = tuple(entry.name for entry in fields(JobEntry) if entry.name != "scripted")  # what a "job" event says


def _is_cut_off(line: bytes) -> bool:
    """Return whether a last line without its end is the beginning of one: no whole object stands there."""
    try:
        json.JSONDecoder().raw_decode(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return True
    return False


def told_elements(elements: Iterable[int]) -> str:
    """Return how files name elements: a line is as long for 100,000 as for two."""
    return format_indices(elements)


def read_elements(told: str | list[int]) -> Indices:
    """Return the elements that a file names, in ranges or, in one of before, one by one."""
    if isinstance(told, str):
        return read_indices(told) if told else Indices()
    return Indices.of(told)


# What an event is asked for; a line without a sum, of before there were sums or altered, may lack it.
_NEEDED = {
    "submission": {"submission", "backend", "choice", "time"}, "sending": {"name"}, "released": {"submission"},
    "abandoned": {"submission", "why"}, "cancel": {"jobs", "time"}, "bundle": {"submission", "jobs", "time"},
}  # fmt: skip


@functools.lru_cache(maxsize=4)
def _parsed(path: Path, data: bytes) -> tuple[dict[str, Any], ...]:
    """Return the events in the bytes of a ledger, the sum of each checked; asked many times of the same bytes."""
    events: list[dict[str, Any]] = []
    *lines, last = data.split(b"\n")
    for number, line in enumerate([*lines, last] if last else lines, start=1):
        try:
            event = durable.parse_checked(line, f"{path}:{number}")
        except durable.TornFile as torn:
            if number > len(lines) and _is_cut_off(line):
                break
            # an append cuts off what is torn, so this was no accident
            raise UserMistake(f"{torn}; remove that line, or restore it") from None
        if event.pop(durable.SUM, None) is None:
            kind = event.get("event")
            lacks = sorted(_NEEDED.get(kind, set()) - event.keys()) if isinstance(kind, str) else ["event"]
            if lacks:
                raise UserMistake(f"{path}:{number} has no {', '.join(lacks)}; remove that line, or restore it")
        events.append(event)
    return tuple(events)


class Ledger:
    """The ledger of one run, read anew at each question."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, event: str, **told: Any) -> None:
        """Append one event, with the time of this host, durably."""
        line = durable.with_sum({"event": event, "time": time.time(), **told})
        durable.append_line(self.path, durable.canonical_json(line))

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield all events, oldest first; a torn last line (power cut in an append), which has no end, is dropped.

        Raises:
            UserMistake: another line is torn or altered.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        for event in _parsed(self.path, data):
            yield event
            if event["event"] == "bundle":
                yield from self._of_bundle(event)

    def _of_bundle(self, bundle: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events that `submit` would have written where submit.sh of a bundle sent its jobs.

        A last line without its end is dropped: a submitter was killed, and the job is looked up by its name.

        Raises:
            UserMistake: another line is none of submit.sh's.
        """
        number, jobs = bundle["submission"], bundle["jobs"]
        path = RunLayout(self.path.parent).sent_path(number)
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        waits: dict[str, str] = {}
        for at, line in enumerate(lines, start=1):
            told = SENT_LINE.fullmatch(line)
            step = int(told["next"] or told["step"] or 0) if told else 0
            if told is None or step >= len(jobs):
                raise UserMistake(f"{path}:{at}: {line!r:.60} is no line of submit.sh's; remove it, or restore it")
            job, about = jobs[step], {"submission": number, "time": bundle["time"]}
            if line == "begin":
                opening = {key: value for key, value in bundle.items() if key not in ("jobs", "folder")}
                yield opening | {"event": "submission"}
            elif told["why"]:
                yield {**about, "event": "abandoned", "why": told["why"], "jobs": list(waits.values())}
            elif told["next"]:
                yield {**about, "event": "sending", "phase": job["phase"], "name": job["name"]}
            elif told["id"]:
                on = {phase: waits[phase] for phase in job["needs"] if phase in waits}
                yield {**about, **job, "event": "job", "job": told["id"], "waits": on}
                waits[job["phase"]] = last_link(told["id"], job["links"])
            else:
                yield {**about, "event": "released"}

    def unsent(self, submission: int) -> str:
        """Return the folder of a bundle that nobody has sent yet; "" where the submission is none, or was sent."""
        folder = ""
        for event in self.events():
            if event.get("submission") == submission:
                folder = event["folder"] if event["event"] == "bundle" else ""
        return folder

    def jobs(self) -> list[JobEntry]:
        """Return the jobs in the order in which they were submitted, as the last rewiring left them.

        Raises:
            UserMistake: an event lacks a field.
        """
        try:
            return list(self._jobs().values())
        except KeyError as missing:
            raise UserMistake(
                f"{self.path}: an event has no {missing}: another version of afterok wrote it; "
                "use that version, or another run folder"
            ) from None

    def _jobs(self) -> dict[str, JobEntry]:
        jobs: dict[str, JobEntry] = {}
        for e in self.events():
            if e["event"] == "job":
                jobs.pop(e["job"], None)  # a controller that lost its last seconds gives out the same id again
                told = {name: e[name] for name in OF_A_JOB} | {"elements": read_elements(e["elements"])}
                jobs[e["job"]] = JobEntry(scripted=e["submission"], **told)
            elif e["event"] == "rewire" and e["only"] is None:
                jobs[e["job"]] = replace(jobs[e["job"]], submission=e["submission"], key=e["key"], waits=e["waits"])
        return jobs

    def copied(self) -> set[int]:
        """Return the submissions of another folder that still is this run.

        This one is then its copy, and their jobs work for that one.
        """
        return {
            event["submission"]
            for event in self.events()
            if event["event"] == "submission"
            and self._is_original(Path(event.get("run", self.path.parent)) / self.path.name)
        }

    def _is_original(self, other: Path) -> bool:
        """Return whether another ledger has the beginning of this one, and is not this very file."""
        try:
            if other.samefile(self.path):
                return False
            with open(other, "rb") as theirs, open(self.path, "rb") as ours:
                return theirs.readline() == ours.readline()  # with the moment of its first submission
        except OSError:  # nothing lies there: the run was moved
            return False

    def own_jobs(self) -> list[JobEntry]:
        """Return the `jobs` but for those of `copied` submissions."""
        copied = self.copied()
        return [entry for entry in self.jobs() if entry.scripted not in copied]

    def other_cluster(self, choice: str, answering: str) -> str:
        """Return what is wrong where the Slurm that answers to `choice` is not the one that the run was submitted to.

        `answering` is its ClusterName. Returns "" where it is the one, or where one of the names is not known.
        """
        for event in self.events():
            if event["event"] != "submission" or event["backend"] != "slurm":
                continue
            if (event["choice"] == "dev") != (choice == "dev"):  # all others mean the Slurm of this machine
                continue
            # Ledgers of before have no cluster_name, but `auto` wrote it as the cluster, except for a dev cluster's.
            before = event["cluster"] if event["choice"] in ("auto", "slurm") and event["cluster"] != "dev" else ""
            name = event.get("cluster_name") or before
            if name and answering and name != answering:
                return (
                    f"{self.path.parent}: submission {event['submission']} went to the Slurm cluster {name}, and "
                    f"the one that answers here is {answering}; nothing was done: work from {name}'s login node, "
                    f"or set SLURM_CONF to {name}'s"
                )
        return ""

    def given_up(self) -> str:
        """Return why the newest submission was taken back or was not finished; "" where it was released.

        A cluster that refused one of its jobs is told of here. Nothing of such a submission ran, since its jobs were
        held, but for those that submit.sh of a bundle had sent.
        """
        newest, end, bundles = 0, "", set[int]()
        for event in self.events():
            if event["event"] == "submission":
                newest, end = event["submission"], ""
            elif event["event"] == "released" and event["submission"] == newest:
                newest = 0
            elif event["event"] == "abandoned" and event["submission"] == newest:
                end = event["why"]
            elif event["event"] == "bundle":
                bundles.add(event["submission"])
        if not newest or newest in self.copied():
            return ""
        where = self.path.parent
        if end:
            ran = "its jobs were cancelled" if newest in bundles else "nothing of it ran"
            return f"submission {newest} was taken back, {ran}: {end}"
        return (
            f"submission {newest} is not released (its submitter was killed or still works, or Slurm did not "
            f"answer): `afterok repair {where}` goes on with it, `afterok cancel {where}` takes it back"
        )

    def newest_released(self) -> int:
        """Return the submission whose jobs were let go last; 0 where there is none."""
        released = (event["submission"] for event in self.events() if event["event"] == "released")
        return max(released, default=0)

    def unreleased(self) -> list[int]:
        """Return the submissions of this folder that were begun and neither released nor abandoned."""
        begun: list[int] = []
        for event in self.events():
            if event["event"] == "submission":
                begun.append(event["submission"])
            elif event["event"] in ("released", "abandoned"):
                begun = [number for number in begun if number != event["submission"]]
        copied = self.copied() if begun else set()
        return [number for number in begun if number not in copied]

    def backend(self, submission: int) -> dict[str, Any]:
        """Return the event of a submission, which tells back end and cluster; {} where there is none."""
        for event in self.events():
            if event["event"] == "submission" and event["submission"] == submission:
                return event
        return {}
