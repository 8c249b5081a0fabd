"""Packed training, under every layout, is a loop over single documents: several updates, with losses, gradient norms
and weights compared. The loop knows neither packs nor mcore's optimizer and schedules."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.entrypoints.certify import DOCUMENTS
from megatron_ext.layers.loss_head import Targets
from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.parallel.rules import check
from megatron_ext.training import certify
from megatron_ext.training.certify import random_pack
from megatron_ext.training.update import AdamW, Trainer
from megatron_ext.weights import checkpoint
from tests.megatron_ext import tiny
from tests.megatron_ext.cells import CELLS, FAMILIES, Cell
from tests.megatron_ext.table import Table
from tests.megatron_ext.test_certify import ROW, workload

STEPS = 3
RATE, DECAY, CLIP = 1e-3, 0.1, 0.5  # gradients are larger than this: every step clips
TOLERANCE = 1e-5  # of losses and norms, relative
VARIANTS = {"qwen3 untied", "nemotron_h dense", *tiny.KINDS}  # of a family that is here already
TRAVELLED = 1e-3  # of weights: how far apart two trainings of a tensor end, relative to how far they came


@dataclass(frozen=True)
class Trained:
    """Of each update the mean loss before it and the gradient's norm before clipping; then the weights."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]


def packs_of(step: int, whole: bool, vocabulary: int) -> list[Any]:
    """The global batch of an update: four rows of several documents each, or of one."""
    return [
        random_pack([ROW] if whole else lengths, vocabulary, len(DOCUMENTS) * 2 * step + i)
        for i, lengths in enumerate(DOCUMENTS * 2)
    ]


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def weights_in(of: Any, folder: Path) -> dict[str, torch.Tensor]:
    with ranks.started(ParallelPlan()):
        (model,) = tiny.family(of).build(of, ParallelPlan(), torch.float32)
        checkpoint.load_weights(model, folder)
        return parameters(model)


def train_on_documents(of: Any, weights: Path, whole: bool) -> Trained:
    """One document after the other, as plain sequences, and torch's AdamW."""
    losses, norms = [], []
    with ranks.started(ParallelPlan()):
        (model,) = tiny.family(of).build(of, ParallelPlan(), torch.float32)
        checkpoint.load_weights(model, weights)
        trained = [p for p in model.parameters() if p.requires_grad]
        by_decay = [
            dict(params=[p for p in trained if (p.dim() > 1) == decays], weight_decay=DECAY * decays)
            for decays in (True, False)
        ]
        optimizer = torch.optim.AdamW(by_decay, lr=RATE, betas=(0.9, 0.95), eps=1e-8)
        for step in range(STEPS):
            batch = packs_of(step, whole, of.vocabulary)
            count = sum(int(pack.loss_mask.sum()) for pack in batch)
            total = 0.0
            optimizer.zero_grad()
            for pack in batch:
                for start, end in zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:]):
                    loss = loss_of_document(model, *(getattr(pack, name)[start:end] for name in (
                        "ids", "labels", "loss_mask")))  # fmt: skip
                    (loss / count).backward()
                    total += loss.item()
            losses.append(total / count)
            norms.append(torch.nn.utils.clip_grad_norm_(trained, CLIP).item())
            optimizer.step()
        return Trained(losses, norms, parameters(model))


def loss_of_document(model: torch.nn.Module, ids: Any, labels: Any, mask: Any) -> torch.Tensor:
    """Sum over the supervised tokens of one document that nobody packed."""
    supervised = torch.from_numpy(mask).nonzero().squeeze(1)
    targets = Targets(torch.from_numpy(labels)[supervised])
    places = torch.arange(len(ids))[None]
    return model(torch.from_numpy(ids)[None], places, None, labels=targets, loss_mask=supervised).sum()


def train_on_packs(of: Any, plan: ParallelPlan, weights: Path, whole: bool, out: Path) -> Trained:
    """The training loop's Trainer on these ranks; `weights` of the result are in the folder `out`."""
    losses, norms = [], []
    with ranks.started(plan):
        parts = tiny.family(of).build(of, plan, torch.float32)
        checkpoint.load_weights(parts, weights)
        trainer = Trainer(parts, plan, AdamW(weight_decay=DECAY, clip=CLIP))
        for step in range(STEPS):
            rows = certify.rows_of(packs_of(step, whole, of.vocabulary), plan)
            sums, norm = trainer.step(rows, RATE)
            losses.append(sums.reduced().mean_loss)
            norms.append(norm)
        checkpoint.save_weights(trainer.model, out)
    return Trained(losses, norms, {})


@dataclass
class Start:
    """Weights to begin with, and where the loop over documents leads from them, whether rows are `whole` or not."""

    folder: Path
    weights: dict[str, torch.Tensor]
    trained: dict[bool, Trained]


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> dict[str, Start]:
    """By family, made at first use."""

    class Loops(dict):
        def __init__(self, of: Any, folder: Path):
            self.of, self.folder = of, folder

        def __missing__(self, whole: bool) -> Trained:
            return self.setdefault(whole, train_on_documents(self.of, self.folder, whole))

    class Starts(dict):
        def __missing__(self, name: str) -> Start:
            folder, of = tmp_path_factory.mktemp("start") / "weights", FAMILIES[name]
            with ranks.started(ParallelPlan()):
                certify.write_random_weights(tiny.family(of), of, folder)
            return self.setdefault(name, Start(folder, weights_in(of, folder), Loops(of, folder)))

    return Starts()


def differences(found: Trained, expected: Trained, start: dict[str, torch.Tensor]) -> tuple[float, float, float]:
    """Of losses, of norms, of weights: the largest, relative as TOLERANCE and TRAVELLED say."""
    ways = {name: (expected.weights[name] - start[name]).norm().item() for name in start}
    return (
        max(abs(a / b - 1) for a, b in zip(found.losses, expected.losses, strict=True)),
        max(abs(a / b - 1) for a, b in zip(found.norms, expected.norms, strict=True)),
        max((found.weights[name] - expected.weights[name]).norm().item() / ways[name] for name in ways if ways[name]),
    )


def compare(found: Trained, out: Path, name: str, start: Start, whole: bool) -> tuple[float, float, float]:
    found = replace(found, weights=weights_in(FAMILIES[name], out))
    return differences(found, start.trained[whole], start.weights)


def holds(result: tuple[float, float, float]) -> bool:
    return max(result[:2]) <= TOLERANCE and result[2] <= TRAVELLED


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.soak] if name in VARIANTS else []) for name in FAMILIES
])  # fmt: skip
def test_packed_training_is_a_loop_over_single_documents(starts, tmp_path, name):
    found = train_on_packs(FAMILIES[name], ParallelPlan(), starts[name].folder, False, tmp_path / "out")
    result = compare(found, tmp_path / "out", name, starts[name], False)
    assert holds(result), result


@pytest.fixture(scope="session")
def packed_table(request) -> Table:
    table = Table("Packed training beside a loop over documents: largest differences of losses, norms and weights")
    yield table
    from tests.conftest import TABLES

    request.config.stash.setdefault(TABLES, []).extend(table.lines())


@pytest.mark.soak
@pytest.mark.parametrize("name, cell", [
    pytest.param(name, cell, id=f"{name}-{cell.name}") for cell in CELLS for name in FAMILIES
])  # fmt: skip
def test_so_it_is_under_every_legal_layout(two_ranks, four_ranks, starts, packed_table, tmp_path, name, cell: Cell):
    if check(cell.plan, workload(name, cell.ranks)):
        pytest.skip("refused")  # test_certify.py says why
    pool = {2: two_ranks, 4: four_ranks}[cell.ranks]
    found = pool.run(
        train_on_packs,
        of=FAMILIES[name],
        plan=cell.plan,
        weights=starts[name].folder,
        whole=cell.whole,
        out=tmp_path / "out",
    )
    assert len({(*one.losses, *one.norms) for one in found}) == 1
    result = compare(found[0], tmp_path / "out", name, starts[name], cell.whole)
    packed_table.add(cell.name, name, "  ".join(f"{value:.0e}" for value in result))
    assert holds(result), result
