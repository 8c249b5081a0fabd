"""Rollout tokens a CPU second beside Hugging Face `generate`, transformers' continuous batching and vLLM, on one CPU
thread.

    python -m tests.benchmarks.rollout [--requests 128] [--rounds 3] [--dtype float32] [--vllm PYTHON]

A Qwen2 of about 30 million parameters, groups of 8 samples, log-normal lengths that are forced (nobody stops early),
32 places. Ours gives log-probs too. Peers: padded batches in order of arrival; continuous batching, tuned; vLLM's CPU
build, where `--vllm` names the Python of an environment that has it (.ci/vllm.txt), eager and with log-probs.
"""

import argparse
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from megatron_ext.device import init_device, plain_torch

init_device()

import numpy
import torch

from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rollout.engine import Engine
from megatron_ext.rollout.sequence import Request
from megatron_ext.rollout.settings import EngineConfig, Sampling
from tests.benchmarks import rollout_vllm

PLACES, GROUP, VOCABULARY = 32, 8, 8192


def hf_folder(folder: Path) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=VOCABULARY, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def work(requests: int, seed: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """Prompts, one a group, and the length of each sample's completion."""
    random = numpy.random.default_rng(seed)
    lengths = numpy.clip(random.lognormal(math.log(55), 0.7, requests), 4, 400).astype(int).tolist()
    prompts = [tuple(random.integers(1, VOCABULARY, n).tolist()) for n in random.integers(40, 145, requests // GROUP)]
    return prompts, lengths


def ours(model: Any, prompts: list[tuple[int, ...]], lengths: list[int]) -> dict[str, float]:
    engine = Engine(model, EngineConfig(kv_gib=1, block_size=32, max_batch=PLACES, token_budget=256), 0, stop_ids=())
    wanted = [
        Request(uid, prompt, GROUP, limits=tuple(lengths[uid * GROUP : (uid + 1) * GROUP]))
        for uid, prompt in enumerate(prompts)
    ]
    total = sum(len(sequence.completion) for sequence in engine.generate(wanted, Sampling(max_tokens=max(lengths))))
    assert total == sum(lengths)
    counts = engine.counts
    return {"occupancy": total / (counts["steps"] * PLACES), "prefill": counts["prefilled"] / sum(map(len, prompts))}


def padded(model: Any, prompts: list[tuple[int, ...]], lengths: list[int]) -> None:
    """Batches of 32 in order of arrival, left-padded, each as long as its longest sample."""
    rows = [prompts[i // GROUP] for i in range(len(lengths))]
    for first in range(0, len(rows), PLACES):
        batch, longest = rows[first : first + PLACES], max(lengths[first : first + PLACES])
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        with plain_torch():
            model.generate(
                ids, attention_mask=mask, do_sample=True, max_new_tokens=longest, min_new_tokens=longest, pad_token_id=0
            )


def continuous(model: Any, tokens: int, prompts: list[tuple[int, ...]], lengths: list[int]) -> None:
    """At most `tokens` of them a step; pages of 32."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = GenerationConfig(do_sample=True, max_new_tokens=max(lengths), eos_token_id=-1, pad_token_id=0)
    settings = ContinuousBatchingConfig(
        page_size=32, num_blocks=600, max_batch_tokens=tokens, max_requests_per_batch=PLACES
    )
    served = model.continuous_batching_context_manager(generation_config=config, continuous_batching_config=settings)
    with plain_torch(), served as manager:
        for i, length in enumerate(lengths):
            manager.add_request(list(prompts[i // GROUP]), max_new_tokens=length)
        done = 0
        for output in manager:
            done += output.is_finished()
            if done == len(lengths):
                break


class Vllm:
    """vLLM in an environment of its own, which keeps its process over the rounds (rollout_vllm.py)."""

    def __init__(self, python: str, folder: Path, dtype: str):
        command = [python, rollout_vllm.__file__, folder, dtype, PLACES]
        self.process = subprocess.Popen(
            [*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        print(f"vLLM {self._answer()['version']}", flush=True)

    def _answer(self) -> Any:
        return json.loads(self.process.stdout.readline())

    def seconds(self, prompts: list[tuple[int, ...]], lengths: list[int]) -> float:
        """Return the CPU seconds of a round."""
        print(json.dumps([prompts, lengths]), file=self.process.stdin)
        return self._answer()

    def stop(self) -> None:
        """End its process."""
        self.process.stdin.close()
        self.process.wait()


def seconds(call: Callable[..., Any], prompts: list[tuple[int, ...]], lengths: list[int]) -> float:
    """Return the CPU seconds of a call: other work runs on this machine."""
    start = time.process_time()
    with torch.no_grad():
        call(prompts, lengths)
    return time.process_time() - start


def rates(ways: dict[str, Callable[..., float]], requests: int, rounds: int) -> dict[str, list[float]]:
    """Return tokens a second of each way, for each round; all do a round, one after the other, before the next.

    So that what slows this machine for a while slows all. Before the first round each does a little work, in which it
    compiles.
    """
    for way in ways.values():
        way(*work(GROUP, rounds))
    found: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(rounds):
        prompts, lengths = work(requests, seed)
        for name, way in ways.items():
            found[name].append(sum(lengths) / way(prompts, lengths))
            print(f"round {seed + 1}: {name} {found[name][-1]:.0f} tokens/s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Rollout tokens a CPU second beside those of other engines.")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment with vLLM's CPU build")
    args = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM

    from megatron_ext.models.registry import read_config
    from megatron_ext.weights import convert

    with tempfile.TemporaryDirectory() as folder, ranks.started(ParallelPlan()):
        hf = hf_folder(Path(folder) / "model")
        family, dims, _ = read_config(hf)
        (model,) = family.build(dims, ParallelPlan(), getattr(torch, args.dtype))
        convert.import_weights(model, hf, family, dims)
        parameters = sum(p.numel() for p in model.parameters())
        with plain_torch():
            theirs = AutoModelForCausalLM.from_pretrained(hf, dtype=getattr(torch, args.dtype)).eval()
        told: dict[str, float] = {}
        ways: dict[str, Callable[..., float]] = {
            "ours": partial(seconds, lambda *asked: told.update(ours(model, *asked))),
            "generate": partial(seconds, partial(padded, theirs)),
            "continuous batching, 128": partial(seconds, partial(continuous, theirs, 128)),
            "continuous batching, 256": partial(seconds, partial(continuous, theirs, 256)),
        }
        third = Vllm(args.vllm, hf, args.dtype) if args.vllm else None
        if third:
            ways["vLLM"] = third.seconds
        print(f"{parameters / 1e6:.1f}M parameters, {args.dtype}", flush=True)
        found = rates(ways, args.requests, args.rounds)
        if third:
            third.stop()
    middle = {name: round(median(each), 1) for name, each in found.items()}
    # Of each round, whose parts stood under the same load.
    ratio = {name: round(median(a / b for a, b in zip(found["ours"], each)), 2) for name, each in found.items()}
    tuned = min((name for name in ways if name.startswith("continuous")), key=lambda name: ratio[name])
    print(
        json.dumps(
            {
                "name": "rollout",
                "ours": middle["ours"],
                "peer": middle["generate"],
                "ratio": ratio["generate"],
                "unit": "tokens/CPU s",
                "continuous_batching": middle[tuned],
                "ratio_continuous": ratio[tuned],
                **({"vllm": middle["vLLM"], "ratio_vllm": ratio["vLLM"]} if third else {}),
                **{key: round(value, 3) for key, value in told.items()},
                "dtype": args.dtype,
            }
        )
    )


if __name__ == "__main__":
    main()
