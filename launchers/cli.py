"""The command line: one function a verb. Imports stay inside the verbs, so that --help and plan are quick."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Optional

from data_tools.durable import TornFile
from data_tools.mistake import EXIT_MISTAKE, UserMistake, disk_problem

PACKAGES = ("data_tools", "megatron_ext", "slurm", "jobs", "launchers")
EXIT_UNFINISHED = 1
EXIT_INTERRUPTED = 130

DESCRIPTION = """Slurm-native post-training of language models: one YAML pipeline becomes dependent Slurm job arrays.
Without Slurm the same pipeline runs as local processes."""

PIPELINE_HELP = "a pipeline file, for example jobs/pipelines/tiny.yaml"
OVERRIDES_HELP = "dotted overrides: sft.with.lr=1e-5 params.steps=100 cluster=auto|local|dev|PROFILE"
RUN_HELP = "a run's folder, or its name below ./runs (default: the run last submitted below ./runs)"


def main(argv: Optional[list[str]] = None) -> int:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(late) < len(rest) or (late and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(word for word in rest if word not in late) or ' '.join(late)}")
    if late:
        args.overrides += late  # argparse takes no positionals after an option; people write them there
    # A pipeline may use phase kinds of the user's (`uses: my_package.my_phase`). Our own packages are taken first: a folder
    # `jobs` or `slurm` in the user's directory must not stand in for them.
    for package in PACKAGES:
        importlib.import_module(package)
    sys.path.append(os.getcwd())
    try:
        return args.verb(args)
    except UserMistake as mistake:
        for problem in mistake.problems:
            print(f"afterok: {problem}", file=sys.stderr)
        return mistake.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNFINISHED
    except TornFile as error:
        print(f"afterok: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except OSError as error:
        refused = disk_problem(error)
        if refused is None:
            raise
        print(f"afterok: {refused}", file=sys.stderr)
        return EXIT_MISTAKE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="afterok", description=DESCRIPTION)
    verbs = parser.add_subparsers(dest="name", metavar="VERB", required=True)

    def verb(name: str, function: Callable, help: str, reports: bool = True) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help)
        sub.set_defaults(verb=function)
        if reports:
            sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        return sub

    for name, function, help in (
        ("plan", _plan, "show what would run, what is reused, and why; submits nothing"),
        ("submit", _submit, "submit what is missing and return at once"),
        ("run", _run, "submit what is missing, follow it to the end, and print a summary"),
    ):
        sub = verb(name, function, help)
        sub.add_argument("pipeline", type=Path, help=PIPELINE_HELP, **({"nargs": "?"} if name == "plan" else {}))
        sub.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
        sub.add_argument("--run", type=Path, metavar="DIR", help="the run's folder (default: ./runs/PIPELINE_NAME)")
        sub.add_argument("--verify", action="store_true", help="hash every sealed file again instead of trusting size and mtime")

        if name == "plan":
            sub.add_argument("--parallel", metavar="PHASE", help="memory, rank grid and predicted step of a training phase")
            sub.add_argument("--search", action="store_true", help="with --parallel: the legal plans that fit, best first")
            sub.add_argument("--from-megatron", metavar="FLAGS", help="print the overrides that Megatron-LM's flags of a GRPO run "
                             "stand for, and the flags that have none")
        if name == "submit":
            sub.add_argument("--dry-run", action="store_true", help="print the sbatch and scontrol calls instead of making them")

    sub = verb("resubmit", _resubmit, "a new attempt at one phase; what waits on it is rewired")
    sub.add_argument("run", help=RUN_HELP.partition(" (")[0])
    sub.add_argument("phase", metavar="PHASE")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="further overrides, on top of those it was submitted with")
    sub.add_argument("--elements", metavar="3,7-9", help="only these elements (default: all that are not sealed)")
    sub.add_argument("--dry-run", action="store_true", help="print the sbatch and scontrol calls instead of making them")

    sub = verb("repair", _repair, "finish a submission whose submitter was killed")
    sub.add_argument("run", nargs="?", help=RUN_HELP)

    sub = verb("status", _status, "show the state of each phase of a run")
    sub.add_argument("run", nargs="?", help=RUN_HELP)
    sub.add_argument("-w", "--watch", action="store_true", help="look again until nothing is active; Ctrl-C only stops looking")

    sub = verb("why", _why, "say why phases failed, or do not start, and what to do")
    sub.add_argument("words", nargs="*", metavar="[RUN] [PHASE]", help=f"{RUN_HELP}; and one phase (default: all)")

    sub = verb("ls", _ls, "list runs")
    sub.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="the folder they are in (default: ./runs)")

    sub = verb("logs", _logs, "print the log of a phase", reports=False)
    sub.add_argument("run", nargs="?", help=RUN_HELP)
    sub.add_argument("phase", metavar="PHASE[:INDEX]", help="which phase, and which of its elements")
    sub.add_argument("-f", "--follow", action="store_true", help="go on until the phase ends")
    sub.add_argument("--replay", metavar="STEP/PROMPT/SAMPLE", help="of a grpo phase: draw one rollout again, alone, and say where "
                     "it first differs from what was recorded (names: its samples/step_N.jsonl)")

    sub = verb("inspect", _inspect, "show a phase's token store or packs: balance, lengths, text with its loss mask")
    sub.add_argument("run", nargs="?", help=RUN_HELP)
    sub.add_argument("phase", metavar="PHASE", help="a materialize or pack phase")
    sub.add_argument("--documents", type=int, default=3, metavar="N", help="how many documents to show (default: 3)")
    sub.add_argument("--pack", type=int, metavar="N", help="of this pack")
    sub.add_argument("--seed", type=int, default=0, help="draws other ones")
    sub.add_argument("--tokens", type=int, default=400, metavar="N", help="at most so many of a document (default: 400)")

    sub = verb("cancel", _cancel, "cancel a run's jobs, or those of some phases")
    sub.add_argument("run", nargs="?", help=RUN_HELP)
    sub.add_argument("phases", nargs="*", metavar="PHASE", help="only these phases")

    cluster = verbs.add_parser("cluster", help="a private real Slurm on this machine, for rehearsal and tests")
    actions = cluster.add_subparsers(dest="action", metavar="ACTION", required=True)
    up = actions.add_parser("up", help="start it")
    up.add_argument("--nodes", type=int, default=4)
    up.add_argument("--gpus-per-node", type=int, default=8, help="fake GPUs")
    up.add_argument("--dbd", action="store_true", help="with accounting: slurmdbd and a MariaDB of its own")
    down = actions.add_parser("down", help="cancel its jobs and stop it")
    state = actions.add_parser("status", help="which daemons and nodes are up")
    run_in = actions.add_parser("exec", help="run a command with the cluster's environment")
    run_in.add_argument("command", nargs=argparse.REMAINDER, help="for example: squeue, or afterok run PIPELINE")
    for action, function in ((up, _cluster_up), (down, _cluster_down), (state, _cluster_status), (run_in, _cluster_exec)):
        action.set_defaults(verb=function)
        action.add_argument("--prefix", type=Path, help="its folder (default: ~/.cache/afterok/cluster)")
        if action is not run_in:
            action.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


# -- pipeline verbs -----------------------------------------------------------------------------------------------


def _make_plan(args: argparse.Namespace):
    from jobs.pipeline import load_pipeline
    from launchers.plan import default_run_folder, make_plan
    from slurm.detect import find_cluster

    pipeline = load_pipeline(args.pipeline, args.overrides)
    return make_plan(pipeline, default_run_folder(pipeline, args.run), find_cluster(pipeline.cluster), args.verify)


def _plan(args: argparse.Namespace) -> int:
    if args.from_megatron is not None:
        return _from_megatron(args)
    if args.pipeline is None:
        raise UserMistake("plan needs a pipeline file, or --from-megatron FLAGS")
    if args.parallel:
        return _plan_parallel(args)
    if args.search:
        raise UserMistake("--search is about one phase: give --parallel PHASE too")
    plan = _make_plan(args)
    if args.json:
        return _print_json(plan.as_json())
    from launchers.show import console, plan_table

    console().print(plan_table(plan))
    _print_notes(plan)
    return 0


def _from_megatron(args: argparse.Namespace) -> int:
    from jobs.megatron_flags import translate

    overrides, notes = translate(args.from_megatron)
    if args.json:
        return _print_json({"overrides": overrides, "notes": notes})
    print("\n".join(overrides))
    for note in notes:
        print(f"afterok: {note}", file=sys.stderr)
    return 0


def _plan_parallel(args: argparse.Namespace) -> int:
    from jobs.pipeline import load_pipeline
    from launchers.plan import default_run_folder, report_parallel
    from slurm.detect import find_cluster

    pipeline = load_pipeline(args.pipeline, args.overrides)
    run, cluster = default_run_folder(pipeline, args.run), find_cluster(pipeline.cluster)
    report = report_parallel(pipeline, run, cluster, args.parallel, args.search)
    if args.json:
        _print_json({"phase": report.phase, **report.facts, "notes": report.notes,
                     "problems": [str(problem) for problem in report.problems]})
    else:
        from launchers.show import console, table

        for one in report.tables:
            console().print(table(one["columns"], one["rows"], one["title"]))
        print("\n".join(report.notes))
    for problem in report.problems:
        print(f"afterok: {problem}", file=sys.stderr)
    return EXIT_MISTAKE if report.problems else 0


def _print_notes(plan: Any) -> None:
    for note in plan.notes:
        print(f"afterok: {note}", file=sys.stderr)


def _submit(args: argparse.Namespace) -> int:
    from launchers.submit import submit

    plan = _make_plan(args)
    _print_notes(plan)
    return _report_submitted(args, plan, submit(plan, args.dry_run))


def _report_submitted(args: argparse.Namespace, plan: Any, done: Any) -> int:
    if args.json:
        return _print_json({"run": str(plan.run.path), "submission": done.number, "jobs": done.jobs, "active": done.active,
                            "rewired": done.rewired, "calls": done.calls})
    if args.dry_run:
        print("\n".join(done.calls) or "nothing to do")
    else:
        _print_submitted(plan, done)
    return 0


def _resubmit(args: argparse.Namespace) -> int:
    from data_tools import durable
    from jobs.pipeline import load_pipeline
    from launchers.plan import make_plan
    from launchers.submit import resubmit
    from slurm.detect import find_cluster

    run = _find_run(args.run)
    folder = run.submission_folder(run.newest_submission())
    frozen = durable.read_json(folder / "pipeline.json")
    if Path(frozen["cwd"]).is_dir():
        os.chdir(frozen["cwd"])  # relative inputs and the user's modules mean what they meant at the first submission
        sys.path.append(frozen["cwd"])
    pipeline = load_pipeline(folder / "pipeline.yaml", frozen["overrides"] + args.overrides)
    plan = make_plan(pipeline, run, find_cluster(pipeline.cluster))
    _print_notes(plan)
    return _report_submitted(args, plan, resubmit(plan, args.phase, _indices(args.elements), args.dry_run))


def _indices(text: Optional[str]) -> Optional[list[int]]:
    """3,7-9 as [3, 7, 8, 9]."""
    if text is None:
        return None
    from slurm.printed import parse_indices

    try:
        found = sorted(set(parse_indices(text)))
    except ValueError:
        found = []
    if not found or "%" in text:
        raise UserMistake(f"--elements {text!r}: write indices and ranges, like 3,7-9")
    return found


def _repair(args: argparse.Namespace) -> int:
    from launchers.submit import repair

    run = _find_run(args.run)
    lines = repair(run)
    if args.json:
        return _print_json({"run": str(run.path), "repaired": lines})
    print("\n".join(lines) or f"{_shown(run.path)}: nothing to repair")
    return 0


def _print_submitted(plan: Any, done: Any) -> None:
    run = plan.run.path
    for phase, job in done.jobs.items():
        print(f"submitted {phase} as job {job}")
    for phase, job in done.active.items():
        print(f"{phase} {'now waits on the new attempt' if phase in done.rewired else 'is under way already'} as job {job}")
    if not done.jobs and not done.active:
        or_not_needed = " or not needed" if any(phase.action == "skip" for phase in plan.phases) else ""
        print(f"nothing to submit: all {len(plan.phases)} phases of {run} are sealed{or_not_needed}")
    elif done.number:
        print(f"submission {done.number} of {run}; look with `afterok status {_shown(run)}`")


def _run(args: argparse.Namespace) -> int:
    from jobs.run_folder import RunFolder
    from launchers.follow import LOCAL_POLL_S, SLURM_POLL_S, follow
    from launchers.submit import submit

    plan = _make_plan(args)
    run: RunFolder = plan.run
    _print_notes(plan)
    done = submit(plan)
    if not args.json:
        _print_submitted(plan, done)
    try:
        poll = SLURM_POLL_S if plan.cluster.kind == "slurm" else LOCAL_POLL_S
        status = follow(run, poll, quiet=args.json)
    except KeyboardInterrupt:
        print(f"\nthe jobs go on; look again with `afterok status {_shown(run.path)}`, "
              f"`afterok logs {_shown(run.path)} PHASE -f`, or stop them with `afterok cancel {_shown(run.path)}`",
              file=sys.stderr)
        return EXIT_INTERRUPTED
    if args.json:
        _print_json(status.as_json())
    else:
        from launchers.show import console, summary

        console().print(summary(status))
    return _exit_code(status, run)


def _exit_code(status: Any, run: Any) -> int:
    if status.finished:
        return 0
    failed = next((p for p in status.phases if p.failed), None)
    if failed is not None:
        print(f"afterok: {failed.phase} failed: {failed.message or failed.reason or f'exit code {failed.exit_code}'} "
              f"(log: afterok logs {_shown(run.path)} {failed.phase}; more: afterok why {_shown(run.path)})", file=sys.stderr)
        return EXIT_MISTAKE if failed.exit_code == EXIT_MISTAKE else EXIT_UNFINISHED
    print(f"afterok: {_shown(run.path)} is not finished; `afterok submit` goes on with what is missing", file=sys.stderr)
    return EXIT_UNFINISHED


# -- run verbs ----------------------------------------------------------------------------------------------------


def _find_run(name: Optional[str]):
    """The run a user means: a folder, a name below ./runs, or by default the one submitted last."""
    from jobs.run_folder import RunFolder

    if name is not None:
        for path in (Path(name), Path("runs") / name):
            if (path / "ledger.jsonl").exists():
                return RunFolder(path.absolute())
        raise UserMistake(f"{name!r} is no run: neither {name}/ledger.jsonl nor runs/{name}/ledger.jsonl exists")
    ledgers = sorted(Path("runs").glob("*/ledger.jsonl"), key=lambda path: path.stat().st_mtime)
    if not ledgers:
        raise UserMistake("no run below ./runs; name one: afterok status RUN")
    return RunFolder(ledgers[-1].parent.absolute())


def _status(args: argparse.Namespace) -> int:
    from launchers.follow import follow, poll_interval
    from launchers.status import run_status

    run = _find_run(args.run)
    if args.watch:
        try:
            status = follow(run, poll_interval(run), quiet=args.json)
        except KeyboardInterrupt:
            return 0
    else:
        status = run_status(run)
    if args.json:
        return _print_json(status.as_json())
    from launchers.show import console, status_table

    console().print(status_table(status))
    return 0


def _why(args: argparse.Namespace) -> int:
    from launchers.why import why

    run, phase = _run_and_phase(args.words)
    report = why(run, phase)
    if args.json:
        return _print_json(report.as_json())
    for line in [report.headline, *(finding.sentence for finding in report.findings), *report.notes]:
        print(line)
    return 0


def _run_and_phase(words: list[str]):
    """RUN, PHASE, both or neither; a single word that is no run is a phase of the run submitted last."""
    if len(words) > 2:
        raise UserMistake(f"{len(words)} words: {' '.join(words)}; write afterok why [RUN] [PHASE]")
    if len(words) == 1:
        try:
            return _find_run(words[0]), None
        except UserMistake:
            if "/" in words[0] or not any(Path("runs").glob("*/ledger.jsonl")):
                raise
            return _find_run(None), words[0]
    return _find_run(words[0] if words else None), words[1] if words else None


def _ls(args: argparse.Namespace) -> int:
    from launchers.runs import list_runs

    if not args.folder.is_dir():
        raise UserMistake(f"{args.folder} is no folder; name the one that your runs are in: afterok ls DIR")
    runs = list_runs(args.folder)
    if args.json:
        return _print_json({"runs": [run.as_json() for run in runs]})
    from launchers.show import console, runs_table

    if runs:
        console().print(runs_table(runs))
    else:
        print(f"no runs below {args.folder}")
    return 0


def _logs(args: argparse.Namespace) -> int:
    from launchers.logs import show_log

    phase, _, index = args.phase.partition(":")
    if index and not index.isdigit():
        raise UserMistake(f"{args.phase!r}: write PHASE or PHASE:INDEX with a number")
    if args.replay:
        command = [sys.executable, "-m", "jobs.replay", str(_find_run(args.run).path), phase, args.replay]
        return subprocess.run(command).returncode  # a process of its own: it imports torch
    try:
        show_log(_find_run(args.run), phase, int(index) if index else None, args.follow)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from launchers.inspect import inspect
    from launchers.show import print_inspection

    found = inspect(_find_run(args.run), args.phase, max(args.documents, 0), args.pack, args.seed, max(args.tokens, 1))
    if args.json:
        return _print_json(found)
    print_inspection(found)
    return 0


def _cancel(args: argparse.Namespace) -> int:
    from launchers.submit import cancel

    run = _find_run(args.run)
    jobs = cancel(run, args.phases)
    if args.json:
        return _print_json({"run": str(run.path), "cancelled": jobs})
    print(f"cancelled {', '.join(jobs)}" if jobs else f"{_shown(run.path)}: nothing is active")
    return 0


# -- the dev cluster ----------------------------------------------------------------------------------------------


def _dev_cluster(args: argparse.Namespace):
    from slurm import devcluster

    return devcluster.DevCluster(args.prefix or devcluster.default_prefix())


def _cluster_up(args: argparse.Namespace) -> int:
    from slurm import devcluster

    cluster = devcluster.up(args.prefix or devcluster.default_prefix(), args.nodes, args.gpus_per_node, accounting=args.dbd)
    if args.json:
        return _print_json(cluster.status())
    with_ = " with accounting" if args.dbd else ""
    print(f"up: {args.nodes} nodes × {args.gpus_per_node} fake GPUs{with_} in {cluster.prefix}")
    print("use it: `afterok run PIPELINE cluster=dev`, or `afterok cluster exec squeue`")
    return 0


def _cluster_down(args: argparse.Namespace) -> int:
    cluster = _dev_cluster(args)
    cluster.down()
    if args.json:
        return _print_json({"prefix": str(cluster.prefix), "up": False})
    print(f"down: {cluster.prefix}")
    return 0


def _cluster_status(args: argparse.Namespace) -> int:
    status = _dev_cluster(args).status()
    if args.json:
        return _print_json(status)
    for key, value in status.items():
        print(f"{key}: {value}")
    return 0


def _cluster_exec(args: argparse.Namespace) -> int:
    cluster = _dev_cluster(args)
    if not cluster.is_up():
        raise UserMistake(f"the dev cluster in {cluster.prefix} is not up; start it: afterok cluster up")
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UserMistake("name a command: afterok cluster exec squeue")
    try:
        os.execvpe(command[0], command, cluster.env())
    except FileNotFoundError:
        raise UserMistake(f"no command {command[0]!r} in PATH") from None


# -- helpers ------------------------------------------------------------------------------------------------------


def _print_json(value: Any) -> int:
    print(json.dumps(value, indent=1, default=str))
    return 0


def _shown(path: Path) -> str:
    """A path as the user would type it from here."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


if __name__ == "__main__":
    sys.exit(main())
