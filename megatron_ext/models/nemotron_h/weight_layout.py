"""How Nemotron-H weights are named and laid out: one rule for each parameter and for each router's correction buffer.

Checkpoints spell the names in two ways: `backbone.` with a tensor an expert (NVIDIA's, and what transformers 5 saves),
or `model.` with an expert stack. A prefix and a stack are recognized each by itself, so mixtures are read too.
"""

import math
from collections.abc import Collection

import torch

from megatron_ext.models.layouts import (
    Column,
    Entry,
    Layout,
    Parts,
    QueryKeyValue,
    Replicated,
    Row,
    Rule,
    Shape,
    Vocabulary,
)
from megatron_ext.models.nemotron_h.config import CONVOLUTION, Dims

MODULE_NAMES = ("model.", "mixer.experts.up_proj")  # the spelling of transformers' own modules, for `rules`
STEPS = (1e-3, 1e-1)  # Mamba's time steps at a random start, NVIDIA's time_step_min and time_step_max


def rules(dims: Dims, names: Collection[str] = ()) -> list[Rule]:
    """Return a rule for every parameter and buffer of the model, in the order of its layers."""
    prefix = "model." if any(name.startswith("model.") for name in names) else "backbone."
    stacked = any(name.endswith("mixer.experts.up_proj") for name in names)
    vocabulary = Vocabulary((dims.vocabulary, dims.hidden))
    norm = Replicated((dims.hidden,))
    rules_ = [Rule("embedding.word_embeddings.weight", (f"{prefix}embeddings.weight",), vocabulary)]
    for i, block in enumerate(dims.pattern):
        ours, theirs = f"decoder.layers.{i}.", f"{prefix}layers.{i}."
        norm_name, te_name = NORMS[block]
        te_name = ours + te_name if te_name else ""
        rules_.append(Rule(ours + norm_name, (theirs + "norm.weight",), norm, te_name=te_name))
        if block == "E":
            rules_ += _experts(dims, ours + "mlp.", theirs + "mixer.", stacked)
        else:
            rules_ += {"M": _mamba, "*": _attention, "-": _mlp}[block](dims, ours, theirs + "mixer.")
    rules_.append(Rule("decoder.final_norm.weight", (f"{prefix}norm_f.weight",), norm))
    rules_.append(Rule("output_layer.weight", ("lm_head.weight",), vocabulary))
    return rules_


# mcore's name of a block's norm, and where Transformer Engine fuses it into the next layer.
NORMS = {
    "M": ("norm.weight", "mixer.in_proj.layer_norm_weight"),
    "*": ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    "-": ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    "E": ("pre_mlp_layernorm.weight", ""),
}


def _mamba(dims: Dims, ours: str, theirs: str) -> list[Rule]:
    inner, states, heads = dims.mamba_inner, dims.mamba_groups * dims.mamba_state, dims.mamba_heads
    projected, convolved = (inner, inner, states, states, heads), (inner, states, states)
    layouts: dict[str, Layout] = {
        "in_proj.weight": Parts(projected, (dims.hidden,), ("z", "x", "B", "C", "dt")),
        "conv1d.weight": Parts(convolved, (1, CONVOLUTION), ("x", "B", "C")),
        "conv1d.bias": Parts(convolved, (), ("x", "B", "C")),
        "dt_bias": Column((heads,)),
        "A_log": Column((heads,)),
        "D": Column((heads,)),
        "norm.weight": Column((inner,)),
        "out_proj.weight": Row((dims.hidden, inner)),
    }
    starts = {"conv1d.weight": _convolution_start, "dt_bias": _step_start, "A_log": _decay_start}
    return [
        Rule(
            f"{ours}mixer.{name}",
            (theirs + name,),
            layout,
            dtype="float32" if name in ("dt_bias", "A_log", "D") else "",
            start=starts.get(name),
        )
        for name, layout in layouts.items()
    ]


def _attention(dims: Dims, ours: str, theirs: str) -> list[Rule]:
    attention = ours + "self_attention."
    return [
        Rule(
            attention + "linear_qkv.weight",
            tuple(f"{theirs}{x}_proj.weight" for x in "qkv"),
            QueryKeyValue(dims.heads, dims.kv_groups, dims.head_dim, dims.hidden),
        ),
        Rule(
            attention + "linear_proj.weight",
            (theirs + "o_proj.weight",),
            Row((dims.hidden, dims.heads * dims.head_dim)),
        ),
    ]


def _up_down(ours: str, theirs: str, ffn: int, hidden: int) -> list[Rule]:
    return [
        Rule(ours + "linear_fc1.weight", (theirs + "up_proj.weight",), Column((ffn, hidden))),
        Rule(ours + "linear_fc2.weight", (theirs + "down_proj.weight",), Row((hidden, ffn))),
    ]


def _mlp(dims: Dims, ours: str, theirs: str) -> list[Rule]:
    return _up_down(ours + "mlp.", theirs, dims.ffn, dims.hidden)


def _experts(dims: Dims, ours: str, theirs: str, stacked: bool) -> list[Rule]:
    count, ffn, hidden = dims.experts, dims.expert_ffn, dims.hidden
    rules_ = [
        Rule(ours + "router.weight", (theirs + "gate.weight",), Replicated((count, hidden))),
        Rule(
            ours + "router.expert_bias",
            (theirs + "gate.e_score_correction_bias",),
            Replicated((count,)),
            dtype="float32",
        ),
    ]
    for name, part, layout in (
        ("up_proj", "linear_fc1", Column((ffn, hidden))),
        ("down_proj", "linear_fc2", Row((hidden, ffn))),
    ):
        for e in range(count):
            source = Entry(f"{theirs}experts.{name}", e, count) if stacked else f"{theirs}experts.{e}.{name}.weight"
            rules_.append(Rule(f"{ours}experts.{e}.{part}.weight", (source,), layout, experts=count))
    return rules_ + _up_down(ours + "shared_experts.", theirs + "shared_experts.", dims.shared_ffn, hidden)


def _convolution_start(shape: Shape, generator: torch.Generator) -> torch.Tensor:
    bound = 1 / math.sqrt(shape[-1])  # torch's Conv1d
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _step_start(shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """Return dt_bias such that softplus of it is log-uniform in STEPS."""
    low, high = map(math.log, STEPS)
    steps = torch.empty(shape).uniform_(low, high, generator=generator).exp()
    return steps + torch.log(-torch.expm1(-steps))


def _decay_start(shape: Shape, generator: torch.Generator) -> torch.Tensor:
    return torch.arange(1, shape[0] + 1, dtype=torch.float32).log()


def is_redundant(name: str, dims: Dims) -> bool:
    return False
