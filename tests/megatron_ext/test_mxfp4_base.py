"""Adapters over experts that are MXFP4 blocks compute what they compute over matrices, of which none is held."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from data_tools.mistake import UserMistake
from megatron_ext.entrypoints import evaluate, export_hf, grpo, import_hf, merge_lora, sft
from megatron_ext.layers.mxfp4 import packed, unpacked
from megatron_ext.lora import adapters
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.model_folders import model_folder
from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan, Site, Workload
from megatron_ext.parallel.rules import check
from megatron_ext.parallel.shape import ModelShape
from megatron_ext.training.rows import micro_batch
from megatron_ext.training.update import AdamW, Trainer
from tests.megatron_ext import adapted, tiny
from tests.megatron_ext.rounding import logits_bound
from tests.megatron_ext.test_attention import forward
from tests.megatron_ext.test_families import transformers_model
from tests.megatron_ext.test_lora_parallel import TOLERANCE
from tests.megatron_ext.test_mxfp4 import DIMS
from tests.megatron_ext.training import sft_config

PACK = tiny.pack([40, 24], seed=2)
PLAIN = replace(DIMS, mxfp4=False, vocabulary=40)  # the calculator's is smaller
BOUND = 1e-3  # of logits and gradients in bfloat16, relative to the largest


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Model folders: one whose experts are MXFP4 values, and one that has an adapter of attention, experts and router
    beside it; in float32, in which what is merged can be compared.
    """
    root = tmp_path_factory.mktemp("base")
    for name in ("rounded", "out", "model", "adapted"):
        (root / name).mkdir()
    hf = tiny.hf_folder(root / "hf", PLAIN)
    import_hf.run(import_hf.Config(str(hf)), root / "rounded", root)
    export_hf.run(export_hf.Config(str(root / "rounded"), quantization="mxfp4"), root / "out", root)
    import_hf.run(import_hf.Config(str(root / "out"), dtype="float32"), root / "model", root)
    base = model_folder.open_folder(root / "model")
    with ranks.started(ParallelPlan(), seed=1):
        parts = adapted.attach(model_folder.load_stages(base, ParallelPlan()), base.dims, adapted.lora(base.dims))
        model_folder.write(root / "adapted", parts, base, step=1)
    return root


def held(parts) -> dict[str, torch.Tensor]:
    return {name: p for name, p in parts[0].named_parameters() if ".experts." in name and name.endswith("weight")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_and_gradients_are_those_over_matrices(alone, folder, dtype):
    model = model_folder.open_folder(folder / "adapted")
    found = {}
    for base in ("", "mxfp4"):
        parts = model_folder.load_stages(model, ParallelPlan(), dtype, base=base)
        trainer = Trainer(parts, ParallelPlan(), AdamW())
        logits, _ = forward(parts[0], PACK)
        trainer.gradient([micro_batch([PACK])], everywhere=True)
        found[base] = logits, adapters.gathered(trainer.model, lambda p: p.main_grad)
    (plain, gradients), (over_blocks, of_blocks) = found.values()
    assert (over_blocks - plain).abs().max() <= BOUND * plain.abs().max()
    assert of_blocks.keys() == gradients.keys() and any(".experts." in name for name in gradients)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        assert (of_blocks[name] - gradient).abs().max() <= BOUND * gradient.abs().max(), name


def test_peft_over_dequantised_weights_and_the_merged_model_give_the_same_logits(alone, folder, tmp_path):
    from peft import PeftModel

    model = model_folder.open_folder(folder / "adapted")
    (ours,) = model_folder.load_stages(model, ParallelPlan(), base="mxfp4")
    logits, batch = forward(ours, PACK)
    for name in ("peft", "merged"):
        (tmp_path / name).mkdir()
    export_hf.run(export_hf.Config(str(model.path), adapter="peft"), tmp_path / "peft", tmp_path)
    theirs = PeftModel.from_pretrained(transformers_model(folder / "out"), tmp_path / "peft")
    with torch.no_grad():
        for a, b in zip(PACK.cu_seqlens[:-1], PACK.cu_seqlens[1:]):
            bound = logits_bound(theirs, batch.ids[:, a:b])
            assert (theirs(batch.ids[:, a:b]).logits[0] - logits[a:b]).abs().max() <= bound
    merge_lora.run(merge_lora.Config(str(model.path)), tmp_path / "merged", tmp_path)
    merged = model_folder.load_model(model_folder.open_folder(tmp_path / "merged"), ParallelPlan())
    assert (forward(merged, PACK)[0] - logits).abs().max() <= bound


def test_blocks_take_a_quarter_and_no_matrix_is_kept_for_backward(alone, folder):
    model = model_folder.open_folder(folder / "adapted")
    parts = model_folder.load_stages(model, ParallelPlan(), "bfloat16", base="mxfp4")
    values = DIMS.layers * DIMS.experts * 3 * DIMS.hidden * DIMS.ffn
    assert sum(p.nbytes for p in held(parts).values()) == values * 17 // 32
    matrices = {(2 * DIMS.ffn, DIMS.hidden), (DIMS.hidden, DIMS.ffn)}
    matrices |= {shape[::-1] for shape in matrices}
    saved = []
    experts = [module for name, module in parts[0].named_modules() if name.endswith((".linear_fc1", ".linear_fc2"))]
    tokens = torch.randn(5, DIMS.hidden, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        for module in experts:
            out, _ = module(tokens)
            out.float().sum().backward()
    assert len(experts) == 2 * DIMS.layers * DIMS.experts and tokens.grad.abs().sum() > 0
    assert any(t.dtype == torch.uint8 for t in saved)
    assert not [t.shape for t in saved if t.dtype != torch.uint8 and tuple(t.shape) in matrices]


def test_an_expert_without_tokens_gives_none_and_is_not_dequantised(alone, folder, monkeypatch):
    parts = model_folder.load_stages(model_folder.open_folder(folder / "model"), ParallelPlan(), base="mxfp4")
    layer = parts[0].decoder.layers[0].mlp.experts.local_experts[0].linear_fc1
    monkeypatch.setattr("megatron_ext.layers.moe.unpacked", None)
    assert layer(torch.zeros(0, DIMS.hidden, dtype=torch.bfloat16))[0].shape == (0, 2 * DIMS.ffn)


def test_a_matrix_in_several_tiles_is_the_matrix(monkeypatch):
    values = unpacked(packed(torch.randn(50, 96)), torch.float32)
    monkeypatch.setattr("megatron_ext.layers.mxfp4.TILE", 96 * 7)
    assert torch.equal(unpacked(packed(values), torch.float32), values)


def test_what_blocks_would_round_is_refused(alone, folder):
    with pytest.raises(UserMistake, match=r"experts.0.linear_fc1.weight of .* has .* values that are none of MXFP4's"):
        model_folder.load_stages(model_folder.open_folder(folder / "rounded"), ParallelPlan(), base="mxfp4")


def test_settings_that_blocks_do_not_go_with_are_refused_by_plan(folder):
    model, site = str(folder / "model"), Site(1)
    frozen, ours = "mxfp4 holds experts that stay as they are: train adapters", "has no experts over MXFP4"
    of_te = evaluate.Config(model=model, base="mxfp4", backend="te")
    for problems, said in (
        (grpo.check(grpo.Config(model=model, base="mxfp4"), 1, site), frozen),
        (sft.check(sft.Config(model=model, base="mxfp4"), 1, site), frozen),
        (evaluate.check(of_te, 1, site), ours),
    ):
        places = [problem.where for problem in problems if said in problem.message]
        assert places in (["base"], ["backend"]), problems
    lora = grpo.check(grpo.Config(model=model, base="mxfp4", lora=LoraConfig(rank=4)), 1, site)
    assert not [problem for problem in lora if problem.where == "base"]
    dense, odd = (shape_of(of) for of in (tiny.DIMS, replace(PLAIN, ffn=48)))
    for shape, plan, said in (
        (dense, ParallelPlan(), "no experts to hold as MXFP4"),
        (odd, ParallelPlan(), "rows of 64 and 48 values have no whole blocks"),
        (shape_of(PLAIN), ParallelPlan(tensor=2, sequence_parallel=True, expert_tensor=4), "64 and 16 values"),
    ):
        problems = check(plan, Workload(4, shape, base="mxfp4"))
        assert [problem for problem in problems if said in problem.message], problems


def shape_of(dims) -> ModelShape:
    return tiny.family(dims).config.shape(dims)


def test_training_over_blocks_is_training_over_matrices(calculator, folder, tmp_path):
    """The same bytes of an adapter after some steps: on a CPU both multiply with the same numbers in the same way."""
    trained = {}
    for base in ("", "mxfp4"):
        out = tmp_path / f"out{base}"
        out.mkdir()
        lora = LoraConfig(rank=2, targets=["all-linear", "experts", "router"])
        config = replace(sft_config(calculator, 3), model=str(folder / "model"), base=base, lora=lora, lr=0.01)
        facts = sft.run(config, out, tmp_path / f"keep{base}")
        lines = (tmp_path / f"keep{base}" / "metrics.jsonl").read_text().splitlines()
        norms = [json.loads(line)["param_norm"] for line in lines]
        trained[base] = facts["weights_digest"], facts["loss_last"], norms
        assert facts["parts"]["experts"]["is"] == (base or "torch")
    assert trained[""] == trained["mxfp4"]


def updated(folder: Path, base: str, plan: ParallelPlan) -> tuple[tuple[float, float, float], dict[str, torch.Tensor]]:
    """Loss, norm and loss after an update, and the adapters' gradients."""
    packs = [tiny.pack([16, 8, 24, 16], seed) for seed in range(4)]
    with ranks.started(plan, seed=1):
        parts = model_folder.load_stages(model_folder.open_folder(folder), plan, base=base)
        trainer = Trainer(parts, plan, AdamW(weight_decay=0.1))
        data = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        rows = [micro_batch([pack]) for pack in packs[data[0] :: data[1]]]
        loss = trainer.gradient(rows, everywhere=True).reduced().mean_loss
        gradients = adapters.gathered(trainer.model, lambda p: p.main_grad)
        _, norm = trainer.step(rows, 1e-2)
        return (loss, norm, trainer.gradient(rows).reduced().mean_loss), gradients


@pytest.mark.parametrize(
    "plan",
    [
        ParallelPlan(tensor=2, expert=2, sequence_parallel=True, recompute="full"),
        pytest.param(ParallelPlan(expert=2), marks=pytest.mark.soak),
    ],
)
def test_two_ranks_over_blocks_train_as_one_over_matrices(two_ranks, folder, plan):
    alone, expected = updated(folder / "adapted", "", ParallelPlan())
    numbers, gradients = two_ranks.run(updated, folder=folder / "adapted", base="mxfp4", plan=plan)[0]
    assert numbers == pytest.approx(alone, rel=TOLERANCE)
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= TOLERANCE * largest, name
