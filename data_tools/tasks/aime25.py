"""AIME 2025 (math-ai/aime25): thirty questions whose answers are whole numbers from 0 to 999. For evaluation."""

from data_tools.tasks.aime import REWARDS, Options, check_options, final_answer, items, rewards, warm_up

__all__ = ["HUB", "REWARDS", "Options", "check_options", "final_answer", "items", "rewards", "warm_up"]

HUB = "math-ai/aime25"
