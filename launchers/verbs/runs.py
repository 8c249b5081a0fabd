"""Does what the verbs say that submit, follow, show, repair and cancel runs."""

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from data_tools.base.printing import as_typed, set_in
from data_tools.mistake import EXIT_MISTAKE, UserMistake
from data_tools.own_packages import environment
from launchers.verbs.plans import make_plan_of, plan_here
from launchers.verbs.said import EXIT_UNFINISHED, announce, print_json, tell

if TYPE_CHECKING:
    from jobs.artifacts.run_folder import FrozenPhase, RunFolder
    from launchers.observe.status import RunStatus
    from launchers.planning.plan import Plan
    from launchers.submission.submit import Submitted
    from slurm.detect import Cluster

MOST_COLUMNS = 120  # of text, which is read badly in longer lines
CHARACTERS = 5  # of a text, that are shown for a token of --tokens
EXIT_INTERRUPTED = 130


# -- pipelines ----------------------------------------------------------------------------------------------------


def do_explain(args: argparse.Namespace) -> int:
    from launchers.observe.explain import explain, kinds
    from launchers.observe.show import console, table

    if not args.phase:
        listed = kinds()
        if args.json:
            return print_json({"phases": [{"phase": name, "about": about} for name, about in listed]})
        console().print(table(["phase", "what it does"], [list(row) for row in listed]))
        return 0
    explained = explain(args.phase, args.setting)
    if args.json:
        return print_json(explained.as_json())
    print("\n".join(explained.lines(min(shutil.get_terminal_size((MOST_COLUMNS, 24)).columns, MOST_COLUMNS))))
    if explained.how:
        print(f"\nOn the command line a setting is {explained.how}")
    return 0


def do_submit(args: argparse.Namespace) -> int:
    from launchers.submission.submit import submit

    plan = make_plan_of(args)
    if _ends_with_a_job(plan.cluster) and not args.dry_run:
        return _follow(args, plan)
    announce(plan, quiet=args.json)
    if not args.dry_run:
        plan.run.make(args.group)
    return _report_submitted(args, plan, submit(plan, args.dry_run))


def _ends_with_a_job(cluster: "Cluster") -> bool:
    """Return whether what is started on this machine ends with the batch job around it: one of a door's."""
    from slurm.exported import VARIABLE

    return cluster.kind == "local" and VARIABLE in os.environ


def _report_submitted(args: argparse.Namespace, plan: "Plan", done: "Submitted") -> int:
    """Print what a submit did, or what a dry run would do."""
    from launchers.observe.show import print_submitted

    if args.json:
        print_json(
            {
                "run": str(plan.run.path),
                "submission": done.number,
                "jobs": done.jobs,
                "profile": plan.cluster.as_json(),
                "findings": plan.as_json()["findings"],
                "active": done.active,
                "rewired": done.rewired,
                "calls": done.calls,
                "not_applied": done.not_applied,
            }
        )
    elif args.dry_run:
        print("\n".join(done.calls) or "nothing to do")
    else:
        print_submitted(plan, done)
    for line in done.not_applied:
        tell(line)
    return EXIT_UNFINISHED if done.not_applied else 0


def do_resubmit(args: argparse.Namespace) -> int:
    from launchers.observe.runs import find_run
    from launchers.planning.held import told
    from launchers.planning.recorded import recorded_pipeline
    from launchers.submission.submit import resubmit
    from slurm.detect import find_cluster

    run = find_run(args.run)
    pipeline = recorded_pipeline(run, args.overrides, os.environ)
    if args.again and args.elements:
        raise UserMistake("--again runs all elements of a phase anew: leave --elements out")
    cluster = find_cluster(pipeline.cluster, pipeline.overrides)
    if _ends_with_a_job(cluster):
        raise UserMistake(
            "cluster=local: a phase is resubmitted to a cluster; "
            "`sbatch pipeline.sbatch PIPELINE cluster=local` runs what is missing in its job"
        )
    plan = plan_here(args, pipeline, run, cluster, again=args.phase if args.again else "")
    announce(plan, quiet=args.json)
    code = _report_submitted(args, plan, resubmit(plan, args.phase, _indices(args.elements), args.dry_run))
    if not args.json and not args.dry_run and (line := told(run)):
        print(line)
    return code


def _indices(text: str | None) -> list[int] | None:
    """Return "3,7-9" as [3, 7, 8, 9], and None for None. UserMistake where it is no list of indices."""
    if text is None:
        return None
    from slurm.printed import parse_indices

    try:
        indices = sorted(set(parse_indices(text)))
    except ValueError:
        indices = []
    if not indices or "%" in text:
        raise UserMistake(f"--elements {text!r}: write indices and ranges, like 3,7-9")
    return indices


def do_repair(args: argparse.Namespace) -> int:
    from launchers.observe.runs import find_run
    from launchers.submission.repair import repair

    run = find_run(args.run)
    lines = repair(run)
    if args.json:
        return print_json({"run": str(run.path), "repaired": lines})
    print("\n".join(lines) or f"{as_typed(run.path)}: nothing to repair")
    return 0


def do_run(args: argparse.Namespace) -> int:
    return _follow(args, make_plan_of(args))


def _follow(args: argparse.Namespace, plan: "Plan") -> int:
    """Submit a plan, follow it to its end, and print a summary."""
    from launchers.observe.follow import follow
    from launchers.observe.scores import print_scores
    from launchers.observe.show import console, print_submitted, summary
    from launchers.submission.submit import submit

    run = plan.run
    announce(plan, quiet=args.json)
    run.make(args.group)
    done = submit(plan)
    if not args.json:
        print_submitted(plan, done)
    for line in done.not_applied:
        tell(line)
    try:
        status = follow(run, quiet=args.json)
    except KeyboardInterrupt:
        print(
            f"\nthe jobs go on; look again with `afterok status {as_typed(run.path)}`, "
            f"`afterok logs {as_typed(run.path)} PHASE -f`, or stop them with `afterok cancel {as_typed(run.path)}`",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    if args.json:
        print_json(status.as_json())
    else:
        console().print(summary(status))
        print_scores(run)
    return _exit_code(status, run)


def _exit_code(status: "RunStatus", run: "RunFolder") -> int:
    """Tell what is missing of a run that was followed to its end, and return what `run` exits with."""

    if status.finished:
        return 0
    failed = next((p for p in status.phases if p.failed), None)
    if failed is not None:
        said, where = failed.message or failed.reason or f"exit code {failed.exit_code}", as_typed(run.path)
        tell(f"{failed.phase} failed: {said} (log: afterok logs {where} {failed.phase}; more: afterok why {where})")
        return EXIT_MISTAKE if failed.exit_code == EXIT_MISTAKE else EXIT_UNFINISHED
    for note in status.notes:
        tell(note)
    tell(f"{as_typed(run.path)} is not finished; `afterok submit` goes on with what is missing")
    return EXIT_UNFINISHED


# -- runs ---------------------------------------------------------------------------------------------------------


def do_status(args: argparse.Namespace) -> int:
    from launchers.observe.follow import follow
    from launchers.observe.runs import find_run
    from launchers.observe.status import run_status

    run = find_run(args.run)
    if args.watch:
        try:
            status = follow(run, quiet=args.json)
        except KeyboardInterrupt:
            return 0
    else:
        status = run_status(run)
    code = EXIT_MISTAKE if status.unasked and not status.finished else 0
    if args.json:
        print_json(status.as_json())
        return code
    from launchers.observe.show import console, sealed_line, status_table

    console().print(status_table(status))
    if line := sealed_line(status):
        print(line)
    if status.where:
        print(status.where)
    if status.overrides:
        print(status.overrides)
    for note in status.notes:
        tell(note)
    return code


def do_why(args: argparse.Namespace) -> int:
    from launchers.observe.runs import run_and_phase
    from launchers.observe.why import why

    run, phase = run_and_phase(args.words)
    report = why(run, phase)
    if args.json:
        return print_json(report.as_json())
    for line in [report.headline, report.given_up, *(f.sentence for f in report.findings), *report.notes]:
        if line:
            print(set_in(line))
    return 0


def do_ls(args: argparse.Namespace) -> int:
    from launchers.observe.runs import list_runs

    if not args.folder.is_dir():
        raise UserMistake(f"{args.folder} is no folder; name the one that your runs are in: afterok ls DIR")
    runs = list_runs(args.folder)
    if args.json:
        return print_json({"runs": [run.as_json() for run in runs]})
    from launchers.observe.show import console, runs_table

    if runs:
        console().print(runs_table(runs))
    else:
        inner = args.folder / "runs"
        beside = f"; those below {as_typed(inner)}: afterok ls {as_typed(inner)}" if list_runs(inner) else ""
        print(f"no runs below {args.folder}{beside}")
    return 0


def do_logs(args: argparse.Namespace) -> int:
    from launchers.observe.logs import show_log
    from launchers.observe.runs import find_run

    phase, _, index = args.phase.partition(":")
    if index and not index.isdigit():
        raise UserMistake(f"{args.phase!r}: write PHASE or PHASE:INDEX with a number")
    if args.replay:
        return _replay(find_run(args.run), phase, args.replay)
    try:
        show_log(find_run(args.run), phase, int(index) if index else None, args.follow)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def _replay(run: "RunFolder", phase: str, rollout: str) -> int:
    """Draw a rollout again, in a process of its own, since it imports torch; where that cannot be and the journal was
    cleaned, say so."""
    from launchers.submission.clean import when_cleaned

    command = [sys.executable, "-m", "jobs.replay", str(run.path), phase, rollout]
    code = subprocess.run(command, env={**os.environ, **environment(os.environ)}).returncode
    if code == EXIT_MISTAKE and (cleaned := when_cleaned(run, phase, "journals")) is not None:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(cleaned))
        tell(f"`afterok clean` deleted what {phase} had recorded of its rollouts, the journals, at {when}")
    return code


def do_inspect(args: argparse.Namespace) -> int:
    from launchers.observe.evaluated import KINDS
    from launchers.observe.inspect import inspect
    from launchers.observe.runs import find_run
    from launchers.observe.sampled import GRPO, SAMPLED
    from launchers.observe.show import print_inspection

    run = find_run(args.run)
    phase = run.frozen(run.newest_submission()).get(args.phase)
    if phase is not None and phase.uses in (GRPO, *SAMPLED, *KINDS):
        return _inspect_samples(args, run, phase)
    if args.step is not None:
        raise UserMistake(f"--step {args.step}: only of a grpo phase")
    inspection = inspect(
        run,
        args.phase,
        count=max(args.documents, 0),
        pack=args.pack,
        seed=args.seed,
        limit=max(args.tokens, 1),
    )
    if args.json:
        return print_json(inspection)
    print_inspection(inspection)
    return 0


def _inspect_samples(args: argparse.Namespace, run: "RunFolder", phase: "FrozenPhase") -> int:
    """Show what a phase sampled, prompt by prompt."""
    from launchers.observe.evaluated import KINDS, inspect_evaluation
    from launchers.observe.sampled import inspect_samples
    from launchers.observe.show import print_samples

    if args.pack is not None:
        raise UserMistake(f"--pack {args.pack}: {args.phase} is a {phase.uses} phase, which has no packs")
    characters = CHARACTERS * max(args.tokens, 1)
    shown = (inspect_evaluation if phase.uses in KINDS else inspect_samples)(
        run, phase, step=args.step, count=max(args.documents, 0), seed=args.seed, characters=characters
    )
    if args.json:
        return print_json(asdict(shown))
    print_samples(shown)
    return 0


def do_cancel(args: argparse.Namespace) -> int:
    from launchers.observe.runs import find_run
    from launchers.submission.cancel import cancel

    run = find_run(args.run)
    done = cancel(run, args.phases)
    if args.json:
        return print_json({"run": str(run.path), "cancelled": done.jobs, "notes": done.notes})
    print(f"cancelled {', '.join(done.jobs)}" if done.jobs else f"{as_typed(run.path)}: nothing is active")
    for note in done.notes:
        tell(note)
    return 0
