"""Samples of many prompts, chunk after chunk, by the collector of GRPO: what a kill interrupts goes on where it was.

KEEP/records.json         what became of the records of each task (Mix.counts)
KEEP/rollouts             tokens of the chunk under way (journal.py)
KEEP/samples/KEY/0003.jsonl    chunk 3 once it is whole; KEY names all that its samples depend on
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data_tools.base import durable
from data_tools.progress import Progress, Stop, Stopped
from data_tools.tasks.mix import Draw
from data_tools.tasks.outcome import Outcomes
from megatron_ext.model_folders.model_folder import ModelFolder
from megatron_ext.parallel.ranks import is_writer
from megatron_ext.rl import journal
from megatron_ext.rl.collect import Collector
from megatron_ext.rl.prompts import Listed, Texts, all_of, mix_scorer, prompts_of, stop_ids_of, turns_of
from megatron_ext.rl.samples import Sample
from megatron_ext.rl.settings import GenerateSettings
from megatron_ext.rl.untrained import all_failed, failed_verdicts
from megatron_ext.rollout.engine import Engine
from megatron_ext.weights.exchange import from_rank_zero

RECORDS = "records.json"
_PROMPTS_TO_TELL = 16  # that a task's verifier is broken


def run(
    config: GenerateSettings,
    folder: ModelFolder,
    keep: Path,
    load: Callable[[], torch.nn.Module],
    *,
    identity: dict[str, Any],
    index: int,
    count: int,
    progress: Progress,
    stop: Stop,
) -> list[Path]:
    """Return the files of samples of element `index` of `count`, in the order of its prompts; for rank 0 to read.

    The ranks are started. `load` gives the model, once it is needed. Raises Stopped, on every rank, once any was asked
    to stop: what was drawn is recorded, and it says which part of the prompts that is.
    """
    tokenizer, mix, encoding = prompts_of(config, folder)
    if is_writer():
        keep.mkdir(parents=True, exist_ok=True)
        durable.write_json(keep / RECORDS, mix.counts())
    draws = all_of(mix, list(mix.items))[index::count]
    prompts = Listed(draws, encoding)
    names = [draw.item.uid for draw in draws]
    named = {**identity, "prompts": names, "scoring": mix.scoring(draws), "chunk": config.chunk}
    key = durable.sha256_bytes(durable.canonical_json(named))
    stop_ids = stop_ids_of(folder, tokenizer)
    texts, outcomes, sampling = Texts(tokenizer, stop_ids), Outcomes(mix.entries), asdict(config.sampling)

    def line(sample: Sample) -> str:
        place = index + sample.item * count
        row = _row(sample, draws, place, texts, seed=config.seed, folder=folder, outcomes=outcomes)
        return json.dumps({**row, "sampling": sampling}, ensure_ascii=False)

    starts = range(0, len(draws), config.chunk)
    files = [keep / "samples" / key[:16] / f"{number:04d}.jsonl" for number in range(len(starts))]
    made = from_rank_zero([path.is_file() for path in files])
    with mix_scorer(mix.entries, config.verifiers, config.verify_limit_s, wanted=not all(made)) as scorer:
        collector: Collector | None = None
        for number, (start, path) in enumerate(zip(starts, files)):
            stop_at = min(start + config.chunk, len(draws))
            if not made[number]:
                if collector is None:
                    collector = Collector(
                        Engine(load(), config.engine, config.seed, stop_ids, detokenize=tokenizer.decode),
                        prompts,
                        scorer,
                        texts.spell,
                        sampling=config.sampling,
                        group=config.samples,
                        root=keep / "rollouts",
                        identity=key,
                        flush_s=config.record_s,
                        stop=stop,
                        turns=turns_of(mix, scorer, texts),
                        model=config.model,
                    )
                collector.begin(number)
                try:
                    samples = collector.collect(range(start, stop_at))
                except Stopped as stopped:
                    done = start + (stop_at - start) * stopped.done / (stopped.total + 1)
                    raise Stopped(done, len(draws), "prompt") from None
                collector.close()
                if failed := _failed_entry(samples, draws):
                    name, theirs = failed
                    if is_writer():
                        journal.drop_failures(keep / "rollouts", number, key)
                    raise failed_verdicts(theirs, f"mix.entries.{name}")
                collector.bring(samples, [], written=True)
                if is_writer():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    durable.write_file(path, "".join(f"{line(sample)}\n" for sample in samples))
                    journal.forget(keep / "rollouts", number + 1)
            progress(stop_at, len(draws), "prompts")
    return files


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
    sample: Sample, draws: list[Draw], place: int, texts: Texts, *, seed: int, folder: ModelFolder, outcomes: Outcomes
) -> dict[str, Any]:
    """Return one line of what rejection reads; `place` is the prompt's among all elements'."""
    draw, tokens = draws[sample.item], sample.tokens.tolist()
    prompt, best = draw.item.prompt, outcomes.best(draw.entry, draw.item)
    return {
        "prompt_id": draw.item.uid,
        **({"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}),
        "completion": texts.spell(tokens, sample.finish),
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
        "weights": folder.weights_digest,
    }
