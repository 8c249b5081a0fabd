"""Accuracy of a model folder on a task's rows, or on a mix of tasks: an array over prompts, counts added up."""

from pathlib import Path
from typing import Any

from data_tools.mistake import Problem
from data_tools.tasks import mix
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import evaluate
from megatron_ext.entrypoints.evaluate import Config


def check(config: Config, placement: Placement) -> list[Problem]:
    return evaluate.check(config, placement.ranks, placement)


def datasets(config: Config) -> list[str]:
    return mix.datasets(config.mix)


def run(config: Config, task: Task) -> dict[str, Any]:
    return evaluate.run(config, task.out, task.keep, progress=task.progress_or_stop, index=task.index, count=task.count)


def finish(parts: list[Path], config: Config, task: Task) -> dict[str, Any]:
    facts = evaluate.finish(config, parts, task.out, task.keep)
    text = f"{facts['prompts']:,} prompts, no accuracy"
    if facts["accuracy"] is not None:
        text = f"accuracy {facts['accuracy']:.3f} ({facts['correct']:,} of {facts['prompts']:,})"
    text += f", of which {facts['unscored']:,} could not be scored" if facts.get("unscored") else ""
    for name in ("reward", "regret"):
        text += f", {name} {facts[name]:.3f}" if name in facts else ""
    if facts.get("seen_prompts"):
        unseen = f"{facts['unseen_accuracy']:.3f}" if facts["unseen_prompts"] else "none"
        text += f"; seen in training {facts['seen_accuracy']:.3f} of {facts['seen_prompts']:,}, not seen {unseen} of "
        text += f"{facts['unseen_prompts']:,}"
    if "sampled_accuracy" in facts:
        text += f"; sampled {facts['sampled_accuracy']:.3f}"
        for kind in ("pass@", "maj@"):
            text += "".join(
                f", {name} {facts[name]:.3f}" for name in [name for name in facts if name.startswith(kind)][-1:]
            )
    if "gain" in facts:
        text += f", gain {100 * facts['gain']:+.1f} ± {100 * facts['gain_error']:.1f} points"
    return {"headline": text, **facts}
