"""The write-ahead log of rollouts: tokens as they are drawn and scores as they come, so that a killed step goes on.

    ROOT/step_12/rank_3.jsonl    what samples that rank makes got since the attempt began
    ROOT/step_12/merged.jsonl    what earlier attempts left, one line a sample; of a step that is over, where many
                                 ranks wrote, all lines of all of them

The rollouts of step 12 are those which the update from step 12 to 13 uses. After a kill the run goes on from an older
checkpoint, computes the same weights again, and takes from here what it had already sampled: tokens and log-probs stand
as they were recorded and are not drawn again. A line that the kill tore, or that does not fit its sum, and what its
sample got after it is drawn again: the same tokens, since noise is keyed. So nothing that is drawn is fsynced.
"""

import base64
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from data_tools.base import durable
from data_tools.tasks.rewards import is_failure
from megatron_ext.rl.samples import Key

MERGED = "merged.jsonl"
FEW = 8  # files of a step that is over: more, from so many replicas, become one


@dataclass
class Entry:
    """What is recorded of one sample. `finish` is empty while it is under way, `score` None until it was judged.

    The tokens of replies are recorded as the model's are, each reply in one line; their log-prob is NaN. `text` is
    that of a whole sample without tokens of ours, else None, and `beside` what else its row says.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""
    routing: numpy.ndarray | None = None  # int16 [computed tokens, r]: Sample.routing
    score: dict[str, Any] | None = None
    text: str | None = None
    beside: dict[str, Any] = field(default_factory=dict)


class Journal:
    """One writer's file of one step. `identity` names what the samples depend on besides the step."""

    def __init__(self, root: Path, step: int, identity: str, name: str):
        self.path = folder_of(root, step) / f"{name}.jsonl"
        self.identity = identity
        self.recorded = 0  # tokens, by this writer
        self._file: Any = None
        self._written: dict[Key, int] = {}
        self._routed: dict[Key, int] = {}

    def resume(self, lengths: Mapping[Key, int], routed: Mapping[Key, int] = {}) -> None:
        """Hear how many tokens of which samples are recorded already, and the routing of how many."""
        self._written, self._routed = dict(lengths), dict(routed)

    def record(
        self,
        key: Key,
        tokens: list[int],
        logprobs: list[float],
        finish: str = "",
        routing: numpy.ndarray | None = None,
        *,
        text: str | None = None,
        beside: Mapping[str, Any] = {},
    ) -> None:
        """Append what is new of a sample whose new tokens so far are `tokens`, with their log-probs, and `routing`; and
        the `text` of one that ended without tokens of ours, with what more its row says."""
        at = self._written.get(key, 0)
        if at == len(tokens) and not finish:
            return
        line = {"item": key[0], "sample": key[1], "at": at, "tokens": _packed(tokens[at:], numpy.int32)}
        line["logprobs"] = _packed(logprobs[at:], numpy.float32)
        line |= _said_by(text, beside)
        if routing is not None:
            line |= _routed(routing[self._routed.get(key, 0) :])
            self._routed[key] = len(routing)
        self._append({**line, "finish": finish} if finish else line)
        self._written[key] = len(tokens)
        self.recorded += len(tokens) - at

    def judge(self, key: Key, score: dict[str, Any]) -> None:
        """Record the verdict on a sample."""
        self._append({"item": key[0], "sample": key[1], "score": score})

    def _append(self, line: dict[str, Any]) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a")
            self._file.write(_spelled({"identity": self.identity}))
        self._file.write(_spelled(line))

    def flush(self) -> None:
        """Hand all that was recorded to the system: a kill of this process loses nothing of it."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Close the file, if it was opened."""
        if self._file is not None:
            self._file.close()
            self._file = None


def folder_of(root: Path, step: int) -> Path:
    """Return the folder of a step's records."""
    return root / f"step_{step}"


def steps(root: Path) -> list[int]:
    """Return the steps of which anything is recorded, in order."""
    numbers = (path.name.removeprefix("step_") for path in root.glob("step_*"))
    return sorted(int(number) for number in numbers if number.isdigit())


def gather(root: Path, step: int, identity: str) -> dict[Key, Entry]:
    """Return all that earlier attempts recorded of a step, and make it one file.

    Records of another identity are dropped. One rank calls it, before any other writes.
    """
    files, entries = _files(root, step), read(root, step, identity)
    if files:
        durable.write_file(folder_of(root, step) / MERGED, "".join(_whole(entries, identity)))
        for path in files:
            if path.name != MERGED:
                path.unlink()
    return entries


def join(root: Path, step: int, identity: str) -> None:
    """Make one file of the records of a step that is over, where they are more than a few. What they say stays.

    One rank calls it, while none writes. Lines are copied as they stand: it reads and writes as fast as the disk.
    """
    files = _files(root, step)
    if len(files) <= FEW:
        return
    joined = folder_of(root, step) / "joined"
    with open(joined, "wb") as out:
        out.write(_spelled({"identity": identity}).encode())
        for path in files:
            with open(path, "rb") as file:
                if _checked(file.readline(), path).get("identity") == identity:
                    shutil.copyfileobj(file, out)
                    out.write(b"\n")  # the last line may be torn; one without anything is none
    os.replace(joined, folder_of(root, step) / MERGED)
    for path in files:
        if path.name != MERGED:
            path.unlink()


def drop_failures(root: Path, step: int, identity: str) -> None:
    """Forget the verdicts of a step that failed, so that its samples are scored anew.

    A sample that a failed reply ended is drawn again. One rank calls it, while none writes.
    """
    entries = gather(root, step, identity)
    failed = {key for key, e in entries.items() if e.score and is_failure(e.score["reward"], e.score["note"])}
    for key in failed:
        if entries[key].finish == "abort":
            del entries[key]
        else:
            entries[key].score = None
    if failed:
        durable.write_file(folder_of(root, step) / MERGED, "".join(_whole(entries, identity)))


def read(root: Path, step: int, identity: str | None = None) -> dict[Key, Entry]:
    """Return what is recorded of a step under this identity (None: any)."""
    entries: dict[Key, Entry] = {}
    for path in _files(root, step):
        for line in _lines(path, identity):
            entry = entries.setdefault((line["item"], line["sample"]), Entry())
            if "score" in line:
                entry.score = line["score"]
            elif line["at"] == len(entry.tokens) and not entry.finish:
                entry.tokens += _unpacked(line["tokens"], numpy.int32)
                entry.logprobs += _unpacked(line["logprobs"], numpy.float32)
                entry.routing = _further(entry.routing, line)
                entry.finish, entry.text = line.get("finish", ""), line.get("text")
                entry.beside = line.get("beside", {})
    for entry in entries.values():
        if not entry.finish:  # a verdict is of a whole sample, whose lines are damaged
            entry.score = None
    return {key: entry for key, entry in entries.items() if entry.tokens or entry.finish}


def _files(root: Path, step: int) -> list[Path]:
    """Return the files that attempts left of a step, the merged one first."""
    return sorted(folder_of(root, step).glob("*.jsonl"), key=lambda path: (path.name != MERGED, path.name))


def forget(root: Path, before: int) -> None:
    """Delete the records of steps below `before`. One rank calls it."""
    for step in steps(root):
        if step < before:
            shutil.rmtree(folder_of(root, step), ignore_errors=True)


class Bound:
    """Keeps the records of a run below so many bytes; the oldest steps go first, and a restart draws them again."""

    def __init__(self, root: Path, most_bytes: float):
        self.root, self.most_bytes = root, most_bytes
        self.sizes = {step: _bytes(root, step) for step in steps(root)}
        self.dropped = 0  # steps, by this attempt

    def add(self, step: int) -> None:
        """Hear that the records of a step are whole, and delete older ones where all together are too large."""
        self.sizes[step] = _bytes(self.root, step)
        while sum(self.sizes.values()) > self.most_bytes and len(self.sizes) > 1:
            oldest = min(self.sizes)
            self.forget(oldest + 1)
            self.dropped += 1

    def forget(self, before: int) -> None:
        """Delete the records of steps below `before`: no checkpoint that is gone on with needs them."""
        forget(self.root, before)
        self.sizes = {step: size for step, size in self.sizes.items() if step >= before}

    def note(self) -> str:
        """Return what was deleted because of the bound, for the summary; "" where nothing was."""
        if not self.dropped:
            return ""
        return f"the rollouts of {self.dropped:,} steps are not recorded any more (journal_gib)"


def _bytes(root: Path, step: int) -> int:
    return sum(path.stat().st_size for path in _files(root, step))


def _lines(path: Path, identity: str | None) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a file of this identity (None: of any), without its first."""
    with open(path, "rb") as file:
        first = _checked(file.readline(), path)
        if "identity" in first and identity in (None, first["identity"]):
            yield from filter(None, (_checked(raw, path) for raw in file))


def _checked(raw: bytes, path: Path) -> dict[str, Any]:
    """Return a line of a file; nothing where it is not whole."""
    try:
        line = durable.parse_checked(raw, path)
    except durable.TornFile:
        return {}
    return line if raw.endswith(b"\n") and durable.SUM in line else {}


def _whole(entries: dict[Key, Entry], identity: str) -> Iterator[str]:
    """Yield the lines of a merged file."""
    yield _spelled({"identity": identity})
    for (item, sample), entry in sorted(entries.items()):
        line: dict[str, Any] = {"item": item, "sample": sample, "at": 0}
        line |= {"tokens": _packed(entry.tokens, numpy.int32), "logprobs": _packed(entry.logprobs, numpy.float32)}
        line |= _said_by(entry.text, entry.beside)
        line |= {} if entry.routing is None else _routed(entry.routing)
        yield _spelled({**line, "finish": entry.finish} if entry.finish else line)
        if entry.score is not None:
            yield _spelled({"item": item, "sample": sample, "score": entry.score})


def _said_by(text: str | None, beside: Mapping[str, Any]) -> dict[str, Any]:
    return ({} if text is None else {"text": text}) | ({"beside": dict(beside)} if beside else {})


def _spelled(line: dict[str, Any]) -> str:
    return json.dumps(durable.with_sum(line)) + "\n"


def _routed(rows: numpy.ndarray) -> dict[str, Any]:
    """Return what a line has of routing, int16 [tokens, r]."""
    return {"routing": _packed(rows.ravel(), numpy.int16), "routes": rows.shape[1]}


def _further(before: numpy.ndarray | None, line: Mapping[str, Any]) -> numpy.ndarray | None:
    """Return the routing of a sample with what a line adds."""
    if "routing" not in line:
        return before
    added = numpy.array(_unpacked(line["routing"], numpy.int16), numpy.int16).reshape(-1, line["routes"])
    return added if before is None else numpy.concatenate([before, added])


def _packed(values: Any, kind: Any) -> str:
    """Return the numbers as base64: a quarter of their JSON, and exact."""
    return base64.b64encode(numpy.array(values, dtype=kind).tobytes()).decode()


def _unpacked(text: str, kind: Any) -> list[Any]:
    return numpy.frombuffer(base64.b64decode(text), dtype=kind).tolist()
