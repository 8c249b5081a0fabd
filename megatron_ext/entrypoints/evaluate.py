"""Accuracy of a model folder over distinct prompts, by the tasks' own verifiers: greedy, and of samples at a
temperature their mean, pass@k and maj@k. With `compare_with` also what was gained over an earlier evaluation, prompt by
prompt. Where a task's rewards are more than right and wrong, also their mean and the regret to the best of the row; where
it does not say which are right, these stand in place of accuracy.

The prompts are the rows of a task, or those of a mix: any tasks that generate and grpo take. Element i of n takes
distinct prompts i, i + n, i + 2n, …; data-parallel ranks share an element's the same way. `finish` adds the counts.
Both are read by data_tools/tasks/mix.py: files as given, then the synthetic stream; every row is accounted for.
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.base.declared import setting, with_default
from data_tools.base.tables import write_table
from data_tools.chats.samples import problem_of_evaluated
from data_tools.chats.tokenizer import load_tokenizer, told_opening
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, never, silent
from data_tools.records import readers
from data_tools.tasks.estimators import at_k, standard_error
from data_tools.tasks.mix import Entry, Loaded, MixConfig, check_mix, counts_table, load
from data_tools.tasks.outcome import graded, is_graded, is_unjudged
from data_tools.tasks.task import Row, Source, check_rows, load_task
from megatron_ext.entrypoints import generate
from megatron_ext.parallel.plan import Workload
from megatron_ext.parallel.rules import check as check_plan
from megatron_ext.rollout.settings import RolloutSettings, Sampling, check_rollouts

SAMPLES, RESULT = "samples.jsonl", "result.json"


@dataclass
class Config(RolloutSettings):
    """Accuracy of a model folder: the config of the phase evaluate."""

    task: str = setting("calculator", "the task whose rows are asked", module=True)
    task_options: dict[str, Any] = setting(dict, "options of the task", free=True)
    source: Source = setting(Source, "where the rows of the task come from")
    limit: int = setting(0, "distinct prompts, at most; 0: all", unit="prompts", least=0)
    mix: MixConfig = setting(MixConfig, "in place of task, source and limit: the prompts of these tasks")
    max_new_tokens: int = setting(16, "new tokens of a completion, at most", unit="tokens", least=1)
    max_turns: int = setting(
        0, "turns of the model, at most, in tasks that reply; 0: as many as max_new_tokens leaves room for",
        unit="turns", least=0,
    )  # fmt: skip
    samples: int = setting(
        0, "samples of each prompt, at `temperature`, besides the greedy one", unit="samples", least=0
    )
    temperature: float = setting(1.0, "temperature of the samples; greedy accuracy is always there", above=0)
    top_p: float = with_default(Sampling, "top_p", 1.0)
    seed: int = setting(0, "noise of the samples", free=True)
    compare_with: str | None = setting(None, "output of another evaluation, for the gain over it", input=True)
    seen_in: str | None = setting(None, "training token store: prompts seen in training count apart", input=True)


def check(config: Config, ranks: int) -> list[Problem]:
    """Return what can be refused before anything runs on `ranks` ranks."""
    problems = []
    if not of_mix(config):
        problems += check_rows(config.task, config.task_options, config.source)
    else:
        problems += check_mix(config.mix, training=False)
        own = ("task", "task_options", "source", "limit", "seen_in")
        if beside := [name for name in own if getattr(config, name) != getattr(Config(), name)]:
            message = f"is given beside {', '.join(beside)}: for the rows of one task; say it in mix.entries"
            problems.append(Problem("mix", message))
    if config.compare_with and not config.samples:
        problems.append(Problem("compare_with", "samples are compared, and samples is 0: give some, or leave it out"))
    problems += check_rollouts(config, Sampling())
    return problems + check_plan(config.parallel, Workload(ranks, backend=config.backend))


def of_mix(config: Config) -> bool:
    """Return whether the prompts are those of a mix, not the rows of one task."""
    return bool(config.mix.entries or config.mix.environments)


def rows(config: Config) -> Loaded:
    """Return the rows of the task as a mix has them: verified, canonical, each once, at most `limit` (0: all)."""
    return load(config.task, _entry(config))


def _entry(config: Config) -> Entry:
    return Entry(config.task, config.task_options, config.source, limit=config.limit)


def run(
    config: Config, out: Path, keep: Path, progress: Progress = silent, index: int = 0, count: int = 1
) -> dict[str, Any]:
    """Facts: as `_result`, and `records`: Mix.counts. Rank 0 writes OUT/samples.jsonl, OUT/result.json and, for the
    only element, the tables."""
    from megatron_ext.model_folders import model_folder
    from megatron_ext.parallel import ranks

    problems = check(config, ranks.world_size_of_environment())
    if problems:
        raise UserMistake(problems)
    folder, before = model_folder.open_folder(config.model), _compared(config)
    of = _of_mix if of_mix(config) else _of_rows
    with ranks.started(config.parallel):
        samples, records = of(config, folder, keep, progress, index, count)
        writer = ranks.is_writer()
    opening = told_opening(load_tokenizer(str(folder.hf)), config.bos)
    result = {**_result(samples, before), "records": records, **opening}
    if writer:
        durable.write_file(out / SAMPLES, "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
        durable.write_json(out / RESULT, result)
        if count == 1:
            _table(keep, result, folder.step)
    return result


def _ways(config: Config) -> list[generate.Config]:
    """A mix sampled greedily, and at a temperature."""
    plain = dict(
        model=config.model, mix=config.mix, chat_arguments=config.chat_arguments, bos=config.bos, seed=config.seed,
        dtype=config.dtype,
        verify_limit_s=config.verify_limit_s, verifiers=config.verifiers, engine=config.engine, backend=config.backend,
        parallel=config.parallel,
    )  # fmt: skip
    length = dict(max_tokens=config.max_new_tokens, max_turns=config.max_turns)
    ways = [generate.Config(**plain, samples=1, sampling=Sampling(temperature=0, **length))]
    if config.samples:
        sampling = Sampling(temperature=config.temperature, top_p=config.top_p, **length)
        ways.append(generate.Config(**plain, samples=config.samples, sampling=sampling))
    return ways


def _of_mix(
    config: Config, folder: Any, keep: Path, progress: Progress, index: int, count: int, only_ended: bool = False
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A line for each prompt of this element, and Mix.counts, on every rank. What KEEP has is not sampled again.

    `only_ended`: a completion that was cut off is never right.
    """
    from megatron_ext.model_folders import model_folder
    from megatron_ext.parallel import ranks
    from megatron_ext.weights.checkpoint import from_rank_zero

    load_once = cache(lambda: model_folder.load_model(folder, config.parallel, config.dtype, config.backend))
    found = []
    for number, way in enumerate(_ways(config)):
        kept = keep / "sampled" / f"element_{index:04d}" / ("greedy" if number == 0 else "samples")
        found.append(generate.sampled(way, folder, kept, index, count, progress, never, load_once))
    for sample in itertools.chain(*found) if only_ended else ():
        sample["correct"] = sample["correct"] and sample["finish"] == "stop"
    lines: dict[str, dict[str, Any]] = {}
    for sample in found[0]:
        told = {name: sample[name] for name in ("completion", "turns", "finish", "reward", "note") if name in sample}
        right = None if is_unjudged(sample) else bool(sample["correct"])
        told |= {"correct": right, "seen": None, "kind": sample["task"]}
        if is_graded(sample):
            told |= {"answer": sample["answer"], "best": sample.get("best")}
        told |= {"votes": []} if config.samples else {}
        lines[sample["prompt_id"]] = {"prompt": sample["prompt_id"], **told}
    for sample in found[1] if config.samples else ():
        line = lines[sample["prompt_id"]]
        line["votes"].append((generate.vote(sample)[0], None) if is_unjudged(sample) else generate.vote(sample))
        if is_graded(sample):
            line.setdefault("graded", []).append(generate.outcome(sample))
    for line in lines.values():
        line |= _counted(line.get("votes"))
    return from_rank_zero((list(lines.values()), generate.records_of(kept) if ranks.is_writer() else {}))


def _counted(votes: list | None) -> dict[str, Any]:
    return {} if votes is None else {"sampled_correct": sum(map(bool, (v[1] for v in votes))), "sampled": len(votes)}


def _of_rows(
    config: Config, folder: Any, keep: Path, progress: Progress, index: int, count: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a line for each row of this element, and Mix.counts of the task, on every rank.

    They are sampled and scored as the mix of this one task; an answer that does not end is wrong here.
    """
    kind, loaded = getattr(load_task(config.task), "kind", None), rows(config)
    alone = replace(config, mix=MixConfig({config.task: _entry(config)}))
    found, records = _of_mix(alone, folder, keep, progress, index, count, only_ended=True)
    items = {item.uid: item for item in loaded.items}
    mine = [items[line["prompt"]] for line in found]
    samples, asked = [], Counter(item.prompt for item in loaded.items)
    for line, item, seen in zip(found, mine, _seen([item.prompt for item in mine], config.seen_in)):
        line |= {"prompt_id": item.uid} if asked[item.prompt] > 1 else {}  # rows of one text are told apart
        line |= {"prompt": item.prompt, "answer": item.answer, "seen": seen}
        line |= {"kind": kind(Row(item.prompt, item.answer)) if kind else None}
        samples.append({name: value for name, value in line.items() if name != "kind" or kind})
    return samples, records


def _seen(prompts: list[str], store_folder: str | None) -> list[bool | None]:
    """Whether each prompt occurs in the store; None each when no store is named."""
    if not store_folder:
        return [None] * len(prompts)
    from data_tools.packs.store import Store, text_hash

    known = {tuple(pair) for pair in Store(Path(store_folder)).prompt_hashes.tolist()}
    return [tuple(text_hash(prompt)) in known for prompt in prompts]


def _asked(line: Mapping[str, Any]) -> str:
    """Return what names the prompt of a line."""
    return line.get("prompt_id", line["prompt"])


def _compared(config: Config) -> dict[str, dict[str, Any]]:
    """The samples to compare with, by prompt. UserMistake where there are none, or two of a prompt."""
    if not config.compare_with:
        return {}
    file, found = Path(config.compare_with).expanduser() / SAMPLES, {}
    records = readers.records(file) if file.is_file() else [readers.Record(file, None, "there is no such file")]
    for record in records:
        if record.is_blank:
            continue
        if wrong := record.problem or problem_of_evaluated(record.value):
            message = f"{config.compare_with} is no output of an evaluation ({record.place}: {wrong}); name the folder"
            raise UserMistake(Problem("compare_with", f"{message} with {SAMPLES}"))
        if (key := _asked(record.value)) in found:
            message = f"{config.compare_with} has two lines of prompt {key!r}, the second at {record.place}"
            raise UserMistake(Problem("compare_with", f"{message}; evaluate it again, which tells them apart"))
        found[key] = record.value
    if not any("sampled" in line for line in found.values()):
        message = f"{config.compare_with} has greedy answers alone; evaluate it again with samples: {config.samples}"
        raise UserMistake(Problem("compare_with", message))
    return found


def _result(samples: list[dict[str, Any]], before: Mapping[str, dict[str, Any]] = {}) -> dict[str, Any]:
    """Counts and accuracies, overall and, where known, of prompts seen and not seen in training and of each kind."""
    result: dict[str, Any] = {}
    groups = {"": samples}
    if any(sample["seen"] is not None for sample in samples):
        groups["seen_"] = [sample for sample in samples if sample["seen"] is True]
        groups["unseen_"] = [sample for sample in samples if sample["seen"] is False]
    for kind in sorted({sample["kind"] for sample in samples if sample.get("kind")}):
        groups[f"{kind}_"] = [sample for sample in samples if sample.get("kind") == kind]
    for name, of in groups.items():
        correct = sum(map(bool, (sample["correct"] for sample in of)))
        result[f"{name}prompts"] = len(of)
        result[f"{name}correct"] = correct
        told = any(map(is_unjudged, of))
        result[f"{name}accuracy"] = correct / len(of) if of and not told else None
        if unscored := sum("reward" in sample and sample["reward"] is None for sample in of):
            result[f"{name}unscored"] = unscored  # which count as wrong
        result |= graded(of, name)
        sampled = [one for sample in of for one in sample.get("graded", ())]
        result |= graded(sampled, f"{name}sampled_")
        if of and "sampled" in of[0] and not (told or any(map(is_unjudged, sampled))):
            shares = [sample["sampled_correct"] / sample["sampled"] for sample in of]
            result[f"{name}sampled_accuracy"] = sum(shares) / len(shares)
            result[f"{name}sampled_error"] = standard_error(shares)
            result |= {name + key: value for key, value in at_k([sample["votes"] for sample in of]).items()}
            gains = [
                share - before[_asked(sample)]["sampled_correct"] / before[_asked(sample)]["sampled"]
                for sample, share in zip(of, shares)
                if "sampled" in before.get(_asked(sample), {})
            ]
            if gains:
                result[f"{name}gain"], result[f"{name}gain_error"] = sum(gains) / len(gains), standard_error(gains)
    return result


def _table(keep: Path, result: dict[str, Any], step: int) -> None:
    labels = {"": "all", "seen_": "seen in training", "unseen_": "not seen"}
    names = [name.removesuffix("prompts") for name in result if name.endswith("prompts")]
    columns, keys = ["prompts", "distinct", "correct", "greedy accuracy"], ["prompts", "correct", "accuracy"]
    largest = [name for kind in ("pass@", "maj@") for name in [name for name in result if name.startswith(kind)][-1:]]
    told = [("sampled", "sampled_accuracy"), ("± error", "sampled_error"), *zip(largest, largest)]
    told += [("mean reward", "reward"), ("regret", "regret")]
    told += [("sampled reward", "sampled_reward"), ("sampled regret", "sampled_regret")]
    for column, key in (*told, ("gain", "gain"), ("± error", "gain_error")):
        if key in result:
            columns, keys = [*columns, column], [*keys, key]
    spelled = {name: labels.get(name, name.rstrip("_").replace("_", " ")) for name in names}
    rows_ = [[spelled[name], *(result.get(name + key) for key in keys)] for name in names]
    write_table(keep, "accuracy", f"Accuracy at step {step}", columns, rows_)
    write_table(keep, "prompts", **counts_table(result["records"]))


def finish(config: Config, parts: list[Path], out: Path, keep: Path) -> dict[str, Any]:
    """Join the elements' samples, in element order, and their counts. One process."""
    from megatron_ext.model_folders import model_folder

    samples = list(generate.lines_of([part / SAMPLES for part in parts]))
    result = {**_result(samples, _compared(config)), **generate.told_of_parts(parts)}
    durable.write_file(out / SAMPLES, "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
    durable.write_json(out / RESULT, result)
    _table(keep, result, model_folder.open_folder(config.model).step)
    return result


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
