"""Muon: refused where it cannot be; its updates are orthogonal, the same under every layout, and go on to the bit.

python -m pytest tests/megatron_ext/test_muon.py -m soak     where megatron-core and emerging-optimizers are those
                                                             of training/muon.py
"""

from dataclasses import replace

import pytest
import torch

from megatron_ext import versions
from megatron_ext.entrypoints import sft
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan, Workload
from megatron_ext.parallel.rules import check as check_plan
from megatron_ext.preflight import memory
from megatron_ext.preflight.facts import Documents, Training
from megatron_ext.training import certify, muon, options, supervised
from megatron_ext.training.muon import MUON, Muon
from megatron_ext.training.options import Engine
from megatron_ext.training.update import AdamW, Trainer
from megatron_ext.weights import checkpoint
from tests.megatron_ext import tiny
from tests.megatron_ext.cells import CELLS, FAMILIES
from tests.megatron_ext.rl import toy
from tests.megatron_ext.shapes import QWEN_32B
from tests.megatron_ext.test_grpo import stop_and_go_on
from tests.megatron_ext.training import LAYOUTS, metrics, run_of, sft_config, stop_at

HERE = pytest.mark.skipif(bool(muon.missing()), reason=f"optimizer muon {muon.missing()}")
SETTINGS = AdamW(weight_decay=0.1, muon=Muon(precision="highest"))  # fp32, as the layouts are compared in
LORA = LoraConfig(rank=2, targets=["all-linear"])


# ---------------------------------------------------------------- where it is refused


def refused(plan=None, shape=None, **changes):
    return muon.check(MUON, Muon(), lora=LoraConfig(), plan=plan or ParallelPlan(), shape=shape, **changes)


def test_muon_is_refused_where_it_is_not_installed_with_what_to_do(monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda: "0.16.1")
    (problem,) = refused()
    assert "megatron-core 0.16.1" in problem.message
    assert "pip install megatron-core==0.19.2 emerging-optimizers==0.3.0" in problem.message


@pytest.mark.parametrize("release", versions.RELEASES)
@pytest.mark.parametrize("partner", ["0.3.0", "0.2.0"])
def test_muon_is_taken_under_the_releases_that_have_it_beside_the_one_partner(monkeypatch, release, partner):
    monkeypatch.setattr(versions, "installed", lambda: release)
    monkeypatch.setattr(muon, "version", lambda _: partner)
    assert bool(refused()) != (release in ("0.18.2", "0.19.2") and partner == "0.3.0")


def test_a_training_refuses_what_muon_does_not_go_with(calculator, monkeypatch):
    monkeypatch.setattr(muon, "missing", lambda: "")
    plain = replace(sft_config(calculator, 10), optimizer=MUON)
    assert sft.check(plain, 1) == []
    shares = Engine(overlap_grad_reduce=True, overlap_param_gather=True)
    for changes, where in [
        ({"lora": LORA}, "optimizer"),
        ({"engine": shares}, "engine.overlap_param_gather"),
        ({"optimizer": "", "muon": Muon(momentum=0.9)}, "muon"),
    ]:
        assert where in [problem.where for problem in sft.check(replace(plain, **changes), 1)]
    assert [problem.where for problem in refused(offload=True)] == ["offload"]
    (problem,) = refused(plan=ParallelPlan(tensor=16), shape=QWEN_32B)
    assert str(problem) == (
        "parallel.tensor: 16 cuts the 8 KV groups, and muon would take q, k and v for one matrix: use 8 or less"
    )


def test_the_state_of_muon_is_counted_whole_and_with_its_largest_update():
    w = Workload(64, QWEN_32B, pack_length=4096, align=1, global_batch=64)
    adam = Training(w, Documents.one(4096, 0))
    for tensor in (1, 8):
        plan = ParallelPlan(tensor=tensor, sequence_parallel=tensor > 1)
        ours, theirs = (memory.memory(plan, each).optimizer for each in (replace(adam, muon=True), adam))
        parameters = memory.stages(plan, QWEN_32B)[0].parameters.total
        assert theirs == pytest.approx(12 * parameters / (64 // tensor), rel=1e-3)
        largest = 2 * QWEN_32B.ffn * QWEN_32B.hidden
        assert 8 * parameters < ours - memory.MUON_WORK_BYTES * largest < 8.4 * parameters


# ---------------------------------------------------------------- where it is installed


QUINTIC = [  # of emerging-optimizers' "quintic", 5 steps (Jordan 2024)
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]  # fmt: skip


def orthogonal(gradient):
    """What Muon makes of a matrix's first gradient, by its singular values, in fp64."""
    u, values, v = torch.linalg.svd(gradient.double(), full_matrices=False)
    values = values / values.norm()
    for a, b, c in QUINTIC:
        values = a * values + b * values**3 + c * values**5
    return u @ torch.diag(values) @ v * 0.2 * max(gradient.shape) ** 0.5


def queries_keys_values(matrix):
    """The matrices of q, k and v: of each group of heads, the queries, then key and value."""
    of = tiny.DIMS
    each = [of.heads // of.kv_groups * of.head_dim, of.head_dim, of.head_dim]
    return [part.flatten(0, 1) for part in matrix.unflatten(0, (of.kv_groups, -1)).split(each, 1)]


@HERE
@pytest.mark.soak
def test_an_update_makes_each_matrix_gradient_orthogonal_and_the_rest_is_adamw(tmp_path):
    hf, plan = tiny.hf_folder(tmp_path, tiny.DIMS), ParallelPlan()
    with ranks.started(plan):
        trainer = Trainer(tiny.parts(hf, tiny.DIMS, plan), plan, replace(SETTINGS, weight_decay=0.0))
        rows = certify.rows_of([certify.random_pack((64, 24, 8), tiny.DIMS.vocabulary, 1)], plan)
        trainer.gradient(rows, everywhere=True)
        parameters = dict(trainer.model[0].module.named_parameters())
        before = {name: (p.detach().clone(), p.main_grad.clone()) for name, p in parameters.items()}
        trainer.step(rows, 1.0)
    matrices = 0
    for name, (value, gradient) in before.items():
        change = value - parameters[name].detach()
        if change.dim() != 2 or "embedding" in name:
            assert change.abs().max() == pytest.approx(1.0, abs=1e-3)  # AdamW's first step: the sign of the gradient
            continue
        parts = [queries_keys_values(x) if "linear_qkv" in name else [x] for x in (gradient, change)]
        for of_gradient, of_change in zip(*parts):
            assert torch.allclose(orthogonal(of_gradient).float(), of_change, atol=1e-3), name
            matrices += 1
    assert matrices == 2 * (3 + 1 + 1 + 1)


MUON_FAMILIES = ("qwen2", "qwen3_moe", "gpt_oss", "nemotron_h")


@HERE
@pytest.mark.soak
@pytest.mark.parametrize("name", MUON_FAMILIES)
def test_every_layout_makes_the_update_of_one_process(name, two_ranks, four_ranks, tmp_path):
    of = FAMILIES[name]
    family, shape = tiny.family(of), tiny.family(of).config.shape(of)
    lengths = [(64, 24, 8), (16, 40, 8, 24, 8)] * 2
    packs = [certify.random_pack(each, of.vocabulary, i) for i, each in enumerate(lengths)]
    weights = tmp_path / "weights"
    with ranks.started(ParallelPlan()):
        certify.write_random_weights(family, of, weights)
    arguments = dict(family=family, dims=of, weights=weights, packs=packs, settings=SETTINGS)
    serial = certify.measure(plan=ParallelPlan(), **arguments)
    assert serial.later_loss < serial.loss
    ran = []
    for cell in CELLS:
        asked = Workload(cell.ranks, shape, pack_length=96, align=8, global_batch=4, gpus=False)
        if cell.whole or check_plan(cell.plan, asked) or refused(plan=cell.plan, shape=shape):
            continue
        pool = {2: two_ranks, 4: four_ranks}[cell.ranks]
        result = certify.difference(pool.run(certify.measure, plan=cell.plan, **arguments)[0], serial)
        ran.append(f"{cell.name} {result.largest:.1e}")
        assert result.largest <= 1e-5, (cell.name, result)
    print(f"\n{name}: {len(ran)} layouts: {', '.join(ran)}")
    assert len(ran) > 10


def run_on(plan, hf, keep, of, dtype=torch.float32):
    with ranks.started(plan):
        trainer = Trainer(tiny.parts(hf, of, plan, dtype=dtype), plan, replace(SETTINGS, muon=Muon()))
        run = run_of(6, checkpoint_every=2, log_every=3, keep_checkpoints=9)
        trained = supervised.train_on_packs(trainer, tiny.Packs(align=4), run, keep, identity={"model": "tiny"})
        return trained.last_loss, trained.resumed_from, checkpoint.weights_digest(trainer.model)


@HERE
@pytest.mark.soak
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["DP2", "TP2 SP", "PP2 interleaved", "CP2", "EP2"])
def test_a_training_with_muon_goes_on_to_the_bit(two_ranks, tmp_path, layout, dtype):
    plan = ParallelPlan(expert=2) if layout == "EP2" else LAYOUTS[layout]
    of = FAMILIES["qwen3_moe"] if layout == "EP2" else tiny.dims(layers=4)
    hf = tiny.hf_folder(tmp_path / "hf", of)
    arguments = dict(plan=plan, hf=hf, keep=tmp_path / "keep", of=of, dtype=dtype)
    loss, _, digest = two_ranks.run(run_on, **arguments)[0]
    stop_at(tmp_path / "keep", 4)
    assert two_ranks.run(run_on, **arguments)[0] == (loss, 4, digest)


@HERE
@pytest.mark.soak
@pytest.mark.parametrize(
    "before, after", [("DP2", "TP2 SP"), ("TP2 SP", "PP2 interleaved"), ("PP2 interleaved", "DP2")]
)
def test_a_training_with_muon_goes_on_under_another_layout(two_ranks, tmp_path, before, after):
    of = tiny.dims(layers=4)
    arguments = dict(hf=tiny.hf_folder(tmp_path / "hf", of), keep=tmp_path / "keep", of=of)
    loss = two_ranks.run(run_on, plan=LAYOUTS[before], **arguments)[0][0]
    norm = metrics(tmp_path / "keep")[-1]["grad_norm"]
    stop_at(tmp_path / "keep", 4)
    found = two_ranks.run(run_on, plan=LAYOUTS[after], **arguments)[0]
    assert found[0] == pytest.approx(loss, rel=2e-3) and found[1] == 4  # the iteration is in bfloat16
    assert metrics(tmp_path / "keep")[-1]["grad_norm"] == pytest.approx(norm, rel=2e-2)


@HERE
@pytest.mark.soak
def test_a_phase_trains_with_muon_and_says_so_in_its_key(calculator, tmp_path):
    config = replace(sft_config(calculator, 30), optimizer=MUON, lr=0.003)
    (tmp_path / "out").mkdir()
    facts = sft.run(config, tmp_path / "out", tmp_path / "keep")
    assert facts["loss_last"] < facts["loss_first"] - 0.3, facts
    assert options.keyed(config)["optimizer"] == MUON and "muon" not in options.keyed(config)
    assert options.keyed(replace(config, muon=Muon(momentum=0.9)))["muon"]["momentum"] == 0.9
    assert "optimizer" not in options.keyed(replace(config, optimizer=""))


@HERE
@pytest.mark.soak
def test_grpo_with_muon_stopped_in_mid_rollout_ends_as_the_uninterrupted_one(two_ranks, tmp_path):
    hf = tiny.hf_folder(tmp_path / "hf", tiny.DIMS, seed=4)
    arguments = dict(hf=hf, of=tiny.DIMS, plan=ParallelPlan(), steps=3, optimizer=SETTINGS, checkpoint_every=2)
    whole = two_ranks.run(toy.trained, keep=tmp_path / "whole", **arguments)[0]
    found = stop_and_go_on(two_ranks, tmp_path / "cut", [9, 5], **arguments)[0]
    assert found["digest"] == whole["digest"] and found["position"]["updates"] == 3
