"""Our verdicts on labelled answers of models, beside math-verify's and the labels; every disagreement is printed.

    python -m tests.benchmarks.verifiers [--data ../shared/data] [--every 1]

GSM8K's example solutions (openai/grade-school-math), Qwen2.5-Math's graded completions of MATH and NeMo-Skills' test
outputs. math-verify 0.9 is asked as its manual says: the gold answer as LaTeX within dollars, the completion by LaTeX
and by plain expressions, `verify(gold, answer)` in that order. GSM8K's gold answers are plain numbers.
"""

import argparse
import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_tools.tasks import math_answers
from data_tools.tasks.math_answers import Options
from data_tools.tasks.task import Item


class Labelled(NamedTuple):
    """Represents a completion with the right answer, and what whoever graded it said."""

    name: str  # of the data set
    gold: str
    completion: str
    label: bool
    form: str = "boxed"


def gsm8k(file: Path) -> Iterator[Labelled]:
    """Yield four models' solutions of each question, which end with `A: 42`: the form hashes in other words."""
    for row in map(json.loads, open(file)):
        gold = row["ground_truth"].rpartition("A:")[2].strip().replace(",", "")
        for solved in (value for name, value in row.items() if name not in ("question", "ground_truth")):
            said, mark, answer = solved["solution"].rpartition("A:")
            text = f"{said}#### {answer}" if mark else answer
            yield Labelled("gsm8k", gold, text, solved["is_correct"], "hashes")


def qwen(file: Path) -> Iterator[Labelled]:
    """Yield eight completions of each problem: by `gt`, which the grader made of MATH's answer, and by that itself."""
    for row in map(json.loads, open(file)):
        for key in ("gt", "answer"):
            for text, good in zip(row["code"], row["score"]):
                yield Labelled(f"qwen_math, {key}", row[key], text, good)


def nemo(folder: Path) -> Iterator[Labelled]:
    for file in sorted(folder.glob("*.jsonl")):
        for row in map(json.loads, open(file)):
            yield Labelled("nemo_skills", str(row["expected_answer"]), row["generation"], row["is_correct"])


def all_of(data: Path) -> Iterator[Labelled]:
    """Yield everything that is labelled below a folder of public data."""
    yield from gsm8k(data / "gsm8k/example_model_solutions.jsonl")
    yield from qwen(data / "qwen_math/math_cot_100.jsonl")
    yield from nemo(data / "nemo_skills")


def ours(one: Labelled) -> bool | None:
    """Return our verdict; None: the row's own answer cannot be read, and the completion is no other text of it."""
    terms = math_answers.rewards(Item.of("?", one.gold), one.completion, Options(answer_format=one.form))
    return None if terms is None else bool(terms["correct"])


def theirs(one: Labelled) -> bool:
    """Return math-verify's verdict."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    both = [LatexExtractionConfig(), ExprExtractionConfig()]
    gold = parse(one.gold) if one.name == "gsm8k" else parse(f"${one.gold}$", extraction_config=both)
    return bool(verify(gold, parse(one.completion.replace("####", "The answer is"), extraction_config=both)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # math-verify's of what it cannot read
    counts: Counter[tuple[str, str, str, str]] = Counter()
    for place, one in enumerate(all_of(args.data)):
        if place % args.every:
            continue
        mine, other = ours(one), theirs(one)
        counts[one.name, str(one.label), str(mine), str(other)] += 1
        if not mine == other == one.label:
            said = " ".join(one.completion.split())[-90:]
            print(f"{one.name}: gold {one.gold!r} label {one.label} ours {mine} math-verify {other}: … {said}")
    print("\n| data | label | ours | math-verify | completions |\n|---|---|---|---|---|")
    for (name, label, mine_, other_), count in sorted(counts.items()):
        print(f"| {name} | {label} | {mine_} | {other_} | {count:,} |")
    for name in sorted({key[0] for key in counts}):
        total = sum(count for key, count in counts.items() if key[0] == name)
        agreed = [sum(n for key, n in counts.items() if key[0] == name and key[i] == key[1]) for i in (2, 3)]
        print(f"{name}: of {total:,} labels ours agrees with {agreed[0]:,}, math-verify with {agreed[1]:,}")


if __name__ == "__main__":
    main()
