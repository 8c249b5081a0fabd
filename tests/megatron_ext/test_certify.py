"""Parallel equals serial: the table of layouts by family, documents that see only themselves in every layout, and what
happens below the check where a layout is refused."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from data_tools.base import durable
from data_tools.mistake import UserMistake
from megatron_ext import versions
from megatron_ext.entrypoints import certify as entrypoint
from megatron_ext.entrypoints.certify import ALIGN, DOCUMENTS, TOLERANCE
from megatron_ext.parallel import ranks, shown
from megatron_ext.parallel.plan import ParallelPlan, Workload
from megatron_ext.parallel.rules import check
from megatron_ext.training import certify
from megatron_ext.training.certify import Measured, difference, random_pack
from tests.megatron_ext import shown as of_logs
from tests.megatron_ext import tiny
from tests.megatron_ext.cells import CELLS, FAMILIES, Cell

ROW = sum(DOCUMENTS[0])  # tokens
PACKS = DOCUMENTS * 2  # lengths of documents


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
                certify.measure(tiny.family(dims), dims, ParallelPlan(), weights, packs=packs(whole, dims.vocabulary))
                for whole in (False, True)
            )
            self[name] = Reference(weights, *serial)
            return self[name]

    return References()


@pytest.fixture(scope="session")
def pools(two_ranks, four_ranks) -> dict:
    return {2: two_ranks, 4: four_ranks}


# CI runs every short cell with one family, and with the others those where they differ from it.
OTHERS = {"gpt_oss", "nemotron_h"}
DIFFERENT = {"TP2 EP2 SP", "EP2", "PP2", "packed CP2 all-to-all"}


def named(name: str, cell: Cell) -> Any:
    short = not cell.soak and (name == "qwen2" or (name in OTHERS and cell.name in DIFFERENT))
    return pytest.param(name, cell, id=f"{name}-{cell.name}", marks=[] if short else [pytest.mark.soak])


@pytest.mark.parametrize("name, cell", [named(name, cell) for cell in CELLS for name in FAMILIES])
def test_parallel_equals_serial(pools, references, table, name, cell):
    problems = check(cell.plan, workload(name, cell.ranks))
    if problems:
        table.add(cell.name, name, f"refused {table.note(problems[0].message.split(': use')[0])}")
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
    assert len({(one.loss, one.later_loss, one.norm) for one in found}) == 1


def test_the_manuals_table_is_what_was_measured_and_the_check_still_refuses_the_same():
    told = (Path(versions.__file__).parent / "README.md").read_text()
    table = {name: {family: shown.of(name, family) for family in of} for name, of in shown.SHOWN.items()}
    for row in of_logs.rows(table):
        assert row in told, row
    cells = {shown.layout(cell.plan, cell.ranks): cell for cell in CELLS if not cell.whole}
    for name, families in table.items():
        for family, by_release in families.items():
            assert [*by_release] == [*versions.RELEASES]
            refused = bool(check(cells[name].plan, workload(family, cells[name].ranks)))
            found = by_release[versions.installed()]
            assert refused == (found == "refused") and (refused or float(found) <= TOLERANCE), (name, family)


ISOLATED = ["TP2 SP", "PP2 interleaved", "packed CP2 all-gather", "packed CP2 all-to-all", "TP2 SP x CP2", "EP2"]


LEGAL = [(n, c) for c in CELLS if c.name in ISOLATED for n in FAMILIES if not check(c.plan, workload(n, c.ranks))]


@pytest.mark.parametrize("name, cell", [named(*one) for one in LEGAL])
def test_a_document_sees_only_itself(pools, references, name, cell):
    """The gradient of a document's loss by the others' inputs is zero, and a disturbed document moves no other bit."""
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


# ---------------------------------------------------------------- why the others are refused


@dataclass(frozen=True)
class Refused:
    """A layout that the check refuses, and what it does when it runs all the same: an error, or other gradients."""

    reason: str  # of the check
    plan: ParallelPlan
    error: str = ""
    dims: Any = FAMILIES["qwen2"]
    lengths: tuple[int, ...] = (64, 24, 8)
    batch: int = 4
    ranks: int = 2


SP = dict(sequence_parallel=True)
GPT_OSS = FAMILIES["gpt_oss"]
REFUSED = [
    *[
        Refused("gives wrong expert gradients", ParallelPlan(tensor=2, **SP), dims=GPT_OSS)
        for release in [versions.release()]
        if not release.reduces_whole_experts
    ],
    Refused("only with sequence_parallel", ParallelPlan(tensor=2, expert=2), "sequence parallelism", dims=GPT_OSS),
    Refused("biases cannot be split", ParallelPlan(tensor=2, expert_tensor=2, **SP), "Bias in Moe", dims=GPT_OSS),
    Refused("does not split 5 experts", ParallelPlan(expert=2), "when instantiating", dims=replace(GPT_OSS, experts=5)),
    Refused("needs tensor > 1", ParallelPlan(**SP), "sequence parallelism"),
    Refused("does not split 3 heads", ParallelPlan(tensor=2), "must be a multiple", tiny.dims(heads=3, kv_groups=3)),
    Refused("does not split 49 MLP columns", ParallelPlan(tensor=2), "divisible", dims=tiny.dims(ffn=49)),
    Refused("3 layers do not divide", ParallelPlan(pipeline=2), "divisible", dims=tiny.dims(layers=3)),
    Refused("are 3 layers, the model has 4", ParallelPlan(pipeline=2, pipeline_layers=[1, 2]), "match num_layers 4"),
    Refused("as interleaving needs", ParallelPlan(pipeline=2, virtual=2), "dependency bubbles", batch=3),
    Refused(
        "a hybrid Mamba model has no interleaved pipeline",
        ParallelPlan(pipeline=2, virtual=2),
        "virtual/interleaved pipeline",
        dims=FAMILIES["nemotron_h"],
    ),
    Refused("cuts each into 4 pieces", ParallelPlan(context=2), "does not divide into the 4 chunks", lengths=(90, 6)),
    Refused(
        "does not split the 3 heads",
        ParallelPlan(context=2, context_comm="a2a"),
        "cannot be multiplied",
        dims=tiny.dims(heads=3, kv_groups=3),
    ),
    Refused("97 tokens do not divide", ParallelPlan(tensor=2, **SP), "divisible", lengths=(64, 33)),
    Refused("the model has no experts", ParallelPlan(expert=2), "num_moe_experts must be non None"),
    Refused(
        "does not split 3 Mamba heads",
        ParallelPlan(tensor=2, **SP),
        "do not split over TP 2",
        dims=tiny.hybrid("M*-M", mamba_heads=3, mamba_groups=3),
    ),
    Refused(
        "does not split the 3 Mamba heads",
        ParallelPlan(context=2),
        "do not split over TP 1 and CP 2",
        dims=tiny.hybrid("M*-M", mamba_heads=3, mamba_groups=1),
    ),
    Refused(
        "does not split 25 expert columns",
        ParallelPlan(tensor=2, expert_tensor=2, **SP),
        "divisible",
        dims=tiny.hybrid("ME*-", expert_ffn=25),
    ),
    Refused(
        "needs an uneven all-gather",
        ParallelPlan(tensor=2, expert_tensor=2, expert=2, **SP),
        "allgather: invalid tensor size",
        dims=FAMILIES["nemotron_h"],
        ranks=4,
    ),
]


def attempt(**arguments: Any) -> Measured | str:
    """`certify.measure`, below the check; or the error, which all ranks meet alike."""
    try:
        return certify.measure(**arguments)
    except Exception as error:
        ranks.stop()
        return f"{type(error).__name__}: {error}"


def attempt_with_batched_sends(**arguments: Any) -> Measured | str:
    """With mcore's default way of sending between stages."""
    from megatron_ext.models import decoder_spec

    ours = decoder_spec._pipeline
    decoder_spec._pipeline = lambda *a: ours(*a) | dict(overlap_p2p_comm=False, batch_p2p_comm=True)
    try:
        return attempt(**arguments)
    finally:
        decoder_spec._pipeline = ours


def arguments_of(case: Refused, tmp_path: Path) -> dict[str, Any]:
    """Of `certify.measure`, but the plan."""
    family, weights = tiny.family(case.dims), tmp_path / "weights"
    with ranks.started(ParallelPlan()):
        certify.write_random_weights(family, case.dims, weights)
    batch = [random_pack(case.lengths, case.dims.vocabulary, i) for i in range(case.batch)]
    return dict(family=family, dims=case.dims, weights=weights, packs=batch)


@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.reason, marks=[] if number < 3 else [pytest.mark.soak])  # an error ends a pool of ranks
    for number, case in enumerate(REFUSED)
])  # fmt: skip
def test_what_is_refused_would_fail_or_be_wrong(pools, tmp_path, case):
    shape = tiny.family(case.dims).config.shape(case.dims)
    align = min(length & -length for length in case.lengths)
    asked = Workload(case.ranks, shape, pack_length=sum(case.lengths), align=align, global_batch=case.batch, gpus=False)
    assert any(case.reason in problem.message for problem in check(case.plan, asked))
    arguments = arguments_of(case, tmp_path)
    found = pools[case.ranks].run(attempt, plan=case.plan, **arguments)[0]
    if case.error:
        assert isinstance(found, str) and case.error in found, found
    else:
        result = difference(found, certify.measure(plan=ParallelPlan(), **arguments))
        assert result.loss <= TOLERANCE and result.gradient > 0.1, result  # silent: only the gradient tells


def test_batched_sends_between_interleaved_stages_would_give_wrong_gradients(two_ranks, tmp_path):
    arguments = arguments_of(case := Refused("", ParallelPlan(pipeline=2, virtual=2)), tmp_path)
    found = two_ranks.run(attempt_with_batched_sends, plan=case.plan, **arguments)[0]
    assert difference(found, certify.measure(plan=ParallelPlan(), **arguments)).gradient > 0.1  # and no error


# ---------------------------------------------------------------- the certificate of a training


def test_every_axis_is_reduced_to_two_on_at_most_eight_ranks():
    long = ParallelPlan(tensor=8, context=4, context_comm="p2p", **SP)
    assert entrypoint.reduced(long, 64) == (ParallelPlan(tensor=2, context=2, **SP), 8)
    cut = ParallelPlan(pipeline=4, virtual=3, pipeline_layers=[2] * 11 + [4])
    assert entrypoint.reduced(cut, 4) == (ParallelPlan(pipeline=2, virtual=2, pipeline_layers=[1, 1, 1, 2]), 2)
    assert entrypoint.reduced(ParallelPlan(expert=16), 16) == (ParallelPlan(expert=2), 2)
    assert entrypoint.reduced(ParallelPlan(tensor=2, pipeline=2, context=2, **SP), 32)[1] == 8


@pytest.mark.parametrize("name", FAMILIES)
def test_the_small_model_is_of_the_same_kind(name):
    dims = FAMILIES[name]
    small = entrypoint.shrunk(dims, 4)
    shapes = [tiny.family(dims).config.shape(one) for one in (dims, small)]
    assert shapes[0].blocks == shapes[1].blocks and len(shapes[1].layers) == 4
    assert tiny.family(small).config.read(tiny.family(small).config.hf_config(small)) == (small, [])


def model_folder(root: Path, dims: Any) -> str:
    """As much of one as a certificate needs."""
    (root / "hf").mkdir(parents=True)
    durable.write_json(root / "hf" / "config.json", tiny.family(dims).config.hf_config(dims))
    return str(root)


def test_a_certificate_is_made_once_for_what_it_speaks_of(tmp_path):
    asked = entrypoint.Config(model_folder(tmp_path / "model", tiny.DIMS), 2, ParallelPlan(context=2))
    facts = entrypoint.certificate(asked, tmp_path / "kept")
    assert facts["holds"] and facts["ranks"] == 2 and facts["plan"] == {"context": 2}
    assert max(facts["loss"], facts["gradient"]) <= TOLERANCE and facts["isolation"]["gradients"][0] == 0.0
    (kept,) = (tmp_path / "kept").iterdir()
    before = kept.stat().st_mtime_ns, kept.stat().st_ino
    larger = replace(asked, ranks=4, parallel=ParallelPlan(context=4))  # reduced to the same layout
    assert entrypoint.certificate(larger, tmp_path / "kept") == facts
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == before
    other = replace(asked, parallel=ParallelPlan(context=2, context_comm="a2a"))
    assert entrypoint.key_of(other) != entrypoint.key_of(asked) == entrypoint.key_of(larger)


def test_a_layout_that_cannot_be_certified_says_why(tmp_path):
    model = model_folder(tmp_path / "model", tiny.GPT_OSS_DIMS)
    asked = entrypoint.Config(model, 2, ParallelPlan(tensor=2, expert_tensor=2, **SP))
    with pytest.raises(UserMistake, match="could not be made on 2 ranks: .*biases cannot be split"):
        entrypoint.certificate(asked, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
