"""Runs jobs as local processes, behind the contract of launchers/backends/contract.py: one driver a submission.

    python -m launchers.backends.local RUN N      # started by LocalBackend.release, outlives the terminal

The driver starts each element's worker when its dependencies allow and cores are free, starts it again where
jobs/retry.py says so (it stopped at a checkpoint, or was killed), and writes every change to RUN/local/N/state.json.
Job ids read N.i: the i-th phase of submission N. Cancelling is a file in RUN/local/N/cancel/.
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("launchers", 1)[0] + "data_tools/own_packages.py")["hold"]()

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from data_tools.base import durable
from data_tools.base.indices import Indices
from jobs import stopping
from jobs.artifacts.owner import Owner
from jobs.artifacts.run_folder import RunFolder
from jobs.ranks import die_with_parent, exit_code
from launchers.backends.contract import JobSpec, Refused, TaskState, request_of
from launchers.backends.local_tasks import LocalJob, LocalTask, Tasks
from launchers.backends.restart import Life, judge
from launchers.causes.states import CANCELLED, COMPLETED, DRIVER_GONE, FAILED, NEVER, PENDING, RUNNING
from launchers.planning.ledger import JobEntry, read_elements, told_elements
from launchers.planning.plan import PlannedPhase
from slurm.client import scrubbed_environment
from slurm.profile.environments import environment_of, site_variables
from slurm.profile.files import load

POLL_S = 0.05
KILL_AFTER_S = 30.0  # between TERM and KILL of a cancelled worker, for its checkpoint; Slurm's own default
START_TIMEOUT_S = 30.0
SAVE_TIMEOUT_S = 60.0  # how long a driver whose work is over tries to write that down on a full disk
SAVE_POLL_S = 1.0
REQUEUED = "Requeued"  # the reason of a task that waits for another start


class DriverState(TypedDict):
    """What state.json holds."""

    driver: dict[str, Any]  # an Owner
    tasks: list[dict[str, Any]]  # phase, job, elements (ranges; in files of before an index), state, reason, exit_code


class LocalBackend:
    """Jobs as processes of this machine."""

    name = "local"
    can_rewire = False  # a driver runs the graph it was started with
    slurm = None

    def __init__(self, run: RunFolder):
        self.run = run

    def _folder(self, number: int | str) -> Path:
        return self.run.local_folder(number)

    def prepare(self, number: int, specs: list[JobSpec]) -> None:
        folder = self._folder(number)
        (folder / "cancel").mkdir(parents=True, exist_ok=True)
        jobs: list[LocalJob] = []
        for i, spec in enumerate(specs):
            self.run.logs_folder(spec.phase).mkdir(parents=True, exist_ok=True)
            frozen, resources = spec.planned.frozen, spec.planned.resources
            jobs.append(
                {
                    "phase": spec.phase,
                    "job": f"{number}.{i}",
                    "name": spec.name,
                    "elements": told_elements(spec.elements),
                    "needs": spec.needs,
                    "throttle": frozen.throttle,
                    "cores": frozen.ranks * max(1, resources.cpus_per_task or 1),
                }
            )
        durable.write_checked(folder / "jobs.json", {"jobs": jobs})

    def send(self, number: int, phase: str, name: str, needs: dict[str, str], waits: dict[str, str], hold: bool) -> str:
        """The job exists in jobs.json already; the driver that runs it starts at the release."""
        return self.find([name])[name][0]

    def differs(self, entry: JobEntry, planned: PlannedPhase) -> str:
        return "" if entry.request == request_of(planned) else "another request for resources"

    def find(self, names: list[str]) -> dict[str, list[str]]:
        jobs = [job for path in self.run.local_files("jobs.json") for job in read_jobs(path)]
        return {job["name"]: [job["job"]] for job in jobs if job["name"] in names}

    def rewire(self, job: str, needs: dict[str, str], waits: dict[str, str], only: int | None) -> None:
        raise Refused(f"local job {job} cannot be rewired")

    def release(self, number: int, jobs: list[str]) -> None:
        """Start the driver, once."""
        folder = self._folder(number)
        if not jobs or (folder / "state.json").exists():
            return
        profile = load(str(self.run.profile_path(number)))
        env = (
            scrubbed_environment(os.environ, same_place=True)
            | site_variables(profile)
            | profile.env.set
            | {
                "PYTHONPATH": str(self.run.code_folder(number)),
                "PYTHONSAFEPATH": "1",
                "PYTHONUNBUFFERED": "1",
            }
        )
        with open(folder / "driver.out", "ab") as log:
            driver = subprocess.Popen(
                [
                    profile.env.python or sys.executable,
                    "-m",
                    self._driver_module(number),
                    str(self.run.path),
                    str(number),
                ],
                env=env,
                cwd=self.run.path,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait_for_start(folder, driver)

    def _driver_module(self, number: int) -> str:
        """Return the driver's module in the code of a submission: one of before has it elsewhere."""
        here = self.run.code_folder(number) / "launchers" / "backends" / "local.py"
        return "launchers.backends.local" if here.exists() else "launchers.local"

    def shown_send(self, number: int, phase: str, needs: dict[str, str], waits: dict[str, str], hold: bool) -> str:
        return f"start {phase} as a local process" + (f" after {', '.join(needs)}" if needs else "")

    def shown_rewire(self, job: str, needs: dict[str, str], waits: dict[str, str], only: int | None) -> str:
        return f"rewire {job}"

    def _wait_for_start(self, folder: Path, driver: subprocess.Popen) -> None:
        """Wait until the driver has written its first state. RuntimeError where it does not come to that."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (folder / "state.json").exists():
            if driver.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the local driver did not start; see {folder / 'driver.out'}")
            time.sleep(0.02)

    def states(self, jobs: list[JobEntry]) -> list[TaskState]:
        ids = {entry.job for entry in jobs}
        states: list[TaskState] = []
        for number in sorted({job.split(".")[0] for job in ids}, key=int):
            state = self._state(number)
            if state is None:
                continue
            gone = not driver_is_alive(state)
            for task in state["tasks"]:
                if task["job"] not in ids:
                    continue
                word, reason = task["state"], task["reason"]
                if gone and word in (PENDING, RUNNING):
                    word = CANCELLED if word == PENDING else FAILED
                    reason = DRIVER_GONE
                own = _elements_of(task)
                alike = own if isinstance(own, Indices) and len(own) > 1 else None
                states.append(TaskState(task["job"], own[0], word, reason, exit_code=task["exit_code"], alike=alike))
        return states

    def cancel(self, jobs: list[str]) -> None:
        for job in jobs:
            folder = self._folder(job.split(".")[0]) / "cancel"
            if folder.is_dir():
                (folder / job).touch()

    def _state(self, number: str) -> DriverState | None:
        """Return what the driver of a submission wrote last; None where nothing can be read, or is no state."""
        try:
            told = durable.read_checked(self._folder(number) / "state.json")
            state = DriverState(driver=told["driver"], tasks=told["tasks"])
            driver_is_alive(state)
            for task in state["tasks"]:
                texts, number_or_none = (task["job"], task["state"], task["reason"]), task["exit_code"]
                if not all(isinstance(text, str) for text in texts) or not isinstance(
                    number_or_none, (int, type(None))
                ):
                    return None
                _elements_of(task)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # without a sum it may hold anything
            return None
        return state


def _elements_of(task: dict[str, Any]) -> Sequence[int]:
    """Return the elements that stand in a state as one task: at least one."""
    own = read_elements(task["elements"]) if "elements" in task else [int(task["index"])]
    if not len(own):
        raise ValueError("a task of no element")
    return own


def read_jobs(path: Path) -> list[LocalJob]:
    """Return the jobs of a submission; before files had a sum they were a plain list. Raise TornFile."""
    jobs = durable.read_json(path)
    if not isinstance(jobs, list):
        jobs = durable.read_checked(path).get("jobs")
    if not isinstance(jobs, list) or not all(isinstance(job, dict) for job in jobs):
        raise durable.TornFile(f"{path} is not what afterok wrote there (no list of jobs)")
    return jobs


def driver_is_alive(state: DriverState) -> bool:
    """Return whether the driver that wrote this may still run: it is not known to be dead."""
    return not Owner(**state["driver"]).is_dead(lambda _: False)


class Driver:
    """Runs one submission's jobs to their ends. One thread, so that workers die with it (PDEATHSIG is a thread's)."""

    def __init__(self, run: RunFolder, number: int):
        self.run, self.number = run, number
        self.folder = run.local_folder(number)
        self.phases = run.frozen(number)
        self.profile = load(str(run.profile_path(number)))
        self.cores = max(1, len(os.sched_getaffinity(0)))
        self.jobs = read_jobs(self.folder / "jobs.json")
        self.book = Tasks(self.jobs)
        self.tasks = self.book.all
        self.cost = {job["phase"]: min(job["cores"], self.cores) for job in self.jobs}
        self.throttle = {job["phase"]: job["throttle"] for job in self.jobs}
        self.children: dict[int, subprocess.Popen] = {}  # position in tasks -> worker
        self.kill_at: dict[int, float] = {}
        self.cancel_all = False
        self.unsaved = False  # state.json is not what is known: the disk refused it, or it was written just now
        self.save_at = 0.0  # not before

    def drive(self) -> None:
        """Start, watch and repeat the tasks until all of them have ended."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        self._save()
        changed = going = True
        while going:
            if changed:
                while self._start():  # what starts nothing may keep something else from ever starting
                    pass
                self.unsaved = True
                going = self.book.goes_on
            if self.unsaved and time.monotonic() >= self.save_at:
                self._save()
            time.sleep(POLL_S)
            changed = self._reap()
            changed |= self._cancel()
        self._save()
        deadline = time.monotonic() + SAVE_TIMEOUT_S
        while self.unsaved and time.monotonic() < deadline:
            time.sleep(SAVE_POLL_S)
            self._save()

    def _on_signal(self, *_: Any) -> None:
        self.cancel_all = True

    def _reap(self) -> bool:
        """Take note of the workers that have ended, and kill those that outlast their time; True where any ended."""
        changed = False
        for position, child in list(self.children.items()):
            if child.poll() is None:
                if time.monotonic() > self.kill_at.get(position, float("inf")):
                    child.kill()
                continue
            del self.children[position]
            code = exit_code(child.returncode)
            cancelled = position in self.kill_at
            state = COMPLETED if code == 0 else CANCELLED if cancelled else FAILED
            self.book.enter(position, state, "", exit_code=code)
            if state == FAILED:
                self._judge(position, code)
            changed = True
        return changed

    def _judge(self, position: int, code: int) -> None:
        """Have a failed task wait for another start where that is safe and its budget allows, else say why not."""
        task = self.tasks[position]
        life = Life(
            run=self.run,
            phase=self.phases[task["phase"]],
            index=task["index"],
            attempt=self.number,
            script=self.number,
            restart=task["restart"],
        )
        verdict = judge(life, code, on_slurm=False)
        print(f"{task['phase']}[{task['index']}] exit code {code}: {verdict.why}", file=sys.stderr, flush=True)
        if verdict.again:
            task["restart"] += 1
            self.book.enter(position, PENDING, REQUEUED)
        else:
            task["reason"] = verdict.why

    def _cancel(self) -> bool:
        """Do what cancel/ asks for; True where a task that waited is cancelled."""
        asked = {path.name for path in (self.folder / "cancel").iterdir()}
        if not asked and not self.cancel_all:
            return False
        changed = False
        for position, task in enumerate(self.tasks):
            if not (self.cancel_all or task["job"] in asked):
                continue
            if task["state"] == PENDING:
                self.book.enter(position, CANCELLED, task["reason"])
                changed = True
            elif position in self.children and position not in self.kill_at:
                self.children[position].terminate()
                self.kill_at[position] = time.monotonic() + KILL_AFTER_S
        return changed

    def _start(self) -> bool:
        """Start the tasks that may start and have cores; True where a state or a reason changed."""
        changed = False
        for phase in self.book.waiting:
            by_element = "aftercorr" in self.book.needs[phase].values()
            reason = None if by_element else self.book.readiness(phase, None)
            if not reason or reason != self.book.told.get(phase):  # else all of them wait for it already
                changed |= self._start_waiting(phase, reason)
        return changed

    def _start_waiting(self, phase: str, reason: str | None) -> bool:
        """Do what `_start` does for the tasks of a phase, which wait for `reason`; None: each has its own."""
        changed, lacking = False, self._lacking(phase)
        self.book.told[phase] = reason or ""
        for position in list(self.book.waiting[phase]):
            task = self.tasks[position]
            why = self.book.readiness(phase, task["index"]) if reason is None else reason
            if why == NEVER:
                self.book.enter(position, CANCELLED, NEVER)
                changed = True
                continue
            if not why and not lacking:
                self.children[position] = self._spawn(task)
                self.book.enter(position, RUNNING, "")
                changed, lacking = True, self._lacking(phase)
                continue
            why = why or (REQUEUED if lacking == "Resources" and task["restart"] else lacking)
            if reason == "" and why == task["reason"] and not task["restart"]:
                break  # nor may one after it start, and all that never started were told at once
            changed |= task["reason"] != why
            task["reason"] = why
        return changed

    def _lacking(self, phase: str) -> str:
        """Return Slurm's reason why one more task of a phase that is ready may not start now; "" where it may."""
        busy = Counter(self.tasks[position]["phase"] for position in self.children)
        free = self.cores - sum(self.cost[name] * count for name, count in busy.items())
        if self.throttle[phase] and busy[phase] >= self.throttle[phase]:
            return "JobArrayTaskLimit"
        return "" if self.cost[phase] <= free else "Resources"

    def _spawn(self, task: LocalTask) -> subprocess.Popen:
        """Start the worker of a task."""

        def before_exec() -> None:
            die_with_parent()
            stopping.hold()  # until the worker can take them

        env = environment_of(self.profile, self.phases[task["phase"]].role)
        command = [
            env.python or sys.executable,
            "-m",
            "jobs.worker",
            str(self.run.path),
            task["phase"],
            str(task["index"]),
            "--submission",
            str(self.number),
        ]
        with open(self.run.log_path(task["phase"], self.number, task["index"]), "ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.run.path,
                preexec_fn=before_exec,
                env=os.environ | env.set | {"SLURM_RESTART_COUNT": str(task["restart"])},
            )

    def _save(self) -> None:
        """Write state.json, which takes a twentieth of the time at most."""
        began = time.monotonic()
        driver = Owner.me(self.number, 0).__dict__
        try:
            durable.write_checked(self.folder / "state.json", {"driver": driver, "tasks": self.book.as_json()})
            self.unsaved = False
        except OSError:  # a full disk must not end the driver, and its workers with it: tried again at the next poll
            self.unsaved = True
        self.save_at = time.monotonic() + 20 * (time.monotonic() - began)


if __name__ == "__main__":
    RUN = RunFolder(Path(sys.argv[1]))
    RUN.heed_group()
    Driver(RUN, int(sys.argv[2])).drive()
