"""Decisions: the model ends with an action in brackets, `[2]`, which is worth what its row says of it.

A record has `prompt` (text or messages) and reward_action_0, reward_action_1, …, as the phase q_rewards writes them.
What the model says to the user counts alone: the last action in the final channel, or after the thoughts. Right is the
best action of the row. A completion that was cut off, or whose last brackets name no action of the row's, is not
scorable: it is left out of training and not counted as zero; with `on_invalid: penalty` it is worth `penalty`.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from data_tools.answers.forms import final_text
from data_tools.mistake import nearest
from data_tools.prepare.q_rewards import REWARD
from data_tools.records.csv_tables import number_of
from data_tools.tasks.task import Item

REWARDS = {"action": 1.0}
HUB = ""
ON_INVALID = ("mask", "penalty")

_DIGITS = 9  # of an action, as in the names of columns; of more than 4,300 Python makes no number
_ACTION = re.compile(r"\[\s*(\d+)\s*\]")


@dataclass
class Options:
    prompt: str = "prompt"  # the column of the prompts
    on_invalid: str = "mask"  # mask | penalty: a completion without an action of the row's
    penalty: float = 0.0  # what it is then worth


def check_options(options: Options) -> list[str]:
    found = []
    if options.on_invalid not in ON_INVALID:
        found.append(f"unknown on_invalid {options.on_invalid!r}{nearest(options.on_invalid, ON_INVALID)}")
    if not math.isfinite(options.penalty):
        found.append(f"penalty {options.penalty} is no finite number")
    elif options.penalty and options.on_invalid == "mask":
        found.append(f"penalty {options.penalty:g} has no effect while on_invalid is mask; set on_invalid: penalty")
    return found


def items(record: dict[str, Any], options: Options) -> list[Item]:
    prompt = record.get(options.prompt)
    if not isinstance(prompt, (str, list)) or not prompt:
        raise ValueError(f"no prompt under {options.prompt!r}; it has {', '.join(map(str, record))}")
    return [Item.of(prompt, None, {"rewards": _rewards(record)})]


def _rewards(record: dict[str, Any]) -> list[float]:
    """Return those of actions 0, 1, …"""
    found = {name: value for name, value in record.items() if str(name).startswith(REWARD)}
    if len(found) < 2:
        columns = ", ".join(map(str, record))
        raise ValueError(
            f"needs columns {REWARD}0, {REWARD}1, … (the phase q_rewards makes them of Q-values); it has {columns}"
        )
    values = []
    for action in range(len(found)):
        name = f"{REWARD}{action}"
        if name not in found:
            raise ValueError(f"has {', '.join(found)} but no column {name}")
        values.append(number_of(found[name]))
        if not math.isfinite(values[-1]):
            raise ValueError(f"{name} is {found[name]!r}, not a finite number")
    return values


def rewards(item: Item, completion: str, options: Options) -> dict[str, float] | None:
    action = final_answer(item, completion, options)
    return cut_off(item, options) if action is None else {"action": item.columns["rewards"][int(action)]}


def final_answer(item: Item, completion: str, options: Options) -> str | None:
    """Return the last action in brackets of what is said to the user, None where that is none of the row's."""
    said = final_text(completion)
    found = _ACTION.findall(said) if said is not None else []
    leading, own = (found[-1][:-_DIGITS], found[-1][-_DIGITS:]) if found else ("", "")
    if not own or leading.strip("0") or int(own) >= len(item.columns["rewards"]):
        return None
    return str(int(own))


def best(item: Item, options: Options) -> dict[str, float]:
    return {"action": max(item.columns["rewards"])}


def cut_off(item: Item, options: Options) -> dict[str, float] | None:
    """Return the terms also of a completion that names no action."""
    return {"action": options.penalty} if options.on_invalid == "penalty" else None
