"""Run any kind of phase without a pipeline, a run folder or Slurm: by plain python, or as ranks of torchrun.

    python -m jobs.bare materialize --config data.yaml --out DIR --elements 4
    torchrun --nproc-per-node 2 -m jobs.bare sft --config sft.yaml --out DIR [--keep DIR] [key=value ...]
    python -m jobs.bare my_package.my_phase --config mine.yaml --out DIR

The YAML file holds the phase's settings (`afterok explain KIND`), as `with` does, with folders in the place of
references. The elements of a phase that can be split run one after the other, each into OUT.parts/INDEX, and are merged
into OUT; with --index one of them runs alone, and --merge merges all. Rank 0 prints the facts as JSON, and its progress
to standard error. Nothing is sealed. A phase that can stop does so at SIGTERM and SIGUSR2 with
code 5, and goes on when called again. Exit code 2 and one line for a user's mistake.
"""

from jobs.stopping import SIGNALS

if __name__ == "__main__":
    SIGNALS.install()  # before the other imports: without a handler SIGUSR2 kills

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("jobs", 1)[0] + "data_tools/own_packages.py")["hold"]()

import argparse
import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from data_tools.base.inside import expanded
from data_tools.mistake import EXIT_MISTAKE, Problem, UserMistake, nearest
from data_tools.progress import Stopped
from jobs.artifacts.layout import element_name
from jobs.kind import PhaseKind, Placement, find_kind, inputs, kind_names
from jobs.retry import EXIT_UNFINISHED
from jobs.task import Task
from megatron_ext.entrypoints.bare import check_folders, read_config


class Bare:
    """One kind of phase at work on this rank, with its settings."""

    def __init__(self, kind: PhaseKind, config: Any, arguments: argparse.Namespace):
        self.kind, self.config, self.name = kind, config, arguments.kind
        self.out, self.elements = arguments.out, arguments.elements
        self.keep = arguments.keep or self.out.with_name(f"{self.out.name}.keep")
        self.parts = self.out.with_name(f"{self.out.name}.parts")
        self.rank, self.ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    def check(self) -> None:
        """Refuse settings, and folders in the way. Raises UserMistake with all problems of the settings."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", str(self.ranks)))
        placement = Placement(ranks=self.ranks, nodes=max(1, self.ranks // local), elements=self.elements)
        problems = self.kind.check(self.config, placement) + [
            Problem(key, f"{entry!r}: no such file or folder")
            for key, entry, is_hub in inputs(self.kind.config, self.config)
            if is_hub != "hub" and not expanded(entry).exists()
        ]
        if problems:
            raise UserMistake(problems)
        if self.elements > 1 and not self.kind.can_split:
            raise UserMistake(f"--elements {self.elements}: phase kind {self.name} cannot be split into elements")
        if self.rank == 0:
            check_folders(self.out, self.keep)

    def part(self, index: int) -> Path:
        """Return what an element fills: OUT itself where nothing is to be merged."""
        return self.parts / element_name(index) if self.kind.can_split else self.out

    def run(self, index: int) -> dict[str, Any]:
        """Do the work of one element on this rank. Raises Stopped where it was asked to stop, and did."""
        out = self.part(index)
        keep = self.keep if self.elements == 1 else self.keep / "elements" / element_name(index)
        if self.rank == 0:
            if self.kind.can_split:
                shutil.rmtree(out, ignore_errors=True)  # what an earlier call left unfinished
            out.mkdir(parents=True, exist_ok=True)
            keep.mkdir(parents=True, exist_ok=True)
        return self.kind.run(self.config, self._task(index, out, keep)) or {}

    def merge(self) -> dict[str, Any]:
        """Merge all elements into OUT, on rank 0. Raises UserMistake where one is missing."""
        parts = [self.part(index) for index in range(self.elements)]
        if missing := [part for part in parts if not part.is_dir()]:
            raise UserMistake(f"{missing[0]} is not there; run --index {int(missing[0].name)} first")
        self.out.mkdir(parents=True, exist_ok=True)
        self.keep.mkdir(parents=True, exist_ok=True)
        return self.kind.finish(parts, self.config, self._task(0, self.out, self.keep)) or {}

    def _task(self, index: int, out: Path, keep: Path) -> Task:
        return Task(
            phase=self.name,
            index=index,
            count=self.elements,
            value=index,
            out=out,
            keep=keep,
            rank=self.rank,
            world_size=self.ranks,
            stop=SIGNALS.asked,
        )


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", help="a kind of phase, such as sft, or a module of yours")
    parser.add_argument("--config", type=Path, required=True, help="YAML file with the phase's settings")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not hold anything yet")
    parser.add_argument("--keep", type=Path, help="checkpoints and metrics, kept between calls (default OUT.keep)")
    parser.add_argument("--elements", type=int, default=1, metavar="N", help="elements of a phase that can be split")
    parser.add_argument("--index", type=int, metavar="I", help="only this element")
    parser.add_argument("--merge", action="store_true", help="only merge the elements, which have all run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted settings")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Read the command line, check the settings, and do this rank's work. Return the exit code."""
    arguments = parser().parse_intermixed_args(argv)
    sys.path.append(os.getcwd())  # for kinds of the user's
    try:
        kind = find_kind(arguments.kind)
        if kind is None:
            raise UserMistake(f"unknown phase kind {arguments.kind!r}{nearest(arguments.kind, kind_names())}")
        if arguments.elements < 1 or not 0 <= (arguments.index or 0) < arguments.elements:
            raise UserMistake(f"--elements {arguments.elements} --index {arguments.index}: there is no such element")
        bare = Bare(kind, read_config(kind.config, arguments.config, arguments.overrides), arguments)
        bare.check()
        chosen = range(bare.elements) if arguments.index is None else [arguments.index]
        facts: dict[str, Any] = {}
        with contextlib.redirect_stdout(
            sys.stderr
        ):  # progress, and what libraries print: standard output is the facts'
            for index in [] if arguments.merge else chosen:
                facts = bare.run(index)
            if bare.kind.can_split and arguments.index is None and bare.rank == 0:
                facts = bare.merge()
    except UserMistake as mistake:
        if int(os.environ.get("RANK", "0")) == 0 or getattr(mistake, "of_some_ranks", False):
            print(mistake, file=sys.stderr)
        return getattr(mistake, "exit_code", EXIT_MISTAKE)
    except Stopped as stopped:
        print(f"{arguments.kind}: {stopped}; the same call goes on", file=sys.stderr)
        return EXIT_UNFINISHED
    if bare.rank == 0:
        print(json.dumps(facts, indent=1, sort_keys=True, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
