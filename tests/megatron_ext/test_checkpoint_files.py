"""The files of a step: as many as nodes, hashed and synced by who writes them; steps of before resume all the same."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_tools.base import digests, durable
from megatron_ext.files import step_manifest
from megatron_ext.parallel import ranks
from megatron_ext.weights import checkpoint, dist_weights, exchange
from megatron_ext.weights.dist_weights import Piece, Region
from megatron_ext.weights.told import Everything, Told, everything
from tests.megatron_ext import tiny
from tests.megatron_ext.training import LAYOUTS, MODEL, metrics, steady, stop_at, train_to_end

PLAN = LAYOUTS["TP2"]  # whose ranks draw different numbers
AROUND = {".metadata", "common.pt", "metadata.json"}


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return tiny.hf_folder(tmp_path_factory.mktemp("hf"), MODEL)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=20))
def test_each_node_has_one_file_whose_parts_lie_end_to_end(of_ranks):
    nodes, sizes = zip(*of_ranks)
    places = [exchange.place_of(rank, nodes, sizes) for rank in range(len(nodes))]
    assert {place.file for place in places} == set(range(len(set(nodes))))
    for file in range(len(set(nodes))):
        own = [(place.start, size) for place, size in zip(places, sizes) if place.file == file]
        assert [start for start, _ in own] == [sum(size for _, size in own[:i]) for i in range(len(own))]
        assert len({node for node, place in zip(nodes, places) if place.file == file}) == 1


def train_on_nodes(node_of: list[int], **arguments) -> dict:
    """`train_to_end` as if this rank were on that node."""
    real = exchange.node
    exchange.node = lambda: node_of[ranks.rank_of_environment()]
    try:
        return train_to_end(**arguments)
    finally:
        exchange.node = real


@pytest.fixture(scope="module")
def whole(two_ranks, hf, tmp_path_factory) -> tuple[Path, list[dict]]:
    """A training whose two ranks share a node: its folder, and what each rank found."""
    keep = tmp_path_factory.mktemp("whole")
    found = two_ranks.run(train_to_end, plan=PLAN, hf=hf, keep=keep, keep_checkpoints=9)
    assert found[0]["random"] != found[1]["random"]
    return keep, found


def names(step: Path) -> set[str]:
    return {path.name for path in (step / "state").iterdir()}


def resumes_as(whole: tuple[Path, list[dict]], resumed: list[dict], keep: Path) -> None:
    """Each rank's random numbers, too, go on where they were."""
    assert resumed == [{**found, "resumed_from": 4} for found in whole[1]]
    assert [steady(line) for line in metrics(keep)] == [steady(line) for line in metrics(whole[0])]


def test_files_are_as_many_as_nodes_and_any_of_them_resumes_to_the_bit(two_ranks, hf, whole, tmp_path):
    assert names(whole[0] / "checkpoints" / "step_4") == {"__0_0.distcp", *AROUND}
    arguments = dict(plan=PLAN, hf=hf, keep=tmp_path, keep_checkpoints=9)
    two_ranks.run(train_on_nodes, node_of=[7, 5], **arguments)
    assert names(tmp_path / "checkpoints" / "step_4") == {"__0_0.distcp", "__1_0.distcp", *AROUND}
    stop_at(tmp_path, 4)
    resumes_as(whole, two_ranks.run(train_to_end, **arguments), tmp_path)
    assert names(tmp_path / "checkpoints" / "step_6") == {"__0_0.distcp", *AROUND}


def as_before(step: Path) -> None:
    """Make a step what it was before: a file of random states a rank, and each file hashed as a whole."""
    manifest, problem = step_manifest.read(step)
    assert not problem
    (step / "rng").mkdir()
    files = {}
    for rank, (file, start, size) in enumerate(manifest.pop("rng")):
        (step / "rng" / f"{rank}.pt").write_bytes((step / file).read_bytes()[start : start + size])
        files[f"rng/{rank}.pt"] = [size, durable.sha256_file(step / "rng" / f"{rank}.pt")]
    for file in manifest["files"]:
        files[file] = [(step / file).stat().st_size, durable.sha256_file(step / file)]
    durable.write_checked(step / "manifest.json", {**manifest, "format": 2, "files": files})


def test_a_step_of_before_resumes_to_the_bit(two_ranks, hf, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "keep")
    stop_at(tmp_path / "keep", 4)
    as_before(tmp_path / "keep" / "checkpoints" / "step_4")
    resumed = two_ranks.run(train_to_end, plan=PLAN, hf=hf, keep=tmp_path / "keep", keep_checkpoints=9)
    resumes_as(whole, resumed, tmp_path / "keep")


def newest_valid(root: Path) -> list[str]:
    with ranks.started(PLAN):
        return checkpoint.newest_valid(root)[1]


def test_a_changed_byte_anywhere_is_found_and_its_file_named(two_ranks, whole, tmp_path):
    """In either rank's part, its tensors, its random states, and what fills it up; of steps of before too."""
    for name, change in (("now", lambda step: None), ("before", as_before)):
        shutil.copytree(whole[0] / "checkpoints", tmp_path / name)
        change(tmp_path / name / "step_6")
        manifest, _ = step_manifest.read(tmp_path / name / "step_6")
        places = step_manifest.places(manifest)
        assert len(places) == {"now": 2 + 3, "before": 1 + 3 + 2}[name]
        for place in places[:: 1 if name == "now" else 3]:
            file = tmp_path / name / "step_6" / place.file
            data = file.read_bytes()
            at = place.start + place.size - 1
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            for notes in two_ranks.run(newest_valid, root=tmp_path / name):
                assert notes == [f"step_6 is damaged and was skipped: {place.file} has other bytes than were written"]
            file.write_bytes(data)


@pytest.mark.parametrize(
    "rng", [None, [["state/x", 0, 1]], [["state/__0_0.distcp", 0]], [["state/__0_0.distcp", "0", 1]]]
)
def test_places_of_random_states_that_are_none_are_refused(whole, tmp_path, rng):
    shutil.copytree(whole[0] / "checkpoints" / "step_6", tmp_path / "step_6")
    manifest, _ = step_manifest.read(tmp_path / "step_6")
    durable.write_checked(tmp_path / "step_6" / "manifest.json", {**manifest, "rng": rng})
    assert "for the places of random states" in step_manifest.read(tmp_path / "step_6")[1]


# ---------------------------------------------------------------- what rank 0 does alone


def told_by(rank: int, nodes: int, world: int) -> Told:
    """What a rank of a made-up training wrote: a row of one tensor."""
    file = f"__{rank * nodes // world}_0.distcp"
    region = Region("w", (world, 4), (rank, 0), (1, 4))
    sums = {"w": ("float32", (world, 4), rank)}
    return Told(file, (64, f"{rank:064x}"), [Piece(region, "float32", file, 0, 64)], sums, rng=(0, 8), updates=rank)


def test_what_a_rank_tells_arrives_as_it_was(tmp_path):
    told = [told_by(rank, 2, 4) for rank in range(4)]
    assert everything([each.packed() for each in told]) == Everything(
        pieces=[piece for each in told for piece in each.pieces],
        files={f"__{n}_0.distcp": [each.part for each in told[2 * n : 2 * n + 2]] for n in range(2)},
        rng=[(each.file, 0, 8) for each in told],
        sums={"w": ("float32", (4, 4), 6)},
        updates=3,
    )


def test_ranks_that_wrote_a_region_twice_or_not_are_refused():
    told = [told_by(rank, 2, 4).packed() for rank in range(4)]
    for words in (told[:3], [*told, told[0]]):
        with pytest.raises(RuntimeError, match="w has 16 elements, and ranks wrote"):
            everything(words)


def test_rank_zero_syncs_and_reads_as_little_of_a_thousand_nodes_as_of_two(tmp_path, monkeypatch):
    """What others wrote, they hashed and synced."""
    synced, opened, fsync, of_file = [], [], os.fsync, digests._hashed
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(handle) or fsync(handle))
    monkeypatch.setattr(digests, "_hashed", lambda file, size: opened.append(file.name) or of_file(file, size))
    counts = []
    for nodes in (2, 1000):
        temporary = tmp_path / f".step_{nodes}.tmp"
        (temporary / "state").mkdir(parents=True)
        for node in range(nodes):
            (temporary / "state" / f"__{node}_0.distcp").write_bytes(b"as it was told")
        written = everything(told_by(rank, nodes, nodes).packed() for rank in range(nodes))
        synced.clear(), opened.clear()
        facts = {"step": nodes, "identity": {}, "position": {}, "layout": "", "vocabulary": 1}
        checkpoint.publish(temporary, tmp_path / f"step_{nodes}", written, facts)
        counts.append((len(synced), len(opened)))
        assert step_manifest.read(tmp_path / f"step_{nodes}")[1] == ""
    assert counts[0] == counts[1] and counts[0][1] == 1  # its own metadata.json


def saved(folder: Path, hf: Path) -> tuple[int, str]:
    """Save weights; return how many objects of all ranks this one got, and their digest."""
    with ranks.started(PLAN):
        model = tiny.model(hf, MODEL, PLAN)
        got = exchange.to_rank_zero("a word", None)
        return len(got), checkpoint.save_weights(model, folder)


def test_weights_are_told_to_rank_zero_alone_and_everybody_knows_their_digest(two_ranks, hf, tmp_path):
    (first, digest), (second, same) = two_ranks.run(saved, folder=tmp_path / "weights", hf=hf)
    assert (first, second) == (2, 0) and digest == same
    told = digests.told_below(tmp_path)
    files = {path.name for path in (tmp_path / "weights").iterdir()} - {digests.DIGESTS}
    assert {Path(name).name for name in told} == files == {"__0_0.distcp", *AROUND}
    for name, parts in told.items():
        assert digests.sha256(tmp_path / name, [size for size, _ in parts]) == digests.whole(parts)


def test_the_bytes_of_a_piece_are_known_before_it_is_written(tmp_path):

    writer, expected = dist_weights.Writer(tmp_path), 0
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for size in ((), (1,), (3, 5), (70_000,), (2, 1, 300)):
            writer.write(Region("w", size, (0,) * len(size), size), torch.zeros(size, dtype=dtype))
            expected += dist_weights.stored_bytes(size, dtype)
    assert writer.close()[0] == expected == (tmp_path / writer.name).stat().st_size
