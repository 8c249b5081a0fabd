"""Tokens a second of supervised fine-tuning on packs of 2,048 tokens, beside TRL's SFTTrainer (packing bfd).

    python -m tests.benchmarks.sft [--packs 6] [--median 300]

The same Qwen2 of about 30 million parameters in fp32, the same documents (log-normal around --median tokens), every
token in the loss, one pack an update, AdamW, one process with one thread each. Padding does not count. TRL keeps
documents apart by a dense mask where there is no flash attention; ours attends document by document. Seconds are the
training thread's CPU time: what else the machine does does not count, nor the threads of gloo's groups, which poll for
as long as a step takes on the clock.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

LENGTH, VOCABULARY = 2_048, 16_000
SIGMA = 0.8  # of the logarithm of a document's length


def dims() -> Any:
    from tests.megatron_ext import tiny

    return tiny.dims(layers=10, hidden=384, ffn=1536, heads=6, kv_groups=2, head_dim=64, vocabulary=VOCABULARY,
                     max_positions=LENGTH)  # fmt: skip


def documents(packs: int, median: int) -> list[np.ndarray]:
    random, found, total = np.random.default_rng(0), [], 0
    while total < 0.95 * packs * LENGTH:
        length = int(np.clip(random.lognormal(np.log(median), SIGMA), 16, LENGTH))
        found.append(random.integers(0, VOCABULARY, length).astype(np.int32))
        total += length
    return found


def rate(tokens: list[int], ends: list[float]) -> float:
    """Tokens a second of all updates but the first, which warms up; all packs are nearly full."""
    return sum(tokens) / len(tokens) * (len(ends) - 1) / (ends[-1] - ends[0])


def ours(folder: Path, packs: int, median: int) -> float:
    from megatron_ext import device
    from megatron_ext.parallel import ranks

    device.init_device()
    from data_tools.packs import pack, store
    from data_tools.packs.plan import PackReader
    from megatron_ext.parallel.plan import ParallelPlan
    from megatron_ext.training import supervised
    from megatron_ext.training.settings import SftSettings
    from megatron_ext.training.update import AdamW, Trainer
    from tests.megatron_ext import tiny

    for name in ("store", "packs"):
        (folder / name).mkdir()
    writer = store.StoreWriter(folder / "store")
    for line, ids in enumerate(documents(packs, median), 1):
        writer.add(ids, np.ones(len(ids), np.uint8), store.Provenance(0, line, store.row_text(str(line), "")))
    writer.close()
    pack.pack(pack.Config(store=str(folder / "store"), pack_length=LENGTH), folder / "packs")
    reader, plan = PackReader(folder / "store", folder / "packs"), ParallelPlan()
    run = SftSettings(steps=reader.n_packs, lr=1e-5, global_batch=1)
    with ranks.started(plan):
        trainer = Trainer(tiny.model(folder / "hf", dims(), plan), plan, AdamW())
        ends = []
        for k in range(reader.n_packs):
            trainer.step(supervised.rows_of_step(reader, k, run, plan), 1e-5)
            ends.append(time.thread_time())
    return rate([LENGTH - reader.padding(i) for i in range(reader.n_packs)], ends)


def trl(folder: Path, packs: int, median: int) -> float:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    ends: list[float] = []

    class Ends(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.thread_time())

    config = SFTConfig(
        str(folder / "out"), packing=True, packing_strategy="bfd", max_length=LENGTH, use_cpu=True, bf16=False,
        per_device_train_batch_size=1, num_train_epochs=1, learning_rate=1e-5, lr_scheduler_type="constant",
        gradient_checkpointing=False, report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list([{"input_ids": ids.tolist()} for ids in documents(packs, median)]),
        processing_class=tokenizer(folder / "hf"),
        callbacks=[Ends()],
    )
    trainer.train()
    return rate([len(row["input_ids"]) for row in trainer.train_dataset], ends)


def tokenizer(folder: Path) -> Any:
    """Any: the rows are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(number): number for number in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), eos_token="1", pad_token="1", unk_token="0"
    )


def measure(kind: str, packs: int, median: int) -> float:
    os.environ["OMP_NUM_THREADS"] = "1"
    from tests.megatron_ext import tiny

    with tempfile.TemporaryDirectory() as name:
        tiny.hf_folder(Path(name) / "hf", dims())
        return {"ours": ours, "peer": trl}[kind](Path(name), packs, median)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packs", type=int, default=6)
    parser.add_argument("--median", type=int, default=300, help="tokens of a document")
    args = parser.parse_args()
    found = {}
    for kind in ("ours", "peer"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[kind] = pool.apply(measure, (kind, args.packs, args.median))
        print(f"{kind}: {found[kind]:,.0f} tokens/s", flush=True)
    print(
        json.dumps(
            {
                "name": "sft",
                "ours": round(found["ours"]),
                "peer": round(found["peer"]),
                "ratio": round(found["ours"] / found["peer"], 2),
                "unit": "tokens/s",
            }
        )
    )


if __name__ == "__main__":
    main()
