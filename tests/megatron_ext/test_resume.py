"""Resume equals uninterrupted, to the bit: from any checkpoint, under another layout, after a kill at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from data_tools.mistake import UserMistake
from megatron_ext.entrypoints import sft
from megatron_ext.model_folders import model_folder
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.weights import checkpoint
from tests.megatron_ext import gloo, tiny
from tests.megatron_ext.training import LAYOUTS, MODEL, metrics, sft_config, steady, stop_at, train_to_end

EXPERTS = {
    "EP2": ParallelPlan(expert=2),
    "TP2 EP2": ParallelPlan(tensor=2, sequence_parallel=True, expert=2),
}
SOAK = pytest.mark.soak


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return tiny.hf_folder(tmp_path_factory.mktemp("hf"), MODEL)


@pytest.mark.parametrize(
    "layout", ["DP2", "PP2 interleaved", *(pytest.param(name, marks=SOAK) for name in ("TP2", "CP2"))]
)
def test_resume_equals_uninterrupted_to_the_bit(two_ranks, hf, tmp_path, layout):
    plan = LAYOUTS[layout]
    whole = two_ranks.run(train_to_end, plan=plan, hf=hf, keep=tmp_path / "a", keep_checkpoints=9)[0]
    lines = metrics(tmp_path / "a")
    assert [line["step"] for line in lines] == [3, 6]
    assert sum(line["supervised_tokens"] for line in lines) == whole["supervised_tokens"]
    stop_at(tmp_path / "a", 4)
    resumed = two_ranks.run(train_to_end, plan=plan, hf=hf, keep=tmp_path / "a")[0]
    assert resumed.pop("resumed_from") == 4 and whole.pop("resumed_from") == 0
    assert resumed == whole
    assert [steady(line) for line in metrics(tmp_path / "a")] == [steady(line) for line in lines]


def test_a_finished_run_does_nothing_again(alone_tmp, hf):
    first = train_to_end(ParallelPlan(), hf, alone_tmp)
    again = train_to_end(ParallelPlan(), hf, alone_tmp)
    assert again["resumed_from"] == 6 and {**again, "resumed_from": 0} == first
    assert checkpoint.steps(alone_tmp / "checkpoints") == [6, 4]  # the newest two are kept
    assert (alone_tmp / "checkpoints" / "latest").read_text() == "step_6\n"


@pytest.mark.parametrize(
    "before, after",
    [
        ("EP2", "serial"),
        *(pytest.param(*pair, marks=SOAK) for pair in [("EP2", "EP2"), ("EP2", "TP2 EP2"), ("serial", "EP2")]),
    ],
)
def test_the_optimizer_of_experts_continues(two_ranks, tmp_path, before, after):
    """Also where experts leave their ranks or spread over them, for which mcore keeps one optimizer more or less."""
    hf = tiny.hf_folder(tmp_path / "hf", tiny.GPT_OSS_DIMS)
    arguments = dict(hf=hf, keep=tmp_path, of=tiny.GPT_OSS_DIMS, keep_checkpoints=9)

    def go(name: str) -> dict:
        if name == "serial":
            return train_to_end(ParallelPlan(), **arguments)
        return two_ranks.run(train_to_end, plan=EXPERTS[name], **arguments)[0]

    whole = go(before)
    expected = metrics(tmp_path)[-1]
    stop_at(tmp_path, 4)
    resumed = go(after)
    found = metrics(tmp_path)[-1]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    assert before != after or resumed["digest"] == whole["digest"]


@pytest.fixture
def alone_tmp(tmp_path) -> Path:
    return tmp_path / "keep"


@pytest.mark.parametrize(
    "before, after",
    [
        ("TP2", "serial"),
        ("PP2 interleaved", "CP2"),
        *(pytest.param(*pair, marks=SOAK) for pair in [("DP2", "TP2"), ("serial", "TP2 SP"), ("CP2", "PP2")]),
    ],
)
def test_a_checkpoint_continues_under_another_layout(two_ranks, hf, tmp_path, before, after):
    """Weights and optimizer reshard, the padded vocabulary of TP2 included: losses and norms continue as they were."""

    def go(name: str, keep: Path) -> dict:
        if name == "serial":
            return train_to_end(ParallelPlan(), hf, keep)
        return two_ranks.run(train_to_end, plan=LAYOUTS[name], hf=hf, keep=keep)[0]

    whole = go(before, tmp_path)
    expected = metrics(tmp_path)[-1]
    stop_at(tmp_path, 4)
    resumed = go(after, tmp_path)
    assert resumed["resumed_from"] == 4 and resumed["supervised_tokens"] == whole["supervised_tokens"]
    found = metrics(tmp_path)[-1]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    "damage", ["flipped", "no manifest", pytest.param("truncated", marks=SOAK), pytest.param("missing", marks=SOAK)]
)
def test_a_damaged_newest_checkpoint_is_skipped_and_named(alone_tmp, hf, damage):
    whole = train_to_end(ParallelPlan(), hf, alone_tmp)
    newest = alone_tmp / "checkpoints" / "step_6"
    victim = next((newest / "state").glob("*.distcp"))
    data = victim.read_bytes()
    if damage == "truncated":
        victim.write_bytes(data[:-1])
    elif damage == "flipped":
        victim.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif damage == "missing":
        victim.unlink()
    else:
        (newest / "manifest.json").unlink()
    resumed = train_to_end(ParallelPlan(), hf, alone_tmp)
    assert resumed["resumed_from"] == 4 and resumed["digest"] == whole["digest"]
    (note,) = resumed["notes"]
    assert note.startswith("step_6 is damaged and was skipped:")
    assert train_to_end(ParallelPlan(), hf, alone_tmp)["resumed_from"] == 6  # written anew


def test_half_written_steps_are_swept_and_never_read(alone_tmp, hf):
    left = alone_tmp / "checkpoints" / ".step_4.1234.tmp"
    left.mkdir(parents=True)
    assert train_to_end(ParallelPlan(), hf, alone_tmp)["resumed_from"] == 0
    assert not left.exists()


def test_another_runs_checkpoint_is_refused_with_the_difference(alone_tmp, hf):
    train_to_end(ParallelPlan(), hf, alone_tmp, steps=2)
    with pytest.raises(UserMistake, match="packs = 'tiny-8-48', this run has 'other-8-48'"):
        train_to_end(ParallelPlan(), hf, alone_tmp, packs="other")
    with pytest.raises(UserMistake, match="global_batch = 4, this run has 8"):
        train_to_end(ParallelPlan(), hf, alone_tmp, global_batch=8)


def test_a_non_finite_gradient_stops_and_names_the_step(alone_tmp, hf, tmp_path):
    bad = tiny.hf_folder(tmp_path / "bad", MODEL)
    from safetensors.torch import load_file, save_file

    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("inf")
    save_file(tensors, bad / "model.safetensors")
    with pytest.raises(UserMistake, match="step 1: the gradient norm is nan and the loss nan at learning rate 0.01"):
        train_to_end(ParallelPlan(), bad, alone_tmp)
    assert checkpoint.steps(alone_tmp / "checkpoints") == []


# ---------------------------------------------------------------- the whole entrypoint, killed


def bare_sft(folder: dict[str, Path], out: Path, keep: Path, steps: int) -> list[subprocess.Popen]:
    """Two bare ranks of the entrypoint, as torchrun starts them."""
    config = out.with_suffix(".yaml")
    fields = asdict(sft_config(folder, steps))
    config.write_text(json.dumps(fields))  # JSON is YAML
    command = [sys.executable, "-m", "megatron_ext.entrypoints.sft", "--config", str(config), "--out", str(out)]
    port = gloo.free_port()
    return [
        subprocess.Popen(
            [*command, "--keep", str(keep)],
            env={**os.environ, **gloo.environment(rank, 2, port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def finished(processes: list[subprocess.Popen]) -> str:
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs[0][0]


KILLED_STEPS = 40


@pytest.fixture(scope="module")
def whole(two_ranks, calculator, tmp_path_factory) -> tuple[dict, Path]:
    """Facts and folder of a training that nobody killed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    out.mkdir()
    keep = out.with_suffix(".keep")
    facts = two_ranks.run(sft.run, config=sft_config(calculator, KILLED_STEPS), out=out, keep=keep)[0]
    assert facts["step"] == KILLED_STEPS and facts["loss_last"] < facts["loss_first"]
    return facts, keep


def kill(processes: list[subprocess.Popen], keep: Path, moment: str, rank: int = 1, after: float = 0.0) -> None:
    """SIGKILL to a rank once its training is at the moment: "load", after a "step", or in mid-"save"."""
    root, deadline = keep / "checkpoints", time.time() + 120
    signs = {"load": lambda: True, "step": lambda: checkpoint.steps(root), "save": lambda: [*root.glob(".step_*")]}
    there = signs[moment]
    while not there() and None in [process.poll() for process in processes]:
        assert time.time() < deadline
        time.sleep(0.002)
    time.sleep(after)
    processes[rank].send_signal(signal.SIGKILL)
    if moment == "load":  # who waits for a peer that never joined is ended by srun or the worker
        processes[1 - rank].send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate(timeout=120)  # the other rank ends by itself: its peer is gone


def resumed_equals_whole(whole: tuple[dict, Path], calculator: dict[str, Path], out: Path, keep: Path) -> dict:
    facts, whole_keep = whole
    output = finished(bare_sft(calculator, out, keep, KILLED_STEPS))
    resumed = json.loads(output[output.index("{") :])
    assert resumed["weights_digest"] == facts["weights_digest"]
    assert model_folder.open_folder(out).weights_digest == facts["weights_digest"]
    lines = [[steady(line) for line in metrics(folder)] for folder in (whole_keep, keep)]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == list(range(5, KILLED_STEPS + 1, 5))
    return resumed


def test_ranks_killed_in_mid_run_and_in_mid_save_end_with_the_weights_of_an_uninterrupted_run(
    whole, calculator, tmp_path
):
    for moment in ("step", "save"):
        killed = bare_sft(calculator, tmp_path / f"killed in {moment}", tmp_path / "keep", KILLED_STEPS)
        kill(killed, tmp_path / "keep", moment)
        assert [process.returncode != 0 for process in killed] == [True, True]
        done = checkpoint.steps(tmp_path / "keep" / "checkpoints")[0]
        assert 0 < done < KILLED_STEPS
    resumed = resumed_equals_whole(whole, calculator, tmp_path / "again", tmp_path / "keep")
    assert resumed["resumed_from"] >= done


@pytest.mark.soak
@pytest.mark.parametrize("trial", range(20))
def test_a_kill_at_any_moment_changes_no_bit(whole, calculator, tmp_path, trial):
    chance = random.Random(trial)
    moment = ("load", "step", "save")[trial % 3]
    after = {"load": chance.uniform(0, 8), "step": chance.uniform(0, 0.3), "save": chance.uniform(0, 0.03)}[moment]
    killed = bare_sft(calculator, tmp_path / "killed", tmp_path / "keep", KILLED_STEPS)
    kill(killed, tmp_path / "keep", moment, chance.randrange(2), after)
    resumed_equals_whole(whole, calculator, tmp_path / "again", tmp_path / "keep")


def test_a_pipeline_trains_from_model_folder_to_model_folder(two_ranks, calculator, tmp_path):
    """The first stage has the ids, the last the loss: both ranks know the facts, and the folder has all layers."""
    found = []
    for name, pool, plan in (("alone", None, ParallelPlan()), ("stages", two_ranks, ParallelPlan(pipeline=2))):
        (tmp_path / name).mkdir()
        config = replace(sft_config(calculator, steps=5), parallel=plan)
        arguments = dict(config=config, out=tmp_path / name, keep=tmp_path / f"{name}.keep")
        found += pool.run(sft.run, **arguments) if pool else [sft.run(**arguments)]
    for facts in found:
        assert facts["supervised_tokens"] == found[0]["supervised_tokens"]
        assert facts["loss_last"] == pytest.approx(found[0]["loss_last"], rel=1e-5)
    assert model_folder.open_folder(tmp_path / "stages").weights_digest == found[1]["weights_digest"]


def test_a_training_that_asks_for_it_is_certified_first(calculator, tmp_path):
    (tmp_path / "out").mkdir()
    config = replace(sft_config(calculator, steps=1), certify=True)
    facts = sft.run(config, tmp_path / "out", tmp_path / "keep")
    assert facts["certificate"]["holds"] and list((tmp_path / "keep" / "certificates").iterdir())


def test_bfloat16_trains_from_float32_weights(calculator, tmp_path):
    (tmp_path / "out").mkdir()
    model, store, packs = (str(calculator[name]) for name in ("base", "store", "packs"))
    config = sft.Config(model=model, store=store, packs=packs, steps=4, dtype="bfloat16")
    facts = sft.run(config, tmp_path / "out", tmp_path / "keep")
    assert 1 < facts["loss_last"] < 4
    assert model_folder.open_folder(tmp_path / "out").dtype == "bfloat16"
