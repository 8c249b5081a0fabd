"""Measure how good the weights in training are, on prompts of an evaluation set.

Greedy accuracy, pass@k and maj@k; mean reward and regret of tasks whose rewards are more than right and wrong.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_tools.progress import Stopped
from data_tools.tasks.estimators import at_k, standard_error
from data_tools.tasks.outcome import Outcomes, graded, is_unjudged
from megatron_ext.rl.collect import Scorer, Together, everywhere
from megatron_ext.rl.prompts import Listed
from megatron_ext.rl.replica import Replica
from megatron_ext.rl.turns import Turns, ends_of
from megatron_ext.rollout.dealing import Group, deal, prompt_work
from megatron_ext.rollout.engine import Engine, NoDistribution
from megatron_ext.rollout.sequence import Request
from megatron_ext.rollout.settings import Sampling


def evaluate(
    engine: Engine,
    prompts: Listed,
    scorer: Scorer | None,
    spell: Callable[[list[int], str], str],
    *,
    sampling: Sampling,
    samples: int,
    together: Together,
    turns: Turns | None,
    outcomes: Outcomes,
    model: str = "the model",
) -> dict[str, Any]:
    """Return what `summary` says of each entry, from `samples` completions of each prompt (greedy: 1).

    Every rank takes part and returns the same. Raises Stopped on every rank once any was asked to stop.
    """
    replica = Replica()
    asked = scorer if replica.speaks else None
    own = deal([_group(k, prompts, samples, sampling, engine) for k in range(len(prompts))], replica.count)[
        replica.number
    ]
    wanted = {k: prompts.item(k) for k in own}
    numbers = {prompts.uid(item): k for k, item in wanted.items()}
    items = {uid: wanted[k] for uid, k in numbers.items()}
    requests = [
        Request(uid, prompts.tokens(items[uid]), samples, only=tuple(own[k]), turn_ends=ends_of(turns, items[uid]))
        for uid, k in numbers.items()
    ]
    replies = turns.of(items, replica) if turns else None
    pending: list[tuple[int, str, Any]] = []
    stopped = False
    try:
        for sequence in engine.generate(requests, sampling, together, replies):
            if asked is not None:
                k = numbers[sequence.prefix.request.uid]
                text = spell(sequence.completion, sequence.finish)
                pending.append((k, sequence.finish, asked.submit(wanted[k], text, sequence.finish)))
    except Stopped:
        stopped = True
    except NoDistribution as mistake:
        raise mistake.named(f"prompt {prompts.name(items[mistake.uid])}", model) from None
    engine.counts.clear()
    if everywhere(stopped):
        raise Stopped(0, 0)
    verdicts = []
    for k, finish, future in pending:
        score = future.result()
        entry, item = wanted[k].entry, wanted[k].item
        told = {"prompt": k, "answer": score.answer if finish == "stop" else None, "reward": score.reward}
        told["correct"] = outcomes.is_right(entry, item, score.reward, score.parts)
        verdicts.append((entry, {**told, "best": outcomes.best(entry, item)}))
    by_entry: dict[str, list[dict[str, Any]]] = {}
    for entry, told in replica.gathered(replica.from_speaker(verdicts)):
        by_entry.setdefault(entry, []).append(told)
    return {name: summary(by_entry[name], samples, sampling.is_greedy) for name in sorted(by_entry)}


def _group(k: int, prompts: Listed, samples: int, sampling: Sampling, engine: Engine) -> Group:
    """Return the work of a prompt's samples, each of which may be as long as any."""
    work = prompt_work(engine.config, len(prompts.tokens(prompts.item(k))))
    return Group(k, work, dict.fromkeys(range(samples), float(sampling.max_tokens)))


def summary(verdicts: Sequence[dict[str, Any]], samples: int, greedy: bool) -> dict[str, Any]:
    """Return the measures of samples of one entry, which have prompt, answer or None, correct, reward and best.

    There is no accuracy where the task knows of none.
    """
    by_prompt: dict[int, list[dict[str, Any]]] = {}
    for verdict in sorted(verdicts, key=lambda verdict: verdict["prompt"]):
        by_prompt.setdefault(verdict["prompt"], []).append(verdict)
    result: dict[str, Any] = {"prompts": len(by_prompt)} if greedy else {"prompts": len(by_prompt), "samples": samples}
    result |= graded(verdicts, "greedy_" if greedy else "")
    if any(map(is_unjudged, verdicts)):
        return result
    votes = [[(verdict["answer"], bool(verdict["correct"])) for verdict in group] for group in by_prompt.values()]
    means = [float(np.mean([right for _, right in group])) for group in votes]
    name = "greedy" if greedy else "accuracy"
    result |= {name: float(np.mean(means)), f"{name}_error": standard_error(means)}
    return result if greedy else result | at_k(votes)
