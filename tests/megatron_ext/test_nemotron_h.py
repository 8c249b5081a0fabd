"""Nemotron-H: what test_families.py does not ask of every family."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_tools.base import durable
from data_tools.mistake import UserMistake
from megatron_ext.entrypoints import init_model
from megatron_ext.models.nemotron_h.config import hf_config, read, shape
from megatron_ext.models.nemotron_h.weight_layout import NORMS
from megatron_ext.models.registry import Family, read_config
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.training.rows import micro_batch
from megatron_ext.training.update import losses_of
from tests.megatron_ext import tiny
from tests.megatron_ext.shapes import NANO, NANO_PATTERN
from tests.megatron_ext.test_attention import forward
from tests.megatron_ext.test_families import transformers_model


def test_gradients_are_those_of_transformers(alone, tmp_path):
    folder = tiny.hf_folder(tmp_path / "hf", tiny.NEMOTRON_H_DIMS)
    oracle, ours = transformers_model(folder), tiny.model(folder, tiny.NEMOTRON_H_DIMS, ParallelPlan())
    batch = micro_batch([tiny.pack([150], seed=2)])
    losses_of(ours, batch).sum().backward()
    logits = oracle(batch.ids).logits[0, batch.supervised]
    torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum").backward()
    pairs = [
        ("embedding.word_embeddings.weight", "model.embeddings.weight"),
        ("decoder.layers.1.mlp.router.weight", "model.layers.1.mixer.gate.weight"),
        ("decoder.final_norm.weight", "model.norm_f.weight"),
    ]
    for name in ("A_log", "D", "dt_bias", "conv1d.weight", "conv1d.bias", "in_proj.weight", "norm.weight"):
        pairs.append((f"decoder.layers.0.mixer.{name}", f"model.layers.0.mixer.{name}"))
    mine, expected = dict(ours.named_parameters()), dict(oracle.named_parameters())
    for name, other in pairs:
        difference = (mine[name].grad - expected[other].grad).abs().max() / expected[other].grad.abs().max()
        assert difference <= 1e-4, name


def test_transformers_bounds_steps_where_we_do_not(alone, tmp_path):
    """Why the files that we write have a tiny time_step_min: config.py's docstring."""
    dims = replace(tiny.NEMOTRON_H_DIMS, pattern="M")
    folder = tiny.hf_folder(tmp_path / "hf", dims)
    logits, batch = forward(tiny.model(folder, dims, ParallelPlan()), tiny.pack([40], seed=3))
    config = json.loads((folder / "config.json").read_text())
    for bound, close in ((1e-9, True), (0.5, False)):
        durable.write_json(folder / "config.json", {**config, "time_step_min": bound})
        with torch.no_grad():
            assert torch.allclose(transformers_model(folder)(batch.ids).logits[0], logits, atol=1e-4) is close


def native_spelling(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`model.` and expert stacks, as transformers 5 names the parameters of its own class."""
    found, stacks = {}, {}
    for name, tensor in tensors.items():
        name = name.replace("backbone.", "model.")
        head, _, tail = name.partition(".experts.")
        if tail and "shared" not in name:
            expert, projection, _ = tail.split(".")
            stacks.setdefault(f"{head}.experts.{projection}", {})[int(expert)] = tensor
        else:
            found[name] = tensor
    return found | {name: torch.stack([stack[i] for i in range(len(stack))]) for name, stack in stacks.items()}


def test_both_spellings_of_a_checkpoint_are_the_same_model(alone, tmp_path):
    first = tiny.hf_folder(tmp_path / "backbone", tiny.NEMOTRON_H_DIMS)
    second = tmp_path / "model"
    second.mkdir()
    save_file(native_spelling(load_file(first / "model.safetensors")), second / "model.safetensors")
    config = hf_config(tiny.NEMOTRON_H_DIMS)
    blocks = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
    config["layers_block_type"] = [blocks[block] for block in config.pop("hybrid_override_pattern")]
    durable.write_json(second / "config.json", config)
    family, dims, problems = read_config(second)
    assert (family, dims, problems) == (Family("nemotron_h"), tiny.NEMOTRON_H_DIMS, [])
    models = [dict(tiny.model(folder, dims, ParallelPlan()).state_dict()) for folder in (first, second)]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items() if value is not None)
    ids = torch.arange(9)[None]
    assert torch.allclose(transformers_model(second)(ids).logits, transformers_model(first)(ids).logits, atol=1e-5)


def test_a_random_start_is_what_transformers_expects(tmp_path):
    from transformers import AutoModelForCausalLM

    sizes = dict(family="nemotron_h", alphabet_task="calculator", hidden=32, ffn=48, layers=4)
    init_model.run(init_model.Config(**sizes), tmp_path, tmp_path)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.hybrid_override_pattern == "M*-E" and model.config.eos_token_id == 1
    steps = torch.nn.functional.softplus(model.model.layers[0].mixer.dt_bias)
    assert 1e-3 <= steps.min() and steps.max() <= 0.1


# ---------------------------------------------------------------- Transformer Engine


def test_the_te_names_are_those_that_megatron_cores_spec_fuses():
    """mcore's spec needs Triton and Transformer Engine to be imported: hold the names against its source."""
    models = Path(importlib.util.find_spec("megatron.core").submodule_search_locations[0]) / "models"
    name = "hybrid" if (models / "hybrid").is_dir() else "mamba"  # from 0.18 on
    source = (models / f"{name}/{name}_layer_specs.py").read_text()
    assert f"{name}_stack_spec = ModuleSpec(\n    module={name.title()}Stack" in source
    stock = source[source.index(f"{name}_stack_spec = ") : source.index(f"{name}_inference_stack_spec = ")]
    fused = {"M": "in_proj", "*": "linear_qkv", "-": "linear_fc1"}
    assert all(f"{layer}=TELayerNormColumnParallelLinear" in stock for layer in fused.values())
    assert "pre_mlp_layernorm=TENorm, mlp=moe" in stock
    for block, layer in fused.items():
        assert NORMS[block][1].endswith(f"{layer}.layer_norm_weight")
    assert NORMS["E"][1] == ""


def test_the_checkpoint_keys_are_those_of_the_te_names(alone, tmp_path):
    model = tiny.model(tiny.hf_folder(tmp_path / "hf", tiny.NEMOTRON_H_DIMS), tiny.NEMOTRON_H_DIMS, ParallelPlan())
    keys = {value.key for value in model.sharded_state_dict().values() if not value.key.endswith("_extra_state")}
    rules = Family("nemotron_h").mapping.rules(tiny.NEMOTRON_H_DIMS)
    assert {rule.te_name for rule in rules if rule.te_name} < keys
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in keys and "decoder.final_norm.weight" in keys


# ---------------------------------------------------------------- config.json

NANO_CONFIG = {
    **hf_config(replace(tiny.NEMOTRON_H_DIMS, pattern=NANO_PATTERN, dtype="bfloat16")),
    "hidden_size": 2688, "vocab_size": 131072, "max_position_embeddings": 262144, "intermediate_size": 1856,
    "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
    "mamba_num_heads": 64, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "expand": 2,
    "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712, "routed_scaling_factor": 2.5, "time_step_limit": [0.0, float("inf")],
    "time_step_min": 0.001, "rope_theta": 10000, "partial_rotary_factor": 1.0, "norm_eps": 1e-5,
}  # fmt: skip


def test_nemotron_3_nano_is_understood():
    dims, problems = read(NANO_CONFIG)
    assert problems == [] and shape(dims) == NANO
    assert shape(dims).parameters.total == 31_577_937_344  # of the released model
    in_transformers = {**NANO_CONFIG, "time_step_limit": [0.0, {"__float__": "Infinity"}]}
    assert read(in_transformers) == (dims, [])
    assert read({**NANO_CONFIG, "head_dim": None, "attention_head_dim": 128})[0] == dims


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(hybrid_override_pattern="MX"), "hybrid_override_pattern = 'MX' is no string of M, *, E and -"),
        (dict(hybrid_override_pattern=None), "is missing, and so is layers_block_type"),
        (dict(layers_block_type=["rwkv"]), "layers_block_type has 'rwkv'"),
        (dict(layers_block_type=["moe"]), "is MEM*E- and layers_block_type means E"),
        (dict(num_hidden_layers=7), "num_hidden_layers is 7 and the pattern MEM*E- has 6 layers"),
        (dict(mamba_num_heads=None), "mamba_num_heads is missing"),
        (dict(mamba_num_heads=6), "6 Mamba heads do not divide by 4 groups"),
        (dict(num_attention_heads=3), "3 attention heads do not divide by 2 key-value heads"),
        (dict(routed_scaling_factor=None), "routed_scaling_factor is missing: write the model's own"),
        (dict(norm_topk_prob=False), "norm_topk_prob = False with num_experts_per_tok = 2"),
        (dict(num_experts_per_tok=1), "norm_topk_prob = True with num_experts_per_tok = 1"),
        (dict(num_experts_per_tok=9), "num_experts_per_tok = 9 is more than the 4 experts"),
        (dict(n_group=2, topk_group=2), "n_group = 2, topk_group = 2 with num_experts_per_tok = 2"),
        (dict(n_group=3), "4 experts do not split into n_group = 3"),
        (dict(mlp_hidden_act="silu"), "mlp_hidden_act = 'silu'"),
        (dict(use_conv_bias=False), "use_conv_bias = False"),
        (dict(conv_kernel=3), "conv_kernel = 3"),
        (dict(moe_latent_size=64), "moe_latent_size = 64"),
        (dict(num_nextn_predict_layers=2), "num_nextn_predict_layers = 2"),
        (dict(residual_in_fp32=True), "residual_in_fp32 = True"),
        (dict(tie_word_embeddings=True), "tie_word_embeddings = True"),
        (dict(time_step_limit=[0.001, 0.1]), "time_step_limit = [0.001, 0.1]"),
        (dict(rms_norm_eps=1e-6), "rms_norm_eps is 1e-06 and layer_norm_epsilon is 1e-05: keep the right one"),
        (dict(norm_eps=1e-6), "norm_eps is 1e-06 and layer_norm_epsilon is 1e-05: keep the right one"),
        (dict(quantization_config={"quant_method": "fp8"}), "quantization_config"),
        (dict(new_feature=3), "new_feature = 3 is not supported for nemotron_h: it is not known"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(change, words):
    dims, problems = read({**hf_config(tiny.NEMOTRON_H_DIMS), **change})
    assert dims is None and words in str(UserMistake(problems))
