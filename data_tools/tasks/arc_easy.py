"""ARC, the easy set (allenai/ai2_arc): 5,197 school questions of science with choices. The hub's file here is that of
training."""

from data_tools.tasks.arc_challenge import REWARDS, Options, check_options, compares, final_answer, items, rewards

__all__ = ["HUB", "REWARDS", "Options", "check_options", "compares", "final_answer", "items", "rewards"]

HUB = "allenai/ai2_arc:ARC-Easy/train-*.parquet"
