"""What an evaluation says of its lines: counts, accuracies with their errors and intervals, gains over an earlier one.

Each task is told by itself: tasks are never pooled, since a number over prompts of several would say mostly which task
has the most prompts. A mean over tasks is made where it is named, with its list (`macro`), and each task counts alike.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.base.tables import write_table
from data_tools.evaluations.lines import Line, asked
from data_tools.tasks.estimators import Z, bootstrap, each_at_k, plus_or_minus, standard_error, wilson
from data_tools.tasks.mix import counts_table
from data_tools.tasks.outcome import graded, is_graded, is_unjudged

_LABELS = {"": "all", "seen_": "seen in training", "unseen_": "not seen"}
MEANS = ("accuracy", "accuracy_normalized", "sampled_accuracy")  # which `macro` takes over tasks
REWARDS = ("reward", "regret", "sampled_reward", "sampled_regret")  # measures that are no shares
_OWN = re.compile(r"(?:un)?seen|sampled|reward|(?:pass@|maj@|(?:sampled_)?share_).*")  # begins names of facts
Values = dict[str, dict[str, float]]  # of each measure, a value for each prompt by its name


def accuracy(
    lines: Sequence[Line],
    before: Mapping[str, Line] = {},
    tasks: Sequence[str] = (),
    macro: Mapping[str, Sequence[str]] = {},
) -> dict[str, Any]:
    """Return counts and accuracies of all prompts and, where known, of those seen and not seen in training and of each
    kind, by names with the prefixes "", seen_, unseen_ and KIND_. `before` has the lines of an earlier evaluation by
    prompt, for the gain over it. A line's kind is its task where `tasks` names those of a mix. Of several tasks
    there is no accuracy of all, but the means that `macro` names, each over its list of tasks.
    """
    groups = {} if len(tasks) > 1 else {"": list(lines)}
    if any(line["seen"] is not None for line in lines):
        groups["seen_"] = [line for line in lines if line["seen"] is True]
        groups["unseen_"] = [line for line in lines if line["seen"] is False]
    for kind in sorted({line["kind"] for line in lines if line.get("kind")}):
        groups[f"{kind}_"] = [line for line in lines if line.get("kind") == kind]
    found: dict[str, Any] = {"prompts": len(lines)}
    found |= {"tasks": list(tasks)} if tasks else {}
    for prefix, group in groups.items():
        found |= {prefix + name: value for name, value in _of_group(group, before).items()}
    means = {name: _mean_of(found, names) for name, names in macro.items()}
    return found | ({"macro": means} if means else {})


def unclear_names(tasks: Sequence[str]) -> dict[str, str]:
    """Return the tasks that have facts under the names of another task's, which is beside them; "" is all prompts.

    The fact a_sampled_accuracy is the mean of the samples of a task `a`, and the greedy accuracy of a task `a_sampled`.
    """
    prefixes = {"": ""} | {f"{task}_": task for task in tasks}
    return {
        task: other
        for task in tasks
        for prefix, other in prefixes.items()
        if task.startswith(prefix) and _OWN.fullmatch(task.removeprefix(prefix))
    }


def values_of(lines: Sequence[Line]) -> Values:
    """Return what each measure says of each prompt. A measure that is not known of all of them is left out, but for
    rewards: prompts whose reward nobody could tell have none."""
    names, found = [asked(line) for line in lines], {}
    sampled = [sample for line in lines for sample in line.get("graded", ())]
    if lines and not any(map(is_unjudged, lines)):
        found["accuracy"] = [float(bool(line["correct"])) for line in lines]
    if lines and all("correct_normalized" in line for line in lines):
        found["accuracy_normalized"] = [float(line["correct_normalized"]) for line in lines]
    if lines and all("sampled" in line for line in lines) and not any(map(is_unjudged, [*lines, *sampled])):
        found["sampled_accuracy"] = [line["sampled_correct"] / line["sampled"] for line in lines]
        found |= each_at_k([line["votes"] for line in lines])
    values = {measure: dict(zip(names, each)) for measure, each in found.items()}
    return values | _rewards(lines) | _sampled_rewards(lines)


def _rewards(lines: Sequence[Line]) -> Values:
    if not any(map(is_graded, lines)):
        return {}
    scored = {asked(line): line for line in lines if line.get("reward") is not None}
    values = {"reward": {name: line["reward"] for name, line in scored.items()}}
    best = {name: line["best"] - line["reward"] for name, line in scored.items() if line.get("best") is not None}
    return values | ({"regret": best} if best else {})


def _sampled_rewards(lines: Sequence[Line]) -> Values:
    """Return the rewards of samples at a temperature, as means of each prompt's."""
    values: Values = {}
    for line in lines:
        each = _rewards([{**sample, "prompt": str(place)} for place, sample in enumerate(line.get("graded", ()))])
        for measure, rewards in each.items():
            if rewards:
                values.setdefault(f"sampled_{measure}", {})[asked(line)] = sum(rewards.values()) / len(rewards)
    return values


def intervals_of(values: Values, samples: int = 0, low: float = 0.0) -> dict[str, tuple[float, float]]:
    """Return the 95% interval of the mean of each measure over its prompts.

    Of one answer a prompt it is Wilson's; where a prompt has several `samples`, or values are differences (`low` -1),
    it is that of a bootstrap over prompts. A reward of one prompt alone has none, since it may lie anywhere.
    """
    intervals = {}
    drawn: dict[tuple[int, bool], dict[str, list[float]]] = {}
    for measure, by_prompt in values.items():
        each = list(by_prompt.values())
        if measure not in REWARDS and low == 0 and (measure in MEANS[:2] or samples == 1):
            intervals[measure] = wilson(sum(each), len(each))
        elif len(each) > 1 or (each and measure not in REWARDS):
            drawn.setdefault((len(each), measure in REWARDS), {})[measure] = each
    for (_, of_rewards), measures in drawn.items():
        intervals |= bootstrap(measures, None if of_rewards else low)
    return {measure: intervals[measure] for measure in values if measure in intervals}


def _of_group(lines: Sequence[Line], before: Mapping[str, Line]) -> dict[str, Any]:
    correct, unjudged = sum(bool(line["correct"]) for line in lines), any(map(is_unjudged, lines))
    found: dict[str, Any] = {"prompts": len(lines), "correct": correct}
    found["accuracy"] = correct / len(lines) if lines and not unjudged else None
    if unscored := sum("reward" in line and line["reward"] is None for line in lines):
        found["unscored"] = unscored  # which count as wrong
    if unscored := sum(line.get("sampled_unscored", 0) for line in lines):
        found["sampled_unscored"] = unscored  # these, too
    values = values_of(lines)
    if "accuracy_normalized" in values:
        found["accuracy_normalized"] = _mean(values["accuracy_normalized"])
    sampled = [sample for line in lines for sample in line.get("graded", ())]
    found |= graded(lines) | graded(sampled, "sampled_")
    if "sampled_accuracy" in values:
        shares = values["sampled_accuracy"]
        found |= {"sampled_accuracy": _mean(shares), "sampled_error": standard_error([*shares.values()])}
        found |= {name: _mean(each) for name, each in values.items() if name.startswith(("pass@", "maj@"))}
    found["intervals"] = {name: list(pair) for name, pair in intervals_of(values, samples_of(lines)).items()}
    gained = _gained(values, before)
    found["intervals"] |= gained.pop("intervals", {})
    return found | gained


def _gained(values: Values, before: Mapping[str, Line]) -> dict[str, Any]:
    """Return what each prompt gained over an earlier evaluation, `before`, in the mean, and how many both asked."""
    found: dict[str, Any] = {}
    earlier = {name: line["sampled_correct"] / line["sampled"] for name, line in before.items() if "sampled" in line}
    gains = difference(values.get("sampled_accuracy", {}), earlier)
    if before and len(gains) < len(values.get("sampled_accuracy", {})):
        found["compared_prompts"] = len(gains)  # which the earlier evaluation asked, too
    if gains:
        found |= {"gain": _mean(gains), "gain_error": standard_error([*gains.values()])}
        found["intervals"] = {"gain": list(intervals_of({"gain": gains}, low=-1.0)["gain"])}
    then = _sampled_rewards([*before.values()]).get("sampled_reward", {})
    if gains := difference(values.get("sampled_reward", {}), then):
        found |= {"reward_gain": _mean(gains), "reward_gain_error": standard_error([*gains.values()])}
    return found


def difference(values: Mapping[str, float], earlier: Mapping[str, float]) -> dict[str, float]:
    """Return by how much each prompt that both have gained."""
    return {name: value - earlier[name] for name, value in values.items() if name in earlier}


def samples_of(lines: Sequence[Line]) -> int:
    """Return how often each prompt was sampled, at most."""
    return max((line.get("sampled", 0) for line in lines), default=0)


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def _mean_of(found: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """Return the mean over tasks, each as much as another, of what is known of all; with its error and interval, by
    the tasks' own, which are independent. `missing` names the tasks of which a measure is not known, if it is of
    others; of accuracy always."""
    mean: dict[str, Any] = {"tasks": list(tasks)}
    for measure in MEANS:
        values = {task: found.get(f"{task}_{measure}") for task in tasks}
        known = [value for value in values.values() if value is not None]
        if len(known) < len(tasks):
            if known or measure == "accuracy":
                missing = [task for task, value in values.items() if value is None]
                mean.setdefault("missing", {})[measure] = missing
            continue
        halves = [found[f"{task}_intervals"][measure] for task in tasks]
        error = math.sqrt(sum(((high - low) / 2 / Z) ** 2 for low, high in halves)) / len(tasks)
        value = sum(known) / len(known)
        mean |= {measure: value, f"{measure}_interval": [max(0.0, value - Z * error), min(1.0, value + Z * error)]}
    return mean


def _missing(mean: Mapping[str, Any]) -> str:
    """Return which tasks have no accuracy, greedy or sampled, so that there is no mean of it."""
    named = [("accuracy", "accuracy"), ("sampled accuracy", "sampled_accuracy")]
    missing = [(title, mean.get("missing", {}).get(measure)) for title, measure in named]
    return "".join(f"; no {title} of {', '.join(tasks)}" for title, tasks in missing if tasks)


def headline(facts: Mapping[str, Any]) -> str:
    """Return a result in a line: each task by itself, and the means that were asked for."""
    tasks = facts.get("tasks", [])
    told = [f"{name}: {_told(facts, f'{name}_')}" for name in tasks if f"{name}_prompts" in facts]
    for name, mean in facts.get("macro", {}).items():
        value = f"{mean['accuracy']:.3f}" if "accuracy" in mean else "none"
        told.append(f"macro {name} {value} (mean over {', '.join(mean['tasks'])}{_missing(mean)})")
    return "; ".join(told) if len(tasks) > 1 else _told(facts, "")


def _told(facts: Mapping[str, Any], prefix: str) -> str:
    """Return what is said of one task: of the facts whose names begin with `prefix`."""
    one = {name.removeprefix(prefix): value for name, value in facts.items() if name.startswith(prefix)}
    text = f"{one['prompts']:,} prompts, no accuracy"
    if one["accuracy"] is not None:
        text = f"accuracy {one['accuracy']:.3f} ({one['correct']:,} of {one['prompts']:,})"
    if unscored := one.get("unscored", 0):
        counts = " and count as wrong" if one["accuracy"] is not None else ""
        text += f", of which {unscored:,} could not be scored{counts}"
    for name in ("reward", "regret"):
        text += f", {name} {one[name]:.3f}{' of the others' if unscored else ''}" if name in one else ""
    if one.get("seen_prompts"):
        unseen = f"{one['unseen_accuracy']:.3f}" if one["unseen_prompts"] else "none"
        text += f"; seen in training {one['seen_accuracy']:.3f} of {one['seen_prompts']:,}, not seen {unseen} of "
        text += f"{one['unseen_prompts']:,}"
    if "sampled_accuracy" in one:
        text += f"{', ' if prefix else '; '}sampled {one['sampled_accuracy']:.3f}"
        unscored = one.get("sampled_unscored", 0)
        text += f" ({unscored:,} samples could not be scored and count as wrong)" if unscored else ""
        for kind in ("pass@", "maj@"):
            largest = [name for name in one if name.startswith(kind)][-1:]
            text += "".join(f", {name} {one[name]:.3f}" for name in largest)
    return text + _told_gain(one)


def _told_gain(one: Mapping[str, Any]) -> str:
    """Return what is said of what was gained over an earlier evaluation; "" where none was named."""
    text = ""
    if "gain" in one:
        error = plus_or_minus(one["gain_error"], lambda value: f"{100 * value:.1f}")
        text += f", gain {100 * one['gain']:+.1f}{error} points"
        text += f" of {one['compared_prompts']:,} prompts that both asked" if "compared_prompts" in one else ""
    elif "compared_prompts" in one:
        text += ", no gain: compare_with asked none of these prompts"
    if "reward_gain" in one:
        text += f", reward gain {one['reward_gain']:+.3f}{plus_or_minus(one['reward_gain_error'], '{:.3f}'.format)}"
    return text


# -- tables -----------------------------------------------------------------------------------------------------------


def write_tables(keep: Path, result: Mapping[str, Any], which: str) -> None:
    """Write KEEP/tables of a result: its accuracies, a row for each group of prompts, and the fates of the records.
    `which` model it was, their title says."""
    prefixes = [name.removesuffix("intervals") for name in result if name.endswith("intervals")]
    largest = _largest(result, prefixes)
    columns = [("distinct", "prompts"), ("correct", "correct"), ("greedy accuracy", "accuracy"), ("95%", "accuracy")]
    further = [("by characters", "accuracy_normalized"), ("95%", "accuracy_normalized")]
    further += [("sampled", "sampled_accuracy"), ("95%", "sampled_accuracy")]
    further += [(title, name) for name in largest for title in (name, "95%")]
    further += [("mean reward", "reward"), ("regret", "regret")]
    further += [("sampled reward", "sampled_reward"), ("sampled regret", "sampled_regret")]
    further += [("gain", "gain"), ("95%", "gain")]
    further += [("reward gain", "reward_gain"), ("± error", "reward_gain_error")]
    columns += [(title, name) for title, name in further if any(prefix + name in result for prefix in prefixes)]
    rows = [
        [_LABELS.get(prefix, prefix.rstrip("_").replace("_", " ")),
         *(_cell(result, prefix, title, name) for title, name in columns)]
        for prefix in prefixes
    ]  # fmt: skip
    for name, mean in result.get("macro", {}).items():
        told = {**mean, "intervals": {measure: mean.get(f"{measure}_interval") for measure in MEANS}}
        label = f"macro {name}: mean over {', '.join(mean['tasks'])}{_missing(mean)}"
        rows.append([label, *(_cell(told, "", title, measure) for title, measure in columns)])
    titles = ["prompts", *(title for title, _ in columns)]
    write_table(keep, "accuracy", title=f"Accuracy {which}", columns=titles, rows=rows)
    write_table(keep, "prompts", **counts_table(result["records"]))


def _largest(result: Mapping[str, Any], prefixes: Sequence[str]) -> list[str]:
    """Return pass@k and maj@k of the largest k that any group has."""
    names = {name.removeprefix(prefix) for prefix in prefixes for name in result}
    of_kinds = [[name for name in names if name.startswith(kind)] for kind in ("pass@", "maj@")]
    return [max(kind, key=lambda name: int(name.partition("@")[2])) for kind in of_kinds if kind]


def _cell(result: Mapping[str, Any], prefix: str, title: str, name: str) -> Any:
    if title != "95%":
        return result.get(prefix + name)
    interval = result.get(f"{prefix}intervals", {}).get(name)
    return f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else None
