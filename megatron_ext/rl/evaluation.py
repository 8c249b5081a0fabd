"""How good the weights in training are: greedy accuracy, pass@k and maj@k over prompts of an evaluation set."""

from typing import Any, Callable, Optional, Sequence

import numpy as np

from data_tools.estimators import majority_at_k, pass_at_k, standard_error
from data_tools.progress import Stopped
from megatron_ext.rl.collect import Prompts, Replica, Scorer, Together, everywhere
from megatron_ext.rollout.engine import Engine
from megatron_ext.rollout.sequence import Request
from megatron_ext.rollout.settings import Sampling

RIGHT = 1.0  # a reward of this, or more, counts as a right answer


def evaluate(
    engine: Engine,
    prompts: Prompts,
    scorer: Optional[Scorer],
    spell: Callable[[list[int], str], str],
    sampling: Sampling,
    count: int,
    samples: int,
    together: Together,
) -> dict[str, Any]:
    """By entry, over prompts 0 to `count` - 1, `samples` each (greedy: 1). Every rank takes part and returns the same.

    Raises Stopped on every rank once any was asked to stop.
    """
    replica = Replica()
    wanted = {k: prompts.item(k) for k in replica.share(range(count))}
    numbers = {prompts.uid(item): k for k, item in wanted.items()}
    requests = [Request(uid, prompts.tokens(wanted[k]), samples) for uid, k in numbers.items()]
    pending: list[tuple[int, str, Any]] = []
    stopped = False
    try:
        for sequence in engine.generate(requests, sampling, together):
            if replica.speaks:
                k = numbers[sequence.prefix.request.uid]
                text = spell(sequence.completion, sequence.finish)
                pending.append((k, sequence.finish, scorer.submit(wanted[k], text, sequence.finish)))
    except Stopped:
        stopped = True
    engine.counts.clear()
    if everywhere(stopped):
        raise Stopped(0, 0)
    found = []
    for k, finish, future in pending:
        score = future.result()
        right = score.reward is not None and score.reward >= RIGHT
        found.append((getattr(wanted[k], "entry", "all"), k, score.answer if finish == "stop" else None, right))
    every = replica.gathered(replica.from_speaker(found))
    names = sorted({name for name, *_ in every})
    return {name: summary([one for of, *one in every if of == name], samples, sampling.is_greedy) for name in names}


def summary(found: Sequence[tuple[int, Optional[str], bool]], samples: int, greedy: bool) -> dict[str, Any]:
    """Of (prompt, answer or None, right) of each sample."""
    by_prompt: dict[int, list[tuple[Optional[str], bool]]] = {}
    for k, answer, right in sorted(found, key=lambda one: (one[0], str(one[1]))):
        by_prompt.setdefault(k, []).append((answer, right))
    means = [float(np.mean([right for _, right in one])) for one in by_prompt.values()]
    if greedy:
        return {"prompts": len(means), "greedy": float(np.mean(means)), "greedy_error": standard_error(means)}
    result: dict[str, Any] = {"prompts": len(means), "samples": samples}
    result |= {"accuracy": float(np.mean(means)), "accuracy_error": standard_error(means)}
    for k in (2**i for i in range(1, samples.bit_length()) if 2**i <= samples):
        result[f"pass@{k}"] = float(np.mean([pass_at_k(samples, sum(r for _, r in one), k) for one in by_prompt.values()]))
        if any(answer is not None for answer, _ in (one for many in by_prompt.values() for one in many)):
            votes = [([a for a, _ in one], [r for _, r in one]) for one in by_prompt.values()]
            result[f"maj@{k}"] = float(np.mean([majority_at_k(answers, right, k) for answers, right in votes]))
    return result
