"""What a job asks Slurm for is in no key: other resources replace what waits, and what they cannot is said."""

import subprocess

import pytest

from launchers.planning.ledger import Ledger
from tests.command import afterok, afterok_json, wait_for
from tests.launchers.shims import submitted_jobs

THREE = """
name: three
phases:
  a: {uses: tests.toy.numbers, array: 2, with: {seconds: 60}}
  b: {uses: tests.toy.total, with: {numbers: "${phases.a.out}"}}
  c: {uses: tests.toy.numbers, needs: [b]}
"""


def asked(run, env):
    """{phase: the time limit that Slurm has for its job that waits or runs}."""
    printed = subprocess.run(
        ["squeue", "-h", "-r", "-t", "PD,R", "-o", "%j %l %E"], env=env, capture_output=True, text=True
    ).stdout
    mine = [line.split() for line in printed.splitlines() if f".{run.name}.a" in line]
    return {name.split(".")[0]: limit for name, limit, *_ in mine}


@pytest.fixture
def three(shimmed):
    pipeline, run, env, shim = shimmed
    pipeline.write_text(THREE)
    yield pipeline, run, env, shim
    afterok("cancel", run, env=env, check=None)


@pytest.mark.parametrize("at, do", [(4, "kill-before"), pytest.param(2, "kill-after", marks=pytest.mark.soak)])
def test_other_resources_after_a_killed_submitter_are_what_runs(three, at, do):
    pipeline, run, env, shim = three
    afterok("submit", pipeline, "--run", run, "a.resources.time=5", env=shim(at, do), check=-9)
    afterok("submit", pipeline, "--run", run, "a.resources.time=33", "b.resources.time=12", env=env)
    found = asked(run, env)
    assert (found["a"], found["b"]) == ("33:00", "12:00")
    assert len(submitted_jobs(run, env)) == 3


def test_what_waits_is_replaced_what_waits_on_it_rewired_and_what_has_begun_named(three):
    pipeline, run, env, _ = three
    afterok("submit", pipeline, "--run", run, env=env)
    wait_for("a start", lambda: list(run.glob("a/*/leases/*")))
    before = asked(run, env)
    done = afterok_json("submit", pipeline, "--run", run, "b.resources.time=7", env=env)
    assert list(done["jobs"]) == ["b"] and done["rewired"] == ["c"] and not done["not_applied"]
    assert asked(run, env) == before | {"b": "7:00"}
    job = next(entry for entry in Ledger(run / "ledger.jsonl").jobs() if entry.phase == "c")
    assert job.waits == {"b": done["jobs"]["b"]}
    done = afterok("submit", pipeline, "--run", run, "b.resources.time=7", "a.resources.time=9", env=env, check=1)
    assert "→ 9" in done.stderr and "is not applied" in done.stderr and "submitted" not in done.stdout
    assert asked(run, env) == before | {"b": "7:00"}
    again = afterok_json("submit", pipeline, "--run", run, "b.resources.time=7", env=env)  # as it is: nothing to say
    assert not again["jobs"] and not again["rewired"] and not again["not_applied"]
