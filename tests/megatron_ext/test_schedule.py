"""The learning rate is a pure function of the step."""

import pytest

from data_tools.base import declared
from megatron_ext.training.schedule import Schedule, check
from megatron_ext.training.settings import TrainingSettings


def rates(**changes) -> list[float]:
    schedule = Schedule(**{"shape": "wsd", "steps": 20, "peak": 1.0, "warmup": 4, **changes})
    return [schedule.rate(step) for step in range(schedule.steps)]


def test_warm_up_is_linear_and_reaches_the_peak():
    assert rates()[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_wsd_decays_linearly_over_the_last_share_only():
    assert rates(decay_share=0.25, floor=0.0)[14:] == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert min(rates(decay_share=0.25, floor=0.1)) >= 0.1


def test_cosine_falls_from_the_first_step_after_the_warm_up():
    found = rates(shape="cosine")
    assert found[4] == 1.0 and all(a > b > 0 for a, b in zip(found[4:], found[5:]))


def test_constant_stays():
    assert set(rates(shape="constant")[4:]) == {1.0}


def test_all_mistakes_are_named_with_the_nearest_schedule():
    wrong = TrainingSettings(model="m", schedule="cosin", lr=-1.0, decay_share=0.0)
    found = [str(problem) for problem in declared.check(wrong, "with")]
    assert found[0].startswith("with.schedule: unknown value 'cosin' (did you mean cosine?")
    assert [line.split(":")[0] for line in found] == ["with.schedule", "with.lr", "with.decay_share"]
    found = [str(p) for p in check(Schedule("cosine", 10, 0.1, 0.2, 11, 0.2), "with")]
    assert [line.split(":")[0] for line in found] == ["with.warmup_steps", "with.min_lr"]
