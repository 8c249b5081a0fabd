"""The command line: its words, and how mistakes are told. What each verb does stands in launchers/verbs.py."""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("launchers", 1)[0] + "data_tools/own_packages.py")["hold"](children=False)

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from data_tools.base.durable import TornFile
from data_tools.base.printing import clean_streams
from data_tools.mistake import EXIT_MISTAKE, UserMistake, disk_problem
from data_tools.own_packages import PACKAGES
from launchers import verbs
from slurm.client import SlurmError

DESCRIPTION = """Slurm-native post-training of language models: one YAML pipeline becomes dependent Slurm job arrays.
Without Slurm the same pipeline runs as local processes."""

PIPELINE_HELP = "a pipeline file, for example jobs/pipelines/tiny.yaml"
OVERRIDES_HELP = "dotted overrides: sft.with.lr=1e-5 params.steps=100 cluster=auto|local|dev|PROFILE"
RUN_HELP = "a run's folder, or its name below ./runs (default: the run last submitted below ./runs)"


def main(argv: list[str] | None = None) -> int:
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
            verbs.tell(problem)
        return mistake.exit_code
    except SlurmError as error:
        verbs.tell(error)
        return verbs.EXIT_UNFINISHED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return verbs.EXIT_UNFINISHED
    except TornFile as error:
        verbs.tell(error)
        return EXIT_MISTAKE
    except OSError as error:
        refused = disk_problem(error)
        if refused is None:
            raise
        verbs.tell(refused)
        return EXIT_MISTAKE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="afterok", description=DESCRIPTION)
    words = parser.add_subparsers(dest="name", metavar="VERB", required=True)

    def verb(name: str, function: Callable, help: str, reports: bool = True) -> argparse.ArgumentParser:
        sub = words.add_parser(name, help=help, description=help)
        sub.set_defaults(verb=function)
        if reports:
            sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        return sub

    for name, function, help in (
        ("plan", verbs.do_plan, "show what would run, what is reused, and why; submits nothing"),
        ("submit", verbs.do_submit, "submit what is missing and return at once"),
        ("run", verbs.do_run, "submit what is missing, follow it to the end, and print a summary"),
    ):
        sub = verb(name, function, help)
        sub.add_argument("pipeline", type=Path, help=PIPELINE_HELP, **({"nargs": "?"} if name == "plan" else {}))
        sub.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
        sub.add_argument("--run", type=Path, metavar="DIR", help="the run's folder (default: ./runs/PIPELINE_NAME)")
        sub.add_argument(
            "--verify", action="store_true", help="hash every sealed file again instead of trusting size and mtime"
        )

        if name != "plan":
            sub.add_argument(
                "--group",
                metavar="NAME",
                default="",
                help="let this group of users read the run (default: nobody but you)",
            )
        if name == "plan":
            sub.add_argument(
                "--parallel", metavar="PHASE", help="memory, rank grid and predicted step of a training phase"
            )
            sub.add_argument(
                "--search", action="store_true", help="with --parallel: the legal plans that fit, best first"
            )
            sub.add_argument(
                "--from-megatron",
                metavar="FLAGS",
                help="print the overrides that Megatron-LM's flags of a GRPO run stand for, and the flags "
                "that have none",
            )
        if name == "submit":
            sub.add_argument(
                "--dry-run", action="store_true", help="print the sbatch and scontrol calls instead of making them"
            )

    sub = verb("explain", verbs.do_explain, "say what a phase kind does, and what each of its settings means")
    sub.add_argument(
        "phase", nargs="?", default="", metavar="PHASE", help="such as sft, or my.module (default: list them)"
    )
    sub.add_argument(
        "setting", nargs="?", default="", metavar="SETTING", help="only this one, such as lora.rank or lora"
    )

    sub = verb("resubmit", verbs.do_resubmit, "a new attempt at one phase; what waits on it is rewired")
    sub.add_argument("run", help=RUN_HELP.partition(" (")[0])
    sub.add_argument("phase", metavar="PHASE")
    sub.add_argument(
        "overrides", nargs="*", metavar="key=value", help="further overrides, on top of those it was submitted with"
    )
    sub.add_argument("--elements", metavar="3,7-9", help="only these elements (default: all that are not sealed)")
    sub.add_argument(
        "--again",
        action="store_true",
        help="run it anew though it is sealed; what it made so far, checkpoints too, is set aside in RUN/PHASE/retired",
    )
    sub.add_argument(
        "--dry-run", action="store_true", help="print the sbatch and scontrol calls instead of making them"
    )

    sub = verb("repair", verbs.do_repair, "finish a submission whose submitter was killed")
    sub.add_argument("run", nargs="?", help=RUN_HELP)

    sub = verb("status", verbs.do_status, "show the state of each phase of a run")
    sub.add_argument("run", nargs="?", help=RUN_HELP)
    sub.add_argument(
        "-w", "--watch", action="store_true", help="look again until nothing is active; Ctrl-C only stops looking"
    )

    sub = verb("why", verbs.do_why, "say why phases failed, or do not start, and what to do")
    sub.add_argument("words", nargs="*", metavar="[RUN] [PHASE]", help=f"{RUN_HELP}; and one phase (default: all)")

    sub = verb("ls", verbs.do_ls, "list runs")
    sub.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), help="the folder they are in (default: ./runs)"
    )

    sub = verb("logs", verbs.do_logs, "print the log of a phase", reports=False)
    sub.add_argument("run", nargs="?", help=RUN_HELP)
    sub.add_argument("phase", metavar="PHASE[:INDEX]", help="which phase, and which of its elements")
    sub.add_argument("-f", "--follow", action="store_true", help="go on until the phase ends")
    sub.add_argument(
        "--replay",
        metavar="STEP/PROMPT/SAMPLE",
        help="of a grpo phase: draw one rollout again, alone, and say where it first differs from what "
        "was recorded (names: its samples/step_N.jsonl)",
    )

    help = "show a phase's token store or packs: balance, lengths, text with its loss mask"
    sub = verb("inspect", verbs.do_inspect, help)
    sub.add_argument("run", nargs="?", help=RUN_HELP)
    sub.add_argument("phase", metavar="PHASE", help="a materialize or pack phase")
    sub.add_argument("--documents", type=int, default=3, metavar="N", help="how many documents to show (default: 3)")
    sub.add_argument("--pack", type=int, metavar="N", help="of this pack")
    sub.add_argument("--seed", type=int, default=0, help="draws other ones")
    sub.add_argument(
        "--tokens", type=int, default=400, metavar="N", help="at most so many of a document (default: 400)"
    )

    sub = verb("cancel", verbs.do_cancel, "cancel a run's jobs, or those of some phases")
    sub.add_argument("run", nargs="?", help=RUN_HELP)
    sub.add_argument("phases", nargs="*", metavar="PHASE", help="only these phases")

    cluster = words.add_parser("cluster", help="a private real Slurm on this machine, for rehearsal and tests")
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
        (up, verbs.do_cluster_up),
        (down, verbs.do_cluster_down),
        (state, verbs.do_cluster_status),
        (run_in, verbs.do_cluster_exec),
    ):
        action.set_defaults(verb=function)
        action.add_argument("--prefix", type=Path, help="its folder (default: ~/.cache/afterok/cluster)")
        if action is not run_in:
            action.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


if __name__ == "__main__":
    sys.exit(main())
