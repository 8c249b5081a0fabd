"""Qwen2 and Qwen2.5, Qwen3 and Llama, dense: what of a Hugging Face config.json we understand. No torch here: checks
read it too.

Its weights: weight_layout.py. Anything that would change the function and is not understood is refused.
"""

from dataclasses import dataclass
from typing import Any

from data_tools.mistake import Problem
from megatron_ext.models.config_reading import ROPE_KEYS, Reading, file_of, small_dims
from megatron_ext.parallel.shape import ATTENTION, MLP, ModelShape


@dataclass(frozen=True)
class Kind:
    """What tells apart the model types of this family, and what transformers takes where a file names none."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    kv_groups: int | None = None  # None: one a head
    head_dim: int | None = None  # None: hidden_size / heads
    max_positions: int = 32768


KINDS = {
    "qwen2": Kind("Qwen2ForCausalLM", qkv_bias=True, kv_groups=32),
    "qwen3": Kind("Qwen3ForCausalLM", qk_norm=True, kv_groups=32, head_dim=128),
    "llama": Kind("LlamaForCausalLM", max_positions=2048),
}


@dataclass(frozen=True)
class Dims:
    """The numbers that define a model. All sizes in elements."""

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
    kind: str = "qwen2"  # one of KINDS
    rope_factor: float = 0.0  # by which Llama 3 stretches long wavelengths; 0: none

    @property
    def qkv_bias(self) -> bool:
        return KINDS[self.kind].qkv_bias

    @property
    def qk_norm(self) -> bool:
        return KINDS[self.kind].qk_norm


SIZES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "vocabulary": "vocab_size",
}
ONLY = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "quantization_config": None,
    "use_mrope": False,
    "use_sliding_window": False,
}
READ = {
    "attention_bias", "head_dim", "layer_types", "max_position_embeddings", "num_key_value_heads", "rms_norm_eps",
    "tie_word_embeddings", *ROPE_KEYS, *SIZES.values(), *ONLY,
}  # fmt: skip
# How transformers computes the same (pretraining_tp), and what use_sliding_window switches off.
WITHOUT_EFFECT = {"max_window_layers", "pretraining_tp", "sliding_window"}
# Of Llama 3's rotary positions, mcore knows these with any factor (rotary_pos_embedding.py:92).
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read(config: dict[str, Any], where: str = "config.json") -> tuple[Dims | None, list[Problem]]:
    """Read the dimensions out of a parsed config.json, or every reason why this model is not understood."""
    kind = KINDS[config["model_type"]]
    reading = Reading(config, where, config["model_type"])
    sizes = reading.sizes(SIZES)
    if reading.problems:
        return None, reading.problems
    # transformers has no attention_bias for qwen2, which always has one on queries, keys and values.
    reading.only(ONLY | {"attention_bias": kind.qkv_bias})
    reading.known(READ | WITHOUT_EFFECT)
    if windowed := sorted(set(reading.words("layer_types")) - {"full_attention"}):
        reading.refuse("layer_types", windowed, "only full_attention layers are")

    hidden, heads = sizes["hidden"], sizes["heads"]
    head_dim = config.get("head_dim")
    if head_dim is not None:
        reading.sizes({"head_dim": "head_dim"})
    elif not kind.head_dim and hidden % heads:
        reading.wrong(f"hidden_size {hidden} does not divide by {heads} attention heads")
    head_dim = head_dim if type(head_dim) is int else kind.head_dim or hidden // heads
    kinds: dict[str, tuple[str, ...]] = {"default": ()}
    if config["model_type"] == "llama":
        kinds["llama3"] = ("factor", *LLAMA3)
    rope = reading.rope({}, 10000.0, head_dim, kinds)
    factor = 0.0
    if rope["rope_type"] == "llama3":
        factor = float(reading.number("factor", 0.0, rope))
        if (given := {key: rope.get(key) for key in LLAMA3}) != LLAMA3 or factor < 1:
            reading.refuse("rope_parameters", {"factor": factor, **given}, f"a factor from 1 on with {LLAMA3} is")
    dims = Dims(
        **sizes,
        kv_groups=reading.groups(heads, kind.kv_groups),
        head_dim=head_dim,
        tied=reading.flag("tie_word_embeddings", False),
        norm_epsilon=float(reading.number("rms_norm_eps", 1e-6)),
        rope_base=rope["rope_theta"],
        rope_factor=factor,
        max_positions=int(reading.number("max_position_embeddings", kind.max_positions)),
        dtype=reading.dtype(),
        kind=config["model_type"],
    )
    return (None, reading.problems) if reading.problems else (dims, [])


def shape(dims: Dims) -> ModelShape:
    """Return what parallel rules and predictions need to know of a model."""
    return ModelShape(
        layers=((ATTENTION, MLP),) * dims.layers,
        hidden=dims.hidden,
        vocabulary=dims.vocabulary,
        tied=dims.tied,
        max_positions=dims.max_positions,
        heads=dims.heads,
        kv_groups=dims.kv_groups,
        head_dim=dims.head_dim,
        qkv_bias=dims.qkv_bias,
        qk_norm=dims.qk_norm,
        ffn=dims.ffn,
    )


def hf_config(dims: Dims, eos: int | None = None, pad: int | None = None) -> dict[str, Any]:
    """Return config.json of a model with these dimensions, as transformers 4 and 5 both read it."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": dims.rope_base}
    own: dict[str, Any] = {}
    if dims.rope_factor:
        own["rope_scaling"] = {"rope_type": "llama3", "factor": dims.rope_factor, **LLAMA3}
        rope |= own["rope_scaling"]
    # Released Qwen2 files leave head_dim out; transformers reads it where it is not hidden_size / heads.
    if dims.kind == "qwen3" or dims.head_dim * dims.heads != dims.hidden:
        own["head_dim"] = dims.head_dim
    if dims.kind != "qwen2":
        own["attention_bias"] = False
    return {
        **file_of(dims, KINDS[dims.kind].architecture, model_type=dims.kind, eos=eos, pad=pad),
        **own,
        "intermediate_size": dims.ffn,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_groups,
        "tie_word_embeddings": dims.tied,
        "rms_norm_eps": dims.norm_epsilon,
        "rope_theta": dims.rope_base,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_sliding_window": False,
    }


def small(sizes: Any, vocabulary: int, eos: int | None, pad: int | None) -> dict[str, Any]:
    """Return config.json of the model that init_model's `sizes` ask for."""
    head_dim, tied = sizes.hidden // sizes.heads, sizes.tied is not False
    dims = small_dims(Dims, sizes, vocabulary, head_dim=head_dim, tied=tied, kind=sizes.family)
    return hf_config(dims, eos, pad)
