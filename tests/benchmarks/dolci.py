"""Dolci-Think's preparation, on synthetic rows with the data set's labels: time, memory, quotas or what is short.

    python -m tests.benchmarks.dolci [ROWS [ELEMENTS]]

The labels are those of allenai/Dolci-Think-SFT-7B (dataset_source) in their proportions, 2,268,178 rows in all; how the
three of OpenThoughts and the two of WildChat divide what its card says of them is as remembered. Texts are made up, of
20 to some thousands of words, one in twenty German and one in fifty given twice. Each element runs in a process of its
own, one after another; CPU seconds count, since other work runs on this machine, and the peak of memory is that
process's.
"""

import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from data_tools.prepare.dolci import Config, draw, sample_shard
from tests.data_tools.chats import write_tokenizer

LABELS = {  # dataset_source: rows of the data set
    "saumyamalik/OpenThoughts3-full-filtered-math-decontam-v2": 752_998,
    "saumyamalik/OpenThoughts3-full-filtered-science-decontam-v2": 99_268,
    "saumyamalik/OpenThoughts3-full-filtered-code-subsampled-decontam-v2": 88_900,
    "saumyamalik/correct-python-sft-187k-x16-thoughts-filtered-decontam-v2": 466_677,
    "allenai/persona-precise-if-r1-final-content-filtered-chinese-filtered": 223_123,
    "saumyamalik/if_qwq_reasoning_verified_filtered_decontam_v2": 135_792,
    "allenai/nemotron-post-training-dataset-subset-ngram-filtered-no-tool-calls": 113_777,
    "allenai/SYNTHETIC-2-SFT-cn-fltrd-final-ngram-filtered-chinese-filtered": 104_569,
    "allenai/aya-100k-r1-format-filtered-keyword-filtered-filter-datecutoff-ngram-filtered": 98_597,
    "allenai/tulu_v3.9_wildchat_100k_english-r1-final-content-filtered": 41_527,
    "allenai/wildchat-r1-p2-repetition-filter": 41_527,
    "allenai/wildjailbreak-r1-v2-format-filtered-keyword-filtered-filter-datecutoff-final-content-filtered": 41_100,
    "allenai/wildguardmix-r1-v2-all-filtered-ngram-filtered-chinese-filtered": 38_315,
    "allenai/coconot-r1-format-domain-filtered-keyword-filtered-filter-datecutoff-chinese-filtered": 10_227,
    "allenai/oasst1-r1-format-filtered-keyword-filtered-filter-datecutoff-chinese-filtered": 6_800,
    "allenai/tablegpt_r1-format-filtered-keyword-filtered-filter-datecutoff": 4_981,
}
ENGLISH = """\
the of and to in is that it for was on are as with they be at have this from or had by not but what all were
we when your can said there use an each which she do how their if will up other about out many then them these so some
her would make like him into time has look two more write go see number no way could people my than first water been
call who its now find long down day did get come made may part""".split()
GERMAN = """\
der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden aus er hat
dass sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur oder aber vor zur bis mehr durch
man sein wurde sei prozent hatte kann gegen vom können schon wenn habe seine ihre dann unter wir soll""".split()


def row(number: int) -> dict[str, Any]:
    """Return row `number`: a label by the proportions, question, thought and answer; one in fifty is the one before."""
    own = random.Random(number - 1 if number % 50 == 49 else number)
    label = own.choices(list(LABELS), list(LABELS.values()))[0]
    words = GERMAN if own.random() < 0.05 else ENGLISH

    def text(length: int) -> str:
        drawn = own.choices(words, k=length)
        return " ".join(word + "." * (place % 11 == 10) for place, word in enumerate(drawn))

    length = int(own.lognormvariate(3.7, 1.4))  # the median thought has 40 words, one in fifty seven hundred or more
    thought = text(length) if own.random() < 0.9 else text(9)
    messages = [
        {"role": "user", "content": f"{text(12)}? ({own.random():.9f})"},
        {"role": "assistant", "content": f"<think>{thought}</think>{text(8 + length // 8)}"},
    ]
    return {"messages": messages, "dataset_source": label, "id": f"row-{number}"}


def write(path: Path, rows: range) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row(number), ensure_ascii=False) + "\n" for number in rows)


def element(config: Config, out: Path, index: int, count: int, told: Any) -> None:
    began = time.process_time()
    sample_shard(config, out, index, count)
    told.put((time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def apart(function: Any, *args: Any) -> tuple[float, float]:
    """Return (CPU seconds, peak MiB) of work in a process of its own."""
    told: Any = multiprocessing.get_context("spawn").Queue()
    process = multiprocessing.get_context("spawn").Process(target=function, args=(*args, told))
    process.start()
    found = told.get()
    process.join()
    return found


def drawn(config: Config, parts: list[Path], out: Path, told: Any) -> None:
    began = time.process_time()
    facts = draw(config, parts, out)
    (out / "facts.json").write_text(json.dumps({key: facts[key] for key in ("rows", "drawn", "short", "tables")}))
    told.put((time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main(rows: int = 1_000_000, count: int = 4) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tokenizer = str(write_tokenizer(root / "tokenizer"))
        files = [root / f"train-{place}.jsonl" for place in range(4)]
        began = time.perf_counter()
        for place, file in enumerate(files):
            write(file, range(place * rows // 4, (place + 1) * rows // 4))
        size = sum(file.stat().st_size for file in files) / 2**20
        print(f"{rows:,} rows, {size:,.0f} MiB, made in {time.perf_counter() - began:.0f} s")
        # a target as the seed's of its 2.2 million rows: 800,000
        config = Config(inputs=list(map(str, files)), tokenizer=tokenizer, target_rows=int(rows * 0.36))
        parts = [root / f"part{index}" for index in range(count)]
        for index, part in enumerate(parts):
            part.mkdir()
            seconds, peak = apart(element, config, part, index, count)
            print(f"element {index} of {count}: {seconds:,.1f} CPU s, peak {peak:,.0f} MiB", flush=True)
        out = root / "out"
        out.mkdir()
        seconds, peak = apart(drawn, config, parts, out)
        facts = json.loads((out / "facts.json").read_text())
        print(f"draw: {facts['rows']:,} of {config.target_rows:,} rows in {seconds:,.1f} CPU s, peak {peak:,.0f} MiB")
        for table in facts["tables"].values():
            print(table["title"])
            for line in [table["columns"], *table["rows"]]:
                print("  " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in line))
        sample = Counter(json.loads(line)["category"] for line in open(out / "sample.jsonl"))
        assert dict(sample) == {name: number for name, number in facts["drawn"].items() if number}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
