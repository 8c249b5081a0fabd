"""NanoChat: what of a Hugging Face config.json we understand. No torch here: checks read it too.

A GPT without learned norms: RMSNorm after the embedding, before each block, on queries and keys, and at the end;
squared ReLU; capped logits (transformers 5.23, models/nanochat/modeling_nanochat.py).
"""

from dataclasses import dataclass
from typing import Any

from data_tools.mistake import Problem
from megatron_ext.models.config_reading import ROPE_KEYS, Reading, file_of, small_dims
from megatron_ext.parallel.shape import ATTENTION, MLP, ModelShape


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


LOGIT_CAP = 15.0  # of nanochat/gpt.py, and of transformers where a file names none
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
WITHOUT_EFFECT: set[str] = set()


def read(config: dict[str, Any], where: str = "config.json") -> tuple[Dims | None, list[Problem]]:
    """Read the dimensions out of a parsed config.json, or every reason why this model is not understood."""
    reading = Reading(config, where, "nanochat")
    sizes = reading.sizes(SIZES)
    if reading.problems:
        return None, reading.problems
    reading.only(ONLY)
    reading.known(READ | WITHOUT_EFFECT)
    hidden, heads = sizes["hidden"], sizes["heads"]
    if hidden % heads:
        reading.wrong(f"hidden_size {hidden} does not divide by {heads} attention heads")
    capped = config.get("final_logit_softcapping", LOGIT_CAP) is not None
    dims = Dims(
        **sizes,
        kv_groups=reading.groups(heads),
        tied=reading.flag("tie_word_embeddings", False),
        norm_epsilon=float(reading.number("rms_norm_eps", 1e-6)),
        rope_base=reading.rope({}, 10000.0, hidden // heads, {"default": ()})["rope_theta"],
        max_positions=int(reading.number("max_position_embeddings", 2048)),
        logit_cap=float(reading.number("final_logit_softcapping", LOGIT_CAP)) if capped else 0.0,
        dtype=reading.dtype(),
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
        learned_norms=False,
        heads=dims.heads,
        kv_groups=dims.kv_groups,
        head_dim=dims.head_dim,
        ffn=dims.ffn,
        gated=False,
        own_mlp_names=("fc1", "fc2"),
    )


def hf_config(dims: Dims, eos: int | None = None, pad: int | None = None) -> dict[str, Any]:
    """Return config.json of a NanoChatForCausalLM with these dimensions."""
    return {
        **file_of(dims, "NanoChatForCausalLM", model_type="nanochat", eos=eos, pad=pad),
        **{name: value for name, value in ONLY.items() if value is not None},
        "intermediate_size": dims.ffn,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_groups,
        "tie_word_embeddings": dims.tied,
        "rms_norm_eps": dims.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": dims.rope_base},
        "final_logit_softcapping": dims.logit_cap or None,
    }


def small(sizes: Any, vocabulary: int, eos: int | None, pad: int | None) -> dict[str, Any]:
    """Return config.json of the model that init_model's `sizes` ask for."""
    dims = small_dims(Dims, sizes, vocabulary, tied=bool(sizes.tied), logit_cap=LOGIT_CAP)
    return hf_config(dims, eos, pad)
