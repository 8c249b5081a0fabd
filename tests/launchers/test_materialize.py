"""A materialize array whose elements are killed at any moment seals the bytes of one that was left alone."""

import os
import random
import signal
import subprocess
import time

import pytest

from jobs.artifacts.seal import read_seal
from tests.command import afterok, states, wait_for
from tests.data_tools.chats import CONVERSATIONS, TOOLS, template_of, write_tokenizer
from tests.data_tools.test_materialize_chats import lines_of

PIPELINE = """
name: chats
phases:
  data:
    uses: materialize
    array: 3
    with: {tokenizer: TOKENIZER, source: {inputs: [INPUT]}, dedupe: false, workers: WORKERS}
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    tokenizer = write_tokenizer(folder / "tokenizer", template=template_of("qwen3"))
    (folder / "chats.jsonl").write_bytes(lines_of(*CONVERSATIONS.values(), tools=TOOLS) * 200)

    def write(workers):
        text = PIPELINE.replace("TOKENIZER", str(tokenizer)).replace("INPUT", str(folder / "chats.jsonl"))
        (folder / "chats.yaml").write_text(text.replace("WORKERS", str(workers)))
        return folder / "chats.yaml"

    return write


def sealed(run):
    return read_seal(next(run.glob("data/*/seal.json")))


@pytest.fixture(scope="module")
def undisturbed(pipeline, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    afterok("run", pipeline(1), "cluster=local", "--run", run, timeout=400)
    return sealed(run).digest


def workers_of(run):
    """Processes of the elements, leaders first."""
    found = subprocess.run(["pgrep", "-f", f"jobs.worker {run} data"], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


@pytest.mark.parametrize("trial", [0, *(pytest.param(trial, marks=pytest.mark.soak) for trial in range(1, 12))])
def test_killed_elements_leave_the_sealed_bytes_unchanged(pipeline, undisturbed, tmp_path, trial):
    chance = random.Random(trial)
    path, run = pipeline(1 + trial % 2), tmp_path / "run"
    afterok("submit", path, "cluster=local", "--run", run)
    wait_for("a lease", lambda: list(run.glob("data/*/leases/*")), 200)
    for _ in range(1 + trial % 3):
        time.sleep(chance.uniform(0, 3))
        for pid in chance.sample(workers := workers_of(run), min(len(workers), 2)):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    for _ in range(4):  # what the killed attempt left is tried anew
        afterok("run", path, "cluster=local", "--run", run, check=None, timeout=400)
        if states(run)["data"] == "COMPLETED":
            break
    assert sealed(run).digest == undisturbed
    wait_for("worker processes to leave", lambda: not workers_of(run), 100)
