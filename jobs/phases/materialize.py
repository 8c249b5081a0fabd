"""Conversations or task rows to token ids and loss masks: an array over shares of the inputs, merged into one store."""

from pathlib import Path
from typing import Any

from data_tools.base.tables import write_table
from data_tools.chats.fields import remedies
from data_tools.mistake import Problem, UserMistake
from data_tools.packs import materialize
from data_tools.packs.materialize import Config
from data_tools.recipes import recipe as recipes
from jobs.kind import Placement
from jobs.task import Task


def check(config: Config, placement: Placement) -> list[Problem]:
    return materialize.check(config)


def forecast(config: Config, placement: Placement) -> dict[str, Any]:
    return {"sources": materialize.forecast(config)}


def datasets(config: Config) -> list[str]:
    return materialize.datasets(config)


def remarks(config: Config, placement: Placement) -> list[str]:
    """Say what the recipe came to; nothing of one that is refused."""
    try:
        return recipes.told(materialize.recipe_of(config), config.recipe_sources) if config.recipe else []
    except UserMistake:
        return []


def run(config: Config, task: Task) -> dict[str, Any]:
    return materialize.materialize(config, task.out, task.index, task.count, progress=task.progress_or_stop)


def finish(parts: list[Path], config: Config, task: Task) -> dict[str, Any]:
    facts = materialize.finish(config, parts, task.out)
    write_table(task.keep, "balance", **facts.pop("table"))
    if "recipe_table" in facts:
        write_table(task.keep, "recipe", **facts.pop("recipe_table"))
    dropped = ", ".join(f"{count:,} {bucket}" for bucket, count in sorted(facts["buckets"].items()))
    kept = f"{facts['kept']:,} of {facts['rows']:,} rows kept{f' ({dropped})' if dropped else ''}"
    tokens = f"{facts['tokens']:,} tokens, {facts['supervised']:,} in the loss"
    return {
        "headline": "; ".join([f"{kept}, {tokens}", *_recipe(facts), *remedies(facts["buckets"]), *_liberties(config)]),
        **facts,
        **_liberty_facts(config),
    }


def _recipe(facts: dict[str, Any]) -> list[str]:
    """Return what a recipe held out, and where it has too few rows, in words."""
    said = [f"{facts['validation']['rows']:,} rows held out for validation"] if "validation" in facts else []
    by = facts["recipe"]["by"] if "recipe" in facts else ""
    return said + [f"{name} is {missing:,} {by} short of its share" for name, missing in facts.get("short", {}).items()]


def _liberties(config: Config) -> list[str]:
    """Return what the config allows where a chat template leaves something out of a row, in words."""
    said = []
    if config.chat.inline_reasoning:
        said.append("reasoning that the template does not write is in the contents, between <think> tags")
    if config.chat.may_lose:
        said.append(f"{', '.join(config.chat.may_lose)} left out where the template does not write it")
    return said


def _liberty_facts(config: Config) -> dict[str, Any]:
    return {name: value for name in ("inline_reasoning", "may_lose") if (value := getattr(config.chat, name))}
