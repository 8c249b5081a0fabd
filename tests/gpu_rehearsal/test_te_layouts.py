"""Parallel equals serial where Transformer Engine's layers compute: each layout of each family, with the parts that
`auto` chooses for it on an H100, beside one process of our own layers."""

from collections.abc import Callable
from typing import Any

import pytest

from megatron_ext.entrypoints.certify import ALIGN, DOCUMENTS
from megatron_ext.parallel.parts import AUTO, TE
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


@pytest.fixture(scope="session")
def alone(solo, tmp_path_factory) -> Callable[[str, bool], dict[str, Any]]:
    """The weights of a family and what one process of our own layers computes from them, made at first use."""
    root, made = tmp_path_factory.mktemp("alone"), {}

    def problem(name: str, whole: bool) -> dict[str, Any]:
        if (name, whole) not in made:
            folder = root / f"{name} {whole}".replace(" ", "_")
            folder.mkdir()
            lengths = [[ROW]] * len(PACKS) if whole else PACKS
            given = dict(of=FAMILIES[name], lengths=lengths, weights=folder / "weights", file=folder / "measured")
            solo.te("measured_alone", **given)
            made[name, whole] = given
        return made[name, whole]

    return problem


EVERYWHERE = {"packed CP2 ring", "packed CP2 all-to-all", "PP2", "TP2 EP2 SP"}
SHORT = [
    (name, cell)
    for cell in [*CELLS, *RING]
    for name in FAMILIES
    if not cell.soak and name not in tiny.KINDS and (name == "qwen2" or cell.name in EVERYWHERE)
]
EVERY = [
    pytest.param(name, cell, id=f"{name}-{cell.name}", marks=[] if (name, cell) in SHORT else [pytest.mark.soak])
    for cell in [*CELLS, *RING]
    for name in FAMILIES
    if not check(cell.plan, workload(name, cell.ranks))
]


@pytest.mark.parametrize("name, cell", EVERY)
def test_parallel_equals_serial(request, alone, name, cell):
    pool = request.getfixturevalue("pair" if cell.ranks == 2 else "four")
    made_of = by_auto(FAMILIES[name], cell.plan)
    assert made_of.linear == TE
    found = pool.te("measured_together", **alone(name, cell.whole), plan=cell.plan, made_of=made_of)
    far = found[0][0]
    assert max(far["loss"], far["later_loss"]) <= CLOSE, far
    assert max(far["gradient"], far["norm"]) <= CLOSE_GRADIENTS, far
    assert len({numbers for _, numbers in found}) == 1


def test_the_table_has_transformer_engines_attention_in_every_way_of_meeting():
    """Else it would show our own attention only."""
    by_te = {
        (cell.plan.context > 1 and cell.plan.context_comm, by_auto(FAMILIES[name], cell.plan).attention)
        for name, cell in SHORT
    }
    assert {(False, TE), ("p2p", TE), ("a2a", TE), ("all_gather", "torch")} <= by_te
