"""Lays a token store's documents into packs of one length: the plan of every batch, apart from the tokens."""

from typing import Any

from data_tools.base.inside import expanded
from data_tools.base.printing import count_of
from data_tools.base.tables import write_table
from data_tools.mistake import Problem
from data_tools.packs import pack
from data_tools.packs.export_packs import export
from data_tools.packs.pack import Config
from data_tools.records import sources
from jobs.kind import Placement
from jobs.task import Task


def check(config: Config, placement: Placement) -> list[Problem]:
    store = expanded(config.store)
    names = placement.forecasts.get(config.store, {}).get("sources") or sources.of_folder(store)
    return pack.check(config) + (sources.check(config.weights, config.overlong_of, names) if names else [])


def forecast(config: Config, placement: Placement) -> dict[str, Any]:
    return {"pack_length": config.pack_length, "align": config.align}


def run(config: Config, task: Task) -> dict[str, Any]:
    facts = pack.pack(config, task.out, task.progress)
    facts["exports"] = export(config, task.out, task.progress)
    for name, table in facts.pop("tables").items():
        write_table(task.keep, name, **table)
    return {
        "headline": f"{count_of(facts['packs'], 'pack')} of {config.pack_length:,} tokens, {facts['fill']:.1%} full",
        **facts,
    }
