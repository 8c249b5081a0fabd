"""The log of samples in KEEP/samples: step_000012.jsonl, a line a sample, all of a prompt together; long ones as .zst.

The log has a bound. As long as all steps fit below it, each sample is logged; else a step logs as many of its prompts
as its share of what is left of the bound holds, spread over the step. Where that is less than one, some steps log one
prompt and the others none, evenly over the run. KEEP/samples/left_out.jsonl says of which steps that holds, a line each
that is appended; of a step that was made again, its last line holds.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import zstandard

from data_tools.base import durable
from megatron_ext.rl.samples import Sample, SampleBatch

PACKED_ABOVE = 16 << 20  # characters of a step's log that is compressed
LEFT_OUT = "left_out.jsonl"
ALL_AT_ONCE = "left_out.json"  # of trainings that began before it was appended to
NOT_KEPT = (None, False)  # advantage of a sample whose prompt no update has, and whether it was trained

Differences = Mapping[tuple[int, int], tuple[float, float]]  # sample -> (sum, largest) of its log-probs' differences
Spell = Callable[[Sample], dict[str, Any]]  # from a sample, to its texts


class SampleLog:
    """Writes the log of a training of so many steps, of at most so many bytes. One rank has it."""

    def __init__(self, folder: Path, most_bytes: float, steps: int):
        self.folder, self.most_bytes, self.steps = folder, most_bytes, steps
        folder.mkdir(parents=True, exist_ok=True)
        self.sizes = {path.name.split(".")[0]: path.stat().st_size for path in folder.glob("step_*")}
        self.bytes = sum(self.sizes.values())
        self.left_out = _left_out(folder)

    def write(
        self, step: int, drawn: Sequence[Sample], batch: SampleBatch, *, differences: Differences, spell: Spell
    ) -> None:
        """Write what was drawn for the update that made `step`. A step done again after a kill writes it again."""
        worth = {s.key: (float(a), bool(t)) for s, a, t in zip(batch.samples, batch.advantages, batch.trained)}
        prompts: list[str] = []
        for _, samples in groupby(sorted(drawn, key=lambda s: s.key), key=lambda s: s.item):
            lines = (_line(step, s, worth.get(s.key, NOT_KEPT), differences, spell) for s in samples)
            prompts.append("".join(lines))
        name = f"step_{step:06d}"
        packed = sum(map(len, prompts)) > PACKED_ABOVE
        data = _spelled(prompts, packed)
        self.bytes -= self.sizes.pop(name, 0)
        room = (self.most_bytes - self.bytes) / max(1, self.steps - step + 1)
        logged = len(prompts)
        while len(data) > room and logged > 1:
            logged = max(1, min(logged - 1, int(logged * max(room, 0) / len(data))))
            data = _spelled([prompts[place * len(prompts) // logged] for place in range(logged)], packed)
        if len(data) > room and len(data) > self.most_bytes * step / self.steps - self.bytes:
            logged = 0  # there will be room once enough steps have left theirs
        path = self.folder / f"{name}.jsonl{'.zst' if packed else ''}"
        if logged:
            durable.write_file(path, data)
            self.sizes[name] = len(data)
            self.bytes += len(data)
        for other in self.folder.glob(f"{name}.jsonl*"):
            if other != path or not logged:
                other.unlink()
        self._tell(step, logged, len(prompts))

    def _tell(self, step: int, logged: int, prompts: int) -> None:
        before = self.left_out.pop(step, None)
        if logged < prompts:
            self.left_out[step] = (logged, prompts)
        if before != self.left_out.get(step):
            line = {"step": step, "logged": logged, "prompts": prompts}
            durable.append_line(self.folder / LEFT_OUT, json.dumps(durable.with_sum(line)))

    def note(self) -> str:
        """Return what is not in the log, for the summary; "" where all is."""
        if not self.left_out:
            return ""
        logged, prompts = (sum(counts[place] for counts in self.left_out.values()) for place in (0, 1))
        left_out = f"{prompts - logged:,} of {prompts:,} prompts of {len(self.left_out):,} steps"
        return f"samples/ leaves out {left_out} (samples_gib)"


def _left_out(folder: Path) -> dict[int, tuple[int, int]]:
    """Return {step: (its prompts that are logged, its prompts)} of the steps of which not all are.

    Raises durable.TornFile for a line that was altered; one that a power cut tore is of no step.
    """
    found: dict[int, tuple[int, int]] = {}
    if (folder / ALL_AT_ONCE).exists():
        found = {
            int(step): (counts[0], counts[1]) for step, counts in durable.read_checked(folder / ALL_AT_ONCE).items()
        }
    with contextlib.suppress(FileNotFoundError), open(folder / LEFT_OUT, "rb") as file:
        for raw in file:
            if raw.endswith(b"\n"):
                line = durable.parse_checked(raw, folder / LEFT_OUT)
                found[line["step"]] = (line["logged"], line["prompts"])
    return {step: counts for step, counts in found.items() if counts[0] < counts[1]}


def _spelled(prompts: Sequence[str], packed: bool) -> bytes:
    """Return the bytes of a log."""
    data = "".join(prompts).encode()
    return zstandard.ZstdCompressor(write_checksum=True).compress(data) if packed else data


def _line(step: int, sample: Sample, worth: tuple[float | None, bool], differences: Differences, spell: Spell) -> str:
    """Return the line of a sample; `worth` is its advantage, and whether it was trained."""
    line = {"step": step, "item": sample.item, "sample": sample.number, **spell(sample)}
    line |= {"tokens": sample.length, "finish": sample.finish, "reward": sample.reward, "answer": sample.answer}
    line |= {"parts": dict(sample.parts), "note": sample.note, "advantage": worth[0], "trained": worth[1]}
    if sample.key in differences:
        total, largest = differences[sample.key]
        line["logprob_difference"] = {"mean": total / sample.own_tokens, "max": largest}
    return json.dumps(line, ensure_ascii=False) + "\n"
