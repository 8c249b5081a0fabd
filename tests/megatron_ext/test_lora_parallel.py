"""LoRA over ranks: loss and gradients of the adapters are those of one process, base weights keep their bits, and a
checkpoint of one layout is read by another."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_ext.lora import adapters
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan, Workload
from megatron_ext.parallel.rules import check
from megatron_ext.training.rows import micro_batch
from megatron_ext.training.update import AdamW, Trainer
from megatron_ext.weights import checkpoint
from tests.megatron_ext import adapted, tiny
from tests.megatron_ext.cells import SP

PLANS = {
    "TP2 SP": ParallelPlan(tensor=2, **SP),
    "TP2 EP2 SP": ParallelPlan(tensor=2, expert=2, **SP),
    "EP2": ParallelPlan(expert=2),
    "PP2": ParallelPlan(pipeline=2),
    "TP2": ParallelPlan(tensor=2),
    "DP2": ParallelPlan(),
    "CP2": ParallelPlan(context=2),
    "PP2 interleaved": ParallelPlan(pipeline=2, virtual=2),
    "TP2 ETP2 SP": ParallelPlan(tensor=2, expert_tensor=2, **SP),
    "TP2 SP, recompute full": ParallelPlan(tensor=2, recompute="full", **SP),
    "EP2, recompute selective": ParallelPlan(expert=2, recompute="selective"),
}
CI = {
    "qwen2": ("TP2 SP",),
    "gpt_oss": ("TP2 EP2 SP",),
    "nemotron_h": ("TP2 ETP2 SP",),
    "nanochat": ("PP2 interleaved",),
}
FAMILIES = adapted.FAMILIES
TOLERANCE = 1e-5  # relative


def _is_legal(name: str, plan: ParallelPlan) -> bool:
    shape = tiny.family(FAMILIES[name]).config.shape(FAMILIES[name])
    return not check(plan, Workload(2, shape, pack_length=64, align=8, gpus=False))


CELLS = [
    pytest.param(family, plan, id=f"{family} {plan}", marks=[] if plan in CI.get(family, ()) else [pytest.mark.soak])
    for family in FAMILIES
    for plan in PLANS
    if _is_legal(family, PLANS[plan])
]


@dataclass
class Run:
    """Numbers of one update; factors and gradients by name, on rank 0."""

    loss: float
    norm: float
    later: float
    gradients: dict[str, torch.Tensor]
    factors: dict[str, torch.Tensor]
    base: list[str]  # digests before and after


def updated(hf: Path, family: str, plan: ParallelPlan, lora: LoraConfig, keep: Path | None = None) -> Run:
    of, packs = FAMILIES[family], [tiny.pack([16, 8, 24, 16], seed) for seed in range(4)]
    with ranks.started(plan, seed=1):
        parts = adapted.attach(tiny.parts(hf, of, plan), of, lora)
        trainer = Trainer(parts, plan, AdamW(weight_decay=0.1))
        base = checkpoint.weights_digest(trainer.model)
        data = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        rows = [micro_batch([pack]) for pack in packs[data[0] :: data[1]]]
        loss = trainer.gradient(rows, everywhere=True).reduced().mean_loss
        gradients = adapters.gathered(trainer.model, lambda p: p.main_grad)
        _, norm = trainer.step(rows, 1e-2)
        later = trainer.gradient(rows).reduced().mean_loss
        if keep:
            checkpoint.save_step(keep, 1, trainer.model, trainer.optimizer, plan, identity={}, position={}, keep=1)
        factors = adapters.gathered(trainer.model)
        return Run(loss, norm, later, gradients, factors, [base, checkpoint.weights_digest(trainer.model)])


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """(Hugging Face folder, one process's run) of each family, made once."""
    made = {}

    def reference(family: str) -> tuple[Path, Run]:
        if family not in made:
            hf = tiny.hf_folder(tmp_path_factory.mktemp(family), FAMILIES[family])
            made[family] = hf, updated(hf, family, ParallelPlan(), adapted.lora(FAMILIES[family]))
        return made[family]

    return reference


@pytest.mark.parametrize("family, plan", CELLS)
def test_adapters_train_as_on_one_process(two_ranks, references, family, plan, tmp_path):
    hf, alone = references(family)
    arguments = dict(hf=hf, family=family, plan=PLANS[plan], lora=adapted.lora(FAMILIES[family]), keep=tmp_path)
    found = two_ranks.run(updated, **arguments)[0]
    for name in ("loss", "norm", "later"):
        assert getattr(found, name) == pytest.approx(getattr(alone, name), rel=TOLERANCE), name
    assert found.gradients.keys() == alone.gradients.keys()
    largest = max(gradient.abs().max() for gradient in alone.gradients.values())
    for name, gradient in alone.gradients.items():
        assert (found.gradients[name] - gradient).abs().max() <= TOLERANCE * largest, name
    assert found.base == alone.base and found.base[0] == found.base[1]
    # One process reads what two wrote.
    factors = loaded(hf, family, tmp_path / "step_1", adapted.lora(FAMILIES[family]))
    assert all(torch.equal(factors[name], factor) for name, factor in found.factors.items())


@pytest.mark.parametrize("plan, targets", [("PP2", ["o_proj"]), ("EP2", ["experts"])])
def test_ranks_without_an_adapter_of_their_own_take_part(two_ranks, references, plan, targets, tmp_path):
    """A stage that has none of the targets, or experts alone, for which mcore has an optimizer of its own."""
    hf, _ = references("nemotron_h")
    lora = adapted.lora(FAMILIES["nemotron_h"], targets=targets)
    alone = updated(hf, "nemotron_h", ParallelPlan(), lora)
    found = two_ranks.run(updated, hf=hf, family="nemotron_h", plan=PLANS[plan], lora=lora, keep=tmp_path)[0]
    assert (found.loss, found.norm, found.later) == pytest.approx((alone.loss, alone.norm, alone.later), rel=TOLERANCE)
    factors = loaded(hf, "nemotron_h", tmp_path / "step_1", lora)
    assert all(torch.equal(factors[name], factor) for name, factor in found.factors.items())


def loaded(hf: Path, family: str, step: Path, lora: LoraConfig) -> dict[str, torch.Tensor]:
    of, plan = FAMILIES[family], ParallelPlan()
    with ranks.started(plan, seed=1):
        model = tiny.parts(hf, of, plan)
        adapters.attach(model, tiny.family(of), of, lora, seed=99)
        trainer = Trainer(model, plan, AdamW(weight_decay=0.1))
        checkpoint.load_step(step, trainer.model, trainer.optimizer, plan, {})
        return adapters.gathered(trainer.model)
