"""A whole GRPO step (rollout, reward, update) beside TRL's GRPOTrainer, on one CPU thread.

    python -m tests.benchmarks.grpo_step [--prompts 4] [--steps 3] [--equal 64]

The model, prompts and log-normal forced lengths of the benchmark `rollout`, groups of 8, 32 samples at once, the same
reward, one update a step, no KL term. Nobody stops early, and each of TRL's samples ends with its end token. `--equal`
forces one length on all. The first step of each is left out. Also the share of our step that is neither rollout, reward
nor training.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from megatron_ext.device import init_device

init_device()

import torch

from data_tools.progress import never
from megatron_ext.device import plain_torch
from megatron_ext.models.registry import read_config
from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rl.collect import Collector
from megatron_ext.rl.settings import Advantage, GrpoSettings, Rewarding
from megatron_ext.rl.step import ROLLOUTS, train
from megatron_ext.rollout.engine import Engine
from megatron_ext.rollout.sequence import Request, Sequence
from megatron_ext.rollout.settings import EngineConfig, Sampling
from megatron_ext.training.update import AdamW, Trainer
from megatron_ext.weights import convert
from tests.benchmarks.rollout import GROUP, PLACES, VOCABULARY, hf_folder, work

RATE, END = 1e-5, 1


class Prompts:
    """Prompt k with its samples' lengths: what both sides are asked."""

    def __init__(self, count: int, equal: int):
        self.prompts, lengths = work(count * GROUP, seed=0)
        self.lengths = [equal] * len(lengths) if equal else lengths

    def item(self, k: int) -> int:
        return k

    def tokens(self, item: int) -> tuple[int, ...]:
        return self.prompts[item]

    def uid(self, item: int) -> int:
        return item

    def name(self, item: int) -> str:
        return str(item)


class Forced(Engine):
    """Each sample has its own length."""

    lengths: list[int]

    def generate(self, requests: list[Request], *rest: Any) -> Iterator[Sequence]:
        limits = [tuple(self.lengths[request.uid * GROUP :][:GROUP]) for request in requests]
        return super().generate([replace(request, limits=of) for request, of in zip(requests, limits)], *rest)


class Ends:
    """The same for `generate`, as a logits processor: a row's end token is its last, and no earlier one."""

    def __init__(self, lengths: list[int]):
        self.lengths, self.left = lengths, 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.left:  # the next batch
            self.mine, self.prompt = torch.tensor(self.lengths[: len(ids)]), ids.size(1)
            self.left = int(self.mine.max())
            del self.lengths[: len(ids)]
        self.left -= 1
        ends = self.mine == ids.size(1) - self.prompt + 1
        scores[~ends, END] = -torch.inf
        scores[ends] = -torch.inf
        scores[ends, END] = 0.0
        return scores


class Clock:
    """(CPU, wall) seconds between calls."""

    def __init__(self) -> None:
        self.seconds: list[tuple[float, float]] = []
        self.begin()

    def begin(self) -> None:
        self.began = time.process_time(), time.perf_counter()

    def end(self) -> None:
        self.seconds.append((time.process_time() - self.began[0], time.perf_counter() - self.began[1]))
        self.begin()


def worth(tokens: list[int]) -> float:
    return sum(token % 2 == 0 for token in tokens) / len(tokens)


class Score:
    parts: dict[str, float] = {}
    note = ""

    def __init__(self, reward: float):
        self.reward = reward

    def result(self) -> "Score":
        return self


class Scorer:
    def submit(self, item: int, completion: str, finish: str) -> Score:
        return Score(worth([int(token) for token in completion.split()]))


def ours(
    hf: Path, keep: Path, asked: Prompts, prompts: int, steps: int
) -> tuple[list[tuple[float, float]], list[dict[str, Any]]]:
    """(CPU, wall) seconds and the metrics of each step."""
    family, dims, _ = read_config(hf)
    (model,) = family.build(dims, ParallelPlan(), torch.float32)
    convert.import_weights(model, hf, family, dims)
    trainer = Trainer(model, ParallelPlan(), AdamW())
    engine = Forced(
        trainer.model[0], EngineConfig(kv_gib=1, block_size=32, max_batch=PLACES, token_budget=256), 0, stop_ids=()
    )
    engine.lengths, longest = asked.lengths, max(asked.lengths)
    collector = Collector(
        engine,
        asked,
        Scorer(),
        lambda ids, finish: " ".join(map(str, ids)),
        sampling=Sampling(max_tokens=longest),
        group=GROUP,
        root=keep / ROLLOUTS,
        identity="benchmark",
        flush_s=5.0,
        stop=never,
    )
    settings = GrpoSettings(
        steps=steps,
        lr=RATE,
        prompts=prompts,
        group=GROUP,
        sampling=Sampling(max_tokens=longest),
        advantage=Advantage(drop_equal_groups=False),
        rewarding=Rewarding(mask_truncated=False),
    )
    clock = Clock()

    def progress(done: int, *_: Any) -> None:
        clock.end() if done else clock.begin()

    train(trainer, collector, settings, keep, identity={}, stop=never, progress=progress)
    found = [json.loads(line) for line in (keep / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["trained_tokens"] for line in found) == sum(asked.lengths)
    return clock.seconds, found


def trls(hf: Path, folder: Path, asked: Prompts, prompts: int, steps: int) -> list[tuple[float, float]]:
    """(CPU, wall) seconds of each step."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", eos_token=f"t{END}", padding_side="left"
    )
    rows = [" ".join(f"t{token}" for token in prompt) for prompt in asked.prompts]
    clock, lengths = Clock(), []

    class Times(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [worth(ids) for ids in completion_ids]

    settings = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=PLACES,
        gradient_accumulation_steps=prompts * GROUP // PLACES, steps_per_generation=1, num_generations=GROUP,
        max_steps=steps, max_completion_length=max(asked.lengths), beta=0.0, learning_rate=RATE,
        lr_scheduler_type="constant", use_cpu=True, report_to="none", save_strategy="no",
        logging_strategy="no", bf16=False, gradient_checkpointing=False, disable_tqdm=True, loss_type="dapo",
        shuffle_dataset=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    model.generate = partial(model.generate, logits_processor=[Ends(list(asked.lengths))])
    data = Dataset.from_dict({"prompt": rows})
    GRPOTrainer(model, reward, settings, train_dataset=data, processing_class=tokenizer, callbacks=[Times()]).train()
    assert lengths == asked.lengths
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4, help=f"a step, in {PLACES // GROUP}s")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--equal", type=int, default=0, help="tokens of every completion; 0: log-normal lengths")
    args = parser.parse_args()
    torch.set_num_threads(1)
    asked = Prompts(args.prompts * args.steps, args.equal)
    with tempfile.TemporaryDirectory() as folder, ranks.started(ParallelPlan()):
        hf = hf_folder(Path(folder) / "hf")
        seconds, found = ours(hf, Path(folder) / "keep", asked, args.prompts, args.steps)
        mine, mine_wall = map(median, zip(*seconds[1:]))
        outside = median(line["share_outside"] for line in found[1:])
        print(f"ours {mine:.2f} CPU s a step, {found[-1]['seconds']}, outside {outside:.1%}", flush=True)
        with plain_torch():
            peer, peer_wall = map(median, zip(*trls(hf, Path(folder) / "trl", asked, args.prompts, args.steps)[1:]))
        print(f"TRL's GRPOTrainer: {peer:.2f} CPU s a step")
    print(json.dumps({"name": "grpo_step", "ours": round(mine, 2), "peer": round(peer, 2),
                      "ratio": round(peer / mine, 2), "unit": "CPU s", "share_outside": round(outside, 4),
                      "ours_wall_s": round(mine_wall, 2),
                      "peer_wall_s": round(peer_wall, 2), "ratio_wall": round(peer_wall / mine_wall, 2)}))  # fmt: skip


if __name__ == "__main__":
    main()
