"""A whole GRPO step (rollout, reward, update) beside TRL's GRPOTrainer, on one CPU thread.

    python -m tests.benchmarks.grpo_step [--prompts 4] [--tokens 64] [--steps 3]

A Qwen2 of about 30 million parameters, groups of 8, completions of a forced length, the same reward, one update a step,
no KL term. The first step of each is left out. Also the share of our step that is neither rollout, reward nor training.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from megatron_ext.device import init_device

init_device()

import numpy
import torch

from megatron_ext import convert, grpo, ranks
from megatron_ext.device import plain_torch
from megatron_ext.models.registry import read_config
from megatron_ext.parallel import ParallelPlan
from megatron_ext.rl.collect import Collector
from megatron_ext.rl.settings import Advantage, Loss, Rewarding
from megatron_ext.rollout.engine import Engine
from megatron_ext.rollout.settings import EngineConfig, Sampling
from megatron_ext.schedule import Schedule
from megatron_ext.train import AdamW, Trainer
from tests.benchmarks.rollout import GROUP, VOCABULARY, hf_folder

RATE, PROMPT_TOKENS = 1e-5, 92


class Prompts:
    def item(self, k: int) -> int:
        return k

    def tokens(self, item: int) -> tuple[int, ...]:
        return tuple(numpy.random.default_rng(item).integers(2, VOCABULARY, PROMPT_TOKENS).tolist())

    def uid(self, item: int) -> int:
        return item


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


def ours(hf: Path, keep: Path, prompts: int, tokens: int, steps: int) -> list[dict[str, Any]]:
    """The metrics of each step."""
    family, dims, _ = read_config(hf)
    (model,) = family.build(dims, ParallelPlan(), torch.float32, "torch")
    convert.import_weights(model, hf, family, dims)
    trainer = Trainer(model, ParallelPlan(), AdamW())
    engine = Engine(trainer.model[0], EngineConfig(1, 32, prompts * GROUP, 1024), 0, stop_ids=())
    collector = Collector(
        engine, Prompts(), Scorer(), lambda ids, finish: " ".join(map(str, ids)), Sampling(max_tokens=tokens), GROUP,
        keep / grpo.ROLLOUTS, "benchmark", 5.0, lambda: False,
    )  # fmt: skip
    run = grpo.Run(
        Schedule("constant", steps, RATE), prompts, Loss(), Advantage(drop_equal_groups=False), Rewarding(mask_truncated=False),
        1.0, tokens, True, 16384,
    )  # fmt: skip
    grpo.train(trainer, collector, run, keep, {}, lambda: False)
    return [json.loads(line) for line in (keep / "metrics.jsonl").read_text().splitlines()]


def trls(hf: Path, folder: Path, prompts: int, tokens: int, steps: int) -> list[float]:
    """Seconds of each step."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1", padding_side="left")
    rows = [" ".join(f"t{token}" for token in Prompts().tokens(k)) for k in range(prompts * steps)]
    seconds: list[float] = []

    class Times(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [worth(ids) for ids in completion_ids]

    settings = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=prompts * GROUP, num_generations=GROUP, max_steps=steps,
        max_completion_length=tokens, generation_kwargs={"min_new_tokens": tokens}, beta=0.0, learning_rate=RATE,
        lr_scheduler_type="constant", use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no", bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, loss_type="dapo",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    trainer = GRPOTrainer(
        model, reward, settings, train_dataset=Dataset.from_dict({"prompt": rows}), processing_class=tokenizer, callbacks=[Times()]
    )
    trainer.train()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, ranks.started(ParallelPlan()):
        hf = hf_folder(Path(folder) / "hf")
        found = ours(hf, Path(folder) / "keep", args.prompts, args.tokens, args.steps)[1:]
        mine, outside = median(line["step_s"] for line in found), median(line["share_outside"] for line in found)
        print(f"ours {mine:.2f} s a step, {found[-1]['seconds']}, outside {outside:.1%}", flush=True)
        with plain_torch():
            peer = median(trls(hf, Path(folder) / "trl", args.prompts, args.tokens, args.steps)[1:])
        print(f"TRL's GRPOTrainer: {peer:.2f} s a step")
    print(json.dumps({"name": "grpo_step", "ours": round(mine, 2), "peer": round(peer, 2), "ratio": round(peer / mine, 2),
                      "unit": "s", "share_outside": round(outside, 4)}))  # fmt: skip


if __name__ == "__main__":
    main()
