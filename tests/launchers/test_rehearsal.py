"""A rehearsal: the whole graph runs, stops, restarts and is sealed as ever, and never stands in for the real thing."""

import json
import sys
import time
from pathlib import Path

import pytest

from data_tools.mistake import UserMistake
from jobs.artifacts.run_folder import RunFolder
from jobs.artifacts.seal import read_seal
from jobs.schema.pipeline import load_pipeline
from jobs.upstream import Upstream
from launchers import cli
from launchers.planning.ledger import Ledger
from launchers.planning.plan import Plan
from launchers.planning.planner import make_plan
from launchers.planning.recorded import recorded_pipeline
from launchers.submission.freeze import freeze
from slurm.client import Slurm
from slurm.detect import find_cluster
from tests.cluster import bring_back, cluster_for_a_while, crash_node, require_packages, rows_of
from tests.command import ROOT, afterok, states, wait_for

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


def lose_node(cluster, slurm: Slurm, job: str, place: int) -> str:
    """Crash the node at this place of a job, and have Slurm know of it as after SlurmdTimeout; return its name."""
    node = slurm.run(["scontrol", "show", "hostnames", rows_of(slurm, job)[0].nodelist]).split()[place]
    crash_node(cluster, node)
    slurm.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=crash"])
    return node


def test_a_rehearsal_on_slurm_goes_through_preemption_requeue_and_a_lost_node(pipeline, tmp_path, dev_cluster):
    env, slurm, run = dev_cluster.env(), Slurm(dev_cluster.env()), tmp_path / "run"
    scale = ["--rehearse", "--rehearse-scale", "0.0001"]  # 9 s for `counter`, 1.4 s for the others
    said = afterok("submit", pipeline, *scale, "--run", run, env=env).stderr
    assert "a rehearsal: each phase sleeps 0.0001 of its planned time or limit" in said
    at_work(run, "counter", restart=0, least=150)
    job = {entry.phase: entry.job for entry in Ledger(run / "ledger.jsonl").jobs()}["counter"]
    preempt(slurm, nodes=4)
    at_work(run, "counter", restart=1, least=200)
    node = lose_node(dev_cluster, slurm, job, place=-1)
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


SHORT = """
name: short
phases:
  numbers: {uses: tests.toy.numbers, array: 2}
  total: {uses: tests.toy.total, with: {numbers: "${phases.numbers.out}"}}
"""


def planned(file: Path, run: Path, rehearsed: float) -> Plan:
    pipeline = load_pipeline(file, ["cluster=local"])
    pipeline.rehearsed = rehearsed
    return make_plan(pipeline, RunFolder(run), find_cluster("local"))


def test_a_rehearsal_and_the_real_thing_share_nothing(tmp_path):
    file, rehearsal, real = tmp_path / "short.yaml", tmp_path / "rehearsal", tmp_path / "real"
    file.write_text(SHORT)
    afterok("run", file, "cluster=local", "--rehearse", "--rehearse-scale", "1e-5", "--run", rehearsal)
    assert all(seal.is_rehearsal for seal in seals(rehearsal)) and len(seals(rehearsal)) == 2
    assert [phase.action for phase in planned(file, rehearsal, 0.5).phases] == ["reuse", "reuse"]  # whatever the scale
    assert recorded_pipeline(RunFolder(rehearsal), [], {}).rehearsed == 1e-5  # it stays one when it is resubmitted
    with pytest.raises(UserMistake, match="is a rehearsal's: choose another folder"):
        planned(file, rehearsal, 0.0)
    plan = planned(file, real, 0.0)
    freeze(plan, 1)
    with pytest.raises(UserMistake, match="is a real run: a rehearsal needs a folder of its own"):
        planned(file, real, 0.5)
    frozen = plan.run.frozen(1)
    keys = {seal.content["phase"]: seal.content["key"] for seal in seals(rehearsal)}
    assert keys.keys() == frozen.keys() and not set(keys.values()) & {phase.key for phase in frozen.values()}
    # not even one that somebody moves into the other's place is taken for it
    place = plan.run.artifact(frozen["numbers"]).seal_path
    place.parent.mkdir(parents=True)
    place.write_bytes(next(rehearsal.glob("numbers/*/seal.json")).read_bytes())
    with pytest.raises(UserMistake, match="is of a rehearsal; submit again"):
        Upstream(plan.run, frozen, frozen["total"], 0).read()


@pytest.mark.parametrize("share", ["0", "1.5", "-1", "much"])
def test_a_scale_is_a_share(capsys, share):
    with pytest.raises(SystemExit) as refused:
        cli.main(["submit", "toy.yaml", "--rehearse", "--rehearse-scale", share])
    assert refused.value.code == 2 and "--rehearse-scale" in capsys.readouterr().err


def test_a_scale_without_the_rehearsal_does_not_submit_the_real_thing(pipeline, tmp_path, capsys):
    words = [str(pipeline), "cluster=local", "--run", str(tmp_path / "run"), "--rehearse-scale", "0.5"]
    for verb in ("submit", "run"):
        assert cli.main([verb, *words]) == 2 and "say --rehearse too" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.soak
def test_megatrons_grpo_on_128_nodes_with_a_preemption_and_a_lost_node(tmp_path, scrub_slurm):
    """It prints how long that took; two minutes are the aim on two cores that do nothing else.

    The node is the job's first: its batch script, rank 0 and the owner of the lease are lost. Of another one, the
    slurmstepd of the first may wait for that node's word for 60 s, and 3 s for each level of the step's tree, which no
    setting of slurm.conf changes (REVERSE_TREE_CHILDREN_TIMEOUT of Slurm's reverse_tree.h; so compiled into 22.05.8).
    """
    require_packages()
    run = tmp_path / "run"
    with cluster_for_a_while(nodes=128) as cluster:
        env, slurm = cluster.env(), Slurm(cluster.env())
        began = time.monotonic()
        scale = ["--rehearse", "--rehearse-scale", "0.0003"]  # 4 s, 13 s and 4 s
        words = [ROOT / "jobs/pipelines/megatron_grpo.yaml", *scale, "grpo.resources.partition=preempt", "--run", run]
        afterok("submit", *words, env=env)
        at_work(run, "grpo", restart=0, least=50)
        job = {entry.phase: entry.job for entry in Ledger(run / "ledger.jsonl").jobs()}["grpo"]
        preempted = time.monotonic()
        preempt(slurm, nodes=128)
        at_work(run, "grpo", restart=1, least=150)
        lost = time.monotonic()
        lose_node(cluster, slurm, job, place=0)
        wait_for("the end", lambda: len(seals(run)) == 3, 240)
        took = time.monotonic() - began
        print(
            f"megatron_grpo on 128 nodes: {took:.0f} s; preempted at {preempted - began:.0f} s, "
            f"a node lost at {lost - began:.0f} s; lives of grpo: {lives(run, 'grpo')}",
            file=sys.stderr,
        )
        assert set(states(run, env=env).values()) == {"COMPLETED"}
        assert int(slurm.job(job)["Restarts"]) >= 2 and all(seal.is_rehearsal for seal in seals(run))
