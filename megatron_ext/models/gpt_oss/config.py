"""gpt-oss: what of a Hugging Face config.json we understand. No torch here: checks read it too.

Mapping to mcore: reference/megatron.md 1.3. Anything that would change the function and is not understood is refused.
"""

from dataclasses import dataclass
from typing import Any

from data_tools.mistake import Problem
from megatron_ext.models.shape import ATTENTION, MOE, WINDOW, ModelShape

SWIGLU_ALPHA = 1.702  # the only one that mcore's quick_gelu has
MXFP4_BLOCK = 32
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Yarn:
    """Rotary positions stretched by `factor` (Peng et al., arXiv 2309.00071). `truncate`: its correction range to whole numbers."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    truncate: bool


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


REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
)
YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate")
DEFAULT_ROPE = {  # transformers' own, where a file names none
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


def read(config: dict[str, Any], where: str = "config.json") -> tuple[Dims | None, list[Problem]]:
    """Dimensions out of a parsed config.json, or every reason why this model is not understood."""
    config = {"num_local_experts": config.get("num_experts"), **config}  # transformers answers to both names
    problems = [Problem(where, f"{key} is missing") for key in REQUIRED if not isinstance(config.get(key), int)]
    if problems:
        return None, problems

    def refuse(key: str, value: Any, remedy: str) -> None:
        problems.append(Problem(where, f"{key} = {value!r} is not supported for gpt_oss: {remedy}"))

    rope = config.get("rope_parameters") or config.get("rope_scaling") or DEFAULT_ROPE
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("yarn", "default"):
        refuse("rope_type", kind, "yarn and default are")
    elif kind == "yarn" and not {"factor", "original_max_position_embeddings"} <= rope.keys():
        refuse("rope_parameters", rope, "yarn needs factor and original_max_position_embeddings")
    for key in sorted(rope.keys() - {"rope_type", "type", "rope_theta", *YARN}):
        if (key, rope[key]) != ("partial_rotary_factor", 1.0):
            refuse(f"rope_parameters.{key}", rope[key], "remove it if the model does not need it")

    layers = config["num_hidden_layers"]
    kinds = config.get("layer_types") or [(FULL, SLIDING)[(i + 1) % 2] for i in range(layers)]
    window = config.get("sliding_window", 128) or 0
    if unknown := sorted(set(kinds) - {FULL, SLIDING}):
        refuse("layer_types", unknown, f"{SLIDING} and {FULL} are")
    if len(kinds) != layers:
        problems.append(Problem(where, f"layer_types has {len(kinds)} entries for {layers} layers"))
    if SLIDING in kinds and window < 1:
        refuse("sliding_window", config.get("sliding_window"), "sliding layers need at least 1 token")

    alpha, limit = config.get("swiglu_alpha", SWIGLU_ALPHA), config.get("swiglu_limit", 7.0)
    if alpha != SWIGLU_ALPHA:
        refuse("swiglu_alpha", alpha, f"megatron-core has {SWIGLU_ALPHA}")
    if not limit or limit <= 0:
        refuse("swiglu_limit", limit, "experts clamp at a positive value")
    if config.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", config["hidden_act"], "gpt-oss has silu")
    if not config.get("attention_bias", True):
        refuse("attention_bias", False, "gpt-oss has biases on q, k, v and o")
    if config.get("attention_dropout"):
        refuse("attention_dropout", config["attention_dropout"], "set it to 0.0")
    hidden, heads, groups = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    experts, top_k, ffn = config["num_local_experts"], config["num_experts_per_tok"], config["intermediate_size"]
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "mxfp4"):
        refuse("quantization_config", method, "import the unquantized or the MXFP4 model")
    elif method and (hidden % MXFP4_BLOCK or ffn % MXFP4_BLOCK):
        refuse("quantization_config", method, f"hidden_size {hidden} and intermediate_size {ffn} need whole blocks of 32")
    # Files with MXFP4 experts need not name the dtype of the rest; transformers takes bfloat16 then.
    dtype = config.get("dtype") or config.get("torch_dtype") or ("bfloat16" if method else "float32")
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        refuse("dtype", dtype, "use float32, bfloat16 or float16")
    if heads < 1 or groups < 1 or heads % groups:
        problems.append(Problem(where, f"{heads} attention heads do not divide by {groups} key-value heads"))
    if config["head_dim"] % 2:
        problems.append(Problem(where, f"head size {config['head_dim']} is odd: rotary positions need an even one"))
    if not 2 <= top_k <= experts:
        refuse("num_experts_per_tok", top_k, f"a softmax over the chosen takes 2 to {experts} of {experts} experts")
    if problems:
        return None, problems
    return Dims(
        hidden=hidden,
        heads=heads,
        kv_groups=groups,
        head_dim=config["head_dim"],
        window=window,
        sliding=tuple(kind == SLIDING for kind in kinds),
        experts=experts,
        top_k=top_k,
        ffn=ffn,
        swiglu_limit=float(limit),
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-5)),
        rope_base=float(rope.get("rope_theta") or config.get("rope_theta") or 150000.0),
        yarn=_yarn(rope) if kind == "yarn" else None,
        max_positions=config["max_position_embeddings"],
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
        tied=sizes.tied,
        norm_epsilon=sizes.norm_epsilon,
        rope_base=sizes.rope_base,
        yarn=Yarn(32.0, max(1, sizes.max_positions // 32), 32.0, 1.0, truncate=False),
        max_positions=sizes.max_positions,
        dtype=sizes.dtype,
    )
    return hf_config(dims, eos, pad)
