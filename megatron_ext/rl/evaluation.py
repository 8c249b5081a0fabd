"""How good the weights in training are: greedy accuracy, pass@k and maj@k over prompts of an evaluation set."""

from typing import Any, Callable, Optional, Sequence

import numpy as np

from data_tools.estimators import Vote, at_k, standard_error
from data_tools.progress import Stopped
from megatron_ext.rl.collect import Scorer, Together, everywhere
from megatron_ext.rl.prompts import Listed, is_right
from megatron_ext.rl.replica import Replica
from megatron_ext.rl.turns import Turns, ends_of
from megatron_ext.rollout.engine import Engine, NoDistribution
from megatron_ext.rollout.sequence import Request
from megatron_ext.rollout.settings import Sampling


def evaluate(
    engine: Engine,
    prompts: Listed,
    scorer: Optional[Scorer],
    spell: Callable[[list[int], str], str],
    sampling: Sampling,
    samples: int,
    together: Together,
    turns: Optional[Turns] = None,
    model: str = "the model",
) -> dict[str, Any]:
    """By entry, over the prompts, `samples` each (greedy: 1). Every rank takes part and returns the same.

    Raises Stopped on every rank once any was asked to stop.
    """
    replica = Replica()
    wanted = {k: prompts.item(k) for k in replica.share(range(len(prompts)))}
    numbers = {prompts.uid(item): k for k, item in wanted.items()}
    items = {uid: wanted[k] for uid, k in numbers.items()}
    requests = [
        Request(uid, prompts.tokens(item), samples, turn_ends=ends_of(turns, item)) for uid, item in items.items()
    ]
    replies = turns.of(items, replica) if turns else None
    pending: list[tuple[int, str, Any]] = []
    stopped = False
    try:
        for sequence in engine.generate(requests, sampling, together, replies):
            if replica.speaks:
                k = numbers[sequence.prefix.request.uid]
                text = spell(sequence.completion, sequence.finish)
                pending.append((k, sequence.finish, scorer.submit(wanted[k], text, sequence.finish)))
    except Stopped:
        stopped = True
    except NoDistribution as mistake:
        raise mistake.named(f"prompt {prompts.name(items[mistake.uid])}", model) from None
    engine.counts.clear()
    if everywhere(stopped):
        raise Stopped(0, 0)
    found = []
    for k, finish, future in pending:
        score = future.result()
        right = bool(is_right(score.reward, score.parts))
        found.append((wanted[k].entry, k, score.answer if finish == "stop" else None, right))
    every = replica.gathered(replica.from_speaker(found))
    names = sorted({name for name, *_ in every})
    return {name: summary([one for of, *one in every if of == name], samples, sampling.is_greedy) for name in names}


def summary(found: Sequence[tuple[int, Optional[str], bool]], samples: int, greedy: bool) -> dict[str, Any]:
    """Of (prompt, answer or None, right) of each sample."""
    by_prompt: dict[int, list[Vote]] = {}
    for k, answer, right in sorted(found, key=lambda one: one[0]):
        by_prompt.setdefault(k, []).append((answer, right))
    means = [float(np.mean([right for _, right in one])) for one in by_prompt.values()]
    if greedy:
        return {"prompts": len(means), "greedy": float(np.mean(means)), "greedy_error": standard_error(means)}
    result: dict[str, Any] = {"prompts": len(means), "samples": samples}
    result |= {"accuracy": float(np.mean(means)), "accuracy_error": standard_error(means)}
    return result | at_k(list(by_prompt.values()))
