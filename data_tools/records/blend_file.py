"""Megatron's blend files, {"train": …, "valid": …, "test": …}: they name files of records and hold none."""

import json
from pathlib import Path
from typing import Any

from data_tools.mistake import UserMistake

LARGEST_BLEND = 1 << 20  # bytes: a file of names, no file of records


def read_blend(path: Path, value: Any) -> dict[str, list[tuple[str, float]]]:
    """Return {split: [(file, weight)]} of a Megatron blend file's value, {"train": …, "valid": …, "test": …}.

    A split is a list or a text with spaces, of files or of weights and files in turn (megatron.core's
    get_blend_from_list, which takes a list for unweighted where a weight is no number; here that is a mistake).
    """
    return {split: _weighted(f"{path}: {split}", entries)[0] for split, entries in value.items()}


def _weighted(place: str, entries: Any) -> tuple[list[tuple[str, float]], bool]:
    """Return the files with their weights, and whether there were weights."""
    words = entries.split() if isinstance(entries, str) else [str(entry) for entry in entries or []]
    weights = [_number(word) for word in words[0::2]]
    if len(words) % 2 or all(weight is None for weight in weights):
        return [(word, 1.0) for word in words], False
    weighted = []
    for word, weight, file in zip(words[0::2], weights, words[1::2]):
        if weight is None:
            remedy = "give a weight before each file, or none at all"
            raise UserMistake(f"{place}: {word!r} stands where a weight belongs; {remedy}")
        weighted.append((file, weight))
    return weighted, True


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def refuse_blend(path: Path, value: Any) -> None:
    """Raise UserMistake that spells a blend as the settings it stands for: its files enter keys by content only as
    inputs. Equal weights are weights: files of different sizes then have equal shares."""
    if not (isinstance(value, dict) and value and value.keys() <= {"train", "valid", "test"}):
        return
    train, is_weighted = _weighted(f"{path}: train", value.get("train", []))
    files = json.dumps([file for file, _ in train])
    weights = json.dumps(dict(train)) if is_weighted and len(train) > 1 else "{}"
    told = f"source.inputs: {files} here, and weights: {weights} in pack"
    beside = [split for split in ("valid", "test") if value.get(split)]
    held_out = f"; make stores of their own of {' and '.join(beside)}, for sft's valid_stores" if beside else ""
    raise UserMistake(f"{path} is a blend of files, no file of records; of its train split write {told}{held_out}")
