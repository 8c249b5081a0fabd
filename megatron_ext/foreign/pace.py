"""How fast a server may be asked: our own limits a minute, and the pauses that it asks for. Pure; times in s."""

import random
from dataclasses import dataclass, field

FIRST_WAIT_S, LONGEST_WAIT_S = (
    0.5,
    60.0,
)  # before the first and the later tries of a request, where the server names none
_CHARACTERS = 3  # of a token, at the least, as far as nobody knows the tokenizer: a limit is kept rather than used up


@dataclass
class Limit:
    """So many units a minute, evenly: a request that costs 1,000 of 60,000 units makes the next one wait for 1 s."""

    per_minute: float  # 0: no limit
    free_at: float = 0.0

    def ready_in(self, now: float) -> float:
        """Return how long a request has to wait."""
        return max(self.free_at - now, 0.0) if self.per_minute else 0.0

    def spend(self, now: float, units: float) -> None:
        """Count what a request that is sent now costs; units below 0 are given back."""
        if self.per_minute:
            self.free_at = max(self.free_at, now if units > 0 else 0.0) + units * 60 / self.per_minute


@dataclass
class Pace:
    """All limits of one element."""

    requests: Limit
    tokens: Limit
    paused_until: float = 0.0
    generator: random.Random = field(default_factory=random.Random)

    def ready_in(self, now: float) -> float:
        """Return how long the next request has to wait; 0: it may be sent."""
        return max(self.requests.ready_in(now), self.tokens.ready_in(now), self.paused_until - now, 0.0)

    def send(self, now: float, tokens: float) -> None:
        """Count a request that is sent now, of so many tokens as it may become."""
        self.requests.spend(now, 1)
        self.tokens.spend(now, tokens)

    def answered(self, now: float, expected: float, used: float) -> None:
        """Give back the tokens that were expected and not used."""
        self.tokens.spend(now, used - expected)

    def pause(self, now: float, seconds: float) -> None:
        """Have every request wait, as the server asked."""
        self.paused_until = max(self.paused_until, now + seconds)

    def back_off(self, tries: int) -> float:
        """Return how long a request waits after its `tries`-th failure: twice as long each time, and not all alike."""
        return min(FIRST_WAIT_S * 2 ** (tries - 1), LONGEST_WAIT_S) * self.generator.uniform(0.5, 1)


def expected_tokens(characters: int, most: int) -> float:
    """Return how many tokens a request may cost: a prompt of so many characters, and `most` new ones."""
    return characters / _CHARACTERS + most
