"""Does what `afterok bundle` says: a submission as plain files, which a node with sh and sbatch sends."""

import argparse
import os
from pathlib import Path

from data_tools.mistake import UserMistake
from launchers.verbs.plans import plan_here
from launchers.verbs.said import announce, print_json


def do_bundle(args: argparse.Namespace) -> int:
    from jobs.artifacts.layout import is_run
    from jobs.artifacts.run_folder import RunFolder
    from jobs.schema.pipeline import load_pipeline
    from launchers.planning.planner import default_run_folder
    from launchers.planning.recorded import recorded_pipeline
    from launchers.submission.bundle import bundle
    from slurm.detect import find_cluster

    folder = args.folder.absolute()  # before another folder becomes ours
    runs = [path for path in (Path(args.what), Path("runs") / args.what) if is_run(path)]
    if runs:
        if args.run:
            raise UserMistake(f"{runs[0]} is a run, and --run names another; leave it out")
        run = RunFolder(runs[0].absolute())
        pipeline = recorded_pipeline(run, args.overrides, os.environ)
    else:
        pipeline = load_pipeline(Path(args.what), args.overrides, os.environ)
        run = default_run_folder(pipeline, args.run)
    plan = plan_here(args, pipeline, run, find_cluster(pipeline.cluster, pipeline.overrides))
    announce(plan, quiet=args.json)
    done = bundle(plan, folder)
    if args.json:
        return print_json(
            {"run": str(run.path), "submission": done.number, "folder": str(done.folder), "files": done.files}
        )
    if done.number is None:
        print(f"nothing to bundle: {run.path} is sealed")
    else:
        print(f"submission {done.number} of {run.path} is not sent yet; where sbatch is: sh {done.folder}/submit.sh")
    return 0
