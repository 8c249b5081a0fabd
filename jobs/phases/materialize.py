"""Turns conversations or a task's rows into token ids and loss masks: an array over shares of the inputs."""

import contextlib
from pathlib import Path
from typing import Any

from data_tools.base.inside import expanded
from data_tools.base.json_text import json_value
from data_tools.base.one_file import bundle
from data_tools.base.tables import write_table
from data_tools.chats.char_tokenizer import characters_of
from data_tools.chats.fields import remedies
from data_tools.chats.tokenizer import has_template
from data_tools.mistake import Problem, UserMistake
from data_tools.packs import first_rows, materialize
from data_tools.packs.materialize import Config
from data_tools.recipes import recipe as recipes
from data_tools.records.blend_file import LARGEST_BLEND, refuse_blend
from data_tools.records.shares import check_shares
from jobs.kind import Placement
from jobs.task import Task


def check(config: Config, placement: Placement) -> list[Problem]:
    problems = [*materialize.check(config), *_check_template(config, placement), *_check_blends(config)]
    return problems or _check_shares(config, placement) or _check_characters(config, placement)


def _check_characters(config: Config, placement: Placement) -> list[Problem]:
    """Refuse a tokenizer that can encode none of the first rows of a source."""
    characters = _characters(config, placement)
    if characters is None:
        return []
    remedy = "take one that knows them: that of a real model, or of init_model with `alphabet: bytes`, which knows any"
    none = [source for source in first_rows.unknown(config, characters) if source.strange == source.rows]
    return [Problem("tokenizer", f"knows {len(characters)} characters, and {source}; {remedy}") for source in none]


def _characters(config: Config, placement: Placement) -> str | None:
    """Return the characters that the tokenizer knows, or will know; None of one that may know any."""
    folder = expanded(config.tokenizer)
    known = characters_of(folder) or characters_of(folder / "hf")
    for upstream, forecast in placement.forecasts.items():
        if known is None and config.tokenizer in (upstream, f"{upstream}/hf"):
            known = forecast.get("characters")
    return known


def _check_shares(config: Config, placement: Placement) -> list[Problem]:
    """Refuse files that all elements would have to read whole; what an upstream phase makes, reading it refuses."""
    with contextlib.suppress(UserMistake):  # of files that are missing, reading says so
        files = [(f"source.inputs ({origin.name})", origin.path) for origin in materialize.origins_of(config)]
        return check_shares(files, placement.elements, config.format)
    return []


def _check_template(config: Config, placement: Placement) -> list[Problem]:
    """Refuse conversations to be rendered by a tokenizer that has no chat template, or will have none."""
    if not materialize.needs_template(config):
        return []
    known = has_template(expanded(config.tokenizer))
    for folder, forecast in placement.forecasts.items():
        if known is None and config.tokenizer in (folder, f"{folder}/hf"):
            known = forecast.get("chat_template")
    if known is not False:
        return []
    message = f"{config.tokenizer} has no chat template, which conversations are rendered with; name a file in"
    return [Problem("tokenizer", f"{message} chat.template, or a tokenizer that has one")]


def _check_blends(config: Config) -> list[Problem]:
    """Refuse Megatron's files of blends, as reading one would, but before anything queues."""
    problems = []
    for place, name in enumerate(config.source.inputs):
        path = expanded(name)
        if path.suffix == ".json" and path.is_file() and path.stat().st_size <= LARGEST_BLEND:
            with contextlib.suppress(ValueError):  # what is no JSON, reading it says
                try:
                    refuse_blend(path, json_value(path.read_text("utf-8-sig")))
                except UserMistake as mistake:
                    problems.append(Problem(f"source.inputs[{place}]", str(mistake)))
    return problems


def forecast(config: Config, placement: Placement) -> dict[str, Any]:
    return {"sources": materialize.forecast(config)}


def datasets(config: Config) -> list[str]:
    return materialize.datasets(config)


def remarks(config: Config, placement: Placement) -> list[str]:
    """Say what the recipe came to, nothing of one that is refused, and of which rows the tokenizer lacks characters."""
    try:
        said = recipes.told(materialize.recipe_of(config), config.recipe_sources) if config.recipe else []
    except UserMistake:
        return []
    characters = _characters(config, placement)
    unknown = first_rows.unknown(config, characters) if characters is not None else []
    return said + [f"the tokenizer knows {len(characters or '')} characters: {source}" for source in unknown]


def run(config: Config, task: Task) -> dict[str, Any]:
    facts = materialize.materialize(config, task.out, task.index, task.count, progress=task.progress_or_stop)
    if task.count > 1:  # thousands of elements have a file each, not eight
        bundle(task.out)
    return facts


def finish(parts: list[Path], config: Config, task: Task) -> dict[str, Any]:
    facts = materialize.finish(config, parts, task.out)
    write_table(task.keep, "balance", **facts.pop("table"))
    if "recipe_table" in facts:
        write_table(task.keep, "recipe", **facts.pop("recipe_table"))
    dropped = ", ".join(f"{count:,} {bucket}" for bucket, count in sorted(facts["buckets"].items()))
    listed = f"; {facts['left_out']['file']} lists {facts['left_out']['rows']:,}" if "left_out" in facts else ""
    came = facts["kept"] + sum(facts["buckets"].values())  # a line that could not be read is a row that is not kept
    kept = f"{facts['kept']:,} of {came:,} rows kept{f' ({dropped}{listed})' if dropped else ''}"
    tokens = f"{facts['tokens']:,} tokens, {facts['supervised']:,} in the loss"
    return {
        "headline": "; ".join([f"{kept}, {tokens}", *_recipe(facts), *remedies(facts["buckets"]), *_liberties(config)]),
        **facts,
        **_liberty_facts(config),
    }


def _recipe(facts: dict[str, Any]) -> list[str]:
    """Return what a recipe held out, and where it has too few rows, in words."""
    said = [f"{facts['validation']['rows']:,} rows held out for validation"] if "validation" in facts else []
    said += [f"no row of {', '.join(facts['empty'])}"] if facts.get("empty") else []
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
