"""Questions that are answered by the choice which the model finds likeliest, whoever computes the log-probs. No torch.

A choice, after a space, is worth the sum of its tokens' log-probs behind the prompt; `normalized` divides that by the
choice's characters (acc and acc_norm of lm-evaluation-harness, which takes the tokens of a choice as here: those that
prompt and choice have together, without as many as the prompt has alone). Of equal ones the first is taken.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from data_tools.mistake import Problem, UserMistake
from data_tools.tasks.mix import Draw
from megatron_ext.rl.prompts import Encoding


class Choice(NamedTuple):
    """Holds one choice of a question: the tokens before it, its own, and its text."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str


def choices(draw: Draw, encoding: Encoding) -> list[Choice]:
    """Return the choices of a question as tokens. Raise UserMistake for one that the model's positions do not hold."""
    prompt = draw.item.prompt
    assert isinstance(prompt, str)  # tasks whose choices are compared ask in texts
    before, found = tuple(encoding.encoder.encode(prompt.rstrip())), []
    for text in draw.item.columns["choices"]:
        whole = tuple(encoding.encoder.encode(f"{prompt.rstrip()} {text}"))
        if not len(before) < len(whole) <= encoding.longest:
            what = f"prompt {draw.item.uid} has {len(whole):,} tokens with the choice {text[:40]!r}"
            message = f"{what}, {len(before):,} without; the model's positions hold {encoding.longest:,}: leave it out"
            raise UserMistake(Problem(f"mix.entries.{draw.entry}", message))
        found.append(Choice(whole[: len(before)], whole[len(before) :], text))
    return found


def line(draw: Draw, own: Sequence[Choice], values: Sequence[float]) -> dict[str, Any]:
    """Return what evaluate.py writes of a question whose choices have these log-likelihoods."""
    letters = draw.item.columns["letters"]
    each = [value / max(len(choice.text), 1) for choice, value in zip(own, values)]
    said = [letters[int(np.argmax(one))] for one in (values, each)]
    return {
        "prompt": draw.item.uid,
        "completion": own[letters.index(said[0])].text,
        "log_likelihoods": dict(zip(letters, values)),
        "choice": said[0],
        "answer": draw.item.answer,
        "correct": said[0] == draw.item.answer,
        "correct_normalized": said[1] == draw.item.answer,
        "seen": None,
        "kind": draw.entry,
    }
