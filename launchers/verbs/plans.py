"""Makes the plan of a command line, and does what `afterok plan` says: a plan with its costs and predicted starts, a
parallel plan, or Megatron's flags.
"""

import argparse
import os
from typing import TYPE_CHECKING

from data_tools.mistake import EXIT_MISTAKE, UserMistake
from launchers.verbs.said import announce, print_json, tell

if TYPE_CHECKING:
    from jobs.artifacts.run_folder import RunFolder
    from jobs.schema.pipeline import Pipeline
    from launchers.planning.plan import Plan
    from slurm.detect import Cluster


def make_plan_of(args: argparse.Namespace, only_plan: bool = False) -> "Plan":
    """Return the plan of a command line; with `only_plan` a profile is enough where no Slurm is configured."""
    from jobs.schema.pipeline import load_pipeline
    from launchers.planning.planner import default_run_folder
    from slurm.detect import find_cluster

    pipeline = load_pipeline(args.pipeline, args.overrides, os.environ)
    pipeline.rehearsed = _rehearsed(args)
    run = default_run_folder(pipeline, args.run)
    cluster = find_cluster(pipeline.cluster, pipeline.overrides, only_plan)
    return plan_here(args, pipeline, run, cluster)


def _rehearsed(args: argparse.Namespace) -> float:
    """Return the share of its time that each phase sleeps, 0 where it is no rehearsal."""
    rehearse, share = getattr(args, "rehearse", False), getattr(args, "rehearse_scale", None)
    if share is not None and not rehearse:
        raise UserMistake(
            f"--rehearse-scale {share:g} without --rehearse would submit the real thing; say --rehearse too"
        )
    return (share or 0.001) if rehearse else 0.0


def plan_here(
    args: argparse.Namespace, pipeline: "Pipeline", run: "RunFolder", cluster: "Cluster", again: str = ""
) -> "Plan":
    """Make the plan, with what the command line waives; what is refused is printed with --json too, then raised."""
    from launchers.planning.planner import make_plan
    from slurm.checks import finding

    pipeline.waive = list(dict.fromkeys([*pipeline.waive, *args.waive]))
    verify = getattr(args, "verify", False)
    try:
        return make_plan(pipeline, run, cluster, verify=verify, again=again, budget=args.budget)
    except UserMistake as mistake:
        if args.json:
            print_json({"refused": [finding(problem) for problem in mistake.problems]})
        raise


def do_plan(args: argparse.Namespace) -> int:
    if args.from_megatron is not None:
        return _from_megatron(args)
    if args.pipeline is None:
        raise UserMistake("plan needs a pipeline file, or --from-megatron FLAGS")
    if args.parallel:
        return _plan_parallel(args)
    if args.search:
        raise UserMistake("--search is about one phase: give --parallel PHASE too")
    return _show(args, make_plan_of(args, only_plan=True))


def _show(args: argparse.Namespace, plan: "Plan") -> int:
    """Print a plan, with what of it was asked for: scripts, and how it differs from what was submitted before."""
    from launchers.observe.foresee import differences, predicted_starts, scripts
    from launchers.observe.runs import find_run
    from launchers.observe.show import console, differences_table, hours_line, plan_table

    before = find_run(args.diff) if args.diff is not None else None
    differ = differences(plan, before) if before else []
    texts = scripts(plan) if args.sbatch else {}
    starts = predicted_starts(plan)
    if args.json:
        told = plan.as_json()
        for phase in told["phases"]:
            phase["predicted_start"] = starts.get(phase["phase"])
        told |= {"sbatch": texts} if args.sbatch else {}
        told |= {"diff": [vars(each) for each in differ]} if before else {}
        return print_json(told)
    console().print(plan_table(plan, starts))
    if line := hours_line(plan):
        print(line)
    if before:
        console().print(differences_table(differ, before))
    for phase, text in texts.items():
        print(f"# {phase}\n{text}")
    announce(plan)
    return 0


def _from_megatron(args: argparse.Namespace) -> int:
    from jobs.schema.megatron_flags import translate

    overrides, notes = translate(args.from_megatron)
    if args.json:
        return print_json({"overrides": overrides, "notes": notes})
    print("\n".join(overrides))
    for note in notes:
        tell(note)
    return 0


def _plan_parallel(args: argparse.Namespace) -> int:
    from jobs.schema.pipeline import load_pipeline
    from launchers.planning.planner import default_run_folder, report_parallel
    from slurm.detect import find_cluster

    pipeline = load_pipeline(args.pipeline, args.overrides, os.environ)
    cluster = find_cluster(pipeline.cluster, pipeline.overrides, only_plan=True)
    run = default_run_folder(pipeline, args.run)
    report = report_parallel(pipeline, run, cluster, name=args.parallel, searching=args.search)
    if args.json:
        print_json(
            {
                "phase": report.phase,
                "profile": cluster.as_json(),
                **report.facts,
                "notes": report.notes,
                "problems": [str(problem) for problem in report.problems],
            }
        )
    else:
        from launchers.observe.show import console, table

        for printed in report.tables:
            console().print(table(printed["columns"], printed["rows"], printed["title"]))
        print("\n".join([*report.notes, cluster.where]))
    for problem in report.problems:
        tell(problem)
    return EXIT_MISTAKE if report.problems else 0
