"""Weight layouts: what joins comes apart, what is sharded comes together, and names count over the whole model."""

from types import SimpleNamespace

import pytest
import torch

from megatron_ext.models import layouts as rules
from megatron_ext.models.layouts import (
    Column,
    Entry,
    Interleaved,
    Parts,
    QueryKeyValue,
    Replicated,
    Row,
    Rule,
    Transposed,
    Vocabulary,
    gate_up,
)
from megatron_ext.parallel.plan import ParallelPlan
from tests.megatron_ext import tiny

LAYOUTS = {
    "norm": Replicated((6,)),
    "column": Column((8, 3)),
    "row": Row((3, 8)),
    "odd vocabulary": Vocabulary((19, 3)),
    "qkv": QueryKeyValue(8, 4, 2, 3),
    "qkv bias": QueryKeyValue(8, 4, 2, None),
    "gate and up": gate_up(8, 3),
    "gate and up by turns, transposed": Transposed(Interleaved((8, 8), (3,))),
    "gate and up biases by turns": Interleaved((8, 8)),
    "mamba in_proj": Parts((16, 16, 8, 8, 4), (3,), ("z", "x", "B", "C", "dt")),
    "mamba conv1d": Parts((16, 8, 8), (1, 4), ("x", "B", "C")),
}


def counted(shape) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def test_what_joins_comes_apart(layout):
    tensors = [counted(shape) + 1000 * i for i, shape in enumerate(layout.hf_shapes())]
    whole = layout.join(tensors)
    assert whole.shape == layout.shape
    assert all(torch.equal(a, b) for a, b in zip(layout.split(whole), tensors, strict=True))
    assert sum(rows for _, rows in layout.stored()) == layout.shape[0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_is_sharded_comes_together(layout, ranks):
    whole = counted(layout.shape)
    shards = [layout.shard(whole, ranks, rank) for rank in range(ranks)]
    assert len({shard.shape for shard in shards}) == 1
    assert torch.equal(layout.unshard(shards), whole)


def test_every_part_is_sharded_by_itself():
    layout = Parts((4, 2, 2), (), ("x", "B", "C"))
    assert layout.shard(counted((8,)), 2, 1).tolist() == [2, 3, 5, 7]


def test_gpt_oss_turns_become_halves():
    """[in, out] with gate and up in even and odd columns (transformers, GptOssExperts.forward)."""
    stored = torch.tensor([[0.0, 10.0, 1.0, 11.0]])
    assert Transposed(Interleaved((2, 2), (1,))).join([stored]).flatten().tolist() == [0, 1, 10, 11]


def test_stacks_are_listed_once_with_all_their_entries():
    listed = [Rule(f"e{e}", (Entry("stack", e, 3), f"own.{e}"), gate_up(2, 5), experts=3) for e in range(3)]
    assert rules.hf_shapes(listed) == {"stack": (3, 2, 5), "own.0": (2, 5), "own.1": (2, 5), "own.2": (2, 5)}
    assert [(rule.name, at) for rule, at in rules.hf_rules(listed)["stack"]] == [("e0", 0), ("e1", 0), ("e2", 0)]


STAGE = SimpleNamespace(
    share_embeddings_and_output_weights=True,
    decoder=SimpleNamespace(
        layers=[SimpleNamespace(layer_number=8, mlp=SimpleNamespace(local_expert_indices=[4, 5, 6, 7]))]
    ),
)


@pytest.mark.parametrize(
    "on_rank, whole",
    [
        ("decoder.layers.0.self_attention.linear_qkv.bias", "decoder.layers.7.self_attention.linear_qkv.bias"),
        (
            "decoder.layers.0.mlp.experts.local_experts.2.linear_fc2.weight",
            "decoder.layers.7.mlp.experts.6.linear_fc2.weight",
        ),
        ("decoder.layers.0.mlp.experts.linear_fc1.weight3", "decoder.layers.7.mlp.experts.7.linear_fc1.weight"),
        ("decoder.layers.0.mlp.experts.linear_fc1.bias0", "decoder.layers.7.mlp.experts.4.linear_fc1.bias"),
        (
            "decoder.layers.0.mlp.shared_experts.linear_fc1.weight",
            "decoder.layers.7.mlp.shared_experts.linear_fc1.weight",
        ),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
        ("output_layer.weight", "embedding.word_embeddings.weight"),
    ],
)  # fmt: skip
def test_names_on_a_rank_are_those_of_the_whole_model(on_rank, whole):
    assert rules._whole_model_name(on_rank, STAGE) == whole


def test_a_parameter_without_a_rule_is_no_silent_loss(alone, tmp_path):
    model = tiny.model(tiny.hf_folder(tmp_path), tiny.DIMS, ParallelPlan())
    known = tiny.QWEN2.mapping.rules(tiny.DIMS)
    assert len(rules.placed(model, known)) == len(known)
    with pytest.raises(RuntimeError, match="no rule for decoder.final_layernorm.weight"):
        rules.placed(model, [rule for rule in known if "final" not in rule.name])
