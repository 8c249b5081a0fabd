"""What a reward says of a sample: whether it is right, and how far it is from the best, as its task means it.

right   with a term `correct`: 1 or more. A task that knows the best of a row (`best`): as good as that. A task that
        names its least right reward (`RIGHT`): that or more. Else the rewards 1, 0 and -1 are right, wrong, wrong;
        any other says nothing about right, and samples with it are graded: mean rewards stand for accuracy.
regret  what the best of the row is worth, less the reward; of tasks that know the best
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_tools.tasks.estimators import standard_error
from data_tools.tasks.rewards import Score, score_of
from data_tools.tasks.task import Item, load_task, task_options

_RIGHT, _WRONG = 1.0, (0.0, -1.0)


class Outcomes:
    """Says how the entries of a mix judge: `entries` are its tasks by name, with options and weights of reward
    terms."""

    def __init__(self, entries: Mapping[str, Any]):
        self._tasks = {name: load_task(entry.task or name) for name, entry in entries.items()}
        self._options = {name: task_options(task, entries[name].options) for name, task in self._tasks.items()}
        self._weights = {name: {**task.REWARDS, **entries[name].rewards} for name, task in self._tasks.items()}

    def is_right(self, name: str, item: Item, reward: float | None, parts: Mapping[str, Any]) -> bool | None:
        """Return whether a completion with this reward answers right; None where nobody can tell, or the task says no
        such thing."""
        if reward is None:
            return None
        if (best := self._best(name, item)) is not None:
            return all(parts.get(term, -np.inf) >= value for term, value in best.items())
        least = getattr(self._tasks[name], "RIGHT", None)
        if "correct" in parts or least is not None:
            return bool(parts.get("correct", reward) >= (_RIGHT if least is None else least))
        return True if reward == _RIGHT else False if reward in _WRONG else None

    def best(self, name: str, item: Item) -> float | None:
        """Return what the best completion of a prompt is worth, None where its task does not know."""
        terms = self._best(name, item)
        return None if terms is None else score_of(terms, self._weights[name]).reward

    def cut_off(self, name: str, item: Item) -> Score | None:
        """Return the score of a completion that did not end, None where such are scored as they stand."""
        task = self._tasks[name]
        if not hasattr(task, "cut_off"):
            return None
        return score_of(task.cut_off(item, self._options[name]), self._weights[name])

    def _best(self, name: str, item: Item) -> Mapping[str, float] | None:
        task = self._tasks[name]
        return task.best(item, self._options[name]) if hasattr(task, "best") else None


def is_graded(sample: Mapping[str, Any]) -> bool:
    """Return whether a sample (of generate's keys) has a reward that is neither right nor wrong, or one beside a known
    best."""
    return sample.get("reward") is not None and (sample.get("correct") is None or sample.get("best") is not None)


def is_unjudged(sample: Mapping[str, Any]) -> bool:
    """Return whether a sample has a reward of which its task does not say whether that is right."""
    return sample.get("reward") is not None and sample.get("correct") is None


def graded(samples: Sequence[Mapping[str, Any]], prefix: str = "") -> dict[str, Any]:
    """Return mean reward, regret and shares of the answers, over prompts; nothing where no sample is graded.

    A sample has `prompt`, `reward`, and where there are `correct`, `best`, `answer`. Those without a reward are left
    out.
    """
    if not any(map(is_graded, samples)):
        return {}
    scored = [sample for sample in samples if sample.get("reward") is not None]
    means: dict[str, Any] = _mean(scored, f"{prefix}reward", lambda sample: sample["reward"])
    if known := [sample for sample in scored if sample.get("best") is not None]:
        means |= _mean(known, f"{prefix}regret", lambda sample: sample["best"] - sample["reward"])
        answers = Counter(str(sample["answer"]) for sample in known if sample.get("answer") is not None)
        total = sum(answers.values())
        means |= {f"{prefix}share_{answer}": count / total for answer, count in sorted(answers.items())}
    return means


def _mean(samples: Sequence[Mapping[str, Any]], name: str, value_of: Any) -> dict[str, float | None]:
    by_prompt: dict[Any, list[float]] = {}
    for sample in samples:
        by_prompt.setdefault(sample["prompt"], []).append(value_of(sample))
    means = [float(np.mean(values)) for _, values in sorted(by_prompt.items(), key=lambda one: str(one[0]))]
    return {name: float(np.mean(means)), f"{name}_error": standard_error(means)}
