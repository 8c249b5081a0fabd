"""Reads what a run sampled, prompt by prompt: samples, rewards, and of GRPO advantages and who was masked and why.

A training logs every sample of every step. `afterok report` shows some steps, and of each some prompts, and says what
it leaves out; `afterok inspect` shows any step, and what generate and reject_filter made (and an evaluation:
evaluated.py).
"""

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.base import durable
from data_tools.base.printing import as_float
from data_tools.mistake import UserMistake
from jobs.artifacts.layout import sample_logs_of, samples_below
from jobs.artifacts.run_folder import FrozenPhase, RunFolder
from launchers.causes.traces import keep_folder
from launchers.observe.sealed import find_sealed

GRPO = "grpo"
SAMPLED = {"generate": "samples.jsonl", "reject_filter": "chat.jsonl"}  # of other kinds: the file that they seal
STEPS = 8  # of a phase, in a report; of several elements together
ELEMENTS = 4  # of a phase, in a report
GROUPS = 12  # of a step
MOST_SAMPLES = 16  # of a group
TEXT = 2_000  # characters of a prompt or a completion
PACKED = ".zst"  # ends the name of a log that is compressed
READ_OVER = 1 << 20  # bytes at a time
SCANNED = 16 << 20  # bytes of the log of one step that are looked through


@dataclass(frozen=True)
class SampleLine:
    """One sample as its log tells it. `masked` says why it was not trained, "" where it was."""

    number: int
    completion: str
    reward: float | None
    advantage: float | None
    masked: str
    tokens: int
    finish: str
    answer: str
    parts: dict[str, Any]
    note: str
    mean_difference: float | None  # of its log-probs in the rollout and in training, over its tokens
    largest_difference: float | None


@dataclass
class Group:
    """The samples of one prompt in one step."""

    item: int | str  # its number in a training's order of prompts, or its id
    task: str
    name: str
    prompt: str
    samples: list[SampleLine]
    left_out: int = 0  # samples

    @property
    def rewards(self) -> list[float]:
        """Return the rewards that are known."""
        return [sample.reward for sample in self.samples if sample.reward is not None]

    @property
    def trained(self) -> int:
        """Return how many of the samples shown were trained."""
        return sum(not sample.masked for sample in self.samples)

    @property
    def title(self) -> str:
        """Return the name of the prompt, its task before it where the name does not begin with that."""
        return self.name if self.name.startswith(f"{self.task}/") else f"{self.task} {self.name}"


@dataclass
class StepGroups:
    """Some groups of one step."""

    step: int
    groups: list[Group]
    more: bool  # groups of this step that are not shown
    element: int | None = None  # None: the phase has one alone


@dataclass
class SampledGroups:
    """Some steps of one GRPO phase."""

    phase: str
    steps: list[StepGroups] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def groups_of(run: RunFolder, phase: FrozenPhase) -> SampledGroups | None:
    """Return what the report shows of a phase's samples; None where it logged none."""
    kept = samples_below(run.artifact(phase), phase.elements)
    logs = {index: steps for index, keep in kept.items() if (steps := sample_logs_of(keep))}
    if not logs:
        return None
    found, elements = SampledGroups(phase.name), _spread(sorted(logs), ELEMENTS)
    if len(elements) < phase.elements:
        numbers = ", ".join(map(str, elements))
        found.notes.append(f"{phase.name}: samples of the elements {numbers} of {phase.elements:,} are shown")
    for index in elements:
        logged = sorted(logs[index])
        shown = _spread(logged, max(2, STEPS // len(elements)))
        for step in shown:
            groups, more = _step(logs[index][step], _masks_truncated(phase), found.notes)
            found.steps.append(StepGroups(step, groups, more, index if phase.elements > 1 else None))
        if len(shown) < len(logged):
            whose = f"{phase.name}, element {index}" if phase.elements > 1 else phase.name
            numbers = ", ".join(map(str, shown))
            found.notes.append(f"{whose}: samples of {len(shown)} of {len(logged):,} steps are shown: {numbers}")
    if any(step.more for step in found.steps):
        found.notes.append(f"{phase.name}: of each of these steps the first {GROUPS} prompts are shown")
    return found


def _spread(numbers: list[int], most: int) -> list[int]:
    """Return at most so many of some sorted numbers, the first and the last among them."""
    return sorted({numbers[place * (len(numbers) - 1) // max(1, most - 1)] for place in range(most)})


@dataclass(frozen=True)
class ShownSamples:
    """What `afterok inspect` shows of a phase that samples."""

    phase: str
    kind: str
    file: str
    step: int | None  # None: of a phase without steps
    steps: list[int]  # all that were logged
    groups: list[Group]
    notes: list[str]


def _logged(steps: list[int]) -> str:
    """Return the words for the steps, in order, of which samples are logged."""
    some = "" if len(steps) == steps[-1] - steps[0] + 1 else f"{len(steps):,} of the "
    return f"{some}steps {steps[0]} to {steps[-1]}"


def inspect_samples(
    run: RunFolder, phase: FrozenPhase, *, step: int | None, count: int, seed: int, characters: int
) -> ShownSamples:
    """Return `count` groups of a phase, of GRPO those of a step (None: the last one); another `seed` draws other ones.

    Raises:
        UserMistake: it has logged no samples, or none of that step, or is not sealed.
    """
    notes, steps = list[str](), list[int]()
    if phase.uses == GRPO:
        logs = sample_logs_of(keep_folder(run.artifact(phase).folder, phase, 0))
        if not logs:
            raise UserMistake(f"{phase.name} has logged no samples yet; see `afterok status {run.path}`")
        steps = sorted(logs)
        step = steps[-1] if step is None else step
        if step not in logs:
            raise UserMistake(f"--step {step}: {phase.name} has samples of {_logged(steps)}")
        file = logs[step]
    elif step is not None:
        raise UserMistake(f"--step {step}: {phase.name} is a {phase.uses} phase, which has no steps")
    else:
        file = find_sealed(run, phase.name)[1].folder / SAMPLED[phase.uses]
    lines = groupby(lines_of_log(file, notes, draw_start(file, seed)), key=_prompt_of)
    masks = _masks_truncated(phase)
    first = 1 if seed else 0  # a draw begins within a group, which it leaves out
    groups = [_group(item, list(each), masks, characters) for item, each in islice(lines, first, first + count)]
    if count and not groups:
        notes.append(f"{file} has no samples" + (" from there to its end; take another --seed" if seed else ""))
    return ShownSamples(phase.name, phase.uses, str(file), step=step, steps=steps, groups=groups, notes=notes)


def draw_start(file: Path, seed: int) -> int:
    """Return the byte of a file from which a seed draws; 0 of seed 0."""
    if not seed or not file.is_file():
        return 0
    return int(file.stat().st_size * (int(durable.sha256_bytes(str(seed))[:8], 16) / 2**32))


def _prompt_of(line: Mapping[str, Any]) -> Any:
    """Return what names the prompt of a line: its number in a training's order, or its id."""
    return line.get("item", line.get("prompt_id"))


def _masks_truncated(phase: FrozenPhase) -> bool:
    settings = phase.material.get("settings", {})
    return bool(settings.get("rewarding", {}).get("mask_truncated", True))


def _step(path: Path, mask_truncated: bool, notes: list[str]) -> tuple[list[Group], bool]:
    """Return the first groups of a step, and whether there are more."""
    groups: list[Group] = []
    for item, lines in groupby(lines_of_log(path, notes), key=_prompt_of):
        if len(groups) == GROUPS:
            return groups, True
        groups.append(_group(item, list(lines), mask_truncated))
    return groups, False


@contextlib.contextmanager
def _opened(path: Path, start: int) -> Iterator[BinaryIO | io.BufferedReader]:
    """Open a log, a compressed one too, at a byte of its file: what lies before it in that is read over."""
    with open(path, "rb") as file:
        if path.suffix != PACKED:
            file.seek(start)
            yield file
            return
        import zstandard

        with zstandard.ZstdDecompressor().stream_reader(file) as text, io.BufferedReader(text) as lines:
            while start and (over := len(lines.read(min(start, READ_OVER)))):
                start -= over
            yield lines


@contextlib.contextmanager
def _up_to_damage(path: Path, notes: list[str]) -> Iterator[None]:
    """End the reading of a compressed log where it is damaged, and tell so in `notes`."""
    if path.suffix != PACKED:
        yield
        return
    import zstandard

    try:
        yield
    except zstandard.ZstdError as error:
        notes.append(f"{path.name}: it is damaged, and what comes after that is left out ({error})")


def lines_of_log(
    path: Path, notes: list[str], start: int = 0, is_one: Callable[[Any], bool] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the samples of a log from a byte on, those of a prompt together; tell in `notes` what is no sample: by
    `is_one`, or by what a log of samples has."""
    is_one = is_one or _is_sample
    read, bad = 0, False
    with _up_to_damage(path, notes), _opened(path, start) as file:
        if start:
            file.readline()  # the rest of one
        for line in file:
            read += len(line)
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if is_one(value):
                yield value
            elif not bad:
                bad = True
                notes.append(f"{path.name}: lines of it are no samples, and were left out")
            if read > SCANNED:
                notes.append(f"{path.name}: only its first {read:,} bytes were read")
                break


def _is_sample(value: Any) -> bool:
    """Return whether a line names its prompt, and what is nested in it is of the kinds that are shown."""
    if not isinstance(value, dict) or _prompt_of(value) is None:
        return False
    told = {"prompt", "completion"} <= value.keys()
    messages = [None] if told else value.get("messages", [None])
    nested = (value.get(name) or {} for name in ("parts", "logprob_difference"))
    return isinstance(messages, list) and bool(messages) and all(isinstance(each, dict) for each in nested)


def _group(item: Any, lines: list[dict[str, Any]], mask_truncated: bool, characters: int = TEXT) -> Group:
    first = lines[0]
    return Group(
        item=item,
        task=str(first.get("entry", first.get("task", ""))),
        name=str(first.get("uid", first.get("prompt_id", ""))),
        prompt=cut(first["prompt"] if "prompt" in first else first.get("messages", [None])[:-1], characters),
        samples=[_sample(line, mask_truncated, characters) for line in lines[:MOST_SAMPLES]],
        left_out=max(0, len(lines) - MOST_SAMPLES),
    )


def _sample(line: Mapping[str, Any], mask_truncated: bool, characters: int) -> SampleLine:
    difference = line.get("logprob_difference") or {}
    return SampleLine(
        number=line.get("sample", 0),
        completion=cut(line["completion"] if "completion" in line else line.get("messages", [None])[-1], characters),
        reward=_number(line.get("reward")),
        advantage=_number(line.get("advantage")),
        masked=why_masked(line, mask_truncated) if "trained" in line else "",
        tokens=line.get("tokens", 0),
        finish=str(line.get("finish", "")),
        answer=cut(line.get("answer") or ""),
        parts=dict(line.get("parts") or {}),
        note=cut(line.get("note") or ""),
        mean_difference=_number(difference.get("mean")),
        largest_difference=_number(difference.get("max")),
    )


def why_masked(line: Mapping[str, Any], mask_truncated: bool) -> str:
    """Return why a sample was not trained, "" where it was. The order is that in which the training counts them."""
    if line.get("trained"):
        return ""
    if line.get("reward") is None:
        return "unscorable"
    if mask_truncated and line.get("finish") != "stop":
        return "cut off"
    return "equal rewards in its group"


def _number(value: Any) -> float | None:
    return as_float(value) if isinstance(value, (int, float)) else None


def _messages(value: Any) -> str:
    """Return the text of a message, or of several with their roles; "" where they are more than a role and a text."""
    several = value if isinstance(value, list) else [value]
    if not several or not all(isinstance(each, dict) and each.keys() == {"role", "content"} for each in several):
        return ""
    if not all(isinstance(each["content"], str) for each in several):
        return ""
    if value is not several:
        return str(value["content"])
    return "\n".join(f"{each['role']}: {each['content']}" for each in several)


def cut(text: Any, characters: int = TEXT) -> str:
    """Return a text, that of messages, or the JSON of what is neither, of at most so many characters; the end says how
    many there were."""
    whole = text if isinstance(text, str) else _messages(text) or json.dumps(text, ensure_ascii=False)
    return whole if len(whole) <= characters else f"{whole[:characters]} … (cut: {len(whole):,} characters)"
