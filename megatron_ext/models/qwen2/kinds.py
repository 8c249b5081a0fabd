"""What tells apart the model types of GPT's form with RMSNorm, gated MLPs and rotary positions: one line each. No
torch.

Beside what all of them have, a kind says what its layers are made of, which further keys its config.json has, and what
transformers (5.23, models/NAME/configuration_NAME.py) takes where a file names none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.models import rotary

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPES = {**rotary.KEYS, "llama3": LLAMA3}
DEFAULT_ROPE = {"default": ()}


@dataclass(frozen=True)
class Norms:
    """The names of a layer's norms before and after its two blocks; "" where there is none."""

    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""

    @property
    def a_block(self) -> int:
        """How many norms of the hidden size belong to a block."""
        return bool(self.before_attention) + bool(self.after_attention)


@dataclass(frozen=True)
class Experts:
    """How a kind's experts are called and chosen."""

    module: str = "mlp"  # of a layer, in released checkpoints
    first: tuple[str, ...] = ("gate_proj", "up_proj")  # matrices of an expert there
    last: str = "down_proj"
    shared: str = ""  # module of the shared experts
    shared_gate: str = ""  # of the gate of their output
    sigmoid: bool = False  # scores, with a correction bias; otherwise a softmax
    dense: str = ""  # which layers have none: "listed" (mlp_only_layers), "first" (first_k_dense_replace)


@dataclass(frozen=True)
class Kind:
    """A model type. Fields of Dims are read by `sizes`, `flags` and `numbers`, the last two by the key's own name."""

    architecture: str
    sizes: Mapping[str, str] = field(default_factory=dict)  # field: key that a file must have
    flags: Mapping[str, bool] = field(default_factory=dict)  # key: transformers' default
    numbers: Mapping[str, float] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)  # key: the one value that we have code for
    others: frozenset[str] = frozenset()  # keys that are read in config.py, or change nothing
    same: Mapping[str, str] = field(default_factory=dict)  # another name of a key: that key
    qkv_bias: bool = False
    qk_norm: str = ""  # "head": a norm for each head, "all": one over all of them
    kv_groups: int | None = None  # None: one a head
    head_dim: int | None = None  # None: hidden_size / heads
    max_positions: int = 32768
    norm_epsilon: float = 1e-6
    rope_base: float = 10000.0
    ropes: Mapping[str, Any] = field(default_factory=lambda: ROPES)
    partial: float | None = None  # share of a head that positions turn, where it may be less than 1
    neighbours: bool = False  # positions turn numbers that lie side by side, not half a head apart
    tied: bool = False
    windows: str = ""  # "all": sliding_window is every layer's, "types": that of some in layer_types
    window: int | None = None
    no_rope: bool = False  # positions leave some layers as they are
    norms: Norms = Norms()
    fused_qkv: bool = False  # qkv_proj
    fused_mlp: bool = False  # gate_up_proj
    experts: Experts | None = None


MOE_SIZES = {"experts": "num_experts", "top_k": "num_experts_per_tok", "expert_ffn": "moe_intermediate_size"}
QWEN_MOE = frozenset({"decoder_sparse_step", "mlp_only_layers", "router_aux_loss_coef"})
GLM_MOE = frozenset(
    {"first_k_dense_replace", "n_group", "n_shared_experts", "norm_topk_prob", "router_aux_loss_coef", "topk_group"}
)
AFTER = Norms("", "post_attention_layernorm", "", "post_feedforward_layernorm")

KINDS = {
    "qwen2": Kind("Qwen2ForCausalLM", qkv_bias=True, kv_groups=32),
    "qwen3": Kind("Qwen3ForCausalLM", qk_norm="head", kv_groups=32, head_dim=128),
    "llama": Kind("LlamaForCausalLM", max_positions=2048),
    "qwen3_moe": Kind(
        "Qwen3MoeForCausalLM", MOE_SIZES, {"norm_topk_prob": False}, others=QWEN_MOE,
        same={"num_local_experts": "num_experts"}, qk_norm="head", kv_groups=4, experts=Experts(dense="listed"),
    ),
    "mistral": Kind("MistralForCausalLM", kv_groups=8, max_positions=131072, windows="all", window=4096),
    "mixtral": Kind(
        "MixtralForCausalLM", {"experts": "num_local_experts", "top_k": "num_experts_per_tok"},
        only={"router_jitter_noise": 0.0}, others=frozenset({"router_aux_loss_coef"}), kv_groups=8,
        max_positions=131072, norm_epsilon=1e-5, rope_base=1e6, windows="all",
        experts=Experts("block_sparse_moe", ("w1", "w3"), "w2"),
    ),
    "qwen2_moe": Kind(
        "Qwen2MoeForCausalLM", {**MOE_SIZES, "shared_ffn": "shared_expert_intermediate_size"},
        {"norm_topk_prob": False}, only={"qkv_bias": True}, others=QWEN_MOE, qkv_bias=True, kv_groups=16,
        experts=Experts(shared="shared_expert", shared_gate="shared_expert_gate", dense="listed"),
    ),
    "phi3": Kind(
        "Phi3ForCausalLM", only={"resid_pdrop": 0.0, "embd_pdrop": 0.0}, ropes=DEFAULT_ROPE, partial=1.0,
        others=frozenset({"original_max_position_embeddings"}), max_positions=4096, norm_epsilon=1e-5, windows="all",
        fused_qkv=True, fused_mlp=True,
    ),
    "olmo2": Kind("Olmo2ForCausalLM", qk_norm="all", max_positions=2048, norm_epsilon=1e-5, norms=AFTER),
    "olmo3": Kind(
        "Olmo3ForCausalLM", qk_norm="all", max_positions=2048, norm_epsilon=1e-5, rope_base=5e5, norms=AFTER,
        windows="types", window=4096,
    ),
    "smollm3": Kind(
        "SmolLM3ForCausalLM", others=frozenset({"no_rope_layers", "no_rope_layer_interval"}), kv_groups=4,
        rope_base=2e6, tied=True, no_rope=True,
    ),
    "glm4": Kind(
        "Glm4ForCausalLM", flags={"attention_bias": True}, kv_groups=2, head_dim=128, max_positions=131072,
        norm_epsilon=1.5625e-07, partial=0.5, neighbours=True, fused_mlp=True,
        norms=Norms(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"),
    ),
    "glm4_moe": Kind(
        "Glm4MoeForCausalLM",
        {"experts": "n_routed_experts", "top_k": "num_experts_per_tok", "expert_ffn": "moe_intermediate_size"},
        {"attention_bias": False, "use_qk_norm": False}, {"routed_scaling_factor": 1.0},
        {"num_nextn_predict_layers": 0}, GLM_MOE, qk_norm="head", kv_groups=8, max_positions=131072,
        norm_epsilon=1e-5, partial=0.5, experts=Experts(shared="shared_experts", sigmoid=True, dense="first"),
    ),
    "granite": Kind(
        "GraniteForCausalLM", max_positions=2048,
        numbers=dict.fromkeys(
            ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"), 1.0
        ),
    ),
}  # fmt: skip
