"""Reads the command line, and tells of mistakes.

What each verb does stands in launchers/verbs.
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("launchers", 1)[0] + "data_tools/own_packages.py")["hold"](children=False)

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from data_tools.base.durable import TornFile
from data_tools.base.printing import clean_streams
from data_tools.mistake import EXIT_MISTAKE, UserMistake, disk_problem
from data_tools.own_packages import PACKAGES, VERSION
from launchers.completion import SHELLS
from launchers.verbs import bundles, cleaning, clusters, plans, profiles, results, runs, scores
from launchers.verbs.said import EXIT_UNFINISHED, tell
from slurm.client import SlurmError

DESCRIPTION = """Slurm-native post-training of language models: one YAML pipeline becomes dependent Slurm job arrays.
Without Slurm the same pipeline runs as local processes."""

PIPELINE_HELP = "a pipeline file, for example jobs/pipelines/tiny.yaml"
OVERRIDES_HELP = "dotted overrides: sft.with.lr=1e-5 params.steps=100 cluster=auto|local|dev|PROFILE cluster.KEY=VALUE"
JSON_HELP = "print one JSON object instead of text"
DRY_RUN_HELP = "print the sbatch and scontrol calls instead of making them"
RUN_HELP = "a run's folder, or its name below ./runs (default: the run last submitted below ./runs)"

EXAMPLES = {  # of verbs; several are apart by "; "
    "plan": "afterok plan jobs/pipelines/tiny.yaml sft.with.lr=1e-3",
    "submit": "afterok submit jobs/pipelines/tiny.yaml --run runs/second params.seed=2",
    "run": "afterok run jobs/pipelines/tiny.yaml cluster=local",
    "explain": "afterok explain sft; afterok explain sft.lora.rank; afterok explain resources",
    "resubmit": "afterok resubmit tiny sft sft.with.lr=1e-3; afterok resubmit tiny data --elements 3,7-9",
    "bundle": "afterok bundle jobs/pipelines/tiny.yaml /shared/bundle --run /shared/runs/tiny",
    "repair": "afterok repair tiny",
    "status": "afterok status tiny --watch",
    "why": "afterok why tiny sft",
    "ls": "afterok ls runs",
    "logs": "afterok logs tiny data:3 --follow; afterok logs tiny grpo --replay 12/3/0",
    "inspect": "afterok inspect tiny packs --pack 0; afterok inspect tiny grpo --step 12",
    "scores": "afterok scores tiny trained refined --svg scores.svg",
    "report": "afterok report tiny --output /tmp/tiny.html",
    "plot": "afterok plot tiny sft grpo --metric loss --metric reward --output curves.png",
    "clean": "afterok clean tiny; afterok clean runs --only attempts --yes",
    "path": "afterok path tiny exported",
    "cancel": "afterok cancel tiny sft",
    "completion": "afterok completion bash",
    "cluster": "afterok cluster up --nodes 2",
    "profile": "afterok profile explain roles.train --profile example",
}

Verb = Callable[[argparse.Namespace], int]  # does what a verb says and returns the exit code


class AddVerb(Protocol):
    """Adds one verb to the command line and returns the parser of its words."""

    def __call__(self, name: str, function: Verb, help: str, reports: bool = True) -> argparse.ArgumentParser: ...


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    with clean_streams():
        return _main(argv)


def _main(argv: list[str] | None) -> int:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(late) < len(rest) or (late and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(word for word in rest if word not in late) or ' '.join(late)}")
    if late:
        args.overrides += late  # argparse takes no positionals after an option; people write them there
    # A pipeline may use phase kinds of the user's (`uses: my_package.my_phase`). Our own packages are taken first: a
    # folder `jobs` or `slurm` in the user's directory must not stand in for them.
    for package in PACKAGES:
        importlib.import_module(package)
    sys.path.append(os.getcwd())
    try:
        code = args.verb(args)
        sys.stdout.flush()  # here, where a reader that has left is no error
        return code
    except UserMistake as mistake:
        for problem in mistake.problems:
            tell(problem)
        return mistake.exit_code
    except SlurmError as error:
        tell(error)
        return EXIT_UNFINISHED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNFINISHED
    except TornFile as error:
        tell(error)
        return EXIT_MISTAKE
    except OSError as error:
        refused = disk_problem(error)
        if refused is None:
            raise
        tell(refused)
        return EXIT_MISTAKE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="afterok", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"afterok {VERSION}, Python {platform.python_version()}")
    words = parser.add_subparsers(dest="name", metavar="VERB", required=True)

    def verb(name: str, function: Verb, help: str, reports: bool = True) -> argparse.ArgumentParser:
        sub = words.add_parser(name, help=help, description=help, epilog=f"for example: {EXAMPLES[name]}")
        sub.set_defaults(verb=function)
        if reports:
            sub.add_argument("--json", action="store_true", help=JSON_HELP)
        return sub

    _add_pipeline_verbs(verb)
    _add_submission_verbs(verb)
    _add_looking_verbs(verb)
    _add_result_verbs(verb)
    _add_cancel(verb)
    _add_completion(verb, parser)
    for name, add, help in (
        ("cluster", _add_cluster_verbs, "a private real Slurm on this machine, for rehearsal and tests"),
        ("profile", _add_profile_verbs, "cluster profiles: which there are, and what each sets"),
    ):
        add(words.add_parser(name, help=help, description=help, epilog=f"for example: {EXAMPLES[name]}"))
    return parser


def _scale(text: str) -> float:
    """Return the share of its time that a rehearsed phase sleeps."""
    share = float(text)  # argparse tells a ValueError in its own words
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: above 0, at most 1")
    return share


def _hours(text: str) -> float:
    """Return a budget in GPU-hours; inf is one that refuses only what has no limit."""
    hours = float(text)
    if not hours >= 0:  # nan neither
        raise argparse.ArgumentTypeError(f"{text} is no number of GPU-hours: at least 0")
    return hours


def _add_pipeline_verbs(verb: AddVerb) -> None:
    """Add the verbs that take a pipeline file: plan, submit and run."""
    plan = verb("plan", plans.do_plan, "show what would run, what is reused, and why; submits nothing")
    submit = verb("submit", runs.do_submit, "submit what is missing and return at once")
    run = verb("run", runs.do_run, "submit what is missing, follow it to the end, and print a summary")
    plan.add_argument("pipeline", type=Path, nargs="?", help=PIPELINE_HELP)
    for sub in (submit, run):
        sub.add_argument("pipeline", type=Path, help=PIPELINE_HELP)
    for sub in (plan, submit, run):
        sub.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
        sub.add_argument("--run", type=Path, metavar="DIR", help="the run's folder (default: ./runs/PIPELINE_NAME)")
        sub.add_argument(
            "--verify", action="store_true", help="hash every sealed file again instead of trusting size and mtime"
        )
        _add_preflight(sub)
    for sub in (submit, run):
        sub.add_argument(
            "--group", metavar="NAME", default="", help="let this group of users read the run (default: nobody but you)"
        )
        sub.add_argument(
            "--rehearse",
            action="store_true",
            help="the whole graph, with a sleep in place of each phase's work; its run is runs/NAME.rehearsal",
        )
        sub.add_argument(
            "--rehearse-scale",
            type=_scale,
            metavar="SHARE",
            help="sleep this share of the planned time, which is the time limit of the phase's job (default: 0.001)",
        )
    plan.add_argument("--parallel", metavar="PHASE", help="memory, rank grid and predicted step of a training phase")
    plan.add_argument("--search", action="store_true", help="with --parallel: the legal plans that fit, best first")
    plan.add_argument(
        "--from-megatron",
        metavar="FLAGS",
        help="print the overrides that Megatron-LM's flags of a GRPO run stand for, and the flags that have none",
    )
    plan.add_argument("--sbatch", action="store_true", help="print the batch script of each phase that would run")
    plan.add_argument(
        "--diff",
        metavar="RUN",
        help="what differs from RUN's newest submission: settings, resources, inputs, code, profile",
    )
    submit.add_argument("--dry-run", action="store_true", help=DRY_RUN_HELP)

    explain = verb("explain", runs.do_explain, "say what a phase kind does, and what each of its settings means")
    explain.add_argument(
        "phase",
        nargs="?",
        default="",
        metavar="KIND",
        help="such as sft, sft.lora or my.module; resources: what a phase may ask of the cluster (default: list all)",
    )
    explain.add_argument(
        "setting", nargs="?", default="", metavar="SETTING", help="only this one, such as lora.rank or lora"
    )


def _add_preflight(sub: argparse.ArgumentParser) -> None:
    """Add what every verb that makes a plan takes: which findings do not stop it, and what it may cost."""
    sub.add_argument(
        "--waive",
        metavar="ID",
        action="append",
        default=[],
        help="let this warning not stop it, by the id that it ends with, such as V001; may be repeated",
    )
    sub.add_argument("--budget", type=_hours, metavar="HOURS", help="refuse a plan that may use more GPU-hours")


def _add_submission_verbs(verb: AddVerb) -> None:
    """Add the verbs that change a run: resubmit, bundle and repair."""
    resubmit = verb("resubmit", runs.do_resubmit, "a new attempt at one phase; what waits on it is rewired")
    resubmit.add_argument("run", help=RUN_HELP.partition(" (")[0])
    resubmit.add_argument("phase", metavar="PHASE", help="the phase that is tried again")
    resubmit.add_argument(
        "overrides", nargs="*", metavar="key=value", help="further overrides, on top of those it was submitted with"
    )
    resubmit.add_argument("--elements", metavar="3,7-9", help="only these elements (default: all that are not sealed)")
    resubmit.add_argument(
        "--again",
        action="store_true",
        help="run it anew though it is sealed; what it made so far, checkpoints too, is set aside in RUN/PHASE/retired",
    )
    resubmit.add_argument("--dry-run", action="store_true", help=DRY_RUN_HELP)
    _add_preflight(resubmit)

    bundle = verb("bundle", bundles.do_bundle, "write a submission as plain files, for a node with sh and sbatch")
    bundle.add_argument(
        "what", metavar="RUN|PIPELINE", help="a run, of which what is missing is bundled, or a pipeline"
    )
    bundle.add_argument(
        "folder", type=Path, metavar="DIR", help="an empty folder, or none yet: gets submit.sh and scripts"
    )
    bundle.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    bundle.add_argument("--run", type=Path, metavar="DIR", help="of a pipeline: the run's folder, which the jobs see")
    _add_preflight(bundle)

    repair = verb("repair", runs.do_repair, "finish a submission whose submitter was killed")
    repair.add_argument("run", nargs="?", help=RUN_HELP)


def _add_looking_verbs(verb: AddVerb) -> None:
    """Add the verbs that look at runs and change nothing: status, why, ls, logs and inspect."""
    status = verb("status", runs.do_status, "show the state of each phase of a run")
    status.add_argument("run", nargs="?", help=RUN_HELP)
    status.add_argument(
        "-w", "--watch", action="store_true", help="look again until nothing is active; Ctrl-C only stops looking"
    )

    why = verb("why", runs.do_why, "say why phases failed, or do not start, and what to do")
    why.add_argument("words", nargs="*", metavar="[RUN] [PHASE]", help=f"{RUN_HELP}; and one phase (default: all)")

    listing = verb("ls", runs.do_ls, "list runs")
    listing.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), help="the folder they are in (default: ./runs)"
    )

    logs = verb("logs", runs.do_logs, "print the log of a phase", reports=False)
    logs.add_argument("run", nargs="?", help=RUN_HELP)
    logs.add_argument("phase", metavar="PHASE[:INDEX]", help="which phase, and which of its elements")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the phase ends")
    logs.add_argument(
        "--replay",
        metavar="STEP/PROMPT/SAMPLE",
        help="of a grpo phase: draw one rollout again, alone, and say where it first differs from what "
        "was recorded (names: its samples/step_N.jsonl)",
    )

    inspect = verb(
        "inspect", runs.do_inspect, "show a phase's token store or packs with the loss mask, or what it sampled"
    )
    inspect.add_argument("run", nargs="?", help=RUN_HELP)
    inspect.add_argument(
        "phase",
        metavar="PHASE",
        help="a phase of tokens (materialize, pack) or of samples (grpo, generate, evaluate …)",
    )
    inspect.add_argument(
        "--step", type=int, metavar="N", help="of a grpo phase: its samples of this step (default: last)"
    )
    inspect.add_argument(
        "--documents", type=int, default=3, metavar="N", help="how many documents, or prompts, to show (default: 3)"
    )
    inspect.add_argument("--pack", type=int, metavar="N", help="the documents of this pack")
    inspect.add_argument("--seed", type=int, default=0, metavar="N", help="another number shows other ones")
    inspect.add_argument(
        "--tokens", type=int, default=400, metavar="N", help="show at most so many tokens of each (default: 400)"
    )


def _add_result_verbs(verb: AddVerb) -> None:
    """Add the verbs that show what came of a run: scores, report, plot and path."""
    compared = verb("scores", scores.do_scores, "show a run's evaluations side by side, with intervals and gains")
    compared.add_argument("run", nargs="?", help=RUN_HELP)
    compared.add_argument(
        "phases", nargs="*", metavar="PHASE", help="only these; the others are compared with the first (default: all)"
    )
    compared.add_argument("--svg", type=Path, metavar="FILE", help="also draw them")

    report = verb("report", results.do_report, "write a report of a run: one HTML file that needs no network")
    report.add_argument("run", nargs="?", help=RUN_HELP)
    report.add_argument("-o", "--output", type=Path, metavar="FILE", help="write it there (default: RUN/report.html)")
    report.add_argument(
        "-w",
        "--watch",
        action="store_true",
        help="write it again until nothing is active; a browser that shows it follows; Ctrl-C only stops looking",
    )

    plot = verb("plot", results.do_plot, "draw the curves of a run's metrics into one SVG, PNG or PDF file")
    plot.add_argument("run", nargs="?", help=RUN_HELP)
    plot.add_argument("phases", nargs="*", metavar="PHASE", help="only these (default: all that wrote metrics)")
    plot.add_argument(
        "--metric", action="append", default=[], metavar="NAME", help="only this one; may be given several times"
    )
    plot.add_argument("-o", "--output", type=Path, metavar="FILE", help="write it there (default: RUN/curves.svg)")

    cleaned = verb("clean", cleaning.do_clean, "show what of runs nothing needs any more; with --yes, delete it")
    cleaned.add_argument("runs", nargs="*", metavar="RUN", help=f"{RUN_HELP}, or a folder of runs; one or more")
    cleaned.add_argument("--yes", action="store_true", help="delete it; without this word nothing is deleted")
    cleaned.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="KIND",
        help="attempts, settings, milestones, journals, retired, code or leftovers (default: all of these), "
        "or superseded: sealed results under settings of before, which only goes by name",
    )

    path = verb("path", results.do_path, "print where the sealed result of a phase lies, such as a model")
    path.add_argument("run", nargs="?", help=RUN_HELP)
    path.add_argument("phase", metavar="PHASE", help="a sealed phase")


def _add_cancel(verb: AddVerb) -> None:
    """Add the verb that ends jobs."""
    cancel = verb("cancel", runs.do_cancel, "cancel a run's jobs, or those of some phases")
    cancel.add_argument("run", nargs="?", help=RUN_HELP)
    cancel.add_argument("phases", nargs="*", metavar="PHASE", help="only these phases")


def _add_completion(verb: AddVerb, parser: argparse.ArgumentParser) -> None:
    """Add the verb that writes the completion of all verbs."""
    completion = verb("completion", results.do_completion, "print a shell's completion of afterok", reports=False)
    completion.add_argument("shell", choices=SHELLS, help="in ~/.bashrc: source <(afterok completion bash)")
    completion.set_defaults(parser=parser)


def _add_cluster_verbs(cluster: argparse.ArgumentParser) -> None:
    """Add what can be done with the dev cluster: up, down, status and exec."""
    actions = cluster.add_subparsers(dest="action", metavar="ACTION", required=True)
    up = actions.add_parser("up", help="start it")
    up.add_argument("--nodes", type=int, default=4)
    up.add_argument("--gpus-per-node", type=int, default=8, help="fake GPUs")
    up.add_argument("--dbd", action="store_true", help="with accounting: slurmdbd and a MariaDB of its own")
    down = actions.add_parser("down", help="cancel its jobs and stop it")
    state = actions.add_parser("status", help="which daemons and nodes are up")
    run_in = actions.add_parser("exec", help="run a command with the cluster's environment")
    run_in.add_argument("command", nargs=argparse.REMAINDER, help="for example: squeue, or afterok run PIPELINE")
    for action, function in (
        (up, clusters.do_cluster_up),
        (down, clusters.do_cluster_down),
        (state, clusters.do_cluster_status),
        (run_in, clusters.do_cluster_exec),
    ):
        action.set_defaults(verb=function)
        action.add_argument("--prefix", type=Path, help="its folder (default: ~/.cache/afterok/cluster)")
        if action is not run_in:
            action.add_argument("--json", action="store_true", help=JSON_HELP)


def _add_profile_verbs(profile: argparse.ArgumentParser) -> None:
    """Add what can be done with profiles: list, explain, init and verify."""
    actions = profile.add_subparsers(dest="action", metavar="ACTION", required=True)
    listed = actions.add_parser("list", help="list the profiles, and the files that each is made of")
    explain = actions.add_parser("explain", help="show which file set each value, and which are locked")
    explain.add_argument("key", nargs="?", default="", metavar="KEY", help="such as roles.train (default: all)")
    draft = actions.add_parser("init", help="draft a profile from the live cluster")
    draft.add_argument("--output", type=Path, metavar="FILE", help="write it there (default: print it)")
    verify = actions.add_parser(
        "verify", help="compare a profile with its live cluster, and with a compute node or two"
    )
    verify.add_argument("--no-jobs", action="store_true", help="ask the controller alone; no job runs")
    for action in (explain, verify):
        action.add_argument("overrides", nargs="*", metavar="cluster.KEY=VALUE", help="values laid on top")
        action.add_argument("--profile", metavar="NAME", default="", help="its name or file (default: this cluster's)")
    for action, function in (
        (listed, profiles.do_list),
        (explain, profiles.do_explain),
        (draft, profiles.do_init),
        (verify, profiles.do_verify),
    ):
        action.set_defaults(verb=function)
        if action is not draft:
            action.add_argument("--json", action="store_true", help=JSON_HELP)


if __name__ == "__main__":
    sys.exit(main())
