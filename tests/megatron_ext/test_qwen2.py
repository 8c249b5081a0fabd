"""Qwen2: what of a config.json is understood, which tensors belong to the model (logits: test_families.py)."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_tools.base import durable
from data_tools.mistake import UserMistake
from megatron_ext.entrypoints import import_hf
from megatron_ext.models.layouts import QueryKeyValue, gate_up
from megatron_ext.models.qwen2.config import hf_config, read
from megatron_ext.models.registry import read_config
from megatron_ext.weights import convert, hf_files
from tests.megatron_ext import tiny


def test_large_exports_are_numbered_files_that_load(tmp_path):
    tensors = {f"t{i}": torch.randn(10) for i in range(5)}
    kinds = dict.fromkeys(tensors, ("float32", (10,)))
    files = hf_files.write_safetensors(tmp_path, kinds, tensors.items(), shard_bytes=90)
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + [hf_files.INDEX]
    found = hf_files.HfTensors(tmp_path)
    assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors.items())
    index = json.loads((tmp_path / hf_files.INDEX).read_text())
    assert index["weight_map"] == {f"t{i}": files[i // 2] for i in range(5)}


@pytest.mark.parametrize("groups, each, d", [(1, 1, 2), (2, 2, 4), (3, 5, 6), (8, 4, 2)])
@pytest.mark.parametrize("columns", [None, 5])
def test_the_qkv_interleave_and_its_inverse(groups, each, d, columns):
    layout = QueryKeyValue(groups * each, groups, d, columns)
    parts = [torch.randn(shape) for shape in layout.hf_shapes()]
    joined = layout.join(parts)
    assert all(torch.equal(a, b) for a, b in zip(layout.split(joined), parts))
    # The definition, group by group: its query heads, its key head, its value head.
    q, k, v = (part.reshape(-1, d, *part.shape[1:]) for part in parts)
    expected = [torch.cat([q[g * each : (g + 1) * each], k[g : g + 1], v[g : g + 1]]) for g in range(groups)]
    assert torch.equal(joined, torch.cat(expected).flatten(0, 1))
    for tensor in (t for t in (1, 2, 4, 8) if groups % t == 0):
        assert torch.equal(torch.cat([layout.shard(joined, tensor, r) for r in range(tensor)]), joined)


def test_a_gated_stack_is_sharded_half_by_half():
    layout = gate_up(4, 3)
    gate, up = torch.zeros(4, 3), torch.ones(4, 3)
    assert layout.shard(layout.join([gate, up]), 2, 0).sum(1).tolist() == [0, 0, 3, 3]


def refused(change: dict) -> str:
    with pytest.raises(UserMistake) as found:
        dims, problems = read({**hf_config(tiny.DIMS), **change})
        assert dims is None
        raise UserMistake(problems)
    return str(found.value)


LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(use_sliding_window=True), "use_sliding_window"),
        (dict(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "yarn needs factor and original_max_position"),
        (dict(rope_parameters=None, rope_scaling={"type": "longrope", "factor": 2.0}), "rope_type = 'longrope'"),
        (dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
        (dict(model_type="qwen3", attention_bias=True), "attention_bias = True"),
        (dict(model_type="llama", mlp_bias=True), "mlp_bias = True"),
        (
            dict(model_type="llama", rope_scaling=LLAMA3 | dict(low_freq_factor=2.0), rope_parameters=None),
            "a factor from",
        ),
        (dict(embedding_multiplier=12.0), "embedding_multiplier = 12.0"),
        (dict(num_attention_heads=5), "5 attention heads do not divide by 2 key-value heads"),
        (dict(hidden_size=None), "hidden_size is missing"),
        (dict(quantization_config={"quant_method": "awq"}), "quantization_config = {'quant_method': 'awq'}"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(change, words):
    assert words in refused(change)


def test_released_files_of_the_three_model_types_are_understood():
    common = dict(hidden_size=2048, num_attention_heads=16, num_key_value_heads=8, intermediate_size=6144,
                  num_hidden_layers=28, vocab_size=151936, hidden_act="silu", attention_dropout=0.0, use_cache=True,
                  rms_norm_eps=1e-6, tie_word_embeddings=True, max_position_embeddings=40960)  # fmt: skip
    windows = dict(use_sliding_window=False, sliding_window=None, max_window_layers=28, rope_theta=1e6)
    qwen3, problems = read({**common, **windows, "model_type": "qwen3", "head_dim": 128, "attention_bias": False})
    assert not problems and qwen3.qk_norm and not qwen3.qkv_bias and qwen3.rope_base == 1e6
    positions = dict(rope_scaling=LLAMA3, rope_theta=5e5)
    llama, problems = read({**common, **positions, "model_type": "llama", "mlp_bias": False, "pretraining_tp": 1})
    assert not problems and (llama.qkv_bias, llama.qk_norm, llama.rope_factor) == (False, "", 32.0)
    qwen2, problems = read({**common, **windows, "model_type": "qwen2", "use_mrope": False})
    assert not problems and qwen2.qkv_bias and qwen2.head_dim == 128


def test_older_and_newer_rotary_settings_are_read():
    config = hf_config(tiny.dims(rope_base=1e6))
    new = {**config, "rope_theta": None}
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    assert read(new)[0] == read(old)[0] == tiny.dims(rope_base=1e6)


def test_an_unknown_architecture_names_the_known_ones(tmp_path):
    durable.write_json(tmp_path / "config.json", {"model_type": "qwen4"})
    _, _, (problem,) = read_config(tmp_path)
    assert "model_type 'qwen4' is not known (did you mean qwen" in str(problem)


def break_tensors(folder, change) -> str:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    out = folder.with_name("model")
    out.mkdir()
    with pytest.raises(UserMistake) as found:
        import_hf.run(import_hf.Config(str(folder)), out, out)
    assert not (out / "model.json").exists()
    return str(found.value)


def test_missing_unknown_and_misshapen_tensors_are_named_at_once(tmp_path):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.9.extra"] = torch.zeros(2)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 31)

    found = break_tensors(tiny.hf_folder(tmp_path / "hf"), change)
    assert "tensor model.norm.weight [32] is missing" in found
    assert "tensor model.layers.9.extra [2] is not part of a qwen2 model" in found
    assert "tensor model.layers.0.mlp.up_proj.weight has shape [48, 31], config.json gives [48, 32]" in found
    assert len(found.splitlines()) == 3


def test_a_copy_of_the_tied_output_is_no_mistake(tmp_path, alone):
    folder = tiny.hf_folder(tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert convert.check_tensors({n: tuple(t.shape) for n, t in tensors.items()}, tiny.QWEN2, tiny.DIMS, "") == []


@pytest.mark.parametrize(
    "source, words",
    [
        ("/nowhere/model", "is no folder, and no hub name"),
        ("no/such-model-here", "cannot be fetched"),
    ],
)
def test_a_source_that_is_not_there_is_one_line(source, words, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserMistake, match=words) as found:
        import_hf.run(import_hf.Config(source), tmp_path, tmp_path)
    assert len(str(found.value).splitlines()) == 1
