"""Keeps sampled completions that are right, whole and unlike one another, as JSONL chats; none of an evaluation set.

An array over prompts; behind a generate of as many elements it follows that one by one (needs: aftercorr).
"""

import contextlib
from pathlib import Path
from typing import Any

from data_tools.base.one_file import bundle
from data_tools.base.tables import write_table
from data_tools.mistake import Problem, UserMistake
from data_tools.prepare import rejection, rejection_element, rejection_finish
from data_tools.prepare.rejection import Config
from data_tools.prepare.rejection_element import Share
from data_tools.records.balance import Balance
from data_tools.records.inputs import JSONL, files_of
from data_tools.records.shares import read_over
from jobs.kind import Placement
from jobs.task import Task

TAKES_PARTS = True  # an element takes all that its partner sampled


def check(config: Config, placement: Placement) -> list[Problem]:
    problems = rejection.check(config) + _check_shares(config, placement)
    for folder, elements in placement.partners.items():
        if elements != placement.elements:
            one_by_one = f"{folder} has {elements} elements, of which {placement.elements} would be read one by one"
            problems.append(Problem("inputs", f"{one_by_one} (aftercorr); say array: {elements}, or afterok"))
    return problems


def _check_shares(config: Config, placement: Placement) -> list[Problem]:
    """Refuse samples that are no partner's, so that each element reads all of them, where that is too much."""
    files: list[Path] = []
    with contextlib.suppress(UserMistake):  # what is missing may be to come, or reading says so
        files = files_of(config.inputs, JSONL)
    over = read_over(sum(file.stat().st_size for file in files), placement.elements)
    remedy = "or have it follow a generate of as many elements one by one (needs: aftercorr)"
    return [Problem("inputs", f"{over}, {remedy}")] if over else []


def run(config: Config, task: Task) -> None:
    share = Share(task.index, task.count, task.partners)
    rejection_element.reject_filter(config, task.out, share, task.progress_or_stop)
    if task.count > 1:
        bundle(task.out)


def finish(parts: list[Path], config: Config, task: Task) -> dict[str, Any]:
    facts = rejection_finish.finish(config, parts, task.out, task.progress)
    if not facts["kept"]:  # what follows could only say that its input is empty
        total = Balance.read(task.out).total()
        buckets = sorted((total.lines_dropped + total.dropped).items())
        why = ", ".join(f"{count:,} {bucket}" for bucket, count in buckets) or "the inputs are empty"
        raise UserMistake(
            f"none of {facts['samples']:,} samples is kept ({why}); change what leaves them out, or sample more"
        )
    for name, table in facts.pop("tables").items():
        write_table(task.keep, name, **table)
    text = (
        f"{facts['kept']:,} of {facts['samples']:,} samples kept, of {facts['prompts_left']:,} of "
        f"{facts['prompts']:,} prompts"
    )
    return {"headline": text, **facts}
