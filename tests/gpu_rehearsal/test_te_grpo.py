"""GRPO in place over Transformer Engine's layers: rollouts and training agree, and a killed run goes on to the bit."""

import json
import signal
from dataclasses import astuple
from pathlib import Path

import pytest

from megatron_ext.parallel.parts import OURS, TE
from megatron_ext.parallel.plan import ParallelPlan
from tests.gpu_rehearsal.mixtures import by_auto
from tests.gpu_rehearsal.pool import STAND_INS
from tests.megatron_ext import tiny
from tests.megatron_ext.rl.processes import in_ranks_of_their_own

pytestmark = pytest.mark.rehearsal

FAMILIES = {
    "qwen2": tiny.DIMS,
    "qwen3": tiny.dims(kind="qwen3", tied=False),
    "gpt_oss": tiny.GPT_OSS_DIMS,
    "nemotron_h": tiny.hybrid("ME*-"),
    "nanochat": tiny.NANOCHAT_DIMS,
    **tiny.KINDS,
}
MOST = 1e-5  # difference of a token's log-probs between rollout and training
LAYOUTS = {
    "DP2": ParallelPlan(),
    "TP2": ParallelPlan(tensor=2, sequence_parallel=True),
    "PP2": ParallelPlan(pipeline=2),
    "CP2 ring": ParallelPlan(context=2, context_comm="p2p"),
}


def metrics(keep: Path) -> list[dict]:
    return [json.loads(line) for line in (keep / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: tiny.hf_folder(tmp_path_factory.mktemp(name), of, seed=4) for name, of in FAMILIES.items()}


def assert_agree(keep: Path) -> list[dict]:
    found = metrics(keep)
    assert len(found) == 2
    for line in found:
        assert line["mismatch"]["max_log"] <= MOST
    return found


@pytest.mark.parametrize("family", tiny.marked(FAMILIES))
def test_rollouts_and_training_agree_and_do_as_our_own_layers(solo, folders, tmp_path, family):
    of = FAMILIES[family]
    assert by_auto(of).linear == TE
    same = dict(hf=folders[family], of=of, plan=ParallelPlan(), steps=2)
    solo.te("trained_by_grpo", keep=tmp_path / "te", made_of=by_auto(of), **same)
    solo.te("trained_by_grpo", keep=tmp_path / "ours", made_of=OURS, **same)
    for theirs, ours in zip(assert_agree(tmp_path / "te"), metrics(tmp_path / "ours")):
        assert [theirs[name] for name in ("reward", "samples")] == [ours[name] for name in ("reward", "samples")]
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rollouts_and_training_agree_under_every_layout(pair, folders, tmp_path, layout):
    plan = LAYOUTS[layout]
    pair.te("trained_by_grpo", hf=folders["qwen2"], of=tiny.DIMS, plan=plan, keep=tmp_path, steps=2,
            made_of=by_auto(tiny.DIMS, plan))  # fmt: skip
    assert_agree(tmp_path)


def test_ranks_killed_in_a_rollout_and_in_a_save_end_as_the_uninterrupted_run(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS))
    arguments = dict(steps=6, minibatches=2, checkpoint_every=2, made_of=astuple(by_auto(tiny.DIMS)))
    whole, cut, hf = tmp_path / "whole", tmp_path / "cut", folders["qwen2"]
    plain = in_ranks_of_their_own(hf, whole, [None, None], **arguments)
    for death in ([["rollout", 9, 0.01]] * 2, [["save", 1, 0.1]] * 2):
        ended = in_ranks_of_their_own(hf, cut, death, **arguments)
        assert -signal.SIGKILL in [rank.returncode for rank in ended], ended[0].stderr[-2000:]
    last = in_ranks_of_their_own(hf, cut, [None, None], **arguments)
    digests = {json.loads(rank.stdout.splitlines()[-1])["digest"] for rank in [*plain, *last]}
    assert len(digests) == 1, last[0].stderr[-2000:]
