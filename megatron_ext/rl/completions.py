"""All samples of a run as one CSV file, and as JSONL beside it, with the columns that TES logs its completions in.

step, micro_step    the update that the sample was drawn for, and the number of its prompt in it
prompt, completion  texts, special tokens and all; without the token that ended the completion
action, reward      what the completion answers and is worth; empty where it was cut off or could not be scored
"""

import csv
import json
from pathlib import Path
from typing import Any

from data_tools.records import readers

COLUMNS = ("step", "micro_step", "prompt", "completion", "action", "reward")


def write(samples: Path, target: Path) -> int:
    """Write TARGET and TARGET with the suffix .jsonl of the logs in the folder `samples` (sample_log.py), a step
    in memory at a time. Return how many samples these are.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with (
        open(target, "w", newline="", encoding="utf-8") as table,
        open(target.with_suffix(".jsonl"), "w", encoding="utf-8") as lines,
    ):
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for log in sorted(samples.glob("step_*.jsonl*")):
            for row in _rows(log):
                writer.writerow(row)
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
    return count


def _rows(log: Path) -> list[dict[str, Any]]:
    """Return the rows of the log of one step. Raise UserMistake for a line that is damaged."""
    rows: list[dict[str, Any]] = []
    prompts: dict[int, int] = {}
    for record in readers.records(log, "jsonl"):
        if record.problem:
            raise record.mistake(remedy="remove the file, or restore it")
        sample = record.value
        micro_step = prompts.setdefault(sample["item"], len(prompts))
        ended = {"action": sample.get("answer") if sample["finish"] == "stop" else None}
        told = {name: sample[name] for name in ("prompt", "completion")}
        rows.append({"step": sample["step"], "micro_step": micro_step, **told, **ended, "reward": sample["reward"]})
    return rows
