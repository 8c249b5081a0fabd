"""Rejection sampling: sampled completions → the ones worth training on, as JSONL chat. Here is what decides.

A sample is a record of the `generate` phase, or of any tool that writes the same keys (samples.py); sample, seed,
sampling parameters, weights and reward are carried along. Each ends in exactly one bucket, the first rule that turns it
away, in this order:

    unscored, wrong, truncated, ill_formed, too_short, too_long, contaminated      on its own
    no_majority, minority, pass_rate                                               with its prompt's other samples
    duplicate, near_duplicate, same_method, over_limit                             beside better ones of its prompt
    same_question, no_band, over_band, same_method, over_task, over_most           beside other prompts

The first three lines are an element's work (rejection_element.py), the last is done across all (rejection_finish.py).
Evaluation sets are among the first, where a sample that holds a question still makes room for another of its prompt.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.base.declared import setting
from data_tools.chats.conversation import SYSTEM
from data_tools.chats.samples import CUT_OFF, prompt_messages
from data_tools.mistake import Problem, UserMistake
from data_tools.prepare.alike import Alike, similarity
from data_tools.prepare.contamination import NGRAM, SHORTEST, Contamination, texts_of, words

PREFER = ("shortest", "longest", "diverse", "first")
THINKING = ("any", "required", "forbidden")
ON_BAD_ROW = ("fail", "drop")
OF_ONE_METHOD = ("", "prompt", "run")

_SHINGLE = 5  # words; what two completions have in common is counted in runs of so many
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass
class Band:
    """A band of difficulty: the prompts whose share of right samples lies in it, and how many of them stay."""

    least: float = setting(0.0, "share of right samples, at least", least=0, most=1, example=0.25)
    most: float = setting(1.0, "share of right samples, at most", least=0, most=1, example=0.75)
    prompts: int = setting(0, "prompts of the band that stay, drawn by the seed; 0: all", unit="prompts", least=0)


@dataclass
class Config:
    """The config of the phase reject_filter."""

    inputs: list[str] = setting(
        list, "JSONL files of samples, or folders of them", example=["${phases.sampled.out}"], needed=True, input=True
    )
    correct: bool = setting(True, "only samples whose verifier said so; false: also unscored and wrong ones")
    majority: float = setting(
        0.0, "where no sample of a prompt has a verdict, right is the answer of most, if this share of all gave it; 0: "
        "never", least=0, most=1, keyed="if_set", example=0.6
    )  # fmt: skip
    truncated: bool = setting(False, "samples that reached their length limit are kept")
    thinking: str = setting("any", "<think> … </think> before the answer; half of it is never kept", choices=THINKING)
    answer_pattern: str = setting(
        "", "regular expression that the answer, after the thinking, contains", example=r"\boxed", free=True
    )
    min_tokens: int = setting(0, "tokens of a sample, at least", unit="tokens", least=0)
    max_tokens: int = setting(0, "tokens of a sample, at most; 0: no limit", unit="tokens", least=0)
    min_pass_rate: float = setting(
        0.0, "prompts go of whose scored samples a smaller share is correct: too hard", least=0, most=1, example=0.1
    )
    max_pass_rate: float = setting(
        1.0, "prompts go of whose scored samples a larger share is correct: too easy", least=0, most=1, example=0.9
    )
    evaluation_sets: list[str] = setting(
        list,
        "files of evaluation sets; samples that hold one of their questions go",
        example=["gsm8k/test.jsonl"],
        input=True,
    )
    ngram: int = setting(
        NGRAM, "words in a row that a text shares with an evaluation question when it holds it",
        unit="words", least=SHORTEST,
    )  # fmt: skip
    near_duplicate: float = setting(
        0.8,
        "Jaccard similarity of 5-word runs at which the second sample of a prompt goes; 1: never",
        above=0,
        most=1,
        example=0.7,
    )
    one_of_a_method: str = setting(
        "", "of samples that are the same but for their numbers one is kept: of a prompt, or of the run; \"\": all are",
        choices=OF_ONE_METHOD, keyed="if_set",
    )  # fmt: skip
    per_prompt: int = setting(0, "samples of a prompt that are kept, at most; 0: all", unit="samples", least=0)
    prefer: str = setting("shortest", "which samples of a prompt are kept first", choices=PREFER)
    one_of_a_question: bool = setting(
        False, "of prompts that ask the same, word by word, the first is kept", keyed="if_set"
    )
    bands: dict[str, Band] = setting(
        dict, "bands of difficulty; a prompt is of the first that has its share of right samples", keyed="if_set"
    )
    per_task: int = setting(
        0, "samples of a task, at most; 0: all", unit="samples", least=0, keyed="if_set", example=20000
    )
    most: int = setting(0, "samples in all, at most; 0: all", unit="samples", least=0, keyed="if_set", example=100_000)
    seed: int = setting(0, "draw of the prompts where there are too many", free=True, keyed="if_set")
    on_bad_row: str = setting("fail", "what a line that is no sample does", choices=ON_BAD_ROW)


def check(config: Config) -> list[Problem]:
    """Refuse a pattern that is none, limits with nothing between them, and what would have no effect."""
    problems = []
    try:
        re.compile(config.answer_pattern)
    except re.error as error:
        problems.append(Problem("answer_pattern", f"{config.answer_pattern!r} is no regular expression: {error}"))
    if config.max_tokens and config.min_tokens > config.max_tokens:
        problems.append(Problem("min_tokens", f"{config.min_tokens} is above max_tokens {config.max_tokens}"))
    ranges = [("min_pass_rate", config.min_pass_rate, config.max_pass_rate)]
    ranges += [(f"bands.{name}.least", band.least, band.most) for name, band in config.bands.items()]
    for where, least, most in ranges:
        if least > most:
            problems.append(Problem(where, f"{least} to {most} is no range of shares: 0 <= min <= max <= 1"))
    if config.majority and not config.correct:
        values = f"{config.majority} beside correct: false, which keeps samples without a verdict as they are"
        problems.append(Problem("majority", f"{values}; leave one out"))
    return problems


def shingles(text: str, size: int = _SHINGLE) -> frozenset[tuple[str, ...]]:
    """Runs of `size` words; of a shorter text its one run."""
    in_order = words(text)
    return frozenset(tuple(in_order[i : i + size]) for i in range(max(1, len(in_order) - size + 1)))


def method_of(completion: str) -> str:
    """Return 16 hex digits that name a completion's method: its words, with every number the same."""
    masked = " ".join(words(_NUMBER.sub(" 0 ", completion)))
    return hashlib.blake2b(masked.encode(), digest_size=8).hexdigest()


def split_thinking(completion: str) -> tuple[str, str] | None:
    """Return (thinking, answer) of a completion, the thinking empty where there is none; None where it is not closed
    once.

    Templates that write `<think>` into the prompt leave only its end in the completion.
    """
    begins, ends = completion.count("<think>"), completion.count("</think>")
    if not ends:
        return None if begins else ("", completion.strip())
    if ends > 1 or begins > 1 or (begins and completion.index("<think>") > completion.index("</think>")):
        return None
    thinking, answer = completion.split("</think>")
    return thinking.replace("<think>", "").strip(), answer.strip()


def own_bucket(row: dict[str, Any], config: Config, contamination: Contamination) -> str:
    """Return the bucket of the first rule that turns a sample away without looking at others, "" when none does."""
    if config.correct and row.get("correct") is None:
        if row.get("reward") is not None:
            raise UserMistake(_unjudged(row))
        if not config.majority:
            return "unscored"
    elif config.correct and not row["correct"]:
        return "wrong"
    if not config.truncated and row["finish"] in CUT_OFF:
        return "truncated"
    parts = split_thinking(row["completion"])
    if parts is None or not parts[1] or not re.search(config.answer_pattern, parts[1]):
        return "ill_formed"
    if config.thinking != "any" and bool(parts[0]) != (config.thinking == "required"):
        return "ill_formed"
    if row["tokens"] < config.min_tokens:
        return "too_short"
    if config.max_tokens and row["tokens"] > config.max_tokens:
        return "too_long"
    texts = [*texts_of(prompt_messages(row)), *(row.get(key) or "" for key in SYSTEM), row["completion"]]
    return "contaminated" if any(map(contamination.touches, texts)) else ""


def _unjudged(row: dict[str, Any]) -> Problem:
    task = f"task {row['task']}" if "task" in row else "its task"
    reason = f"a sample has reward {row['reward']} and no verdict: {task} does not say which rewards are right"
    return Problem("correct", f"{reason}; let its module say RIGHT = the least right one, or set correct: false")


def buckets_of(completions: Sequence[str], tokens: Sequence[int], config: Config) -> list[str]:
    """Return for each sample of one prompt the bucket that it goes to beside the others, "" for those to keep."""
    order = list(range(len(completions)))
    if config.prefer != "first":
        order.sort(key=lambda place: tokens[place], reverse=config.prefer == "longest")
    runs = [shingles(text) for text in completions]
    methods = [method_of(text) if config.one_of_a_method else "" for text in completions]
    buckets = [""] * len(completions)
    unlike: list[int] = []
    texts_seen: set[str] = set()
    methods_seen: set[str] = set()
    near = Alike(runs, config.near_duplicate) if config.near_duplicate < 1 else None
    for place in order:
        if completions[place] in texts_seen:
            buckets[place] = "duplicate"
        elif near is not None and near.knows(place):
            buckets[place] = "near_duplicate"
        elif config.one_of_a_method and methods[place] in methods_seen:
            buckets[place] = "same_method"
        else:
            unlike.append(place)
            texts_seen.add(completions[place])
            methods_seen.add(methods[place])
            if near is not None:
                near.add(place)
    limit = config.per_prompt or len(unlike)
    kept = _spread(unlike, runs, limit) if config.prefer == "diverse" else unlike[:limit]
    for place in set(unlike) - set(kept):
        buckets[place] = "over_limit"
    return buckets


def _spread(places: list[int], runs: Sequence[frozenset], limit: int) -> list[int]:
    """Return the first, then again and again the one least like any chosen before."""
    if limit >= len(places):
        return places
    chosen, nearest = places[:1], dict.fromkeys(places[1:], 0.0)  # similarity to the most like of the chosen
    while len(chosen) < limit:
        for place, before in nearest.items():
            nearest[place] = max(before, similarity(runs[place], runs[chosen[-1]]))
        chosen.append(min(nearest, key=lambda place: nearest[place]))
        del nearest[chosen[-1]]
    return chosen
