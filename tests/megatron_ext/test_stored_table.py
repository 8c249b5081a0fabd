"""What a rank is told of a checkpoint's content: the pieces that touch its boxes, and no others."""

import random
from pathlib import Path

import pytest

from data_tools.mistake import UserMistake
from megatron_ext.files.stored import Stored, StoredPiece, StoredTensor, Table
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.weights import dist_weights
from tests.megatron_ext import tiny

Box = tuple[tuple[int, ...], tuple[int, ...]]


def drawn_box(draw: random.Random, shape: tuple[int, ...]) -> Box:
    offset = tuple(draw.randrange(size) for size in shape)
    return offset, tuple(draw.randint(1, size - begin) for begin, size in zip(offset, shape))


def touch(a: Box, b: Box) -> bool:
    return all(max(p, q) < min(p + n, q + m) for p, n, q, m in zip(*a, *b))


@pytest.mark.parametrize("dimensions", [0, 1, 3])
def test_a_rank_is_told_of_the_pieces_that_touch_its_boxes_alone(dimensions: int) -> None:
    draw = random.Random(dimensions)
    for _ in range(50):
        shape = tuple(draw.randint(1, 9) for _ in range(dimensions))
        pieces = [
            StoredPiece(*drawn_box(draw, shape), f"__{draw.randrange(3)}_0.distcp", number * 64, 64)
            for number in range(draw.randint(0, 12))
        ]
        table = Table.of(Stored({"w": StoredTensor("float32", shape, pieces), "other": StoredTensor("int64", ())}, {}))
        boxes = [drawn_box(draw, shape) for _ in range(draw.randint(0, 3))]
        told = table.cut({"w": boxes, "not there": boxes})
        touched = [piece for piece in pieces if any(touch((piece.offset, piece.size), box) for box in boxes)]
        assert told.tensors == {"w": StoredTensor("float32", shape, touched)}


def load_of(hf: Path, of: object, folder: Path) -> str:
    """Load a checkpoint on this rank, and return what it said and whether it had read what is stored itself."""
    from megatron_ext.parallel import ranks
    from megatron_ext.weights import checkpoint, loading

    opened = []
    real = dist_weights.Reader._open
    dist_weights.Reader._open = lambda reader, foreign: (opened.append(reader.folder), real(reader, foreign))[1]
    with ranks.started(ParallelPlan()):
        model, said = tiny.model(hf, of, ParallelPlan()), "loaded"
        try:
            loading.load(checkpoint.trained_state(model), folder)
        except UserMistake as mistake:
            said = str(mistake)
        finally:
            dist_weights.Reader._open = real
    return f"{said}, {len(opened)} opened"


def test_rank_zero_alone_reads_what_is_stored_and_all_hear_of_it(two_ranks, tmp_path: Path) -> None:
    hf = tiny.hf_folder(tmp_path / "hf", tiny.DIMS)
    two_ranks.run(save, hf=hf, of=tiny.DIMS, folder=tmp_path)
    folder = tmp_path / "step_1" / "state"
    assert two_ranks.run(load_of, hf=hf, of=tiny.DIMS, folder=folder) == ["loaded, 1 opened", "loaded, 0 opened"]
    (folder / ".metadata").write_bytes(b"damaged")
    first, second = two_ranks.run(load_of, hf=hf, of=tiny.DIMS, folder=folder)
    assert "not a distributed checkpoint" in first and second.rpartition(",")[0] == first.rpartition(",")[0]


def save(hf: Path, of: object, folder: Path) -> None:
    from megatron_ext.parallel import ranks
    from megatron_ext.training.update import AdamW, Trainer
    from megatron_ext.weights import checkpoint

    with ranks.started(ParallelPlan()):
        trainer = Trainer(tiny.model(hf, of, ParallelPlan()), ParallelPlan(), AdamW())
        checkpoint.save_step(
            folder, 1, trainer.model, trainer.optimizer, ParallelPlan(), identity={}, position={}, keep=1
        )
