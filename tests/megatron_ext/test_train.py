"""Training on real gloo ranks: parallel equals serial, the denominator is global, the digest names the weights."""

from pathlib import Path

import numpy
import pytest
import torch

from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.training import supervised
from megatron_ext.training.rows import micro_batch
from megatron_ext.training.update import AdamW, Trainer, losses_of
from megatron_ext.weights import checkpoint
from tests.megatron_ext import tiny
from tests.megatron_ext.training import LAYOUTS, MODEL, run_of

STEPS = 3


def steps_of(plan: ParallelPlan, hf: Path, weights: Path | None, steps: int = STEPS, seed: int = 0) -> dict:
    """Some updates from the weights in `hf`: losses, norms, counts, digests; the final weights go to `weights`."""
    with ranks.started(plan):
        trainer = Trainer(tiny.parts(hf, MODEL, plan), plan, AdamW(weight_decay=0.1, clip=1.0))
        before = checkpoint.weights_digest(trainer.model)
        packs, run = tiny.Packs(align=4), run_of(steps, seed=seed)
        losses, norms = [], []
        for k in range(steps):
            sums, norm = trainer.step(supervised.rows_of_step(packs, k, run, plan), 0.01)
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
    total = sum(losses_of(model, row).sum() for row in supervised.rows_of_step(packs, 0, run, plan))
    (total / sum(counts)).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    trainer = Trainer(tiny.model(hf, MODEL, plan), plan, AdamW(clip=0))
    assert trainer.step(supervised.rows_of_step(packs, 0, run, plan), 0.0)[1] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("layout", ["serial", "DP2", "TP2"])
def test_a_pack_without_supervised_tokens_counts_for_nothing(two_ranks, hf, layout):
    if layout == "serial":
        found = [_with_an_empty_pack(ParallelPlan(), hf)]
    else:
        found = two_ranks.run(_with_an_empty_pack, plan=LAYOUTS[layout], hf=hf)
    assert all(value == pytest.approx(_without_the_empty_pack(hf), rel=1e-5) for value in found)


def _norm(plan: ParallelPlan, hf: Path, packs: list) -> float:
    with ranks.started(plan):
        trainer = Trainer(tiny.model(hf, MODEL, plan), plan, AdamW())
        return trainer.step([micro_batch([pack]) for pack in packs], 0.01)[1]


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
        trainer = Trainer(tiny.model(hf, MODEL, plan), plan, AdamW())
        rows = supervised.rows_of_step(tiny.Packs(), 0, run_of(), plan)
        assert len(rows) == 4 // plan.micro_batch
        norms.append(trainer.step(rows, 0.01)[1])
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


def test_weight_decay_spares_norms_and_biases(alone, hf):
    plan = ParallelPlan()
    model = tiny.model(hf, MODEL, plan)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(model, plan, AdamW(beta1=0.0, beta2=0.0, epsilon=1e30, weight_decay=0.5))
    trainer.step(supervised.rows_of_step(tiny.Packs(), 0, run_of(), plan), 0.1)  # an epsilon so large: decay is all
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (0.95 if p.dim() > 1 else 1.0), rtol=1e-6), name


def test_padding_rows_of_the_vocabulary_stay_zero(two_ranks, hf):
    assert two_ranks.run(_padding, hf=hf) == [(16, 0), (16, 0.0)]


def _padding(hf: Path) -> tuple[int, float]:
    plan = LAYOUTS["TP2"]
    with ranks.started(plan):
        model = tiny.model(hf, MODEL, plan)
        trainer = Trainer(model, plan, AdamW(weight_decay=0.1))
        trainer.step(supervised.rows_of_step(tiny.Packs(), 0, run_of(), plan), 0.01)
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
    """Computed anew with Python integers, from the rule in megatron_ext/files/digest.py and the layout of the keys."""
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
