"""Nemotron-H and Nemotron-3-Nano: what of a Hugging Face config.json we understand. No torch here: checks read it too.

Its weights: weight_layout.py. A layer is one block: Mamba-2 (M), attention (*), mixture of experts (E) or
MLP (-). Both spellings are read: the pattern string of NVIDIA's own code and the list of transformers 5.

transformers 5.23 bounds Mamba's steps below by `time_step_min` (modeling_nemotron_h.py:421), which NVIDIA's code,
mamba-ssm and megatron-core use for initial values only; so do we. Where steps get shorter than it, its logits differ.
"""

import math
from dataclasses import dataclass
from typing import Any

from data_tools.mistake import Problem
from megatron_ext.models.config_reading import Reading, file_of, small_dims
from megatron_ext.models.routing import Routing, routing_of
from megatron_ext.parallel.shape import ATTENTION, MAMBA, MLP, MOE, ModelShape

CONVOLUTION = 4  # tokens that Mamba's convolution sees
SHORTEST_STEP = 1e-9  # in the files that we write: transformers' bound has no effect (and 0 breaks its random start)
BLOCKS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "moe": "E", "mlp": "-"}


@dataclass(frozen=True)
class Dims:
    """The numbers that define a model. All sizes in elements; those of blocks that the pattern lacks are 0."""

    pattern: str  # one of "M*E-" a layer
    hidden: int
    vocabulary: int  # rows of the embedding in the checkpoint, not the tokenizer's length
    norm_epsilon: float
    max_positions: int
    dtype: str  # of the checkpoint: "float32", "bfloat16" or "float16"

    heads: int = 0
    kv_groups: int = 0
    head_dim: int = 0

    mamba_heads: int = 0
    mamba_head_dim: int = 0
    mamba_groups: int = 0
    mamba_state: int = 0

    ffn: int = 0

    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0  # over all shared experts
    expert_groups: int = 1  # a token chooses among the experts of its best `top_groups` groups
    top_groups: int = 1
    routed_scale: float = 1.0  # of the routed experts' weights

    @property
    def layers(self) -> int:
        return len(self.pattern)

    @property
    def mamba_inner(self) -> int:
        """Width of x and z. `expand` has no say where heads are given, as in NVIDIA's own modeling_nemotron_h.py."""
        return self.mamba_heads * self.mamba_head_dim


# config.json's names of the sizes that a block needs, by the field of Dims.
SIZES = {
    "M": {
        "mamba_heads": "mamba_num_heads",
        "mamba_head_dim": "mamba_head_dim",
        "mamba_groups": "n_groups",
        "mamba_state": "ssm_state_size",
    },
    "*": {"heads": "num_attention_heads", "kv_groups": "num_key_value_heads", "head_dim": "head_dim"},
    "-": {"ffn": "intermediate_size"},
    "E": {
        "experts": "n_routed_experts",
        "top_k": "num_experts_per_tok",
        "expert_ffn": "moe_intermediate_size",
        "shared_ffn": "moe_shared_expert_intermediate_size",
    },
}
# What the model's function depends on and we have one way for. A key that is missing has this value too.
ONLY = {
    "attention_bias": False,
    "attention_dropout": 0,
    "conv_kernel": CONVOLUTION,
    "hidden_dropout": 0,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "moe_latent_size": None,
    "num_nextn_predict_layers": 0,
    "quantization_config": None,
    "residual_in_fp32": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_bias": False,
    "use_conv_bias": True,
}
# What it does not depend on: initial values, kernels and caches, positions (no layer has any), and the number of shared
# experts, whose size is given for all of them.
WITHOUT_EFFECT = {
    "chunk_size", "expand", "mamba_ssm_cache_dtype", "max_position_embeddings", "moe_shared_expert_overlap",
    "mtp_hybrid_override_pattern", "mtp_layers_block_type", "n_shared_experts", "num_logits_to_keep",
    "partial_rotary_factor", "rescale_prenorm_residual", "rope_theta", "time_step_floor", "time_step_max",
    "time_step_min", "use_mamba_kernels",
}  # fmt: skip
# Read below one by one.
READ = {
    "attention_head_dim", "hidden_size", "hybrid_override_pattern", "layer_norm_epsilon", "layer_types",
    "layers_block_type", "n_group", "n_shared_experts", "norm_eps", "norm_topk_prob", "num_hidden_layers",
    "rms_norm_eps", "routed_scaling_factor", "time_step_limit", "topk_group", "vocab_size",
}  # fmt: skip
KNOWN = READ | WITHOUT_EFFECT | set(ONLY) | {name for sizes in SIZES.values() for name in sizes.values()}


def _pattern(config: dict[str, Any]) -> tuple[str, str]:
    """Return (pattern, "") or ("", what is wrong)."""
    spelled = config.get("hybrid_override_pattern")
    if spelled is not None and (not isinstance(spelled, str) or not spelled or set(spelled) - set("M*E-")):
        return "", f"hybrid_override_pattern = {spelled!r} is no string of M, *, E and -"
    for key in ("layers_block_type", "layer_types"):
        blocks = config.get(key)
        if blocks is None:
            continue
        if not isinstance(blocks, list) or (unknown := [block for block in blocks if block not in tuple(BLOCKS)]):
            wrong = repr(unknown[0]) if isinstance(blocks, list) else repr(blocks)
            return "", f"{key} has {wrong}: it knows {', '.join(BLOCKS)}"
        listed = "".join(BLOCKS[block] for block in blocks)
        if spelled not in (None, listed):
            return "", f"hybrid_override_pattern is {spelled} and {key} means {listed}: keep the right one"
        spelled = listed
    if not spelled:
        return "", "hybrid_override_pattern is missing, and so is layers_block_type"
    layers = config.get("num_hidden_layers")
    if layers not in (None, len(spelled)):
        return "", f"num_hidden_layers is {layers} and the pattern {spelled} has {len(spelled)} layers"
    return spelled, ""


def _number(value: Any) -> Any:
    """Return a number as it is meant: transformers 5 writes infinity as {"__float__": "Infinity"}."""
    return float(value["__float__"]) if isinstance(value, dict) and "__float__" in value else value


def read(config: dict[str, Any], where: str = "config.json") -> tuple[Dims | None, list[Problem]]:
    """Read the dimensions out of a parsed config.json, or every reason why this model is not understood."""
    pattern, wrong = _pattern(config)
    if wrong:
        return None, [Problem(where, wrong)]
    if config.get("head_dim") is None:
        config = {**config, "head_dim": config.get("attention_head_dim")}
    reading = Reading(config, where, "nemotron_h")
    names = {"hidden": "hidden_size", "vocabulary": "vocab_size"}
    for block in sorted(set(pattern)):
        names |= SIZES[block]
    sizes = reading.sizes(names)
    if reading.problems:
        return None, reading.problems
    reading.only(ONLY)
    reading.known(KNOWN)
    reading.agree("attention_head_dim", config.get("attention_head_dim"), "head_dim", config.get("head_dim"))
    limit = config.get("time_step_limit")
    limit = [_number(value) for value in limit] if isinstance(limit, list) else limit
    if limit is not None and limit != [0, math.inf]:
        reading.refuse("time_step_limit", limit, "megatron-core does not bound Mamba's steps")
    epsilon = float(reading.number("layer_norm_epsilon", 1e-5))
    for other in ("norm_eps", "rms_norm_eps"):
        reading.agree(other, config.get(other), "layer_norm_epsilon", epsilon)
    if "*" in pattern:
        reading.groups(sizes["heads"])
    if "M" in pattern and sizes["mamba_heads"] % sizes["mamba_groups"]:
        reading.wrong(f"{sizes['mamba_heads']} Mamba heads do not divide by {sizes['mamba_groups']} groups")
    routing = Routing()
    if "E" in pattern:
        routing = routing_of(reading, sizes["experts"], sizes["top_k"])
    dims = Dims(
        pattern=pattern,
        norm_epsilon=epsilon,
        max_positions=int(reading.number("max_position_embeddings", 4096)),
        dtype=reading.dtype(),
        expert_groups=routing.groups,
        top_groups=routing.top_groups,
        routed_scale=routing.scale,
        **sizes,
    )
    return (None, reading.problems) if reading.problems else (dims, [])


def shape(dims: Dims) -> ModelShape:
    """Return what parallel rules and predictions need to know of a model."""
    blocks = {"M": MAMBA, "*": ATTENTION, "E": MOE, "-": MLP}
    return ModelShape(
        layers=tuple((blocks[block],) for block in dims.pattern),
        hidden=dims.hidden,
        vocabulary=dims.vocabulary,
        max_positions=dims.max_positions,
        heads=dims.heads,
        kv_groups=dims.kv_groups,
        head_dim=dims.head_dim,
        ffn=dims.ffn,
        gated=False,
        experts=dims.experts,
        top_k=dims.top_k,
        expert_ffn=dims.expert_ffn,
        shared_ffn=dims.shared_ffn,
        mamba_heads=dims.mamba_heads,
        mamba_head_dim=dims.mamba_head_dim,
        mamba_groups=dims.mamba_groups,
        mamba_state=dims.mamba_state,
        mamba_conv=CONVOLUTION,
    )


def hf_config(dims: Dims, eos: int | None = None, pad: int | None = None) -> dict[str, Any]:
    """Return config.json of a NemotronHForCausalLM with these dimensions, as transformers 5 and NVIDIA's own code read
    it.
    """
    present = [sizes for block, sizes in SIZES.items() if block in dims.pattern]
    sizes = {name: getattr(dims, field) for sizes in present for field, name in sizes.items()}
    routing = {
        "n_group": dims.expert_groups,
        "topk_group": dims.top_groups,
        "n_shared_experts": 1,
        "norm_topk_prob": dims.top_k != 1,
        "routed_scaling_factor": dims.routed_scale,
    }
    return {
        **file_of(dims, "NemotronHForCausalLM", model_type="nemotron_h", eos=eos, pad=pad),
        **{name: value for name, value in ONLY.items() if value is not None},
        **sizes,
        **(routing if dims.experts else {}),
        "hybrid_override_pattern": dims.pattern,
        "layer_norm_epsilon": dims.norm_epsilon,
        "chunk_size": 128,
        "time_step_min": SHORTEST_STEP,
    }


def small(sizes: Any, vocabulary: int, eos: int | None, pad: int | None) -> dict[str, Any]:
    """Return config.json of the model that init_model's `sizes` ask for."""
    dims = small_dims(
        Dims,
        sizes,
        vocabulary,
        pattern=str(sizes.config.get("hybrid_override_pattern") or ("M*-E" * sizes.layers)[: sizes.layers]),
        head_dim=sizes.hidden // sizes.heads,
        mamba_heads=sizes.heads,
        mamba_head_dim=2 * sizes.hidden // sizes.heads,
        mamba_groups=sizes.kv_groups,
        mamba_state=16,
        experts=4,
        top_k=2,
        expert_ffn=sizes.ffn // 2,
        shared_ffn=sizes.ffn // 2,
        routed_scale=2.5,
    )
    return hf_config(dims, eos, pad) | {"tie_word_embeddings": bool(sizes.tied)}
