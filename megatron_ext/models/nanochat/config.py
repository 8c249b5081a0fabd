"""NanoChat: what of a Hugging Face config.json we understand. No torch here: checks read it too.

A GPT without learned norms: RMSNorm after the embedding, before each block, on queries and keys, and at the end;
squared ReLU; capped logits (transformers 5.23, models/nanochat/modeling_nanochat.py).
"""

from dataclasses import dataclass
from typing import Any

from data_tools.mistake import Problem
from megatron_ext.models.reading import ROPE_KEYS, Reading
from megatron_ext.models.shape import ATTENTION, MLP, ModelShape


@dataclass(frozen=True)
class Dims:
    """The numbers that define a NanoChat model. All sizes in elements."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_groups: int
    vocabulary: int  # rows of the embedding in the checkpoint, not the tokenizer's length
    tied: bool
    norm_epsilon: float
    rope_base: float
    max_positions: int
    logit_cap: float  # logits are cap · tanh(logits / cap); 0: as they are
    dtype: str  # of the checkpoint: "float32", "bfloat16" or "float16"

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SIZES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "vocabulary": "vocab_size",
}
ONLY = {"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "relu2", "quantization_config": None}
READ = {
    "final_logit_softcapping", "max_position_embeddings", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings",
    *ROPE_KEYS, *SIZES.values(), *ONLY,
}  # fmt: skip


def read(config: dict[str, Any], where: str = "config.json") -> tuple[Dims | None, list[Problem]]:
    """Dimensions out of a parsed config.json, or every reason why this model is not understood."""
    reading = Reading(config, where, "nanochat")
    sizes = reading.sizes(SIZES)
    if reading.problems:
        return None, reading.problems
    reading.only(ONLY)
    reading.known(READ)
    hidden, heads = sizes["hidden"], sizes["heads"]
    groups = config.get("num_key_value_heads") or heads
    reading.heads(heads, groups)
    if hidden % heads:
        reading.wrong(f"hidden_size {hidden} does not divide by {heads} attention heads")
    rope = reading.rope({}, 10000.0, hidden // heads)
    if rope["rope_type"] != "default":
        reading.refuse("rope_type", rope["rope_type"], "only plain rotary positions are")
    dtype = reading.dtype()
    if reading.problems:
        return None, reading.problems
    return Dims(
        **sizes,
        kv_groups=groups,
        tied=bool(config.get("tie_word_embeddings", False)),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        rope_base=float(rope["rope_theta"]),
        max_positions=int(config.get("max_position_embeddings", 2048)),
        logit_cap=float(config.get("final_logit_softcapping", 15.0) or 0.0),
        dtype=dtype,
    ), []


def shape(dims: Dims) -> ModelShape:
    """What parallel rules and the planner need to know."""
    return ModelShape(
        layers=((ATTENTION, MLP),) * dims.layers,
        hidden=dims.hidden,
        vocabulary=dims.vocabulary,
        tied=dims.tied,
        max_positions=dims.max_positions,
        learned_norms=False,
        heads=dims.heads,
        kv_groups=dims.kv_groups,
        head_dim=dims.head_dim,
        ffn=dims.ffn,
        gated=False,
        own_mlp_names=("fc1", "fc2"),
    )


def hf_config(dims: Dims, eos: int | None = None, pad: int | None = None) -> dict[str, Any]:
    """config.json of a NanoChatForCausalLM with these dimensions."""
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "num_hidden_layers": dims.layers,
        "hidden_size": dims.hidden,
        "intermediate_size": dims.ffn,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_groups,
        "vocab_size": dims.vocabulary,
        "tie_word_embeddings": dims.tied,
        "rms_norm_eps": dims.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": dims.rope_base},
        "max_position_embeddings": dims.max_positions,
        "final_logit_softcapping": dims.logit_cap or None,
        "hidden_act": "relu2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
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
        vocabulary=vocabulary,
        tied=False if sizes.tied is None else sizes.tied,
        norm_epsilon=sizes.norm_epsilon,
        rope_base=sizes.rope_base,
        max_positions=sizes.max_positions,
        logit_cap=15.0,
        dtype=sizes.dtype,
    )
    return hf_config(dims, eos, pad)
