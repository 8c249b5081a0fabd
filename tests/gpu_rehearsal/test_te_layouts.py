"""Parallel equals serial where Transformer Engine's layers compute: each layout of each family, with the parts that
`auto` chooses for it on an H100, beside one process of our own layers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.entrypoints.certify import ALIGN, DOCUMENTS
from megatron_ext.parallel.parts import AUTO, OURS, TE
from megatron_ext.parallel.plan import ParallelPlan, Workload
from megatron_ext.parallel.rules import check
from tests.gpu_rehearsal.mixtures import H100, by_auto
from tests.megatron_ext import tiny
from tests.megatron_ext.cells import CELLS, FAMILIES, Cell

pytestmark = pytest.mark.rehearsal

CLOSE = 1e-5  # of losses, relative
CLOSE_GRADIENTS = 1e-4  # sums in another order
ROW = sum(DOCUMENTS[0])  # tokens
PACKS = DOCUMENTS * 2
RING = [  # which our own attention does not have
    Cell("packed CP2 ring", 2, ParallelPlan(context=2, context_comm="p2p")),
    Cell("TP2 SP x CP2 ring", 4, ParallelPlan(tensor=2, context=2, context_comm="p2p", sequence_parallel=True)),
]


def workload(name: str, ranks: int) -> Workload:
    shape = tiny.family(FAMILIES[name]).config.shape(FAMILIES[name])
    return Workload(ranks, shape, pack_length=ROW, align=ALIGN, global_batch=len(PACKS), gpus=False, backend=AUTO,
                    machine=H100, dtype="bfloat16")  # fmt: skip


@dataclass
class References:
    """One process of our own layers, by family and whether a document fills its row; made at first use."""

    solo: Any
    root: Path
    made: dict[Any, Any]

    def weights(self, name: str) -> Path:
        folder = self.root / name.replace(" ", "_")
        if not folder.is_dir():
            self.solo.te("write_weights", of=FAMILIES[name], folder=folder)
        return folder

    def of(self, name: str, whole: bool) -> Any:
        if (name, whole) not in self.made:
            given = problem(name, ParallelPlan(), whole) | dict(made_of=OURS, weights=self.weights(name))
            (self.made[name, whole],) = self.solo.te("measured", **given)
        return self.made[name, whole]


@pytest.fixture(scope="session")
def references(solo, tmp_path_factory) -> References:
    return References(solo, tmp_path_factory.mktemp("references"), {})


def problem(name: str, plan: ParallelPlan, whole: bool) -> dict[str, Any]:
    from megatron_ext.device import init_device

    init_device()  # before megatron-core is imported
    from megatron_ext.training.certify import random_pack

    dims = FAMILIES[name]
    packs = [random_pack([ROW] if whole else lengths, dims.vocabulary, i) for i, lengths in enumerate(PACKS)]
    return dict(family=tiny.family(dims), dims=dims, plan=plan, packs=packs)


EVERYWHERE = {"packed CP2 ring", "packed CP2 all-to-all", "PP2", "TP2 EP2 SP", "EP2"}
SHORT = [
    (name, cell)
    for cell in [*CELLS, *RING]
    for name in FAMILIES
    if not cell.soak and (name == "qwen2" or cell.name in EVERYWHERE)
]
EVERY = [
    pytest.param(name, cell, id=f"{name}-{cell.name}", marks=[] if (name, cell) in SHORT else [pytest.mark.soak])
    for cell in [*CELLS, *RING]
    for name in FAMILIES
    if not check(cell.plan, workload(name, cell.ranks))
]


@pytest.mark.parametrize("name, cell", EVERY)
def test_parallel_equals_serial(request, references, name, cell):
    from megatron_ext.training.certify import difference

    pool = request.getfixturevalue("pair" if cell.ranks == 2 else "four")
    made_of = by_auto(FAMILIES[name], cell.plan)
    assert made_of.linear == TE
    given = problem(name, cell.plan, cell.whole) | dict(made_of=made_of, weights=references.weights(name))
    found = pool.te("measured", **given)
    result = difference(found[0], references.of(name, cell.whole))
    assert max(result.loss, result.later_loss) <= CLOSE, result
    assert max(result.gradient, result.norm) <= CLOSE_GRADIENTS, result
    assert len({(one.loss, one.later_loss, one.norm) for one in found}) == 1


def test_the_table_has_transformer_engines_attention_in_every_way_of_meeting():
    """Else it would show our own attention only."""
    by_te = {
        (cell.plan.context > 1 and cell.plan.context_comm, by_auto(FAMILIES[name], cell.plan).attention)
        for name, cell in SHORT
    }
    assert {(False, TE), ("p2p", TE), ("a2a", TE), ("all_gather", "torch")} <= by_te
