"""Megatron-LM's arguments of a model: what a checkpoint's say otherwise than config.json, and those of a model of ours.

A checkpoint carries them as `args`, a Namespace. Shapes of tensors do not tell all of a model's function: these do.
"""

import math
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from data_tools.mistake import Problem, UserMistake
from megatron_ext.models.rotary import Linear, Yarn
from megatron_ext.parallel.shape import ModelShape

LLAMA3_FACTOR = 8.0  # of --use-rope-scaling; to 0.19 no builder of Megatron-LM takes its --rope-scaling-factor
ARGUMENTS = {  # Megatron's names by those of a family's Dims
    "heads": "num_attention_heads",
    "head_dim": "kv_channels",
    "norm_epsilon": "norm_epsilon",
    "rope_base": "rotary_base",
    "experts": "num_experts",
    "top_k": "moe_router_topk",
    "swiglu_limit": "activation_func_clamp_value",
    "mamba_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_groups": "mamba_num_groups",
    "mamba_state": "mamba_state_dim",
}
NEVER = {  # of what changes a model's function and no tensor's shape, what no family has
    "apply_layernorm_1p": False,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "rotary_interleaved": False,
    "multi_latent_attention": False,
    "attention_output_gate": False,
    "qk_l2_norm": False,
    "moe_apply_probs_on_input": False,
    "export_qk_l2_norm": False,  # ModelOpt's builder takes these two for the ones without "export"
    "export_moe_apply_probs_on_input": False,
    "openai_gelu": False,
    "use_mup": False,
    "normalization": "RMSNorm",
    "moe_mlp_glu_interleave_size": 0,  # rows of the gate and of the rest of linear_fc1 in turn
    "moe_shared_expert_glu_interleave_size": 0,
    "moe_router_topk_limited_devices": 0,
    "moe_router_force_load_balancing": False,
    "moe_router_force_biased": 0,
}
OFF = {"activation_func_clamp_value": 0.0}  # what None means
BALANCED = ("sinkhorn", "quantile_balancing")  # routers of their own; the others are losses
MAMBA_EPSILON = 1e-5  # of the norm in Mamba's mixer, whatever --norm-epsilon (megatron/core/ssm/mamba_mixer.py)
YARN = {  # Megatron-LM's arguments of yarn's positions -> field of Yarn, what None means, what --enable-gpt-oss says
    "rotary_scaling_factor": ("factor", 1.0, 32.0),
    "yarn_original_max_position_embeddings": ("original_positions", 4096, 131072),
    "yarn_beta_fast": ("beta_fast", 32.0, 32.0),
    "yarn_beta_slow": ("beta_slow", 1.0, 1.0),
    "yarn_correction_range_round_to_int": ("truncate", True, False),
}
CONCENTRATION = {"mscale": 1.0, "mscale_all_dim": 0.0}  # which give 0.1 ln(factor) + 1, as of every yarn of ours
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")  # of Dims
PADDED = 128  # rows, to a multiple of which Megatron pads an embedding by itself, so that tensor ranks can share it
Compared = Iterator[tuple[str, Any, Any]]  # (argument, what Megatron's arguments say, what `dims` say)


def unlike(arguments: Namespace, dims: Any) -> list[str]:
    """Return what Megatron's `arguments` and the family's `dims` say differently: "rotary_base is 10000, config.json
    has 1e6".

    An argument that is not there is not compared, nor one that is None and may be anything.
    """
    said = {name: getattr(arguments, name, None) for name in ARGUMENTS.values()}
    ours: dict[str, Any] = {name: getattr(dims, field, None) or None for field, name in ARGUMENTS.items()}
    own = {**NEVER, **_function_of(dims)}
    for name, theirs, value in (
        *((name, _said(arguments, name, OFF.get(name)), value) for name, value in own.items()),
        *_attention_of(arguments, dims),
        *_router_of(arguments, dims),
        *_layers_of(arguments, dims),
        *_positions_of(arguments, dims),
        *_ends_of(arguments, dims),
    ):
        said[name], ours[name] = theirs, value
    return [
        " ".join(f"{name} is {value}, config.json has {ours[name]}".split())
        for name, value in said.items()
        if value is not None and ours[name] is not None and value != ours[name]
    ]


def _said(arguments: Namespace, name: str, nothing: Any) -> Any:
    """Return the argument: `nothing` where it is None, or where a release of Megatron-LM has none of this name; None
    where it is not known.
    """
    value = getattr(arguments, name, None)
    return nothing if value is None and (hasattr(arguments, name) or _parsed(arguments)) else value


def _parsed(arguments: Namespace) -> bool:
    """Return whether the arguments are all that Megatron-LM's parser knows: what is not there, it cannot compute."""
    return hasattr(arguments, "untie_embeddings_and_output_weights")


def check_arguments(arguments: Namespace, dims: Any, where: str) -> None:
    """Refuse Megatron's `arguments` that say anything otherwise than `dims`. Raises UserMistake."""
    try:
        said = unlike(arguments, dims)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserMistake(
            Problem(where, f"its arguments are not understood ({' '.join(str(error).split())})")
        ) from None
    if said:
        remedy = "what it was trained with has to be in the config.json"
        raise UserMistake([Problem(where, f"was trained otherwise: {other}: {remedy}") for other in said])


def _function_of(dims: Any) -> dict[str, Any]:
    """Return what of a family's function Megatron has one argument for; None is not compared."""
    hybrid, clamped, kind = hasattr(dims, "pattern"), hasattr(dims, "swiglu_limit"), getattr(dims, "of_kind", None)
    experts, sigmoid = getattr(dims, "experts", 0), hybrid or bool(kind and kind.experts and kind.experts.sigmoid)
    own: dict[str, Any] = {
        "softmax_type": "learnable" if clamped else "vanilla",
        "glu_linear_offset": 1.0 if clamped else 0.0,
        "quick_geglu": clamped,
        "activation_func_clamp_value": dims.swiglu_limit if clamped else 0.0,
        "layernorm_epsilon": getattr(dims, "norm_epsilon", None),  # norm_epsilon's name from Megatron-LM 0.16 on
    }
    if hybrid:
        own |= {"swiglu": False, "squared_relu": True, "position_embedding_type": "none"}
    if kind:
        own |= {"swiglu": True, "squared_relu": False, "qk_layernorm": dims.qk_norm == "head"}
    if experts and not sigmoid:
        own["moe_router_pre_softmax"] = not getattr(dims, "norm_topk_prob", True)
    if experts:
        own["moe_router_score_function"] = "sigmoid" if sigmoid else "softmax"
    return own


def _attention_of(arguments: Namespace, dims: Any) -> Compared:
    """Yield what is compared of attention, where the arguments have it under another form."""
    if hasattr(arguments, "group_query_attention") and getattr(dims, "heads", None):
        grouped = arguments.group_query_attention
        groups = arguments.num_query_groups if grouped else arguments.num_attention_heads
        yield "num_query_groups", groups, dims.kv_groups
    if hasattr(arguments, "window_size") and getattr(dims, "heads", None):
        window = arguments.window_size[0] + 1 if arguments.window_size else 0  # it counts tokens before
        yield "window_size", window, dims.window if any(getattr(dims, "sliding", ())) else 0
    # Megatron-LM's parser has no --softmax-scale.
    if (_parsed(arguments) or hasattr(arguments, "softmax_scale")) and getattr(dims, "head_dim", None):
        given = getattr(arguments, "softmax_scale", None) or dims.head_dim**-0.5
        own = getattr(dims, "attention_multiplier", 0.0) or dims.head_dim**-0.5
        yield "softmax_scale", own if math.isclose(given, own, rel_tol=1e-5) else given, own


def _router_of(arguments: Namespace, dims: Any) -> Compared:
    """Yield what is compared of how a token finds its experts, where the arguments have it under another form."""
    if not getattr(dims, "experts", None):
        return
    if hasattr(arguments, "moe_router_topk_scaling_factor"):
        scale = arguments.moe_router_topk_scaling_factor or 1.0
        ours = getattr(dims, "routed_scale", getattr(dims, "routed_scaling_factor", 1.0))
        yield "moe_router_topk_scaling_factor", scale, ours
    theirs = _said(arguments, "moe_router_num_groups", 1), _said(arguments, "moe_router_group_topk", 0)
    own = getattr(dims, "expert_groups", 1), getattr(dims, "top_groups", 1)
    (groups, best), (own_groups, own_best) = map(_limited, (theirs, own))
    yield "moe_router_num_groups", groups, own_groups
    yield "moe_router_group_topk", best, own_best
    balanced = getattr(arguments, "moe_router_load_balancing_type", None)
    listed = balanced if isinstance(balanced, list) else [balanced]
    yield "moe_router_load_balancing_type", next((each for each in listed if each in BALANCED), None), "none"


def _limited(groups: tuple[Any, Any]) -> tuple[Any, Any]:
    """Return (groups, best of them), 1 of each where a token chooses among all experts: 0 of them, or every one."""
    return (1, 1) if groups[1] is not None and groups[1] in (0, groups[0]) else groups


def _layers_of(arguments: Namespace, dims: Any) -> Compared:
    """Yield what is compared of single layers: which have the window, and which no positions."""
    layers = getattr(dims, "layers", 0)
    often = _said(arguments, "window_attn_skip_freq", [1] * layers)
    if often is not None and getattr(arguments, "window_size", None) and hasattr(dims, "sliding"):
        windows = [i % often != 0 for i in range(1, layers + 1)] if type(often) is int else [bool(i) for i in often]
        yield "window_attn_skip_freq", windows, [bool(i) for i in dims.sliding]
    often = _said(arguments, "no_rope_freq", [0] * layers)
    if often and layers:
        skipped = [i % often == 0 for i in range(1, layers + 1)] if type(often) is int else [bool(i) for i in often]
        yield "no_rope_freq", skipped, [bool(i) for i in getattr(dims, "no_rope", ()) or (False,) * layers]


def _positions_of(arguments: Namespace, dims: Any) -> Compared:
    """Yield what is compared of rotary positions."""
    stretch = getattr(dims, "stretch", getattr(dims, "yarn", None))
    if hasattr(dims, "rope_base"):
        yield "rotary_percent", getattr(arguments, "rotary_percent", None), getattr(dims, "partial", 1.0)
        older = getattr(arguments, "use_rotary_position_embeddings", None)
        theirs = "rope" if older else getattr(arguments, "position_embedding_type", None)
        if theirs == "rope" and getattr(arguments, "enable_gpt_oss", False):  # for ModelOpt's builder alone
            theirs = "yarn" if getattr(arguments, "modelopt_enabled", False) else "rope, and yarn by --enable-gpt-oss"
        yield "position_embedding_type", theirs, "yarn" if isinstance(stretch, Yarn) else "rope"
        longer = stretch.factor if isinstance(stretch, Linear) else 1
        yield "rotary_seq_len_interpolation_factor", _said(arguments, "rotary_seq_len_interpolation_factor", 1), longer
        if theirs == "yarn" and isinstance(stretch, Yarn):
            yield from _yarn_of(arguments, stretch)
        if hasattr(arguments, "use_rope_scaling") and theirs != "yarn":
            given = LLAMA3_FACTOR if _parsed(arguments) else getattr(arguments, "rope_scaling_factor", LLAMA3_FACTOR)
            factor = given if arguments.use_rope_scaling else 0
            yield "rope_scaling_factor, as the model was built,", factor, getattr(dims, "rope_factor", 0.0)


def _yarn_of(arguments: Namespace, yarn: Yarn) -> Compared:
    fixed = getattr(arguments, "enable_gpt_oss", False)  # megatron/post_training/model_builder.py: no argument counts
    for name, (field, default, of_gpt_oss) in YARN.items():
        yield name, of_gpt_oss if fixed else _said(arguments, name, default), getattr(yarn, field)
    for name, value in CONCENTRATION.items():
        yield name, getattr(arguments, name, None), value


def _ends_of(arguments: Namespace, dims: Any) -> Compared:
    """Yield what is compared of embedding and output."""
    if _parsed(arguments):
        untied = arguments.untie_embeddings_and_output_weights
        yield "untie_embeddings_and_output_weights", untied, not getattr(dims, "tied", False)
        if getattr(dims, "mamba_heads", 0):
            yield "norm_epsilon of Mamba's own norm", MAMBA_EPSILON, dims.norm_epsilon
        for name in MULTIPLIERS:  # for which Megatron-LM, whose parser made these arguments, has none
            yield name, 1.0, getattr(dims, name, 1.0)


# ---------------------------------------------------------------- of a model of ours


def arguments_of(dims: Any, shape: ModelShape) -> Namespace:
    """Return Megatron-LM's arguments of a model of export_megatron.STOCK: what `--use-checkpoint-args` takes of a
    checkpoint, and what `unlike` compares.
    """
    said: dict[str, Any] = {name: getattr(dims, field, None) or None for field, name in ARGUMENTS.items()}
    said |= {
        "num_layers": len(shape.layers),
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "max_position_embeddings": shape.max_positions or None,
        "padded_vocab_size": None if shape.vocabulary % PADDED else shape.vocabulary,
        "untie_embeddings_and_output_weights": not shape.tied,
        "normalization": "RMSNorm",
        "swiglu": shape.gated,
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm,
        "group_query_attention": shape.kv_groups != shape.heads,
        "num_query_groups": shape.kv_groups,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "use_rope_scaling": bool(dims.rope_factor),
        "rope_scaling_factor": dims.rope_factor or LLAMA3_FACTOR,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    if shape.experts:
        said |= {
            "moe_ffn_hidden_size": shape.expert_ffn,
            "moe_layer_freq": [int(not dims.is_dense(i)) for i in range(dims.layers)] if any(dims.dense) else 1,
            "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": not dims.norm_topk_prob,
            "moe_shared_expert_intermediate_size": shape.shared_ffn or None,
            "moe_shared_expert_gate": shape.shared_gate,
        }
    return Namespace(**{name: value for name, value in said.items() if value is not None})


def command_line(dims: Any, shape: ModelShape) -> list[str]:
    """Return the words with which Megatron-LM loads such a model, beside `--load` and the folder.

    `--use-checkpoint-args` leaves out some arguments of a model's function (megatron/training/checkpointing.py,
    `load_args_from_checkpoint`): these are said, since Megatron's defaults would make another model without an error.
    """
    words = ["--finetune", "--no-load-optim", "--no-load-rng", "--ckpt-format", "torch_dist"]
    words += ["--dist-ckpt-strictness", "log_all", "--use-checkpoint-args", "--norm-epsilon", repr(dims.norm_epsilon)]
    words += ["--qk-layernorm"] if shape.qk_norm else []
    if dims.rope_factor:
        words += ["--use-rope-scaling", "--rope-scaling-factor", repr(dims.rope_factor)]
    words += ["--moe-router-dtype", "fp32"] if shape.experts else []
    return words + (["--moe-shared-expert-gate"] if shape.shared_gate else [])
