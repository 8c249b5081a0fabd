"""Samples of a model folder on the prompts of tasks, with their rewards: JSONL for data_tools/prepare/rejection.py.

Element i of n takes prompts i, i + n, i + 2n, … of all the entries' prompts, entry after entry, chunk after chunk;
data-parallel ranks share a chunk. A requeued job goes on where it was (rl/generation.py). `finish` joins the elements'
samples in the order of the prompts: the same bytes for any number of elements.
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.base import durable
from data_tools.base.one_file import Files
from data_tools.base.tables import write_table
from data_tools.chats.tokenizer import load_tokenizer, told_opening
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, Stop, never, silent
from data_tools.records import readers
from data_tools.records.merge_sorted import merged
from data_tools.tasks.estimators import Vote, at_k, standard_error
from data_tools.tasks.messages import check_template
from data_tools.tasks.mix import check_mix, counts_table, entries_of
from data_tools.tasks.outcome import graded, is_unjudged
from megatron_ext.foreign import backends
from megatron_ext.parallel.parts import OPENAI
from megatron_ext.parallel.plan import Site
from megatron_ext.preflight import facts
from megatron_ext.rl.settings import GenerateSettings
from megatron_ext.rollout import memory
from megatron_ext.rollout.room import check_room
from megatron_ext.rollout.settings import check_alone, check_recording, check_rollouts
from megatron_ext.training import options

if TYPE_CHECKING:
    from megatron_ext.model_folders.model_folder import ModelFolder
    from megatron_ext.rl.makers import Backend

Config = GenerateSettings
SAMPLES, RESULT = "samples.jsonl", "result.json"
JOINED = ("records", "texts_begin")  # facts of all elements that are the same in each


def check(config: Config, ranks: int, site: Site | None = None) -> list[Problem]:
    """Return what can be refused before anything runs; `site` says what is known of `ranks` ranks yet to come."""
    problems = check_mix(config.mix, training=False)
    if config.samples > 1 and config.sampling.is_greedy:
        problems.append(Problem("sampling.temperature", f"0 gives {config.samples} samples all alike; use samples: 1"))
    problems += check_rollouts(config, config.sampling)
    site = site or Site(ranks)
    if config.backend == OPENAI:
        return problems + backends.check_server(config, [config.sampling], site, "sampling.")
    training = facts.forward(config, site)
    problems += check_template(config.mix, facts.model_template(config.model, site), config.model)
    if config.is_foreign:
        return problems + backends.check(config, backends.Asked(config.sampling), site, shape=training.shape)
    problems += backends.check_unused(config)
    problems += check_recording(config, training.shape)
    problems += check_room(config, training.shape, dtype=training.dtype, new=config.sampling.max_tokens)
    problems += facts.check_forward(config, site) + check_alone(config, compares=False)
    return problems + memory.check(config, memory.Forward((draws_of(config),)), site)


def draws_of(config: Config) -> memory.Draws:
    """Return what is sampled at a time: a chunk of prompts, or all where the entries say how many these are."""
    limits = [entry.limit for entry in config.mix.entries.values()]
    known = all(limits) and limits and not config.mix.environments
    prompts = min(config.chunk, sum(limits)) if known else config.chunk
    return memory.Draws(config.sampling, ((prompts, config.samples),))


def run(
    config: Config,
    out: Path,
    keep: Path,
    progress: Progress = silent,
    stop: Stop = never,
    index: int = 0,
    count: int = 1,
    shared: Path | None = None,
) -> dict[str, Any]:
    """Sample element `index` of `count`. Rank 0 writes OUT/samples.jsonl, for the first element OUT/result.json, which
    `finish` reads, and for the only one the tables.

    SHARED is what all elements keep together: a model that was exported; None: KEEP.

    Return the facts of `_result`, and `records`: Mix.counts. Raise Stopped on every rank, with all that was sampled
    recorded, once `stop` says so on any of them.
    """
    problems = check(config, backends.world_size_of_environment())
    if problems:
        raise UserMistake(problems)
    folder = backends.folder_of(config)
    with backends.opened(config, folder, shared or keep) as backend:
        kept = keep / f"element_{index:04d}"
        samples = sampled(config, folder, kept, backend, index=index, count=count, progress=progress, stop=stop)
        writer = backend.is_writer
        opening = told_opening(load_tokenizer(str(folder.hf)), config.bos) if folder else {}
        result = {**_result(samples), "records": records_of(kept), **opening} if writer else None
        result, told = backend.from_writer(result), backend.facts()
    if writer:
        durable.write_file(out / SAMPLES, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))
        if index == 0:
            durable.write_json(out / RESULT, result)
        if count == 1:
            _table(keep, result, backends.which(config, folder))
            backends.forget(config, shared or keep)
    return {**result, **told}


def sampled(
    config: Config,
    folder: "ModelFolder | None",
    keep: Path,
    backend: "Backend",
    *,
    index: int,
    count: int,
    progress: Progress,
    stop: Stop,
) -> list[dict[str, Any]]:
    """Return the lines of element `index` of `count` where `backend` writes, none elsewhere.

    What KEEP holds of the samples is not sampled again.
    """
    from megatron_ext.rl import generation

    identity = _identity(config, folder.weights_digest if folder else "")
    files = generation.run(
        config,
        folder,
        keep,
        backend,
        identity=identity,
        index=index,
        count=count,
        progress=progress,
        stop=stop,
    )
    return list(lines_of(files)) if backend.is_writer else []


def _identity(config: Config, digest: str) -> dict[str, Any]:
    """Return what samples must share to be gone on with: all that changes them. Prompts go by their names."""
    plain = {name: value for name, value in options.keyed(config).items() if name != "mix"}
    entries = {name: [entry.task, entry.options, entry.rewards] for name, entry in entries_of(config.mix).items()}
    return {**plain, **Config.meaning(config), "model": digest, "entries": entries}


def lines_of(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Yield the samples of these files, a line each. Raise UserMistake for a line that is damaged."""
    for file in files:
        for record in readers.records_of_part(file):
            if record.problem:
                raise record.mistake(remedy="restore the file, or sample again")
            yield record.value


def records_of(keep: Path) -> dict[str, Any]:
    """Return what became of the records of each task, as sampling left it in KEEP."""
    from megatron_ext.rl.generation import RECORDS

    return durable.read_json(keep / RECORDS)


def told_of_parts(parts: list[Path]) -> dict[str, Any]:
    """Return the facts JOINED, which each element found alike; no records where they did not write them down yet."""
    files = Files(parts[0])
    found = json.loads(files.read(RESULT)) if files.has(RESULT) else {}
    return {"records": {}, **{name: found[name] for name in JOINED if name in found}}


def _result(samples: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return counts, and over prompts the mean share of right samples with its error, pass@k and maj@k.

    Where rewards are more than right and wrong, their mean and the regret; where a task does not say which rewards are
    right, the accuracy is None.
    """
    counts = {"samples": 0, "correct": 0, "unscored": 0, "truncated": 0, "tokens": 0}
    by_prompt: dict[str, list[Vote]] = {}
    outcomes: list[dict[str, Any]] = []
    for sample in samples:
        right = bool(sample["correct"])
        by_prompt.setdefault(sample["prompt_id"], []).append(vote(sample))
        counts["samples"] += 1
        counts["correct"] += right
        counts["unscored"] += sample["reward"] is None
        outcomes.append(outcome(sample))
        counts["truncated"] += sample["finish"] in ("length", "turns")
        counts["tokens"] += sample["tokens"]
    shares = [sum(right for _, right in votes) / len(votes) for votes in by_prompt.values()]
    result: dict[str, Any] = {"prompts": len(shares), **counts}
    result |= {"accuracy": sum(shares) / len(shares) if shares else None, "accuracy_error": standard_error(shares)}
    if any(map(is_unjudged, outcomes)):
        return result | {"accuracy": None, "accuracy_error": None} | graded(outcomes)
    return result | at_k(list(by_prompt.values())) | graded(outcomes)


def outcome(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return what outcome.graded reads of one line of samples."""
    told = {name: sample.get(name) for name in ("reward", "correct", "best")}
    return {"prompt": sample["prompt_id"], "answer": vote(sample)[0], **told}


def vote(sample: Mapping[str, Any]) -> Vote:
    """Return what one line of samples answers, and whether it is right; what was cut off answers nothing."""
    return sample["answer"] if sample["finish"] == "stop" else None, bool(sample["correct"])


def _table(keep: Path, result: dict[str, Any], which: str) -> None:
    told = [list(pair) for pair in result.items() if pair[0] not in JOINED]
    write_table(keep, "samples", title=f"Samples {which}", columns=["what", "value"], rows=told)
    write_table(keep, "prompts", **counts_table(result["records"]))


def _order(sample: dict[str, Any]) -> Any:
    return sample["place"], sample["sample"]


def finish(config: Config, parts: list[Path], out: Path, keep: Path) -> dict[str, Any]:
    """Join the elements' samples in the order of the prompts. One process, few files open."""
    files = [part / SAMPLES for part in parts]
    with (
        merged(files, lambda file: lines_of([file]), _order, scratch=out) as samples,
        open(out / SAMPLES, "w", encoding="utf-8") as file,
    ):

        def written() -> Iterator[dict[str, Any]]:
            for sample in samples():
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")
                yield sample

        result = {**_result(written()), **told_of_parts(parts)}
    durable.write_json(out / RESULT, result)
    durable.fsync_tree(out)
    _table(keep, result, backends.which(config, backends.folder_of(config)))
    backends.forget(config, keep)
    return result


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
