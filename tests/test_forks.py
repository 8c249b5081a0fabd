"""Forks do what commands do: the same words end with the same code and text as in a process of their own."""

import subprocess
import sys

import pytest

from tests.command import ROOT, afterok


@pytest.mark.parametrize("words", [["explain", "pack"], ["plan", "nowhere.yaml"]])
def test_a_command_in_a_fork_says_and_ends_as_one_in_a_process_of_its_own(words):
    command = [sys.executable, "-m", "launchers.cli", *words]
    real = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    fork = afterok(*words, check=None)
    assert (fork.returncode, fork.stdout, fork.stderr) == (real.returncode, real.stdout, real.stderr)


def test_a_command_runs_where_its_streams_are_closed():
    """As services start it; the files that it opens would get their numbers otherwise, and what children print."""
    shell = f"{sys.executable} -m launchers.cli explain pack <&- >&- 2>&-"
    done = subprocess.run(["sh", "-c", shell], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
