"""Shims in PATH that stand before sbatch and scontrol, count their calls, and fail or kill at one of them."""

import os
import subprocess

import pytest

from slurm.client import Slurm
from tests.command import write_toy

SHIM = """#!/bin/bash
# Counts the calls of all shims that change something; at call number $SHIM_AT it does $SHIM_DO.
if [ {name} = scontrol ] && [ "$1" != release ] && [ "$1" != update ]; then exec {real} "$@"; fi
failed="{name}: error: Batch job submission failed"
begun="$2_0,2: No error
$2_1: Job has already finished"
n=$(( $(cat {count} 2>/dev/null || echo 0) + 1 )); echo $n > {count}
if [ "$n" = "$SHIM_AT" ]; then
    case "$SHIM_DO" in
        kill-before) kill -9 $PPID; exit 1;;
        kill-after) {real} "$@" > /dev/null; kill -9 $PPID; exit 1;;
        open-after) {real} "$@" > /dev/null
            echo "$failed: Socket timed out on send/recv operation" >&2; exit 1;;
        hang-after) {real} "$@" > /dev/null; sleep 300;;
        open-before) echo "$failed: Unable to contact slurm controller (connect failure)" >&2; exit 1;;
        begin-before) {real} "$1" "$2" dependency=
            while squeue -h -j "${{2#jobid=}}" -t PENDING | grep -q .; do sleep 0.2; done;;
        begun-after) {real} "$@" > /dev/null; echo "$begun" >&2; exit 1;;
        begun-before) echo "$begun" >&2; exit 1;;
        refuse) echo "$failed: Job violates accounting/QOS policy" >&2; exit 1;;
    esac
fi
exec {real} "$@"
"""


@pytest.fixture
def shimmed(tmp_path, dev_cluster):
    """(pipeline, run, env, shim(at, do) -> env) on a cluster whose client commands can be interrupted."""
    env, folder, count = dev_cluster.env(), tmp_path / "shims", tmp_path / "count"
    folder.mkdir()
    for name in ("sbatch", "scontrol"):
        real = subprocess.run(["which", name], capture_output=True, text=True).stdout.strip()
        (folder / name).write_text(SHIM.format(count=count, real=real, name=name))
        (folder / name).chmod(0o755)

    def shim(at, do):
        count.unlink(missing_ok=True)
        return env | {"PATH": f"{folder}:{os.environ['PATH']}", "SHIM_AT": str(at), "SHIM_DO": do}

    return write_toy(tmp_path), tmp_path / "run", env, shim


def submitted_jobs(run, env):
    """Ids of this run's jobs that Slurm knows and that were not cancelled."""
    return sorted(
        {
            row.array_job_id or row.job_id
            for row in Slurm(env).queue()
            if f".{run.name}.a" in row.name and row.state != "CANCELLED" and str(run) in _workdir(env, row)
        }
    )


def _workdir(env, row):
    return subprocess.run(["scontrol", "show", "job", row.job_id], env=env, capture_output=True, text=True).stdout
