"""OpenResearcher's pipeline: the seed's numbers, legal on the GPUs it names; and the whole of it on small models, on a
real Slurm that preempts the training."""

import json
import math
from pathlib import Path

import pytest
import yaml

from data_tools.records.balance import Balance
from jobs.artifacts.seal import read_seal
from launchers.planning.ledger import Ledger
from slurm.client import Slurm
from tests.cluster import dev_cluster, rows_of, scrub_slurm  # noqa: F401
from tests.command import ROOT, afterok, afterok_json, wait_for, wait_until_sealed
from tests.data_tools.chats import template_of, write_tokenizer
from tests.inputs import public
from tests.launchers.test_parallel_plan import NANO, PROFILE

WHOLE, SMALL = "jobs/pipelines/openresearcher.yaml", "jobs/pipelines/openresearcher_small.yaml"

SEED = {  # train_search_correct_only_base.sh and systems/openresearcher.md
    "samples": "${params.samples}", "global_batch": 60, "lr": 5e-5, "min_lr": 5e-6, "schedule": "cosine",
    "warmup_samples": 2000, "beta1": 0.9, "beta2": 0.98, "weight_decay": 0.1,
}  # fmt: skip


def test_the_seeds_numbers_are_in_the_pipeline():
    pipeline = yaml.safe_load((ROOT / WHOLE).read_text())
    given = pipeline["phases"]["sft"]["with"]
    assert {name: given[name] for name in SEED} == SEED
    assert (pipeline["params"]["samples"], pipeline["params"]["pack_length"]) == (20872, 262144)


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Params for what is not here: data, tokenizer, and of the 30B model its config.json."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(NANO))
    (tmp_path / "h100.yaml").write_text(PROFILE)
    data = tmp_path / "search.jsonl"
    data.write_text('{"messages": []}\n')
    tokenizer = write_tokenizer(tmp_path / "tokenizer", template_of("nemotron_3_nano"))
    return [f"params.inputs=[{data}]", f"params.model={tmp_path / 'model'}", f"params.tokenizer={tokenizer}",
            f"cluster={tmp_path / 'h100.yaml'}", "--run", str(tmp_path / "run")]  # fmt: skip


@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_the_plan_is_legal_and_fits_on_so_many_nodes(files, nodes):
    words = [WHOLE, *files, f"params.nodes={nodes}", "--parallel", "sft"]
    report = afterok_json("plan", *words)
    assert report["ranks"] == 8 * nodes and report["plan"]["data"] == nodes // 2
    assert report["parameters"] == 31_577_937_344 and report["memory"]["total"] < 0.75 * 79.6


def test_three_nodes_are_refused_with_what_would_do(files):
    done = afterok("plan", WHOLE, *files, "params.nodes=3", check=2)
    assert "24 ranks do not divide by" in done.stderr and ": use " in done.stderr


def small(folder: Path, trajectories: list[Path], template: str = "nemotron_3_nano") -> list[str]:
    """Words of a command for the small pipeline."""
    tokenizer = write_tokenizer(folder / "tokenizer", template_of(template))
    inputs = ",".join(map(str, trajectories))
    return [SMALL, f"params.inputs=[{inputs}]", f"params.tokenizer={tokenizer}", "--run", str(folder / "run")]


def sealed(run: Path, phase: str) -> Path:
    (seal,) = run.glob(f"{phase}/*/seal.json")
    return read_seal(seal).folder


def check_small(run: Path, rows: int) -> None:
    """Every row is kept or in a bucket, every kept token is in a pack, the model learns and loads in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    facts = {seal.parent.parent.name: read_seal(seal).facts for seal in run.glob("*/*/seal.json")}
    assert facts.keys() == yaml.safe_load((ROOT / SMALL).read_text())["phases"].keys()
    balance = Balance.read(sealed(run, "data"))
    balance.check()
    total = balance.total()
    assert (total.lines, total.kept + sum(total.dropped.values()) + sum(total.lines_dropped.values())) == (rows, rows)
    assert total.kept > rows / 2 and 0 < total.supervised < total.tokens
    assert facts["packs"]["tokens"] == total.tokens  # none is lost on the way into packs
    assert facts["sft"]["loss_last"] < facts["sft"]["loss_first"]
    assert 0 < facts["sft"]["supervised_tokens"] < facts["sft"]["tokens"]
    model = AutoModelForCausalLM.from_pretrained(sealed(run, "exported"), dtype=torch.float32)
    assert torch.isfinite(model(torch.arange(12)[None]).logits).all()


@pytest.mark.soak  # half a minute of starting processes
def test_real_trajectories_go_through_the_whole_pipeline_in_small_packs(tmp_path, inputs):
    rows = json.loads(inputs.data("tau_bench/gpt-4o-airline.json").read_text())[:24]
    (tmp_path / "trajectories.json").write_text(json.dumps(rows))
    words = small(tmp_path, [tmp_path / "trajectories.json"])
    afterok("run", *words, "params.pack_length=32768", "cluster=local", timeout=600)
    check_small(tmp_path / "run", len(rows))


# rows
TRAJECTORIES = {("tau_bench", "gpt-4o-airline.json"): 200, ("llamafactory", "reason_tool_use_demo_50.jsonl"): 50}
FAMILIES = {"qwen2": "qwen2_5", "gpt_oss": "gptoss", "nemotron_h": "nemotron_3_nano", "nanochat": "qwen3"}  # templates
SMALLER = ["init.with.heads=2", "sft.with.parallel.context_comm=a2a", "params.steps=3"]


@pytest.mark.soak
@pytest.mark.parametrize("family", FAMILIES)
def test_packs_of_262144_tokens_are_trained_on_slurm_that_preempts_twice(tmp_path, dev_cluster, family):  # noqa: F811
    """Once without grace, so that the second step is cut in the middle, and once with time to end it."""
    env, slurm, run = dev_cluster.env(), Slurm(dev_cluster.env()), tmp_path / "run"
    words = small(tmp_path, [public("data", *name) for name in TRAJECTORIES], FAMILIES[family])
    layers = 4 if family == "nemotron_h" else 2  # one of each kind
    words += [f"params.family={family}", f"init.with.layers={layers}", *SMALLER, "sft.resources.partition=preempt"]
    afterok("submit", *words, env=env, timeout=300)
    job = next(entry.job for entry in Ledger(run / "ledger.jsonl").jobs() if entry.phase == "sft")

    def preempt(grace_s: int) -> None:
        slurm.run(["scontrol", "update", "partition=preempt", f"gracetime={grace_s}"])
        high = slurm.sbatch(["--partition=batch", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"])
        wait_for("the higher job", lambda: rows_of(slurm, high)[0].state in ("RUNNING", "COMPLETED"), 1200)

    wait_for("a step", lambda: list(run.glob("sft/*/checkpoints/step_1/manifest.json")), 1200)
    preempt(grace_s=0)
    wait_for(
        "its return", lambda: "resumed from step_1" in "".join(p.read_text() for p in run.glob("sft/logs/*")), 1200
    )
    preempt(grace_s=1200)
    wait_until_sealed(run, "exported", timeout=1200, env=env)
    seal = read_seal(next(run.glob("sft/*/seal.json")))
    assert slurm.job(job)["Restarts"] == "2" and seal.facts["resumed_from"] == 2
    check_small(run, sum(TRAJECTORIES.values()))
    lines = [json.loads(line) for line in next(run.glob("sft/*/metrics.jsonl")).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, seal.facts["step"] + 1))
    assert all(math.isfinite(line["loss"]) and line["tokens"] == 262_144 for line in lines)
