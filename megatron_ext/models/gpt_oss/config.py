"""gpt-oss: what of a Hugging Face config.json we understand. No torch here: checks read it too.

Mapping to mcore: reference/megatron.md 1.3. Anything that would change the function and is not understood is refused.
"""

from dataclasses import dataclass
from typing import Any

from data_tools.mistake import Problem
from megatron_ext.models.reading import ROPE_KEYS, Reading
from megatron_ext.models.shape import ATTENTION, MOE, WINDOW, ModelShape

SWIGLU_ALPHA = 1.702  # the only one that mcore's quick_gelu has
MXFP4_BLOCK = 32
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Yarn:
    """Rotary positions stretched by `factor` (Peng et al., arXiv 2309.00071)."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    truncate: bool  # the correction range to whole numbers


@dataclass(frozen=True)
class Dims:
    """The numbers that define a gpt-oss model. All sizes in elements."""

    hidden: int
    heads: int
    kv_groups: int
    head_dim: int
    window: int  # tokens that a sliding layer's token sees, itself included
    sliding: tuple[bool, ...]  # for each layer, whether it has the window
    experts: int
    top_k: int
    ffn: int  # of one expert
    swiglu_limit: float
    vocabulary: int  # rows of the embedding in the checkpoint, not the tokenizer's length
    tied: bool
    norm_epsilon: float
    rope_base: float
    yarn: Yarn | None
    max_positions: int
    dtype: str  # of the checkpoint, its MXFP4 experts apart: "float32", "bfloat16" or "float16"
    mxfp4: bool = False  # the checkpoint's expert matrices are MXFP4 blocks and scales

    @property
    def layers(self) -> int:
        return len(self.sliding)


SIZES = {
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "experts": "num_local_experts",
    "top_k": "num_experts_per_tok",
    "ffn": "intermediate_size",
    "vocabulary": "vocab_size",
    "max_positions": "max_position_embeddings",
}
LAYERS = {"layers": "num_hidden_layers"}
ONLY = {
    "attention_bias": True,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "swiglu_alpha": SWIGLU_ALPHA,
}
READ = {
    "layer_types", "num_experts", "quantization_config", "rms_norm_eps", "sliding_window", "swiglu_limit",
    "tie_word_embeddings", *ROPE_KEYS, *SIZES.values(), *LAYERS.values(), *ONLY,
}  # fmt: skip
# Other names of what is read (experts_per_token, initial_context_length), and a loss that training here does not add.
WITHOUT_EFFECT = {"experts_per_token", "initial_context_length", "router_aux_loss_coef"}
YARN = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"}
DEFAULT_ROPE = {  # transformers' own, where a file names none
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


def read(config: dict[str, Any], where: str = "config.json") -> tuple[Dims | None, list[Problem]]:
    """Dimensions out of a parsed config.json, or every reason why this model is not understood."""
    config = {"num_local_experts": config.get("num_experts"), **config}  # transformers answers to both names
    reading = Reading(config, where, "gpt_oss")
    sizes, layers = reading.sizes(SIZES), reading.sizes(LAYERS)["layers"]
    if reading.problems:
        return None, reading.problems
    reading.only(ONLY)
    reading.known(READ | WITHOUT_EFFECT)
    reading.heads(sizes["heads"], sizes["kv_groups"])
    hidden, ffn, experts, top_k = (sizes[name] for name in ("hidden", "ffn", "experts", "top_k"))

    rope = reading.rope(DEFAULT_ROPE, 150000.0, sizes["head_dim"])
    if rope["rope_type"] not in ("yarn", "default"):
        reading.refuse("rope_type", rope["rope_type"], "yarn and default are")
    elif rope["rope_type"] == "yarn" and not {"factor", "original_max_position_embeddings"} <= rope.keys():
        reading.refuse("rope_parameters", rope, "yarn needs factor and original_max_position_embeddings")
    for key in sorted(rope.keys() - {"rope_type", "rope_theta"} - YARN):
        reading.refuse(f"rope_parameters.{key}", rope[key], "remove it if the model does not need it")

    kinds = config.get("layer_types") or [(FULL, SLIDING)[(i + 1) % 2] for i in range(layers)]
    window, limit = config.get("sliding_window", 128) or 0, config.get("swiglu_limit", 7.0) or 0.0
    if unknown := sorted(set(kinds) - {FULL, SLIDING}):
        reading.refuse("layer_types", unknown, f"{SLIDING} and {FULL} are")
    if len(kinds) != layers:
        reading.wrong(f"layer_types has {len(kinds)} entries for {layers} layers")
    if SLIDING in kinds and window < 1:
        reading.refuse("sliding_window", config.get("sliding_window"), "sliding layers need at least 1 token")
    if limit <= 0:
        reading.refuse("swiglu_limit", config.get("swiglu_limit"), "experts clamp at a positive value")
    if not 2 <= top_k <= experts:
        reading.refuse("num_experts_per_tok", top_k, f"a softmax over the chosen takes 2 to {experts} experts here")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "mxfp4"):
        reading.refuse("quantization_config", method, "import the unquantized or the MXFP4 model")
    elif method and (hidden % MXFP4_BLOCK or ffn % MXFP4_BLOCK):
        reading.wrong(f"MXFP4 needs whole blocks of {MXFP4_BLOCK}: hidden_size is {hidden}, intermediate_size {ffn}")
    # Files with MXFP4 experts need not name the dtype of the rest; transformers takes bfloat16 then.
    dtype = reading.dtype("bfloat16" if method else "float32")
    if reading.problems:
        return None, reading.problems
    return Dims(
        **sizes,
        window=window,
        sliding=tuple(kind == SLIDING for kind in kinds),
        swiglu_limit=float(limit),
        tied=bool(config.get("tie_word_embeddings", False)),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-5)),
        rope_base=float(rope["rope_theta"]),
        yarn=_yarn(rope) if rope["rope_type"] == "yarn" else None,
        dtype=dtype,
        mxfp4=method == "mxfp4",
    ), []


def shape(dims: Dims) -> ModelShape:
    """What parallel rules and the planner need to know."""
    return ModelShape(
        layers=tuple((WINDOW if sliding else ATTENTION, MOE) for sliding in dims.sliding),
        hidden=dims.hidden,
        vocabulary=dims.vocabulary,
        tied=dims.tied,
        max_positions=dims.max_positions,
        heads=dims.heads,
        kv_groups=dims.kv_groups,
        head_dim=dims.head_dim,
        window=dims.window,
        sinks=True,
        qkv_bias=True,
        attention_output_bias=True,
        experts=dims.experts,
        top_k=dims.top_k,
        expert_ffn=dims.ffn,
        expert_bias=True,
    )


def _yarn(rope: dict[str, Any]) -> Yarn:
    """With transformers' defaults."""
    return Yarn(
        factor=float(rope["factor"]),
        original_positions=int(rope["original_max_position_embeddings"]),
        beta_fast=float(rope.get("beta_fast", 32)),
        beta_slow=float(rope.get("beta_slow", 1)),
        truncate=bool(rope.get("truncate", True)),
    )


def _rope(dims: Dims) -> dict[str, Any]:
    if dims.yarn is None:
        return {"rope_type": "default", "rope_theta": dims.rope_base}
    return {
        "rope_type": "yarn",
        "rope_theta": dims.rope_base,
        "factor": dims.yarn.factor,
        "original_max_position_embeddings": dims.yarn.original_positions,
        "beta_fast": dims.yarn.beta_fast,
        "beta_slow": dims.yarn.beta_slow,
        "truncate": dims.yarn.truncate,
    }


def hf_config(dims: Dims, eos: int | None = None, pad: int | None = None) -> dict[str, Any]:
    """config.json of a GptOssForCausalLM with these dimensions, as transformers 4 and 5 both read it."""
    rope = _rope(dims)
    quantised = {"quantization_config": {"quant_method": "mxfp4"}} if dims.mxfp4 else {}
    return {
        **quantised,
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_hidden_layers": dims.layers,
        "hidden_size": dims.hidden,
        "intermediate_size": dims.ffn,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_groups,
        "head_dim": dims.head_dim,
        "num_local_experts": dims.experts,
        "num_experts_per_tok": dims.top_k,
        "router_aux_loss_coef": 0.0,
        "output_router_logits": False,
        "layer_types": [SLIDING if sliding else FULL for sliding in dims.sliding],
        "sliding_window": dims.window,
        "swiglu_alpha": SWIGLU_ALPHA,
        "swiglu_limit": dims.swiglu_limit,
        "vocab_size": dims.vocabulary,
        "tie_word_embeddings": dims.tied,
        "rms_norm_eps": dims.norm_epsilon,
        "rope_theta": dims.rope_base,
        "rope_scaling": {key: value for key, value in rope.items() if key != "rope_theta"},
        "rope_parameters": rope,
        "max_position_embeddings": dims.max_positions,
        "hidden_act": "silu",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": dims.dtype,
        "dtype": dims.dtype,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }


def small(sizes: Any, vocabulary: int, eos: int | None, pad: int | None) -> dict[str, Any]:
    """config.json of the model that init_model's `sizes` ask for: 4 experts, 2 for each token, sliding layers first."""
    dims = Dims(
        hidden=sizes.hidden,
        heads=sizes.heads,
        kv_groups=sizes.kv_groups,
        head_dim=sizes.hidden // sizes.heads,
        window=128,
        sliding=tuple(i % 2 == 0 for i in range(sizes.layers)),
        experts=4,
        top_k=2,
        ffn=sizes.ffn,
        swiglu_limit=7.0,
        vocabulary=vocabulary,
        tied=False if sizes.tied is None else sizes.tied,
        norm_epsilon=sizes.norm_epsilon,
        rope_base=sizes.rope_base,
        yarn=Yarn(32.0, max(1, sizes.max_positions // 32), 32.0, 1.0, truncate=False),
        max_positions=sizes.max_positions,
        dtype=sizes.dtype,
    )
    return hf_config(dims, eos, pad)
