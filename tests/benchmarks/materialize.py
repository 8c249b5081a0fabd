"""Conversations to ids and masks, beside transformers' apply_chat_template(return_assistant_tokens_mask=True).

    python -m tests.benchmarks.materialize [ROUNDS]

tau-bench's tool trajectories and GSM8K's model solutions (shared/data), with the Qwen tokenizer and TRL's Qwen3
template, which has generation blocks; ids and masks are compared, row by row, but for the line break that the
template trains behind each end of turn (a model that has stopped never writes it; ours leaves it out). Both sides take
turns on one thread, and the median of a side's CPU seconds counts, since other work runs on this machine. Ours reads
raw records; theirs gets the messages ready. Then the whole phase, from file to store, with one worker and with two, by
the clock.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

from data_tools.chats.chat import ChatConfig, ChatRows  # noqa: E402
from data_tools.chats.conversation import read_record  # noqa: E402
from data_tools.chats.encoder import Encoder  # noqa: E402
from data_tools.chats.tokenizer import load_tokenizer  # noqa: E402
from data_tools.packs.materialize import Config, materialize
from data_tools.tasks.task import Source
from tests.data_tools.chats import TEMPLATES  # noqa: E402
from tests.inputs import SHARED  # noqa: E402

TOKENIZER, TEMPLATE = SHARED / "tokenizers/qwen3_rebuilt", TEMPLATES / "qwen3_training.jinja"
COPIES = 100  # of the trajectories, for the phase as a whole: enough for its start not to count


def records() -> dict[str, list[dict[str, Any]]]:
    trajectories = json.loads((SHARED / "data/tau_bench/gpt-4o-airline.json").read_text())
    solved = [json.loads(line) for line in open(SHARED / "data/gsm8k/example_model_solutions.jsonl")]
    solutions = [
        {"question": row["question"], "answer": row[model]["solution"]}
        for row in solved
        for model in ("6b_finetuning", "175b_verification")
    ]
    return {"trajectories": trajectories, "solutions": solutions}


def medians(sides: dict[str, Callable[[], Iterator]], rounds: int) -> dict[str, float]:
    """CPU seconds of each side, whose rows are forgotten as they come."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            began = time.process_time()
            deque(work(), maxlen=0)
            seconds[name].append(time.process_time() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def compare(name: str, rows: list[dict[str, Any]], rounds: int) -> list[dict[str, Any]]:
    from transformers import AutoTokenizer  # here, since workers import this module too

    tokenizer, theirs = load_tokenizer(str(TOKENIZER)), AutoTokenizer.from_pretrained(TOKENIZER)
    template, config = TEMPLATE.read_text(), ChatConfig(template=str(TEMPLATE))
    conversations = [conversation for row in rows for conversation in read_record(row)]

    def ours(encoder: str) -> Callable[[], Iterator]:
        chats = ChatRows(config, tokenizer, Encoder(tokenizer, encoder))
        return lambda: (row for record in rows for row in chats.rows(record))

    def peer() -> Iterator:
        return (
            theirs.apply_chat_template(
                conversation.messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
            )
            for conversation in conversations
        )

    sides = {"huggingface": ours("huggingface"), "gigatoken": ours("gigatoken"), "peer": peer}
    expected = list(peer())
    stop = theirs.convert_tokens_to_ids("<|im_end|>")
    masks = [
        [int(on and before != stop) for on, before in zip(out["assistant_masks"], [None, *out["input_ids"]])]
        for out in expected
    ]
    for encoder in ("huggingface", "gigatoken"):
        found = list(sides[encoder]())
        assert len(found) == len(expected) and all(
            row.ids.tolist() == out["input_ids"] and row.mask.tolist() == mask
            for row, out, mask in zip(found, expected, masks)
        ), f"{name}: {encoder} differs"
    seconds = medians(sides, rounds)
    tokens = sum(len(out["input_ids"]) for out in expected)
    print(f"{name}: {len(rows):,} rows, {tokens:,} tokens, ids and masks identical")
    for side, value in seconds.items():
        print(f"  {side:12} {value / len(rows) * 1e3:7.2f} ms/row  {tokens / value / 1e6:6.2f} Mtok/s")
    return [
        {
            "name": f"materialize {name}, {encoder}",
            "ours": seconds[encoder],
            "peer": seconds["peer"],
            "ratio": seconds["peer"] / seconds[encoder],
            "unit": "CPU s",
        }
        for encoder in ("huggingface", "gigatoken")
    ]


def two_workers(rounds: int) -> dict[str, Any]:
    """The phase with Hugging Face's tokenizer, one worker and two in turn, by the clock."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "trajectories.jsonl"
        lines = [json.dumps({"messages": row["traj"]}) + "\n" for row in records()["trajectories"]]
        source.write_text("".join(lines) * COPIES)
        for number in range(rounds):
            for workers in seconds:
                out = Path(folder) / f"{number}.{workers}"
                out.mkdir()
                config = Config(
                    source=Source(inputs=[str(source)]),
                    tokenizer=str(TOKENIZER),
                    workers=workers,
                    chat=ChatConfig(template=str(TEMPLATE)),
                    encoder="huggingface",
                )
                began = time.perf_counter()
                materialize(config, out, 0, 1)
                seconds[workers].append(time.perf_counter() - began)
    one, two = (statistics.median(seconds[workers]) for workers in (1, 2))
    print(
        f"phase, {len(lines) * COPIES:,} trajectories: one worker {one:.1f} s, two {two:.1f} s "
        f"(load {os.getloadavg()[0]:.1f})"
    )
    return {"name": "materialize, two workers", "ours": two, "peer": one, "ratio": one / two, "unit": "s"}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    results = [result for name, rows in records().items() for result in compare(name, rows, rounds)]
    results.append(two_workers(1))
    for result in results:
        print(f"{result['name']}: {result['ratio']:.2f}")
    print(json.dumps({"name": "materialize", "results": results}))


if __name__ == "__main__":
    main()
