"""Weights saved under one layout load under every other legal one: not a bit of them changes."""

from itertools import product
from pathlib import Path

import pytest
import torch

from megatron_ext.entrypoints import import_hf
from megatron_ext.model_folders import model_folder
from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan, Workload
from megatron_ext.parallel.rules import check
from megatron_ext.weights import checkpoint
from tests.megatron_ext import tiny
from tests.megatron_ext.cells import FAMILIES as PARALLEL

FAMILIES = PARALLEL | {"nemotron_h": tiny.NEMOTRON_H_DIMS, "nanochat": tiny.NANOCHAT_DIMS}


def layouts(dims, at_most: int) -> dict[str, tuple[int, ParallelPlan]]:
    """Name -> (ranks, plan): all legal ones of the axes that split weights, on the fewest ranks that they need."""
    found = {}
    shape = tiny.family(dims).config.shape(dims)
    for tensor, pipeline, virtual, expert, expert_tensor in product((1, 2, 4), (1, 2, 4), (1, 2), (1, 2, 4), (1, 2, 4)):
        size = pipeline * max(tensor, expert * expert_tensor)
        plan = ParallelPlan(
            tensor=tensor, sequence_parallel=tensor > 1, pipeline=pipeline, virtual=virtual, expert=expert,
            expert_tensor=expert_tensor,
        )  # fmt: skip
        if size <= at_most and not check(plan, Workload(size, shape, pack_length=64, align=8, gpus=False)):
            found[f"TP{tensor} PP{pipeline}x{virtual} EP{expert} ETP{expert_tensor}"] = (size, plan)
    return found


def _loaded(dims, plan: ParallelPlan, weights: Path) -> list[torch.nn.Module]:
    model = tiny.family(dims).build(dims, plan, torch.float32)
    checkpoint.load_weights(model, weights)
    return model


def save(dims, plan: ParallelPlan, source: Path, target: Path) -> None:
    with ranks.started(plan):
        checkpoint.save_weights(_loaded(dims, plan, source), target)


def digests(dims, plan: ParallelPlan, folders: list[Path]) -> list[str]:
    with ranks.started(plan):
        return [checkpoint.weights_digest(_loaded(dims, plan, folder)) for folder in folders]


@pytest.mark.parametrize("at_most", [2, pytest.param(4, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name == "gpt_oss" else [pytest.mark.soak]) for name in FAMILIES
])  # fmt: skip
def test_weights_of_every_layout_load_under_every_other(name, at_most, two_ranks, four_ranks, tmp_path):
    dims = FAMILIES[name]
    found = layouts(dims, at_most)

    def run(size: int, function, **arguments):
        pool = {2: two_ranks, 4: four_ranks}.get(size)
        return pool.run(function, dims=dims, **arguments) if pool else [function(dims=dims, **arguments)]

    (tmp_path / "model").mkdir()
    facts = import_hf.run(import_hf.Config(str(tiny.hf_folder(tmp_path / "hf", dims))), tmp_path / "model", tmp_path)
    imported = tmp_path / "model" / "weights"
    for layout, (size, plan) in found.items():
        run(size, save, plan=plan, source=imported, target=tmp_path / layout)
    folders = [imported, *(tmp_path / layout for layout in found)]
    for layout, (size, plan) in found.items():
        for on_rank in run(size, digests, plan=plan, folders=folders):
            assert on_rank == [facts["weights_digest"]] * len(folders), layout
    print(f"{name}: {len(found)} layouts, each loads what each wrote: {', '.join(found)}")
    assert len(found) >= 3
    assert model_folder.open_folder(tmp_path / "model").weights_digest == facts["weights_digest"]
