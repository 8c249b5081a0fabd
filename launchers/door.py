"""What slurm/pipeline.sbatch and slurm/phase.sbatch start in their job: `afterok submit` and `afterok resubmit`.

    python -P -m launchers.door pipeline PIPELINE [key=value ...] [--run DIR]
    python -P -m launchers.door phase RUN PHASE [key=value ...]

Before, the variables of `sbatch --export=…` are seen to: what Slurm lost of them on the way is refused, and quotes that
only held a comma together are taken off. The planner refuses those that the pipeline does not declare.

Where the plan is for this machine, `submit` stays until all of it has ended, as `run` does, and `resubmit` is refused:
their driver would end with this job (launchers/verbs/runs.py).
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("launchers", 1)[0] + "data_tools/own_packages.py")["hold"](children=False)

import os
import sys

from data_tools.mistake import EXIT_MISTAKE
from launchers import cli
from launchers.verbs.said import tell
from slurm import exported

DOORS = {"pipeline": "submit", "phase": "resubmit"}  # to the verb that each leads to


def main(words: list[str]) -> int:
    """Do what a door is for, and return the exit code of its verb."""
    if not words or words[0] not in DOORS:
        print(f"usage: {(__doc__ or '').partition(chr(10))[2].strip()}")
        return EXIT_MISTAKE
    door, rest = words[0], words[1:]
    typed = os.environ.get(exported.VARIABLE, "")
    if problems := exported.lost(typed, os.environ):
        for problem in problems:
            tell(problem)
        return EXIT_MISTAKE
    os.environ.update({exported.VARIABLE: typed} | exported.unquoted(typed, os.environ))
    return cli.main([DOORS[door], *rest])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
