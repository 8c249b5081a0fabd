"""The layout of a run on disk: the one owner of its folders' names, its globs and its regular expressions.

    RUN/
      report.html, curves.svg          what `afterok report` and `afterok plot` wrote last, for people
      ledger.jsonl                     every submission and job, appended (launchers/planning/ledger.py)
      submit.lock                      who submits right now
      submissions/N/plan.json          the frozen plan: what each phase is, resolved
      submissions/N/journal.json       the steps of the submission (launchers/submission/journal.py)
      submissions/N/sent               what submit.sh of a bundle did (launchers/submission/bundle_script.py)
      submissions/N/redirects.json     phases that its jobs run as a later submission froze them
      submissions/N/meeting_key        what the ranks of its jobs prove themselves with
      submissions/N/pipeline.yaml, pipeline.json, profile.yaml     what it was made of
      submissions/N/code, code.json    link to the code that its jobs run, and its digests
      submissions/code/DIGEST/         that code, one copy for all submissions of the same
      submissions/N/scripts/PHASE.sh   the batch scripts
      local/N/                         the driver's state, where there is no Slurm (launchers/backends/local.py)
      PHASE/logs/aN.INDEX.out          one log an element and attempt
      PHASE/attempts/0003.a2.r0.json   how that life of element 3 ended; 0003.a2.r0.skipped.json of a twin that left
      PHASE/attempts/KEY.a2.jsonl      the same of all sealed elements of a large array (jobs/artifacts/consolidate.py);
                                       the first line sums them up (jobs/artifacts/gathered.py)
      PHASE/attempts/environment/      SLURM_* of each attempt, in runs of before; now its lease has them
      PHASE/latest                     link to what is sealed under the newest submission's key, for people
      PHASE/retired/KEY.1              what PHASE/KEY was before it was run anew
      …/.cleaned.NAME.UNIQUE           what `afterok clean` was deleting there when it was killed
      PHASE/KEY/
        seal.json                      the phase's seal, linked last; its presence is the only sign of success
        seals/0003.json                one an array element
        leases/0003.a2.r0.g0           who works on an element: attempt, restart count, generation; SLURM_* it found
        sealing/0003.a2.r0.g0.UNIQUE/  where that owner writes its seal before it is linked
        work/0003.a2.r0.g0/            what that owner writes; a seal names the folder that counts
                                       of element 1003 these three lie in leases/1k/, sealing/1k/ and work/1k/
        checkpoints/step_N/, metrics.jsonl, samples/, tables/, progress/     survive attempts; not sealed content
        elements/0003/                 the same of one element, where a phase has several; gone if it kept nothing

An element is named by its index, and `finish` stands for the merging of all. An attempt is the number of a submission.
"""

import contextlib
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data_tools.base.indices import Indices

FINISH = "finish"  # stands where an element's index would, for the lease and folder of the fan-in

GROUP = 1000  # elements that share a folder of leases, of work and of sealing, which each start lists

SEAL = "seal.json"
LEDGER = "ledger.jsonl"
LEASE = re.compile(r"([^.]+)\.a(\d+)\.r(\d+)\.g(\d+)")
LOG = re.compile(r"a(\d+)\.(tasks|)(\d+)\.out")
# What changes in a run while it goes on, below its folder: folders' times tell of every file made in them.
CHANGING = ("local/*", "*/attempts", "*/*/leases", "*/*/leases/*k", "*/*/seals", f"*/*/{SEAL}")

CLEANED = ".cleaned."  # begins the name of what `afterok clean` is removing
JOURNALS = ("rollouts", "sampled", "element_*")  # in what an element keeps: what its samples are taken up from again


def element_name(element: int | str) -> str:
    """Return how files name an element: 0003, or `finish`."""
    return element if isinstance(element, str) else f"{element:04d}"


def _group(folder: Path, element: int | str) -> Path:
    """Return where in `folder` an element's own lie: below it from element 1000 on, so that no start lists all."""
    name = element_name(element)
    number = int(name) // GROUP if name.isdigit() else 0
    return folder / f"{number}k" if number else folder


def _groups(folder: Path) -> list[Path]:
    """Return the folders in which something of the elements of `folder` may lie."""
    return [folder, *folder.glob("*k")]


def _of_element(folder: Path, element: int | str, owners: str) -> list[Path]:
    """Return what lies in `folder` of the owners of an element whose names begin with `owners`; runs of before have no
    groups: all of theirs lies in the folder itself.
    """
    begins, places = f"{element_name(element)}.{owners}", []
    for place in dict.fromkeys((folder, _group(folder, element))):
        with contextlib.suppress(FileNotFoundError):
            places += [place / name for name in os.listdir(place) if name.startswith(begins)]
    return places


class LeaseName(NamedTuple):
    """An owner of an element as the names of its lease and folders say it; names compare like the owners."""

    attempt: int
    restart: int
    generation: int

    @staticmethod
    def of(path: Path) -> "LeaseName | None":
        """Return the owner that a lease, or a work folder, is named after; None for what is neither (.nfs0000)."""
        lease = read_lease_name(path.name)
        return lease[1] if lease else None

    def __str__(self) -> str:
        return f"a{self.attempt}.r{self.restart}.g{self.generation}"


def read_lease_name(name: str) -> tuple[str, LeaseName] | None:
    """Return the (element, owner) that 0003.a2.r0.g0 names; None where a name is no lease's (an editor's copy)."""
    match = LEASE.fullmatch(name)
    return (match[1], LeaseName(*map(int, match.groups()[1:]))) if match else None


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run: something was submitted there."""
    return (folder / LEDGER).exists()


def runs_below(folder: Path) -> list[Path]:
    """Return the runs directly below a folder."""
    return [path.parent for path in folder.glob(f"*/{LEDGER}")]


def artifact_of(seal: Path) -> Path:
    """Return the PHASE/KEY folder that a seal, the phase's or an element's, lies in."""
    return seal.parent if seal.name == SEAL else seal.parent.parent


def code_digests_beside(code_folder: Path) -> Path:
    """Return where the digests of a submission's code stand."""
    return code_folder.with_name("code.json")


def set_aside_name(seal: Path, word: str, submission: int) -> str:
    """Return the name of a seal set aside by a submission: `retired` or `altered`."""
    return f"{seal.name}.{word}.a{submission}"


def altered_seals(seal: Path) -> Iterator[Path]:
    """Yield the seals that were set aside from this place because what they name was altered."""
    return seal.parent.glob(f"{seal.name}.altered.*")


class RunLayout:
    """Where things lie in a run."""

    def __init__(self, path: Path):
        self.path = Path(path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def ledger(self) -> Path:
        return self.path / LEDGER

    @property
    def cleaned(self) -> Path:
        """The file of what `afterok clean` deleted, a line each time."""
        return self.path / "cleaned.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def curves(self) -> Path:
        return self.path / "curves.svg"

    @property
    def submit_lock(self) -> Path:
        return self.path / "submit.lock"

    def submission_numbers(self) -> list[int]:
        """Return the numbers of all submissions, of those too that were killed before they had a plan."""
        folder = self.path / "submissions"
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []

    def submission_folder(self, number: int) -> Path:
        return self.path / "submissions" / str(number)

    def plan_path(self, number: int) -> Path:
        return self.submission_folder(number) / "plan.json"

    def journal_path(self, number: int) -> Path:
        return self.submission_folder(number) / "journal.json"

    def sent_path(self, number: int) -> Path:
        return self.submission_folder(number) / "sent"

    def redirects_path(self, number: int) -> Path:
        return self.submission_folder(number) / "redirects.json"

    def meeting_key_path(self, number: int) -> Path:
        return self.submission_folder(number) / "meeting_key"

    def pipeline_path(self, number: int) -> Path:
        return self.submission_folder(number) / "pipeline.yaml"

    def pipeline_origin_path(self, number: int) -> Path:
        """Return where it stands which file the pipeline was read from, with which overrides, and in which folder."""
        return self.submission_folder(number) / "pipeline.json"

    def profile_path(self, number: int) -> Path:
        return self.submission_folder(number) / "profile.yaml"

    def code_folder(self, number: int) -> Path:
        return self.submission_folder(number) / "code"

    @property
    def shared_code_folder(self) -> Path:
        """The folder that code lies in which submissions run; those of before have it in `code_folder` itself."""
        return self.path / "submissions" / "code"

    def script_path(self, number: int, phase: str) -> Path:
        return self.submission_folder(number) / "scripts" / f"{phase}.sh"

    def local_folder(self, number: int | str) -> Path:
        return self.path / "local" / str(number)

    def local_files(self, name: str) -> Iterator[Path]:
        """Yield the file of that name of each submission that ran without Slurm."""
        return (self.path / "local").glob(f"*/{name}")

    def artifact_folders(self) -> Iterator[Path]:
        """Yield the PHASE/KEY folders of all phases, under all keys that they ever had."""
        for leases in self.path.glob("*/*/leases"):
            if not leases.parent.is_symlink() and not leases.parent.name.startswith(CLEANED):
                yield leases.parent

    def phase_folder(self, phase: str) -> Path:
        return self.path / phase

    def latest_link(self, phase: str) -> Path:
        """Return the link to the sealed content of a phase, which is for people: no code reads it."""
        return self.phase_folder(phase) / "latest"

    def is_own_link(self, path: Path) -> bool:
        """Return whether a link of the run leads to something of the run itself: that for people, that to the code."""
        beside = path.parent.name
        return path == self.latest_link(beside) or (beside.isdigit() and path == self.code_folder(int(beside)))

    def retired_folders(self) -> Iterator[Path]:
        """Yield what phases had made under a key before they were run anew."""
        return self.path.glob("*/retired/*")

    def artifact_folder(self, phase: str, key: str) -> Path:
        return self.path / phase / key

    def seal_paths(self, phase: str) -> Iterator[Path]:
        """Yield the seals of a phase under all its keys."""
        return self.phase_folder(phase).glob(f"*/{SEAL}")

    def logs_folder(self, phase: str) -> Path:
        return self.phase_folder(phase) / "logs"

    def log_path(self, phase: str, attempt: int, index: int | str) -> Path:
        """Return the log of an element; `index` may be a pattern that Slurm or a shell fills in."""
        return self.logs_folder(phase) / log_name(attempt, index)

    def outcomes_folder(self, phase: str) -> Path:
        return self.phase_folder(phase) / "attempts"

    def outcome_path(self, phase: str, life: tuple[int, int, int], is_twin: bool) -> Path:
        """Return where it stands how a life (element, attempt, restart) ended; a twin left the work to another one."""
        return self.outcomes_folder(phase) / f"{_life_name(life)}{'.skipped' if is_twin else ''}.json"

    def gathered_outcomes_path(self, phase: str, key: str, attempt: int) -> Path:
        """Return where the outcomes of all elements are gathered that one submission had merged under a key."""
        return self.outcomes_folder(phase) / f"{key}.a{attempt}.jsonl"

    def gathered_outcomes(self, phase: str) -> list[Path]:
        """Return the files of `gathered_outcomes_path`."""
        return sorted(self.outcomes_folder(phase).glob("[!.]*.a*.jsonl"))

    def environment_path(self, phase: str, life: tuple[int, int, int]) -> Path:
        """Return where runs of before have the SLURM_* variables of a life (element, attempt, restart)."""
        return self.outcomes_folder(phase) / "environment" / f"{_life_name(life)}.json"


def log_name(attempt: int, index: int | str) -> str:
    """Return the name of the log of an element, or of what `index` stands for."""
    return f"a{attempt}.{index}.out"


def indices_of_logs(names: Iterable[str]) -> dict[tuple[int, bool], Indices]:
    """Return {(attempt, whether of shared tasks): the indices that its logs among these names are of}."""
    logs: dict[tuple[int, bool], list[int]] = {}
    for name in names:
        if (match := LOG.fullmatch(name)) is not None:
            logs.setdefault((int(match[1]), bool(match[2])), []).append(int(match[3]))
    return {of: Indices.of(indices) for of, indices in logs.items()}


def _life_name(life: tuple[int, int, int]) -> str:
    element, attempt, restart = life
    return f"{element_name(element)}.a{attempt}.r{restart}"


class ArtifactLayout:
    """Where things lie in one PHASE/KEY folder of a run."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    @property
    def seal_path(self) -> Path:
        return self.folder / SEAL

    @property
    def seals_folder(self) -> Path:
        return self.folder / "seals"

    def element_seal_path(self, index: int) -> Path:
        return self.seals_folder / f"{element_name(index)}.json"

    def sealed_elements(self) -> set[int]:
        """Return the elements that have a seal of their own, by one listing of the folder."""
        try:
            names = os.listdir(self.seals_folder)
        except FileNotFoundError:
            return set()
        return {int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()}

    @property
    def leases_folder(self) -> Path:
        return self.folder / "leases"

    def lease_path(self, element: int | str, owner: LeaseName) -> Path:
        return _group(self.leases_folder, element) / f"{element_name(element)}.{owner}"

    def leases(self, element: int | str, attempt: int | None = None) -> dict[LeaseName, Path]:
        """Return {owner: lease} of all that ever worked on an element, or did in one attempt."""
        there = _of_element(self.leases_folder, element, "a" if attempt is None else f"a{attempt}.")
        named = {LeaseName.of(path): path for path in there}
        return {name: path for name, path in named.items() if name is not None}

    def lease_folders(self) -> list[Path]:
        """Return the folders that leases of elements lie in."""
        return _groups(self.leases_folder)

    def all_leases(self) -> Iterator[Path]:
        """Yield the leases of all elements and of the merging."""
        for folder in self.lease_folders():
            yield from (path for path in folder.glob("*") if read_lease_name(path.name))

    def work_folder(self, element: int | str, owner: LeaseName) -> Path:
        return _group(self.folder / "work", element) / f"{element_name(element)}.{owner}"

    def work_folders(self, element: int | str) -> list[Path]:
        """Return the folders that owners of an element wrote into."""
        return _of_element(self.folder / "work", element, "a")

    def all_work_folders(self) -> Iterator[tuple[Path, Path]]:
        """Yield (the folder that an owner of an element or of the merging wrote into, its lease)."""
        for folder in _groups(self.folder / "work"):
            for path in folder.glob("*"):
                if read_lease_name(path.name):
                    yield path, self.leases_folder / path.relative_to(self.folder / "work")

    def all_sealing_folders(self) -> Iterator[tuple[Path, Path]]:
        """Yield (the folder through which an owner's seal passes, its lease)."""
        for folder in _groups(self.folder / "sealing"):
            for path in folder.glob("*"):
                if read_lease_name(path.stem):
                    yield path, self.leases_folder / path.with_name(path.stem).relative_to(self.folder / "sealing")

    def owners_folders(self) -> list[Path]:
        """Return the folders that those of owners lie in."""
        return [*_groups(self.folder / "work"), *_groups(self.folder / "sealing")]

    def all_seals(self) -> Iterator[Path]:
        """Yield the phase's seal and its elements', those that were set aside too."""
        yield from self.folder.glob(f"{SEAL}*")
        yield from self.seals_folder.glob("*.json*")

    def new_sealing_folder(self, element: int | str, owner: LeaseName) -> Path:
        """Return a name that no other process uses for the folder through which an owner's seal passes."""
        name = f"{element_name(element)}.{owner}.{uuid.uuid4().hex[:8]}"
        return _group(self.folder / "sealing", element) / name

    def sealing_folders(self, element: int | str, owner: LeaseName) -> list[Path]:
        """Return the folders through which the seals of an owner, and of its twins, pass."""
        return _of_element(self.folder / "sealing", element, f"{owner}.")

    @property
    def retired_folder(self) -> Path:
        """The folder beside this one to which it is moved when the phase is run anew."""
        return self.folder.parent / "retired"

    def keep_folder(self, index: int, elements: int) -> Path:
        """Return where an element of a phase of `elements` keeps what survives attempts."""
        return self.folder if elements == 1 else self.folder / "elements" / element_name(index)

    def keep_folders(self) -> Iterator[Path]:
        """Yield the folders in which elements keep what survives attempts, however many elements there are."""
        yield self.folder
        yield from (self.folder / "elements").glob("[0-9]*")


def journals_of(keep: Path) -> list[Path]:
    """Return the journals in what an element keeps."""
    return [path for pattern in JOURNALS for path in sorted(keep.glob(pattern))]


def checkpoints_of(keep: Path) -> Iterator[Path]:
    """Yield the checkpoints, durable or not, in what an element keeps."""
    return (keep / "checkpoints").glob("step_*")


def durable_checkpoints_of(keep: Path) -> Iterator[Path]:
    """Yield the manifests of the durable checkpoints in what an element keeps: each was written last."""
    return (keep / "checkpoints").glob("step_*/manifest.json")


METRICS = "metrics.jsonl"  # what a training writes of its steps, in what an element keeps
SAMPLES = "samples"  # the folder of what it sampled, a file a step


def metrics_below(artifact: ArtifactLayout, elements: int) -> dict[int, Path]:
    """Return {element: its metrics} of those elements of a phase that wrote some."""
    return {index: path for index, path in _kept(artifact, elements, METRICS).items() if path.is_file()}


def samples_below(artifact: ArtifactLayout, elements: int) -> dict[int, Path]:
    """Return {element: what it keeps} of those elements of a phase that logged samples of its training."""
    return {index: path.parent for index, path in _kept(artifact, elements, SAMPLES).items() if path.is_dir()}


def _kept(artifact: ArtifactLayout, elements: int, name: str) -> dict[int, Path]:
    """Return {element: the path of that name in what it keeps}, where there is one."""
    if elements == 1:
        path = artifact.folder / name
        return {0: path} if path.exists() else {}
    above = artifact.keep_folder(0, elements).parent
    names = sorted(os.listdir(above)) if above.is_dir() else []
    return {  # thousands: no Path an element
        int(number): above / number / name
        for number in names
        if number.isdigit() and os.path.exists(f"{above}/{number}/{name}")
    }


def sample_logs_of(keep: Path) -> dict[int, Path]:
    """Return {step: the log of its samples} of a GRPO training, in what an element keeps."""
    named = (
        (re.fullmatch(r"step_(\d+)\.jsonl(?:\.zst)?", path.name), path) for path in (keep / SAMPLES).glob("step_*")
    )
    return {int(match[1]): path for match, path in sorted(named, key=lambda each: each[1].name) if match}
