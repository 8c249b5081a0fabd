"""Entries of a mix that ask in messages, which only a tokenizer with a chat template can spell, and those whose texts
pass such a template by."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from data_tools.chats.tokenizer import Tokenizer
from data_tools.mistake import Problem, UserMistake
from data_tools.tasks.mix import Entry, MixConfig, compared, entries_of, first_record
from data_tools.tasks.task import FunctionTask, Item, load_task, task_names, task_options

_RENDERED = re.compile(r"<\|[^<>|\s]+\|>")  # written by a template; decides only whether a note is told


def check_template(config: MixConfig, has_template: bool | None, model: str) -> list[Problem]:
    """Refuse prompts that are messages where the tokenizer of a model folder has no chat template; None: not known."""
    if has_template is not False:
        return []
    try:
        names = asking_messages(entries_of(config))
    except UserMistake:  # which check_mix tells
        return []
    remedy = "have it write texts (chat: false; form: text), or give import_hf a tokenizer with a chat_template.jinja"
    message = f"asks in messages, and the tokenizer of {model} has no chat template: {remedy}"
    return [Problem(f"mix.entries.{name}.options", message) for name in names]


def asking_messages(entries: Mapping[str, Entry]) -> list[str]:
    """Return the entries whose prompts are messages for a chat template, since their option `chat` says so. What else
    asks so is known once its records are read."""
    names = []
    for name, entry in entries.items():
        task: Any = load_task(entry.task) if entry.task in task_names() else None
        options = task_options(task, entry.options) if task else _of_function(entry)
        if getattr(options, "form", "") == "message" or getattr(options, "chat", False) and not compared({name: entry}):
            names.append(name)
    return names


def told_texts(config: MixConfig, has_template: bool | None, model: str) -> list[str]:
    """Say which entries of functions have texts for prompts that pass the chat template of a model folder by, and
    nothing of those that say so. Read the first record of each; of files that are not there yet nothing is told. What a
    task's own module asks is known once it is run (`past_template`).
    """
    if not has_template:
        return []
    said = []
    try:
        asked = {name: (entry, _of_function(entry)) for name, entry in entries_of(config).items()}
    except UserMistake:  # which check_mix tells
        return []
    for name, (entry, options) in asked.items():
        if options is None or options.form:
            continue
        try:
            record = first_record(entry, FunctionTask)
        except (UserMistake, OSError):  # which the run tells
            continue
        prompt = (record or {}).get(options.prompt_key, "")
        if prompt and isinstance(prompt, str) and not _RENDERED.search(prompt):
            message = (
                f"mix.entries.{name}: its prompts are texts, and reach the model as they stand, past the chat template "
                f"of {model}'s tokenizer; say options: {{form: message}} for a user's message each, give messages, or "
                "say that it is meant: options: {form: text}"
            )
            said.append(message)
    return said


def past_template(entries: Mapping[str, Entry], items: Mapping[str, Sequence[Item]], tokenizer: Tokenizer) -> list[str]:
    """Say which of users' own entries ask in texts that pass a tokenizer's chat template by, once their prompts are
    there; nothing of functions whose options say so."""
    said = []
    for name, entry in entries.items() if tokenizer.chat_template else ():
        options = _of_function(entry)
        if (entry.task or name) in task_names() or (options and options.form):
            continue
        texts = sum(isinstance(item.prompt, str) and not _RENDERED.search(item.prompt) for item in items[name])
        remedy = "say options: {form: message}" if options else "have its `items` give messages"
        if texts:
            said.append(
                f"mix.entries.{name}: {texts:,} of its {len(items[name]):,} prompts are texts, and reach the model as "
                f"they stand, past the chat template of {tokenizer.name}; {remedy} where that is not meant"
            )
    return said


def _of_function(entry: Entry) -> Any:
    """Return the options of an entry whose task is a function, without running its module; None of any other."""
    return task_options(FunctionTask, entry.options) if ":" in entry.task else None
