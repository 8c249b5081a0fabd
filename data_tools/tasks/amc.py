"""AMC 12 of 2022 and 2023 without choices (AI-MO/aimo-validation-amc): questions whose answers are numbers. For
evaluation."""

from data_tools.tasks.aime import REWARDS, Options, check_options, final_answer, items, rewards, warm_up

__all__ = ["HUB", "REWARDS", "Options", "check_options", "final_answer", "items", "rewards", "warm_up"]

HUB = "AI-MO/aimo-validation-amc"
