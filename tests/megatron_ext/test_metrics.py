"""What a training tells of itself, and that W&B's and TensorBoard's own readers find it."""

import json
import math
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.mistake import UserMistake
from data_tools.progress import Stopped
from megatron_ext.entrypoints import sft
from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan, Site
from megatron_ext.preflight import facts, flops
from megatron_ext.training import metrics, supervised
from megatron_ext.training.rows import micro_batch
from megatron_ext.training.track import Track
from megatron_ext.training.update import AdamW, Trainer, losses_of
from megatron_ext.weights import checkpoint
from tests.megatron_ext import tiny
from tests.megatron_ext.training import MODEL, sft_config

SOAK = pytest.mark.soak
SECRET = "5ec2e7" * 7
PLAN = ParallelPlan()


@pytest.fixture(scope="module")
def tracked(calculator, tmp_path_factory) -> Path:
    """The folder of a training that reports to everything, stopped in the middle and resumed."""
    root = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", SECRET)
        config = replace(sft_config(calculator, 10), track=Track(wandb="offline", project="tests", tensorboard=True))
        config = replace(config, log_every=2, valid_stores=[config.store], valid_packs=[config.packs], validate_every=5)
        for attempt, stops in enumerate(([False] * 6 + [True], [])):
            out = root / f"out{attempt}"
            out.mkdir()
            answers = iter(stops)
            try:
                sft.run(config, out, root / "keep", stop=lambda answers=answers: next(answers, False))
            except Stopped:
                assert stops
    return root / "keep"


def lines_of(keep: Path) -> list[dict]:
    return [json.loads(line) for line in (keep / "metrics.jsonl").read_text().splitlines()]


def test_a_line_says_how_the_steps_went(tracked, calculator):
    lines = [line for line in lines_of(tracked) if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    folder = [json.loads((calculator["packs"] / "plan.json").read_text())][0]
    for line in lines:
        assert line["samples"] == 4 * line["step"] and line["tokens"] == 2 * 4 * 64
        assert 0 < line["supervised_tokens"] + line["padded_tokens"] < line["tokens"]
        assert set(line["parts_s"]) == {"data", "forward_backward", "reduce", "update", "saving"}
        assert sum(line["parts_s"].values()) <= 1.5 * line["step_s"] + line["parts_s"]["saving"]
        assert line["memory_gib"] > 0.1 and line["slowest_rank"] == 0 and line["slowest_ratio"] == 1
        assert line["grad_norm"] > 0 and line["param_norm"] > 0 and line["grad_zeros"] >= 0
        assert "mfu" not in line  # there is no data sheet of a CPU
    whole = sum(line["padded_tokens"] for line in lines) / sum(line["tokens"] for line in lines)
    assert whole == pytest.approx(folder["padded"] / (folder["packs"] * 64), abs=0.1)


def test_validation_is_the_mean_over_all_supervised_tokens(tracked, calculator):
    found = [(line["step"], line["valid_loss"]) for line in lines_of(tracked) if "valid_loss" in line]
    assert [step for step, _ in found] == [5, 10]
    from data_tools.packs.plan import PackReader
    from megatron_ext.model_folders import model_folder

    packs = PackReader(calculator["store"], calculator["packs"])
    with ranks.started(PLAN):
        folder = model_folder.open_folder(calculator["base"])
        model = model_folder.load_model(folder, PLAN)
        checkpoint.load_weights(model, tracked / "checkpoints" / "step_10" / "state")
        with torch.no_grad():
            losses = [losses_of(model, micro_batch([packs.pack(i)])) for i in range(packs.n_packs)]
    assert found[-1][1] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        *(
            pytest.param(plan, marks=SOAK)
            for plan in (ParallelPlan(micro_batch=2), ParallelPlan(pipeline=2, virtual=2))
        ),
    ],
)
def test_ranks_with_fewer_packs_validate_no_pack_twice(two_ranks, tmp_path, plan):
    hf = tiny.hf_folder(tmp_path, MODEL)
    expected = validation(PLAN, hf)
    assert two_ranks.run(validation, plan=plan, hf=hf) == pytest.approx([expected] * 2, rel=1e-5)


def validation(plan: ParallelPlan, hf: Path) -> float:
    with ranks.started(plan):
        trainer = Trainer(tiny.parts(hf, MODEL, plan), plan, AdamW())
        return supervised.validation_loss(trainer, tiny.Packs(n=5))


def test_tensorboards_reader_opens_its_files(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(tracked / "tensorboard")).Reload()
    lines = [line for line in lines_of(tracked) if "loss" in line]
    assert {"loss", "grad_norm", "parts_s/update", "valid_loss"} <= set(reader.Tags()["scalars"])
    found = [(event.step, event.value) for event in reader.Scalars("loss")]
    assert found == [(line["step"], pytest.approx(line["loss"])) for line in lines]


def records(path: Path) -> Iterator[Any]:
    """What wandb wrote, by its own schema: a LevelDB log of protobuf records behind seven bytes of magic."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no header fits into the rest of the block
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a full record, or the last piece of one
            yield Record.FromString(whole)
            whole = b""


def test_wandb_finds_its_offline_runs_and_they_hold_the_metrics(tracked):
    found = subprocess.run([Path(sys.executable).with_name("wandb"), "sync", "--dry-run", "--yes"], cwd=tracked,
                           capture_output=True, text=True, timeout=60)  # fmt: skip
    folders = sorted(tracked.glob("wandb/offline-run-*"))
    assert found.returncode == 0 and f"Would sync {len(folders)} run(s)" in found.stdout + found.stderr
    losses, ids = {}, set()
    for record in (record for folder in folders for record in records(next(folder.glob("run-*.wandb")))):
        if record.HasField("run"):
            ids.add(record.run.run_id)
            assert record.run.project == "tests"
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if "loss" in items:
                losses[record.history.step.num] = json.loads(items["loss"])
    assert len(ids) == 1 < len(folders)  # attempts at one training are one run
    assert losses == {line["step"]: pytest.approx(line["loss"]) for line in lines_of(tracked) if "loss" in line}


def test_no_tracker_leaves_the_key_on_disk(tracked):
    files = [path for path in tracked.rglob("*") if path.is_file()]
    assert any("wandb" in path.name for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


UNTIED = tiny.dims(tied=False)
LAYOUTS = {
    "TP2": (UNTIED, ParallelPlan(tensor=2)),
    "PP2": (UNTIED, ParallelPlan(pipeline=2)),
    "EP2": (tiny.GPT_OSS_DIMS, ParallelPlan(expert=2)),
    "TP2 EP2": (tiny.GPT_OSS_DIMS, ParallelPlan(tensor=2, sequence_parallel=True, expert=2)),
}


@pytest.mark.parametrize("layout", ["PP2", "TP2 EP2", *(pytest.param(name, marks=SOAK) for name in ("TP2", "EP2"))])
def test_norms_and_zeros_are_those_of_one_process(two_ranks, tmp_path, layout):
    of, plan = LAYOUTS[layout]
    hf = tiny.hf_folder(tmp_path, of)
    norm, zeros = measures(PLAN, hf, of)
    assert zeros > 0
    for found in two_ranks.run(measures, plan=plan, hf=hf, of=of):
        assert found == (pytest.approx(norm, rel=1e-6), zeros)


def measures(plan: ParallelPlan, hf: Path, of) -> tuple[float, int]:
    with ranks.started(plan):
        trainer = Trainer(tiny.parts(hf, of, plan), plan, AdamW())
        norm = metrics.parameter_norm(trainer.model)
        few_tokens = micro_batch([tiny.pack([4, 4], 1)])  # the rest of the embedding has no gradient
        trainer.step([few_tokens], 0.0, count_zeros=True)
        return norm, trainer.zeros


def test_the_norm_is_over_each_parameter_once(alone, tmp_path):
    model = tiny.model(tiny.hf_folder(tmp_path, MODEL), MODEL, PLAN)
    expected = math.sqrt(sum(p.double().square().sum().item() for p in model.parameters()))
    assert metrics.parameter_norm([model]) == pytest.approx(expected, rel=1e-6)


def test_mfu_is_the_planners_flops_over_the_data_sheets(calculator, tmp_path, monkeypatch):
    """On a GPU whose driver gives that name, which a CPU is made to give here."""
    monkeypatch.setattr(metrics.device, "machine", lambda: {"gpu": "NVIDIA H100 80GB HBM3"})
    (tmp_path / "out").mkdir()
    config = replace(sft_config(calculator, 2), log_every=2)
    sft.run(config, tmp_path / "out", tmp_path / "keep")
    (line,) = lines_of(tmp_path / "keep")
    training, _ = facts.prepare(replace(config, backend="torch"), config.packs, 4, Site(1))
    assert training.documents.known
    assert line["mfu"] == pytest.approx(flops.training_flops(training) * 4 / line["step_s"] / 989e12)


def test_a_missing_tracker_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserMistake, match=r"track.wandb: wandb is not installed: pip install 'afterok\[wandb\]'"):
        metrics.sinks(Track(wandb="offline"), tmp_path, 0, {})
