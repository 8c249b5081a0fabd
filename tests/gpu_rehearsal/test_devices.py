"""A step on pretended GPUs: nothing is left on the CPU, and the host waits no oftener than is said here."""

import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from megatron_ext.device import NoOwnGpu, own_gpu
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.parallel.ranks import _check_own_gpu
from megatron_ext.rl.settings import Loss
from tests.gpu_rehearsal.mixtures import by_auto
from tests.gpu_rehearsal.pool import PretendedRanks, PretendedTeRanks, on_device
from tests.megatron_ext import tiny
from tests.megatron_ext.gloo import Ranks

pytestmark = pytest.mark.rehearsal

FAMILIES = {
    "qwen2": tiny.DIMS,
    "qwen3": tiny.dims(kind="qwen3", tied=False),
    "gpt_oss": tiny.GPT_OSS_DIMS,
    "nemotron_h": tiny.NEMOTRON_H_DIMS,
    "nanochat": tiny.NANOCHAT_DIMS,
    **tiny.KINDS,
}
FORGOTTEN = (  # device_ranks.FORGOTTEN
    "norm", "adapter of a router", "tokens", "places of supervised tokens", "labels", "positions in documents",
    "places in buckets", "arrays of a step of the engine",
)  # fmt: skip


@pytest.fixture(scope="session")
def pretended():
    """One rank on a pretended GPU."""
    ranks = PretendedRanks(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def pretended_te():
    """One rank on a pretended GPU that finds the stand-ins."""
    ranks = PretendedTeRanks(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def plain():
    """One rank on the CPU."""
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("family", tiny.marked(FAMILIES))
def test_a_whole_step_leaves_nothing_on_the_cpu(pretended, plain, family, tmp_path):
    """From the import to adapters, rollouts among it: as on the CPU, but for what kernels round otherwise."""
    (there,) = on_device(pretended, "walk", of=FAMILIES[family], folder=tmp_path)
    (here,) = on_device(plain, "walk", of=FAMILIES[family], folder=tmp_path)
    assert there["resumed"] == there["updates"][1], "random states and weights go on"
    assert there["exported"] == there["digest"], "what was exported is what was trained"
    for name in ("evaluated", "after"):
        assert there[name] == pytest.approx(here[name], rel=1e-5), name
    for ours, theirs in zip(there["updates"], here["updates"], strict=True):
        assert ours[:2] == pytest.approx(theirs[:2], rel=1e-5)  # loss and norm; a GPU has random numbers of its own
    assert there["lora"][0][0] == pytest.approx(here["lora"][0][0], rel=1e-5)
    for name in ("frozen", "trained"):
        for kind, samples in there[name].items():
            assert [tokens for tokens, *_ in samples] == [tokens for tokens, *_ in here[name][kind]], (name, kind)


@pytest.mark.parametrize("level", ("token", "sequence"))
def test_grpo_leaves_nothing_on_the_cpu(pretended, plain, level, tmp_path):
    settings = dict(of=tiny.DIMS, folder=tmp_path, loss=Loss(level=level, kl_beta=0.1, entropy=0.01))
    (there,), (here,) = (on_device(ranks, "policy", **settings) for ranks in (pretended, plain))
    for a, b in zip(there, here, strict=True):
        for name in ("reward", "grad_norm", "loss", "kl", "entropy"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), (a["step"], name)


@pytest.mark.parametrize("what", FORGOTTEN)
def test_what_is_left_on_the_cpu_is_found(pretended, what, tmp_path):
    assert "CPU tensors" in on_device(pretended, "forgotten", what=what, folder=tmp_path)[0]


# ---------------------------------------------------------------- how often the host waits

EXPERT_LAYERS = {"gpt_oss": 2, "nemotron_h": 2}
EXPERT_LAYERS |= {kind: sum(not of.is_dense(i) for i in range(of.layers)) for kind, of in tiny.KINDS.items()}
MICRO_BATCHES = 2


@pytest.mark.parametrize("family", tiny.marked(FAMILIES))
def test_in_a_training_step_the_host_waits_three_times(pretended, family, tmp_path):
    """For whether any token counts and the norm, both mcore's, and the vote. Of experts it reads their tokens."""
    ((counts, places, _),) = on_device(pretended, "waits_of_a_training_step", of=FAMILIES[family], folder=tmp_path)
    passes = MICRO_BATCHES * EXPERT_LAYERS.get(family, 0)
    assert counts == {"read": 3 + 2 * passes, **({"wait": passes} if passes else {})}, places


@pytest.mark.parametrize("kind", ("greedy", "filtered"))
@pytest.mark.parametrize("family", tiny.marked(FAMILIES))
def test_a_decode_step_brings_numbers_to_the_host_once(pretended, family, kind, tmp_path):
    ((counts, places),) = on_device(
        pretended, "waits_of_a_decode_step", of=FAMILIES[family], folder=tmp_path, kind=kind
    )
    layers = EXPERT_LAYERS.get(family, 0)
    assert counts == {"read": 1 + 2 * layers, **({"wait": layers} if layers else {})}, places


# ---------------------------------------------------------------- recorded passes


@pytest.mark.parametrize("family", ("qwen2", "qwen3", "nanochat"))
def test_recorded_passes_draw_what_others_draw(pretended, family, tmp_path):
    """No pass reads a number of the host, waits for it, or needs memory that is given back."""
    drawn = []
    for recorded in (True, False):
        folder = tmp_path / str(recorded)
        (found,) = on_device(pretended, "decoded", of=FAMILIES[family], folder=folder, cuda_graphs=recorded)
        drawn.append({kind: [tokens for tokens, *_ in samples] for kind, samples in found.items()})
    assert drawn[0] == drawn[1]


def test_recorded_passes_over_transformer_engine_hold_no_checkpoint_of_whole_layers(pretended_te, tmp_path):
    """Of `recompute: full`, which is for training alone: they draw what others draw."""
    given = dict(of=tiny.DIMS, plan=ParallelPlan(recompute="full"), made_of=by_auto(tiny.DIMS))
    assert given["made_of"].uses_te
    (recorded,), (passed,) = (
        on_device(pretended_te, "decoded", folder=tmp_path / str(graphs), cuda_graphs=graphs, **given)
        for graphs in (True, False)
    )
    for kind, samples in passed.items():
        assert [tokens for tokens, *_ in recorded[kind]] == [tokens for tokens, *_ in samples], kind
    ((recorded, left_in_training),) = on_device(pretended_te, "checkpoints", folder=tmp_path / "counted", **given)
    assert recorded == 0 < left_in_training


def test_recorded_passes_ask_for_no_random_state(pretended, tmp_path):
    """As megatron-core's recomputation and its forks under sequence parallelism do, both in megatron_grpo.yaml."""
    of, plan = tiny.DIMS, ParallelPlan(recompute="selective")
    recorded, passed = (
        on_device(pretended, "decoded", of=of, folder=tmp_path / str(graphs), plan=plan, cuda_graphs=graphs)
        for graphs in (True, False)
    )
    for kind, samples in passed[0].items():
        assert [tokens for tokens, *_ in recorded[0][kind]] == [tokens for tokens, *_ in samples], kind
    assert on_device(pretended, "forked_in_a_recording") == [[1.0] * 3]


REFUSED = ("a number read", "a choice by value", "a mask", "numbers of the host")


@pytest.mark.parametrize("what", REFUSED)
def test_a_recording_that_waits_for_the_host_is_refused(pretended, what):
    assert "not permitted when stream is capturing" in on_device(pretended, "refused_in_a_recording", what=what)[0]


def test_a_recording_whose_memory_goes_is_refused(pretended):
    assert "was given back" in on_device(pretended, "refused_in_a_recording", what="memory that goes")[0]
    assert on_device(pretended, "refused_in_a_recording", what="nothing") == ["nothing"]


def test_a_recording_is_replayed_on_the_memory_that_it_was_recorded_on(pretended):
    assert on_device(pretended, "replayed") == [[[6.0, 6.0], [10.0, 10.0], [8.0, 8.0]]]


# ---------------------------------------------------------------- a GPU of one's own


@pytest.mark.parametrize("local_rank, visible, index", [(0, 1, 0), (3, 1, 0), (0, 8, 0), (7, 8, 7)])
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one(local_rank, visible, index):
    assert own_gpu(local_rank, visible) == index


def test_ranks_that_would_share_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(
        NoOwnGpu, match=r"rank 2 of this node, counted from 0, .* sees 2 \(CUDA_VISIBLE_DEVICES is 4,5\)"
    ):
        own_gpu(2, 2)


def test_two_ranks_on_the_same_gpu_are_refused_whatever_number_it_has_for_them():
    store = dist.HashStore()
    for number in (0, 1):  # joins of one process
        for gpu in ("GPU-a", "GPU-b"):
            _check_own_gpu(store, gpu, number)
    with pytest.raises(NoOwnGpu, match="shares GPU GPU-a of .* set resources.gpus_per_node"):
        _check_own_gpu(store, "GPU-a", 1)
    for _ in range(2):
        _check_own_gpu(store, "", 1)


BOUND = """
import os
import torch
chosen = []
torch.cuda.is_available, torch.cuda.device_count, torch.cuda.set_device = lambda: True, lambda: 1, chosen.append
from megatron_ext.device import init_device
init_device()
print(chosen, os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"])
"""


def test_a_rank_that_slurm_shows_one_gpu_takes_it():
    environment = {**os.environ, "LOCAL_RANK": "3"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BOUND], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "[0] 0\n", done.stderr
