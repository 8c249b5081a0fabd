"""Samples of many prompts, chunk after chunk, by the collector of GRPO: what a kill interrupts goes on where it was.

    KEEP/rollouts             tokens of the chunk under way (journal.py)
    KEEP/samples/KEY/0003.jsonl    chunk 3 once it is whole; KEY names all that its samples depend on
"""

import contextlib
import json
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

from data_tools import durable
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, Stop
from data_tools.prompts import PromptEncoder
from data_tools.tasks.mix import Draw, Mix, entries_of, verifiers
from data_tools.tasks.rewards import Scorer
from data_tools.tokenizer import load_tokenizer
from megatron_ext import model_folder
from megatron_ext.checkpoint import from_rank_zero
from megatron_ext.model_folder import ModelFolder
from megatron_ext.ranks import is_writer
from megatron_ext.rl import journal
from megatron_ext.rl.collect import Collector, Replica
from megatron_ext.rl.samples import Sample
from megatron_ext.rl.session import stop_ids_of
from megatron_ext.rollout.engine import Engine

RIGHT = 1.0  # a reward of this, or more, is a right answer where the task has no reward term `correct`
_TOLD = 20  # prompts that are too long, of one run


class Listed:
    """Given prompts, as the collector asks for them. UserMistake for those that leave no room for a completion."""

    def __init__(self, draws: list[Draw], encoder: PromptEncoder, longest: int):
        self.draws = draws
        self.ids = {draw.item.uid: tuple(encoder.encode(draw.item.prompt)) for draw in draws}
        limit = f"the model's positions and sampling.max_tokens leave {longest:,} for it: leave it out, or lower max_tokens"
        problems = [
            Problem(f"mix.entries.{draw.entry}", f"prompt {draw.item.uid} has {len(self.ids[draw.item.uid]):,} tokens; {limit}")
            for draw in draws
            if not 0 < len(self.ids[draw.item.uid]) <= longest
        ]
        if problems:
            raise UserMistake(problems[:_TOLD])

    def item(self, k: int) -> Draw:
        return self.draws[k]

    def tokens(self, draw: Draw) -> tuple[int, ...]:
        return self.ids[draw.item.uid]

    def uid(self, draw: Draw) -> int:
        return draw.number


class Scored:
    """The Scorer, as the collector asks it."""

    def __init__(self, scorer: Scorer):
        self.scorer = scorer

    def submit(self, draw: Draw, completion: str, finish: str) -> Any:
        return self.scorer.submit(draw.entry, draw.item, completion, finish)


def run(
    config: Any, folder: ModelFolder, identity: dict[str, Any], keep: Path, index: int, count: int, progress: Progress, stop: Stop
) -> list[Path]:
    """The files of samples of element `index` of `count`, in the order of its prompts; for rank 0 to read.

    `config` is entrypoints.generate.Config; the ranks are started.
    """
    tokenizer = load_tokenizer(str(folder.hf))
    mix = Mix(entries_of(config.mix), config.seed)
    every = [mix.held_out(name, k) for name, items in mix.items.items() for k in range(len(items))]
    mine = every[index::count]
    longest = (folder.family.config.shape(folder.dims).max_positions or 2**62) - config.sampling.max_tokens
    prompts = Listed(mine, PromptEncoder(tokenizer, config.chat_arguments), longest)
    names = [draw.item.uid for draw in mine]
    key = durable.sha256_bytes(durable.canonical_json({**identity, "prompts": names, "chunk": config.chunk}))
    stop_ids = stop_ids_of(folder, tokenizer)

    def spell(tokens: list[int], finish: str) -> str:
        ended = finish == "stop" and tokens and tokens[-1] in stop_ids
        return tokenizer.decode(tokens[:-1] if ended else tokens)

    def line(sample: Sample) -> str:
        return json.dumps(_row(sample, mine, index + sample.item * count, spell, config.seed, folder), ensure_ascii=False)

    starts = range(0, len(mine), config.chunk)
    files = [keep / "samples" / key[:16] / f"{number:04d}.jsonl" for number in range(len(starts))]
    made = from_rank_zero([path.is_file() for path in files])
    with _scoring(mix, config, not all(made)) as scorer:
        collector: Optional[Collector] = None
        for number, (start, path) in enumerate(zip(starts, files)):
            stop_at = min(start + config.chunk, len(mine))
            if not made[number]:
                if collector is None:
                    model = model_folder.load_model(folder, config.parallel, config.dtype, config.backend)
                    engine = Engine(model, config.engine, config.seed, stop_ids, tokenizer.decode)
                    collector = Collector(
                        engine, prompts, scorer, spell, config.sampling, config.samples, keep / "rollouts", key, config.record_s, stop
                    )
                collector.begin(number)
                samples = collector.collect(range(start, stop_at))
                collector.close()
                if is_writer():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    durable.write_file(path, "".join(f"{line(sample)}\n" for sample in samples))
                    journal.forget(keep / "rollouts", number + 1)
            progress(stop_at, len(mine), "prompts")
    return files


@contextlib.contextmanager
def _scoring(mix: Mix, config: Any, wanted: bool) -> Iterator[Optional[Scored]]:
    """None on ranks that score nothing."""
    if not (wanted and Replica().speaks):
        yield None
        return
    with Scorer(verifiers(mix.entries), config.verifiers, config.verify_limit_s) as scorer:
        yield Scored(scorer)


def _row(
    sample: Sample, draws: list[Draw], place: int, spell: Callable[[list[int], str], str], seed: int, folder: ModelFolder
) -> dict[str, Any]:
    """One line of what rejection reads; `place` is the prompt's among all elements'."""
    draw = draws[sample.item]
    prompt = draw.item.prompt
    right = None if sample.reward is None else sample.parts.get("correct", sample.reward) >= RIGHT
    return {
        "prompt_id": draw.item.uid,
        **({"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}),
        "completion": spell(sample.tokens.tolist(), sample.finish),
        "finish": sample.finish,
        "tokens": len(sample.tokens),
        "correct": right,
        "reward": sample.reward,
        "parts": dict(sample.parts),
        "note": sample.note,
        "task": draw.entry,
        "place": place,
        "sample": sample.number,
        "seed": seed,
        "weights": folder.weights_digest,
    }
