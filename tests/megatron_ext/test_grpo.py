"""GRPO on real gloo ranks: it learns, lr 0 changes nothing, and a stopped run goes on as if it had not been."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.parallel import ParallelPlan
from megatron_ext.rl.settings import Advantage, Loss
from tests.megatron_ext import tiny
from tests.megatron_ext.rl import toy

FAMILIES = {
    "qwen2": tiny.DIMS,
    "gpt_oss": tiny.GPT_OSS_DIMS,
    "nemotron_h": tiny.hybrid("ME*-"),
}


def metrics(keep: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (keep / "metrics.jsonl").read_text().splitlines()]


def samples(keep: Path) -> list[dict[str, Any]]:
    paths = sorted((keep / "samples").glob("step_*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: tiny.hf_folder(tmp_path_factory.mktemp(name), of, seed=4) for name, of in FAMILIES.items()}


def test_without_a_learning_rate_the_ratio_is_one_and_nothing_is_clipped(folders, tmp_path):
    toy.trained(folders["qwen2"], tiny.DIMS, ParallelPlan(), tmp_path, steps=20, lr=0.0, passes=2, minibatches=2,
                old_logprobs="rollout")  # fmt: skip
    found = metrics(tmp_path)
    assert len(found) == 20
    for line in found:
        assert line["updates"] in (0, 4) and line["clipped_low"] == line["clipped_high"] == 0
        assert abs(line["ratio"] - 1) < 1e-5 and line["mismatch"]["max_log"] < 1e-5


CELLS = {
    "DP2": ParallelPlan(),
    "TP2": ParallelPlan(tensor=2, sequence_parallel=True),
    "PP2": ParallelPlan(pipeline=2),
    "EP2": ParallelPlan(expert=2),
    "CP2": ParallelPlan(context=2),
}


@pytest.mark.parametrize("family, cell", [("qwen2", "DP2"), ("qwen2", "PP2")])
def test_rewards_rise(two_ranks, folders, tmp_path, family, cell):
    two_ranks.run(toy.trained, hf=folders[family], of=FAMILIES[family], plan=CELLS[cell], keep=tmp_path, steps=12)
    rewards = [line["reward"] for line in metrics(tmp_path)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15, rewards


# ---------------------------------------------------------------- stopped, and gone on with


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of the metrics does not depend on the clock, nor on which samples shared an engine step."""
    kept = ("step", "lr", "reward", "reward_parts", "samples", "trained_samples", "length", "prompts_kept", "loss", "grad_norm")
    return [{name: line[name] for name in kept} for line in lines]


def texts(keep: Path) -> list[tuple[Any, ...]]:
    return [(s["step"], s["item"], s["sample"], s["tokens"], s["reward"], s["advantage"], s["trained"]) for s in samples(keep)]


def stop_and_go_on(pool, keep: Path, moments: list[int], **arguments: Any) -> list[dict[str, Any]]:
    for moment in moments:
        stopped = pool.run(toy.trained, keep=keep, stop_after=moment, **arguments)
        assert all("stopped" in facts for facts in stopped)
    return pool.run(toy.trained, keep=keep, **arguments)


@pytest.mark.parametrize(
    "family, cell",
    [("qwen2", "DP2"), *(pytest.param(*pair, marks=pytest.mark.soak) for pair in [("qwen2", "TP2"), ("gpt_oss", "EP2")])],
)
def test_a_run_stopped_in_mid_rollout_ends_as_the_uninterrupted_one_bit_for_bit(two_ranks, folders, tmp_path, family, cell):
    """Several updates a step, prompts drawn again, a checkpoint every third step only."""
    arguments = dict(hf=folders[family], of=FAMILIES[family], plan=CELLS[cell], steps=5, minibatches=2, refill_tries=1,
                     checkpoint_every=3, old_logprobs="recompute", advantage=Advantage(scale="none"))  # fmt: skip
    whole = two_ranks.run(toy.trained, keep=tmp_path / "whole", **arguments)[0]
    found = stop_and_go_on(two_ranks, tmp_path / "cut", [9, 5, 14], **arguments)[0]
    assert found["resumed_from"] > 0 and found["digest"] == whole["digest"]
    assert {**found["position"], "mismatch": 0} == {**whole["position"], "mismatch": 0}
    assert untimed(metrics(tmp_path / "cut")) == untimed(metrics(tmp_path / "whole"))
    used = texts(tmp_path / "cut")
    assert used == texts(tmp_path / "whole")
    assert len({key[1:3] for key in used}) == len(used) == whole["position"]["samples"]
