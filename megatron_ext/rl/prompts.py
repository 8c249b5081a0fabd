"""A mix (data_tools/tasks) as the collector, the evaluation and the engine want it: prompts, scorer, replies, texts."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_tools.chats.prompts import PromptEncoder
from data_tools.chats.tokenizer import Tokenizer, load_tokenizer, stop_ids
from data_tools.chats.unknown import CannotEncode
from data_tools.mistake import Problem, UserMistake
from data_tools.tasks.mix import Draw, Entry, Mix, entries_of, turn_ends, verifiers
from data_tools.tasks.outcome import Outcomes, graded
from data_tools.tasks.rewards import Scorer
from megatron_ext.model_folders.model_folder import ModelFolder
from megatron_ext.rl.samples import Sample
from megatron_ext.rl.settings import GenerateSettings, GrpoSettings
from megatron_ext.rollout.sequence import spans

if TYPE_CHECKING:
    from megatron_ext.rl.turns import Turns

_TOLD = 20  # prompts that are too long, of one run


class Encoding(NamedTuple):
    """How prompts become tokens, and the most that one may have, by what."""

    encoder: PromptEncoder
    longest: int
    by: str = "the model's positions and sampling.max_tokens"


class Encoded:
    """Prompts as tokens, which leave room for a completion. UserMistake for one that does not."""

    def __init__(self, encoding: Encoding):
        self.encoder, self.longest, self.by = encoding

    def tokens(self, draw: Draw) -> tuple[int, ...]:
        """Return a prompt's tokens."""
        try:
            tokens = tuple(self.encoder.encode(draw.item.prompt))
        except CannotEncode as error:
            raise UserMistake(Problem(f"mix.entries.{draw.entry}", f"prompt {draw.item.uid}: {error}")) from None
        if not tokens:
            message = f"prompt {draw.item.uid} is empty, and nothing can follow nothing: leave it out"
            raise UserMistake(Problem(f"mix.entries.{draw.entry}", message))
        if len(tokens) > self.longest:
            what = f"prompt {draw.item.uid} has {len(tokens):,} tokens"
            remedy = f"leave it out, or {'raise prompt_tokens' if 'prompt_tokens' in self.by else 'lower max_tokens'}"
            message = f"{what}; {self.by} leave {self.longest:,} for it: {remedy}"
            raise UserMistake(Problem(f"mix.entries.{draw.entry}", message))
        return tokens

    def all_tokens(self, draws: Sequence[Draw]) -> dict[str, tuple[int, ...]]:
        """Return the tokens of prompts by uid. UserMistake that names those that leave no room."""
        by_uid, problems = {}, []
        for draw in draws:
            try:
                by_uid[draw.item.uid] = Encoded.tokens(self, draw)
            except UserMistake as mistake:
                problems += mistake.problems
        if problems:
            raise UserMistake(problems[:_TOLD])
        return by_uid

    def uid(self, draw: Draw) -> int:
        """Return the number of the prompt in the run."""
        return draw.number

    def name(self, draw: Draw) -> str:
        """Return what a message calls the prompt."""
        return draw.item.uid


class MixPrompts(Encoded):
    """The endless order of a mix."""

    def __init__(self, mix: Mix, encoding: Encoding):
        super().__init__(encoding)
        self.mix = mix
        self._draw = lru_cache(maxsize=4096)(mix.draw)

    def check(self) -> None:
        """Refuse prompts that leave no room, before the first step and not when they are drawn.

        Only those are encoded that could be too long: a token is a byte at least, and a template as long as half of
        the room is none that we know. `tokens` looks at each one again.
        """
        drawn = all_of(self.mix, self.mix.trained())
        self.all_tokens([draw for draw in drawn if not 0 < 2 * len(str(draw.item.prompt).encode()) < self.longest])

    def item(self, k: int) -> Draw:
        """Return prompt number `k` of the order."""
        return self._draw(k)


class Listed(Encoded):
    """Given prompts. UserMistake at once for those that leave no room."""

    def __init__(self, draws: Sequence[Draw], encoding: Encoding):
        super().__init__(encoding)
        self.draws, self.ids = list(draws), self.all_tokens(draws)

    def __len__(self) -> int:
        return len(self.draws)

    def item(self, k: int) -> Draw:
        """Return prompt number `k` of the list."""
        return self.draws[k]

    def tokens(self, draw: Draw) -> tuple[int, ...]:
        """Return a prompt's tokens."""
        return self.ids[draw.item.uid]


class Unspelled(Listed):
    """Given prompts, whose tokens are the affair of who is asked."""

    def __init__(self, draws: Sequence[Draw]):
        self.draws = list(draws)

    def tokens(self, draw: Draw) -> tuple[int, ...]:
        """Return no tokens."""
        return ()


def all_of(mix: Mix, names: Sequence[str], most: int | None = None) -> list[Draw]:
    """Return the first `most` prompts of each of these entries, entry after entry, in the order of their files."""
    return [mix.held_out(name, k) for name in names for k in range(len(mix.items[name][:most]))]


def judged(drawn: Sequence[Sample], prompts: MixPrompts, outcomes: Outcomes) -> dict[str, dict[str, Any]]:
    """Return mean reward, regret and shares of the answers of a step's samples, for entries that know their best."""
    by_entry: dict[str, list[dict[str, Any]]] = {}
    for sample in drawn:
        draw = prompts.item(sample.item)
        if (best := outcomes.best(draw.entry, draw.item)) is not None:
            answer = None if sample.is_truncated else sample.answer
            told = {"prompt": sample.item, "reward": sample.reward, "answer": answer, "best": best}
            by_entry.setdefault(draw.entry, []).append(told)
    return {entry: told for entry in sorted(by_entry) if (told := graded(by_entry[entry]))}


class MixScorer:
    """The Scorer, as it is asked with prompts of a mix."""

    def __init__(self, scorer: Scorer, outcomes: Outcomes):
        self.scorer, self.outcomes = scorer, outcomes

    def submit(self, draw: Draw, completion: str, finish: str) -> Any:
        """Return a future of the verdict; of what was cut off, where its task knows the reward, at once."""
        if finish not in ("stop", "abort") and (score := self.outcomes.cut_off(draw.entry, draw.item)) is not None:
            future: Future = Future()
            future.set_result(score)
            return future
        return self.scorer.submit(draw.entry, draw.item, completion, finish)

    def reply(self, draw: Draw, transcript: str) -> Any:
        """Return a future of what the prompt's task replies to a transcript."""
        return self.scorer.reply(draw.entry, draw.item, transcript)


@contextlib.contextmanager
def mix_scorer(entries: Mapping[str, Entry], workers: int, limit_s: float, wanted: bool) -> Iterator[MixScorer | None]:
    """Run the verifiers of a mix meanwhile. Gives None where they are not `wanted`: on ranks that score nothing."""
    if not wanted:
        yield None
        return
    with Scorer(verifiers(entries), workers, limit_s) as scorer:
        yield MixScorer(scorer, Outcomes(entries))


class Texts:
    """Turns a model's tokens into what tasks read and say."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: set[int]):
        self.tokenizer, self.stop_ids = tokenizer, stop_ids

    def spell(self, tokens: Sequence[int], finish: str) -> str:
        """Return a completion's text without the token that ended it."""
        ended = finish == "stop" and len(tokens) and tokens[-1] in self.stop_ids
        return self.tokenizer.decode(tokens[:-1] if ended else tokens)

    def log(self, draw: Draw, sample: Sample) -> dict[str, Any]:
        """Return what a log says of a sample in words."""
        tokens = sample.tokens.tolist()
        return {
            "entry": draw.entry,
            "uid": draw.item.uid,
            "prompt": self.tokenizer.decode(sample.prompt),
            "completion": self.spell(tokens, sample.finish),
            **self.spell_turns(tokens, sample.logprobs),
        }

    def spell_turns(self, tokens: Sequence[int], logprobs: np.ndarray) -> dict[str, Any]:
        """Return `turns` of a completion for a log: who said what; nothing where the model alone spoke."""
        if not np.isnan(logprobs).any():
            return {}
        turns = spans(logprobs)
        said = [self.tokenizer.decode(tokens[span.start : span.stop]) for span in turns]
        return {"turns": [{"from": "model" if span.own else "task", "text": text} for span, text in zip(turns, said)]}


class OthersTexts(Texts):
    """Stands where no tokenizer is: samples come with their texts, in one turn."""

    def __init__(self) -> None:
        self.stop_ids = set()

    def spell_turns(self, tokens: Sequence[int], logprobs: np.ndarray) -> dict[str, Any]:
        """Return nothing: the model alone spoke."""
        return {}


def turns_of(mix: Mix, scorer: MixScorer | None, texts: Texts) -> "Turns | None":
    """Return how the tasks of a mix reply; None where none does."""
    from megatron_ext.rl.turns import Turns  # which only ranks use

    ends = turn_ends(mix.entries)
    return Turns(lambda draw: ends.get(draw.entry), scorer, texts.spell, texts.tokenizer.encode) if ends else None


def prompts_of(config: GenerateSettings | GrpoSettings, folder: ModelFolder) -> tuple[Tokenizer, Mix, Encoding]:
    """Return the tokenizer of a model folder, the run's prompts, and how they become its tokens."""
    tokenizer, encoding = encoding_of(config, folder)
    return tokenizer, Mix(entries_of(config.mix), config.seed), encoding


def encoding_of(config: GenerateSettings | GrpoSettings, folder: ModelFolder) -> tuple[Tokenizer, Encoding]:
    """Return the tokenizer of a model folder, and how prompts become its tokens."""
    tokenizer = load_tokenizer(str(folder.hf))
    positions = folder.family.config.shape(folder.dims).max_positions or 2**62  # 0: no limit
    encoder = PromptEncoder(tokenizer, config.chat_arguments, config.bos)
    room = positions - config.sampling.max_tokens
    encoding = Encoding(encoder, room)
    if 0 < config.prompt_tokens < room:
        encoding = Encoding(encoder, config.prompt_tokens, "the settings (prompt_tokens)")
    return tokenizer, encoding


def stop_ids_of(folder: ModelFolder, tokenizer: Tokenizer) -> set[int]:
    """Return the tokens that end a completion of a model folder's model."""
    return stop_ids(folder.hf, tokenizer)
