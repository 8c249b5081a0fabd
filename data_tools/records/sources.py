"""Which sources of a token store a setting such as `weights: {maths.jsonl: 3}` means.

A key is, from the most exact to the least:

    the source's name                   /data/maths.jsonl; `synthetic train rows, seed 1`
    the end of its path                 maths.jsonl, data/maths.jsonl
    a folder, a source of a recipe      /data, ${phases.kept.out}, smoltalk
    a pattern                           maths-*.jsonl, *, data/*.jsonl

Of several keys that match a source the most exact one counts, of those the one with the most parts.

What a phase made is the same whichever attempt made it (the key of its folder says so) and wherever the run lies now.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from data_tools.mistake import Problem, nearest

EXACT, PATH, FOLDER, PATTERN = 4, 3, 2, 1
VALIDATION = "validation/"  # begins the names of a recipe's sources that have no rows to train on
_WILD = "*?["
# RUN/PHASE/KEY, or in it the folder of the attempt that was sealed: jobs/artifacts/layout.py.
_MADE = re.compile(r"^.*(/[a-z][a-z0-9_]*/[0-9a-f]{16})(?:/work/[^./]+\.a\d+\.r\d+\.g\d+)?(?=/|$)")


def synthetic_name(source: Any) -> str:
    """Return the name of a task's made-up rows; `source` is a data_tools.tasks.task.Source."""
    return f"synthetic {source.synthetic_split} rows, seed {source.synthetic_seed}"


def forecast(source: Any) -> list[str] | None:
    """Return the names that the sources of a store will have; None where that shows only once the files are read."""
    paths = [os.path.abspath(os.path.expanduser(name)) for name in source.inputs]
    if any(os.path.isdir(path) or set(_WILD) & set(path) or not PurePath(path).suffix for path in paths):
        return None
    return paths + ([synthetic_name(source)] if source.synthetic_rows else [])


def match(key: str, name: str) -> tuple[int, int]:
    """Return how exactly a key names a source: (EXACT, …, PATTERN; parts of the key), (0, 0) where it does not."""
    made_key, made = _MADE.sub(r"\1", key), _MADE.sub(r"\1", name)
    return max(_match(key, name), _match(made_key, made) if made_key != key and made != name else (0, 0))


def _match(key: str, name: str) -> tuple[int, int]:
    if key == name:
        return EXACT, 0
    path = os.path.expanduser(key)
    wanted = [part for part in PurePath(os.path.normpath(path)).parts if part != ".."]
    parts = PurePath(name).parts
    if wanted and parts[-len(wanted) :] == tuple(wanted):
        return PATH, len(wanted)
    if os.path.isabs(path) == os.path.isabs(name) and wanted and parts[: len(wanted)] == tuple(wanted):
        return FOLDER, len(wanted)
    if set(_WILD) & set(key) and PurePath(name).match(path):
        return PATTERN, len(wanted)
    return 0, 0


def by_source(setting: str, values: Mapping[str, Any], names: Sequence[str]) -> tuple[list[Any], list[Problem]]:
    """Return each source's value, None where no key names it, and what is wrong with the keys.

    A key that matches no source is a problem, and one that is no pattern and no folder but matches several, and two
    keys that name a source equally well.
    """
    problems = []
    for key in values:
        matching = [name for name in names if match(key, name)[0]]
        if not matching:
            problems.append(Problem(f"{setting}.{key}", f"no source matches{nearest(key, short_names(names))}"))
        elif len([name for name in matching if match(key, name)[0] == PATH]) > 1:
            problems.append(
                Problem(
                    f"{setting}.{key}",
                    f"stands for {len(matching)} sources, {', '.join(matching)}; "
                    "give more of the path, or a pattern that means all",
                )
            )
    chosen = []
    for name in names:
        best = max((match(key, name) for key in values), default=(0, 0))
        keys = [key for key in values if best[0] and match(key, name) == best]
        if len(keys) > 1:
            problems.append(Problem(setting, f"{' and '.join(keys)} both match source {name}; leave one"))
        chosen.append(values[keys[0]] if keys else None)
    return chosen, problems


def short_names(names: Sequence[str]) -> list[str]:
    """Return the names as a user would type them: as many last parts of the path as tell them apart."""

    def ending(name: str, parts: int) -> str:
        return "/".join(PurePath(name).parts[-parts:]) if parts < len(PurePath(name).parts) else name

    def shortest(name: str) -> str:
        others = [other for other in names if other != name]
        lengths = range(1, len(PurePath(name).parts) + 1)
        return next((ending(name, n) for n in lengths if ending(name, n) not in [ending(o, n) for o in others]), name)

    return [shortest(name) for name in names]


def check(weights: Mapping[str, float], overlong_of: Mapping[str, str], names: Sequence[str]) -> list[Problem]:
    """Return what is wrong with the keys of a pack's settings for a store with these sources."""
    _, problems = by_source("overlong_of", overlong_of, names)
    found, wrong = by_source("weights", weights, names)
    needed = [(name, weight) for name, weight in zip(names, found) if weights and not name.startswith(VALIDATION)]
    missing = [name for name, weight in needed if weight is None]
    return (
        problems
        + wrong
        + [Problem("weights", f"source {name} has none; give a share, or 0 to leave it out") for name in missing]
    )


def of_folder(store: Path) -> list[str] | None:
    """Return the names that a store's balance sheet has, None where there is none (yet)."""
    from data_tools.records.balance import Balance

    try:
        return [sheet.name for sheet in Balance.read(store).sources]
    except (OSError, ValueError, KeyError, TypeError):
        return None
