"""Qwen2 and Qwen2.5: what of a Hugging Face config.json we understand. No torch here: checks read it too.

Mapping to mcore: reference/megatron.md 1.2. Anything that would change the function and is not understood is refused.
"""

from dataclasses import dataclass
from typing import Any

from data_tools.mistake import Problem
from megatron_ext.models.shape import ATTENTION, MLP, ModelShape


@dataclass(frozen=True)
class Dims:
    """The numbers that define a Qwen2 model. All sizes in elements."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_groups: int
    head_dim: int
    vocabulary: int  # rows of the embedding in the checkpoint, not the tokenizer's length
    tied: bool
    norm_epsilon: float
    rope_base: float
    max_positions: int
    dtype: str  # of the checkpoint: "float32", "bfloat16" or "float16"


REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
)


def read(config: dict[str, Any], where: str = "config.json") -> tuple[Dims | None, list[Problem]]:
    """Dimensions out of a parsed config.json, or every reason why this model is not understood."""
    problems = [Problem(where, f"{key} is missing") for key in REQUIRED if not isinstance(config.get(key), int)]
    if problems:
        return None, problems

    def refuse(key: str, value: Any, remedy: str) -> None:
        problems.append(Problem(where, f"{key} = {value!r} is not supported for qwen2: {remedy}"))

    # transformers 5 nests the rotary settings, older files have rope_theta and rope_scaling beside the others.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        refuse("rope_type", kind, "only plain rotary positions are")
    if float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) or 1.0) != 1.0:
        refuse(
            "partial_rotary_factor", rope.get("partial_rotary_factor", config.get("partial_rotary_factor")), "use 1.0"
        )
    if config.get("use_sliding_window"):
        refuse("use_sliding_window", True, "no released Qwen2.5 uses it; set it to false if yours does not need it")
    windowed = sorted({kind for kind in config.get("layer_types") or [] if kind != "full_attention"})
    if windowed:
        refuse("layer_types", windowed, "only full_attention layers are")
    if config.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", config["hidden_act"], "Qwen2 has silu")
    if config.get("attention_dropout"):
        refuse("attention_dropout", config["attention_dropout"], "set it to 0.0")
    if config.get("quantization_config"):
        refuse("quantization_config", config["quantization_config"].get("quant_method"), "import the unquantized model")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        refuse("dtype", dtype, "use float32, bfloat16 or float16")

    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or (hidden // heads if heads else 0)
    if heads < 1 or groups < 1 or heads % groups:
        problems.append(Problem(where, f"{heads} attention heads do not divide by {groups} key-value heads"))
    elif not config.get("head_dim") and hidden % heads:
        problems.append(Problem(where, f"hidden_size {hidden} does not divide by {heads} attention heads"))
    elif head_dim % 2:
        problems.append(Problem(where, f"head size {head_dim} is odd: rotary positions need an even one"))
    if problems:
        return None, problems
    dims = Dims(
        layers=config["num_hidden_layers"],
        hidden=hidden,
        ffn=config["intermediate_size"],
        heads=heads,
        kv_groups=groups,
        head_dim=head_dim,
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        rope_base=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        max_positions=int(config.get("max_position_embeddings", 32768)),
        dtype=dtype,
    )
    return dims, []


def shape(dims: Dims) -> ModelShape:
    """What parallel rules and the planner need to know."""
    return ModelShape(
        layers=((ATTENTION, MLP),) * dims.layers,
        hidden=dims.hidden,
        vocabulary=dims.vocabulary,
        tied=dims.tied,
        max_positions=dims.max_positions,
        heads=dims.heads,
        kv_groups=dims.kv_groups,
        head_dim=dims.head_dim,
        qkv_bias=True,
        ffn=dims.ffn,
    )


def hf_config(dims: Dims, eos: int | None = None, pad: int | None = None) -> dict[str, Any]:
    """config.json of a Qwen2ForCausalLM with these dimensions, as transformers 4 and 5 both read it."""
    # Released files leave head_dim out; transformers reads it where it is not hidden_size / heads.
    head_dim = {} if dims.head_dim * dims.heads == dims.hidden else {"head_dim": dims.head_dim}
    return {
        **head_dim,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": dims.layers,
        "hidden_size": dims.hidden,
        "intermediate_size": dims.ffn,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_groups,
        "vocab_size": dims.vocabulary,
        "tie_word_embeddings": dims.tied,
        "rms_norm_eps": dims.norm_epsilon,
        "rope_theta": dims.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": dims.rope_base},
        "max_position_embeddings": dims.max_positions,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "initializer_range": 0.02,
        "torch_dtype": dims.dtype,
        "dtype": dims.dtype,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }


def small(sizes: Any, vocabulary: int, eos: int | None, pad: int | None) -> dict[str, Any]:
    """config.json of the model that init_model's `sizes` ask for."""
    dims = Dims(
        layers=sizes.layers,
        hidden=sizes.hidden,
        ffn=sizes.ffn,
        heads=sizes.heads,
        kv_groups=sizes.kv_groups,
        head_dim=sizes.hidden // sizes.heads,
        vocabulary=vocabulary,
        tied=sizes.tied,
        norm_epsilon=sizes.norm_epsilon,
        rope_base=sizes.rope_base,
        max_positions=sizes.max_positions,
        dtype=sizes.dtype,
    )
    return hf_config(dims, eos, pad)
