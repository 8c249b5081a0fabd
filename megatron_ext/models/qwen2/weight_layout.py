"""How the weights of models of GPT's form are named and laid out: one rule for each parameter. kinds.py has what tells
them apart.

Released checkpoints keep a tensor for each matrix of each expert, transformers' modules one stack of them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_ext.models.layouts import (
    Column,
    Entry,
    HfTensor,
    Layout,
    Parts,
    QueryKeyValue,
    Replicated,
    Row,
    Rule,
    Shape,
    Vocabulary,
    gate_up,
    is_copy,
)
from megatron_ext.models.qwen2.config import Dims

FUSED = "self_attention.linear_qkv.layer_norm_weight"
STACK = "mlp.experts.gate_up_proj"
MODULE_NAMES = (STACK,)  # the spelling of transformers' own modules, for `rules`


@dataclass(frozen=True)
class FusedQueryKeyValue(QueryKeyValue):
    """Takes q, k and v from one Hugging Face tensor, whose rows are those of q, k and v in turn (Phi-3)."""

    def hf_shapes(self) -> list[Shape]:
        return [self.shape]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return super().join(tensors[0].split([shape[0] for shape in super().hf_shapes()]))

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [torch.cat(super().split(whole))]


def rules(dims: Dims, names: Collection[str] = ()) -> list[Rule]:
    """Return a rule for every parameter and buffer of the model, in the order of the Hugging Face file."""
    vocabulary = Vocabulary((dims.vocabulary, dims.hidden))
    stacked = any(name.endswith(STACK) for name in names)
    rules_ = [Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary)]
    for i in range(dims.layers):
        ours, theirs, of = f"decoder.layers.{i}.", f"model.layers.{i}.", dims.of_kind.norms
        fused = "mlp.linear_fc1.layer_norm_weight" if dims.is_dense(i) else ""  # no part fuses a norm into experts
        rules_ += _norm(dims, ours + "input_layernorm", theirs, of.before_attention, ours + FUSED)
        rules_ += _attention(dims, ours + "self_attention.", theirs + "self_attn.")
        rules_ += _norm(dims, ours + "post_self_attn_layernorm", theirs, of.after_attention)
        rules_ += _norm(dims, ours + "pre_mlp_layernorm", theirs, of.before_mlp, fused and ours + fused)
        if dims.is_dense(i):
            rules_ += _mlp(dims, ours + "mlp.", theirs + "mlp.", dims.ffn)
        else:
            rules_ += _experts(dims, ours + "mlp.", theirs, stacked)
        rules_ += _norm(dims, ours + "post_mlp_layernorm", theirs, of.after_mlp)
        # Last: the order is that in which the weights of a random model are drawn, which stays what it was.
        rules_ += _beside_attention(dims, ours + "self_attention.", theirs + "self_attn.")
    rules_ += _norm(dims, "decoder.final_layernorm", "model.", "norm")
    if not dims.tied:
        rules_.append(Rule("output_layer.weight", ("lm_head.weight",), vocabulary))
    return rules_


def _norm(dims: Dims, ours: str, layer: str, name: str, te_name: str = "") -> list[Rule]:
    """Return the rule of a norm, none where the kind has no `name` for it."""
    norm = Replicated((dims.hidden,))
    return [Rule(f"{ours}.weight", (f"{layer}{name}.weight",), norm, te_name=te_name)] if name else []


def _attention(dims: Dims, ours: str, theirs: str) -> list[Rule]:
    """Return the rules of the matrices of attention."""
    sources, layout = _qkv(dims)
    return [
        Rule(ours + "linear_qkv.weight", tuple(f"{theirs}{x}.weight" for x in sources), layout),
        Rule(ours + "linear_proj.weight", (theirs + "o_proj.weight",), Row((dims.hidden, dims.heads * dims.head_dim))),
    ]


def _beside_attention(dims: Dims, ours: str, theirs: str) -> list[Rule]:
    """Return the rules of attention's biases and norms of heads."""
    rules_, (sources, layout) = [], _qkv(dims)
    if dims.qkv_bias:
        bias = replace(layout, columns=None)
        rules_.append(Rule(ours + "linear_qkv.bias", tuple(f"{theirs}{x}.bias" for x in sources), bias))
    for x, heads in (("q", dims.heads), ("k", dims.kv_groups)):
        whole, head = Column((heads * dims.head_dim,)), Replicated((dims.head_dim,))
        if dims.qk_norm:
            norm = whole if dims.qk_norm == "all" else head
            rules_.append(Rule(f"{ours}{x}_layernorm.weight", (f"{theirs}{x}_norm.weight",), norm))
    return rules_


def _qkv(dims: Dims) -> tuple[tuple[str, ...], QueryKeyValue]:
    """Return (Hugging Face's names, layout) of queries, keys and values."""
    kind = dims.of_kind
    layout = FusedQueryKeyValue if kind.fused_qkv else QueryKeyValue
    sources = ("qkv_proj",) if kind.fused_qkv else ("q_proj", "k_proj", "v_proj")
    turned = dims.turned * kind.neighbours
    return sources, layout(dims.heads, dims.kv_groups, dims.head_dim, dims.hidden, neighbours=turned)


def _mlp(dims: Dims, ours: str, theirs: str, ffn: int) -> list[Rule]:
    first: Layout = gate_up(ffn, dims.hidden)
    sources: tuple[str, ...] = ("gate_proj", "up_proj")
    if dims.of_kind.fused_mlp:
        first, sources = Parts((ffn, ffn), (dims.hidden,)), ("gate_up_proj",)
    return [
        Rule(ours + "linear_fc1.weight", tuple(f"{theirs}{x}.weight" for x in sources), first),
        Rule(ours + "linear_fc2.weight", (theirs + "down_proj.weight",), Row((dims.hidden, ffn))),
    ]


def _experts(dims: Dims, ours: str, theirs: str, stacked: bool) -> list[Rule]:
    kind, count, ffn, hidden = dims.of_kind.experts, dims.experts, dims.routed_ffn, dims.hidden
    assert kind is not None
    theirs += "mlp." if stacked else f"{kind.module}."
    rules_ = [Rule(ours + "router.weight", (theirs + "gate.weight",), Replicated((count, hidden)))]
    if kind.sigmoid:
        bias = theirs + "gate.e_score_correction_bias"
        rules_.append(Rule(ours + "router.expert_bias", (bias,), Replicated((count,)), dtype="float32"))
    for name, each, stack, layout in (
        ("linear_fc1", kind.first, "gate_up_proj", Parts((ffn, ffn), (hidden,)) if stacked else gate_up(ffn, hidden)),
        ("linear_fc2", (kind.last,), "down_proj", Row((hidden, ffn))),
    ):
        for e in range(count):
            own: tuple[HfTensor, ...] = tuple(f"{theirs}experts.{e}.{x}.weight" for x in each)
            sources = (Entry(f"{theirs}experts.{stack}", e, count),) if stacked else own
            rules_.append(Rule(f"{ours}experts.{e}.{name}.weight", sources, layout, experts=count))
    if kind.shared:
        rules_ += _mlp(dims, ours + "shared_experts.", f"{theirs}{kind.shared}.", dims.shared_ffn)
    if kind.shared_gate:
        gate = f"{theirs}{kind.shared_gate}.weight"
        rules_.append(Rule(ours + "shared_experts.gate_weight", (gate,), Replicated((1, hidden))))
    return rules_


def names_of_experts(dims: Dims) -> Collection[str]:
    """Return the modules' names that PEFT takes for those of a model's experts, though MLPs have them too.

    (peft/utils/transformers_weight_conversion.py, _MOE_TARGET_MODULE_MAPPING, peft 0.21.)
    """
    kind = dims.of_kind.experts
    return (*kind.first, kind.last) if kind else ()


def is_redundant(name: str, dims: Dims) -> bool:
    """Return whether a file may carry that tensor besides: a copy, or one of GLM-4.5's layer that drafts tokens."""
    kind, layer = dims.of_kind.experts, name.removeprefix("model.layers.").partition(".")[0]
    return is_copy(name, dims) or bool(kind and kind.sigmoid and layer.isdecimal() and int(layer) >= dims.layers)
