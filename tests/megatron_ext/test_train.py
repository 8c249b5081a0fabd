"""Training on real gloo ranks: parallel equals serial, the denominator is global, resume equals uninterrupted."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from megatron.core import tensor_parallel

from data_tools.mistake import UserMistake
from megatron_ext import checkpoint, model_folder, ranks, train
from megatron_ext.entrypoints import sft
from megatron_ext.parallel import ParallelPlan
from megatron_ext.schedule import Schedule
from tests.megatron_ext import gloo, tiny

LAYOUTS = {
    "DP2": ParallelPlan(),
    "TP2": ParallelPlan(tensor=2),
    "TP2 SP": ParallelPlan(tensor=2, sequence_parallel=True),
    "PP2": ParallelPlan(pipeline=2, pipeline_layers=[3, 1]),
    "PP2 interleaved": ParallelPlan(pipeline=2, virtual=2),
    "CP2": ParallelPlan(context=2, context_comm="a2a"),
}
EXPERTS = {
    "EP2": ParallelPlan(expert=2),
    "TP2 EP2": ParallelPlan(tensor=2, sequence_parallel=True, expert=2),
}
STEPS = 3
MODEL = tiny.dims(layers=4)


def run_of(steps: int = STEPS, **changes) -> train.Run:
    return train.Run(Schedule("constant", steps, 0.01), **{"global_batch": 4, "log_every": 1, **changes})


def steps_of(plan: ParallelPlan, hf: Path, weights: Path | None, steps: int = STEPS, seed: int = 0) -> dict:
    """Some updates from the weights in `hf`: losses, norms, counts, digests; the final weights go to `weights`."""
    with ranks.started(plan):
        trainer = train.Trainer(tiny.parts(hf, MODEL, plan), plan, train.AdamW(weight_decay=0.1, clip=1.0))
        before = checkpoint.weights_digest(trainer.model)
        packs, run = tiny.Packs(align=4), run_of(steps, seed=seed)
        losses, norms = [], []
        for k in range(steps):
            sums, norm = trainer.step(train.rows_of_step(packs, k, run, plan), 0.01)
            total = sums.reduced()
            losses.append((total.loss, total.supervised, total.tokens))
            norms.append(norm)
        if weights is not None:
            checkpoint.save_weights(trainer.model, weights)
        return dict(losses=losses, norms=norms, before=before, after=checkpoint.weights_digest(trainer.model))


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return tiny.hf_folder(tmp_path_factory.mktemp("hf"), MODEL)


@pytest.fixture(scope="module")
def serial(hf, tmp_path_factory) -> tuple[dict, Path]:
    """The reference: one process."""
    weights = tmp_path_factory.mktemp("serial") / "weights"
    return steps_of(ParallelPlan(), hf, weights), weights


def parameters(weights: Path) -> dict[str, torch.Tensor]:
    with ranks.started(ParallelPlan()):
        model = tiny.QWEN2.spec.build(MODEL, ParallelPlan(), torch.float32)
        checkpoint.load_weights(model, weights)
        return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parallel_training_equals_serial(two_ranks, hf, serial, tmp_path, layout):
    expected, weights = serial
    found = two_ranks.run(steps_of, plan=LAYOUTS[layout], hf=hf, weights=tmp_path / "weights")
    for result in found:
        assert result["before"] == expected["before"]  # the digest does not depend on the layout, nor on padding rows
        assert [n[1:] for n in result["losses"]] == [n[1:] for n in expected["losses"]]
        assert [n[0] for n in result["losses"]] == pytest.approx([n[0] for n in expected["losses"]], rel=2e-6)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert found[0] == found[1]
    ours, theirs = parameters(tmp_path / "weights"), parameters(weights)
    start = parameters_of_hf(hf)
    for name in theirs:
        # Adam's first steps have the size of the rate whatever the gradient: compare with the distance travelled.
        travelled = (theirs[name] - start[name]).abs().max()
        assert (ours[name] - theirs[name]).abs().max() <= 2e-3 * travelled, name


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(hf, serial, recompute):
    assert steps_of(ParallelPlan(recompute=recompute), hf, None) == serial[0]


def parameters_of_hf(hf: Path) -> dict[str, torch.Tensor]:
    with ranks.started(ParallelPlan()):
        return {name: p.detach().clone() for name, p in tiny.model(hf, MODEL, ParallelPlan()).named_parameters()}


def test_the_gradient_is_that_of_the_mean_over_all_supervised_tokens(alone, hf):
    """Packs supervise unequal numbers of tokens: a mean of means would differ."""
    plan, packs, run = ParallelPlan(), tiny.Packs(), run_of()
    counts = [int(packs.pack(i).loss_mask.sum()) for i in packs.batch(0, 4, 0)]
    assert len(set(counts)) > 1
    model = tiny.model(hf, MODEL, plan)
    total = sum(train.losses_of(model, row).sum() for row in train.rows_of_step(packs, 0, run, plan))
    (total / sum(counts)).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    trainer = train.Trainer(tiny.model(hf, MODEL, plan), plan, train.AdamW(clip=0))
    assert trainer.step(train.rows_of_step(packs, 0, run, plan), 0.0)[1] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("layout", ["serial", "DP2", "TP2"])
def test_a_pack_without_supervised_tokens_counts_for_nothing(two_ranks, hf, layout):
    if layout == "serial":
        found = [_with_an_empty_pack(ParallelPlan(), hf)]
    else:
        found = two_ranks.run(_with_an_empty_pack, plan=LAYOUTS[layout], hf=hf)
    assert all(value == pytest.approx(_without_the_empty_pack(hf), rel=1e-5) for value in found)


def _norm(plan: ParallelPlan, hf: Path, packs: list) -> float:
    with ranks.started(plan):
        trainer = train.Trainer(tiny.model(hf, MODEL, plan), plan, train.AdamW())
        return trainer.step([train.micro_batch([pack]) for pack in packs], 0.01)[1]


def _with_an_empty_pack(plan: ParallelPlan, hf: Path) -> float:
    """On two data ranks one has nothing but the empty pack."""
    full, empty = tiny.pack([9, 20], 1), tiny.pack([20, 9], 2, supervised=0.0)
    rank, size = ranks.rank_of_environment(), plan.data(ranks.world_size_of_environment())
    return _norm(plan, hf, [full, empty][rank::size] if size > 1 else [full, empty])


def _without_the_empty_pack(hf: Path) -> float:
    return _norm(ParallelPlan(), hf, [tiny.pack([9, 20], 1)])


def test_joining_packs_into_larger_micro_batches_changes_nothing(alone, hf):
    norms = []
    for plan in (ParallelPlan(), ParallelPlan(micro_batch=2), ParallelPlan(micro_batch=4)):
        trainer = train.Trainer(tiny.model(hf, MODEL, plan), plan, train.AdamW())
        rows = train.rows_of_step(tiny.Packs(), 0, run_of(), plan)
        assert len(rows) == 4 // plan.micro_batch
        norms.append(trainer.step(rows, 0.01)[1])
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


def test_weight_decay_spares_norms_and_biases(alone, hf):
    plan = ParallelPlan()
    model = tiny.model(hf, MODEL, plan)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = train.Trainer(model, plan, train.AdamW(beta1=0.0, beta2=0.0, epsilon=1e30, weight_decay=0.5))
    trainer.step(train.rows_of_step(tiny.Packs(), 0, run_of(), plan), 0.1)  # an epsilon so large: decay is all
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (0.95 if p.dim() > 1 else 1.0), rtol=1e-6), name


def test_padding_rows_of_the_vocabulary_stay_zero(two_ranks, hf):
    assert two_ranks.run(_padding, hf=hf) == [(16, 0), (16, 0.0)]


def _padding(hf: Path) -> tuple[int, float]:
    plan = LAYOUTS["TP2"]
    with ranks.started(plan):
        model = tiny.model(hf, MODEL, plan)
        trainer = train.Trainer(model, plan, train.AdamW(weight_decay=0.1))
        trainer.step(train.rows_of_step(tiny.Packs(), 0, run_of(), plan), 0.01)
        weight = model.embedding.word_embeddings.weight
        first = torch.distributed.get_rank() * 16
        return len(weight), weight[max(0, 19 - first) :].abs().sum().item()


# ---------------------------------------------------------------- digest


def test_one_bit_changes_the_digest_and_a_swap_does_too(alone, hf):
    model = tiny.model(hf, MODEL, ParallelPlan())
    first = checkpoint.weights_digest(model)
    weight = model.decoder.layers[1].mlp.linear_fc1.weight.data
    bits = weight.view(torch.int32)
    bits[7, 3] ^= 1
    assert checkpoint.weights_digest(model) != first
    bits[7, 3] ^= 1
    assert checkpoint.weights_digest(model) == first
    weight[[2, 5]] = weight[[5, 2]]
    assert checkpoint.weights_digest(model) != first


def test_the_digest_is_the_documented_one(alone, hf):
    """Computed anew with Python integers, from the rule in megatron_ext/digest.py and the layout of the keys."""
    import hashlib

    mask = (1 << 64) - 1

    def odd(x: int, sequence: int) -> int:
        x = ((x ^ sequence) + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31) | 1

    model = tiny.model(hf, MODEL, ParallelPlan())
    named = dict(model.named_parameters())
    whole = {
        name: named[name].detach() for name in ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight")
    }
    layered = {  # key -> parameter; mcore fuses the names of norms
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "self_attention.linear_qkv.weight": "self_attention.linear_qkv.weight",
        "self_attention.linear_qkv.bias": "self_attention.linear_qkv.bias",
        "self_attention.linear_proj.weight": "self_attention.linear_proj.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.weight": "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight": "mlp.linear_fc2.weight",
    }
    for key, name in layered.items():
        for layer in (f"decoder.layers.{i}." for i in range(MODEL.layers)):
            whole[layer + key] = named[layer + name].detach()
    digest = hashlib.sha256()
    for key in sorted(whole):
        bits = whole[key].reshape(-1, whole[key].shape[-1]).numpy().view(numpy.int32).tolist()
        rows, columns = range(len(bits)), range(len(bits[0]))
        a, b = [odd(i, 0x243F6A8885A308D3) for i in rows], [odd(i, 0x13198A2E03707344) for i in columns]
        total = sum(bits[i][j] * a[i] * b[j] for i in rows for j in columns) & mask
        digest.update(f"{key} float32 {list(whole[key].shape)} {total:016x}\n".encode())
    assert checkpoint.weights_digest(model) == digest.hexdigest()


# ---------------------------------------------------------------- checkpoints and resume


def draw(done: int, total: int, unit: str, note: str = "") -> None:
    """A progress callback that uses up random numbers at every step, as dropout would."""
    if note.startswith("loss"):
        torch.rand(3)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            torch.rand(5)


def train_to_end(
    plan: ParallelPlan, hf: Path, keep: Path, steps: int = 6, packs: str = "tiny", of: Any = MODEL, **changes
) -> dict:
    """A whole run with a checkpoint every 2 steps. `changes` go to Run."""
    with ranks.started(plan):
        trainer = train.Trainer(tiny.parts(hf, of, plan), plan, train.AdamW())
        run = run_of(steps, **{"checkpoint_every": 2, "log_every": 3, **changes})
        outcome = train.train_on_packs(trainer, tiny.Packs(name=packs, align=4), run, keep, {"model": "tiny"}, draw)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            tracked = torch.rand(1).item()
        random = [torch.rand(1).item(), tracked]
        return {**asdict(outcome), "digest": checkpoint.weights_digest(trainer.model), "random": random}


def stop_at(keep: Path, step: int) -> None:
    """Make the folder that of a run killed right after checkpoint `step`, having logged past it."""
    for newer in checkpoint.steps(keep / "checkpoints"):
        if newer > step:
            checkpoint._remove(keep / "checkpoints" / f"step_{newer}")


def metrics(keep: Path) -> list[dict]:
    return [json.loads(line) for line in (keep / "metrics.jsonl").read_text().splitlines()]


def steady(line: dict) -> dict:
    timed = ("step_s", "tokens_per_s", "parts_s", "memory_gib", "slowest_rank", "slowest_ratio")
    return {key: value for key, value in line.items() if key not in timed}


SOAK = pytest.mark.soak


@pytest.mark.parametrize("layout", ["DP2", "PP2 interleaved", *(pytest.param(name, marks=SOAK) for name in ("TP2", "CP2"))])
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
    [("EP2", "serial"), *(pytest.param(*pair, marks=SOAK) for pair in [("EP2", "EP2"), ("EP2", "TP2 EP2"), ("serial", "EP2")])],
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


@pytest.mark.parametrize("damage", [
    "flipped", "no manifest", pytest.param("truncated", marks=SOAK), pytest.param("missing", marks=SOAK)])
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


@pytest.fixture(scope="module")
def calculator(tmp_path_factory) -> dict[str, Path]:
    """Model folder, token store and pack plan of a tiny calculator run, made by the real phases."""
    from data_tools import materialize, pack
    from data_tools.tasks.task import Source
    from megatron_ext.entrypoints import import_hf, init_model

    root = tmp_path_factory.mktemp("calculator")
    folder = {name: root / name for name in ("hf", "part", "store", "packs", "base")}
    for path in folder.values():
        path.mkdir()
    init_model.run(init_model.Config(alphabet_task="calculator", hidden=32, ffn=48, layers=2), folder["hf"], root)
    rows = materialize.Config(task="calculator", source=Source(synthetic_rows=600), tokenizer=str(folder["hf"]))
    materialize.materialize(rows, folder["part"], 0, 1)
    materialize.finish(rows, [folder["part"]], folder["store"])
    pack.pack(pack.Config(store=str(folder["store"]), pack_length=64), folder["packs"])
    import_hf.run(import_hf.Config(str(folder["hf"])), folder["base"], root)
    return folder


def sft_config(folder: dict[str, Path], steps: int) -> sft.Config:
    return sft.Config(
        *(str(folder[name]) for name in ("base", "store", "packs")),
        steps=steps,
        checkpoint_every=5,
        log_every=5,
        global_batch=4,
        seed=3,
    )


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
    there = {"load": lambda: True, "step": lambda: checkpoint.steps(root), "save": lambda: [*root.glob(".step_*")]}[moment]
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
    config = sft.Config(*(str(calculator[name]) for name in ("base", "store", "packs")), steps=4, dtype="bfloat16")
    facts = sft.run(config, tmp_path / "out", tmp_path / "keep")
    assert 1 < facts["loss_last"] < 4
    assert model_folder.open_folder(tmp_path / "out").dtype == "bfloat16"
