"""Judges between two lives of an element: what ended the last one, and whether its Slurm job runs again in place.

    python -m launchers.backends.restart RUN PHASE INDEX --submission N [--code C]

The batch script calls it after an srun that ended with code C, and (without --code) before that of a job which Slurm
started again. A worker that stops when asked to requeues by itself (jobs/worker.py); here are the ends that no worker
can speak of: killed, out of memory, a lost node. Budgets are those of jobs/retry.py; the local driver uses them too.

The node that failed is excluded from the next start, that one alone, and only where the partition has others.
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("launchers", 1)[0] + "data_tools/own_packages.py")["hold"]()

import argparse
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from jobs import requeue, retry
from jobs.artifacts.run_folder import FrozenPhase, Outcome, RunFolder
from jobs.retry import Cause, End, Verdict
from launchers.causes.diagnosis import classify
from launchers.causes.evidence import Diagnosis, Evidence
from launchers.causes.states import FAILED, UNKNOWN
from launchers.causes.traces import lease_time, log_tail, requested
from launchers.planning import chain
from slurm.client import Slurm, SlurmError, job_element
from slurm.printed import format_indices, parse_minutes
from slurm.profile.files import load

EXIT_GIVEN_UP = 7  # of this program, before an srun: the element has used up its restarts


@dataclass(frozen=True)
class Life:
    """One start of one element."""

    run: RunFolder
    phase: FrozenPhase
    index: int
    attempt: int  # the submission whose plan it runs
    script: int  # the submission whose script runs it
    restart: int

    @property
    def log(self) -> Path:
        """Return the log of this life and of the others of its script."""
        return self.run.log_path(self.phase.name, self.script, self.index)

    def outcomes(self) -> list[Outcome]:
        """Return how the lives of this attempt at the element ended, up to this one, oldest first.

        A twin that left the work to another lived no life.
        """
        return [
            outcome
            for outcome in self.run.outcomes(self.phase.name, self.attempt, self.index)
            if outcome.state != "skipped" and outcome.restart <= self.restart
        ]

    def outcome(self) -> Outcome | None:
        """Return how this life ended, None where nobody said so."""
        return next((outcome for outcome in self.outcomes() if outcome.restart == self.restart), None)


def judge(life: Life, code: int | None, on_slurm: bool = True) -> Verdict:
    """Say whether the element runs again after this life; an end that its worker did not record is recorded first."""
    if code == retry.EXIT_LEASE_HELD:
        return Verdict(False, Cause.LEASE_HELD)  # a twin: it left the work to another, who speaks for it
    if life.outcome() is None:
        _record(life, code, _diagnose(life, code, FAILED, on_slurm=on_slurm))
    return _verdict(life)


def _verdict(life: Life) -> Verdict:
    """Ask the policy whether the element runs again after this life and those before it."""
    return retry.decide([_end(outcome) for outcome in life.outcomes()])


def _diagnose(
    life: Life, code: int | None, state: str, down_nodes: tuple[str, ...] = (), on_slurm: bool = True
) -> Diagnosis:
    """Read from what a life left why it ended."""
    name = life.phase.name
    script = life.run.script_path(life.script, name)
    return classify(
        Evidence(
            phase=name,
            index=life.index,
            state=state,
            exit_code=code,
            log=log_tail(life.log, name, life.index),
            log_path=str(life.log),
            log_folder_exists=life.log.parent.is_dir(),
            on_slurm=on_slurm,
            asked_memory=requested(script).get("mem", ""),
            down_nodes=down_nodes,
        )
    )


def _record(life: Life, code: int | None, diagnosis: Diagnosis) -> None:
    """Record the last word of a life that left none.

    Without `code` it ended some time ago and elsewhere: when it wrote last.
    """
    cause = retry.told_by(code or 0) or (diagnosis.cause if diagnosis.certain else Cause.UNKNOWN)
    started = lease_time(life.run.artifact(life.phase), life.index, life.attempt, life.restart) or time.time()
    here = os.environ.get("SLURMD_NODENAME", "") if code is not None else diagnosis.node
    ended = time.time() if code is not None or not life.log.exists() else max(started, life.log.stat().st_mtime)
    life.run.record_outcome(
        life.phase.name,
        Outcome(
            element=life.index,
            attempt=life.attempt,
            restart=life.restart,
            state="failed",
            exit_code=retry.EXIT_FAILED if code is None else code,
            message=f"{diagnosis.what}: {diagnosis.evidence}",
            host=here,
            job=job_element(os.environ),
            started=started,
            ended=ended,
            key=life.phase.key,
            cause=cause,
            node=diagnosis.node,
        ),
    )


def _end(outcome: Outcome) -> End:
    """Return an outcome in the policy's terms; of a worker's own last words the exit code or the exception tells."""
    cause = Cause(outcome.cause) if outcome.cause else retry.told_by(outcome.exit_code)
    return End(cause or classify(Evidence("", exit_code=outcome.exit_code, outcome=outcome)).cause, outcome.done)


# -- on Slurm -----------------------------------------------------------------------------------------------------


def after(life: Life, code: int, slurm: Slurm, for_worker: bool = False) -> None:
    """Run the job of a life that ended with `code` again in place, where that is safe and its budget allows.

    `for_worker`: its worker could not ask for that itself where it stopped, inside a container.
    """
    if life.phase.links:
        return _after_link(life, code, slurm)
    if retry.told_by(code) is not None and not (for_worker and code == retry.EXIT_UNFINISHED):
        return  # the worker has spoken, and acted
    verdict = judge(life, code)
    refusal = requeue.refusal_here(slurm, ()) if verdict.again else ""
    _say(life, verdict.why + (f" (not requeued: {refusal})" if refusal else ""))
    if verdict.again and not refusal:
        requeue.requeue(slurm, life.run, life.phase, attempt=life.attempt, ends=life.outcomes())


def _after_link(life: Life, code: int, slurm: Slurm) -> None:
    """Cancel the later links of a chain that are not needed, after one that ended with `code`.

    The last link stays: it tells the dependents how it went, and Slurm takes the dependency on a task that was
    cancelled before it started for satisfied (seen with 22.05).
    """
    job, link, last = _link(os.environ)
    needed = 1
    if code != retry.EXIT_SEALED:
        verdict = judge(life, code)
        if verdict.again:
            profile = load(str(life.run.profile_path(life.attempt)))
            limit_s = 60 * parse_minutes(slurm.job(f"{job}_{link}")["TimeLimit"])
            outcomes = life.run.outcomes(life.phase.name)
            needed = chain.links_needed(life.phase, outcomes, limit_s - profile.signal_lead_s)
            ends = life.outcomes()
            nodes = requeue.to_exclude(slurm, life.run, life.phase, attempt=life.attempt, ends=ends)
            if nodes and link < last:
                slurm.exclude(f"{job}_[{link + 1}-{last}]", nodes)
        plan = f"{needed} more links would do, {last - link} are left" if verdict.again else "no further link"
        _say(life, f"{verdict.why}; {plan}" + (": `afterok submit` appends" if needed > max(last - link, 1) else ""))
    dropped = chain.surplus(link, last, needed)
    if dropped:
        slurm.cancel([f"{job}_[{format_indices(dropped)}]"])


def _link(env: Mapping[str, str]) -> tuple[str, int, int]:
    """Return this job as a link: (the array's id, its own number, the number of the last)."""
    return env["SLURM_ARRAY_JOB_ID"], int(env["SLURM_ARRAY_TASK_ID"]), int(env["SLURM_ARRAY_TASK_MAX"])


def before(life: Life, slurm: Slurm) -> int:
    """Return 0 where a later life may begin, else EXIT_GIVEN_UP.

    A life that Slurm itself ended left no word, so that is looked for now.
    """
    last = replace(life, restart=life.restart - 1)
    silent = last.outcome() is None and _record_silent_end(last, slurm)
    ends = last.outcomes()
    if not ends or ends[-1].state in ("sealed", "stopped") or not (silent or life.phase.links):
        # nothing is known against it: its worker, `after`, or whoever had Slurm start it again meant it to go on
        return 0
    verdict = _verdict(last)
    _say(last, f"{ends[-1].message}; {verdict.why}")
    if verdict.again and silent and life.phase.links:
        job, link, last_link = _link(os.environ)
        nodes = requeue.to_exclude(slurm, life.run, life.phase, attempt=life.attempt, ends=ends)
        if nodes and link < last_link:
            slurm.exclude(f"{job}_[{link + 1}-{last_link}]", nodes)
    return 0 if verdict.again else EXIT_GIVEN_UP


def _record_silent_end(last: Life, slurm: Slurm) -> bool:
    """Write down why Slurm ended a life; return False where it was not Slurm."""
    down = tuple(slurm.down_nodes(nodes)) if (nodes := _nodes_of(last)) else ()
    state = "NODE_FAIL" if down else UNKNOWN
    if last.phase.links:
        row = slurm.job_row(f"{_link(os.environ)[0]}_{last.restart}")
        state = row.state if row is not None else state
    diagnosis = _diagnose(last, None, state, down)
    if diagnosis.cause not in (Cause.NODE, Cause.PREEMPTED, Cause.TIME_LIMIT):
        return False  # it never began, or somebody had Slurm start it again
    _record(last, None, diagnosis)
    return True


def _nodes_of(life: Life) -> str:
    """Return the nodes an earlier life ran on, as Slurm names them together ("n[1-4]"); "" where nothing is known."""
    told = life.run.environment(life.phase, life.index, life.attempt, life.restart)
    return str(told.get("SLURM_JOB_NODELIST", ""))


def _restart(phase: FrozenPhase, env: Mapping[str, str]) -> int:
    """Return how often this element was started before in this attempt."""
    return int(env.get("SLURM_ARRAY_TASK_ID" if phase.links else "SLURM_RESTART_COUNT", "0"))


def _say(life: Life, line: str) -> None:
    print(f"afterok: {life.phase.name}[{life.index}] restart {life.restart}: {line}", file=sys.stderr, flush=True)


def main() -> int:
    """Do what the batch script asks for; only a budget that is used up keeps an element from its work."""
    parser = argparse.ArgumentParser(prog="python -m launchers.backends.restart", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("phase")
    parser.add_argument("index", type=int)
    parser.add_argument("--submission", type=int, required=True)
    parser.add_argument("--code", type=int, help="how its srun ended (absent: it has not begun)")
    parser.add_argument("--requeue", action="store_true", help="its worker could not: it ran in a container")
    args = parser.parse_args()
    run = RunFolder(args.run)
    attempt = run.redirected(args.submission, args.phase)
    phase = run.frozen(attempt)[args.phase]
    life = Life(
        run=run,
        phase=phase,
        index=args.index,
        attempt=attempt,
        script=args.submission,
        restart=_restart(phase, os.environ),
    )
    try:
        if args.code is None:
            return before(life, Slurm())
        after(life, args.code, Slurm(), for_worker=args.requeue)
    except SlurmError as error:
        _say(life, str(error))
    except Exception:  # nothing of this may keep an element from its work
        traceback.print_exc()
    return 0


if __name__ == "__main__":
    sys.exit(main())
