"""A run that trains nothing is no success: it says so, with counts and the commonest reason, as early as it is sure."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from data_tools.mistake import UserMistake
from data_tools.tasks.rewards import NOT_SCORABLE
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rl.position import Position
from megatron_ext.rl.samples import Sample, SampleBatch, batch_of
from megatron_ext.rl.settings import Advantage, Rewarding
from megatron_ext.rl.untrained import told
from megatron_ext.rl.updates import check_advantages, remedy
from megatron_ext.training.update import NonFinite
from tests.megatron_ext import tiny
from tests.megatron_ext.rl import toy


def metrics(keep: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (keep / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return tiny.hf_folder(tmp_path_factory.mktemp("qwen2"), tiny.DIMS, seed=4)


def test_a_step_that_teaches_nothing_changes_nothing_and_is_no_error(hf, tmp_path):
    """Of a run in which some other step does."""
    found = toy.trained(hf, tiny.DIMS, ParallelPlan(), tmp_path, steps=3, judge=alike_until, refill_tries=1)
    assert [line["prompts_kept"] for line in metrics(tmp_path)][:2] == [0, 0]
    assert [line["updates"] for line in metrics(tmp_path)] == [0, 0, 1]
    assert found["position"]["equal"] >= 2 * 2 * 4 * 4 and found["position"]["signal"] > 0


def alike_until(item: int, completion: str) -> float:
    """Two steps of equal rewards, in each of which other prompts are drawn once."""
    return 1.0 if item < 16 else toy.share_below(item, completion)


def raising(item: int, completion: str) -> Any:
    return toy.Score(None, {}, "KeyError: 'answer'" if len(completion) % 3 else "ValueError: no number")


def unanswerable(item: int, completion: str) -> Any:
    return toy.Score(None, {}, NOT_SCORABLE)


FRUITLESS = {
    "every verdict of the first step failed": (
        dict(judge=raising), 1, r"step 1: no sample of 16 could be scored: KeyError: 'answer' \(\d+ times\); mend"),
    "nothing is scorable": (
        dict(judge=unanswerable), 2, r"of 32 samples 32 had no reward, commonest reason: not scorable \(32 times\)"),
    "all are cut off": (
        dict(max_tokens=1, rewarding=Rewarding()), 2, r"of 32 samples [23]\d were cut off.*raise sampling.max_tokens"),
    "all are equal": (dict(judge=lambda item, text: 1.0), 2, "of 32 samples 32 were in groups of equal rewards.*finer"),
    "all are equal and kept": (
        dict(judge=lambda item, text: 1.0, advantage=Advantage(drop_equal_groups=False)), 2,
        "all rewards of a group were equal"),
}  # fmt: skip


@pytest.mark.parametrize("case", FRUITLESS)
def test_a_run_that_trains_nothing_fails_with_the_counts_and_the_commonest_reason(hf, tmp_path, case):
    """At its end, or at once where no verdict can be had; and again where it is gone on with."""
    arguments, steps, said = FRUITLESS[case]
    for _ in range(2 if arguments.get("judge") is raising else 1):
        with pytest.raises(UserMistake, match=said):
            toy.trained(hf, tiny.DIMS, ParallelPlan(), tmp_path, steps=2, **arguments)
        assert len(metrics(tmp_path)) == steps


def test_what_was_sampled_for_failed_verdicts_is_scored_anew_and_the_run_ends_as_if_they_had_not(hf, tmp_path):
    plain = dict(hf=hf, of=tiny.DIMS, plan=ParallelPlan(), steps=1)
    with pytest.raises(UserMistake, match="step 1: no sample of 16"):
        toy.trained(keep=tmp_path / "cut", judge=raising, **plain)
    again, whole = toy.trained(keep=tmp_path / "cut", **plain), toy.trained(keep=tmp_path / "whole", **plain)
    assert again["digest"] == whole["digest"] and metrics(tmp_path / "cut")[0]["samples_from_journal"] == 16


def test_ten_steps_of_failed_verdicts_end_a_run_and_fewer_do_not():
    def after(*broken: bool) -> Position:
        position = Position()
        for failed in broken:
            drawn = [Sample(0, 0, (1,), numpy.zeros(1, numpy.int32), numpy.zeros(1, numpy.float32), "stop",
                            None if failed else 1.0, note="KeyError: 1" if failed else "")]  # fmt: skip
            batch = batch_of(drawn, set(), Advantage(), Rewarding(), 8)
            position.count(drawn, batch, Rewarding(), updates=0, line={"reward": None})
        return position

    assert after(True).is_broken and not after(False).is_broken and not after(False, True).is_broken
    assert not after(False, *[True] * 9).is_broken and after(False, *[True] * 10).is_broken
    assert not after(*[False, *[True] * 9] * 2).is_broken
    resumed = Position.read({"cursor": 4, "trained_samples": 7, "samples": 9})  # of before these were counted
    assert resumed.signal == 7 and not resumed.is_broken


def batch_of_rewards(*rewards: float) -> SampleBatch:
    drawn = [Sample(3, n, (1,), numpy.zeros(1, numpy.int32), numpy.zeros(1, numpy.float32), "stop", reward)
             for n, reward in enumerate(rewards)]  # fmt: skip
    return batch_of(drawn, {3}, Advantage(scale="none"), Rewarding(), 8)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_what_overflows_is_named_with_its_own_remedy():
    for rewards in ((1e308, -1e308), (3.4e38, -3.4e38, -3.4e38)):  # as sums of terms and penalties may come to
        with pytest.raises(NonFinite, match="step 2: of prompt 3's rewards from -.*e.* to .*e.* float32 holds no adv"):
            check_advantages(batch_of_rewards(*rewards), 2)
    check_advantages(batch_of_rewards(1e30, -1e30), 2)
    plain = batch_of_rewards(1.0, 0.0)
    said = {
        "Advantages are up to 1e+30: scale the rewards": ({"max_log_ratio": 50.0}, batch_of_rewards(1e30, -1e30)),
        "A trained token became e^50 times as likely within the step: lower lr": ({"max_log_ratio": 50.0}, plain),
        "The reference gives a trained token e^90 times": ({"max_below_reference": 90.0}, plain),
        "Lower lr or raise warmup_steps": ({"max_log_ratio": 1.0}, plain),
    }
    for words, (measures, batch) in said.items():
        assert remedy(measures, batch).startswith(words)


def test_a_headline_counts_what_was_not_trained():
    assert told({"unscorable": 3, "cut_off": 1200, "equal": 0}) == "3 unscorable, 1,200 cut off"
    assert told({"unscorable": 0, "cut_off": 0, "equal": 0}) == told({}) == ""
