"""Forward and backward of one pack of 262,144 tokens on small models of three families: resident memory, CPU time.

    python -m tests.benchmarks.long_context [--families qwen2,gpt_oss,nemotron_h] [--lengths 65536,262144]

One process, one thread, fp32, full recomputation; documents of 1,000 to 32,000 tokens, a tenth supervised. Then one
document of 262,144 tokens, forward only. Each measurement runs in a fresh process; memory is its resident peak.
"""

import argparse
import json
import multiprocessing
import os
import time
from typing import Any

import numpy as np

LONGEST, SHORTEST = 32_000, 1_000
SUPERVISED = 0.1


def model_of(family: str, positions: int) -> Any:
    """Two layers, or of a hybrid one of each kind; one head, since the time is that of its scores."""
    from dataclasses import replace

    from tests.megatron_ext import tiny

    sizes = dict(hidden=64, heads=1, kv_groups=1, head_dim=32, vocabulary=4096, max_positions=positions)
    if family == "qwen2":
        return tiny.dims(ffn=192, **sizes)
    if family == "gpt_oss":
        return replace(tiny.GPT_OSS_DIMS, window=128, ffn=64, yarn=None, **sizes)
    return replace(tiny.NEMOTRON_H_DIMS, pattern="ME*", mamba_head_dim=16, mamba_state=16, expert_ffn=64, shared_ffn=64,
                   ffn=0, **sizes)  # fmt: skip


def documents(tokens: int) -> list[int]:
    """Lengths, log-uniform between the shortest and the longest, that make up a pack."""
    random, lengths = np.random.default_rng(0), []
    while sum(lengths) < tokens:
        length = int(np.exp(random.uniform(np.log(SHORTEST), np.log(LONGEST))))
        lengths.append(min(length, tokens - sum(lengths)))
    return lengths


def measure(family: str, tokens: int, single: bool) -> tuple[float, float]:
    """(CPU seconds, GiB) of one pass; `single`: one document, forward only."""
    import torch

    from megatron_ext import device
    from megatron_ext.parallel import ranks

    device.init_device()
    from megatron_ext.parallel.plan import ParallelPlan
    from megatron_ext.training.rows import micro_batch
    from megatron_ext.training.update import AdamW, Trainer
    from tests.megatron_ext import tiny

    of, plan = model_of(family, tokens), ParallelPlan(recompute="full")
    with ranks.started(plan, seed=1):
        (model,) = tiny.family(of).build(of, plan, torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        pack = tiny.pack([tokens] if single else documents(tokens), 0, SUPERVISED, 4096)
        rows = [micro_batch([pack])]
        trainer = Trainer(model, plan, AdamW())
        began = time.process_time()
        (trainer.evaluate if single else trainer.gradient)(rows)
        return time.process_time() - began, device.peak_memory() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default="qwen2,gpt_oss,nemotron_h")
    parser.add_argument("--lengths", default="65536,262144")
    parser.add_argument("--single", default="262144", help="tokens of one document, forward only; empty: none")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, dict[str, list[float]]] = {}
    for family in args.families.split(","):
        runs = [(int(tokens), False) for tokens in args.lengths.split(",") if tokens]
        runs += [(int(args.single), True)] if args.single else []
        for tokens, single in runs:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, gib = pool.apply(measure, (family, tokens, single))
            name = f"{tokens} one document" if single else str(tokens)
            found.setdefault(family, {})[name] = [round(seconds, 1), round(gib, 2)]
            print(f"{family} {name}: {seconds:.1f} s of CPU, {gib:.2f} GiB", flush=True)
    most = max(gib for runs in found.values() for _, gib in runs.values())
    print(
        json.dumps({"name": "long_context", "ours": most, "peer": None, "ratio": None, "unit": "GiB", "found": found})
    )


if __name__ == "__main__":
    main()
