"""A reward for tests: the share of a completion's characters that are small digits."""

from typing import Any


def small(item: Any, completion: str) -> float:
    return sum(character in "01234" for character in completion) / max(len(completion), 1)
