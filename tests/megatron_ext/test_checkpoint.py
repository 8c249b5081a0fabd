"""What a rank puts into a checkpoint, when it is published, what is kept, and what another training begins from."""

import math
import threading
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_tools.mistake import UserMistake
from megatron_ext.entrypoints import sft
from megatron_ext.files import step_manifest
from megatron_ext.model_folders import model_folder
from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan, Site
from megatron_ext.training import supervised
from megatron_ext.training.update import AdamW, Trainer
from megatron_ext.weights import checkpoint, dist_weights, random_states, staging
from tests.megatron_ext import tiny
from tests.megatron_ext.training import metrics, run_of, sft_config, train_to_end

PLAN = ParallelPlan()


@pytest.fixture
def hf(tmp_path) -> Path:
    return tiny.hf_folder(tmp_path / "hf")


@given(shape=st.lists(st.integers(1, 5), min_size=0, max_size=4), data=st.data())
def test_boxes_cover_a_flat_range_once_and_nothing_else(shape, data):
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    flat, seen = numpy.arange(size).reshape(shape), []
    for offset, extent, first in staging.boxes(tuple(shape), start, stop):
        box = flat[tuple(slice(o, o + n) for o, n in zip(offset, extent))]
        assert box.size and box.ravel().tolist() == list(range(first, first + box.size))
        seen += box.ravel().tolist()
    assert sorted(seen) == list(range(start, stop))


def updated(hf: Path, steps: int = 1) -> Trainer:
    """A trainer some updates after the weights in `hf`."""
    trainer = Trainer(tiny.model(hf, tiny.DIMS, PLAN), PLAN, AdamW())
    for k in range(steps):
        trainer.step(supervised.rows_of_step(tiny.Packs(), k, run_of(), PLAN), 0.01)
    return trainer


def state_of(trainer: Trainer) -> list[torch.Tensor]:
    saver = staging.OptimizerState(trainer.model, trainer.optimizer)
    return [part.data.clone() for part in staging.Weights(trainer.model).parts() + saver.parts()]


def test_training_goes_on_while_a_step_is_saved_and_the_step_is_what_it_was(alone, hf, tmp_path, monkeypatch):
    trainer, may_write, write = updated(hf), threading.Event(), checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", lambda *of: may_write.wait(60) and write(*of))
    saver = checkpoint.Saver(tmp_path, trainer.model, trainer.optimizer, PLAN, keep=2, background=True)
    expected = state_of(trainer)
    saver.save(1, {}, {})
    trainer.step(
        supervised.rows_of_step(tiny.Packs(), 1, run_of(), PLAN), 0.01
    )  # a save that were held up would never end
    assert not any(torch.equal(a, b) for a, b in zip(state_of(trainer), expected) if a.numel() > 1)
    assert checkpoint.steps(tmp_path) == []  # nothing is named a step before it is whole
    may_write.set()
    saver.close()
    other = Trainer(tiny.model(hf, tiny.DIMS, PLAN), PLAN, AdamW())
    assert checkpoint.load_step(tmp_path / "step_1", other.model, other.optimizer, PLAN, {})[0] == 1
    assert all(torch.equal(a, b) for a, b in zip(state_of(other), expected))


def test_what_goes_wrong_in_the_background_is_raised_in_training(alone, hf, tmp_path, monkeypatch):
    trainer = updated(hf)
    saver = checkpoint.Saver(tmp_path, trainer.model, trainer.optimizer, PLAN, keep=2, background=True)
    monkeypatch.setattr(checkpoint, "_write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    saver.save(1, {}, {})
    with pytest.raises(OSError, match="No space left"):
        saver.wait()
    assert checkpoint.steps(tmp_path) == []


def test_a_checkpoint_that_lacks_part_of_a_tensor_is_never_published(alone, hf, tmp_path, monkeypatch):
    trainer, write = updated(hf), checkpoint._write

    def without_some_rows(*arguments):
        told = write(*arguments)
        first, *others = told.pieces
        return replace(told, pieces=[replace(first, region=replace(first.region, size=(1, 1))), *others])

    monkeypatch.setattr(checkpoint, "_write", without_some_rows)
    with pytest.raises(RuntimeError, match="elements, and ranks wrote"):
        checkpoint.save_step(tmp_path, 1, trainer.model, trainer.optimizer, PLAN, identity={}, position={}, keep=2)
    assert checkpoint.steps(tmp_path) == []


def test_the_newest_and_the_milestones_are_kept(hf, tmp_path):
    assert checkpoint.surplus([1, 2, 3, 4, 5, 6], keep=2, milestone=3) == [4, 2, 1]
    train_to_end(PLAN, hf, tmp_path, steps=7, of=tiny.DIMS, checkpoint_every=1, keep_every=3, keep_checkpoints=1)
    assert checkpoint.steps(tmp_path / "checkpoints") == [7, 6, 3]


def test_ranks_share_the_writing_of_what_they_all_hold(two_ranks, hf, tmp_path):
    """Data-parallel ranks hold the same weights and each half of the optimizer's state."""
    two_ranks.run(train_to_end, plan=PLAN, hf=hf, keep=tmp_path, steps=1, of=tiny.DIMS)
    manifest, _ = step_manifest.read(tmp_path / "checkpoints" / "step_1")
    sizes = [size for size, _ in manifest["files"]["state/__0_0.distcp"]]
    assert len(sizes) == 2 and max(sizes) < 1.3 * min(sizes)


# ---------------------------------------------------------------- beginning from weights


def digest_after_nothing(folder: dict[str, Path], out: Path, **changes) -> dict:
    out.mkdir()
    return sft.run(replace(sft_config(folder, 1), lr=1e-12, **changes), out, out.with_suffix(".keep"))


def test_weights_come_from_any_folder_step_or_training(calculator, tmp_path):
    keep, out = (
        tmp_path / "key",
        tmp_path / "key" / "work" / "0000.a1",
    )  # as a phase lays them (jobs/artifacts/layout.py)
    out.mkdir(parents=True)
    config = replace(sft_config(calculator, 10), keep_checkpoints=9)
    sft.run(config, out, keep)
    left = [*(keep / "checkpoints").rglob("*"), *out.rglob("*")]
    held = sum(path.stat().st_size for path in left if path.is_file())
    # What `plan` says of the disk is the least it takes; of a model as small as this, more than half is other files.
    assert held / 3 < sft.costs(config, Site(1))["bytes"] <= held
    losses = {line["step"]: line["loss"] for line in metrics(keep)}
    for init_from, step, expected in (
        (out, 0, 10), (keep, 5, 5), (out, 5, 5), (keep, 0, 10), (keep / "checkpoints" / "step_5", 0, 5),
    ):  # fmt: skip
        weights, digest = model_folder.weights_at(init_from, step)
        manifest, _ = step_manifest.read(keep / "checkpoints" / f"step_{expected}")
        assert digest == manifest["weights_digest"] and (weights / ".metadata").is_file()
    facts = digest_after_nothing(calculator, tmp_path / "again", init_from=str(keep), init_step=10)
    assert facts["resumed_from"] == 0 and facts["step"] == 1  # weights only: its steps begin anew
    assert facts["loss_first"] < losses[5]
    with pytest.raises(UserMistake, match="init_step: .* has no step 7: it has 5, 10"):
        model_folder.weights_at(keep, 7)
    with pytest.raises(UserMistake, match="is no model folder, and has no checkpoints"):
        model_folder.weights_at(tmp_path)


def test_weights_of_another_model_are_refused(calculator, tmp_path):
    """Also those of another vocabulary, which mcore would take for padding."""
    folder = model_folder.open_folder(calculator["base"])
    for changes, said in ((dict(vocabulary=24), "vocabulary has 24 rows"), (dict(ffn=24), "mlp.linear_fc1.weight is")):
        other = tiny.hf_folder(tmp_path / said, replace(folder.dims, **changes))
        keep = tmp_path / f"{said}.keep"
        train_to_end(PLAN, other, keep, steps=1, of=replace(folder.dims, **changes))
        weights, _ = model_folder.weights_at(keep)
        with pytest.raises(UserMistake, match=f"init_from: .* is not of the model .*: .*{said}"):
            model_folder.check_same_model(folder, weights)


def test_stored_pieces_are_read_by_the_plain_reader_too(alone, hf, tmp_path):
    """What import and export read without megatron-core (dist_weights.py)."""
    model = tiny.model(hf, tiny.DIMS, PLAN)
    checkpoint.save_weights(model, tmp_path / "weights")
    reader = dist_weights.Reader(tmp_path / "weights")
    key = "embedding.word_embeddings.weight"
    _, shape = reader.tensors()[key]
    found = reader.read(dist_weights.Region(key, shape, (0,) * len(shape), shape))
    assert torch.equal(found, model.embedding.word_embeddings.weight)


@pytest.mark.parametrize(
    "of",
    [tiny.DIMS, *(pytest.param(dims, marks=pytest.mark.soak) for dims in (tiny.GPT_OSS_DIMS, tiny.NEMOTRON_H_DIMS))],
)
def test_a_trained_model_exported_gives_the_same_greedy_tokens_in_transformers(tmp_path, of):
    from transformers import AutoModelForCausalLM

    from megatron_ext.entrypoints import export_hf, import_hf
    from tests.megatron_ext.rollout.test_engine import PROMPTS, SMALL, STOP, Sampling, requests, sampled

    for name in ("base", "trained", "exported"):
        (tmp_path / name).mkdir()
    import_hf.run(import_hf.Config(str(tiny.hf_folder(tmp_path / "hf", of))), tmp_path / "base", tmp_path)
    with ranks.started(PLAN):
        folder = model_folder.open_folder(tmp_path / "base")
        trainer = Trainer(model_folder.load_stages(folder, PLAN), PLAN, AdamW())
        for k in range(3):
            trainer.step(supervised.rows_of_step(tiny.Packs(), k, run_of(), PLAN), 0.01)
        model_folder.write(tmp_path / "trained", trainer.model, folder, step=3)
        found = sampled(staging.stages(trainer.model)[0], SMALL, requests(1), Sampling(temperature=0, max_tokens=9))
    export_hf.run(export_hf.Config(str(tmp_path / "trained")), tmp_path / "exported", tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32).eval()
    for (uid, _), sequence in found.items():
        prompt = torch.tensor([PROMPTS[uid - 100]])
        out = theirs.generate(prompt, do_sample=False, max_new_tokens=9, eos_token_id=STOP, pad_token_id=0)
        assert sequence.completion == out[0, prompt.size(1) :].tolist()


def test_generators_of_a_tracker_come_back_where_they_are(alone, tmp_path, monkeypatch):
    """Trackers that CUDA graphs may use keep generators, which graphs hold on to; the file has their states."""
    from megatron.core.tensor_parallel import random as mcore_random

    tracker = mcore_random.CudaRNGStatesTracker()
    generators = {name: torch.Generator().manual_seed(seed) for seed, name in enumerate(("a", "b"))}
    tracker.set_states(dict(generators))
    monkeypatch.setattr(mcore_random, "get_cuda_rng_tracker", lambda: tracker)
    (tmp_path / "0.pt").write_bytes(random_states.stored())
    wanted = [torch.rand(3, generator=generator) for generator in generators.values()]
    random_states.restore(random_states.read(tmp_path, "0.pt", 0, None))
    assert tracker.get_states() == generators
    assert all(map(torch.equal, wanted, [torch.rand(3, generator=generator) for generator in generators.values()]))
