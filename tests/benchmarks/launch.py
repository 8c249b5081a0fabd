"""How long planning, submitting and looking at a large pipeline take on a real Slurm, beside submitit and bare sbatch.

    python -m tests.benchmarks.launch [--phases 10] [--elements 2000] [--nodes 128]

Ten dependent phases of 2,000 elements each on a dev cluster of 128 nodes × 8 fake GPUs, all nodes drained so that only
submission is measured. submitit sends the same elements with map_array (a pickle an element); the bare loop sends one
sbatch an element for a single phase. The ratio is submitit's submit time over ours.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from jobs.artifacts.run_folder import RunFolder
from jobs.schema.pipeline import load_pipeline
from launchers.observe.status import run_status
from launchers.planning.ledger import Ledger
from launchers.planning.planner import make_plan
from launchers.submission.submit import submit
from slurm.detect import find_cluster
from slurm.dev import cluster as devcluster


def timed(call):
    began = time.perf_counter()
    value = call()
    return time.perf_counter() - began, value


def pipeline_text(phases: int, elements: int) -> str:
    lines = ["name: launch", "waive: [P011]", "phases:"]  # nodes are drained
    for i in range(phases):
        needs = f", needs: [p{i - 1}]" if i else ""
        lines.append(
            f"  p{i}: {{uses: tests.toy.numbers, array: {elements}{needs}, "
            "resources: {role: train, gpus_per_node: 8}}"
        )
    return "\n".join(lines) + "\n"


def ours(folder: Path, phases: int, elements: int) -> dict[str, float]:
    path = folder / "launch.yaml"
    path.write_text(pipeline_text(phases, elements))
    run = RunFolder(folder / "run")
    cluster = find_cluster("auto")
    plan_s, plan = timed(lambda: make_plan(load_pipeline(path), run, cluster))
    submit_s, _ = timed(lambda: submit(plan))
    status_s, status = timed(lambda: run_status(run))
    assert all(phase.state == "PENDING" for phase in status.phases)
    calls = len(Ledger(run.ledger).jobs())
    assert calls == phases, f"{calls} sbatch calls for {phases} phases"
    return {"plan_s": plan_s, "submit_s": submit_s, "status_s": status_s, "sbatch_calls": calls}


def peer_submitit(folder: Path, phases: int, elements: int) -> float:
    import submitit

    def send() -> None:
        previous = None
        for i in range(phases):
            executor = submitit.SlurmExecutor(folder=folder / f"submitit{i}")
            extra = {"dependency": f"afterok:{previous}"} if previous else {}
            executor.update_parameters(time=10, gpus_per_node=8, array_parallelism=elements, **extra)
            executor._throttling = 0
            jobs = executor.map_array(abs, range(elements))
            previous = jobs[0].job_id.split("_")[0]

    with contextlib.redirect_stdout(io.StringIO()):
        return timed(send)[0]


def peer_loop(folder: Path, elements: int) -> float:
    script = folder / "loop.sh"
    script.write_text("#!/bin/bash\n#SBATCH --time=10 --gpus-per-node=8 --output=/dev/null\ntrue\n")
    return timed(
        lambda: [subprocess.run(["sbatch", script], check=True, stdout=subprocess.DEVNULL) for _ in range(elements)]
    )[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--phases", type=int, default=10)
    parser.add_argument("--elements", type=int, default=2000)
    parser.add_argument("--nodes", type=int, default=128)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="aok-", dir="/tmp"))
    cluster = devcluster.up(folder / "c", nodes=args.nodes, settings={"MaxJobCount": "100000"})
    os.environ.clear()
    os.environ.update(cluster.env())
    try:
        subprocess.run(
            ["scontrol", "update", f"nodename=n[1-{args.nodes}]", "state=drain", "reason=benchmark"], check=True
        )
        mine = ours(folder, args.phases, args.elements)
        submitit_s = peer_submitit(folder, args.phases, args.elements)
        loop_s = peer_loop(folder, args.elements)
    finally:
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{args.phases} phases × {args.elements} elements on {args.nodes} nodes: plan {mine['plan_s']:.2f} s, "
        f"submit {mine['submit_s']:.2f} s in {mine['sbatch_calls']} sbatch calls, status {mine['status_s']:.2f} s; "
        f"submitit {submitit_s:.2f} s; one sbatch an element, {args.elements} of them: {loop_s:.2f} s"
    )
    print(
        json.dumps(
            {
                "name": "launch",
                "ours": round(mine["submit_s"], 3),
                "peer": round(submitit_s, 3),
                "ratio": round(submitit_s / mine["submit_s"], 2),
                "unit": "s",
                **{k: round(v, 3) for k, v in mine.items()},
                "sbatch_loop_s": round(loop_s, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
