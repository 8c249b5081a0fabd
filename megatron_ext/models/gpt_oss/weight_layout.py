"""How gpt-oss weights are named and laid out: one rule for each parameter (qkv with bias, sinks, router, experts)."""

from collections.abc import Collection

import torch

from megatron_ext.models.gpt_oss.config import Dims
from megatron_ext.models.gpt_oss.mxfp4 import Quantised
from megatron_ext.models.layouts import (
    INITIAL_STD,
    Column,
    Entry,
    HfTensor,
    Interleaved,
    Layout,
    QueryKeyValue,
    Replicated,
    Row,
    Rule,
    Shape,
    Transposed,
    Vocabulary,
    is_copy,
)


def rules(dims: Dims, names: Collection[str] = ()) -> list[Rule]:
    """Return a rule for every parameter of the model, in the order of the Hugging Face file."""
    vocabulary, norm = Vocabulary((dims.vocabulary, dims.hidden)), Replicated((dims.hidden,))
    rules_ = [Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary)]
    for i in range(dims.layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        rules_.append(
            Rule(
                ours + "input_layernorm.weight",
                (theirs + "input_layernorm.weight",),
                norm,
                te_name=ours + "self_attention.linear_qkv.layer_norm_weight",
            )
        )
        rules_ += _attention(dims, ours + "self_attention.", theirs + "self_attn.")
        rules_.append(Rule(ours + "pre_mlp_layernorm.weight", (theirs + "post_attention_layernorm.weight",), norm))
        rules_ += _experts(dims, ours + "mlp.", theirs + "mlp.")
    rules_.append(Rule("decoder.final_layernorm.weight", ("model.norm.weight",), norm))
    if not dims.tied:
        rules_.append(Rule("output_layer.weight", ("lm_head.weight",), vocabulary))
    return rules_


def _attention(dims: Dims, ours: str, theirs: str) -> list[Rule]:
    heads = dims.heads, dims.kv_groups, dims.head_dim
    qkv = [theirs + f"{x}_proj" for x in "qkv"]
    return [
        Rule(ours + "core_attention.softmax_offset", (theirs + "sinks",), Column((dims.heads,)), start=_normal),
        Rule(ours + "linear_qkv.weight", tuple(x + ".weight" for x in qkv), QueryKeyValue(*heads, dims.hidden)),
        Rule(ours + "linear_qkv.bias", tuple(x + ".bias" for x in qkv), QueryKeyValue(*heads, None)),
        Rule(ours + "linear_proj.weight", (theirs + "o_proj.weight",), Row((dims.hidden, dims.heads * dims.head_dim))),
        Rule(ours + "linear_proj.bias", (theirs + "o_proj.bias",), Replicated((dims.hidden,))),
    ]


def _experts(dims: Dims, ours: str, theirs: str) -> list[Rule]:
    rules_ = [
        Rule(ours + "router.weight", (theirs + "router.weight",), Replicated((dims.experts, dims.hidden))),
        Rule(ours + "router.bias", (theirs + "router.bias",), Replicated((dims.experts,))),
    ]
    halves = dims.ffn, dims.ffn  # gate and up take turns in Hugging Face's rows
    for name, to, matrix, bias in (
        ("gate_up_proj", "linear_fc1", Interleaved(halves, (dims.hidden,)), Interleaved(halves)),
        ("down_proj", "linear_fc2", Row((dims.hidden, dims.ffn)), Replicated((dims.hidden,))),
    ):
        source = f"{theirs}experts.{name}"
        for e in range(dims.experts):
            expert = f"{ours}experts.{e}.{to}"
            rules_ += [
                Rule(f"{expert}.weight", *_matrix(dims, source, e, matrix), experts=dims.experts),
                Rule(f"{expert}.bias", (Entry(f"{source}_bias", e, dims.experts),), bias, experts=dims.experts),
            ]
    return rules_


def _matrix(dims: Dims, source: str, expert: int, layout: Layout) -> tuple[tuple[HfTensor, ...], Layout]:
    """Return the Hugging Face tensors and layout of an expert's matrix, whose `layout` is [out, in].

    MXFP4 files have it so, transformers' parameter is [in, out]. Shapes would not tell: released ones are square.
    """
    if not dims.mxfp4:
        return (Entry(source, expert, dims.experts),), Transposed(layout)
    parts = (Entry(f"{source}_{part}", expert, dims.experts) for part in ("blocks", "scales"))
    return tuple(parts), Quantised(layout)


def _normal(shape: Shape, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(shape).normal_(0, INITIAL_STD, generator=generator)


is_redundant = is_copy
