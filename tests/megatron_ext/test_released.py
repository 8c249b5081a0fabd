"""Released models: what their config.json says is understood whole, and means to us what it means to transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.models.config_meaning import lost
from megatron_ext.models.registry import parse_config
from megatron_ext.parallel.plan import ParallelPlan
from tests.megatron_ext import tiny
from tests.megatron_ext.released import PARAMETERS, RELEASED
from tests.megatron_ext.rounding import logits_bound
from tests.megatron_ext.test_attention import forward

LAYERS = 4  # of the small model: of every kind that the released one has


def small(file: dict[str, Any]) -> dict[str, Any]:
    """The file with small sizes in their place, and nothing else changed but what speaks of sizes."""
    groups = 4 if file["num_key_value_heads"] == file["num_attention_heads"] else 2
    sizes = dict(num_hidden_layers=LAYERS, hidden_size=32, num_attention_heads=4, num_key_value_heads=groups,
                 head_dim=8, intermediate_size=48, vocab_size=61, num_experts=4, num_local_experts=4,
                 n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                 shared_expert_intermediate_size=40,
                 first_k_dense_replace=1)  # fmt: skip
    own = {key: value for key, value in sizes.items() if key in file}
    own |= {key: file[key][:LAYERS] for key in ("layer_types", "no_rope_layers") if key in file}
    if file.get("sliding_window") and not file.get("max_window_layers"):
        own["sliding_window"] = 8
    if "yarn" in str(file.get("rope_scaling")):
        own["rope_scaling"] = {**file["rope_scaling"], "original_max_position_embeddings": 16}
    return {**file, **own, "torch_dtype": "float32", "pad_token_id": None}


@pytest.mark.parametrize("name", RELEASED)
def test_what_a_released_file_says_is_understood_whole(name):
    file = RELEASED[name]
    family, dims, problems = parse_config(file, name)
    assert not problems and lost(file, family, dims) == []
    written = family.config.hf_config(dims)
    assert parse_config(written, name)[1] == dims
    shape = family.config.shape(dims)
    assert shape.parameters.total == PARAMETERS.get(name, shape.parameters.total)


def test_most_sizes_are_borne_out_by_the_parameters_that_the_hub_shows():
    assert PARAMETERS.keys() <= RELEASED.keys() and len(RELEASED) >= 45 and len(PARAMETERS) >= 35


def compared(file: dict[str, Any], folder: Path) -> None:
    """Random weights below this very file give transformers' logits, of documents longer than its windows."""
    from tests.megatron_ext.test_families import transformers_model

    _, dims, problems = parse_config(file, "config.json")
    assert not problems
    tiny.hf_folder(folder, dims)
    (folder / "config.json").write_text(json.dumps(file))
    theirs, ours = transformers_model(folder), tiny.model(folder, dims, ParallelPlan())
    pack = tiny.pack([33, 20], seed=1, vocabulary=61)
    logits, batch = forward(ours, pack)
    for a, b in zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:]):
        with torch.no_grad():
            expected = theirs(batch.ids[:, a:b]).logits[0]
        assert (logits[a:b] - expected).abs().max() <= logits_bound(theirs, batch.ids[:, a:b])


# CI compares the files that say what no other does.
OWN = ("Qwen/Qwen2.5-7B-Instruct, 131,072 tokens", "allenai/Olmo-3-1025-7B", "HuggingFaceTB/SmolLM3-3B",
       "mistralai/Mistral-7B-v0.1", "zai-org/GLM-4.5")  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in OWN else [pytest.mark.soak]) for n in RELEASED])
def test_a_released_file_with_small_sizes_is_the_model_that_transformers_makes_of_it(alone, name, tmp_path):
    compared(small(RELEASED[name]), tmp_path / "hf")


@pytest.mark.parametrize("rope", [dict(type="linear", factor=4.0), dict(rope_type="dynamic", factor=2.0)], ids=str)
def test_stretched_positions_are_those_of_transformers(alone, rope, tmp_path):
    compared({**small(RELEASED["meta-llama/Llama-2-7b-hf"]), "rope_scaling": rope}, tmp_path / "hf")


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("microsoft/phi-4", dict(rope_scaling=dict(type="longrope", short_factor=[1.0])), "longrope"),
        ("zai-org/GLM-4.5", dict(num_nextn_predict_layers=1), "num_nextn_predict_layers = 1 is not supported"),
        ("zai-org/GLM-4.5", dict(n_group=2, topk_group=1, num_experts_per_tok=3), "n_group = 2, topk_group = 1 with"),
        ("zai-org/GLM-4.5", dict(first_k_dense_replace=92), "no layer has experts"),
        ("Qwen/Qwen3-30B-A3B", dict(decoder_sparse_step=2), "decoder_sparse_step = 2 is not supported"),
        ("Qwen/Qwen3-30B-A3B", dict(mlp_only_layers=[48]), "mlp_only_layers = [48] is not supported"),
        ("Qwen/Qwen3-30B-A3B", dict(num_experts_per_tok=1), "num_experts_per_tok = 1 is not supported"),
        ("Qwen/Qwen3-30B-A3B", dict(num_local_experts=64), "num_local_experts is 64 and num_experts is 128"),
        ("Qwen/Qwen1.5-MoE-A2.7B", dict(qkv_bias=False), "qkv_bias = False is not supported"),
        ("mistralai/Mistral-7B-v0.1", dict(sliding_window=0), "sliding_window = 0 is not supported"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", dict(router_jitter_noise=0.1), "router_jitter_noise = 0.1"),
        ("microsoft/phi-4", dict(resid_pdrop=0.1), "resid_pdrop = 0.1 is not supported"),
        ("microsoft/phi-4", dict(partial_rotary_factor=0.01), "partial_rotary_factor = 0.01 is not supported"),
        ("allenai/Olmo-3-1025-7B", dict(rope_parameters=dict(rope_type="default")), "sliding_attention are"),
        ("allenai/OLMo-2-1124-7B", dict(clip_qkv=8.0), "clip_qkv = 8.0 is not supported for olmo2: it is not known"),
        ("HuggingFaceTB/SmolLM3-3B", dict(no_rope_layers=[1, 0]), "no_rope_layers has 2 entries for 36 layers"),
        ("HuggingFaceTB/SmolLM3-3B", dict(no_rope_layers=[2] * 36), "no_rope_layers = [2, 2"),
        ("THUDM/GLM-4-9B-0414", dict(attention_bias="yes"), "attention_bias is 'yes', neither true nor false"),
        ("ibm-granite/granite-3.1-2b-instruct", dict(logits_scaling=0), "logits_scaling is 0, not a positive number"),
        ("Qwen/Qwen2.5-7B-Instruct", dict(rope_scaling=dict(type="yarn", factor=4.0)), "yarn needs factor and"),
        ("meta-llama/Llama-2-7b-hf", dict(rope_scaling=dict(type="linear")), "linear needs factor"),
        ("allenai/Olmo-3-1025-7B", dict(rope_scaling={**RELEASED["allenai/Olmo-3-1025-7B"]["rope_scaling"],
                                                      "attention_factor": 1.0}), "attention_factor = 1.0"),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused_by_name(name, change, words):
    _, dims, problems = parse_config({**RELEASED[name], **change}, "config.json")
    assert dims is None and any(words in problem.message for problem in problems), problems
