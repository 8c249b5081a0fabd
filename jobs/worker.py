"""One array element of one phase, run the same by Slurm, by the local driver and by hand.

    python -m jobs.worker RUN PHASE [INDEX] [--submission N]

Checks the upstream seals, takes the lease, runs the phase on all ranks of the element, seals, and fans in when it
finds all other elements sealed. Exits 0 only when the element's seal is on disk (EXIT_* of jobs/retry.py otherwise).

Asked to stop (jobs/stopping.py), a phase that can leaves a checkpoint; the worker then exits EXIT_UNFINISHED on all
ranks. With --requeue, which the batch script says, rank 0 first has Slurm run the element again in place, where Slurm
does not do so by itself.
"""

from jobs.stopping import StopSignals

SIGNALS = StopSignals()
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
from pathlib import Path
from typing import Any

from data_tools.base.durable import TornFile
from data_tools.base.rendezvous import Meeting
from data_tools.mistake import EXIT_MISTAKE, UserMistake, disk_problem
from data_tools.progress import Stopped
from jobs import requeue, retry, stopping
from jobs.artifacts import standing
from jobs.artifacts.artifact import (
    FINISH,
    Artifact,
    HashCache,
    Lease,
    LeaseHeld,
    LeaseName,
    Owner,
    Seal,
    Sealed,
    content_digest,
    read_seal,
)
from jobs.artifacts.run_folder import FrozenPhase, Outcome, RunFolder
from jobs.kind import PhaseKind, find_kind
from jobs.ranks import SPAWN_VARIABLE, Rank, Verdicts, rank_from_environment, spawn_ranks, torch_environment
from jobs.retry import EXIT_FAILED, EXIT_LEASE_HELD, EXIT_NO_INPUT, EXIT_NOT_NEEDED, EXIT_SEALED, EXIT_UNFINISHED, Cause
from jobs.schema.pipeline import NEED_SEALS, substitute, typed_config
from jobs.secrets import Secrets, commands_among, read_values, reveal
from jobs.task import Task
from slurm.client import Slurm, SlurmError
from slurm.printed import ENDED_STATES
from slurm.profile.files import load
from slurm.profile.schema import Profile

ASK_LIMIT_S = 10.0  # for one question to Slurm by a worker that has to leave soon
TAKEN_OVER = "a newer attempt took this element over"
# What tells one start of an element from another; the same for all of its ranks.
START_VARIABLES = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", SPAWN_VARIABLE)
FULL_BELOW = 1 << 20  # bytes left on the run's filesystem at which a failure is put down to a full disk


class UpstreamNotSealed(Exception):
    """A phase this one needs has no seal, whatever Slurm thought of its job."""


class NotNeeded(Exception):
    """A phase whose failure this one was to follow is sealed, whatever became of its job."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.worker", description=__doc__.splitlines()[0])
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
        index = args.index if args.index is not None else int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
        if not 0 <= index < phase.elements:
            raise UserMistake(f"phase {phase.name} has elements 0 to {phase.elements - 1}, not {index}")
    except (UserMistake, TornFile) as mistake:
        print(f"afterok: {mistake}", file=sys.stderr)
        return EXIT_MISTAKE
    rank = rank_from_environment(os.environ, phase.ranks)
    if rank is None:
        command = _command(run, phase.name, index, number, args.requeue)
        return spawn_ranks(command, phase.ranks, phase.gpus_per_node)
    os.environ.update(torch_environment(rank, phase.gpus_per_node))
    return Worker(run, number, phases, phase, index, rank, args.requeue).work()


def _submission(run: RunFolder, args: argparse.Namespace) -> int:
    """The submission to run. A job that a later submission rewired starts itself over with that one's code."""
    number = args.submission or run.newest_submission()
    to = run.redirected(number, args.phase)
    if to == number:
        return number
    os.environ["PYTHONPATH"] = str(run.submission_folder(to) / "code")
    stopping.hold()  # a handler does not outlive exec, a held signal does
    os.execv(sys.executable, _command(run, args.phase, args.index, to, args.requeue))


def _command(run: RunFolder, phase: str, index: int | None, number: int, requeue: bool) -> list[str]:
    command = [sys.executable, "-m", "jobs.worker", str(run.path), phase, *([] if index is None else [str(index)])]
    return [*command, "--submission", str(number), *(["--requeue"] if requeue else [])]


def slurm_says_ended(job: str) -> bool:
    """True only when Slurm itself lists the job as ended; silence proves nothing."""
    try:
        return any(job == row.job_id and row.state in ENDED_STATES for row in Slurm().queue())
    except (SlurmError, UserMistake, OSError):
        return False


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the log may lie on the disk that is full
        print(f"afterok: {line}", file=sys.stderr, flush=True)


def restart_count(artifact: Artifact, index: int, attempt: int, chained: bool = False) -> int:
    """How often this element was restarted in this attempt: Slurm's count, its link, or the local driver's count.

    By hand nobody counts: the newest restart there was is joined, whose owner must then be provably dead.
    """
    if chained and "SLURM_ARRAY_TASK_ID" in os.environ:
        return int(os.environ["SLURM_ARRAY_TASK_ID"])
    if "SLURM_RESTART_COUNT" in os.environ:
        return int(os.environ["SLURM_RESTART_COUNT"])
    names = [LeaseName.of(path) for path in (artifact.folder / "leases").glob(f"{index:04d}.a{attempt}.*")]
    return max((name.restart for name in names if name is not None), default=0)


class Worker:
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
        self.run, self.number, self.phases, self.phase, self.index, self.rank = run, number, phases, phase, index, rank
        self.artifact: Artifact = run.artifact(phase)
        self.requeue = requeue
        restart = restart_count(self.artifact, index, number, chained=bool(phase.links))
        self.owner = Owner.me(number, restart, os.environ.get("SLURM_JOB_ID", ""))
        self.started = time.time()
        self.lease: Lease | None = None
        self.upstream: dict[str, Seal] = {}
        self.paired = standing.partners(phase, phases)
        self.secrets = Secrets({})
        self.revealed = False
        self.reached: tuple[int | None, int | None] = (None, None)  # steps done and in all, where the phase told

    def work(self) -> int:
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
        states = {
            EXIT_SEALED: "sealed",
            EXIT_MISTAKE: "mistake",
            EXIT_LEASE_HELD: "skipped",
            EXIT_NOT_NEEDED: "skipped",
            EXIT_UNFINISHED: "stopped",
        }
        if code != EXIT_SEALED:
            _say(f"{self.phase.name}[{self.index}]: {message}")
        if code != EXIT_SEALED or self.rank.rank == 0:
            done, total = self.reached if code == EXIT_SEALED else (None, None)
            self._record_outcome(states.get(code, "failed"), code, message, done, total)
        if code not in (EXIT_SEALED, EXIT_LEASE_HELD, EXIT_NOT_NEEDED):
            # Other ranks may sit in a collective with this one: leave without waiting for them.
            self.secrets.close_output()
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
        return code

    def _failure(self, error: Exception) -> tuple[int, str]:
        """A disk's refusal is one line; anything else has its traceback in the log."""
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

    def _record_outcome(
        self, state: str, code: int, message: str, done: int | None = None, total: int | None = None
    ) -> None:
        try:
            self.run.record_outcome(
                self.phase.name,
                Outcome(
                    self.index,
                    self.owner.attempt,
                    self.owner.restart,
                    state,
                    code,
                    message,
                    socket.gethostname(),
                    self.owner.job,
                    self.started,
                    done=done,
                    total=total,
                    key=self.phase.key,
                ),
            )
        except OSError as error:  # the log and the exit code say it all the same
            _say(f"outcome not recorded: {disk_problem(error) or error}")

    def _profile(self) -> Profile:
        return load(str(self.run.submission_folder(self.number) / "profile.yaml"))

    def _meeting(self) -> Meeting:
        """Return where the ranks of this start of this element meet."""
        low, high = self._profile().network.port_range
        start = [os.environ.get(name, "") for name in START_VARIABLES]
        name = "/".join(
            [str(self.run.path), self.phase.name, self.phase.key, str(self.index), str(self.number), *start]
        )
        promised = int(os.environ["MASTER_PORT"])  # to a phase that calls torch.distributed itself
        key = self.run.meeting_key(self.number)
        return Meeting(
            os.environ["MASTER_ADDR"],
            range(low, high + 1),
            name,
            key,
            promised,
            str(self.run.meeting_key_path(self.number)),
        )

    def _reveal_secrets(self, verdicts: Verdicts | None = None) -> None:
        """The profile's secrets into this rank's environment: after the lease, just before the phase's own code."""
        if self.revealed:  # the fan-in of a rank that ran an element: a command may print another value each time
            return
        self.revealed = True
        references = self._profile().env.secrets
        commands = commands_among(references)
        printed = verdicts.hand_over("secrets", lambda: self._run_for_all(commands)) if verdicts and commands else {}
        if "mistake" in printed:
            raise UserMistake(printed["mistake"])
        self.secrets = reveal(references, printed.get("values", {}))

    @staticmethod
    def _run_for_all(commands: dict[str, str]) -> dict[str, Any]:
        try:
            return {"values": read_values(commands, os.environ)}
        except UserMistake as mistake:  # every rank's: none may wait for the others
            return {"mistake": str(mistake)}

    def _work(self) -> tuple[int, str]:
        kind = find_kind(self.phase.uses)
        assert kind is not None, f"phase kind {self.phase.uses} vanished from the snapshot"
        verdicts = Verdicts(self.rank, self._meeting)
        lease = verdicts.decide("lease", self._begin)
        if lease["exit"] is not None:
            verdicts.goodbye()
            return lease["exit"], lease["message"]
        if not lease["only_fan_in"]:
            task = self._task(self.index, Path(lease["out"]))
            config = typed_config(kind, substitute(self.phase.settings, lease["folders"]))
            self._reveal_secrets(verdicts)
            try:
                facts = kind.run(config, task) or {}
            except Stopped as stopped:
                return self._stop(verdicts, stopped)
            self.reached = task.reached
            verdicts.gather("done")
        else:
            facts = {}
        sealed = verdicts.decide("sealed", lambda: self._seal(kind, facts, lease))
        verdicts.goodbye()
        return sealed["exit"], sealed["message"]

    def _stop(self, verdicts: Verdicts, stopped: Stopped) -> tuple[int, str]:
        """Leave after a checkpoint. No rank exits before rank 0 has requeued: that would end the job."""
        words = verdicts.gather("stopped", ",".join(map(str, SIGNALS.received)))
        verdict = verdicts.decide("stopped", lambda: self._stopped(stopped, words))
        verdicts.goodbye()
        return EXIT_UNFINISHED, verdict["message"]

    # -- rank 0 only ---------------------------------------------------------------------------------------------

    def _begin(self) -> dict[str, Any]:
        """Upstream seals, inputs and the lease; what every rank has to know."""
        nothing = {"out": "", "folders": {}, "only_fan_in": False}
        try:
            self._read_upstream()
            folders = {name: str(self._folder_of(name)) for name in self.phase.needs}
            self.lease = self.artifact.acquire(self.index, self.owner, slurm_says_ended, self._is_outdated)
        except Sealed:
            if self.artifact.seal_path.exists() or not self.artifact.fans_in:
                print(f"{self.phase.name}[{self.index}] is sealed already")
                return {"exit": EXIT_SEALED, "message": "sealed already", **nothing}
            return {"exit": None, "message": "", **nothing, "folders": folders, "only_fan_in": True}
        except LeaseHeld as held:
            return {"exit": EXIT_LEASE_HELD, "message": str(held), **nothing}
        except UserMistake as mistake:
            return {"exit": EXIT_MISTAKE, "message": str(mistake), **nothing}
        except UpstreamNotSealed as error:
            return {"exit": EXIT_NO_INPUT, "message": str(error), **nothing}
        except NotNeeded as sealed:
            return {"exit": EXIT_NOT_NEEDED, "message": str(sealed), **nothing}
        self.artifact.sweep(self.lease)
        self.run.record_environment(self.phase.name, self.index, self.owner, os.environ)
        print(
            f"{self.phase.name}[{self.index}] attempt {self.owner.attempt}, key {self.phase.key}, "
            f"{self.rank.world_size} rank(s) on {socket.gethostname()}",
            flush=True,
        )
        return {"exit": None, "message": "", "out": str(self.lease.folder), "folders": folders, "only_fan_in": False}

    def _stopped(self, stopped: Stopped, words: list[str]) -> dict[str, Any]:
        """Record the stop and, on Slurm, requeue where that is ours to do. `words`: the signals each rank received."""
        received = {int(number) for word in words for number in word.split(",") if number}
        before = [
            outcome
            for outcome in self.run.outcomes(self.phase.name, self.owner.attempt)
            if outcome.element == self.index and outcome.restart < self.owner.restart
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
        self._record_outcome("stopped", EXIT_UNFINISHED, message, stopped.done, stopped.total)
        if not refusal:
            try:
                requeue.requeue(slurm, self.run, self.phase, self.number, before)
            except SlurmError as error:
                _say(f"not requeued: {error}")
        return {"message": message}

    def _read_upstream(self) -> None:
        cache = HashCache()
        for name, type_ in self.phase.needs.items():
            path = self._upstream_path(name, self.index)
            seal = read_seal(path)
            if type_ == "afternotok" and seal is not None:
                raise NotNeeded(f"not needed: {name} is sealed")
            if type_ == "singleton" or (seal is None and type_ not in NEED_SEALS):
                continue
            if seal is None:
                raise UpstreamNotSealed(
                    f"needs {name}, which has no seal at {path}; see `afterok status {self.run.path}`"
                )
            seal.verify(cache=cache)
            self.upstream[name] = seal
        for path, digest in self.phase.inputs.items():
            if not Path(path).exists():
                raise UserMistake(f"input {path} is gone since it was submitted; restore it and submit again")
            if content_digest(Path(path), cache) != digest:
                raise UserMistake(f"input {path} changed since it was submitted (sha256 {digest[:12]}…); submit again")

    def _upstream_path(self, name: str, index: int) -> Path:
        """The seal that element `index` reads of a phase it needs."""
        up = self.run.artifact(self.phases[name])
        return up.element_seal_path(index) if name in self.paired else up.seal_path

    def _upstream_digests(self) -> dict[str, str]:
        return {name: seal.digest for name, seal in self.upstream.items()}

    def _is_outdated(self, seal: Seal) -> bool:
        """Whether a seal of this element, or of the phase, speaks of other results than those this element found."""
        return bool(standing.other_results(seal, self._upstream_digests(), self.index, self.paired))

    def _folder_of(self, name: str) -> Path:
        seal = self.upstream.get(name)
        return seal.folder if seal else self.run.artifact(self.phases[name]).folder

    def _task(self, index: int, out: Path) -> Task:
        count = self.phase.elements
        keep = self.artifact.folder if count == 1 else self.artifact.folder / "elements" / f"{index:04d}"
        keep.mkdir(parents=True, exist_ok=True)
        value = self.phase.array[index] if isinstance(self.phase.array, list) else index
        return Task(
            self.phase.name, index, count, value, out, keep, self.rank.rank, self.rank.world_size, SIGNALS.asked
        )

    def _seal(self, kind: PhaseKind, facts: dict[str, Any], lease: dict[str, Any]) -> dict[str, Any]:
        if not lease["only_fan_in"] and not self.artifact.seal(self.lease, self._record(facts)):
            return self._lost_to_twin()
        if self.artifact.fans_in and len(self.artifact.sealed_elements()) == self.phase.elements:
            self._fan_in(kind)
        return {"exit": EXIT_SEALED, "message": "sealed"}

    def _lost_to_twin(self) -> dict[str, Any]:
        """A newer owner took over, or a twin sealed first: only the latter means that the work is done."""
        done = self.artifact.seal_path.exists() or (
            self.artifact.fans_in and self.artifact.element_seal_path(self.index).exists()
        )
        if done:
            return {"exit": EXIT_SEALED, "message": "a twin sealed first"}
        return {"exit": EXIT_LEASE_HELD, "message": TAKEN_OVER}

    def _fan_in(self, kind: PhaseKind) -> None:
        """Merge the elements into the phase's seal: what it says is the same whichever of them comes last."""
        parts = [read_seal(self.artifact.element_seal_path(i)) for i in range(self.phase.elements)]
        waits = next((i for i, part in enumerate(parts) if part is None or not self._is_current(i, part)), None)
        if waits is not None:
            print(f"{self.phase.name}[{waits}] is to be sealed anew, then all are merged")
            return
        digests = [part.digest for part in parts]
        try:
            lease = self.artifact.acquire(FINISH, self.owner, slurm_says_ended, lambda seal: seal.parts != digests)
        except (Sealed, LeaseHeld):
            return  # another element's task finishes, or has finished
        try:
            self._merge(kind, lease, parts)
        except Exception:
            if self.artifact.still_mine(lease):
                raise
            print(f"{self.phase.name}: a newer attempt merges the elements")  # and has swept our folder

    def _merge(self, kind: PhaseKind, lease: Lease, parts: list[Seal]) -> None:
        self.artifact.sweep(lease)
        for part in parts:
            part.verify()
        folders = {name: str(self._folder_of(name)) for name in self.phase.needs}
        for name in self.paired:  # it may be any element's, but always the same one's
            partner = read_seal(self._upstream_path(name, 0))
            if partner is None:
                raise UpstreamNotSealed(f"needs {name}, whose element 0 has no seal any more; submit again")
            folders[name] = str(partner.folder)
        config = typed_config(kind, substitute(self.phase.settings, folders))
        keep = self.artifact.folder
        self._reveal_secrets()
        task = Task(self.phase.name, 0, self.phase.elements, None, lease.folder, keep, 0, 1)
        facts = kind.finish([part.folder for part in parts], config, task) or {}
        self.artifact.seal(
            lease,
            self._record(facts)
            | {"parts": [part.digest for part in parts], "upstream": standing.whole_upstream(parts, self.paired)},
        )

    def _is_current(self, index: int, part: Seal) -> bool:
        """False for an element's seal of an earlier submission over other results: its task in this one is to come."""
        if part.submission >= self.number:
            return True
        now = self._upstream_digests()
        for name in self.paired:
            partner = read_seal(self._upstream_path(name, index))
            if partner is None:
                return False
            now[name] = partner.digest
        return not standing.other_results(part, now, index, self.paired)

    def _record(self, facts: dict[str, Any]) -> dict[str, Any]:
        self.secrets.refuse_in(facts, f"{self.phase.name}: facts")
        return {
            "phase": self.phase.name,
            "uses": self.phase.uses,
            "key": self.phase.key,
            "material": self.phase.material,
            "submission": self.number,
            "restart": self.owner.restart,
            "job": self.owner.job,
            "upstream": self._upstream_digests(),
            "ranks": self.phase.ranks,
            "started_at": self.started,
            "facts": facts,
        }


if __name__ == "__main__":
    code = main()
    stopping.hold()  # Python's shutdown gives handled signals their deadly defaults back; the exit code is decided
    sys.exit(code)
