"""Samples of many prompts, chunk after chunk, by whoever makes them (makers.py): what a kill interrupts goes on where
it was. No torch.

KEEP/records.json         what became of the records of each task (Mix.counts)
KEEP/rollouts             tokens of the chunk under way (journal.py)
KEEP/samples/KEY/0003.jsonl    chunk 3 once it is whole; KEY names all that its samples depend on
"""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.progress import Progress, Stop, Stopped
from data_tools.tasks.messages import past_template
from data_tools.tasks.mix import Draw, Mix, entries_of
from data_tools.tasks.outcome import Outcomes
from megatron_ext.model_folders.model_folder import ModelFolder
from megatron_ext.rl import journal
from megatron_ext.rl.makers import Backend, Maker, Work
from megatron_ext.rl.prompts import (
    Listed,
    OthersTexts,
    Texts,
    Unspelled,
    all_of,
    encoding_of,
    mix_scorer,
    stop_ids_of,
)
from megatron_ext.rl.samples import Sample
from megatron_ext.rl.settings import GenerateSettings
from megatron_ext.rl.untrained import all_failed, failed_verdicts

RECORDS = "records.json"
_PROMPTS_TO_TELL = 16  # that a task's verifier is broken


def run(
    config: GenerateSettings,
    folder: ModelFolder | None,
    keep: Path,
    backend: Backend,
    *,
    identity: dict[str, Any],
    index: int,
    count: int,
    progress: Progress,
    stop: Stop,
) -> list[Path]:
    """Return the files of samples of element `index` of `count`, in the order of its prompts; for the writer to read.

    Every process of `backend` takes part. Raises Stopped, on every one, once any was asked to stop: what was drawn is
    recorded, and it says which part of the prompts that is. Without a `folder` the model is another's.
    """
    mix = Mix(entries_of(config.mix), config.seed)
    if backend.is_writer:
        keep.mkdir(parents=True, exist_ok=True)
        durable.write_json(keep / RECORDS, mix.counts())
    draws = all_of(mix, list(mix.items))[index::count]
    prompts, texts = _spelled(config, folder, draws)
    for passed in past_template(mix.entries, mix.items, texts.tokenizer) if folder and backend.is_writer else ():
        print(passed, flush=True)
    names = [draw.item.uid for draw in draws]
    named = {**identity, "prompts": names, "scoring": mix.scoring(draws), "chunk": config.chunk}
    key = durable.sha256_bytes(durable.canonical_json(named))
    outcomes, sampling = Outcomes(mix.entries), asdict(config.sampling)
    weights = folder.weights_digest if folder else None

    def line(sample: Sample) -> str:
        place = index + sample.item * count
        row = _row(sample, draws, place, texts, seed=config.seed, weights=weights, outcomes=outcomes)
        return json.dumps({**row, "sampling": sampling}, ensure_ascii=False)

    starts, root = range(0, len(draws), config.chunk), keep / "rollouts"
    files = [keep / "samples" / key[:16] / f"{number:04d}.jsonl" for number in range(len(starts))]
    made = backend.from_writer([path.is_file() for path in files])
    scores = backend.speaks and not all(made)
    with mix_scorer(mix.entries, config.verifiers, config.verify_limit_s, wanted=scores) as scorer:
        work = Work(config, folder, mix, prompts, scorer, texts, texts.stop_ids, root=root, identity=key, stop=stop)
        maker: Maker | None = None
        for number, (start, path) in enumerate(zip(starts, files)):
            items = range(start, min(start + config.chunk, len(draws)))
            if not made[number]:
                maker = maker or backend.maker(work)
                samples = _collected(maker, number, items, len(draws))
                if failed := _failed_entry(samples, draws):
                    name, theirs = failed
                    if backend.is_writer:
                        journal.drop_failures(root, number, key)
                    raise failed_verdicts(theirs, f"mix.entries.{name}")
                if backend.is_writer:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    durable.write_file(path, "".join(f"{line(sample)}\n" for sample in samples))
                    journal.forget(root, number + 1)
            progress(items.stop, len(draws), "prompts")
    return files


def _spelled(config: GenerateSettings, folder: ModelFolder | None, draws: list[Draw]) -> tuple[Listed, Texts]:
    """Return an element's prompts as tokens, and what turns tokens into texts; neither where the model is another's."""
    if folder is None:
        return Unspelled(draws), OthersTexts()
    tokenizer, encoding = encoding_of(config, folder)
    return Listed(draws, encoding), Texts(tokenizer, stop_ids_of(folder, tokenizer))


def _collected(maker: Maker, number: int, items: range, prompts: int) -> list[Sample]:
    """Return the samples of chunk `number`, which are those of `items` of so many prompts."""
    maker.begin(number)
    try:
        return maker.collect(items)
    except Stopped as stopped:
        done = items.start + len(items) * stopped.done / (stopped.total + 1)
        raise Stopped(done, prompts, "prompt") from None


def _failed_entry(samples: list[Sample], draws: list[Draw]) -> tuple[str, list[Sample]] | None:
    """Return an entry of the mix whose every verdict in a chunk failed, and its samples there; None where none is such.

    Some prompts have to be there, as far as there are so many: a lone one may be odd by itself.
    """
    by_entry: dict[str, list[Sample]] = {}
    for sample in samples:
        by_entry.setdefault(draws[sample.item].entry, []).append(sample)
    every = Counter(draw.entry for draw in draws)
    for name, theirs in by_entry.items():
        enough = len({sample.item for sample in theirs}) >= min(_PROMPTS_TO_TELL, every[name])
        if enough and all_failed(theirs):
            return name, theirs
    return None


def _row(
    sample: Sample, draws: list[Draw], place: int, texts: Texts, *, seed: int, weights: str | None, outcomes: Outcomes
) -> dict[str, Any]:
    """Return one line of what rejection reads; `place` is the prompt's among all elements'."""
    draw, tokens = draws[sample.item], sample.tokens.tolist()
    prompt, best = draw.item.prompt, outcomes.best(draw.entry, draw.item)
    return {
        "prompt_id": draw.item.uid,
        **({"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}),
        "completion": texts.spell(tokens, sample.finish) if sample.text is None else sample.text,
        **texts.spell_turns(tokens, sample.logprobs),
        "finish": sample.finish,
        "tokens": sample.length,
        "correct": outcomes.is_right(draw.entry, draw.item, sample.reward, sample.parts),
        "answer": sample.answer,
        "reward": sample.reward,
        **({} if best is None else {"best": best}),
        "parts": dict(sample.parts),
        "note": sample.note,
        "task": draw.entry,
        "place": place,
        "sample": sample.number,
        "seed": seed,
        "weights": weights,
        **sample.beside,
    }
