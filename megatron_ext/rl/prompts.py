"""The prompts of a run as the collector wants them, and their scorer: data_tools/tasks/mix.py and rewards.py."""

import contextlib
from functools import lru_cache
from typing import Any, Iterator, Mapping, Optional

from data_tools.mistake import Problem, UserMistake
from data_tools.prompts import PromptEncoder
from data_tools.tasks.mix import Draw, Entry, Mix, verifiers
from data_tools.tasks.rewards import Scorer
from data_tools.tokenizer import Tokenizer


class Encoded:
    """Prompts that leave room for a completion. UserMistake for one that does not."""

    def __init__(self, tokenizer: Tokenizer, arguments: Mapping[str, Any], longest: int):
        self.encoder, self.longest = PromptEncoder(tokenizer, arguments), longest

    def tokens(self, draw: Draw) -> tuple[int, ...]:
        found = tuple(self.encoder.encode(draw.item.prompt))
        if not 0 < len(found) <= self.longest:
            what = f"prompt {draw.item.uid} has {len(found):,} tokens"
            limit = f"the model's positions and sampling.max_tokens leave {self.longest:,} for it"
            raise UserMistake(Problem(f"mix.entries.{draw.entry}", f"{what}; {limit}: leave it out, or lower max_tokens"))
        return found

    def uid(self, draw: Draw) -> int:
        return draw.number


class MixPrompts(Encoded):
    """The endless order of a mix."""

    def __init__(self, mix: Mix, *encoding: Any):
        super().__init__(*encoding)
        self.mix = mix

    @lru_cache(maxsize=4096)
    def item(self, k: int) -> Draw:
        return self.mix.draw(k)


class HeldOut(Encoded):
    """The first `count` prompts of each entry that is evaluated only, one entry after the other."""

    def __init__(self, mix: Mix, count: int, *encoding: Any):
        super().__init__(*encoding)
        self.draws = [
            mix.held_out(name, k) for name in mix.evaluated() for k in range(min(count, len(mix.items[name])))
        ]

    def __len__(self) -> int:
        return len(self.draws)

    def item(self, k: int) -> Draw:
        return self.draws[k]


class MixScorer:
    def __init__(self, scorer: Scorer):
        self.scorer = scorer

    def submit(self, draw: Draw, completion: str, finish: str) -> Any:
        return self.scorer.submit(draw.entry, draw.item, completion, finish)


@contextlib.contextmanager
def mix_scorer(entries: Mapping[str, Entry], wanted: bool, workers: int, limit_s: float) -> Iterator[Optional[MixScorer]]:
    """None on ranks that score nothing."""
    if not wanted:
        yield None
        return
    with Scorer(verifiers(entries), workers, limit_s) as scorer:
        yield MixScorer(scorer)
