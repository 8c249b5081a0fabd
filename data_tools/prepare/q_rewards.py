"""Action values to rewards: `q_action_i` → `reward_action_i`, a Boltzmann softmax over the actions of a row.

    reward_i = exp(q_i / tau) / Σ_j exp(q_j / tau)

The row's largest value is subtracted first, so that no exponential overflows.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.base.declared import setting
from data_tools.base.durable import fsync_tree
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, silent
from data_tools.records.csv_tables import Table, read_table, table_files, write_table

Q, REWARD = "q_action_", "reward_action_"


@dataclass
class Config:
    """The config of the phase q_rewards."""

    inputs: list[str] = setting(
        list,
        "CSV files with q_action_* columns, or folders of them",
        example=["decisions.csv"],
        needed=True,
        input=True,
    )
    tau: float = setting(0.05, "temperature of the softmax", unit="units of the Q-values", above=0)
    overwrite: bool = setting(False, "reward columns that are there already are replaced")


def boltzmann(q: np.ndarray, tau: float) -> np.ndarray:
    """Return float64[rows, actions] action values → rewards that sum to 1 in each row."""
    with np.errstate(over="ignore"):  # further apart than float64 reaches is a reward of 0 all the same
        scaled = np.exp((q - q.max(axis=1, keepdims=True)) / tau)
    return scaled / scaled.sum(axis=1, keepdims=True)


def add_rewards(table: Table, config: Config) -> tuple[list[str], list[list[object]]]:
    """Return (columns, rows) of the table with its rewards, in place of those it had or after the last column."""
    names = table.numbered(Q)
    rewards = [name.replace(Q, REWARD) for name in names]
    present = [name for name in table.columns if name.startswith(REWARD)]
    if present and not config.overwrite:
        told = f"has {', '.join(present)} already; set overwrite: true to replace them"
        raise UserMistake(Problem(str(table.path), told))
    values = boltzmann(table.floats(names), config.tau)
    kept = [place for place, name in enumerate(table.columns) if name not in present]
    columns = [table.columns[place] for place in kept] + rewards
    return columns, [[*(row[place] for place in kept), *map(float, own)] for row, own in zip(table.rows, values)]


def q_rewards(config: Config, out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Write every input with its rewards into `out`, under its own name. Facts: files, rows, actions.

    Raise UserMistake for all wrong files at once, before anything is written.
    """
    done, problems = [], []
    for path in table_files(config.inputs):
        try:
            done.append((path.name, *add_rewards(read_table(path), config)))
        except UserMistake as mistake:
            problems += mistake.problems
    if problems:
        raise UserMistake(problems)
    for place, (name, columns, rows) in enumerate(done):
        write_table(out / name, columns, rows)
        progress(place + 1, len(done), "files", name)
    fsync_tree(out)
    actions = sorted({sum(column.startswith(REWARD) for column in columns) for _, columns, _ in done})
    return {"files": [name for name, *_ in done], "rows": sum(len(rows) for *_, rows in done), "actions": actions}
