"""What a training reports, and where to: metrics.jsonl always, W&B and TensorBoard when asked.

Rank 0 writes. A step is in metrics.jsonl once, resumed or not. W&B and TensorBoard get what metrics.jsonl gets.
"""

import json
import math
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from data_tools.base import durable
from data_tools.mistake import UserMistake
from megatron_ext import device
from megatron_ext.layers.mxfp4 import unpacked
from megatron_ext.parallel.calibration import GPUS
from megatron_ext.training.track import Track

MARKS_KEPT = 4096  # of a clock that nobody reads
MODES: dict[str, Literal["online", "offline"]] = {"online": "online", "offline": "offline"}  # of W&B, by track.wandb


# ---------------------------------------------------------------- where to


class Sink(Protocol):
    """Where metrics go."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write what is known of a step."""

    def close(self) -> None:
        """Write all that is not written yet."""


class Metrics:
    """metrics.jsonl and other sinks on rank 0; nothing on the others."""

    def __init__(self, path: Path, resumed_from: int, sinks: Callable[[], Sequence[Sink]] = tuple):
        self.path = path
        self.writer = dist.get_rank() == 0
        self.sinks = sinks() if self.writer else ()
        self.keep_only(lambda line: _step_of(line) <= resumed_from)

    def keep_only(self, stays: Callable[[str], bool]) -> None:
        """Take the other lines out of metrics.jsonl: what they say will be said again."""
        if self.writer and self.path.exists():
            kept = filter(stays, self.path.read_text().splitlines())
            durable.write_file(self.path, "".join(line + "\n" for line in kept))

    def append(self, values: dict[str, Any]) -> None:
        """Add a line, which has its `step`."""
        if self.writer:
            with open(self.path, "a") as file:  # not fsynced: a line lost in a power cut is written again
                file.write(json.dumps(values) + "\n")
        for sink in self.sinks:
            sink.write(values["step"], values)

    def close(self) -> None:
        """Close the sinks."""
        for sink in self.sinks:
            sink.close()


def _step_of(line: str) -> float:
    """Return the step of a metrics line; inf for a torn one, so that it is dropped."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers by name, those of nested mappings as "outer/inner"."""
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            numbers |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            numbers[prefix + name] = value
    return numbers


class TensorBoard:
    """An event file in KEEP/tensorboard. A resumed run hides what an earlier one wrote of steps it makes again."""

    def __init__(self, folder: Path, resumed_from: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserMistake("track.tensorboard: tensorboard is not installed: pip install 'afterok[wandb]'") from None
        self._writer = SummaryWriter(str(folder), purge_step=resumed_from + 1 if resumed_from else None)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in _flat(values).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A W&B run of a stable id, so that attempts go on with it. Its key is wandb's own matter (WANDB_API_KEY)."""

    def __init__(self, folder: Path, track: Track, run_id: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UserMistake("track.wandb: wandb is not installed: pip install 'afterok[wandb]'") from None
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            mode=MODES[track.wandb],
            dir=str(folder),
            project=track.project,
            entity=track.entity or None,
            name=track.name or None,
            id=run_id,
            resume="allow" if track.wandb == "online" else None,  # offline, `wandb sync` joins runs of one id
            config=dict(config),
            # Neither the console nor the environment, command line and code go along: they may hold secrets.
            settings=wandb.Settings(console="off", x_disable_meta=True, disable_git=True, save_code=False),
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(_flat(values), step=step)

    def close(self) -> None:
        self._run.finish()


def sinks(track: Track, keep: Path, resumed_from: int, identity: Mapping[str, Any]) -> list[Sink]:
    """Return what `track` asks for besides metrics.jsonl, for one rank. UserMistake where its library is missing."""
    asked: list[Sink] = []
    if track.tensorboard:
        asked.append(TensorBoard(keep / "tensorboard", resumed_from))
    if track.wandb != "off":
        run_id = durable.sha256_bytes(str(keep.resolve()))[:16]  # the same for all attempts at this training
        asked.append(Wandb(keep, track, run_id, identity))
    return asked


# ---------------------------------------------------------------- what


class Clock:
    """Measures seconds by part of a step, on the device's clock."""

    def __init__(self) -> None:
        self._marks: deque[tuple[str, Any]] = deque(maxlen=MARKS_KEPT)

    def start(self) -> None:
        """Begin: what comes until the next `mark` counts from here."""
        self._marks.append(("", device.mark()))

    def mark(self, part: str) -> None:
        """Count the time since the last mark or start as `part`'s."""
        self._marks.append((part, device.mark()))

    def read(self) -> dict[str, float]:
        """Return the seconds of each part, in the mean of its occurrences since the last read."""
        by_part: dict[str, list[float]] = defaultdict(list)
        marks = list(self._marks)
        self._marks.clear()
        for (_, before), (part, after) in zip(marks, marks[1:]):
            if part:
                by_part[part].append(device.seconds_between(before, after))
        return {part: statistics.fmean(seconds) for part, seconds in by_part.items()}


@dataclass(frozen=True)
class Slowest:
    """Which of all ranks works longest before it waits for the others, and how much longer than the median one."""

    rank: int
    ratio: float
    peak_memory: int  # bytes, of the rank that held most


def compare_ranks(seconds: float) -> Slowest:
    """Return which rank is slowest, from how long each rank says that its own work takes."""
    own = torch.tensor([seconds, device.peak_memory()], dtype=torch.float64, device=device.device())
    box = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(box, own)
    times, memory = zip(*torch.stack(box).tolist())
    slowest = max(range(len(times)), key=times.__getitem__)
    median = statistics.median(times)
    return Slowest(slowest, times[slowest] / median if median else 1.0, int(max(memory)))


def parameter_norm(model: Sequence[torch.nn.Module]) -> float:
    """Return the L2 norm of all parameters of the whole model; each counts once. Every rank takes part."""
    dense = parallel_state.get_model_parallel_group(), parallel_state.get_tensor_model_parallel_group()
    expert = (
        parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
        parallel_state.get_expert_tensor_parallel_group(),
    )
    total = 0.0
    for is_dense, (group, tensor_group) in ((True, dense), (False, expert)):
        squares = torch.zeros((), dtype=torch.float64, device=device.device())
        for part in model:
            for p in part.parameters():
                counts = param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p, tensor_group)
                if counts and getattr(p, "allreduce", True) == is_dense:
                    values = unpacked(p, torch.float32) if p.dtype == torch.uint8 else p.detach().float()
                    squares += values.square().sum().double()
        dist.all_reduce(squares, group=group)
        total += squares.item()
    return math.sqrt(total)


def peak_flops() -> float | None:
    """Return the device's dense bf16 FLOPs a second by its data sheet; None where it has none."""
    name = device.machine().get("gpu", "").lower()
    return next((gpu.bf16_tflops * 1e12 for known, gpu in GPUS.items() if known in name), None)
