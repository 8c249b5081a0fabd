"""OpenResearcher's pipeline: the seed's numbers, legal on the GPUs it names; and the whole of it on a small model."""

import json
from pathlib import Path

import pytest
import yaml

from jobs.artifact import read_seal
from tests.command import ROOT, afterok, afterok_json
from tests.data_tools.chats import shared, template_of, write_tokenizer
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


def run_small(tmp_path: Path, *words: str) -> Path:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", template_of("nemotron_3_nano"))
    data = shared("data", "tau_bench", "gpt-4o-airline.json")
    rows = json.loads(data.read_text())[:24] if "params.pack_length=8192" in words else json.loads(data.read_text())
    (tmp_path / "trajectories.json").write_text(json.dumps(rows))
    run = tmp_path / "run"
    afterok("run", SMALL, f"params.inputs=[{tmp_path / 'trajectories.json'}]", f"params.tokenizer={tokenizer}",
            "cluster=local", "--run", run, *words, timeout=3000)  # fmt: skip
    return run


def check_small(run: Path, rows: int) -> None:
    facts = {phase["phase"]: phase["facts"] for phase in afterok_json("status", run)["phases"]}
    balance = json.loads((read_seal(next(run.glob("data/*/seal.json"))).folder / "balance.json").read_text())
    assert sum(source["rows"] for source in balance["sources"]) == rows
    assert facts["sft"]["loss_last"] < facts["sft"]["loss_first"]
    assert facts["sft"]["supervised_tokens"] < facts["sft"]["tokens"]


@pytest.mark.soak  # half a minute of starting processes
def test_real_trajectories_go_through_the_whole_pipeline_in_small_packs(tmp_path):
    run = run_small(tmp_path, "params.pack_length=8192")
    check_small(run, 24)
    import torch
    from transformers import AutoModelForCausalLM

    exported = read_seal(next(run.glob("exported/*/seal.json"))).folder
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    assert torch.isfinite(model(torch.arange(12)[None]).logits).all()


@pytest.mark.soak
def test_real_trajectories_go_through_the_whole_pipeline_in_packs_of_262144_tokens(tmp_path):
    run = run_small(tmp_path)
    check_small(run, 200)
