"""The state of one sample while it is generated, and of the prompt that a group of samples shares.

In tasks of several turns a completion has tokens that are not the model's: what its task replied. Wherever tokens have
log-probs beside them, here and in what is recorded and trained, such a token's log-prob is NaN.
"""

import itertools
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy

_STOP_STRING_TOKENS = 64  # new tokens looked at for a stop string, at least
_DRAWN = 128  # positions whose noise is made at once


class Recorded(NamedTuple):
    """New tokens that a sample already had, and their log-probs: as drawn from, and the model's own.

    `routing` int16 [m, r]: which experts its first m tokens went to, those of the prompt first; None: not recorded.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    model_logprobs: tuple[float, ...] = ()
    routing: numpy.ndarray | None = None


@dataclass(frozen=True)
class Request:
    """One prompt and how many samples of it are wanted.

    `uid` names the prompt in the run: a sample's noise is a function of run seed, uid, number of the sample, position.
    `recorded` are tokens that samples already had, when a run is gone on with: they are taken as they stand and not
    drawn again. `limits` are new tokens at most, a sample each, in place of the sampling's max_tokens. Both count all
    samples, also where `only` names the numbers of those that are wanted. `turn_ends`, in a task of several turns, are
    the texts after which the model waits for a reply; None: it is never answered.
    """

    uid: int
    prompt: tuple[int, ...]
    samples: int = 1
    recorded: tuple[Recorded | tuple[tuple[int, ...], tuple[float, ...]], ...] = ()
    limits: tuple[int, ...] = ()
    only: tuple[int, ...] = ()
    turn_ends: tuple[str, ...] | None = None

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of the wanted samples."""
        return self.only or tuple(range(self.samples))


class Span(NamedTuple):
    """Tokens [start, stop) of a completion, the model's own or a reply's."""

    own: bool
    start: int
    stop: int


def spans(logprobs: "Many[float] | numpy.ndarray") -> list[Span]:
    """Return a completion's turns and the replies between them, from its tokens' log-probs."""
    own = ~numpy.isnan(numpy.asarray(logprobs, dtype=numpy.float32))
    if not len(own):
        return []
    edges = [0, *(numpy.flatnonzero(own[1:] != own[:-1]) + 1).tolist(), len(own)]
    return [Span(bool(own[start]), start, stop) for start, stop in itertools.pairwise(edges)]


def completes(tokens: Many[int], texts: Many[str], detokenize: Callable[[list[int]], str], start: int = 0) -> bool:
    """Return whether the last token completes one of the texts; those before `start` are not new."""
    if not texts:
        return False
    # A token is a byte of a text at least; some more, for the text may begin within its first one.
    most = max(_STOP_STRING_TOKENS, *(len(text.encode()) + 2 for text in texts))
    tail = list(tokens[max(start, len(tokens) - most) :])
    now = detokenize(tail)
    complete = [text for text in texts if text in now]
    before = detokenize(tail[:-1]) if complete else ""
    return any(now.count(text) > before.count(text) for text in complete)


class Answer(NamedTuple):
    """A reply to a turn: its tokens; None where the sample is over, with a `note` where it cannot go on."""

    tokens: tuple[int, ...] | None
    note: str = ""


@dataclass(eq=False)
class Routing:
    """Which experts the first tokens of a holder of blocks went to, as they were computed first: int16 [m, r]."""

    rows: list[numpy.ndarray] = field(default_factory=list)
    count: int = 0  # m

    def add(self, start: int, rows: numpy.ndarray) -> None:
        """Hear of the tokens from `start` on; what is known stays, though the tokens were computed again."""
        if start > self.count:
            raise ValueError(f"routing of token {start} comes after that of {self.count} tokens")
        new = start + len(rows) - self.count
        if new > 0:
            self.rows.append(rows[-new:])
            self.count += new

    @property
    def whole(self) -> numpy.ndarray | None:
        """All of it; None where nothing was recorded."""
        if len(self.rows) > 1:
            self.rows = [numpy.concatenate(self.rows)]
        return self.rows[0] if self.rows else None


@dataclass(eq=False)
class Prefix:
    """A prompt whose keys and values several samples share. Its blocks are held until the last of them has begun."""

    request: Request
    waiting: int  # samples that have not begun
    blocks: list[int] = field(default_factory=list)
    cached: int = 0  # tokens whose keys and values are in the blocks
    slot: int | None = None  # of recurrent state
    routes: Routing = field(default_factory=Routing, repr=False)

    def note_routing(self, start: int, rows: numpy.ndarray) -> None:
        """Hear which experts the tokens from `start` on went to, int16 [tokens, r]."""
        self.routes.add(start, rows)


@dataclass(eq=False)
class Sequence:
    """One sample: prompt and completion, log-probs of the completion, and where its keys and values lie."""

    prefix: Prefix
    sample: int
    limit: int  # new tokens, at most
    tokens: list[int]  # of the prompt, then new ones
    logprobs: list[float] = field(default_factory=list)  # of each new token, under the distribution it was drawn from
    model_logprobs: list[float] = field(default_factory=list)  # the same at temperature 1, unfiltered
    margins: list[float] = field(default_factory=list)  # how far the noise was from choosing another token
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    slot: int | None = None
    finish: str = ""  # stop | length | turns | abort; "" while it is under way
    note: str = ""  # why it was aborted, where its task knows
    arrival: int = 0
    routes: Routing = field(default_factory=Routing, repr=False)
    _noise: numpy.ndarray = field(default_factory=lambda: numpy.empty(0), repr=False)
    _noise_from: int = 0

    @property
    def prompt_length(self) -> int:
        """The number of tokens of the prompt."""
        return len(self.prefix.request.prompt)

    @property
    def completion(self) -> list[int]:
        """The new tokens so far."""
        return self.tokens[self.prompt_length :]

    @property
    def routing(self) -> numpy.ndarray | None:
        """Which experts its tokens went to that were computed, int16 [m, r]; None where it is not recorded."""
        if not self.routes.count and (prompt := self.prefix.routes.whole) is not None:
            self.routes.add(0, prompt)
        return self.routes.whole

    def note_routing(self, start: int, rows: numpy.ndarray) -> None:
        """Hear which experts the tokens from `start` on went to, int16 [tokens, r]. Those of the prompt are known."""
        if not self.routes.count and (prompt := self.prefix.routes.whole) is not None:
            self.routes.add(0, prompt)
        self.routes.add(start, rows)

    def observe(self, tokens: Many[int]) -> None:
        """Append tokens that are not the model's."""
        self.tokens += tokens
        for column in (self.logprobs, self.model_logprobs):
            column += [float("nan")] * len(tokens)
        self.margins += [float("inf")] * len(tokens)

    def noise(self, seed: int) -> float:
        """Return a number in [0, 1) for the next new token: the same in any batch, order or process."""
        position = len(self.tokens) - self.prompt_length
        if not self._noise_from <= position < self._noise_from + len(self._noise):
            self._noise_from = position // _DRAWN * _DRAWN
            self._noise = uniforms(seed, self.prefix.request.uid, self.sample, first=self._noise_from, count=_DRAWN)
        return float(self._noise[position - self._noise_from])


def uniforms(seed: int, uid: int, sample: int, first: int, count: int) -> numpy.ndarray:
    """Return float64 [count] in [0, 1) for positions first, first + 1, …; `first` is a multiple of 4.

    Philox-4x64 in counter mode: key (seed, uid), counter (position / 4, sample), a position a word.
    """
    mask = (1 << 64) - 1
    key = numpy.array([seed & mask, uid & mask], dtype=numpy.uint64)
    counter = numpy.array([first // 4, 0, sample, 0], dtype=numpy.uint64)
    words = numpy.random.Philox(counter=counter, key=key).random_raw(count)
    return (words >> numpy.uint64(11)) * 2.0**-53
