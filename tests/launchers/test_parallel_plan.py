"""`afterok plan --parallel PHASE`: a training phase's plan is shown with its numbers, or refused, before it exists."""

import json
import re

import pytest

from megatron_ext import versions
from megatron_ext.models.nemotron_h.config import Dims, hf_config
from tests.command import ANY_DISK, afterok, one_line

QWEN_32B = {
    "model_type": "qwen2", "num_hidden_layers": 64, "hidden_size": 5120, "intermediate_size": 27648,
    "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "rms_norm_eps": 1e-5,
    "rope_theta": 1e6, "max_position_embeddings": 131072, "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip

NANO = hf_config(Dims(
    pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", hidden=2688, vocabulary=131072, norm_epsilon=1e-5,
    max_positions=262144, dtype="bfloat16", heads=32, kv_groups=2, head_dim=128, mamba_heads=64, mamba_head_dim=64,
    mamba_groups=8, mamba_state=128, experts=128, top_k=6, expert_ffn=1856, shared_ffn=3712, routed_scale=2.5,
))  # fmt: skip

PIPELINE = """
name: big
phases:
  model: {uses: import_hf, with: {source: FOLDER/model}}
  packs: {uses: pack, with: {store: FOLDER/store, pack_length: 12000}}
  sft:
    uses: sft
    with:
      model: "${phases.model.out}"
      store: FOLDER/store
      packs: "${phases.packs.out}"
      steps: 100
      global_batch: 1024
      parallel: {tensor: 8, sequence_parallel: true}
    resources: {role: train, nodes: 8}
"""

PROFILE = """
kind: local
roles:
  cpu: {}
  train: {gpus_per_node: 8, gpu: h100}
"""


@pytest.fixture
def plan(tmp_path):
    """`afterok plan` of a pipeline whose model and packs are yet to be made: there is only a config.json."""
    (tmp_path / "store").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN_32B))
    (tmp_path / "big.yaml").write_text(PIPELINE.replace("FOLDER", str(tmp_path)))
    (tmp_path / "h100.yaml").write_text(PROFILE)
    command = ["plan", tmp_path / "big.yaml", f"cluster={tmp_path / 'h100.yaml'}", "--run", tmp_path / "run", ANY_DISK]
    return lambda *words, check=0: afterok(*command, *words, check=check)


def test_memory_grid_step_and_neighbours_are_shown(plan):
    done = plan("--parallel", "sft")
    for text in ("64 ranks on 8 nodes", "0-56 by 8", "memory of 79.6 GiB", "28.6", "predicted step", "neighbours"):
        assert text in done.stdout
    assert "derived:" in done.stdout and "measured by others:" in done.stdout


def test_the_same_as_json(plan):
    found = json.loads(plan("--parallel", "sft", "--search", "--json").stdout)
    assert found["parameters"] == 32_763_876_352
    assert found["memory"]["total"] < 79.6
    assert found["grid"]["data"][0] == list(range(0, 64, 8))
    assert found["plan"]["data"] == 8 and found["problems"] == []
    assert all(one["total_gib"] <= 79.6 for one in found["search"])


def test_whose_layers_a_phase_will_have_is_shown_with_reasons_and_assumptions(plan):
    done = plan("--parallel", "sft")
    assert "whose layers, backend auto" in done.stdout and "assumed: nodes have the packages" in done.stdout
    found = json.loads(plan("--parallel", "sft", "--json", "sft.with.backend=te").stdout)
    assert found["backend"] == "te" and found["parts"]["attention"] == {"is": "te", "why": "backend te"}
    assert list(found["parts"]) == ["attention", "linear", "norm"] and "packages" in found["assumed"][-1]
    refused = plan("sft.with.backend=te", "sft.with.dtype=float32", "packs.with.pack_length=64", check=2).stderr
    assert "phases.sft.with.backend: Transformer Engine 2.11 has no fused attention in float32" in refused
    assert ["use backend auto" in line for line in refused.splitlines()] == [True, True]


def test_the_grpo_seeds_length_is_refused_by_every_verb_that_plans(plan):
    done = plan("packs.with.pack_length=11999", check=2)
    assert "11,999 tokens do not divide by 8" in done.stderr and "use a pack length of 12,000 tokens" in done.stderr


def test_what_the_rollouts_of_grpo_hold_is_told_and_refused_where_it_is_nothing(plan, tmp_path):
    grpo = tmp_path / "h100.yaml", tmp_path / "model"
    command = [
        "plan",
        "jobs/pipelines/megatron_grpo.yaml",
        f"cluster={grpo[0]}",
        f"params.model={grpo[1]}",
        "--run",
        tmp_path / "run",
        ANY_DISK,
    ]
    done = afterok(*command, "--parallel", "grpo")
    assert (
        "rollouts: 20 GiB a rank hold 655,104 tokens of keys and values: 54 samples of 12,000 tokens at once"
        in done.stdout
    )
    assert (
        "warning: that is fewer than a group of 16"
        in afterok(*command, "--parallel", "grpo", "grpo.with.engine.kv_gib=2").stdout
    )
    assert "and one sample needs 12,288; give more" in one_line(
        afterok(*command, "grpo.with.engine.kv_gib=0.3", check=2)
    )
    positions, memory = afterok(*command, "grpo.with.sampling.max_tokens=131072", check=2).stderr.splitlines()
    assert "131,072 new ones leave no room for a prompt in the model's 131,072 positions: give fewer" in positions
    # A sample is a row, though it is longer than row_tokens.
    assert re.search(r"needs \d+\.\d GiB a GPU in an update .* has 79\.6: use parallel\.recompute full \(", memory)


def test_a_plan_that_does_not_fit_is_refused_with_one_that_does(plan):
    words = ["packs.with.pack_length=120000", "packs.with.align=16"]
    line = one_line(plan(*words, check=2))
    assert "phases.sft.with.parallel: needs" in line and "and a GPU has 79.6: use tensor" in line
    shown = plan("--parallel", "sft", *words, check=2)
    assert "memory of 79.6 GiB" in shown.stdout and line in shown.stderr


# TP=2 EP=1 ETP=1 PP=1 CP=2 MAX_SEQ=262144 GBS=60 of train_search_correct_only_base.sh, on 4 GPUs
OPENRESEARCHER = [
    "sft.resources.nodes=1", "sft.resources.gpus_per_node=4", "sft.with.global_batch=60",
    "packs.with.pack_length=262144", "packs.with.align=4", "sft.with.parallel.tensor=2", "sft.with.parallel.context=2",
]  # fmt: skip


def test_the_plan_of_the_openresearcher_seed_is_refused_with_the_memory_table_and_a_legal_plan(plan, tmp_path):
    (tmp_path / "model" / "config.json").write_text(json.dumps(NANO))
    done = plan(*OPENRESEARCHER, "--parallel", "sft", check=2)
    assert "31,577,937,344 parameters" in done.stdout
    (state,) = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("state")]
    assert state == ["state", "258.6", "258.6", "258.6"]  # by recomputation: none, selective, full
    *trap, shortage = done.stderr.splitlines()
    if versions.installed() == "0.16.1":  # of which later releases have no more
        assert "gives wrong expert gradients without an error: use expert 2" in trap.pop()
    assert not trap
    assert "needs 499.9 GiB a GPU (state 258.6, activations 234.1, logits 3.3, other 4.0)" in shortage
    offer = json.loads(plan(*OPENRESEARCHER, "--parallel", "sft", "--json", check=2).stdout)["offer"]
    accepted = [f"sft.with.parallel.{name}={value}" for name, value in offer["plan"].items()]
    accepted += [f"packs.with.align={offer['align']}", f"sft.resources.nodes={offer['ranks'] // 4}"]
    assert "predicted step" in plan(*OPENRESEARCHER, *accepted, "--parallel", "sft").stdout


def test_a_phase_without_a_parallel_plan_says_so(plan):
    assert "phase packs uses pack, which has no parallel plan" in one_line(plan("--parallel", "packs", check=2))
    assert "no phase 'stf' (did you mean sft?" in one_line(plan("--parallel", "stf", check=2))


def test_an_environment_that_breaks_the_plan_is_refused(plan, tmp_path):
    (tmp_path / "h100.yaml").write_text(PROFILE + "env: {set: {CUDA_DEVICE_MAX_CONNECTIONS: '8'}}\n")
    assert "need CUDA_DEVICE_MAX_CONNECTIONS=1, and the environment says 8" in one_line(plan(check=2))
