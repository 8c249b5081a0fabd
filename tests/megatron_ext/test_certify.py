"""Parallel equals serial: the table of layouts by family, documents that see only themselves in every layout, and what
happens below the check where a layout is refused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext import certify, ranks
from megatron_ext.certify import Difference, Measured, difference, random_pack
from megatron_ext.models.registry import Family
from megatron_ext.parallel import ParallelPlan, Workload, rule_problems
from tests.megatron_ext import tiny
from tests.megatron_ext.cells import CELLS, FAMILIES, Cell

ROW = 96  # tokens
ALIGN = 8  # tokens: documents split over up to 4 context ranks
PACKS = [[64, 24, 8], [16, 40, 8, 24, 8]] * 2  # lengths of documents
TOLERANCE = 1e-5  # fp32, relative


def packs(whole: bool, vocabulary: int) -> list:
    return [random_pack([ROW] if whole else lengths, vocabulary, i) for i, lengths in enumerate(PACKS)]


def workload(name: str, ranks_: int) -> Workload:
    shape = tiny.family(FAMILIES[name]).config.shape(FAMILIES[name])
    return Workload(ranks_, shape, pack_length=ROW, align=ALIGN, global_batch=len(PACKS), gpus=False)


@dataclass
class Reference:
    """One process."""

    weights: Path
    packed: Measured
    whole: Measured


@pytest.fixture(scope="session")
def references(tmp_path_factory) -> dict[str, Reference]:
    """Made at first use of a family."""

    class References(dict):
        def __missing__(self, name: str) -> Reference:
            weights, dims = tmp_path_factory.mktemp("reference") / "weights", FAMILIES[name]
            with ranks.started(ParallelPlan()):
                certify.write_random_weights(tiny.family(dims), dims, weights)
            serial = (
                certify.measure(tiny.family(dims), dims, ParallelPlan(), weights, packs(whole, dims.vocabulary))
                for whole in (False, True)
            )
            self[name] = Reference(weights, *serial)
            return self[name]

    return References()


@pytest.fixture(scope="session")
def pools(two_ranks, four_ranks) -> dict:
    return {2: two_ranks, 4: four_ranks}


def named(cell: Cell) -> Any:
    return pytest.param(cell, id=cell.name, marks=[pytest.mark.soak] if cell.soak else [])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("cell", [named(cell) for cell in CELLS])
def test_parallel_equals_serial(pools, references, table, name, cell):
    problems = rule_problems(cell.plan, workload(name, cell.ranks))
    if problems:
        table.add(cell.name, name, f"refused: {problems[0].message.split(':')[0]}")
        return
    dims, reference = FAMILIES[name], references[name]
    found = pools[cell.ranks].run(
        certify.measure,
        family=tiny.family(dims),
        dims=dims,
        plan=cell.plan,
        weights=reference.weights,
        packs=packs(cell.whole, dims.vocabulary),
    )
    result = difference(found[0], reference.whole if cell.whole else reference.packed)
    table.add(cell.name, name, f"{result.loss:.0e}  {result.gradient:.0e}  {result.later_loss:.0e}")
    assert result.largest <= TOLERANCE, result
    assert {(one.loss, one.later_loss, one.norm) for one in found} == {(found[0].loss, found[0].later_loss, found[0].norm)}


ISOLATED = ["TP2 SP", "PP2 interleaved", "packed CP2 all-gather", "packed CP2 all-to-all", "TP2 SP x CP2", "EP2"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("cell", [named(cell) for cell in CELLS if cell.name in ISOLATED])
def test_a_document_sees_only_itself(pools, references, name, cell):
    """The gradient of a document's loss by the others' inputs is zero, and a disturbed document moves no other bit."""
    if rule_problems(cell.plan, workload(name, cell.ranks)):
        pytest.skip(f"{name} has no {cell.name}")
    dims = FAMILIES[name]
    found = pools[cell.ranks].run(
        certify.isolation,
        family=tiny.family(dims),
        dims=dims,
        plan=cell.plan,
        weights=references[name].weights,
        lengths=PACKS[1],
        document=1,
    )
    assert all(one == found[0] and one.holds for one in found), found[0]
