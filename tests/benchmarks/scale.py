"""What the control plane costs as arrays grow: CPU seconds and memory of the verbs, files and opens of an element.

    python -m tests.benchmarks.scale [--sizes 200 2000 20000 100000] [--phases 10] [--peer-elements 2000]

Ten dependent phases of E elements each on a dev cluster whose nodes are all drained; each verb runs in a process of its
own, as one types it, and its time is CPU time with its children's. `resubmit` sends the first phase anew and rewires
the others. `status later` and the like are of a planted run all of whose phases but the last are sealed, and that one
half done, a tenth of it failed: 1.7 small files an element of it, so that the largest size takes minutes. The start of
an element is counted in this process, among E others that have left their leases, work and half of the seals. Growth is
the exponent between the two largest sizes: 1 is linear. The peer is submitit's map_array, which writes a pickle an
element; the ratio is its CPU time of 1,000 elements over that of our plan and submit.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from slurm.dev import cluster as devcluster

VERBS = ("plan", "submit", "status", "why", "resubmit", "ls")
MEASURED = (*VERBS, "status later", "why later", "ls later")
LATER = ("status", "why", "ls")  # measured again of a run that is half done


def pipeline_text(phases: int, elements: int) -> str:
    lines = ["name: scale", "waive: [P011]", "phases:"]  # nodes are drained
    for i in range(phases):
        needs = f", needs: [p{i - 1}]" if i else ""
        lines.append(f"  p{i}: {{uses: tests.toy.numbers, array: {elements}{needs}}}")
    return "\n".join(lines) + "\n"


def words_of(verb: str, folder: Path) -> list[str]:
    """Return the command line of a verb."""
    pipeline, run = str(folder / "scale.yaml"), str(folder / "run")
    return {
        "plan": ["plan", pipeline, "--run", run],
        "submit": ["submit", pipeline, "--run", run],
        "resubmit": ["resubmit", run, "p0"],
        "ls": ["ls", str(folder)],
    }.get(verb, [verb, run])


def cpu_s() -> float:
    """Return the CPU time of this process and of its children that have ended, in seconds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def verb_here(words: list[str]) -> None:
    """Run one verb in this process, and print what it took on the last line."""
    from launchers import cli

    began = cpu_s()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        code = cli.main(words)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"cpu_s": cpu_s() - began, "peak_mib": peak, "code": code}))


def measured(words: list[str]) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.scale", "--verb", json.dumps(words)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told.pop("code") in (0, 1), (words, done.stderr)
    return told


def half_done(folder: Path, phases: int, elements: int) -> dict[str, dict[str, float]]:
    """Return what verbs cost of a run whose phases but the last are sealed."""
    from tests.launchers.planted_run import many

    run = folder / "run"
    planting = multiprocessing.get_context("spawn").Process(target=many, args=(run, phases, elements))
    planting.start()  # a process of its own: what this one holds, its children seem to
    planting.join()
    assert planting.exitcode == 0
    words = {"status": ["status", str(run)], "why": ["why", str(run)], "ls": ["ls", str(folder)]}
    return {f"{verb} later": measured(words[verb]) for verb in LATER}


def element_start(folder: Path, elements: int) -> dict[str, int]:
    """Return opens, stats and names listed of one element's life among `elements`."""
    from jobs.artifacts.artifact import Artifact
    from tests.jobs import test_scale as counted

    counted.life_of_an_element(Artifact(folder / "first", counted.OWN + 1, fans_in=True))  # what a process reads once
    artifact = counted.half_sealed(folder / "KEY", max(elements, counted.OWN + 1))
    real = {name: getattr(os, name) for name in ("stat", "lstat", "listdir")}
    for name, function in real.items():
        setattr(os, name, counted.COUNT.of("names" if name == "listdir" else "stats", function))
    try:
        return dict(counted.COUNT(lambda: counted.life_of_an_element(artifact)))
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def files_an_element(folder: Path) -> tuple[float, int]:
    """Return the inodes that an element of a sealed phase leaves, and those of the phase itself: of two sizes, one line
    through what each has. Nothing is timed. From 1,000 elements on, folders that 1,000 share come to it.
    """
    from tests.jobs.test_inodes import Leaves, numbers

    totals = []
    for elements in (100, 300):
        place = folder / str(elements)
        place.mkdir(parents=True)
        leaves = Leaves(place / "run", *numbers(place), elements)
        with mock.patch("os.fsync"), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            for element in range(elements):
                leaves.element(element)
        totals.append(leaves.inodes().total())
    each = (totals[1] - totals[0]) / 200
    return each, round(totals[1] - 300 * each)


def submitit_cpu_s(folder: Path, elements: int) -> float:
    """Return the CPU time of submitit's map_array of one array, in seconds."""
    import submitit

    executor = submitit.SlurmExecutor(folder=folder / "submitit")
    executor.update_parameters(time=10, array_parallelism=elements)
    executor._throttling = 0
    began = cpu_s()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        executor.map_array(abs, range(elements))
    return cpu_s() - began


@contextlib.contextmanager
def drained_cluster(folder: Path, largest: int) -> Iterator[None]:
    """Have Slurm's commands of this process and its children ask a dev cluster that starts nothing."""
    settings = {"MaxArraySize": str(largest + 1), "MaxJobCount": str(max(10_000, 40 * largest))}
    cluster = devcluster.up(folder / "c", nodes=2, settings=settings)
    before = dict(os.environ)
    os.environ.update(cluster.env())
    try:
        subprocess.run(["scontrol", "update", "nodename=n[1-2]", "state=drain", "reason=benchmark"], check=True)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        cluster.down()


def growth(small: float, large: float, sizes: list[int]) -> float:
    """Return the exponent with which a cost grew between the two largest sizes; 0 where it is too small to tell."""
    return math.log(large / small) / math.log(sizes[-1] / sizes[-2]) if min(small, large) > 0 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 2000, 20_000, 100_000])
    parser.add_argument("--phases", type=int, default=10)
    parser.add_argument("--peer-elements", type=int, default=2000)
    parser.add_argument("--verb", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.verb:
        return verb_here(args.verb)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a time limit leaves no cluster behind
    folder = Path(tempfile.mkdtemp(prefix="aok-", dir="/tmp"))
    costs: dict[int, dict[str, Any]] = {}
    try:
        with drained_cluster(folder, max(*args.sizes, args.peer_elements)):
            for elements in args.sizes:
                place = folder / str(elements)
                place.mkdir()
                (place / "scale.yaml").write_text(pipeline_text(args.phases, elements))
                costs[elements] = {verb: measured(words_of(verb, place)) for verb in VERBS}
                costs[elements] |= half_done(place / "later", args.phases, elements)
                costs[elements]["start"] = element_start(place, elements)
                told = ", ".join(
                    f"{verb} {costs[elements][verb]['cpu_s']:.2f} CPU s {costs[elements][verb]['peak_mib']:.0f} MiB"
                    for verb in MEASURED
                )
                print(f"{args.phases} × {elements:,}: {told}; a start {costs[elements]['start']}", flush=True)
            peer_s = submitit_cpu_s(folder, args.peer_elements) / args.peer_elements * 1000
        files, of_phase = files_an_element(folder / "local")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    largest = costs[args.sizes[-1]]
    before = costs[args.sizes[-2]] if len(args.sizes) > 1 else largest
    exponents = {verb: growth(before[verb]["cpu_s"], largest[verb]["cpu_s"], args.sizes) for verb in MEASURED}
    exponents |= {
        name: growth(before["start"][name], largest["start"][name], args.sizes) for name in ("opens", "stats")
    }
    shown = ", ".join(f"{name} {value:.2f}" for name, value in exponents.items())
    print(f"growth from {args.sizes[-2:]}: {shown}; {files:g} inodes an element and {of_phase} of a phase")
    ours_s = (largest["plan"]["cpu_s"] + largest["submit"]["cpu_s"]) / (args.phases * args.sizes[-1]) * 1000
    print(
        json.dumps(
            {
                "name": "scale",
                "ours": round(ours_s, 5),
                "peer": round(peer_s, 5),
                "ratio": round(peer_s / ours_s, 2),
                "unit": "CPU s per 1,000 elements",
                "inodes": files,
                "inodes_of_a_phase": of_phase,
                "growth": {name: round(value, 3) for name, value in exponents.items()},
                "largest": {
                    verb: {name: round(value, 3) for name, value in largest[verb].items()} for verb in MEASURED
                },
                "start": {size: costs[size]["start"] for size in args.sizes},
            }
        )
    )


if __name__ == "__main__":
    main()
