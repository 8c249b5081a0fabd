"""Conversations or task rows to token ids and loss masks: an array over shares of the inputs, merged into one store."""

from pathlib import Path
from typing import Any

from data_tools.base.tables import write_table
from data_tools.chats.fields import remedies
from data_tools.mistake import Problem
from data_tools.packs import materialize
from data_tools.packs.materialize import Config
from data_tools.records import sources
from jobs.kind import Placement
from jobs.task import Task


def check(config: Config, placement: Placement) -> list[Problem]:
    return materialize.check(config)


def forecast(config: Config, placement: Placement) -> dict[str, Any]:
    return {"sources": None if materialize.datasets(config) else sources.forecast(config.source)}


def datasets(config: Config) -> list[str]:
    return materialize.datasets(config)


def run(config: Config, task: Task) -> dict[str, Any]:
    return materialize.materialize(config, task.out, task.index, task.count, progress=task.progress_or_stop)


def finish(parts: list[Path], config: Config, task: Task) -> dict[str, Any]:
    facts = materialize.finish(config, parts, task.out)
    write_table(task.keep, "balance", **facts.pop("table"))
    dropped = ", ".join(f"{count:,} {bucket}" for bucket, count in sorted(facts["buckets"].items()))
    kept = f"{facts['kept']:,} of {facts['rows']:,} rows kept{f' ({dropped})' if dropped else ''}"
    tokens = f"{facts['tokens']:,} tokens, {facts['supervised']:,} in the loss"
    return {
        "headline": "; ".join([f"{kept}, {tokens}", *remedies(facts["buckets"]), *_liberties(config)]),
        **facts,
        **_liberty_facts(config),
    }


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
