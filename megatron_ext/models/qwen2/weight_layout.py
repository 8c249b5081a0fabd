"""How the weights of Qwen2, Qwen3 and Llama are named and laid out: one rule for each parameter."""

from collections.abc import Collection

from megatron_ext.models.layouts import QueryKeyValue, Replicated, Row, Rule, Vocabulary, gate_up, is_copy
from megatron_ext.models.qwen2.config import Dims


def rules(dims: Dims, names: Collection[str] = ()) -> list[Rule]:
    """Return a rule for every parameter of the model, in the order of the Hugging Face file."""
    vocabulary = Vocabulary((dims.vocabulary, dims.hidden))
    norm = Replicated((dims.hidden,))
    rules_ = [Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary)]
    for i in range(dims.layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        attention = theirs + "self_attn."
        rules_ += [
            Rule(
                ours + "input_layernorm.weight",
                (theirs + "input_layernorm.weight",),
                norm,
                te_name=ours + "self_attention.linear_qkv.layer_norm_weight",
            ),
            Rule(
                ours + "self_attention.linear_qkv.weight",
                tuple(f"{attention}{x}_proj.weight" for x in "qkv"),
                QueryKeyValue(dims.heads, dims.kv_groups, dims.head_dim, dims.hidden),
            ),
            Rule(
                ours + "self_attention.linear_proj.weight",
                (attention + "o_proj.weight",),
                Row((dims.hidden, dims.heads * dims.head_dim)),
            ),
            Rule(
                ours + "pre_mlp_layernorm.weight",
                (theirs + "post_attention_layernorm.weight",),
                norm,
                te_name=ours + "mlp.linear_fc1.layer_norm_weight",
            ),
            Rule(
                ours + "mlp.linear_fc1.weight",
                (theirs + "mlp.gate_proj.weight", theirs + "mlp.up_proj.weight"),
                gate_up(dims.ffn, dims.hidden),
            ),
            Rule(ours + "mlp.linear_fc2.weight", (theirs + "mlp.down_proj.weight",), Row((dims.hidden, dims.ffn))),
        ]
        if dims.qkv_bias:
            rules_.append(
                Rule(
                    ours + "self_attention.linear_qkv.bias",
                    tuple(f"{attention}{x}_proj.bias" for x in "qkv"),
                    QueryKeyValue(dims.heads, dims.kv_groups, dims.head_dim, None),
                )
            )
        if dims.qk_norm:
            head = Replicated((dims.head_dim,))
            rules_ += [
                Rule(f"{ours}self_attention.{x}_layernorm.weight", (f"{attention}{x}_norm.weight",), head) for x in "qk"
            ]
    rules_.append(Rule("decoder.final_layernorm.weight", ("model.norm.weight",), norm))
    if not dims.tied:
        rules_.append(Rule("output_layer.weight", ("lm_head.weight",), vocabulary))
    return rules_


is_redundant = is_copy
