"""A toy run of GRPO: prompts are a few tokens, and a completion is worth its share of tokens below TARGET.

With `turns`, token ASKS is answered: by up to three tokens, which all that was said before decides.
"""

# ruff: noqa: E402  (megatron-core may be imported once the device is ready)
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy

from megatron_ext.device import init_device

init_device()  # before megatron-core is imported

from data_tools.progress import Stopped
from megatron_ext.parallel import ranks
from megatron_ext.parallel.parts import OURS, Parts
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rl import collect, step
from megatron_ext.rl.collect import Collector
from megatron_ext.rl.rows import log_probs
from megatron_ext.rl.settings import GrpoSettings, Rewarding
from megatron_ext.rl.turns import Turns
from megatron_ext.rollout.dealing import Group, Stretch, deal
from megatron_ext.rollout.engine import Engine
from megatron_ext.rollout.settings import EngineConfig, Sampling
from megatron_ext.training.update import AdamW, Trainer
from megatron_ext.weights import checkpoint
from tests.megatron_ext import tiny

TARGET, STOP_ID, ASKS = 9, 5, 13
ADAMW = AdamW()
ENGINE = EngineConfig(kv_gib=0.01, block_size=4, max_batch=8, token_budget=32)


class Prompts:
    def item(self, k: int) -> int:
        return k

    def tokens(self, item: int) -> tuple[int, ...]:
        return tuple(numpy.random.default_rng(item).integers(6, 19, 1 + item % 5).tolist())

    def uid(self, item: int) -> int:
        return item

    def name(self, item: int) -> str:
        return str(item)


@dataclass
class Score:
    reward: Any
    parts: dict
    note: str = ""

    def result(self) -> "Score":
        return self


class Scorer:
    def __init__(self, judge: Callable[[int, str], Any] | None = None):
        self.judge = judge or share_below
        self.asked: list[tuple[int, str]] = []
        self.processes = ThreadPoolExecutor(2)

    def reply(self, item: int, transcript: str) -> Future:
        return self.processes.submit(reply, transcript)

    def submit(self, item: int, completion: str, finish: str) -> Score:
        self.asked.append((item, completion))
        found = self.judge(item, completion)
        return found if isinstance(found, Score) else Score(found, {"length": float(len(completion.split()))})


@dataclass
class Reply:
    text: Any
    note: str = ""


def reply(transcript: str) -> Reply:
    said = [int(token) for token in transcript.split()]
    time.sleep(sum(said) % 5 / 1000)  # so that replies come in any order
    return Reply(" ".join(str(6 + (sum(said) + 5 * i) % 13) for i in range(len(said) % 4)))


def to_the_last(groups: list[Group], replicas: int) -> list[Stretch]:
    """Deal everything to the last replica but the first sample of each prompt, which is the first replica's."""
    dealt: list[Stretch] = [{} for _ in range(replicas)]
    for group in groups:
        for number in sorted(group.samples):
            dealt[0 if number == 0 else -1].setdefault(group.item, []).append(number)
    return dealt


def spell(tokens: list[int], finish: str = "") -> str:
    return " ".join(map(str, tokens))


def share_below(item: int, completion: str) -> float:
    tokens = [int(token) for token in completion.split()]
    return sum(token < TARGET for token in tokens) / len(tokens)


def run_of(steps: int, lr: float, max_tokens: int = 8, **changes: Any) -> GrpoSettings:
    plain = dict(steps=steps, lr=lr, prompts=4, group=4, rewarding=Rewarding(mask_truncated=False), row_tokens=64)
    return GrpoSettings(**{**plain, "sampling": Sampling(max_tokens=max_tokens), **changes})


def trained(
    hf: Path, of: Any, plan: ParallelPlan, keep: Path, steps: int, lr: float = 0.01, stop_after: int = 0,
    judge: Callable[[int, str], Any] | None = None, reference: bool = False, turns: bool = False,
    engine_of: dict[str, int] | None = None, identity: dict[str, Any] | None = None,
    made_of: Parts = OURS, dealt: Callable[..., Any] = deal, routing_replay: bool = False,
    optimizer: AdamW = ADAMW, **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """Facts of a run on these ranks. `stop_after` so many questions the run is asked to stop; `engine_of` are settings
    of the engine; `dealt` deals samples to replicas."""
    keep.mkdir(parents=True, exist_ok=True)
    collect.VOTE_EVERY = 2  # completions are short
    collect.deal = dealt  # type: ignore[assignment]
    with ranks.started(plan, seed=3):
        options = {"moe_enable_routing_replay": True} if routing_replay else {}
        trainer = Trainer(tiny.parts(hf, of, plan, made_of, options=options), plan, optimizer)
        engine_config = replace(ENGINE, **engine_of or {})
        engine = Engine(trainer.model[0], engine_config, 11, {STOP_ID}, spell, records_routing=routing_replay)
        asked = 0

        def stop() -> bool:
            nonlocal asked
            asked += 1
            return bool(stop_after) and asked >= stop_after

        scorer = Scorer(judge)
        run = run_of(steps, lr, routing_replay=routing_replay, **changes)
        asking = Turns(lambda item: (str(ASKS),), scorer, spell, lambda text: [int(t) for t in text.split()])
        collector = Collector(
            engine,
            Prompts(),
            scorer,
            spell,
            sampling=run.sampling,
            group=run.group,
            root=keep / step.ROLLOUTS,
            identity="toy",
            flush_s=0.0,
            stop=stop,
            turns=asking if turns else None,
        )
        model = tiny.parts(hf, of, plan, made_of) if reference else None
        against = (lambda rows: log_probs(model, rows)) if reference else None
        try:
            trained = step.train(
                trainer, collector, run, keep, identity=identity or {"toy": True}, stop=stop, reference=against
            )
        except Stopped as stopped:
            return dict(stopped=stopped.done)
        return dict(digest=checkpoint.weights_digest(trainer.model), resumed_from=trained.resumed_from,
                    position=vars(trained.position), asked=scorer.asked)  # fmt: skip


STAGES = {
    "rollout": (Engine, "_step"),
    "reward": (Collector, "_judged"),
    "update": (Trainer, "step"),
    "save": (checkpoint.Saver, "save"),
}


def dies_in(stage: str, time: int, after: float) -> None:
    """This process kills itself without a word, `after` seconds after it began that stage for the `time`th time."""
    owner, name = STAGES[stage]
    begun, function = itertools.count(1), getattr(owner, name)

    def counted(*arguments: Any, **named: Any) -> Any:
        if next(begun) == time:
            threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return function(*arguments, **named)

    setattr(owner, name, counted)


def main() -> None:
    """`python -m tests.megatron_ext.rl.toy HF KEEP DEATH ARGUMENTS`: the same in ranks of its own, which print their
    facts. DEATH and ARGUMENTS are JSON: null, or what `dies_in` takes; what `trained` takes."""
    hf, keep, death, arguments = Path(sys.argv[1]), Path(sys.argv[2]), *map(json.loads, sys.argv[3:5])
    if death:
        dies_in(*death)
    made_of = Parts(*arguments.pop("made_of", ()))
    facts = trained(hf, tiny.DIMS, ParallelPlan(), keep, made_of=made_of, **arguments)
    print(json.dumps({key: facts[key] for key in ("digest", "resumed_from")}), flush=True)


if __name__ == "__main__":
    main()
