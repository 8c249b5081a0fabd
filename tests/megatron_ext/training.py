"""A tiny training: its run, its loop to the end on any ranks, and what it wrote."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel

from megatron_ext.entrypoints import sft
from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.training import supervised
from megatron_ext.training.settings import SftSettings
from megatron_ext.training.update import AdamW, Trainer
from megatron_ext.weights import checkpoint
from tests.megatron_ext import tiny

LAYOUTS = {
    "DP2": ParallelPlan(),
    "TP2": ParallelPlan(tensor=2),
    "TP2 SP": ParallelPlan(tensor=2, sequence_parallel=True),
    "PP2": ParallelPlan(pipeline=2, pipeline_layers=[3, 1]),
    "PP2 interleaved": ParallelPlan(pipeline=2, virtual=2),
    "CP2": ParallelPlan(context=2, context_comm="a2a"),
}
MODEL = tiny.dims(layers=4)


def run_of(steps: int = 3, **changes) -> SftSettings:
    plain = dict(steps=steps, schedule="constant", lr=0.01, global_batch=4, log_every=1)
    return SftSettings(**{**plain, **changes})


def draw(done: int, total: int, unit: str, note: str = "") -> None:
    """A progress callback that uses up random numbers at every step, as dropout would."""
    if note.startswith("loss"):
        torch.rand(3)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            torch.rand(5)


def train_to_end(
    plan: ParallelPlan, hf: Path, keep: Path, steps: int = 6, packs: str = "tiny", of: Any = MODEL, **changes
) -> dict:
    """A whole run with a checkpoint every 2 steps. `changes` go to Run."""
    with ranks.started(plan):
        trainer = Trainer(tiny.parts(hf, of, plan), plan, AdamW())
        run = run_of(steps, **{"checkpoint_every": 2, "log_every": 3, **changes})
        trained = supervised.train_on_packs(
            trainer, tiny.Packs(name=packs, align=4), run, keep, identity={"model": "tiny"}, progress=draw
        )
        with tensor_parallel.get_cuda_rng_tracker().fork():
            tracked = torch.rand(1).item()
        random = [torch.rand(1).item(), tracked]
        return {**asdict(trained), "digest": checkpoint.weights_digest(trainer.model), "random": random}


def stop_at(keep: Path, step: int) -> None:
    """Make the folder that of a run killed right after checkpoint `step`, having logged past it."""
    for newer in checkpoint.steps(keep / "checkpoints"):
        if newer > step:
            checkpoint._remove(keep / "checkpoints" / f"step_{newer}")


def metrics(keep: Path) -> list[dict]:
    return [json.loads(line) for line in (keep / "metrics.jsonl").read_text().splitlines()]


def steady(line: dict) -> dict:
    timed = ("step_s", "tokens_per_s", "parts_s", "memory_gib", "slowest_rank", "slowest_ratio")
    return {key: value for key, value in line.items() if key not in timed}


def sft_config(folder: dict[str, Path], steps: int) -> sft.Config:
    return sft.Config(
        model=str(folder["base"]),
        store=str(folder["store"]),
        packs=str(folder["packs"]),
        steps=steps,
        checkpoint_every=5,
        log_every=5,
        global_batch=4,
        seed=3,
    )
