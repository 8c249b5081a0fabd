"""Length and rate in samples and tokens, blends, early ends, and options that reach megatron-core by its names."""

import dataclasses
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from data_tools.base import declared
from data_tools.mistake import UserMistake
from data_tools.packs import pack
from data_tools.packs.blended import BlendedPacks
from data_tools.packs.plan import PackReader
from megatron_ext.entrypoints import sft
from megatron_ext.models import decoder_spec
from megatron_ext.parallel import ranks
from megatron_ext.parallel.parts import OURS, Parts
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.training import options, schedule, supervised, update
from megatron_ext.training.options import Engine, ExpertBalance
from megatron_ext.training.schedule import Amount
from megatron_ext.training.settings import TrainingSettings
from megatron_ext.training.update import AdamW, Trainer
from tests.megatron_ext import tiny
from tests.megatron_ext.training import run_of, sft_config

PLAN = ParallelPlan()

# ---------------------------------------------------------------- how long, at which rate


def test_samples_and_tokens_are_updates_of_equal_size():
    assert schedule.updates(Amount(samples=20872), 60, None) == 347  # what is less than an update is left out
    assert schedule.updates(Amount(tokens=10 * 4 * 64 + 5), 4, 64) == 10
    assert schedule.updates(Amount(steps=100, samples=48, tokens=4 * 64 * 20), 4, 64) == 12  # the first limit counts


def test_the_seeds_schedule():
    config = sft.Config(samples=20872, global_batch=60, schedule="cosine", lr=5e-5, min_lr=5e-6, warmup_samples=2000)
    found = config.rate_schedule(262144)
    rates = [found.rate(step) for step in range(found.steps)]
    assert rates[0] == pytest.approx(5e-5 * 60 / 2000) and rates[32] == pytest.approx(5e-5 * 1980 / 2000)
    assert max(rates) == rates[33] == pytest.approx(5e-5, rel=1e-4)
    assert all(a > b for a, b in zip(rates[33:], rates[34:])) and 5e-6 < rates[-1] < 5.01e-6


def test_linear_falls_by_equal_steps_to_the_floor():
    found = schedule.Schedule("linear", 12, 1.0, 0.2, warmup=2)
    falls = numpy.diff([found.rate(step) for step in range(2, 13)])
    assert found.rate(2) == 1.0 and found.rate(12) == pytest.approx(0.2) and numpy.allclose(falls, -0.08)


def test_every_mistake_about_length_is_named():
    config = sft.Config(model="m", store="s", packs="p", samples=-1, tokens=9, warmup_steps=1, warmup_tokens=5)
    found = [str(p) for p in declared.check_with(config, lambda config: sft._check_length(config, 64))]
    assert found[0] == "samples: -1 is out of range: at least 0 (packs)" and found[1].startswith(
        "warmup_steps: the warm-up is given more than once"
    )
    assert [str(p) for p in sft._check_length(sft.Config(), None)] == [
        "steps: how long to train is not said: give steps, samples or tokens"
    ]


def test_training_ends_after_its_time_with_a_model_and_says_so(calculator, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    config = replace(sft_config(calculator, 100_000), minutes=1 / 60)
    facts = sft.run(config, tmp_path / "out", tmp_path / "keep")
    assert facts["parts"]["attention"] == {"is": "torch", "why": "no GPU"}  # whose layers: the log begins with it
    assert "attention: torch (no GPU)\nlinear: torch (no GPU)\n" in capfd.readouterr().err
    assert 0 < facts["step"] < 100_000 and (tmp_path / "out" / "model.json").exists()
    assert facts["notes"][-1].startswith("ended after 0.0166667 minutes at step")
    # Time is that of all attempts together.
    (tmp_path / "again").mkdir()
    assert sft.run(config, tmp_path / "again", tmp_path / "keep")["step"] <= facts["step"] + 1


# ---------------------------------------------------------------- blends


@pytest.fixture(scope="module")
def plans(calculator, tmp_path_factory) -> list[Path]:
    """Two pack plans over the same store."""
    found = [calculator["packs"], tmp_path_factory.mktemp("other") / "packs"]
    found[1].mkdir()
    pack.pack(pack.Config(store=str(calculator["store"]), pack_length=64, order="shuffled", seed=5), found[1])
    return found


def test_a_blend_keeps_its_shares_and_every_plans_own_order(calculator, plans):
    readers = [PackReader(calculator["store"], plan) for plan in plans]
    blend = BlendedPacks(readers, [3, 1])
    stream = [i for k in range(12) for i in blend.batch(k, 4, seed=7)]
    first = [i for i in stream if i < readers[0].n_packs]
    assert len(first) == 36  # three in four
    assert first == [i for k in range(9) for i in readers[0].batch(k, 4, 7)]
    second = [i - readers[0].n_packs for i in stream if i >= readers[0].n_packs]
    assert second == [i for k in range(3) for i in readers[1].batch(k, 4, 7)]
    for k in range(3):
        shares = [blend.share(k, 4, 7, rank, 2) for rank in range(2)]
        assert sorted(sum(shares, [])) == sorted(blend.batch(k, 4, 7))
    place = stream.index(second[0] + readers[0].n_packs)
    assert numpy.array_equal(blend.pack(stream[place]).ids, readers[1].pack(second[0]).ids)
    assert blend.padding(stream[place]) == readers[1].padding(second[0])


def test_training_on_a_blend(calculator, plans, tmp_path):
    (tmp_path / "out").mkdir()
    config = replace(sft_config(calculator, 5), blend_stores=[str(calculator["store"])], blend_packs=[str(plans[1])])
    assert "0 weights for 2 blended plans" in str(sft.check(config, 1)[0])
    facts = sft.run(replace(config, blend_weights=[1.0, 1.0]), tmp_path / "out", tmp_path / "keep")
    assert facts["step"] == 5


def test_plans_of_different_lengths_are_not_blended(calculator, tmp_path):
    pack.pack(pack.Config(store=str(calculator["store"]), pack_length=128), tmp_path)
    readers = [PackReader(calculator["store"], plan) for plan in (calculator["packs"], tmp_path)]
    with pytest.raises(UserMistake, match=r"packs of \[64, 128\] tokens cannot be blended"):
        BlendedPacks(readers, [1, 1])
    config = replace(
        sft_config(calculator, 5), blend_stores=["s"], blend_packs=[str(tmp_path)], blend_weights=[1.0, 1.0]
    )
    assert "packs of different lengths cannot be blended" in "\n".join(map(str, sft.check(config, 1)))


# ---------------------------------------------------------------- options of megatron-core

GPU = Engine("fused", "none", [], True, True, True, 0.5, True)
TE = Parts("te", "te", "te", "te")


def test_options_are_fields_of_megatron_core():
    """Those of the GPU path, which cannot run here, by their names in the pinned version."""
    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert set(options.transformer_fields(GPU, ExpertBalance(0.1, "seq_aux_loss", 1e-3), experts=True)) <= names
    assert set(update._offloading(GPU)) <= {field.name for field in dataclasses.fields(OptimizerConfig)}
    with ranks.started(PLAN):
        fields = options.transformer_fields(replace(GPU, te_rng=False), ExpertBalance(), experts=False)
        config = tiny.QWEN2.spec.transformer_config(tiny.DIMS, PLAN, torch.float32, OURS, fields)
    assert config.attention_backend.name == "fused" and config.cuda_graph_impl == "none"


def test_what_the_parts_cannot_do_is_refused():
    found = [str(problem) for problem in options.check(replace(GPU, overlap_grad_reduce=False), OURS)]
    assert [line.split(":")[0] for line in found] == [
        f"engine.{name}" for name in ("attention", "te_rng", "overlap_param_gather", "offload_optimizer")
    ]
    assert options.check(GPU, TE) == [] == options.check(GPU, None)
    own_attention = [problem.where for problem in options.check(GPU, replace(TE, attention="torch"))]
    assert own_attention == ["engine.attention"]
    assert "did you mean flash?" in str(declared.check(Engine(attention="flahs"))[0])
    assert str(options.check_balance(ExpertBalance(aux_loss=0.1), experts=False)[0]).startswith(
        "balance.aux_loss: 0.1, and the"
    )


@pytest.mark.parametrize("part", ["attention", "linear", "norm", "experts"])
def test_fusions_follow_their_own_part(part):
    fields = decoder_spec.settings(PLAN, torch.float32, replace(OURS, **{part: "te"}))
    assert fields["apply_rope_fusion"] == (part == "attention")
    assert fields["bias_activation_fusion"] == fields["bias_dropout_fusion"] == (part == "linear")
    config = tiny.family(tiny.GPT_OSS_DIMS).spec.transformer_config(
        tiny.GPT_OSS_DIMS, PLAN, torch.float32, replace(OURS, **{part: "te"})
    )
    assert config.moe_grouped_gemm == (part == "experts")


@pytest.mark.parametrize("parts", [OURS, TE, None])
@pytest.mark.parametrize("graphs", [value for value in options.CUDA_GRAPHS if value != "none"])
def test_graphs_of_a_training_are_refused_because_they_hold_one_pack(graphs, parts):
    (problem,) = options.check(Engine(cuda_graphs=graphs), parts)
    assert problem.where == "engine.cuda_graphs" and "boundaries of the pack that it was recorded with" in str(problem)
    assert str(problem).endswith("use none")
    assert not any("graph" in name for name in options.transformer_fields(Engine(), ExpertBalance(), experts=True))


def test_the_distributed_time_out_is_the_configured_one():
    (problem,) = declared.check(TrainingSettings(model="m", distributed_timeout_minutes=0))
    assert str(problem) == "distributed_timeout_minutes: 0 is out of range: at least 1 (minutes)"
    with ranks.started(PLAN, patience=timedelta(minutes=7)):
        assert (
            parallel_state.get_data_parallel_group()._get_backend(torch.device("cpu")).options._timeout.seconds == 420
        )


def losses_with(plan: ParallelPlan, hf: Path, engine: Engine) -> list[float]:
    with ranks.started(plan):
        one = Trainer(tiny.parts(hf, tiny.DIMS, plan), plan, AdamW(), engine)
        found = []
        for k in range(3):
            sums, norm = one.step(supervised.rows_of_step(tiny.Packs(), k, run_of(), plan), 0.01)
            found += [sums.reduced().mean_loss, norm]
        one.settle()
        return [*found, supervised.validation_loss(one, tiny.Packs(n=2))]


def test_overlapping_communication_changes_nothing(two_ranks, tmp_path):
    hf = tiny.hf_folder(tmp_path)
    plain = two_ranks.run(losses_with, plan=PLAN, hf=hf, engine=Engine())[0]
    overlapped = Engine(overlap_grad_reduce=True, overlap_param_gather=True)
    assert two_ranks.run(losses_with, plan=PLAN, hf=hf, engine=overlapped)[0] == pytest.approx(plain, rel=1e-5)


def routed(balance: ExpertBalance, hf: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(the router's gradient of one step, its correction bias after it) in the first layer with experts."""
    with ranks.started(PLAN):
        of = tiny.NEMOTRON_H_DIMS
        fields = options.transformer_fields(Engine(), balance, experts=True)
        (model,) = tiny.family(of).build(of, PLAN, torch.float32, OURS, fields)
        from megatron_ext.weights import convert

        convert.import_weights(model, hf, tiny.family(of), of)
        one = Trainer(model, PLAN, AdamW())
        one.step(supervised.rows_of_step(tiny.Packs(), 0, run_of(), PLAN), 0.0)
        router = next(module for name, module in model.named_modules() if name.endswith("mlp.router"))
        return router.weight.main_grad.clone(), router.expert_bias.clone()


def test_experts_are_balanced_only_when_asked(tmp_path):
    hf = tiny.hf_folder(tmp_path, tiny.NEMOTRON_H_DIMS)
    plain, bias = routed(ExpertBalance(), hf)
    with_loss, same_bias = routed(ExpertBalance(aux_loss=1.0), hf)
    same, moved = routed(ExpertBalance(bias_rate=0.5), hf)
    assert not torch.allclose(plain, with_loss) and torch.equal(bias, same_bias)
    assert torch.equal(plain, same) and set((moved - bias).abs().unique().tolist()) <= {0.0, 0.5}
    assert not torch.equal(moved, bias)


@pytest.mark.parametrize("of", [tiny.DIMS, tiny.NEMOTRON_H_DIMS], ids=["qwen2", "nemotron_h"])
def test_recomputation_runs_forward_again(alone, tmp_path, of):
    """That it changes no bit is shown in test_train.py; that it happens, here."""
    hf, runs = tiny.hf_folder(tmp_path, of), {}
    for mode in ("none", "selective", "full"):
        plan = ParallelPlan(recompute=mode)
        model, calls = tiny.model(hf, of, plan), {"mlp": 0, "attention": 0}
        for name, module in model.named_modules():
            kind = {"linear_fc1": "mlp", "core_attention": "attention"}.get(name.rpartition(".")[2])
            if kind:
                module.register_forward_hook(lambda *_, kind=kind, calls=calls: calls.update({kind: calls[kind] + 1}))
        one = Trainer(model, plan, AdamW())
        one.step(supervised.rows_of_step(tiny.Packs(), 0, run_of(global_batch=1), plan), 0.0)
        runs[mode] = calls
    assert runs["selective"] == {"mlp": 2 * runs["none"]["mlp"], "attention": runs["none"]["attention"]}
    assert runs["full"] == {kind: 2 * count for kind, count in runs["none"].items()}
