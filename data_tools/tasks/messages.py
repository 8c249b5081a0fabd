"""Entries of a mix that ask in messages, which only a tokenizer with a chat template can spell."""

from collections.abc import Mapping
from typing import Any

from data_tools.mistake import Problem, UserMistake
from data_tools.tasks.mix import Entry, MixConfig, compared, entries_of
from data_tools.tasks.task import load_task, task_names, task_options


def check_template(config: MixConfig, has_template: bool | None, model: str) -> list[Problem]:
    """Refuse prompts that are messages where the tokenizer of a model folder has no chat template; None: not known."""
    if has_template is not False:
        return []
    try:
        names = asking_messages(entries_of(config))
    except UserMistake:  # which check_mix tells
        return []
    remedy = "have it write texts (chat: false), or give import_hf a tokenizer with a chat_template.jinja"
    message = f"asks in messages, and the tokenizer of {model} has no chat template: {remedy}"
    return [Problem(f"mix.entries.{name}.options", message) for name in names]


def asking_messages(entries: Mapping[str, Entry]) -> list[str]:
    """Return the entries whose prompts are messages for a chat template, since their option `chat` says so. What else
    asks so is known once its records are read."""
    names = []
    for name, entry in entries.items():
        task: Any = load_task(entry.task) if entry.task in task_names() else None
        options = task_options(task, entry.options) if task else None
        if getattr(options, "chat", False) and not compared({name: entry}):
            names.append(name)
    return names
