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

from megatron_ext.device import init_device

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
        model.generate(
            ids, attention_mask=mask, do_sample=True, max_new_tokens=longest, min_new_tokens=longest, pad_token_id=0
        )


def continuous(model: Any, prompts: list[tuple[int, ...]], lengths: list[int], page: int, tokens: int) -> None:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = GenerationConfig(do_sample=True, max_new_tokens=max(lengths), eos_token_id=-1, pad_token_id=0)
    settings = ContinuousBatchingConfig(
        page_size=page, num_blocks=32 * 600 // page, max_batch_tokens=tokens, max_requests_per_batch=PLACES
    )
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=settings
    ) as manager:
        for i, length in enumerate(lengths):
            manager.add_request(list(prompts[i // GROUP]), max_new_tokens=length)
        done = 0
        for output in manager:
            done += output.is_finished()
            if done == len(lengths):
                break


def rate(call: Callable[..., Any], model: Any, requests: int, rounds: int) -> tuple[float, Any]:
    """Return tokens a second of CPU time (other work runs on this machine), the median over rounds with other seeds;
    and what the last round gave."""
    rates = []
    for seed in range(rounds):
        prompts, lengths = work(requests, seed)
        start = time.process_time()
        with torch.no_grad():
            found = call(model, prompts, lengths)
        rates.append(sum(lengths) / (time.process_time() - start))
    return median(rates), found


def of_vllm(python: str, folder: Path, requests: int, rounds: int, dtype: str) -> dict[str, Any]:
    """Return what rollout_vllm.py measures of the model in FOLDER/model, with the prompts and lengths of `rate`."""
    jobs = [work(requests, seed) for seed in range(rounds)] + [work(GROUP, rounds)]
    (folder / "work.json").write_text(json.dumps(jobs))
    command = [python, rollout_vllm.__file__, folder, dtype, PLACES]
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Rollout tokens a CPU second beside those of other engines.")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment with vLLM's CPU build")
    args = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM

    from megatron_ext.device import plain_torch
    from megatron_ext.models.registry import read_config
    from megatron_ext.weights import convert

    with tempfile.TemporaryDirectory() as folder, ranks.started(ParallelPlan()):
        hf = hf_folder(Path(folder) / "model")
        family, dims, _ = read_config(hf)
        (model,) = family.build(dims, ParallelPlan(), getattr(torch, args.dtype))
        convert.import_weights(model, hf, family, dims)
        ours(model, *work(GROUP, args.rounds))  # what is compiled at first use
        parameters = sum(p.numel() for p in model.parameters())
        mine, found = rate(ours, model, args.requests, args.rounds)
        print(
            f"{parameters / 1e6:.1f}M parameters, {args.dtype}: ours {mine:.0f} tokens/s, occupancy "
            f"{found['occupancy']:.2f}, prompt tokens computed per prompt token {found['prefill']:.2f}",
            flush=True,
        )
        with plain_torch():
            theirs = AutoModelForCausalLM.from_pretrained(hf, dtype=getattr(torch, args.dtype)).eval()
            hugging, _ = rate(padded, theirs, args.requests, args.rounds)
            print(f"generate, padded batches: {hugging:.0f} tokens/s", flush=True)
            tuned = 0.0
            for page, tokens in ((32, 128), (32, 256)):
                found_rate, _ = rate(partial(continuous, page=page, tokens=tokens), theirs, args.requests, args.rounds)
                print(
                    f"continuous batching, page {page}, {tokens} tokens a batch: {found_rate:.0f} tokens/s", flush=True
                )
                tuned = max(tuned, found_rate)
        third = {}
        if args.vllm:
            told = of_vllm(args.vllm, Path(folder), args.requests, args.rounds, args.dtype)
            rival = median(told["rates"])
            print(f"vLLM {told['version']}: {rival:.0f} tokens/s", flush=True)
            third = {"vllm": round(rival, 1), "ratio_vllm": round(mine / rival, 2)}
    print(
        json.dumps(
            {
                "name": "rollout",
                "ours": round(mine, 1),
                "peer": round(hugging, 1),
                "ratio": round(mine / hugging, 2),
                "unit": "tokens/CPU s",
                "continuous_batching": round(tuned, 1),
                "ratio_continuous": round(mine / tuned, 2),
                **third,
                **{key: round(value, 3) for key, value in found.items()},
                "dtype": args.dtype,
            }
        )
    )


if __name__ == "__main__":
    main()
