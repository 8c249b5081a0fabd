"""What an evaluation says of its samples: counts, accuracies with their errors, gains over an earlier one, and a table.

A line of samples is a prompt with its greedy completion. Where it was sampled at a temperature too, it has the counts
`sampled` and `sampled_correct`, the `votes` of its samples, and the `graded` ones.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.base.tables import write_table
from data_tools.tasks.estimators import at_k, standard_error
from data_tools.tasks.mix import counts_table
from data_tools.tasks.outcome import graded, is_unjudged

Line = dict[str, Any]  # of samples.jsonl: which keys it has depends on its task and on what was asked
_LABELS = {"": "all", "seen_": "seen in training", "unseen_": "not seen"}


def asked(line: Mapping[str, Any]) -> str:
    """Return what names the prompt of a line."""
    return line.get("prompt_id", line["prompt"])


def accuracy(lines: Sequence[Line], before: Mapping[str, Line] = {}) -> dict[str, Any]:
    """Return counts and accuracies of all prompts and, where known, of those seen and not seen in training and of each
    kind, by names with the prefixes "", seen_, unseen_ and KIND_. `before` has the lines of an earlier evaluation by
    prompt, for the gain over it.
    """
    groups = {"": list(lines)}
    if any(line["seen"] is not None for line in lines):
        groups["seen_"] = [line for line in lines if line["seen"] is True]
        groups["unseen_"] = [line for line in lines if line["seen"] is False]
    for kind in sorted({line["kind"] for line in lines if line.get("kind")}):
        groups[f"{kind}_"] = [line for line in lines if line.get("kind") == kind]
    found: dict[str, Any] = {}
    for prefix, group in groups.items():
        found |= {prefix + name: value for name, value in _of_group(group, before).items()}
    return found


def _of_group(lines: Sequence[Line], before: Mapping[str, Line]) -> dict[str, Any]:
    correct, unjudged = sum(bool(line["correct"]) for line in lines), any(map(is_unjudged, lines))
    found: dict[str, Any] = {"prompts": len(lines), "correct": correct}
    found["accuracy"] = correct / len(lines) if lines and not unjudged else None
    if unscored := sum("reward" in line and line["reward"] is None for line in lines):
        found["unscored"] = unscored  # which count as wrong
    if lines and all("correct_normalized" in line for line in lines):
        found["accuracy_normalized"] = sum(line["correct_normalized"] for line in lines) / len(lines)
    sampled = [sample for line in lines for sample in line.get("graded", ())]
    found |= graded(lines) | graded(sampled, "sampled_")
    found |= _reward_gain(lines, before)
    if lines and all("sampled" in line for line in lines) and not (unjudged or any(map(is_unjudged, sampled))):
        found |= _of_samples(lines, before)
    return found


def _reward_gain(lines: Sequence[Line], before: Mapping[str, Line]) -> dict[str, float]:
    """Return what the mean reward of a prompt's samples gained over `before`, over prompts with rewards in both."""
    gains = []
    for line in lines:
        now, then = (_mean_reward(of) for of in (line, before.get(asked(line), {})))
        if now is not None and then is not None:
            gains.append(now - then)
    if not gains:
        return {}
    return {"reward_gain": sum(gains) / len(gains), "reward_gain_error": standard_error(gains)}


def _mean_reward(line: Mapping[str, Any]) -> float | None:
    rewards = [sample["reward"] for sample in line.get("graded", ()) if sample["reward"] is not None]
    return sum(rewards) / len(rewards) if rewards else None


def _of_samples(lines: Sequence[Line], before: Mapping[str, Line]) -> dict[str, float]:
    """Return the accuracy of the samples at a temperature, pass@k and maj@k, and the gain over `before`."""
    shares = [_share(line) for line in lines]
    found = {"sampled_accuracy": sum(shares) / len(shares), "sampled_error": standard_error(shares)}
    found |= at_k([line["votes"] for line in lines])
    gains = [
        share - _share(before[asked(line)])
        for line, share in zip(lines, shares)
        if "sampled" in before.get(asked(line), {})
    ]
    return found | ({"gain": sum(gains) / len(gains), "gain_error": standard_error(gains)} if gains else {})


def _share(line: Line) -> float:
    return line["sampled_correct"] / line["sampled"]


def write_tables(keep: Path, result: Mapping[str, Any], step: int) -> None:
    """Write KEEP/tables of a result: its accuracies, a row for each group of prompts, and the fates of the records."""
    largest = [name for kind in ("pass@", "maj@") for name in [name for name in result if name.startswith(kind)][-1:]]
    columns = [("distinct", "prompts"), ("correct", "correct"), ("greedy accuracy", "accuracy")]
    further = [("by characters", "accuracy_normalized"), ("sampled", "sampled_accuracy"), ("± error", "sampled_error")]
    further += zip(largest, largest)
    further += [("mean reward", "reward"), ("regret", "regret")]
    further += [("sampled reward", "sampled_reward"), ("sampled regret", "sampled_regret")]
    further += [("gain", "gain"), ("± error", "gain_error")]
    further += [("reward gain", "reward_gain"), ("± error", "reward_gain_error")]
    prefixes = [name.removesuffix("prompts") for name in result if name.endswith("prompts")]
    columns += [(title, name) for title, name in further if any(prefix + name in result for prefix in prefixes)]
    rows = [
        [_LABELS.get(prefix, prefix.rstrip("_").replace("_", " ")), *(result.get(prefix + name) for _, name in columns)]
        for prefix in prefixes
    ]
    titles = ["prompts", *(title for title, _ in columns)]
    write_table(keep, "accuracy", title=f"Accuracy at step {step}", columns=titles, rows=rows)
    write_table(keep, "prompts", **counts_table(result["records"]))


def headline(facts: Mapping[str, Any]) -> str:
    """Return a result in a line."""
    text = f"{facts['prompts']:,} prompts, no accuracy"
    if facts["accuracy"] is not None:
        text = f"accuracy {facts['accuracy']:.3f} ({facts['correct']:,} of {facts['prompts']:,})"
    text += f", of which {facts['unscored']:,} could not be scored" if facts.get("unscored") else ""
    for name in ("reward", "regret"):
        text += f", {name} {facts[name]:.3f}" if name in facts else ""
    if facts.get("seen_prompts"):
        unseen = f"{facts['unseen_accuracy']:.3f}" if facts["unseen_prompts"] else "none"
        text += f"; seen in training {facts['seen_accuracy']:.3f} of {facts['seen_prompts']:,}, not seen {unseen} of "
        text += f"{facts['unseen_prompts']:,}"
    if "sampled_accuracy" in facts:
        text += f"; sampled {facts['sampled_accuracy']:.3f}"
        for kind in ("pass@", "maj@"):
            text += "".join(
                f", {name} {facts[name]:.3f}" for name in [name for name in facts if name.startswith(kind)][-1:]
            )
    if "gain" in facts:
        text += f", gain {100 * facts['gain']:+.1f} ± {100 * facts['gain_error']:.1f} points"
    if "reward_gain" in facts:
        text += f", reward gain {facts['reward_gain']:+.3f} ± {facts['reward_gain_error']:.3f}"
    return text
