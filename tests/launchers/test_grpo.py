"""GRPO that Slurm preempts, and that loses its node, at random moments: it ends as the run that nobody disturbed."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest

from jobs.artifacts.run_folder import RunFolder
from jobs.artifacts.seal import read_seal
from launchers.planning.ledger import Ledger
from slurm.client import Slurm
from tests.cluster import bring_back, cluster_for_a_while, crash_node, require_packages, rows_of
from tests.command import afterok, wait_for, wait_until_sealed

pytestmark = pytest.mark.soak

PIPELINE = """
name: rollouts
phases:
  init: {uses: init_model, with: {alphabet_task: calculator, seed: 1}}
  imported: {uses: import_hf, with: {source: "${phases.init.out}"}}
  grpo:
    uses: grpo
    with:
      model: "${phases.imported.out}"
      mix: {entries: {toy: {task: "tests.toy.digits:small", source: {inputs: [PROMPTS]}}}}
      steps: 12
      prompts: 8
      group: 8
      lr: 1e-3
      rewarding: {mask_truncated: false}
      sampling: {max_tokens: 48}
      engine: {kv_gib: 0.1, block_size: 16, max_batch: 8}
      checkpoint_every: 3
      record_s: 0.2
    resources: {role: cpu, ranks_per_node: 2}
"""


@pytest.fixture(scope="module")
def cluster(scrub_slurm):
    """It gives a node up after a few seconds of silence."""
    require_packages()
    with cluster_for_a_while(nodes=2, settings={"SlurmdTimeout": "3"}) as found:
        yield found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(pipeline, run): never interrupted, as local processes."""
    folder = tmp_path_factory.mktemp("rollouts")
    prompts, pipeline = folder / "prompts.jsonl", folder / "rollouts.yaml"
    prompts.write_text("".join(json.dumps({"prompt": f"{a}*{b}="}) + "\n" for a in range(20) for b in range(20)))
    pipeline.write_text(PIPELINE.replace("PROMPTS", str(prompts)))
    afterok("run", pipeline, "cluster=local", "--run", folder / "run", timeout=900)
    return pipeline, folder / "run"


def facts(run: Path) -> dict:
    return read_seal(next(run.glob("grpo/*/seal.json"))).facts


def lines(run: Path, pattern: str) -> list[dict]:
    return [
        json.loads(line) for path in sorted(run.glob(f"grpo/*/{pattern}")) for line in path.read_text().splitlines()
    ]


def used(run: Path) -> list[tuple]:
    return [
        (s["step"], s["item"], s["sample"], s["completion"], s["reward"], s["advantage"])
        for s in lines(run, "samples/*.jsonl")
    ]


def preempt(slurm: Slurm) -> None:
    high = slurm.sbatch(["--partition=batch", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"])
    wait_for(
        "the higher job",
        lambda: not rows_of(slurm, high) or rows_of(slurm, high)[0].state in ("RUNNING", "COMPLETED"),
        60,
    )


def power_cut(cluster, slurm: Slurm, job: str) -> None:
    node = rows_of(slurm, job)[0].nodelist
    crash_node(cluster, node)
    wait_for("Slurm to notice", lambda: rows_of(slurm, job)[0].state != "RUNNING", 120)
    bring_back(cluster, node)


@pytest.mark.parametrize("seed", range(10))
def test_two_interruptions_of_grpo_change_nothing(whole, cluster, tmp_path, seed):
    pipeline, undisturbed = whole
    run, env, slurm, dice = tmp_path / "run", cluster.env(), Slurm(cluster.env()), random.Random(seed)
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "grpo")
    afterok("submit", pipeline, "grpo.resources.partition=preempt", "--run", run, env=env)
    job = {entry.phase: entry.job for entry in Ledger(run / "ledger.jsonl").jobs()}["grpo"]
    hows = dice.sample(["preempted", dice.choice(["preempted", "node"])], 2)
    for start, how in enumerate(hows):
        wait_for("its start", lambda start=start: list(run.glob(f"grpo/*/leases/0000.a*.r{start}.*")))
        began = time.time()
        wait_for(
            "samples",
            lambda began=began: any(
                path.stat().st_mtime > began for path in run.glob("grpo/*/rollouts/step_*/rank_*.jsonl")
            ),
        )
        time.sleep(dice.uniform(0, 2))
        if how == "node":
            power_cut(cluster, slurm, job)
        else:
            preempt(slurm)
    wait_until_sealed(run, "grpo", env=env, timeout=300)
    ends = RunFolder(run).outcomes("grpo")
    print(f"seed {seed}: {[(how, end.state, end.done) for how, end in zip(hows, ends)]}")
    assert len(list(run.glob("grpo/*/leases/*"))) >= 3
    done = [end.done for end in ends]
    assert 0 < done[0] and done == sorted(done)  # a stop within the first step keeps that step's samples
    assert facts(run)["weights_digest"] == facts(undisturbed)["weights_digest"]
    assert (
        used(run) == used(undisturbed)
        and len({one[1:3] for one in used(run)}) == len(used(run)) == facts(run)["samples"]
    )
    assert [line["step"] for line in lines(run, "metrics.jsonl")] == list(range(1, 13))
