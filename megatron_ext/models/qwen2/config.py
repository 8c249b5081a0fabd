"""Models of GPT's form, dense or with experts (KINDS in kinds.py): what of a Hugging Face config.json we understand. No
torch here: checks read it too.

Its weights: weight_layout.py. Anything that would change the function and is not understood is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_tools.mistake import Problem
from megatron_ext.models.config_reading import ROPE_KEYS, Reading, file_of, small_dims
from megatron_ext.models.qwen2.kinds import KINDS, Experts, Kind
from megatron_ext.models.rotary import Stretch, Yarn, settings_of, stretch_of
from megatron_ext.models.routing import routing_of
from megatron_ext.parallel.shape import ATTENTION, MLP, MOE, WINDOW, ModelShape


@dataclass(frozen=True)
class Dims:
    """The numbers that define a model. All sizes in elements; what a kind does not have stays as it is here."""

    layers: int
    hidden: int
    ffn: int  # of an MLP; of an expert too, where expert_ffn is 0
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
    stretch: Stretch | None = None  # the other ways
    partial: float = 1.0  # share of a head that positions turn
    window: int = 0  # tokens that a sliding layer's token sees, itself included
    sliding: tuple[bool, ...] = ()  # for each layer, whether it has the window; (): none has
    no_rope: tuple[bool, ...] = ()  # for each layer, whether positions leave it as it is; (): none
    attention_bias: bool = False  # on queries, keys and values, where a kind may have one
    use_qk_norm: bool = True
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0  # over all shared experts
    dense: tuple[bool, ...] = ()  # for each layer, whether it has an MLP instead of experts; (): none has
    norm_topk_prob: bool = True  # the weights of a token's experts add up to 1
    routed_scaling_factor: float = 1.0  # of these weights
    expert_groups: int = 1
    top_groups: int = 1  # groups among whose experts a token chooses
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of what a block gives
    attention_multiplier: float = 0.0  # of the scores; 0: one over the root of the head size
    logits_scaling: float = 1.0  # by which logits are divided

    @property
    def of_kind(self) -> Kind:
        return KINDS[self.kind]

    @property
    def qkv_bias(self) -> bool:
        return self.of_kind.qkv_bias or self.attention_bias

    @property
    def qk_norm(self) -> str:
        """Return "head", "all" or ""."""
        return self.of_kind.qk_norm if self.use_qk_norm else ""

    @property
    def routed_ffn(self) -> int:
        """Width of a routed expert."""
        return self.expert_ffn or self.ffn

    @property
    def is_stretched(self) -> bool:
        """Return whether positions of layers without a window are not as they are."""
        return self.stretch is not None or self.rope_factor > 0

    @property
    def turned(self) -> int:
        """How many numbers of a head positions turn."""
        return int(self.head_dim * self.partial)

    def is_dense(self, layer: int) -> bool:
        """Return whether layer `layer`, from 0, has an MLP."""
        return not self.experts or (bool(self.dense) and self.dense[layer])


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
    "sliding_window", "tie_word_embeddings", *ROPE_KEYS, *SIZES.values(), *ONLY,
}  # fmt: skip
WITHOUT_EFFECT = {"max_window_layers", "pretraining_tp"}  # of windows that are off; how transformers computes the same
# Of Llama 3's rotary positions, mcore knows these with any factor (rotary_pos_embedding.py:92).
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SLIDING, FULL = "sliding_attention", "full_attention"


def read(config: dict[str, Any], where: str = "config.json") -> tuple[Dims | None, list[Problem]]:
    """Read the dimensions out of a parsed config.json, or every reason why this model is not understood."""
    kind = KINDS[config["model_type"]]
    for other, key in kind.same.items():
        config = {key: config.get(other), **config}
    reading = Reading(config, where, config["model_type"])
    sizes = reading.sizes({**SIZES, **kind.sizes})
    if reading.problems:
        return None, reading.problems
    for other, key in kind.same.items():
        reading.agree(other, config.get(other), key, config[key])
    # transformers has no attention_bias for qwen2, which always has one on queries, keys and values.
    bias = {} if "attention_bias" in kind.flags else {"attention_bias": kind.qkv_bias}
    reading.only({**ONLY, **bias, **kind.only})
    keys = {*kind.sizes.values(), *kind.flags, *kind.numbers, *kind.only, *kind.others, *kind.same}
    reading.known(READ | WITHOUT_EFFECT | keys)
    head_dim = _head_dim(reading, kind, sizes["hidden"], sizes["heads"])
    own: dict[str, Any] = {**sizes, **_positions(reading, kind, head_dim)}
    own |= _windows(reading, kind, sizes["layers"])
    own |= _choice(reading, kind.experts, sizes) if kind.experts else {}
    own |= {"no_rope": _no_rope(reading, sizes["layers"])} if kind.no_rope else {}
    own |= {key: reading.flag(key, default) for key, default in kind.flags.items()}
    own |= {key: float(reading.number(key, default)) for key, default in kind.numbers.items()}
    dims = Dims(
        **own,
        kv_groups=reading.groups(sizes["heads"], kind.kv_groups),
        head_dim=head_dim,
        tied=reading.flag("tie_word_embeddings", kind.tied),
        norm_epsilon=float(reading.number("rms_norm_eps", kind.norm_epsilon)),
        max_positions=int(reading.number("max_position_embeddings", kind.max_positions)),
        dtype=reading.dtype(),
        kind=config["model_type"],
    )
    if kind.experts and not kind.experts.sigmoid:
        least = 2 if dims.norm_topk_prob else 1  # mcore's softmax over the chosen
        if not least <= dims.top_k <= dims.experts:
            reading.refuse("num_experts_per_tok", dims.top_k, f"{least} to {dims.experts} experts are")
    return (None, reading.problems) if reading.problems else (dims, [])


def _head_dim(reading: Reading, kind: Kind, hidden: int, heads: int) -> int:
    head_dim = reading.config.get("head_dim")
    if head_dim is not None:
        reading.sizes({"head_dim": "head_dim"})
    elif not kind.head_dim and hidden % heads:
        reading.wrong(f"hidden_size {hidden} does not divide by {heads} attention heads")
    return head_dim if type(head_dim) is int else kind.head_dim or hidden // heads


def _positions(reading: Reading, kind: Kind, head_dim: int) -> dict[str, Any]:
    """Return the fields of Dims about rotary positions."""
    if kind.windows == "types":
        reading = _of_full_layers(reading, kind, head_dim)
    rope = reading.rope({}, kind.rope_base, head_dim, kind.ropes, kind.partial)
    factor = 0.0
    if rope["rope_type"] == "llama3":
        factor = float(reading.number("factor", 0.0, rope))
        if (given := {key: rope.get(key) for key in LLAMA3}) != LLAMA3 or factor < 1:
            reading.refuse("rope_parameters", {"factor": factor, **given}, f"a factor from 1 on with {LLAMA3} is")
    return {
        "rope_base": rope["rope_theta"],
        "rope_factor": factor,
        "stretch": stretch_of(reading, rope),
        "partial": rope.get("partial_rotary_factor", 1.0),
    }


def _of_full_layers(reading: Reading, kind: Kind, head_dim: int) -> Reading:
    """Return a reading of what layers without a window have, where those with one have positions as they are (OLMo 3).

    Older files have rope_scaling, which means the former.
    """
    given, kinds = reading.config.get("rope_parameters"), {FULL, SLIDING}
    if given is None:
        return reading
    if not isinstance(given, dict) or set(given) != kinds or not all(isinstance(each, dict) for each in given.values()):
        reading.refuse("rope_parameters", given, f"settings for {' and '.join(sorted(kinds))} are")
        return Reading({}, reading.where, reading.family)
    full, windowed = (
        Reading({**config, "rope_parameters": given[name]}, reading.where, reading.family)
        for name, config in ((FULL, reading.config), (SLIDING, {}))
    )
    full.problems = reading.problems
    bases = [each.rope({}, kind.rope_base, head_dim, kind.ropes)["rope_theta"] for each in (full, windowed)]
    own = windowed.config["rope_parameters"].get("rope_type", "default")
    reading.problems += windowed.problems
    if own != "default" or bases[0] != bases[1]:
        reading.refuse("rope_parameters.sliding_attention", given[SLIDING], f"default positions of base {bases[0]} are")
    return full


def _no_rope(reading: Reading, layers: int) -> tuple[bool, ...]:
    """Return for each layer whether positions leave it as it is; () where they leave none."""
    interval = reading.config.get("no_rope_layer_interval", 4)
    listed = reading.config.get("no_rope_layers")
    if listed is None and type(interval) is int and interval > 0:
        listed = [int((i + 1) % interval != 0) for i in range(layers)]
    if not isinstance(listed, list) or any(type(each) is not int or each not in (0, 1) for each in listed):
        reading.refuse("no_rope_layers", listed, "a list of 1 (a layer has rotary positions) and 0 is")
        return ()
    if len(listed) != layers:
        reading.wrong(f"no_rope_layers has {len(listed)} entries for {layers} layers")
    return tuple(not each for each in listed) if 0 in listed else ()


def _windows(reading: Reading, kind: Kind, layers: int) -> dict[str, Any]:
    """Return the fields of Dims about sliding windows."""
    kinds = reading.words("layer_types")
    if kinds and len(kinds) != layers:
        reading.wrong(f"layer_types has {len(kinds)} entries for {layers} layers")
    if kind.windows == "types":
        kinds = kinds or [FULL if i % 4 == 3 else SLIDING for i in range(layers)]
    known = {FULL, SLIDING} if kind.windows == "types" else {FULL}
    if unknown := sorted(set(kinds) - known):
        reading.refuse("layer_types", unknown, f"only {' and '.join(sorted(known))} layers are")
    window = reading.config.get("sliding_window", kind.window) if kind.windows else None
    sliding = tuple(name == SLIDING for name in kinds) if kind.windows == "types" else (True,) * layers
    if not kind.windows or (window is None and kind.windows == "all"):
        return {}
    if type(window) is not int or window < 1:
        reading.refuse("sliding_window", window, "sliding layers need at least 1 token")
        return {}
    return {"window": window, "sliding": sliding}


def _choice(reading: Reading, experts: Experts, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the fields of Dims that say which layers have experts, and how a token finds them where by sigmoid."""
    fields: dict[str, Any] = {"dense": _dense(reading, experts, sizes["layers"])}
    if fields["dense"] and all(fields["dense"]):
        reading.wrong("no layer has experts")
    if experts.sigmoid:
        routing = routing_of(reading, sizes["experts"], sizes["top_k"], scale=1.0)
        shared = 1 if reading.config.get("n_shared_experts") is None else reading.config["n_shared_experts"]
        fields |= {
            "expert_groups": routing.groups,
            "top_groups": routing.top_groups,
            "norm_topk_prob": sizes["top_k"] > 1,
        }
        fields["shared_ffn"] = shared * sizes["expert_ffn"] if type(shared) is int else 0
    return fields


def _dense(reading: Reading, experts: Experts, layers: int) -> tuple[bool, ...]:
    """Return for each layer whether it has an MLP instead of experts; () where none has."""
    if experts.dense == "first":
        first = reading.config.get("first_k_dense_replace", 1)
        if type(first) is not int or not 0 <= first <= layers:
            reading.refuse("first_k_dense_replace", first, f"a number of layers from 0 to {layers} is")
            return ()
        return tuple(i < first for i in range(layers)) if first else ()
    if experts.dense != "listed":
        return ()
    reading.only({"decoder_sparse_step": 1})
    listed = reading.config.get("mlp_only_layers") or []
    if not isinstance(listed, list) or any(type(i) is not int or not 0 <= i < layers for i in listed):
        reading.refuse("mlp_only_layers", listed, f"a list of layers from 0 to {layers - 1} is")
        return ()
    return tuple(i in listed for i in range(layers)) if listed else ()


def shape(dims: Dims) -> ModelShape:
    """Return what parallel rules and predictions need to know of a model."""
    kind = dims.of_kind
    sliding = dims.sliding or (False,) * dims.layers
    return ModelShape(
        layers=tuple(
            (WINDOW if sliding[i] else ATTENTION, MLP if dims.is_dense(i) else MOE) for i in range(dims.layers)
        ),
        hidden=dims.hidden,
        vocabulary=dims.vocabulary,
        tied=dims.tied,
        max_positions=dims.max_positions,
        norms_a_block=kind.norms.a_block,
        heads=dims.heads,
        kv_groups=dims.kv_groups,
        head_dim=dims.head_dim,
        window=dims.window,
        yarn_positions=dims.stretch.original_positions if isinstance(dims.stretch, Yarn) else 0,
        qkv_bias=dims.qkv_bias,
        qk_norm=dims.qk_norm == "head",
        wide_qk_norm=dims.qk_norm == "all",
        fused_qkv=kind.fused_qkv,
        ffn=dims.ffn,
        own_mlp_names=("gate_up_proj", "down_proj") if kind.fused_mlp else (),
        experts=dims.experts,
        top_k=dims.top_k,
        expert_ffn=dims.routed_ffn if dims.experts else 0,
        shared_ffn=dims.shared_ffn,
        shared_gate=bool(kind.experts and kind.experts.shared_gate),
    )


def hf_config(dims: Dims, eos: int | None = None, pad: int | None = None) -> dict[str, Any]:
    """Return config.json of a model with these dimensions, as transformers 4 and 5 both read it."""
    kind, own = dims.of_kind, {**_position_keys(dims), **_layer_keys(dims)}
    # Released Qwen2 files leave head_dim out; transformers reads it where it is not hidden_size / heads.
    if kind.head_dim or dims.head_dim * dims.heads != dims.hidden:
        own["head_dim"] = dims.head_dim
    if not kind.qkv_bias:
        own["attention_bias"] = False
    return {
        **file_of(dims, kind.architecture, model_type=dims.kind, eos=eos, pad=pad),
        "intermediate_size": dims.ffn,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_groups,
        "tie_word_embeddings": dims.tied,
        "rms_norm_eps": dims.norm_epsilon,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **own,
        **(_choice_keys(dims, kind.experts) if kind.experts else {}),
        **{key: getattr(dims, field) for field, key in kind.sizes.items()},
        **{key: getattr(dims, key) for key in (*kind.flags, *kind.numbers)},
        **{key: value for key, value in kind.only.items() if value is not None},
    }


def _position_keys(dims: Dims) -> dict[str, Any]:
    kind, rope = dims.of_kind, settings_of(dims.stretch, dims.rope_base)
    keys: dict[str, Any] = {"rope_theta": dims.rope_base}
    if dims.rope_factor:
        rope |= {"rope_type": "llama3", "factor": dims.rope_factor, **LLAMA3}
    if rope["rope_type"] != "default":
        keys["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if kind.partial is not None:
        rope["partial_rotary_factor"] = keys["partial_rotary_factor"] = dims.partial
    by_type = {FULL: rope, SLIDING: settings_of(None, dims.rope_base)}
    return {**keys, "rope_parameters": by_type if kind.windows == "types" else rope}


def _layer_keys(dims: Dims) -> dict[str, Any]:
    """Return the keys that say of each layer what it has."""
    kind, none = dims.of_kind, (False,) * dims.layers
    keys: dict[str, Any] = {"sliding_window": dims.window or None} if kind.windows else {"use_sliding_window": False}
    if kind.windows == "types":
        keys["layer_types"] = [SLIDING if each else FULL for each in dims.sliding or none]
    if kind.no_rope:
        keys["no_rope_layers"] = [int(not each) for each in dims.no_rope or none]
    return keys


def _choice_keys(dims: Dims, experts: Experts) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if experts.dense == "listed":
        keys |= {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, dense in enumerate(dims.dense) if dense]}
    if experts.dense == "first":
        keys["first_k_dense_replace"] = sum(dims.dense)
    if experts.sigmoid:
        keys |= {"n_group": dims.expert_groups, "topk_group": dims.top_groups, "norm_topk_prob": dims.norm_topk_prob}
        keys["n_shared_experts"] = dims.shared_ffn // dims.expert_ffn
    return keys


def small(sizes: Any, vocabulary: int, eos: int | None, pad: int | None) -> dict[str, Any]:
    """Return config.json of the model that init_model's `sizes` ask for: with experts 4, of which a token takes 2."""
    kind, head_dim = KINDS[sizes.family], sizes.hidden // sizes.heads
    own: dict[str, Any] = {**kind.flags, **kind.numbers}
    if "attention_multiplier" in own:
        own["attention_multiplier"] = head_dim**-0.5
    if kind.experts:
        own |= dict(experts=4, top_k=2, expert_ffn=sizes.ffn // 2 if "expert_ffn" in kind.sizes else 0)
        own |= dict(shared_ffn=sizes.ffn // 2 if kind.experts.shared else 0)
    if kind.windows:
        every = kind.windows == "all"
        own |= dict(window=128, sliding=tuple(every or i % 4 != 3 for i in range(sizes.layers)))
    own |= dict(partial=1.0 if kind.partial is None else kind.partial, kind=sizes.family, head_dim=head_dim)
    dims = small_dims(Dims, sizes, vocabulary, tied=sizes.tied is not False, **own)
    return hf_config(dims, eos, pad)
