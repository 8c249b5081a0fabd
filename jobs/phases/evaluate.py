"""Accuracies of a model folder, on a task's rows or on the tasks of a mix, each by itself.

An array over prompts (array: 4), or over the tasks of a mix (array: [gsm8k, math500]); counts are added up.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.mistake import Problem
from data_tools.tasks import mix
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import evaluate
from megatron_ext.entrypoints.evaluate import Config


def check(config: Config, placement: Placement) -> list[Problem]:
    problems = evaluate.check(config, placement.ranks, placement)
    return problems or [
        Problem("mix", f"array: {wrong}") for wrong in evaluate.check_elements(config, placement.values)
    ]


def datasets(config: Config) -> list[str]:
    return mix.datasets(config.mix)


def run(config: Config, task: Task) -> dict[str, Any]:
    share = {"only": task.value} if isinstance(task.value, str) else {}
    return evaluate.run(
        config, task.out, task.keep, progress=task.progress_or_stop, index=task.index, count=task.count, **share
    )


def finish(parts: list[Path], config: Config, task: Task) -> dict[str, Any]:
    facts = evaluate.finish(config, parts, task.out, task.keep)
    tasks = facts.get("tasks", [])
    told = [f"{name}: {_told(facts, f'{name}_')}" for name in tasks if f"{name}_prompts" in facts]
    for name, mean in facts.get("macro", {}).items():
        value = mean.get("accuracy", mean.get("sampled_accuracy"))
        told += [f"macro {name} {value:.3f} (mean over {', '.join(mean['tasks'])})"] if value is not None else []
    return {"headline": "; ".join(told) if len(tasks) > 1 else _told(facts, ""), **facts}


def _told(facts: Mapping[str, Any], prefix: str) -> str:
    """Return what is said of one task: of the facts whose names begin with `prefix`."""
    one = {name.removeprefix(prefix): value for name, value in facts.items() if name.startswith(prefix)}
    text = f"{one['prompts']:,} prompts, no accuracy"
    if one["accuracy"] is not None:
        text = f"accuracy {one['accuracy']:.3f} ({one['correct']:,} of {one['prompts']:,})"
    text += f", of which {one['unscored']:,} could not be scored" if one.get("unscored") else ""
    for name in ("reward", "regret"):
        text += f", {name} {one[name]:.3f}" if name in one else ""
    if one.get("seen_prompts"):
        unseen = f"{one['unseen_accuracy']:.3f}" if one["unseen_prompts"] else "none"
        text += f"; seen in training {one['seen_accuracy']:.3f} of {one['seen_prompts']:,}, not seen {unseen} of "
        text += f"{one['unseen_prompts']:,}"
    if "sampled_accuracy" in one:
        text += f"{', ' if prefix else '; '}sampled {one['sampled_accuracy']:.3f}"
        for kind in ("pass@", "maj@"):
            largest = [name for name in one if name.startswith(kind)][-1:]
            text += "".join(f", {name} {one[name]:.3f}" for name in largest)
    if "gain" in one:
        text += f", gain {100 * one['gain']:+.1f} ± {100 * one['gain_error']:.1f} points"
    return text
