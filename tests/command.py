"""Runs `afterok` as a user does: its own process, from the checkout's root, nothing mocked."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.forks import Forks

ROOT = Path(__file__).parents[1]
# of jobs/pipelines/tiny.yaml: all its phases, each as short as can be
TINY_SHORT = [
    "params.steps=100", "params.train_rows=4000", "params.test_rows=240", "params.samples=2", "params.grpo_steps=4",
    "params.rs_prompts=256", "params.rs_steps=4", "rs_sft.with.warmup_steps=0", "rs_sft.resources.ranks_per_node=1",
    "sft.with.checkpoint_every=20", "sft.with.log_every=10", "grpo.with.prompts=16", "grpo.with.checkpoint_every=2",
    "grpo.with.advantage.drop_equal_groups=false",
]  # fmt: skip


def afterok(
    *args: Any, env: dict | None = None, check: int | None = 0, timeout: float = 300
) -> subprocess.CompletedProcess:
    """The finished process; asserts its exit code unless `check` is None."""
    words, env, forks = [str(word) for word in args], {**os.environ, **(env or {})}, _forks()
    if forks.may_run(env):
        done = forks.run(words, env, timeout)
    else:
        done = subprocess.run(
            [sys.executable, "-m", "launchers.cli", *words],
            cwd=ROOT,
            text=True,
            capture_output=True,
            env=env,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
    if check is not None:
        assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@functools.cache
def _forks() -> Forks:
    return Forks()


def afterok_json(*args: Any, **kwargs: Any) -> Any:
    return json.loads(afterok(*args, "--json", **kwargs).stdout)


def heed_interrupts() -> None:
    """For `preexec_fn`: a shell starts what runs in its background with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def one_line(done: subprocess.CompletedProcess) -> str:
    """The message of a refused command: one line, no traceback."""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def wait_for(what: str, condition: Callable[[], Any], timeout: float = 180) -> Any:
    """A condition that takes its time to ask leaves as much of it to what it waits for."""
    end = time.monotonic() + timeout
    while (start := time.monotonic()) < end:
        value = condition()
        if value:
            return value
        time.sleep(max(0.05, time.monotonic() - start))
    raise AssertionError(f"timed out waiting for {what}")


def wait_until_sealed(run: Path, *phases: str, timeout: float = 180, **kwargs: Any) -> None:
    """Fails at once, with what `why` says, when one of them can no more be sealed."""
    end = time.monotonic() + timeout
    while _unsealed(run, phases):
        found = states(run, **kwargs)
        if {found[phase] for phase in phases} & {"FAILED", "DependencyNeverSatisfied"} or time.monotonic() > end:
            raise AssertionError(f"{found}\n{afterok('why', run, check=None, **kwargs).stdout}")
        look_again = time.monotonic() + 5
        while _unsealed(run, phases) and time.monotonic() < look_again:
            time.sleep(0.1)


def _unsealed(run: Path, phases: Iterable[str]) -> list[str]:
    return [phase for phase in phases if not list(run.glob(f"{phase}/*/seal.json"))]


def states(run: Path, **kwargs: Any) -> dict[str, str]:
    return {phase["phase"]: phase["state"] for phase in afterok_json("status", run, **kwargs)["phases"]}


def phase_status(run: Path, name: str, **kwargs: Any) -> dict[str, Any]:
    return next(phase for phase in afterok_json("status", run, **kwargs)["phases"] if phase["phase"] == name)


ANY_DISK = "--waive=D001"  # for plans of models that are larger than the disk of the machine may be

TOY = """
name: toy
params: {start: 1, factor: 2}
phases:
  numbers: {uses: tests.toy.numbers, array: 3, with: {start: "${params.start}"}}
  total:
    uses: tests.toy.total
    with: {numbers: "${phases.numbers.out}", factor: "${params.factor}"}
  again: {uses: tests.toy.numbers, needs: [total], with: {start: 5}}
"""


MIDDLE = ROOT / "tests" / "toy" / "middle.yaml"


def write_toy(folder: Path) -> Path:
    path = folder / "toy.yaml"
    path.write_text(TOY)
    return path
