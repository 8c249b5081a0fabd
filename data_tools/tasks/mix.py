"""The prompts of a run: tasks with weights, each in an order of its own in which every prompt comes once an epoch.

    mix = Mix(entries, seed)
    draw = mix.draw(k)          # prompt k of the run: a pure function of (entries, seed, k), so k is all a resume needs

Of an entry with share w, the first p prompts of a run hold more than p·w - 1 and fewer than p·w + 1
(data_tools/base/blend.py).
"""

import bisect
import functools
import hashlib
import inspect
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.base import declared
from data_tools.base.declared import setting
from data_tools.base.seeded import permutation
from data_tools.base.tables import ShownTable
from data_tools.mistake import Problem, UserMistake, nearest
from data_tools.records import readers
from data_tools.records.balance import SourceBalance
from data_tools.records.hub import dataset_files, is_dataset
from data_tools.records.inputs import CSV, JSONL, PARQUET, files_of
from data_tools.tasks.environments import read_environments
from data_tools.tasks.rewards import Verifier
from data_tools.tasks.task import (
    FunctionTask,
    Item,
    Source,
    check_options,
    check_source,
    check_task,
    code_digest,
    declared_options,
    load_task,
    rows_from,
    task_names,
    task_options,
)

READ = CSV + JSONL + PARQUET  # of a folder; the JSON files of a phase's folder are its facts
_FIRST_PLACES = 1024  # of the blend; more are found as they are asked for


@dataclass
class Entry:
    """One task in a mix. Its name there stands for it in metrics and keeps its prompts apart from other entries'."""

    task: str = setting(
        "", 'a task, my.module or my.module:reward; "": the name of the entry', example="gsm8k", module=True
    )
    options: dict[str, Any] = setting(dict, "options of the task", example={"reverse_digits": True}, free=True)
    source: Source = setting(Source, "where its rows come from")
    hub: str = setting(
        "",
        'org/name[@revision][:glob] in the local cache, where source is empty; "": the task\'s own',
        example="openai/gsm8k",
        free=True,
    )
    limit: int = setting(0, "distinct prompts, the first ones; 0: all", unit="prompts", least=0)
    weight: float = setting(1.0, "share of the run's prompts, beside the other entries", least=0)
    rewards: dict[str, float] = setting(dict, "weights of reward terms, over the task's own", free=True)
    evaluation_only: bool = setting(False, "its prompts are never trained on")


@dataclass
class MixConfig:
    """The tasks of a run."""

    entries: dict[str, Entry] = setting(dict, "tasks by names that stand for them in metrics")
    environments: str = setting(
        "", "or also: Megatron-LM's YAML file of environments", example="environments.yaml", input=True
    )


def entries_of(config: MixConfig) -> dict[str, Entry]:
    """Return all entries by name, their tasks named. Over an environment of the same name go the values that are no
    defaults."""
    environments = read_environments(Path(config.environments)) if config.environments else {}
    entries = {name: Entry(**settings) for name, settings in environments.items()}
    for name, entry in config.entries.items():
        if name in entries:
            said = {
                key.name: getattr(entry, key.name) for key in fields(Entry) if getattr(entry, key.name) != _default(key)
            }
            entry = replace(entries[name], **said)
        entries[name] = replace(entry, task=entry.task or name)
    return entries


def _default(key: Any) -> Any:
    return key.default if key.default is not MISSING else key.default_factory()


def verifiers(entries: Mapping[str, Entry]) -> dict[str, Verifier]:
    """Return what the Scorer needs to know of them."""
    return {name: Verifier(entry.task, dict(entry.options), dict(entry.rewards)) for name, entry in entries.items()}


def turn_ends(entries: Mapping[str, Entry]) -> dict[str, tuple[str, ...]]:
    """Return, of the entries whose task has several turns, the texts after which the model waits for a reply."""
    ends = {}
    for name, entry in entries.items():
        task = load_task(entry.task or name)
        if not hasattr(task, "reply"):
            continue
        try:
            texts = task.stop_strings(task_options(task, entry.options))
        except Exception as error:  # whatever a user's module does
            raise UserMistake(
                Problem(f"mix.entries.{name}.task", f"stop_strings: {type(error).__name__}: {error}")
            ) from None
        if texts is None:
            continue
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and text for text in texts):
            raise UserMistake(
                Problem(f"mix.entries.{name}.task", f"stop_strings are {texts!r}: give a list of texts, or None")
            )
        ends[name] = tuple(texts)
    return ends


def datasets(config: MixConfig) -> list[str]:
    """Return the datasets of the hub that the entries read, since they are given no source."""
    specs = []
    for name, entry in entries_of(config).items():
        if not _has_source(entry):
            specs.append(entry.hub or load_task(entry.task or name).HUB)
    return specs


def _has_source(entry: Entry) -> bool:
    return bool(entry.source.inputs or entry.source.synthetic_rows)


def compared(entries: Mapping[str, Entry]) -> list[str]:
    """Return the entries whose choices are compared, so that nothing is generated."""
    names = []
    for name, entry in entries.items():
        task = load_task(entry.task or name)
        if hasattr(task, "compares") and task.compares(task_options(task, entry.options)):
            names.append(name)
    return names


# -- checks -----------------------------------------------------------------------------------------------------------


def check_mix(config: MixConfig, training: bool = True, where: str = "mix", comparing: bool = False) -> list[Problem]:
    """Return wrong values, all at once; opens the environment file alone.

    `training` needs an entry that is not evaluated only. `comparing` allows tasks that compare choices.
    """
    try:
        entries = entries_of(config)
    except UserMistake as mistake:
        return [Problem(f"{where}.environments", str(problem)) for problem in mistake.problems]
    problems = []
    for name, entry in entries.items():
        wrong = check_entry(entry, f"{where}.entries.{name}")
        if not (wrong or comparing) and "." not in entry.task and compared({name: entry}):
            message = "compares choices, which only evaluate does; leave out answered_by: likelihood"
            wrong = [Problem(f"{where}.entries.{name}.options", message)]
        problems += wrong
    if not entries:
        problems.append(Problem(f"{where}.entries", "no tasks; give one, such as {gsm8k: {source: {inputs: [FILE]}}}"))
    elif training and not any(entry.weight > 0 and not entry.evaluation_only for entry in entries.values()):
        problems.append(
            Problem(f"{where}.entries", "every task is for evaluation only or has weight 0; nothing is trained on")
        )
    return problems


def check_verdicts(config: MixConfig, limit_s: float) -> list[Problem]:
    """Return the entries whose own limit leaves no time for a verdict; of entries that `check_mix` accepts."""
    problems = []
    for name, entry in entries_of(config).items():
        task: Any = load_task(entry.task) if entry.task in task_names() else None
        if hasattr(task, "verdict_s") and (needed := task.verdict_s(task_options(task, entry.options))) >= limit_s:
            message = (
                f"a verdict may take {needed:g} s, and verify_limit_s is {limit_s:g}: lower the one or raise the other"
            )
            problems.append(Problem(f"mix.entries.{name}.options", message))
    return problems


def check_entry(entry: Entry, where: str) -> list[Problem]:
    problems = declared.check(entry, where)  # those of an environment file were not read by a phase's config
    if wrong := check_task(entry.task):
        return [*problems, Problem(f"{where}.task", wrong)]
    task: Any = FunctionTask if ":" in entry.task else None if "." in entry.task else load_task(entry.task)
    if options_of := task or declared_options(entry.task):  # a user's module is first run where it is used
        problems += check_options(options_of, entry.options, f"{where}.options")
    if task and not hasattr(task, "items"):
        return [Problem(f"{where}.task", f"task {entry.task} has conversations to learn; materialize takes it")]
    terms = getattr(task, "REWARDS", {})
    for name in entry.rewards:
        if terms and name not in terms:
            problems.append(
                Problem(
                    f"{where}.rewards", f"task {entry.task} has no reward term {name!r}{nearest(name, list(terms))}"
                )
            )
    return problems + _check_prompts(entry, task, where)


def _check_prompts(entry: Entry, task: Any, where: str) -> list[Problem]:
    has_source = _has_source(entry)
    if entry.hub and not is_dataset(entry.hub):
        return [
            Problem(f"{where}.hub", f"{entry.hub!r} is no dataset: write org/name, org/name@revision or org/name:glob")
        ]
    if not has_source and not entry.hub and not getattr(task, "HUB", ""):
        unread = "; the HUB of a module of yours is not read" if task is None else ""
        return [
            Problem(f"{where}.source", f"no prompts; give {rows_from(task)}, or a dataset of the hub in hub{unread}")
        ]
    if entry.source.synthetic_rows > 0 and task and not hasattr(task, "synthetic_row"):
        return [
            Problem(f"{where}.source.synthetic_rows", f"task {entry.task} makes no rows; give files in source.inputs")
        ]
    if not has_source:
        return []
    return [Problem(f"{where}.{problem.where}", problem.message) for problem in check_source(entry.source)]


# -- prompts ----------------------------------------------------------------------------------------------------------


class Loaded(NamedTuple):
    """Holds the prompts of an entry, and what became of each of its records and rows."""

    items: list[Item]
    sheet: SourceBalance
    shared: int  # prompts that several items have, since their rows are scored differently

    def counts(self) -> dict[str, int]:
        """Return what became of the records (`lines`) and of their rows, and `shared`."""
        sheet = self.sheet
        return {"lines": sheet.lines, **sheet.lines_dropped, "rows": sheet.rows, **sheet.dropped,
                "prompts": sheet.kept, "shared": self.shared}  # fmt: skip


def load_items(name: str, entry: Entry) -> list[Item]:
    """Return the prompts of an entry, as `load` gives them."""
    return load(name, entry).items


def load(name: str, entry: Entry) -> Loaded:
    """Return the prompts of an entry, files in order, then the synthetic rows.

    Rows of one prompt that are scored alike are one item, the others are counted as duplicates. Rows of one prompt with
    other answers or columns contradict one another, or are several tasks: none is chosen over another. Each is an item
    whose name says what it is scored with, and `shared` counts their prompts.

    Raise UserMistake `FILE:LINE: reason` for a malformed record, and when there is no prompt at all.
    """
    task = load_task(entry.task or name)
    if not hasattr(task, "items"):
        raise UserMistake(Problem(f"task {name}", "its module has no `items`, which gives the prompts of a record"))
    options = task_options(task, entry.options)
    left_out: Callable[[Any], list[str]] = getattr(task, "left_out", lambda record: [])
    items_by_key: dict[tuple[str, str], Item] = {}
    sheet = SourceBalance(name)
    for record in _records(entry, task, sheet):
        if entry.limit and len(items_by_key) >= entry.limit:
            break
        sheet.lines += 1
        try:
            items, wrong = _given(task, record.value, options), left_out(record.value)
        except ValueError as error:
            raise record.mistake(str(error)) from None
        _count(sheet, len(items), wrong)
        for item in items:
            key = (item.uid, item.scoring)
            if key in items_by_key:
                sheet.refuse("duplicate", 0)
            elif entry.limit and len(items_by_key) >= entry.limit:
                sheet.refuse("over_limit", 0)
            else:
                items_by_key[key] = item
                sheet.keep(0, 0)
    if not items_by_key:
        raise UserMistake(Problem(f"task {name}", "has no prompts: its files are empty, or hold none that it takes"))
    sheet.check()
    several = Counter(uid for uid, _ in items_by_key)
    items = [
        replace(item, uid=f"{name}/{uid}" if several[uid] == 1 else f"{name}/{uid}/{scoring}")
        for (uid, scoring), item in items_by_key.items()
    ]
    return Loaded(items, sheet, sum(count > 1 for count in several.values()))


def _given(task: Any, record: Any, options: Any) -> list[Item]:
    """Return the items that a task makes of a record. Raise UserMistake where its `items` gives anything else."""
    items = task.items(record, options)
    other = next((item for item in items if not isinstance(item, Item)), None) if isinstance(items, list) else items
    if other is not None:
        where = inspect.getsourcefile(task) or task.__name__
        said = f"`items` gives {'a list with ' * isinstance(items, list)}{type(other).__name__}"
        remedy = "a list of data_tools.tasks.task.Item of one record (data_tools/README.md, a task of your own)"
        raise UserMistake(Problem(where, f"{said}, and must give {remedy}"))
    return items


def _count(sheet: SourceBalance, items: int, wrong: Sequence[str]) -> None:
    """Count a record of so many prompts and rows that are left out."""
    sheet.rows += items + len(wrong)
    for bucket in wrong:
        sheet.refuse(bucket, 0)
    if items or wrong:
        sheet.lines_with_rows += 1
    else:
        sheet.lines_dropped["no_prompt"] += 1


def _records(entry: Entry, task: Any, sheet: SourceBalance) -> Iterator[readers.Record]:
    """Yield the records of the files, which are mappings, then the synthetic rows, and count blank lines.

    Raise UserMistake for a record of a file that is none.
    """
    source = entry.source
    files = files_of(source.inputs, READ, "source.inputs")
    if not _has_source(entry):
        files = dataset_files(entry.hub or task.HUB)
    for record in itertools.chain.from_iterable(map(readers.records, files)):
        if record.is_blank:
            sheet.lines += 1
            sheet.lines_dropped["blank_line"] += 1
            continue
        if record.problem or not isinstance(record.value, dict):
            raise record.mistake(record.problem or f"not a JSON object but a {type(record.value).__name__}")
        yield record
    for index in range(source.synthetic_rows):
        row = task.synthetic_row(source.synthetic_seed, index, source.synthetic_split)
        yield readers.Record(f"synthetic row {index}", row)


# -- their order ------------------------------------------------------------------------------------------------------


_permutation = functools.lru_cache(maxsize=64)(permutation)


@dataclass(frozen=True)
class Draw:
    """Represents prompt `place` of the run."""

    place: int
    entry: str
    epoch: int  # of the entry, from 0
    item: Item

    @property
    def number(self) -> int:
        """Return 64 bits that name this prompt in this epoch: what the noise of its samples is keyed by."""
        return number_of(self.item.uid, self.epoch)


def counts_table(counts: Mapping[str, Mapping[str, int]]) -> ShownTable:
    """Return `Mix.counts` for people."""
    own = ("lines", "rows", "prompts", "shared")
    rows = []
    for name, found in counts.items():
        others = ", ".join(f"{count:,} {key}" for key, count in found.items() if key not in own)
        rows.append([name, found["lines"], found["rows"], found["prompts"], others, found.get("shared", 0)])
    title = "Prompts: rows = prompts + what is named; prompts of one text that are scored differently are all asked"
    columns = ["task", "records", "rows", "prompts", "not asked", "texts shared"]
    return {"title": title, "columns": columns, "rows": rows}


def number_of(uid: str, epoch: int = 0) -> int:
    return int.from_bytes(hashlib.blake2b(f"{epoch}:{uid}".encode(), digest_size=8).digest(), "little")


class Mix:
    """Represents the prompts of a run in their order. `items` of entries that are only evaluated are loaded, too, and
    never drawn."""

    def __init__(self, entries: Mapping[str, Entry], seed: int, items: Mapping[str, list[Item]] | None = None):
        self.entries, self.seed = dict(entries), seed
        self.loaded = {} if items else {name: load(name, entry) for name, entry in entries.items()}
        self.items = dict(items or {name: loaded.items for name, loaded in self.loaded.items()})
        self._names = [name for name, entry in entries.items() if entry.weight > 0 and not entry.evaluation_only]
        self._weights = np.array([entries[name].weight for name in self._names])
        self._places: list[list[int]] = [[] for _ in self._names]  # of each entry, the places that it has
        self._sources = np.empty(0, dtype=np.int64)

    def draw(self, k: int) -> Draw:
        """Return prompt k of the run, from 0. Its samples' rewards: scorer.submit(draw.entry, draw.item, completion,
        finish)."""
        if k >= len(self._sources):
            self._blend(max(_FIRST_PLACES, 2 * (k + 1)))
        source = self._sources[k]
        name = self._names[source]
        epoch, place = divmod(bisect.bisect_left(self._places[source], k), len(self.items[name]))
        order = _permutation(f"prompts of {name}", self.seed, epoch, len(self.items[name]))
        return Draw(k, name, epoch, self.items[name][order[place]])

    def held_out(self, name: str, k: int) -> Draw:
        """Return prompt k of an entry in the order of its files: what evaluations take."""
        return Draw(k, name, 0, self.items[name][k])

    def trained(self) -> list[str]:
        """Return the entries that are drawn from."""
        return list(self._names)

    def evaluated(self) -> list[str]:
        """Return the entries that are only evaluated."""
        return [name for name, entry in self.entries.items() if entry.evaluation_only]

    @property
    def digest(self) -> str:
        """Return the digest of everything that `draw` depends on: a resume with other prompts is another run."""
        shares = [(name, self.entries[name].weight, [item.uid for item in self.items[name]]) for name in self._names]
        return hashlib.sha256(json.dumps([self.seed, shares]).encode()).hexdigest()

    def scoring(self, draws: Iterable[Draw]) -> str:
        """Return the digest of what completions of `draws` are scored with besides the entries' settings: answers and
        columns of their rows, and the code of users' tasks. Verdicts of another one are not theirs."""
        code = {name: code_digest(entry.task or name) for name, entry in sorted(self.entries.items())}
        scored_with = [[draw.item.uid, draw.item.scoring] for draw in draws]
        return hashlib.sha256(json.dumps([code, scored_with]).encode()).hexdigest()

    def counts(self) -> dict[str, dict[str, int]]:
        """Return, of each entry that was loaded, what became of its records and rows."""
        return {name: loaded.counts() for name, loaded in self.loaded.items()}

    def _blend(self, length: int) -> None:
        from data_tools.base.blend import sources_of  # loads a compiler

        before, self._sources = len(self._sources), sources_of(self._weights, length)
        for place in range(before, length):
            self._places[self._sources[place]].append(place)
