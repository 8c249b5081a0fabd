"""One array element of one phase, run the same by Slurm, by the local driver and by hand.

    python -m jobs.worker RUN PHASE [INDEX] [--submission N]

Checks the upstream seals, takes the lease, runs the phase on all ranks of the element, seals, and fans in when it
finds all other elements sealed. Exits 0 only when the element's seal is on disk (EXIT_* of jobs/retry.py otherwise).

Asked to stop (jobs/stopping.py), a phase that can leaves a checkpoint; the worker then exits EXIT_UNFINISHED on all
ranks. With --requeue, which the batch script says, rank 0 first has Slurm run the element again in place, where Slurm
does not do so by itself.
"""

from jobs.stopping import SIGNALS

if __name__ == "__main__":
    SIGNALS.install()  # before the other imports: without a handler SIGUSR2 kills, and they take a tenth of a second

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("jobs", 1)[0] + "data_tools/own_packages.py")["hold"]()

import argparse
import contextlib
import errno
import os
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from data_tools.base.durable import TornFile
from data_tools.base.rendezvous import Meeting
from data_tools.mistake import EXIT_MISTAKE, UserMistake, disk_problem
from data_tools.progress import Stopped
from jobs import requeue, retry, stopping
from jobs.artifacts.artifact import Artifact, Lease, LeaseHeld, Sealed
from jobs.artifacts.consolidate import take_up
from jobs.artifacts.owner import Owner, slurm_variables
from jobs.artifacts.run_folder import FrozenPhase, RunFolder
from jobs.kind import PhaseKind, find_kind
from jobs.last_word import LastWord
from jobs.ranks import SPAWN_VARIABLE, Rank, Verdicts, number_of, rank_from_environment, spawn_ranks, torch_environment
from jobs.rehearsal import rehearsed_kind
from jobs.retry import EXIT_FAILED, EXIT_LEASE_HELD, EXIT_NO_INPUT, EXIT_NOT_NEEDED, EXIT_SEALED, EXIT_UNFINISHED, Cause
from jobs.schema.references import substitute
from jobs.schema.typed import typed_config
from jobs.sealing import Sealer, TakenOver
from jobs.secrets import Secrets, commands_among, read_values, reveal
from jobs.task import Task
from jobs.upstream import NotNeeded, Upstream, UpstreamNotSealed
from slurm.client import Slurm, SlurmError, job_element
from slurm.printed import ENDED_STATES
from slurm.profile.environments import environment_of
from slurm.profile.files import load
from slurm.profile.schema import Profile

ASK_LIMIT_S = 10.0  # for one question to Slurm by a worker that has to leave soon
TAKEN_OVER = "a newer attempt took this element over"
# What tells one start of an element from another; the same for all of its ranks.
START_VARIABLES = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", SPAWN_VARIABLE)
FULL_BELOW = 1 << 20  # bytes left on the run's filesystem at which a failure is put down to a full disk


class Beginning(TypedDict):
    """What rank 0 tells all ranks when an element begins."""

    exit: int | None  # the exit code, where there is nothing to run
    message: str
    out: str  # the folder to write into
    folders: dict[str, str]  # need -> its folder
    only_fan_in: bool  # the element is sealed, the phase is not


class Ending(TypedDict):
    """What rank 0 tells all ranks when an element ends."""

    exit: int
    message: str


class Printed(TypedDict):
    """What the commands of the profile's secrets printed, or why they failed."""

    values: dict[str, str]
    mistake: str


def nothing_to_run(code: int, message: str) -> Beginning:
    """Return the beginning of an element that ends at once."""
    return Beginning(exit=code, message=message, out="", folders={}, only_fan_in=False)


def main(argv: list[str] | None = None) -> int:
    """Work on one element of one phase; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.worker", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("phase")
    parser.add_argument("index", type=int, nargs="?")
    parser.add_argument("--submission", type=int, help="which frozen submission (default: the newest)")
    parser.add_argument("--requeue", action="store_true", help="requeue this Slurm job when it has to stop")
    args = parser.parse_args(argv)
    try:
        run = RunFolder(args.run.absolute())
        run.heed_group()
        number = _submission(run, args)
        phases = run.frozen(number)
        if args.phase not in phases:
            raise UserMistake(f"submission {number} has no phase {args.phase!r} (known: {', '.join(phases)})")
        phase = phases[args.phase]
        index = args.index if args.index is not None else number_of(os.environ, "SLURM_ARRAY_TASK_ID", "0")
        if not 0 <= index < phase.elements:
            raise UserMistake(f"phase {phase.name} has elements 0 to {phase.elements - 1}, not {index}")
        rank = rank_from_environment(os.environ, phase.processes)
    except (UserMistake, TornFile) as mistake:
        print(f"afterok: {mistake}", file=sys.stderr)
        return EXIT_MISTAKE
    if rank is None:
        command = _command(run=run, phase=phase.name, index=index, number=number, requeue=args.requeue)
        return spawn_ranks(command, phase.processes, phase.gpus_per_node)
    os.environ.update(torch_environment(rank, phase.gpus_per_node))
    worker = Worker(run=run, number=number, phases=phases, phase=phase, index=index, rank=rank, requeue=args.requeue)
    return worker.work()


def _submission(run: RunFolder, args: argparse.Namespace) -> int:
    """Return the submission to run. A job that a later submission rewired starts itself over with that one's code."""
    number = args.submission or run.newest_submission()
    to = run.redirected(number, args.phase)
    if to == number:
        return number
    os.environ["PYTHONPATH"] = str(run.code_folder(to))
    stopping.hold()  # a handler does not outlive exec, a held signal does
    os.execv(sys.executable, _command(run=run, phase=args.phase, index=args.index, number=to, requeue=args.requeue))


def _command(run: RunFolder, phase: str, index: int | None, number: int, requeue: bool) -> list[str]:
    """Return the command that starts this worker."""
    command = [sys.executable, "-m", "jobs.worker", str(run.path), phase, *([] if index is None else [str(index)])]
    return [*command, "--submission", str(number), *(["--requeue"] if requeue else [])]


def slurm_says_ended(job: str) -> bool:
    """Return True only when Slurm itself lists the job, or element of an array, as ended; silence proves nothing.

    Leases of before name an element by its raw id.
    """
    try:
        return any(job in (row.element, row.job_id) and row.state in ENDED_STATES for row in Slurm().queue())
    except (SlurmError, UserMistake, OSError):
        return False


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the log may lie on the disk that is full
        print(f"afterok: {line}", file=sys.stderr, flush=True)


def restart_count(artifact: Artifact, index: int, attempt: int, chained: bool = False) -> int:
    """Return how often this element was restarted in this attempt: Slurm's count, its link, or the local driver's.

    By hand nobody counts: the newest restart there was is joined, whose owner must then be provably dead.
    """
    if chained and "SLURM_ARRAY_TASK_ID" in os.environ:
        return int(os.environ["SLURM_ARRAY_TASK_ID"])
    if "SLURM_RESTART_COUNT" in os.environ:
        return int(os.environ["SLURM_RESTART_COUNT"])
    return max((owner.restart for owner in artifact.leases(index, attempt)), default=0)


class Worker:
    """One rank at work on one element; what only rank 0 does stands last."""

    def __init__(
        self,
        run: RunFolder,
        number: int,
        phases: dict[str, FrozenPhase],
        phase: FrozenPhase,
        index: int,
        rank: Rank,
        requeue: bool = False,
    ):
        self.run, self.number, self.phase, self.index, self.rank = run, number, phase, index, rank
        self.artifact: Artifact = run.artifact(phase)
        self.requeue = requeue
        restart = restart_count(self.artifact, index, number, chained=bool(phase.links))
        self.owner = Owner.me(number, restart, job_element(os.environ))
        self.started = time.time()
        self.last_word = LastWord(run, phase, element=index, owner=self.owner, rank=rank, started=self.started)
        self.heard = False  # whether rank 0 told this rank how it ends
        self.lease: Lease | None = None
        self.upstream = Upstream(run, phases, phase, index)
        self.secrets = Secrets({})
        self.revealed = False
        self.reached: tuple[int | None, int | None] = (None, None)  # steps done and in all, where the phase told

    def work(self) -> int:
        """Work, record how that ended, and return the exit code; a rank that failed leaves the process at once."""
        try:
            code, message = self._work()
        except UserMistake as mistake:
            code, message = EXIT_MISTAKE, str(mistake)
        except UpstreamNotSealed as error:
            code, message = EXIT_NO_INPUT, str(error)
        except TornFile as error:
            code, message = EXIT_MISTAKE, str(error)
        except Exception as error:
            code, message = self._failure(error)
        message = self.secrets.mask(message)
        if code != EXIT_SEALED:
            _say(f"{self.phase.name}[{self.index}]: {message}")
        if self.rank.rank == 0 or not self.heard:
            self.last_word.say(code, message, self.reached if code == EXIT_SEALED else (None, None))
        if code not in (EXIT_SEALED, EXIT_LEASE_HELD, EXIT_NOT_NEEDED):
            # Other ranks may sit in a collective with this one: leave without waiting for them.
            self.secrets.close_output()
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
        return code

    def _failure(self, error: Exception) -> tuple[int, str]:
        """Return exit code and message of a failure; unless a disk refused, its traceback goes into the log."""
        if self.lease is not None and not self.artifact.still_mine(self.lease):  # its new owner swept our folder
            return EXIT_LEASE_HELD, TAKEN_OVER
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full and self.lease is not None:
            # Unsealed, and no later attempt reads it: its room is needed to write down how this one ended.
            shutil.rmtree(self.lease.folder, ignore_errors=True)
        refused = disk_problem(error, self.run.path)
        if refused:
            return EXIT_MISTAKE, refused
        with contextlib.suppress(OSError):
            traceback.print_exc()
        # masked whole: cut off or with its white space changed, a value would not be recognised
        message = f"{type(error).__name__}: {' '.join(self.secrets.mask(str(error)).split())[:500]}"
        disk = os.statvfs(self.run.path)
        if disk.f_bavail * disk.f_frsize < FULL_BELOW:  # libraries wrap or lose ENOSPC
            message += f" ({self.run.path} has no space left)"
        return EXIT_FAILED, message

    def _profile(self) -> Profile:
        return load(str(self.run.profile_path(self.number)))

    def _meeting(self) -> Meeting:
        """Return where the ranks of this start of this element meet."""
        low, high = self._profile().network.port_range
        where = [str(self.run.path), self.phase.name, self.phase.key]
        start = [os.environ.get(name, "") for name in START_VARIABLES]
        return Meeting(
            address=os.environ["MASTER_ADDR"],
            ports=range(low, high + 1),
            name="/".join([*where, str(self.index), str(self.number), *start]),
            key=self.run.meeting_key(self.number),
            spared=int(os.environ["MASTER_PORT"]),  # to a phase that calls torch.distributed itself
            key_file=str(self.run.meeting_key_path(self.number)),
        )

    def _reveal_secrets(self, verdicts: Verdicts | None = None, own: Mapping[str, str] = {}) -> Secrets:
        """Put the profile's secrets, and the phase's `own`, into this rank's environment: after the lease, just before
        the phase's own code."""
        if self.revealed:  # the fan-in of a rank that ran an element: a command may print another value each time
            return self.secrets
        self.revealed = True
        references = {**own, **environment_of(self._profile(), self.phase.role).secrets}
        commands = commands_among(references)
        printed = Printed(values={}, mistake="")
        if verdicts and commands:
            printed = verdicts.hand_over("secrets", lambda: self._run_for_all(commands))
        if printed["mistake"]:
            raise UserMistake(printed["mistake"])
        self.secrets = reveal(references, printed["values"])
        return self.secrets

    @staticmethod
    def _run_for_all(commands: dict[str, str]) -> Printed:
        """Run the commands of the profile's secrets. A mistake is every rank's: none may wait for the others."""
        try:
            return Printed(values=read_values(commands, os.environ), mistake="")
        except UserMistake as mistake:
            return Printed(values={}, mistake=str(mistake))

    def _work(self) -> tuple[int, str]:
        """Take the lease, run the phase on this rank, and seal; return exit code and message."""
        kind = rehearsed_kind() if self.phase.rehearsal else find_kind(self.phase.uses)
        assert kind is not None, f"phase kind {self.phase.uses} vanished from the snapshot"
        verdicts = Verdicts(self.rank, self._meeting)
        beginning = verdicts.decide("lease", self._begin_or_say)
        if beginning["exit"] is not None:
            return self._leave(verdicts, beginning["exit"], beginning["message"])
        facts: dict[str, Any] = {}
        if not beginning["only_fan_in"]:
            task = self._task(Path(beginning["out"]))
            task.partners = tuple(beginning["folders"][name] for name in self.upstream.paired)
            config = typed_config(kind, substitute(self.phase.own_settings, beginning["folders"]))
            self._reveal_secrets(verdicts, kind.secrets(config))
            try:
                facts = kind.run(config, task) or {}
            except Stopped as stopped:
                return self._stop(verdicts, stopped)
            self.reached = task.reached
            verdicts.gather("done")
        ending = verdicts.decide("sealed", lambda: self._seal(kind, facts))
        return self._leave(verdicts, ending["exit"], ending["message"])

    def _leave(self, verdicts: Verdicts, code: int, message: str) -> tuple[int, str]:
        """End as rank 0 said, which has written down how, but for a seal: that comes last."""
        self.heard = True
        verdicts.goodbye()
        return code, message

    def _stop(self, verdicts: Verdicts, stopped: Stopped) -> tuple[int, str]:
        """Leave after a checkpoint. No rank exits before rank 0 has requeued: that would end the job."""
        words = verdicts.gather("stopped", ",".join(map(str, SIGNALS.received)))
        ending = verdicts.decide("stopped", lambda: self._stopped(stopped, words))
        return self._leave(verdicts, ending["exit"], ending["message"])

    # -- rank 0 only ---------------------------------------------------------------------------------------------

    def _begin_or_say(self) -> Beginning:
        """Begin, and write down why not where there is nothing to run."""
        beginning = self._begin()
        if beginning["exit"] not in (None, EXIT_SEALED):
            self.last_word.say(beginning["exit"] or 0, self.secrets.mask(beginning["message"]))
        return beginning

    def _begin(self) -> Beginning:
        """Read upstream seals and inputs, and take the lease; return what every rank has to know."""
        try:
            self.upstream.read()
            self.lease = self.artifact.acquire(
                self.index,
                self.owner,
                slurm_says_ended,
                self.upstream.is_outdated,
                environment=slurm_variables(os.environ),
            )
        except Sealed:
            if self.artifact.seal_path.exists() or not self.artifact.fans_in:
                print(f"{self.phase.name}[{self.index}] is sealed already")
                take_up(self.run, self.phase)
                return nothing_to_run(EXIT_SEALED, "sealed already")
            return Beginning(exit=None, message="", out="", folders=self.upstream.folders, only_fan_in=True)
        except LeaseHeld as held:
            return nothing_to_run(EXIT_LEASE_HELD, str(held))
        except UserMistake as mistake:
            return nothing_to_run(EXIT_MISTAKE, str(mistake))
        except UpstreamNotSealed as error:
            return nothing_to_run(EXIT_NO_INPUT, str(error))
        except NotNeeded as sealed:
            return nothing_to_run(EXIT_NOT_NEEDED, str(sealed))
        self.artifact.sweep(self.lease)
        print(
            f"{self.phase.name}[{self.index}] attempt {self.owner.attempt}, key {self.phase.key}, "
            f"{self.rank.world_size} rank(s) on {socket.gethostname()}",
            flush=True,
        )
        return Beginning(
            exit=None,
            message="",
            out=str(self.lease.folder),
            folders=self.upstream.folders,
            only_fan_in=False,
        )

    def _stopped(self, stopped: Stopped, words: list[str]) -> Ending:
        """Record the stop and, on Slurm, requeue where that is ours to do. `words`: the signals each rank received."""
        received = {int(number) for word in words for number in word.split(",") if number}
        before = [
            outcome
            for outcome in self.run.outcomes(self.phase.name, self.owner.attempt, self.index)
            if outcome.restart < self.owner.restart
        ]
        stops = [outcome for outcome in before if outcome.state == "stopped"]
        ends = [retry.End(Cause.STOPPED, done, stopped.unit) for done in [*(stop.done for stop in stops), stopped.done]]
        verdict = retry.decide(ends)
        message = f"{stopped}; {verdict.why}"
        slurm = Slurm(timeout_s=ASK_LIMIT_S)
        in_place = verdict.again and self.requeue and not self.phase.links  # else the next link goes on
        refusal = requeue.refusal_here(slurm, received) if in_place else "not asked for"
        if refusal and refusal != "not asked for":
            message += f" (not requeued: {refusal})"
        # Before the requeue, which has Slurm end this very process.
        self.last_word.say(EXIT_UNFINISHED, message, (stopped.done, stopped.total))
        if not refusal:
            try:
                requeue.requeue(slurm=slurm, run=self.run, phase=self.phase, attempt=self.number, ends=before)
            except SlurmError as error:
                _say(f"not requeued: {error}")
        return Ending(exit=EXIT_UNFINISHED, message=message)

    def _task(self, out: Path) -> Task:
        """Return what the phase's `run` is handed."""
        phase, index = self.phase, self.index
        keep = self.artifact.keep_folder(index, phase.elements)
        keep.mkdir(parents=True, exist_ok=True)
        return Task(
            phase=phase.name,
            index=index,
            count=phase.elements,
            value=phase.array[index] if isinstance(phase.array, list) else index,
            out=out,
            keep=keep,
            rank=self.rank.rank,
            world_size=self.rank.world_size,
            stop=SIGNALS.asked,
            lineage=self.upstream.lineage,
        )

    def _seal(self, kind: PhaseKind, facts: dict[str, Any]) -> Ending:
        """Seal the element, and merge all where it is the last."""
        sealer = Sealer(
            artifact=self.artifact,
            phase=self.phase,
            kind=kind,
            upstream=self.upstream,
            owner=self.owner,
            started=self.started,
            says_ended=slurm_says_ended,
            reveal=self._reveal_secrets,
        )
        try:
            return Ending(exit=EXIT_SEALED, message=sealer.seal(self.lease, facts))
        except TakenOver:
            self.last_word.say(EXIT_LEASE_HELD, TAKEN_OVER)
            return Ending(exit=EXIT_LEASE_HELD, message=TAKEN_OVER)


if __name__ == "__main__":
    code = main()
    stopping.hold()  # Python's shutdown gives handled signals their deadly defaults back; the exit code is decided
    sys.exit(code)
