"""Legacy Megatron `torch` checkpoints, as its ranks would have written them, become the same model."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_tools.base import durable
from data_tools.mistake import UserMistake
from megatron_ext.entrypoints import import_hf
from megatron_ext.files import pickles
from megatron_ext.models.rotary import Linear
from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.weights.megatron_arguments import check_arguments, unlike
from tests.megatron_ext import tiny

DENSE = replace(tiny.DIMS, layers=4, tied=False)
EXPERTS = replace(tiny.GPT_OSS_DIMS, sliding=(True, False))
ARGUMENTS = {  # of Megatron that trained those models, of those that shapes of tensors do not tell
    type(DENSE): dict(
        num_attention_heads=4, group_query_attention=True, num_query_groups=2, kv_channels=8, norm_epsilon=1e-6,
        rotary_base=10000, rotary_percent=1.0, num_experts=None, window_size=None, moe_router_topk=2,
    ),
    type(EXPERTS): dict(
        num_attention_heads=4, group_query_attention=True, num_query_groups=2, kv_channels=8, norm_epsilon=1e-5,
        rotary_base=150000, rotary_percent=1.0, num_experts=4, window_size=(7, 0), moe_router_topk=2,
        moe_router_topk_scaling_factor=None, activation_func_clamp_value=7.0,
    ),
}  # fmt: skip
GROUPED = dict(moe_router_num_groups=2, moe_router_group_topk=1)
OF_GPT_OSS = dict(enable_gpt_oss=True, position_embedding_type="rope")
STRETCHED = dict(  # of tiny's olmo3
    position_embedding_type="yarn", rotary_scaling_factor=4.0, yarn_original_max_position_embeddings=16,
    yarn_beta_fast=None, yarn_beta_slow=1.0, yarn_correction_range_round_to_int=None, mscale=1.0, mscale_all_dim=0.0,
)  # fmt: skip


def write_rank(dims, plan: ParallelPlan, hf: Path, out: Path) -> None:
    """This rank's file, under Megatron's names of files and with its args and a class that is nowhere installed."""
    with ranks.started(plan):
        from megatron.core import parallel_state

        from megatron_ext.weights import convert

        model = tiny.family(dims).build(dims, plan, torch.float32)
        convert.import_weights(model, hf, tiny.family(dims), dims)
        name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
        if plan.pipeline > 1:
            name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
        if plan.expert > 1:
            name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
        args = Namespace(
            tensor_model_parallel_size=plan.tensor, pipeline_model_parallel_size=plan.pipeline,
            expert_model_parallel_size=plan.expert, expert_tensor_parallel_size=plan.expert_tensor, enum=Missing(),
            **ARGUMENTS[type(dims)],
        )  # fmt: skip
        keys = ["model"] if len(model) == 1 else [f"model{i}" for i in range(len(model))]
        (out / name).mkdir(parents=True)
        states = {key: part.state_dict() for key, part in zip(keys, model)}
        torch.save({"args": args, "iteration": 100, **states}, out / name / "model_optim_rng.pt")


class Missing:
    """Pickled under a module that the reader cannot import."""


Missing.__module__ = "megatron.training.nowhere"


def legacy(folder: Path, dims, plan: ParallelPlan, pool) -> tuple[Path, Path]:
    """(Hugging Face folder, legacy checkpoint of the same weights)."""
    import sys
    import types

    hf, root = tiny.hf_folder(folder / "hf", dims), folder / "megatron"
    root.mkdir()
    (root / "latest_checkpointed_iteration.txt").write_text("100")
    sys.modules["megatron.training.nowhere"] = types.SimpleNamespace(Missing=Missing)
    try:
        arguments = dict(dims=dims, plan=plan, hf=hf, out=root / "iter_0000100")
        pool.run(write_here, **arguments) if pool else write_rank(**arguments)
    finally:
        del sys.modules["megatron.training.nowhere"]
    return hf, root


def write_here(**arguments) -> None:
    """`write_rank` in a rank's process, where pickle must find the class as well."""
    import sys
    import types

    sys.modules["megatron.training.nowhere"] = types.SimpleNamespace(Missing=Missing)
    write_rank(**arguments)


@pytest.mark.parametrize(
    "dims, degrees",
    [
        pytest.param(DENSE, {}, id="one rank"),
        pytest.param(DENSE, dict(tensor=2), id="TP2, padded vocabulary"),
        pytest.param(DENSE, dict(pipeline=2), id="PP2"),
        pytest.param(DENSE, dict(pipeline=2, virtual=2), id="PP2 interleaved"),
        pytest.param(EXPERTS, dict(expert=2), id="EP2"),
    ],
)
def test_the_ranks_files_become_the_same_model(dims, degrees, two_ranks, tmp_path):
    hf, root = legacy(tmp_path, dims, ParallelPlan(**degrees), two_ranks if degrees else None)
    for name in ("hf model", "megatron model"):
        (tmp_path / name).mkdir()
    wanted = import_hf.run(import_hf.Config(str(hf)), tmp_path / "hf model", tmp_path)
    config = import_hf.Config(str(hf), megatron=str(root))
    assert import_hf.run(config, tmp_path / "megatron model", tmp_path) == wanted


def refused(tmp_path, hf, root) -> str:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserMistake) as found:
        import_hf.run(import_hf.Config(str(hf), megatron=str(root)), tmp_path / "out", tmp_path)
    assert list((tmp_path / "out").iterdir()) == []
    return str(found.value)


def test_a_missing_rank_is_one_line(two_ranks, tmp_path):
    hf, root = legacy(tmp_path, DENSE, ParallelPlan(tensor=2), two_ranks)
    (root / "iter_0000100" / "mp_rank_01" / "model_optim_rng.pt").unlink()
    (root / "iter_0000100" / "mp_rank_01").rmdir()
    assert refused(tmp_path, hf, root).endswith("iter_0000100/mp_rank_01/model_optim_rng.pt: is missing")


@pytest.mark.parametrize(
    "dims, trained, said",
    [
        (DENSE, dict(rotary_base=5e5), "rotary_base is 500000.0, config.json has 10000.0"),
        (DENSE, dict(rotary_percent=0.5), "rotary_percent is 0.5, config.json has 1.0"),
        (DENSE, dict(norm_epsilon=1e-5), "norm_epsilon is 1e-05, config.json has 1e-06"),
        (DENSE, dict(layernorm_epsilon=1e-5), "layernorm_epsilon is 1e-05, config.json has 1e-06"),
        (DENSE, dict(use_rope_scaling=True), "as the model was built, is 8.0, config.json has 0.0"),
        (
            replace(DENSE, tied=True),
            dict(untie_embeddings_and_output_weights=True),
            "weights is True, config.json has False",
        ),
        (DENSE, dict(num_attention_heads=2, kv_channels=16), "num_attention_heads is 2, config.json has 4"),
        (DENSE, dict(group_query_attention=False), "num_query_groups is 4, config.json has 2"),
        (EXPERTS, dict(window_size=(127, 0)), "window_size is 128, config.json has 8"),
        (EXPERTS, dict(moe_router_topk=1), "moe_router_topk is 1, config.json has 2"),
        (EXPERTS, dict(activation_func_clamp_value=5.0), "activation_func_clamp_value is 5.0, config.json has 7.0"),
        (tiny.NEMOTRON_H_DIMS, dict(moe_router_topk_scaling_factor=None), "factor is 1.0, config.json has 2.5"),
        (tiny.NEMOTRON_H_DIMS, dict(squared_relu=False), "squared_relu is False, config.json has True"),
        (tiny.NEMOTRON_H_DIMS, dict(position_embedding_type="rope"), "type is rope, config.json has none"),
        (tiny.NEMOTRON_H_DIMS, dict(moe_router_score_function="softmax"), "is softmax, config.json has sigmoid"),
        (tiny.KINDS["glm4_moe"], dict(moe_router_topk_scaling_factor=2.5), "factor is 2.5, config.json has 1.5"),
        (tiny.KINDS["glm4"], dict(rotary_percent=1.0), "rotary_percent is 1.0, config.json has 0.5"),
        (tiny.KINDS["qwen2_moe"], dict(moe_router_pre_softmax=False), "is False, config.json has True"),
        (
            tiny.KINDS["olmo3"],
            dict(window_size=(7, 0), window_attn_skip_freq=1),
            "[False, False], config.json has [True",
        ),
        (tiny.KINDS["olmo3"], dict(position_embedding_type="rope"), "type is rope, config.json has yarn"),
        *((tiny.KINDS["olmo3"], {**STRETCHED, name: 3}, f"{name} is 3, config.json has ") for name in STRETCHED),
        (EXPERTS, dict(moe_mlp_glu_interleave_size=32), "moe_mlp_glu_interleave_size is 32, config.json has 0"),
        (tiny.KINDS["smollm3"], dict(no_rope_freq=1), "no_rope_freq is [True, True], config.json has [False, True]"),
        (EXPERTS, dict(softmax_type="vanilla"), "softmax_type is vanilla, config.json has learnable"),
        (DENSE, dict(apply_layernorm_1p=True), "apply_layernorm_1p is True, config.json has False"),
        (DENSE, dict(rotary_interleaved=True), "rotary_interleaved is True, config.json has False"),
        (DENSE, dict(rotary_seq_len_interpolation_factor=4), "factor is 4, config.json has 1"),
        (DENSE, dict(position_embedding_type="none"), "position_embedding_type is none, config.json has rope"),
        (DENSE, dict(activation_func_clamp_value=7.0), "value is 7.0, config.json has 0.0"),
        (DENSE, dict(softmax_type="off-by-one"), "softmax_type is off-by-one, config.json has vanilla"),
        (DENSE, dict(softmax_scale=0.1), "softmax_scale is 0.1, config.json has 0.35"),
        # None, where it means that there is none
        (
            replace(DENSE, stretch=Linear(2.0)),
            dict(rotary_seq_len_interpolation_factor=None),
            "factor is 1, config.json has 2.0",
        ),
        (
            tiny.KINDS["smollm3"],
            dict(no_rope_freq=None),
            "no_rope_freq is [False, False], config.json has [False, True]",
        ),
        (
            tiny.KINDS["olmo3"],
            dict(window_size=(7, 0), window_attn_skip_freq=None),
            "[True, True], config.json has [True, False]",
        ),
        (EXPERTS, dict(activation_func_clamp_value=None), "value is 0.0, config.json has 7.0"),
        (tiny.KINDS["granite"], dict(softmax_scale=None), "softmax_scale is 0.35"),
        *(
            (tiny.KINDS["granite"], dict(untie_embeddings_and_output_weights=False), said)
            for said in (
                "softmax_scale is 0.35",
                "embedding_multiplier is 1.0, config.json has 1.5",
                "residual_multiplier is 1.0, config.json has 0.7",
                "logits_scaling is 1.0, config.json has 4.0",
            )
        ),
        (
            replace(tiny.NEMOTRON_H_DIMS, expert_groups=2),
            dict(moe_router_num_groups=None),
            "moe_router_num_groups is 1, config.json has 2",
        ),
        (DENSE, dict(quick_geglu=True), "quick_geglu is True, config.json has False"),
        # of routers
        (tiny.KINDS["qwen3_moe"], GROUPED, "moe_router_num_groups is 2, config.json has 1"),
        (replace(tiny.NEMOTRON_H_DIMS, expert_groups=2), dict(GROUPED, moe_router_group_topk=None), "groups is 1, con"),
        (EXPERTS, dict(moe_router_load_balancing_type="sinkhorn"), "type is sinkhorn, config.json has none"),
        (EXPERTS, dict(moe_router_load_balancing_type=["quantile_balancing"]), "is quantile_balancing, config.json"),
        # what ModelOpt's builder takes instead
        (DENSE, dict(export_qk_l2_norm=True), "export_qk_l2_norm is True, config.json has False"),
        (EXPERTS, dict(export_moe_apply_probs_on_input=True), "on_input is True, config.json has False"),
        # of families that have no such thing
        (tiny.NEMOTRON_H_DIMS, dict(window_size=(127, 0)), "window_size is 128, config.json has 0"),
        (
            replace(EXPERTS, yarn=None),
            dict(use_rope_scaling=True, position_embedding_type="rope"),
            "as the model was built, is 8.0, config.json has 0.0",
        ),
        (replace(EXPERTS, yarn=None), dict(OF_GPT_OSS, modelopt_enabled=True), "type is yarn, config.json has rope"),
        (replace(EXPERTS, yarn=None), OF_GPT_OSS, "rope, and yarn by --enable-gpt-oss, config.json has rope"),
        # what Megatron-LM computes whatever is said, and where a release has no such argument
        (
            replace(DENSE, rope_factor=32.0),
            dict(use_rope_scaling=True, rope_scaling_factor=32.0, untie_embeddings_and_output_weights=True),
            "as the model was built, is 8.0, config.json has 32.0",
        ),
        (
            tiny.KINDS["smollm3"],
            dict(untie_embeddings_and_output_weights=False),
            "no_rope_freq is [False, False], config.json has [False, True]",
        ),
        (
            replace(tiny.NEMOTRON_H_DIMS, norm_epsilon=1e-6),
            dict(untie_embeddings_and_output_weights=True),
            "norm_epsilon of Mamba's own norm is 1e-05, config.json has 1e-06",
        ),
    ],
)
def test_what_megatron_trained_otherwise_is_named_with_both_values(dims, trained, said):
    known = {} if dims in tiny.KINDS.values() else ARGUMENTS.get(type(dims), {})
    assert unlike(Namespace(**known), dims) == []
    assert any(said in one for one in unlike(Namespace(**{**known, **trained}), dims))


@pytest.mark.parametrize(
    "dims, trained",
    [
        (tiny.NEMOTRON_H_DIMS, dict(moe_router_num_groups=4, moe_router_group_topk=4)),
        (tiny.KINDS["qwen3_moe"], dict(moe_router_num_groups=4, moe_router_group_topk=None)),
        (replace(tiny.NEMOTRON_H_DIMS, expert_groups=2), GROUPED),
        (EXPERTS, dict(moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"])),
        (EXPERTS, dict(use_rope_scaling=True, position_embedding_type="yarn", rotary_scaling_factor=4.0)),
        (replace(DENSE, rope_factor=8.0), dict(use_rope_scaling=True, untie_embeddings_and_output_weights=True)),
        (tiny.NEMOTRON_H_DIMS, dict(untie_embeddings_and_output_weights=True, window_size=None)),
        (
            replace(EXPERTS, yarn=tiny.Yarn(32.0, 131072, 32.0, 1.0, False)),
            dict(OF_GPT_OSS, modelopt_enabled=True),
        ),
    ],
)
def test_the_same_function_said_otherwise_is_taken(dims, trained):
    assert unlike(Namespace(**trained), dims) == []


ODD = [
    torch.ones(2),
    [torch.ones(2)],
    {"a": 1},
    10**400,
    10**5000,
    object(),
    "1.0",
    "1\n0",
    float("nan"),
    b"x",
    (),
    ("a",),
]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: type(odd).__name__)
@pytest.mark.parametrize("name", ["norm_epsilon", "window_size", "softmax_scale", "no_rope_freq", "moe_router_topk"])
def test_an_argument_of_any_type_is_understood_or_refused(name, odd):
    for dims in (DENSE, EXPERTS, tiny.NEMOTRON_H_DIMS, tiny.KINDS["smollm3"]):
        try:
            check_arguments(Namespace(**{name: odd}), dims, "model_optim_rng.pt")
        except UserMistake as mistake:
            assert all("model_optim_rng.pt: " in line for line in str(mistake).splitlines())


def test_stretched_positions_are_compared_with_what_megatron_takes_where_nothing_is_said():
    dims = tiny.KINDS["olmo3"]
    assert unlike(Namespace(**STRETCHED), dims) == []
    unsaid = {**STRETCHED, "yarn_original_max_position_embeddings": None}
    assert unlike(Namespace(**unsaid), dims) == ["yarn_original_max_position_embeddings is 4096, config.json has 16"]
    of_gpt_oss = unlike(Namespace(**STRETCHED, enable_gpt_oss=True), dims)
    assert "rotary_scaling_factor is 32.0, config.json has 4.0" in of_gpt_oss and len(of_gpt_oss) == 3


@pytest.mark.parametrize("dims", [DENSE, EXPERTS, tiny.NEMOTRON_H_DIMS, tiny.NANOCHAT_DIMS, *tiny.KINDS.values()])
def test_what_megatron_core_is_given_means_what_config_json_says(dims):
    """The other direction: of the configuration that we make of a model, seen as Megatron's arguments."""
    made = tiny.family(dims).spec.transformer_config(dims, ParallelPlan(), torch.float32)
    named = dict(norm_epsilon=made.layernorm_epsilon, num_experts=made.num_moe_experts, group_query_attention=True)
    assert unlike(Namespace(**vars(made), **named), dims) == []
    for name in ("norm_epsilon", "num_attention_heads", *(["moe_router_topk"] if made.num_moe_experts else [])):
        changed = {**vars(made), **named, name: 99}
        assert any(one.startswith(f"{name} is 99, config.json has") for one in unlike(Namespace(**changed), dims))


@pytest.mark.parametrize(
    "dims, degrees, rank, name",
    [
        pytest.param(DENSE, dict(tensor=2), "mp_rank_01", "decoder.final_layernorm.weight", id="of a norm"),
        pytest.param(replace(DENSE, tied=True), dict(pipeline=2), "mp_rank_00_001", "output_layer.weight", id="tied"),
        pytest.param(EXPERTS, dict(expert=2), "mp_rank_00_001", "embedding.word_embeddings.weight", id="expert rank"),
    ],
)
def test_copies_of_ranks_that_differ_are_refused(dims, degrees, rank, name, two_ranks, tmp_path):
    hf, root = legacy(tmp_path, dims, ParallelPlan(**degrees), two_ranks)
    file = root / "iter_0000100" / rank / "model_optim_rng.pt"
    state = pickles.load(file, unknown=True)
    state["args"] = Namespace(
        **ARGUMENTS[type(dims)],
        **{f"{axis}_model_parallel_size": degrees.get(axis, 1) for axis in ("tensor", "pipeline", "expert")},
    )
    state["model"] = {key: value.clone() for key, value in state["model"].items() if isinstance(value, torch.Tensor)}
    state["model"][name][0] += 0.25
    torch.save(state, file)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserMistake, match="a rank's copy differs in [0-9,]+ of [0-9,]+ elements, by up to 0.25"):
        import_hf.run(import_hf.Config(str(hf), megatron=str(root)), tmp_path / "out", tmp_path)


def test_a_model_with_another_function_is_refused(tmp_path):
    hf, root = legacy(tmp_path, DENSE, ParallelPlan(), None)
    durable.write_json(hf / "config.json", tiny.QWEN2.config.hf_config(replace(DENSE, rope_base=5e5)))
    said = refused(tmp_path, hf, root)
    assert "was trained otherwise: rotary_base is 10000, config.json has 500000.0: what it was trained with" in said


def test_an_argument_of_a_class_is_named_by_it():
    of_megatron = type("Choice", (pickles.Node,), {"pair": ("megatron.core.enums", "Choice")})
    (said,) = unlike(Namespace(softmax_type=of_megatron("off-by-one")), DENSE)
    assert said == "softmax_type is megatron.core.enums.Choice('off-by-one'), config.json has vanilla"


def test_a_tensor_that_the_model_has_no_place_for_is_named(tmp_path):
    hf, root = legacy(tmp_path, DENSE, ParallelPlan(), None)
    durable.write_json(hf / "config.json", tiny.QWEN2.config.hf_config(replace(DENSE, kind="llama")))
    said = refused(tmp_path, hf, root)
    assert "tensor decoder.layers.0.self_attention.linear_qkv.bias [64] is not part of the model" in said


def test_a_model_of_another_size_is_named_with_shapes(tmp_path):
    hf, root = legacy(tmp_path, DENSE, ParallelPlan(), None)
    durable.write_json(hf / "config.json", tiny.QWEN2.config.hf_config(replace(DENSE, layers=5)))
    assert "tensor decoder.layers.4." in refused(tmp_path, hf, root)
