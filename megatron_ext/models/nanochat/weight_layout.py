"""How NanoChat weights are named and laid out: one rule for each parameter. Norms have none.

NanoChat rotates queries and keys by minus the angle that mcore does. Exchanging the halves of every query and key
head turns the one into the other: scores are dot products, and the norm of a head has no weights.
"""

from collections.abc import Collection

from megatron_ext.models.layouts import Column, QueryKeyValue, Row, Rule, Vocabulary, is_copy
from megatron_ext.models.nanochat.config import Dims


def rules(dims: Dims, names: Collection[str] = ()) -> list[Rule]:
    """Return a rule for every parameter of the model, in the order of the Hugging Face file."""
    vocabulary = Vocabulary((dims.vocabulary, dims.hidden))
    qkv = QueryKeyValue(dims.heads, dims.kv_groups, dims.head_dim, dims.hidden, turns_backwards=True)
    rules_ = [Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary)]
    for i in range(dims.layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        rules_ += [
            Rule(
                ours + "self_attention.linear_qkv.weight",
                tuple(f"{theirs}self_attn.{x}_proj.weight" for x in "qkv"),
                qkv,
            ),
            Rule(
                ours + "self_attention.linear_proj.weight",
                (theirs + "self_attn.o_proj.weight",),
                Row((dims.hidden, dims.hidden)),
            ),
            Rule(ours + "mlp.linear_fc1.weight", (theirs + "mlp.fc1.weight",), Column((dims.ffn, dims.hidden))),
            Rule(ours + "mlp.linear_fc2.weight", (theirs + "mlp.fc2.weight",), Row((dims.hidden, dims.ffn))),
        ]
    if not dims.tied:
        rules_.append(Rule("output_layer.weight", ("lm_head.weight",), vocabulary))
    return rules_


is_redundant = is_copy
