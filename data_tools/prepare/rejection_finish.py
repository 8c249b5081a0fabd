"""What rejection looks at across prompts, once all elements have left their samples: JSONL chat.

    same_question   a prompt that asks, word by word, what an earlier one asks
    no_band, over_band    prompts in no band of difficulty; those of a band that are too many
    same_method     a sample that is one of an earlier prompt but for its numbers
    over_task, over_most    samples of a task, or in all, that are too many

Where there are too many, those stay whose prompts' hashes with the seed are smallest. Memory: a few numbers a sample.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.base.durable import fsync_tree
from data_tools.base.json_text import json_line
from data_tools.base.one_file import Files, open_part
from data_tools.base.tables import ShownTable
from data_tools.mistake import UserMistake
from data_tools.prepare.rejection import Band, Config
from data_tools.prepare.rejection_element import LEFT, ORIGINS, PROMPTS
from data_tools.progress import Progress, silent
from data_tools.records.balance import Balance
from data_tools.records.merge_sorted import merged

CHAT = "chat.jsonl"

_REPORT_EVERY = 5000


class _Sample(NamedTuple):
    """Holds what decides about a sample, without its text."""

    prompt: int
    file: int
    tokens: int
    task: str
    rate: float | None
    asked: bytes
    method: str


def finish(config: Config, parts: Sequence[Path], out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Write chat.jsonl and balance.json from the elements' folders into the empty folder `out`; return the facts.

    Prompts keep the order of the inputs, and samples that of their prompt. Raise UserMistake where samples of one
    prompt lie in two elements.
    """
    every = np.concatenate([_prompts(part) for part in parts])
    if len(np.unique(every)) < len(every):
        twice = len(every) - len(np.unique(every))
        raise UserMistake(
            f"samples of {twice:,} prompts lie in two elements; name files of other phases in a reject_filter of their "
            "own, or have it follow all of `generate` (afterok)"
        )
    sheets = [Balance.read(part) for part in parts]
    balance = sum(sheets[1:], sheets[0])
    with merged([part / LEFT for part in parts], _lines, _order, scratch=out) as lines:
        samples = [_read(line) for line in lines()]
        buckets, bands = _buckets(samples, config)
        with open(out / CHAT, "w", encoding="utf-8") as chat:
            for done, (line, bucket) in enumerate(zip(lines(), buckets)):
                if done % _REPORT_EVERY == 0:
                    progress(done, len(samples), "samples")
                if not bucket:
                    chat.write(json_line(line["chat"]))
    for sample, bucket in zip(samples, buckets):
        if bucket:
            balance.sources[sample.file].drop_kept(bucket, 1, sample.tokens, sample.tokens)
    progress(len(samples), len(samples), "samples")
    balance.write(out)
    fsync_tree(out)
    total, origins = balance.total(), [json.loads(Files(part).read(ORIGINS)) for part in parts]
    return {
        "kept": total.kept,
        "samples": total.rows,
        "tokens": total.tokens,
        "prompts": len(every),
        "prompts_left": len({sample.prompt for sample, bucket in zip(samples, buckets) if not bucket}),
        **{key: sorted({value for origin in origins for value in origin[key]}) for key in ("weights", "seed")},
        "tables": {"balance": balance.table(), **({"bands": bands} if config.bands else {})},
    }


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield what an element left, in the order of its prompts."""
    with open_part(file) as left:
        yield from map(json.loads, left)


def _prompts(part: Path) -> np.ndarray:
    """Return the numbers of the prompts that an element had."""
    with open_part(part / PROMPTS) as file:
        return np.load(file)


def _order(line: dict[str, Any]) -> Any:
    return line["order"], line["prompt"]


def _read(line: dict[str, Any]) -> _Sample:
    asked = hashlib.blake2b(" ".join(line["asked"]).encode(), digest_size=16).digest() if line["asked"] else b""
    return _Sample(line["prompt"], line["file"], line["tokens"], line["task"], line["rate"], asked, line["method"])


def _buckets(samples: Sequence[_Sample], config: Config) -> tuple[list[str], ShownTable]:
    """Return the bucket of each sample, "" of those that stay, and the table of the bands."""
    buckets = [""] * len(samples)
    first_of: dict[bytes, int] = {}
    for place, sample in enumerate(samples):
        if sample.asked and first_of.setdefault(sample.asked, sample.prompt) != sample.prompt:
            buckets[place] = "same_question"
    bands = _into_bands(samples, buckets, config)
    methods: set[str] = set()
    for place, sample in enumerate(samples):
        if not buckets[place] and sample.method:
            if sample.method in methods:
                buckets[place] = "same_method"
            methods.add(sample.method)
    drawn = sorted(range(len(samples)), key=lambda place: (_draw(config.seed, samples[place].prompt), place))
    of_task: Counter[str] = Counter()
    for bucket, limit in (("over_task", config.per_task), ("over_most", config.most)):
        of_task.clear()
        for place in drawn if limit else ():
            task = samples[place].task if bucket == "over_task" else ""
            if not buckets[place]:
                of_task[task] += 1
                if of_task[task] > limit:
                    buckets[place] = bucket
    return buckets, bands


def _into_bands(samples: Sequence[_Sample], buckets: list[str], config: Config) -> ShownTable:
    """Write the buckets of prompts that are in no band, or too many of one; return the table of the bands."""
    rates = {sample.prompt: sample.rate for sample, bucket in zip(samples, buckets) if not bucket}
    band_of = {
        prompt: next((name for name, band in config.bands.items() if _lies_in(rate, band)), "")
        for prompt, rate in rates.items()
    }
    rows, left = [], set(rates)
    for name, band in config.bands.items():
        prompts = sorted(
            (prompt for prompt in rates if band_of[prompt] == name), key=lambda prompt: _draw(config.seed, prompt)
        )
        left -= set(prompts[band.prompts :]) if band.prompts else set()
        stay = min(len(prompts), band.prompts or len(prompts))
        rows.append([name, f"{band.least:.0%} to {band.most:.0%}", len(prompts), stay])
    for place, sample in enumerate(samples):
        if config.bands and not buckets[place]:
            buckets[place] = "no_band" if not band_of[sample.prompt] else "" if sample.prompt in left else "over_band"
    columns = ["band", "right samples", "prompts", "prompts that stay"]
    return {"title": "Bands of difficulty", "columns": columns, "rows": rows}


def _lies_in(rate: float | None, band: Band) -> bool:
    return rate is not None and band.least <= rate <= band.most


def _draw(seed: int, prompt: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{prompt}".encode(), digest_size=8).digest()
