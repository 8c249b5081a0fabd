"""A task says what is right; rewards of which nobody said so are no accuracy."""

import sys
import types

import pytest

from data_tools.tasks.mix import Entry
from data_tools.tasks.outcome import Outcomes, graded, is_unjudged
from data_tools.tasks.rewards import Score
from data_tools.tasks.task import Item

ITEM = Item("x", "?", None, {"rewards": [0.88, 0.1, 0.88]})


@pytest.fixture
def mine():
    """A user's module with a reward function."""
    module = types.ModuleType("my_rewards")
    module.reward = lambda item, completion: 0.5
    sys.modules["my_rewards"] = module
    yield module
    del sys.modules["my_rewards"]


def right(entry: Entry, reward, parts=None):
    return Outcomes({"e": entry}).is_right("e", ITEM, reward, {"reward": reward} if parts is None else parts)


def test_the_best_action_of_a_row_is_right_whatever_it_is_worth():
    for weights in ({}, {"action": 2.0}):
        outcomes = Outcomes({"e": Entry("bracketed_action", rewards=weights)})
        weight = weights.get("action", 1.0)
        assert outcomes.best("e", ITEM) == 0.88 * weight
        found = [outcomes.is_right("e", ITEM, value * weight, {"action": value}) for value in (0.88, 0.1)]
        assert found == [True, False] and outcomes.is_right("e", ITEM, None, {}) is None


def test_a_term_correct_decides_beside_any_others():
    entry = Entry("gsm8k", rewards={"format": 0.1})
    for reward, correct in ((1.0, 1.0), (0.1, 0.0)):
        assert right(entry, reward, {"correct": correct, "format": 1 - correct}) is bool(correct)


def test_rewards_that_are_neither_right_nor_wrong_have_no_verdict_until_their_task_says_which(mine):
    entry = Entry("my_rewards:reward")
    assert [right(entry, reward) for reward in (1.0, 0.0, -1.0, None)] == [True, False, False, None]
    assert [right(entry, reward) for reward in (0.88, 0.5, 2.0, -0.5, 7.0)] == [None] * 5
    mine.RIGHT = 0.8
    assert [right(entry, reward) for reward in (0.88, 0.5, 2.0, 0.8)] == [True, False, True, True]
    assert right(entry, 5.0, {"correct": 0.0}) is False


def test_a_completion_that_was_cut_off_is_masked_or_has_its_penalty():
    masked, penalized = Entry("bracketed_action"), Entry("bracketed_action", {"on_invalid": "penalty", "penalty": -1.0})
    assert Outcomes({"e": masked}).cut_off("e", ITEM) == Score(None, {}, "not scorable")
    assert Outcomes({"e": penalized}).cut_off("e", ITEM) == Score(-1.0, {"action": -1.0})
    assert Outcomes({"e": Entry("gsm8k")}).cut_off("e", ITEM) is None


def test_graded_samples_have_mean_reward_regret_and_shares_of_actions():
    """Means are over prompts, not over samples: 0.5 and (0.25 + 0.75) / 2."""
    samples = [{"prompt": "a", "reward": 0.5, "best": 1.0, "answer": "0", "correct": False}]
    samples += [
        {"prompt": "b", "reward": value, "best": 0.75, "answer": "1", "correct": value == 0.75}
        for value in (0.25, 0.75)
    ]
    samples += [{"prompt": "b", "reward": None, "best": 0.75, "answer": None, "correct": None}]
    found = graded(samples, "greedy_")
    assert (found["greedy_reward"], found["greedy_regret"]) == (0.5, 0.375)
    assert (found["greedy_share_0"], found["greedy_share_1"]) == (1 / 3, 2 / 3)
    assert not any(map(is_unjudged, samples))


def test_tasks_of_right_and_wrong_report_as_they_did():
    samples = [{"prompt": "a", "reward": 1.0, "correct": True}, {"prompt": "a", "reward": None, "correct": None}]
    assert graded(samples) == {} and is_unjudged({"reward": 0.5, "correct": None})
