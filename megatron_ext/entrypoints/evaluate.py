"""Accuracy of a model folder over distinct prompts, by the tasks' own verifiers (the numbers: data_tools/evaluations).

It is that of greedy answers, and of samples at a temperature their mean, pass@k and maj@k. With `compare_with` also
what was gained over an earlier evaluation, prompt by prompt. Where a task's rewards are more than right and wrong, also
their mean and the regret to the best of the row; where it does not say which are right, these stand in place of
accuracy.

Of a task that compares choices (multiple_choice, mmlu, arc_* with `answered_by: likelihood`) nothing is generated: the
likeliest choice is the answer (rl/likelihood.py), and `accuracy_normalized` stands beside the accuracy.

The prompts are the rows of a task, or those of a mix: any tasks that generate and grpo take, each told by itself.
An element takes all prompts of one task, or element i of n takes distinct prompts i, i + n, i + 2n, … of them all;
data-parallel ranks share an element's the same way. `finish` adds the counts. Both are read by data_tools/tasks/mix.py:
files as given, then the synthetic stream; every row is accounted for.
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from data_tools.base import durable
from data_tools.base.declared import EVALUATIONS, SEEDS, STORES, setting, with_default
from data_tools.chats.prompts import PromptEncoder
from data_tools.chats.tokenizer import load_tokenizer, told_opening
from data_tools.evaluations import harness
from data_tools.evaluations.accuracy import accuracy, unclear_names, write_tables
from data_tools.evaluations.lines import RESULT, SAMPLES, Line, compared_lines
from data_tools.mistake import Problem, UserMistake, nearest
from data_tools.progress import Progress, Stop, never, silent, stopping
from data_tools.tasks.messages import check_template
from data_tools.tasks.mix import Entry, Loaded, Mix, MixConfig, check_mix, compared, entries_of, load
from data_tools.tasks.outcome import is_graded, is_unjudged
from data_tools.tasks.task import Prompt, Row, Source, check_rows, load_task
from megatron_ext.entrypoints import generate
from megatron_ext.foreign import backends
from megatron_ext.parallel.parts import OPENAI
from megatron_ext.parallel.plan import Site
from megatron_ext.preflight import facts
from megatron_ext.rollout import memory
from megatron_ext.rollout.room import check_room
from megatron_ext.rollout.settings import Sampling, SamplingSettings, check_alone, check_recording, check_rollouts

if TYPE_CHECKING:
    from megatron_ext.model_folders.model_folder import ModelFolder
    from megatron_ext.rl.makers import Backend


@dataclass
class Config(SamplingSettings):
    """Accuracy of a model folder: the config of the phase evaluate."""

    task: str = setting("calculator", "the task whose rows are asked", example="gsm8k", module=True)
    task_options: dict[str, Any] = setting(dict, "options of the task", example={"reverse_digits": True}, free=True)
    source: Source = setting(Source, "where the rows of the task come from")
    limit: int = setting(0, "distinct prompts, at most; 0: all", unit="prompts", least=0)
    mix: MixConfig = setting(MixConfig, "in place of task, source and limit: the prompts of these tasks")
    macro: dict[str, list[str]] = setting(
        dict, "means over tasks of mix, by name: the list of tasks, each of which counts alike",
        example={"sums": ["gsm8k", "svamp"]}, free=True,
        keyed="if_set",
    )  # fmt: skip
    max_new_tokens: int = setting(
        16, "new tokens of a completion, at most: what grpo and generate call sampling.max_tokens",
        unit="tokens", least=1,
    )  # fmt: skip
    max_turns: int = setting(
        0, "turns of the model, at most, in tasks that reply; 0: as many as max_new_tokens leaves room for",
        unit="turns", least=0,
    )  # fmt: skip
    samples: int = setting(
        0, "samples of each prompt, at `temperature`, besides the greedy one", unit="samples", least=0
    )
    temperature: float = setting(
        1.0, "temperature of the samples; greedy accuracy is always there", above=0, example=0.7
    )
    top_p: float = with_default(Sampling, "top_p", 1.0)
    seed: int = setting(0, "noise of the samples", **SEEDS)
    compare_with: str | None = setting(
        None,
        "output of another evaluation, for the gain over it",
        example="${phases.before.out}",
        input=True,
        made_by=EVALUATIONS,
    )
    seen_in: str | None = setting(
        None,
        "training token store: prompts seen in training count apart",
        example="${phases.data.out}",
        input=True,
        made_by=STORES,
    )


@dataclass(frozen=True)
class Share:
    """Says which prompts an element takes: all of the task `only`, or each `count`-th from `index`."""

    index: int
    count: int
    only: str = ""

    @property
    def folder(self) -> str:
        """Return the name of what it keeps its samples in."""
        return f"task_{quote(self.only, safe='')}" if self.only else f"element_{self.index:04d}"


def check(config: Config, ranks: int, site: Site | None = None) -> list[Problem]:
    """Return what can be refused before anything runs; `site` says what is known of `ranks` ranks yet to come."""
    problems = []
    if not of_mix(config):
        problems += check_rows(config.task, config.task_options, config.source)
    else:
        problems += check_mix(config.mix, training=False, comparing=True)
        own = ("task", "task_options", "source", "limit", "seen_in")
        if beside := [name for name in own if getattr(config, name) != getattr(Config(), name)]:
            message = f"is given beside {', '.join(beside)}: for the rows of one task; say it in mix.entries"
            problems.append(Problem("mix", message))
    problems += _check_tasks(config)
    if config.compare_with and not config.samples:
        problems.append(Problem("compare_with", "samples are compared, and samples is 0: give some, or leave it out"))
    problems += check_rollouts(config, Sampling())
    site = site or Site(ranks)
    if config.backend == OPENAI:
        ways = [way.sampling for way in _ways(config, {})]
        return problems + backends.check_server(_asked(config), ways, site, "")
    training = facts.forward(config, site)
    problems += check_template(config.mix, facts.model_template(config.model, site), config.model)
    new, where, work = config.max_new_tokens, "max_new_tokens", _work(config)
    if config.is_foreign:
        temperature = config.temperature if config.samples else 0.0
        asked = backends.Asked(Sampling(temperature, max_tokens=new, top_p=config.top_p), where)
        return problems + backends.check(_asked(config), asked, site, shape=training.shape)
    problems += backends.check_unused(config)
    problems += check_recording(config, training.shape)
    problems += check_room(config, training.shape, dtype=training.dtype, new=new, where=where)
    problems += facts.check_forward(config, site) + check_alone(config, compares=work.compares)
    return problems + memory.check(config, work, site)


def _asked(config: Config) -> Config:
    return config if of_mix(config) else replace(config, mix=MixConfig({config.task: _entry(config)}))


def _work(config: Config) -> memory.Forward:
    """Return what is sampled, and whether choices are compared."""
    try:
        entries = entries_of(config.mix) if of_mix(config) else {config.task: _entry(config)}
        choices = compared(entries)
    except UserMistake:  # which check told
        return memory.Forward(())
    sampled = {name: entry for name, entry in entries.items() if name not in choices}
    ways = _ways(config, sampled) if sampled else []
    return memory.Forward(tuple(generate.draws_of(way) for way in ways), bool(choices))


def _check_tasks(config: Config) -> list[Problem]:
    """Return what is wrong with the names of a mix's tasks, and with the means over them."""
    try:
        tasks = list(entries_of(config.mix))
    except UserMistake:  # which check_mix told
        return []
    problems = []
    for task, other in unclear_names(tasks).items():
        message = (
            f"the results named {task}_… would be those of {other or 'all prompts'} too: give the entry another name"
        )
        problems.append(Problem(f"mix.entries.{task}", f"{message}, with its `task`"))
    for name, names in config.macro.items():
        for task in names:
            if task not in tasks:
                problems.append(Problem(f"macro.{name}", f"no task {task!r} in mix{nearest(task, tasks)}"))
        if len(set(names)) < len(names) or len(names) < 2:
            message = f"{names}: name two tasks or more, each once; a mean over them counts each alike"
            problems.append(Problem(f"macro.{name}", message))
    return problems


def check_elements(config: Config, values: Sequence[Any]) -> list[str]:
    """Return what is wrong with the values of an array: they are the tasks of mix, each once, or say nothing."""
    named = [value for value in values if isinstance(value, str)]
    if not named:
        return []
    if not of_mix(config):
        mix = f"mix: {{entries: {{{', '.join(f'{name}: {{}}' for name in dict.fromkeys(named))}}}}}"
        return [f"{list(values)} names tasks of a mix, and there is none: give {mix}, or a number of elements, which"
                f" share the prompts of {config.task}"]  # fmt: skip
    try:
        tasks = list(entries_of(config.mix))
    except UserMistake:  # which check_mix told
        return []
    wrong = [f"{name!r} is no task of mix{nearest(name, tasks)}" for name in named if name not in tasks]
    if len(named) < len(values) or len(set(named)) < len(named):
        wrong.append(f"{list(values)}: name each task once, or give a number of elements, which share all prompts")
    elif missing := [task for task in tasks if task not in named]:
        wrong.append(f"no element takes {', '.join(missing)} of mix; name all tasks, or leave these out of mix")
    return wrong


def of_mix(config: Config) -> bool:
    """Return whether the prompts are those of a mix, not the rows of one task."""
    return bool(config.mix.entries or config.mix.environments)


def rows(config: Config) -> Loaded:
    """Return the rows of the task as a mix has them: verified, canonical, each once, at most `limit` (0: all)."""
    return load(config.task, _entry(config))


def _entry(config: Config) -> Entry:
    return Entry(config.task, config.task_options, config.source, limit=config.limit)


def run(
    config: Config,
    out: Path,
    keep: Path,
    progress: Progress = silent,
    stop: Stop = never,
    index: int = 0,
    count: int = 1,
    only: str = "",
    shared: Path | None = None,
) -> dict[str, Any]:
    """Evaluate element `index` of `count`, or the task `only` of a mix. Rank 0 writes OUT/samples.jsonl,
    OUT/result.json, the harness's samples and, for the only element, what is said of all. SHARED is what all elements
    keep together: a model that was exported; None: KEEP.

    Return the facts of accuracy.accuracy, and `records`: Mix.counts. Raise Stopped, with all that was sampled recorded,
    once `stop` says so.
    """
    problems = check(config, backends.world_size_of_environment())
    if problems:
        raise UserMistake(problems)
    folder, before = backends.folder_of(config), compared_lines(config.compare_with, config.samples)
    asking = replace(config, mix=MixConfig({only: entries_of(config.mix)[only]}), macro={}) if only else config
    share = Share(0, 1, only) if only else Share(index, count)
    lines_of_share = _lines_of_mix if of_mix(config) else _lines_of_rows
    with backends.opened(config, folder, shared or keep) as backend:
        lines, records = lines_of_share(asking, folder, keep, backend, progress=progress, stop=stop, share=share)
        writer, told = backend.is_writer, backend.facts()
    opening = told_opening(load_tokenizer(str(folder.hf)), config.bos) if folder else {}
    tasks, macro = _tasks(asking), asking.macro if count == 1 else {}
    result = {**accuracy(lines, before, tasks, macro), "records": records, **opening}
    if writer:
        evaluated = _evaluated(asking)
        items = {name: load(name, entry).items for name, entry in evaluated.entries.items()}
        harness.write_samples(out, evaluated, lines, harness.documents(evaluated, items))
        write_results(out, lines, result)
        if count == 1:
            harness.write_results(out, evaluated, lines, result)
            write_tables(keep, result, backends.which(config, folder))
            backends.forget(config, shared or keep)
    return {**result, **told}


def _tasks(config: Config) -> list[str]:
    return list(entries_of(config.mix)) if of_mix(config) else []


def _evaluated(config: Config) -> harness.Evaluated:
    """Return what was asked and how, for the files of the harness."""
    entries = entries_of(config.mix) if of_mix(config) else {config.task: _entry(config)}
    greedy: dict[str, Any] = {"do_sample": False, "temperature": 0.0, "max_gen_toks": config.max_new_tokens}
    sampled = {**greedy, "do_sample": True, "temperature": config.temperature, "top_p": config.top_p}
    model = config.model or config.endpoint.model
    return harness.Evaluated(entries, model, config.samples, seed=config.seed, greedy=greedy, sampled=sampled)


def write_results(out: Path, lines: Sequence[Line], result: Mapping[str, Any]) -> None:
    """Write the lines, but for their samples' texts, which the files of the harness have, and the result."""
    kept = ({name: value for name, value in line.items() if name != "completions"} for line in lines)
    durable.write_file(out / SAMPLES, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
    durable.write_json(out / RESULT, result)


def _ways(config: Config, entries: dict[str, Entry]) -> list[generate.Config]:
    """Return how these entries are sampled: greedily, and where samples are asked for at a temperature too."""
    greedy = Sampling(temperature=0, max_tokens=config.max_new_tokens, max_turns=config.max_turns)
    shared = {field.name: getattr(config, field.name) for field in fields(SamplingSettings)}
    shared["mix"] = MixConfig(entries)
    ways = [generate.Config(**shared, seed=config.seed, samples=1, sampling=greedy)]
    if config.samples:
        sampling = replace(greedy, temperature=config.temperature, top_p=config.top_p)
        ways.append(replace(ways[0], samples=config.samples, sampling=sampling))
    return ways


def _lines_of_mix(
    config: Config,
    folder: "ModelFolder | None",
    keep: Path,
    backend: "Backend",
    *,
    progress: Progress,
    stop: Stop,
    share: Share,
    only_ended: bool = False,
) -> tuple[list[Line], dict[str, Any]]:
    """Return a line for each prompt of this element, and Mix.counts, on every rank. What KEEP has is not sampled again.

    `only_ended`: a completion that was cut off is never right.
    """
    entries = entries_of(config.mix)
    choices = {name: entries.pop(name) for name in compared(entries)}
    element, by_way, records = keep / "sampled" / share.folder, [], {}
    for kept, way in zip((element / "greedy", element / "samples"), _ways(config, entries) if entries else ()):
        samples = generate.sampled(
            way, folder, kept, backend, index=share.index, count=share.count, progress=progress, stop=stop
        )
        by_way.append(samples)
        records = generate.records_of(kept) if backend.is_writer else {}
    for sample in itertools.chain(*by_way) if only_ended else ():
        sample["correct"] = sample["correct"] and sample["finish"] == "stop"
    lines = {sample["prompt_id"]: line_of(sample) for sample in by_way[0]} if by_way else {}
    if config.samples and by_way:
        add_samples(lines, by_way[1])
    asked = stopping(progress, stop) if backends.world_size_of_environment() == 1 else progress
    found, theirs = _compared_choices(config, folder, choices, backend, progress=asked, share=share)
    return backend.from_writer(([*lines.values(), *found], {**records, **theirs}))


def _compared_choices(
    config: Config,
    folder: "ModelFolder | None",
    entries: dict[str, Entry],
    backend: "Backend",
    *,
    progress: Progress,
    share: Share,
) -> tuple[list[Line], dict[str, Any]]:
    """Return a line for each question of this element whose choices are compared, and their Mix.counts."""
    if not entries:
        return [], {}
    assert folder is not None  # `check` refuses it of a server
    from megatron_ext.rl.prompts import Encoding, all_of

    mix = Mix(entries, config.seed)
    positions = folder.family.config.shape(folder.dims).max_positions or 2**62  # 0: no limit
    encoder = PromptEncoder(load_tokenizer(str(folder.hf)), config.chat_arguments, config.bos)
    draws = all_of(mix, list(mix.items))[share.index :: share.count]
    lines = backend.likeliest(draws, Encoding(encoder, positions), progress)
    return list(lines), mix.counts()


def line_of(sample: Mapping[str, Any]) -> Line:
    """Return the line of a prompt from its greedy sample."""
    line: Line = {"prompt": sample["prompt_id"]}
    line |= {name: sample[name] for name in ("completion", "turns", "finish", "reward", "note") if name in sample}
    line["correct"] = None if is_unjudged(sample) else bool(sample["correct"])
    line["said"] = generate.vote(sample)[0]
    line |= {"seen": None, "kind": sample["task"]}
    if is_graded(sample):
        line |= {"answer": sample["answer"], "best": sample.get("best")}
    return line


def add_samples(lines: Mapping[str, Line], samples: Sequence[Mapping[str, Any]]) -> None:
    """Add to each line what the samples of its prompt answered, and how many of them are right, or not scored."""
    for line in lines.values():
        line["votes"], line["completions"] = [], []
    for sample in samples:
        line = lines[sample["prompt_id"]]
        answer, right = generate.vote(sample)
        line["completions"].append(sample["completion"])
        line["votes"].append((answer, None if is_unjudged(sample) else right))
        if sample["reward"] is None:
            line["sampled_unscored"] = line.get("sampled_unscored", 0) + 1
        if is_graded(sample):
            line.setdefault("graded", []).append(generate.outcome(sample))
    for line in lines.values():
        line |= {"sampled_correct": sum(bool(right) for _, right in line["votes"]), "sampled": len(line["votes"])}


def _lines_of_rows(
    config: Config,
    folder: "ModelFolder | None",
    keep: Path,
    backend: "Backend",
    *,
    progress: Progress,
    stop: Stop,
    share: Share,
) -> tuple[list[Line], dict[str, Any]]:
    """Return a line for each row of this element, and Mix.counts of the task, on every rank.

    They are sampled and scored as the mix of this one task; an answer that does not end is wrong here.
    """
    kind, loaded = getattr(load_task(config.task), "kind", None), rows(config)
    asked = _asked(config)
    lines, records = _lines_of_mix(
        asked, folder, keep, backend, progress=progress, stop=stop, share=share, only_ended=True
    )
    items = {item.uid: item for item in loaded.items}
    element = [items[line["prompt"]] for line in lines]
    finished, rows_asked = [], Counter(item.prompt for item in loaded.items)
    for line, item, seen in zip(lines, element, _seen([item.prompt for item in element], config.seen_in)):
        line |= {"prompt_id": item.uid} if rows_asked[item.prompt] > 1 else {}  # rows of one text are told apart
        line |= {"prompt": item.prompt, "answer": item.answer, "seen": seen}
        line |= {"kind": kind(Row(item.prompt, item.answer)) if kind and isinstance(item.prompt, str) else None}
        finished.append({name: value for name, value in line.items() if name != "kind" or kind})
    return finished, records


def _seen(prompts: Sequence[Prompt], store_folder: str | None) -> list[bool | None]:
    """Return whether each prompt occurs in the store; None each when no store is named, or the prompt is no text."""
    if not store_folder:
        return [None] * len(prompts)
    from data_tools.packs.store import Store, text_hash

    known = {tuple(pair) for pair in Store(Path(store_folder)).prompt_hashes.tolist()}
    return [tuple(text_hash(prompt)) in known if isinstance(prompt, str) else None for prompt in prompts]


def finish(config: Config, parts: list[Path], out: Path, keep: Path) -> dict[str, Any]:
    """Join the elements' samples, in element order, and their counts. One process."""
    lines = list(generate.lines_of([part / SAMPLES for part in parts]))
    told = [generate.told_of_parts([part]) for part in parts]
    records = {name: counts for one in told for name, counts in one["records"].items()}
    result = {
        **accuracy(lines, compared_lines(config.compare_with, config.samples), _tasks(config), config.macro),
        **told[0],
        "records": records,
    }
    evaluated = _evaluated(config)
    write_results(out, lines, result)
    harness.join_samples(out, evaluated, parts)
    harness.write_results(out, evaluated, lines, result)
    write_tables(keep, result, backends.which(config, backends.folder_of(config)))
    backends.forget(config, keep)
    return result


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
