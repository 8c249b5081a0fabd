"""Does what `afterok clean` says."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.mistake import EXIT_MISTAKE, UserMistake
from launchers.verbs.said import print_json, tell

if TYPE_CHECKING:
    from jobs.artifacts.run_folder import RunFolder
    from launchers.submission.clean import Cleaned

MOST_KEPT = 10  # of a run, of which each is told in a line


def do_clean(args: argparse.Namespace) -> int:
    """Show what of some runs nothing needs any more, and with --yes delete it."""
    from data_tools.base.printing import as_typed, size_text
    from launchers.submission.clean import clean, why_going
    from launchers.submission.superfluous import WHAT

    if unknown := [what for what in args.only if what not in WHAT]:
        raise UserMistake(f"--only {unknown[0]}: say one of {', '.join(WHAT)}")
    named, runs = _runs(args.runs)
    for run in named:
        if why := why_going(run):
            raise UserMistake(f"{as_typed(run.path)}: {why}; nothing was deleted")
    done = clean([*named, *runs], args.only, args.yes)
    code = EXIT_MISTAKE if any(each.going for each in done[: len(named)]) else 0  # though they had nothing going
    if args.json:
        print_json({"runs": [each.as_json() for each in done], "bytes": sum(each.size for each in done)})
        return code
    for each in done:
        _show(each)
    for path, why in done[0].unread.items() if done else ():
        tell(f"{as_typed(path)}: {why}")
    _tell_total(args, done)
    if not args.only and (size := sum(each.size for each in clean([*named, *runs], ["superseded"], False))):
        print(f"{size_text(size)} more is sealed under settings of before: --only superseded shows it")
    return code


def _tell_total(args: argparse.Namespace, done: "list[Cleaned]") -> None:
    """Print what all runs have or had together, and how to delete it."""
    from data_tools.base.printing import size_text

    total = size_text(sum(each.size for each in done))
    if any(each.items for each in done):
        words = shlex.join(["afterok", "clean", *args.runs, *(word for what in args.only for word in ("--only", what))])
        print(f"{total} deleted" if args.yes else f"{total} in all; nothing was deleted: `{words} --yes` deletes it")


def _show(cleaned: "Cleaned") -> None:
    """Print what of one run may go or went, and why other things stay."""
    from data_tools.base.printing import as_typed
    from launchers.observe.show import cleaned_table, console

    where = as_typed(cleaned.run.path)
    if cleaned.items:
        console().print(cleaned_table(cleaned))
    elif not cleaned.going:
        print(f"{where}: nothing that may be deleted")
    for path, why in list(cleaned.kept.items())[:MOST_KEPT]:
        tell(f"kept {as_typed(path)}: {why}")
    if len(cleaned.kept) > MOST_KEPT:
        tell(f"kept {len(cleaned.kept) - MOST_KEPT:,} more for such reasons, which --json lists")
    if cleaned.going:
        tell(f"{where} is left alone: {cleaned.going}")


def _runs(words: list[str]) -> "tuple[list[RunFolder], list[RunFolder]]":
    """Return (the runs that were named, those below the folders that were named); by default the run submitted last."""
    from jobs.artifacts.layout import is_run, runs_below
    from jobs.artifacts.run_folder import RunFolder
    from launchers.observe.runs import find_run

    named: dict[Path, RunFolder] = {}
    below: dict[Path, RunFolder] = {}
    asked: list[str | None] = [*words] if words else [None]
    for word in asked:
        found = runs_below(Path(word)) if word is not None and not is_run(Path(word)) else []
        if found:
            below |= {path.absolute(): RunFolder(path.absolute()) for path in found}
        else:
            run = find_run(word)
            named[run.path] = run
    return list(named.values()), [run for path, run in sorted(below.items()) if path not in named]
