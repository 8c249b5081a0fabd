"""A rehearsal: the whole graph runs, stops, restarts and is sealed as ever, and never stands in for the real thing."""

import json
import sys
import time
from pathlib import Path

import pytest

from jobs.artifacts.run_folder import RunFolder
from jobs.artifacts.seal import read_seal
from launchers.planning.ledger import Ledger
from slurm.client import Slurm
from tests.cluster import bring_back, cluster_for_a_while, crash_node, require_packages, rows_of
from tests.command import ROOT, afterok, afterok_json, one_line, states, wait_for

TEXT = """
name: survive
phases:
  numbers: {uses: tests.toy.numbers, array: 3, with: {fail_at: 1}}
  counter:
    uses: tests.toy.counter
    needs: [numbers]
    resources: {ranks_per_node: 2, nodes: 2, gpus_per_node: 8, partition: preempt, time: "1-00:00:00"}
  after: {uses: tests.toy.numbers, array: 3, needs: [{numbers: aftercorr}]}
  total: {uses: tests.toy.total, with: {numbers: "${phases.counter.out}"}}
"""


@pytest.fixture
def pipeline(tmp_path):
    (tmp_path / "survive.yaml").write_text(TEXT)
    return tmp_path / "survive.yaml"


def seals(run: Path) -> list:
    return [read_seal(path) for path in run.glob("*/*/seal.json")]


def lives(run: Path, phase: str) -> list[tuple[int, str]]:
    return [(outcome.restart, outcome.state) for outcome in RunFolder(run).outcomes(phase)]


def at_work(run: Path, phase: str, restart: int, least: int) -> None:
    """Wait until this life of a phase has told some of its progress."""

    def told() -> bool:
        done = [json.loads(path.read_text())["done"] for path in run.glob(f"{phase}/*/progress/0000.json")]
        return bool(done) and done[0] >= least

    wait_for(f"life {restart} of {phase}", lambda: any(run.glob(f"{phase}/*/leases/0000.*.r{restart}.g0")), 90)
    wait_for("its progress", told, 90)


def preempt(slurm: Slurm, nodes: int) -> str:
    """Take all nodes for a moment; what runs on the lower partition has to stop."""
    command = ["--partition=batch", f"--nodes={nodes}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    job = slurm.sbatch(command)
    wait_for("the higher job", lambda: rows_of(slurm, job)[0].state in ("RUNNING", "COMPLETED"), 60)
    return job


def lose_node(cluster, slurm: Slurm, job: str) -> str:
    """Crash the last node of a job, and have Slurm know of it as after SlurmdTimeout."""
    last = slurm.run(["scontrol", "show", "hostnames", rows_of(slurm, job)[0].nodelist]).split()[-1]
    crash_node(cluster, last)
    slurm.run(["scontrol", "update", f"nodename={last}", "state=down", "reason=crash"])
    return last


def test_a_rehearsal_on_slurm_goes_through_preemption_requeue_and_a_lost_node(pipeline, tmp_path, dev_cluster):
    env, slurm, run = dev_cluster.env(), Slurm(dev_cluster.env()), tmp_path / "run"
    scale = ["--rehearse", "--rehearse-scale", "0.0001"]  # 9 s for `counter`, 1.4 s for the others
    said = afterok("submit", pipeline, *scale, "--run", run, env=env).stderr
    assert "a rehearsal: each phase sleeps 0.0001 of the time limit of its job" in said
    at_work(run, "counter", restart=0, least=150)
    job = {entry.phase: entry.job for entry in Ledger(run / "ledger.jsonl").jobs()}["counter"]
    preempt(slurm, nodes=4)
    at_work(run, "counter", restart=1, least=200)
    node = lose_node(dev_cluster, slurm, job)
    try:
        wait_for("the end", lambda: len(seals(run)) == 4, 90)
    finally:
        bring_back(dev_cluster, node)
    assert int(slurm.job(job)["Restarts"]) >= 2
    assert lives(run, "counter")[0] == (0, "stopped") and lives(run, "counter")[-1][1] == "sealed"
    (whole,) = [seal for seal in seals(run) if seal.content["phase"] == "counter"]
    assert "resumed at" in whole.facts["headline"] and whole.is_rehearsal
    assert len(seals(run)) == 4 and all(seal.is_rehearsal for seal in seals(run))
    assert not list(run.glob("numbers/*/work/*/numbers.txt")), "a payload ran"


def test_a_rehearsal_and_the_real_thing_share_nothing(pipeline, tmp_path):
    here = [pipeline, "cluster=local", "numbers.with.fail_at=null", "counter.resources={}", "after.needs=[]"]
    rehearsal = tmp_path / "rehearsal"
    small = ["--rehearse", "--rehearse-scale", "1e-5"]
    afterok("run", *here, *small, "--run", rehearsal)
    assert all(seal.is_rehearsal for seal in seals(rehearsal)) and len(seals(rehearsal)) == 4
    assert "nothing to submit" in afterok("submit", *here, *small, "--run", rehearsal).stdout
    resubmitted = afterok_json("resubmit", rehearsal, "total", "total.with.factor=2")  # it stays a rehearsal
    assert list(resubmitted["jobs"]) == ["total"]
    afterok("status", rehearsal, "--watch")
    assert all(seal.is_rehearsal for seal in seals(rehearsal)) and len(seals(rehearsal)) == 5
    refused = one_line(afterok("submit", *here, "--run", rehearsal, check=2))
    assert f"{rehearsal} is a rehearsal's" in refused
    real = tmp_path / "real"
    afterok("run", *here, "--run", real)
    assert not any(seal.is_rehearsal for seal in seals(real))
    assert "is a real run" in one_line(afterok("submit", *here, *small, "--run", real, check=2))
    keys = [{seal.content["key"] for seal in seals(run)} for run in (rehearsal, real)]
    assert not keys[0] & keys[1]
    # not even one that somebody moves into the other's place is taken for it
    for seal in seals(rehearsal):
        if seal.content["phase"] == "counter":
            place = next(path for path in real.glob("counter/*/seal.json"))
            place.write_bytes(seal.path.read_bytes())
    worker = RunFolder(real)
    from jobs.upstream import Upstream

    phases = worker.frozen(1)
    with pytest.raises(Exception, match="is of a rehearsal; submit again"):
        Upstream(worker, phases, phases["total"], 0).read()


@pytest.mark.parametrize("share", ["0", "1.5", "-1", "much"])
def test_a_scale_is_a_share(pipeline, share):
    done = afterok("submit", pipeline, "--rehearse", "--rehearse-scale", share, check=2)
    assert "--rehearse-scale" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.soak
def test_megatrons_grpo_on_128_nodes_with_a_preemption_and_a_lost_node_in_under_two_minutes(tmp_path, scrub_slurm):
    require_packages()
    run = tmp_path / "run"
    with cluster_for_a_while(nodes=128) as cluster:
        env, slurm = cluster.env(), Slurm(cluster.env())
        began = time.monotonic()
        scale = ["--rehearse", "--rehearse-scale", "0.0005"]  # 7 s, 22 s and 7 s
        words = [ROOT / "jobs/pipelines/megatron_grpo.yaml", *scale, "grpo.resources.partition=preempt", "--run", run]
        afterok("submit", *words, env=env)
        at_work(run, "grpo", restart=0, least=50)
        job = {entry.phase: entry.job for entry in Ledger(run / "ledger.jsonl").jobs()}["grpo"]
        preempted = time.monotonic()
        preempt(slurm, nodes=128)
        at_work(run, "grpo", restart=1, least=150)
        lost = time.monotonic()
        lose_node(cluster, slurm, job)
        wait_for("the end", lambda: len(seals(run)) == 3, 240)
        took = time.monotonic() - began
        print(
            f"megatron_grpo on 128 nodes: {took:.0f} s; preempted at {preempted - began:.0f} s, "
            f"a node lost at {lost - began:.0f} s; lives of grpo: {lives(run, 'grpo')}",
            file=sys.stderr,
        )
        assert set(states(run, env=env).values()) == {"COMPLETED"}
        assert int(slurm.job(job)["Restarts"]) >= 2 and all(seal.is_rehearsal for seal in seals(run))
        assert took < 120
