"""Tasks of several turns: what they reply where a turn of the model ends.

The verifiers' processes are asked (data_tools/tasks/rewards.py): a task that raises, hangs or gives no text costs its
sample. One rank of a replica asks, and tells the others; samples that nobody has answered yet wait, the rest goes on.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_ext.rl.replica import Replica
from megatron_ext.rollout.sequence import Answer, Sequence

MOMENT_S = 0.02  # waited for a reply where nothing else is to be done


class Task(Protocol):
    """Who replies to a turn of the model."""

    def reply(self, item: Any, transcript: str) -> Future:
        """Return a future whose result() has text (None: it is over) and note (why the sample cannot go on)."""


@dataclass(frozen=True)
class Turns:
    """How a run's tasks answer.

    `ends(item)` are the texts after which its task is asked, None where it never is. `task` is needed where
    `Replica.speaks`. `spell(tokens, finish)` is the text of a completion so far, `encode` makes tokens of a reply.
    """

    ends: Callable[[Any], tuple[str, ...] | None]
    task: Task | None
    spell: Callable[[list[int], str], str]
    encode: Callable[[str], list[int]]

    def of(self, items: Mapping[int, Any], replica: Replica) -> "Replies":
        """Return the replies to the prompts of one call of the engine, by uid."""
        return Replies(self, items, replica)


def ends_of(turns: Turns | None, item: Any) -> tuple[str, ...] | None:
    """Return the texts after which a prompt's task is asked, None where it never is."""
    return turns.ends(item) if turns else None


class Replies:
    """What the engine asks and is told, of one call (rollout/engine.py)."""

    def __init__(self, turns: Turns, items: Mapping[int, Any], replica: Replica):
        self.turns, self.items, self.replica = turns, items, replica
        self.asked: dict[tuple[int, int], Sequence] = {}
        self.futures: dict[tuple[int, int], Future] = {}

    def ask(self, sequence: Sequence) -> None:
        """Ask a sample's task, on the rank that speaks."""
        uid = sequence.prefix.request.uid
        self.asked[uid, sequence.sample] = sequence
        if self.replica.speaks:
            assert self.turns.task is not None  # as Turns says
            transcript = self.turns.spell(sequence.completion, "stop")
            self.futures[uid, sequence.sample] = self.turns.task.reply(self.items[uid], transcript)

    def answers(self, wait: bool) -> list[tuple[Sequence, Answer]]:
        """Return the replies that came, on every rank of the replica; wait a moment where asked to."""
        if wait:
            wait_for(self.futures.values(), MOMENT_S, FIRST_COMPLETED)
        done = [key for key, future in self.futures.items() if future.done()]
        came = [(key, self._answer(self.futures.pop(key))) for key in done]
        return [(self.asked.pop(key), Answer(*answer)) for key, answer in self.replica.from_speaker(came)]

    def _answer(self, future: Future) -> Answer:
        reply = future.result()
        return Answer(None if reply.text is None else tuple(self.turns.encode(reply.text)), reply.note)
