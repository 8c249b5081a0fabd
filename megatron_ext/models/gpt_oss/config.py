"""gpt-oss: what of a Hugging Face config.json we understand. No torch here: checks read it too.

Its weights: weight_layout.py. Anything that would change the function and is not understood is refused.
"""

from dataclasses import dataclass, replace
from typing import Any

from data_tools.mistake import Problem
from megatron_ext.models.config_reading import ROPE_KEYS, Reading, file_of, small_dims
from megatron_ext.models.rotary import YARN, Yarn, settings_of, stretch_of
from megatron_ext.parallel.shape import ATTENTION, MOE, MXFP4_BLOCK, WINDOW, ModelShape

SWIGLU_ALPHA = 1.702  # the only one that mcore's quick_gelu has
MXFP4 = {  # quantization_config of the released files: all but the experts is as `dtype` says
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"


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
    "experts_per_token", "initial_context_length", "layer_types", "num_experts", "quantization_config", "rms_norm_eps",
    "sliding_window", "swiglu_limit", "tie_word_embeddings", *ROPE_KEYS, *SIZES.values(), *LAYERS.values(), *ONLY,
}  # fmt: skip
WITHOUT_EFFECT = {"router_aux_loss_coef"}  # of a loss that training here does not add
DEFAULT_ROPE = {  # transformers' own, where a file names none
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


def read(config: dict[str, Any], where: str = "config.json") -> tuple[Dims | None, list[Problem]]:
    """Read the dimensions out of a parsed config.json, or every reason why this model is not understood."""
    config = {"num_local_experts": config.get("num_experts"), **config}  # transformers answers to both names
    reading = Reading(config, where, "gpt_oss")
    sizes = reading.sizes(SIZES | LAYERS)
    if reading.problems:
        return None, reading.problems
    layers = sizes.pop("layers")
    reading.only(ONLY)
    reading.known(READ | WITHOUT_EFFECT)
    hidden, ffn, experts, top_k = (sizes[name] for name in ("hidden", "ffn", "experts", "top_k"))
    for key, other in {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}.items():
        reading.agree(key, config.get(key), other, config[other])
    reading.groups(sizes["heads"])
    kinds, window = _windows(reading, layers)
    if config.get("swiglu_limit", 7.0) is None:
        reading.refuse("swiglu_limit", None, "experts clamp at a positive value")
    if not 2 <= top_k <= experts:
        reading.refuse("num_experts_per_tok", top_k, f"a softmax over the chosen takes 2 to {experts} experts here")
    method = _quantisation(reading, hidden, ffn)
    rope_base, yarn = _rope_of(reading, sizes["head_dim"])
    dims = Dims(
        **sizes,
        window=window,
        sliding=tuple(kind == SLIDING for kind in kinds),
        swiglu_limit=float(reading.number("swiglu_limit", 7.0)),
        tied=reading.flag("tie_word_embeddings", False),
        norm_epsilon=float(reading.number("rms_norm_eps", 1e-5)),
        rope_base=rope_base,
        yarn=yarn,
        # Files with MXFP4 experts need not name the dtype of the rest; transformers takes bfloat16 then.
        dtype=reading.dtype("bfloat16" if method else "float32"),
        mxfp4=method == "mxfp4",
    )
    return (None, reading.problems) if reading.problems else (dims, [])


def _windows(reading: Reading, layers: int) -> tuple[list[str], int]:
    """Return (the kind of each layer, tokens of the window)."""
    kinds = reading.words("layer_types") or [(FULL, SLIDING)[(i + 1) % 2] for i in range(layers)]
    window = reading.config.get("sliding_window", 128) or 0
    if unknown := sorted(set(kinds) - {FULL, SLIDING}):
        reading.refuse("layer_types", unknown, f"{SLIDING} and {FULL} are")
    if len(kinds) != layers:
        reading.wrong(f"layer_types has {len(kinds)} entries for {layers} layers")
    if type(window) is not int or window < (SLIDING in kinds):
        reading.refuse("sliding_window", reading.config.get("sliding_window"), "sliding layers need at least 1 token")
    return kinds, window


def _quantisation(reading: Reading, hidden: int, ffn: int) -> str | None:
    """Return "mxfp4" where the file's experts are quantised, None where they are not."""
    quantised = reading.config.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if method not in (None, "mxfp4"):
        reading.refuse("quantization_config", method, "import the unquantized or the MXFP4 model")
    elif method and (said := _no_blocks(hidden, ffn)):
        reading.wrong(said)
    return method


def _no_blocks(hidden: int, ffn: int) -> str:
    """Return why experts of these sizes have no MXFP4 blocks; "" where they have."""
    if hidden % MXFP4_BLOCK == 0 and ffn % MXFP4_BLOCK == 0:
        return ""
    return f"MXFP4 needs whole blocks of {MXFP4_BLOCK}: hidden_size is {hidden}, intermediate_size {ffn}"


def with_mxfp4(dims: Dims) -> tuple[Dims, str]:
    """Return the model whose checkpoint has its experts as MXFP4, and why there is none such; "" where there is."""
    return replace(dims, mxfp4=True), _no_blocks(dims.hidden, dims.ffn)


def _rope_of(reading: Reading, head_dim: int) -> tuple[float, Yarn | None]:
    """Return (the base of rotary positions, how they are stretched), with transformers' defaults."""
    rope = reading.rope(DEFAULT_ROPE, 150000.0, head_dim, {"yarn": YARN, "default": ()})
    if rope["rope_type"] != "yarn":
        return rope["rope_theta"], None
    context, original = reading.config.get("initial_context_length"), rope.get("original_max_position_embeddings")
    reading.agree("initial_context_length", context, "original_max_position_embeddings", original)
    yarn = stretch_of(reading, rope)
    assert yarn is None or isinstance(yarn, Yarn)
    return rope["rope_theta"], yarn


def shape(dims: Dims) -> ModelShape:
    """Return what parallel rules and predictions need to know of a model."""
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
        yarn_positions=dims.yarn.original_positions if dims.yarn else 0,
        sinks=True,
        qkv_bias=True,
        attention_output_bias=True,
        activation_steps=2,
        experts=dims.experts,
        top_k=dims.top_k,
        expert_ffn=dims.ffn,
        expert_bias=True,
    )


def hf_config(dims: Dims, eos: int | None = None, pad: int | None = None) -> dict[str, Any]:
    """Return config.json of a GptOssForCausalLM with these dimensions, as transformers 4 and 5 both read it."""
    rope = settings_of(dims.yarn, dims.rope_base)
    quantised = {"quantization_config": MXFP4} if dims.mxfp4 else {}
    return {
        **file_of(dims, "GptOssForCausalLM", model_type="gpt_oss", eos=eos, pad=pad),
        **quantised,
        **{name: getattr(dims, field) for field, name in SIZES.items()},
        **ONLY,
        "router_aux_loss_coef": 0.0,
        "output_router_logits": False,
        "layer_types": [SLIDING if sliding else FULL for sliding in dims.sliding],
        "sliding_window": dims.window,
        "swiglu_limit": dims.swiglu_limit,
        "tie_word_embeddings": dims.tied,
        "rms_norm_eps": dims.norm_epsilon,
        "rope_theta": dims.rope_base,
        "rope_scaling": {key: value for key, value in rope.items() if key != "rope_theta"},
        "rope_parameters": rope,
    }


def small(sizes: Any, vocabulary: int, eos: int | None, pad: int | None) -> dict[str, Any]:
    """Return config.json of the model that init_model's `sizes` ask for: 4 experts, 2 for each token, sliding layers
    first.
    """
    dims = small_dims(
        Dims,
        sizes,
        vocabulary,
        head_dim=sizes.hidden // sizes.heads,
        window=128,
        sliding=tuple(i % 2 == 0 for i in range(sizes.layers)),
        experts=4,
        top_k=2,
        swiglu_limit=7.0,
        tied=bool(sizes.tied),
        yarn=Yarn(32.0, max(1, sizes.max_positions // 32), 32.0, 1.0, truncate=False),
    )
    return hf_config(dims, eos, pad)
