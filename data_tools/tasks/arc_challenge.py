"""ARC, the challenge set (allenai/ai2_arc): 2,590 school questions of science with choices. The hub's file here is that
of training."""

from dataclasses import dataclass

from data_tools.base.declared import with_default
from data_tools.tasks import multiple_choice
from data_tools.tasks.multiple_choice import REWARDS, check_options, compares, final_answer, items, rewards

__all__ = ["HUB", "REWARDS", "Options", "check_options", "compares", "final_answer", "items", "rewards"]

HUB = "allenai/ai2_arc:ARC-Challenge/train-*.parquet"


@dataclass
class Options(multiple_choice.Options):
    asked_as: str = with_default(multiple_choice.Options, "asked_as", "texts")
