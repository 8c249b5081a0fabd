"""What ranks do on pretended GPUs, and the same on the CPU."""

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import tensor_parallel

from data_tools.progress import never
from megatron_ext.device import backend, device, record
from megatron_ext.lora import adapters, pairs, peft_format
from megatron_ext.lora.settings import BARE
from megatron_ext.models.registry import Family, unwrap
from megatron_ext.parallel import ranks
from megatron_ext.parallel.parts import OURS, Parts
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rollout import cache
from megatron_ext.rollout.engine import Engine
from megatron_ext.rollout.sequence import Request
from megatron_ext.rollout.settings import EngineConfig, Sampling
from megatron_ext.training import certify
from megatron_ext.training.loop import StopVote
from megatron_ext.training.update import AdamW, Trainer
from megatron_ext.weights import checkpoint, convert
from tests.gpu_rehearsal.pretended import memory
from tests.megatron_ext import adapted, tiny
from tests.megatron_ext.rl import toy

Forget = Callable[[Trainer, list[Any]], Callable[[], Any]]  # leaves something behind, and returns what meets it

ALONE = ParallelPlan()
PACKS = [tiny.pack([20, 8, 4, 32], seed, vocabulary=19) for seed in range(2)]  # shorter and longer than the windows
RATE = 1e-2
PROMPTS = [tuple(1 + (3 * i + j * j) % 18 for j in range(1 + 5 * i % 23)) for i in range(4)]
ENGINE = EngineConfig(kv_gib=0.01, block_size=4, max_batch=6, token_budget=16)
SAMPLINGS = {
    "greedy": Sampling(max_tokens=4, temperature=0.0),
    "filtered": Sampling(max_tokens=4, temperature=0.8, top_k=9, top_p=0.9, min_p=0.01),
}


def left_behind(parts: list[Any]) -> list[str]:
    """Return the names of parameters and buffers that are not on the rank's device."""
    held = [named for part in parts for named in (*part.named_parameters(), *part.named_buffers())]
    return sorted({name for name, tensor in held if tensor.device != device()})


def built(
    of: Any, hf: Path, plan: ParallelPlan = ALONE, dtype: torch.dtype = torch.float32, made_of: Parts = OURS
) -> list[Any]:
    parts = tiny.family(of).build(of, plan, dtype, made_of)
    for part in parts:
        convert.import_weights(part, hf, tiny.family(of), of)
    assert not (names := left_behind(parts)), names
    return parts


def update(trainer: Trainer, plan: ParallelPlan) -> list[float]:
    """Make an update, use up random numbers, and return what came out of both."""
    sums, norm = trainer.step(certify.rows_of(PACKS, plan), RATE)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        tracked = torch.rand(1, device=device()).item()
    found = [sums.reduced().mean_loss, norm, tracked, torch.rand(1).item(), torch.rand(1, device=device()).item()]
    assert all(map(math.isfinite, found))
    return found


def rollouts(model: Any, kinds: Sequence[str] = tuple(SAMPLINGS), **settings: Any) -> dict[str, list]:
    """Return tokens and log-probs of two samples of each prompt, by kind of sampling."""
    found = {}
    for name in kinds:
        engine = Engine(model, replace(ENGINE, **settings), seed=7, stop_ids={5})
        wanted = [Request(100 + i, prompt, 2) for i, prompt in enumerate(PROMPTS)]
        ended = sorted(engine.generate(wanted, SAMPLINGS[name]), key=lambda s: (s.prefix.request.uid, s.sample))
        found[name] = [(s.completion, s.logprobs, s.model_logprobs) for s in ended]
    return found


def decoded(
    of: Any, folder: Path, plan: ParallelPlan = ALONE, made_of: Parts = OURS, **settings: Any
) -> dict[str, list]:
    """Return `rollouts` of a model as it was imported, where they leave random states as they were."""
    with ranks.started(plan):
        (model,) = built(of, tiny.hf_folder(folder, of), plan, made_of=made_of)
        tracker = tensor_parallel.get_cuda_rng_tracker()
        before = tracker.get_states()
        found = rollouts(model, **settings)
        assert all(torch.equal(states, before[name]) for name, states in tracker.get_states().items())
        return found


def checkpoints(of: Any, folder: Path, plan: ParallelPlan, made_of: Parts) -> list[int]:
    """Return how often megatron-core's checkpoints are called in rollouts of recorded passes, and in rollouts of a
    model that is left as it is in training.
    """
    called = []
    with ranks.started(plan):
        (model,) = built(of, tiny.hf_folder(folder, of), plan, made_of=made_of)
        for left, graphs in ((contextlib.nullcontext(), True), (mock.patch.object(type(model), "eval"), False)):
            with left, mock.patch.object(tensor_parallel, "checkpoint", wraps=tensor_parallel.checkpoint) as kept:
                rollouts(model.train(), ["greedy"], cuda_graphs=graphs)
            called.append(kept.call_count)
    return called


def walk(of: Any, folder: Path, plan: ParallelPlan = ALONE, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Import, roll out, train, save, evaluate, resume, export, and adapt."""
    found: dict[str, Any] = {}
    own = folder / backend()
    with ranks.started(plan):
        if ranks.is_writer():
            tiny.hf_folder(folder / "hf", of)
        torch.distributed.barrier()
        hf = folder / "hf"
        parts = built(of, hf, plan, dtype)
        if plan.virtual == 1:
            found["frozen"] = rollouts(parts[0])
        trainer = Trainer(parts, plan, AdamW(weight_decay=0.1))
        found["updates"] = [update(trainer, plan)]
        saver = checkpoint.Saver(own / "steps", trainer.model, trainer.optimizer, plan, keep=2, background=True)
        saver.save(1, identity={}, position={"step": 1})
        found["updates"].append(update(trainer, plan))
        saver.close()
        found["evaluated"] = trainer.evaluate(certify.rows_of(PACKS, plan)).reduced().mean_loss
        if plan.virtual == 1:
            with trainer.offloaded(True):
                found["trained"] = rollouts(trainer.model[0])
            found["updates"].append(update(trainer, plan))  # from a state that was off the device meanwhile
            found["after"] = trainer.evaluate(certify.rows_of(PACKS, plan)).reduced().mean_loss
        assert not (names := left_behind(trainer.model)), names
    with ranks.started(plan, seed=5):
        trainer = Trainer(built(of, hf, plan, dtype), plan, AdamW(weight_decay=0.1))
        checkpoint.load_step(own / "steps" / "step_1", trainer.model, trainer.optimizer, plan, {})
        found["resumed"] = update(trainer, plan)
        checkpoint.save_weights(trainer.model, own / "weights")
        found["digest"] = checkpoint.weights_digest(trainer.model)
    with ranks.started(plan):
        if ranks.is_writer():
            export(of, own / "weights", own / "exported")
        torch.distributed.barrier()
        found["exported"] = checkpoint.weights_digest(built(of, own / "exported", plan, dtype))
    with ranks.started(plan):
        found["lora"] = _adapted(of, hf, plan, dtype, own)
    return found


def export(of: Any, weights: Path, out: Path) -> None:
    """Write trained weights as safetensors."""
    out.mkdir()
    rules = tiny.family(of).mapping.rules(of)
    convert.export_share(weights, rules, {"hf": {}, "tensors": {}}, out, dtype="", index=0, count=1)
    convert.finish_export([out], out, {})


def _adapted(of: Any, hf: Path, plan: ParallelPlan, dtype: torch.dtype, own: Path) -> list[Any]:
    """Train adapters, write and read them, and roll out with and without them."""
    family, config = tiny.family(of), adapted.lora(of)
    config = replace(config, dropout=0.0 if set(BARE) & set(config.targets) else 0.1)
    parts = built(of, hf, plan, dtype)
    adapters.attach(parts, family, of, config, seed=3)
    assert not (names := left_behind(parts)), names
    trainer = Trainer(parts, plan, AdamW())
    found: list[Any] = [update(trainer, plan), update(trainer, plan)]
    adapters.write(own / "adapter", trainer.model, family, of)
    torch.distributed.barrier()
    parts = built(of, hf, plan, dtype)
    adapters.attach(parts, family, of, config)
    adapters.load(parts, peft_format.Reader(own / "adapter", pairs.pairs(family, of, config), config))
    if plan.virtual == 1:
        found.append(rollouts(parts[0], ["greedy"]))
        with adapters.without(parts):
            found.append(rollouts(parts[0], ["greedy"]))
    return found


def policy(of: Any, folder: Path, **settings: Any) -> list[dict[str, Any]]:
    """Return the metrics of a run of GRPO that has all there is: several updates, a reference, offloading, a resume."""
    keep, hf = folder / backend(), folder / "hf"
    if not hf.exists():
        tiny.hf_folder(hf, of, seed=4)
    asked = dict(minibatches=2, passes=2, offload=True, old_logprobs="rollout", reference=True, **settings)
    for steps in (1, 3):
        toy.trained(hf, of, ALONE, keep, steps, **asked)
    return [json.loads(line) for line in (keep / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- how often the host waits


def waits_of_a_training_step(of: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[dict, dict, dict]:
    """Return the events of an update over two micro-batches, their places, and operators without a fixed order."""
    with ranks.started(ALONE):
        trainer = Trainer(built(of, tiny.hf_folder(folder, of), ALONE, dtype), ALONE, AdamW())
        rows = certify.rows_of(PACKS, ALONE)
        vote = StopVote(never)
        trainer.step(rows, RATE)
        before = memory.unordered()
        with memory.counted() as found:
            trainer.step(rows, RATE, before_update=vote.send)
            assert not vote.count()
        return memory.kinds(found), dict(found), dict(memory.unordered() - before)


def waits_of_a_decode_step(of: Any, folder: Path, graphs: bool = False, kind: str = "greedy") -> tuple[dict, dict]:
    """Return the events of one step of the engine that decodes, and their places."""
    with ranks.started(ALONE):
        (model,) = built(of, tiny.hf_folder(folder, of), ALONE, torch.bfloat16)
        engine = Engine(model, replace(ENGINE, cuda_graphs=graphs), seed=7, stop_ids=set())
        steps: list[tuple[bool, dict]] = []
        step = engine._step

        def watched(*arguments: Any) -> Any:
            with memory.counted() as found:
                ended = step(*arguments)
            steps.append((engine.counts["decoded"] > 0, found))
            return ended

        engine._step = watched
        sampling = replace(SAMPLINGS[kind], max_tokens=8)
        list(engine.generate([Request(100 + i, PROMPTS[1], 1) for i in range(4)], sampling))
        _, last = steps[-1]
        return memory.kinds(last), dict(last)


# ---------------------------------------------------------------- things left behind


def _norm(trainer: Trainer, rows: list[Any]) -> Callable[[], Any]:
    norm = next(module for module in trainer.model[0].modules() if type(module).__name__ == "Norm")
    norm.weight.data = norm.weight.data.cpu()
    return lambda: rollouts(trainer.model[0])


def _router_s_adapter(trainer: Trainer, rows: list[Any]) -> Callable[[], Any]:
    parts = [unwrap(part) for part in trainer.model]
    adapters.attach(parts, Family("gpt_oss"), tiny.GPT_OSS_DIMS, adapted.lora(tiny.GPT_OSS_DIMS))
    name = next(name for name in parts[0].adapters._modules if "router" in name)
    parts[0].adapters._modules[name].cpu()
    return lambda: rollouts(parts[0])


def _of_row(field: str) -> Forget:
    def forget(trainer: Trainer, rows: list[Any]) -> Callable[[], Any]:
        own = [replace(row, **{field: getattr(row, field).cpu()}) for row in rows]
        return lambda: trainer.step(own, RATE)

    return forget


def _of_documents(field: str) -> Forget:
    def forget(trainer: Trainer, rows: list[Any]) -> Callable[[], Any]:
        def moved(held: Any) -> Any:
            return replace(held, slots=held.slots.cpu()) if field == "layout" else held.cpu()

        own = [replace(row.documents, **{field: moved(getattr(row.documents, field))}) for row in rows]
        return lambda: trainer.step([replace(row, documents=each) for row, each in zip(rows, own)], RATE)

    return forget


def _arrays_of_a_step(trainer: Trainer, rows: list[Any]) -> Callable[[], Any]:
    def pass_of_the_engine() -> None:
        kept = cache.send
        cache.send = lambda numbers: numbers
        try:
            rollouts(trainer.model[0])
        finally:
            cache.send = kept

    return pass_of_the_engine


FORGOTTEN: dict[str, Forget] = {
    "norm": _norm,
    "adapter of a router": _router_s_adapter,
    "tokens": _of_row("ids"),
    "places of supervised tokens": _of_row("supervised"),
    "labels": _of_row("labels"),
    "positions in documents": _of_documents("positions"),
    "places in buckets": _of_documents("layout"),
    "arrays of a step of the engine": _arrays_of_a_step,
}


def forgotten(what: str, folder: Path) -> str:
    """Leave something on the CPU, make what meets it, and return what was raised."""
    of = tiny.GPT_OSS_DIMS
    with ranks.started(ALONE):
        trainer = Trainer(built(of, tiny.hf_folder(folder, of)), ALONE, AdamW())
        meet = FORGOTTEN[what](trainer, certify.rows_of(PACKS, ALONE))
        try:
            meet()
        except memory.Stray as stray:
            return str(stray)
    return "nothing"


# ---------------------------------------------------------------- recorded passes


def refused_in_a_recording(what: str) -> str:
    """Record what a CUDA graph cannot hold, or lose what it reads, and return what was raised."""
    x = torch.ones(3, device=device())
    lost = [torch.ones(3, device=device())]
    passes: dict[str, Callable[[], torch.Tensor]] = {
        "a number read": lambda: x * x.sum().item(),
        "a choice by value": lambda: x if x.sum() > 0 else -x,
        "a mask": lambda: x[x > 0],
        "numbers of the host": lambda: x + torch.tensor([1.0, 2.0, 3.0], device=device()),
        "memory that goes": lambda: x + lost[0],
        "nothing": lambda: x + 1,
    }
    try:
        replay = record(passes[what])
        lost.clear()
        assert replay().tolist() == [2.0] * 3
    except memory.Stray as stray:
        return str(stray)
    return "nothing"


def forked_in_a_recording() -> list[float]:
    """Return what a pass gives that forks random states, as TransformerBlock does under sequence parallelism."""
    x = torch.ones(3, device=device())
    with ranks.started(ALONE):
        tracker = tensor_parallel.get_cuda_rng_tracker()
        before = tracker.get_states()

        def run() -> torch.Tensor:
            with tracker.fork():
                return x * 1

        found = record(run)().tolist()
        assert all(torch.equal(states, before[name]) for name, states in tracker.get_states().items())
        return found


def replayed() -> list[list[float]]:
    """Return what a recorded pass gives for inputs that change in place, and for a number that was baked in."""
    x, factor = torch.ones(2, device=device()), [2.0]
    total = torch.zeros(2, device=device())

    def run() -> torch.Tensor:
        total.add_(x)
        return x.mul(factor[0]).exp().log()

    replay = record(run)
    before, found = total.clone(), []
    for value in (3.0, 5.0):
        x.fill_(value)
        factor[0] = value  # too late: the kernel has its own
        found.append([round(number, 4) for number in replay().tolist()])
    return [*found, (total - before).tolist()]
