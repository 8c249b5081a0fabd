"""What the metrics of a step say of decisions: mean reward, regret to the best action, shares of the actions."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_tools.tasks.mix import Entry
from data_tools.tasks.outcome import Outcomes
from data_tools.tasks.task import Item
from megatron_ext.rl.prompts import judged
from megatron_ext.rl.samples import Sample

REWARDS = {0: [0.1, 0.7, 0.2], 1: [0.5, 0.25, 0.25]}


def sample(item: int, action: str | None, finish: str = "stop") -> Sample:
    reward = None if action is None else REWARDS[item][int(action)]
    return Sample(item, 0, (1,), np.array([2]), np.zeros(1, np.float32), finish, reward, answer=action)


def test_regret_is_to_each_rows_best_and_shares_are_of_whole_answers():
    entries = {"decisions": Entry(task="bracketed_action"), "gsm8k": Entry()}
    draws: dict[int, Any] = {
        k: SimpleNamespace(entry="decisions", item=Item.of("?", None, {"rewards": REWARDS[k]})) for k in REWARDS
    }
    draws[2] = SimpleNamespace(entry="gsm8k", item=Item.of("?", "1", {}))
    drawn = [sample(0, "1"), sample(0, "2"), sample(1, "0"), sample(1, None, "length")]
    drawn.append(Sample(2, 0, (1,), np.array([2]), np.zeros(1, np.float32), "stop", 1.0, answer="1"))
    prompts = SimpleNamespace(item=draws.__getitem__)
    told = judged(drawn, prompts, Outcomes(entries))  # type: ignore[arg-type]
    assert set(told) == {"decisions"}  # gsm8k knows no best
    said = told["decisions"]
    assert said["reward"] == pytest.approx((0.45 + 0.5) / 2) and said["regret"] == pytest.approx((0.25 + 0.0) / 2)
    assert {name: value for name, value in said.items() if name.startswith("share_")} == {
        "share_0": pytest.approx(1 / 3), "share_1": pytest.approx(1 / 3), "share_2": pytest.approx(1 / 3),
    }  # fmt: skip
