"""Questions with lettered choices, as MMLU and ARC have them.

A record has `question`, `choices` (texts, or {"text", "label"}) and `answer` or `answerKey`: a label, or a place from
0. With `answered_by: likelihood` nothing is generated: the choice counts that the model finds likeliest.
"""

from dataclasses import dataclass, replace
from typing import Any

from data_tools.answers.choices import letter_of
from data_tools.answers.forms import find_answer
from data_tools.base.declared import setting
from data_tools.tasks import math_answers
from data_tools.tasks.math_answers import REWARDS, check_options, text_of
from data_tools.tasks.task import Item

__all__ = ["HUB", "REWARDS", "Options", "check_options", "compares", "final_answer", "items", "rewards"]

HUB = "allenai/ai2_arc:ARC-Challenge/train-*.parquet"

ANSWERED_BY = ("generation", "likelihood")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SHORTEST = 40  # characters of a completion that may say its letter without the form that was asked for


@dataclass
class Options(math_answers.Options):
    instruction: str = "Give the letter of the right answer within \\boxed{}."
    answered_by: str = setting(
        "generation", "what answers: what the model writes, or the choice that it finds likeliest", choices=ANSWERED_BY
    )
    asked_as: str = setting(
        "letters", "what likelihood compares: the letters of listed choices (MMLU), or their texts (ARC)",
        choices=("letters", "texts"),
    )  # fmt: skip


def items(record: dict[str, Any], options: Options) -> list[Item]:
    choices = record.get("choices")
    labels = choices.get("label") if isinstance(choices, dict) else None
    texts = choices.get("text") if isinstance(choices, dict) else choices
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(_LETTERS):
        raise ValueError(f"'choices' are no list of 2 to {len(_LETTERS)} texts")
    letters = _LETTERS[: len(texts)]
    known = [str(label) for label in labels or letters]
    if wrong := _wrong_choices(texts, known):
        raise ValueError(wrong)
    given = record["answer"] if record.get("answer") is not None else record.get("answerKey")
    if str(given) in known:  # of choices with the labels 1 to 4, 1 is the first
        place = known.index(str(given))
    elif isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(texts):
        place = given
    else:
        raise ValueError(f"answer {given!r} is none of the choices {', '.join(known)}, nor a place from 0")
    question = text_of(record, "question")
    if options.answered_by == "likelihood":
        scored = _scored(question.strip(), [str(text) for text in texts], letters[place], options)
        return [replace(scored, question=question)]
    lines = [f"{letter}. {text}" for letter, text in zip(letters, texts)]
    asked = math_answers.question("\n".join([question, "", *lines]), letters[place], options)
    return [replace(asked, columns={"letters": letters}, question=question)]


def _wrong_choices(texts: list[Any], labels: list[str]) -> str | None:
    """Return why it cannot be told which of the choices is meant, None where it can."""
    if len(labels) != len(texts) or len(set(labels)) < len(labels):
        return f"'choices' have the labels {', '.join(labels)} of {len(texts)} texts: each needs one of its own"
    for text in texts:
        if isinstance(text, bool) or not isinstance(text, (str, int, float)):
            return f"'choices' have {text!r}, which is no text"
    return None


def _scored(question: str, texts: list[str], answer: str, options: Options) -> Item:
    """Return the item of a question whose choices are compared, worded as lm-evaluation-harness words MMLU and ARC."""
    letters = _LETTERS[: len(texts)]
    if options.asked_as == "letters":
        listed = "".join(f"{letter}. {text}\n" for letter, text in zip(letters, texts))
        return Item.of(f"{question}\n{listed}Answer:", answer, {"letters": letters, "choices": [*letters]})
    return Item.of(f"Question: {question}\nAnswer:", answer, {"letters": letters, "choices": texts})


def compares(options: Options) -> bool:
    """Return whether the model's likeliest choice is its answer, and nothing is generated."""
    return options.answered_by == "likelihood"


def rewards(item: Item, completion: str, options: Options) -> dict[str, float]:
    letter = final_answer(item, completion, options)
    return {"correct": float(letter == item.answer), "format": float(letter not in (None, item.answer))}


def final_answer(item: Item, completion: str, options: Options) -> str | None:
    """Return the one letter of a choice that the answer names; also of a completion that is no more than that."""
    letters = item.columns.get("letters", _LETTERS)
    answer = find_answer(completion, options.answer_format)
    if answer is None and len(completion.strip()) <= _SHORTEST and "boxed" not in completion and "<" not in completion:
        answer = completion.strip()
    return letter_of(answer, letters) if answer else None
