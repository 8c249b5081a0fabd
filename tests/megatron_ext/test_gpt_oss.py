"""gpt-oss: what of a config.json is understood (logits: test_families.py; parallel training: test_certify.py)."""

from dataclasses import replace

import pytest

from megatron_ext.models.gpt_oss.config import hf_config, read
from tests.megatron_ext import tiny
from tests.megatron_ext.shapes import GPT_OSS_20B

# config.json of openai/gpt-oss-20b, written with transformers 4.55
RELEASED = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}


def test_the_released_config_is_understood():
    from megatron_ext.models.gpt_oss.config import shape

    dims, problems = read(RELEASED)
    assert problems == [] and shape(dims) == GPT_OSS_20B
    assert shape(dims).parameters.total == 20_914_757_184  # of the released model
    assert dims.dtype == "bfloat16" and dims.yarn.factor == 32 and not dims.yarn.truncate
    assert dims.sliding[:2] == (True, False) and dims.window == 128


def test_what_a_file_leaves_out_is_what_transformers_takes():
    from transformers import GptOssConfig

    bare = {key: RELEASED[key] for key in RELEASED if key not in ("layer_types", "rope_scaling", "rope_theta")}
    theirs = GptOssConfig(**{key: value for key, value in bare.items() if key != "quantization_config"}).to_dict()
    plain = {key: RELEASED[key] for key in RELEASED if key != "quantization_config"}
    assert read(bare)[0] == read(RELEASED)[0]
    assert read(theirs)[0] == read(plain)[0] == replace(read(RELEASED)[0], dtype="float32", mxfp4=False)


def yarn(**changes) -> dict:
    return {"rope_parameters": {**hf_config(tiny.GPT_OSS_DIMS)["rope_parameters"], **changes}}


@pytest.mark.parametrize(
    "change, words",
    [
        (yarn(rope_type="llama3"), "rope_type = 'llama3'"),
        (yarn(factor=None), "yarn needs factor"),
        (yarn(attention_factor=1.5), "rope_parameters.attention_factor = 1.5"),
        (yarn(mscale=0.7), "rope_parameters.mscale = 0.7"),
        (dict(layer_types=["full_attention", "chunked_attention"]), "layer_types = ['chunked_attention']"),
        (dict(layer_types=["full_attention"]), "layer_types has 1 entries for 2 layers"),
        (dict(sliding_window=None), "sliding_window = None"),
        (dict(swiglu_alpha=1.0), "swiglu_alpha = 1.0"),
        (dict(swiglu_limit=None), "swiglu_limit = None"),
        (dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (dict(attention_bias=False), "attention_bias = False"),
        (dict(num_experts_per_tok=5), "num_experts_per_tok = 5"),
        (dict(num_attention_heads=5), "5 attention heads do not divide by 2 key-value heads"),
        (dict(head_dim=7), "head size 7 is odd"),
        (dict(num_local_experts=None), "num_local_experts is missing"),
        (dict(quantization_config={"quant_method": "awq"}), "quantization_config = 'awq'"),
        (dict(quantization_config={"quant_method": "mxfp4"}), "needs whole blocks of 32"),
        (dict(dtype="float8"), "dtype = 'float8'"),
        (dict(logit_scale=2.0), "logit_scale = 2.0"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(change, words):
    dims, problems = read({**hf_config(tiny.GPT_OSS_DIMS), **change})
    assert dims is None and words in "\n".join(map(str, problems))
