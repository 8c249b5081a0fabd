"""An evaluation in the layout of lm-evaluation-harness 0.4, for those who have tools that read it.

    FOLDER/results.json          results, groups, group_subtasks, configs, versions, n-shot, higher_is_better, n-samples
    FOLDER/samples_TASK.jsonl    a line for each prompt and filter: doc, arguments, resps, filtered_resps, its metrics

The names are theirs (lm_eval/result_schema.py), but for the files' dates: the same evaluation writes the same bytes.
Filters are `greedy` and `sampled` (at the temperature), and `none` where choices are compared. `intervals` is ours.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from data_tools.base import durable
from data_tools.base.json_text import json_line
from data_tools.base.one_file import has_part
from data_tools.evaluations.accuracy import MEANS, Values, intervals_of, samples_of, values_of
from data_tools.evaluations.lines import Line, asked
from data_tools.records import readers
from data_tools.records.merge_sorted import merged
from data_tools.tasks.estimators import standard_error
from data_tools.tasks.mix import Entry, compared
from data_tools.tasks.task import Item, code_digest, load_task

FOLDER, RESULTS = "harness", "results.json"
_DIGITS = 12  # of the digest that stands for a task's version
_NONE, _GREEDY, _SAMPLED = "none", "greedy", "sampled"


@dataclass(frozen=True)
class Evaluated:
    """Holds what was asked of which model, and how: what `configs` and `config` of the results say."""

    entries: Mapping[str, Entry]  # by the names of the tasks
    model: str
    samples: int  # of a prompt, at the temperature, besides the greedy one
    seed: int
    greedy: Mapping[str, Any]  # settings of generation
    sampled: Mapping[str, Any]


def documents(evaluated: Evaluated, items: Mapping[str, Sequence[Item]]) -> dict[str, tuple[int, Item]]:
    """Return the place in its task and the item of each prompt, by each name that a line may give it."""
    found = {}
    for name in evaluated.entries:
        for place, item in enumerate(items[name]):
            found[item.uid] = found[asked({"prompt": item.prompt})] = place, item
    return found


def write_samples(
    out: Path, evaluated: Evaluated, lines: Sequence[Line], found: Mapping[str, tuple[int, Item]]
) -> None:
    """Write OUT/FOLDER/samples_TASK.jsonl of an element's lines, which give their samples' texts as `completions`."""
    for name, group in _by_task(evaluated, lines).items():
        values = _with_majorities(values_of(group), evaluated.entries[name].task or name)
        placed = sorted(group, key=lambda line: found[asked(line)][0])
        rows = [row for line in placed for row in _rows(evaluated, line, values, found[asked(line)])]
        text = "".join(json_line(row, default=str) for row in rows)
        (out / FOLDER).mkdir(exist_ok=True)
        durable.write_file(_file(out, name), text)


def _with_majorities(values: Values, task: str) -> Values:
    """Return the measures in one order, with maj@k of 0 where a task has votes and no prompt of an element cast one.

    So the lines are the same for any number of elements."""
    if hasattr(load_task(task), "final_answer"):
        passed = {name.replace("pass@", "maj@"): each for name, each in values.items() if name.startswith("pass@")}
        values = {name: dict.fromkeys(each, 0.0) for name, each in passed.items()} | values
    return dict(sorted(values.items()))


def join_samples(out: Path, evaluated: Evaluated, parts: Sequence[Path]) -> None:
    """Join the samples of all elements, in the order of the prompts. Elements of an older afterok have none."""
    (out / FOLDER).mkdir(exist_ok=True)
    for name in evaluated.entries:
        files = [_file(part, name) for part in parts if has_part(_file(part, name))]
        if files:
            with merged(files, _read, lambda row: row["doc_id"], scratch=out) as rows:
                text = "".join(map(json_line, rows()))
            durable.write_file(_file(out, name), text)


def write_results(out: Path, evaluated: Evaluated, lines: Sequence[Line], result: Mapping[str, Any]) -> None:
    """Write OUT/FOLDER/results.json of all lines; `result` is what accuracy.py says of them, with `records`."""
    groups = _by_task(evaluated, lines)
    tables: dict[str, Any] = {name: {} for name in ("results", "higher_is_better", "n-samples", "intervals")}
    for name, group in groups.items():
        values, choices = values_of(group), _is_compared(group)
        metrics = {measure: _metric(measure, choices, samples_of(group)) for measure in values}
        tables["results"][name] = {"name": name, "alias": name, "sample_len": len(group), **_means(values, metrics)}
        tables["higher_is_better"][name] = {metric: metric != "regret" for metric, _ in metrics.values()}
        rows = result["records"].get(name, {}).get("rows", len(group))
        tables["n-samples"][name] = {"original": rows, "effective": len(group)}
        pairs = intervals_of(values, samples_of(group))
        tables["intervals"][name] = {",".join(metrics[measure]): pairs[measure] for measure in pairs}
    macro: Mapping[str, Any] = result.get("macro", {})
    groups_told = {name: _told_group(f"macro {name}", mean) for name, mean in macro.items()}
    told = {
        "results": tables["results"] | groups_told,
        **({"groups": groups_told} if macro else {}),
        "group_subtasks": {name: mean["tasks"] for name, mean in macro.items()},
        "configs": {name: _config(evaluated, name) for name in groups},
        "versions": {name: _version(evaluated.entries[name].task or name) for name in groups},
        "n-shot": dict.fromkeys(groups, 0),
        "higher_is_better": tables["higher_is_better"],
        "n-samples": tables["n-samples"],
        "intervals": tables["intervals"],
        "config": {"model": "afterok", "model_args": {"model": evaluated.model}, "random_seed": evaluated.seed},
    }
    (out / FOLDER).mkdir(exist_ok=True)
    durable.write_json(out / FOLDER / RESULTS, told)


def configs_of(folder: Path) -> dict[str, Any]:
    """Return how each task was asked, as an evaluation wrote it; {} of one of an older afterok."""
    file = folder / FOLDER / RESULTS
    return durable.read_json(file)["configs"] if file.is_file() else {}


def _by_task(evaluated: Evaluated, lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Return the lines of each task that has some. In rows of one task a line's `kind` is what the task tells apart."""
    if len(evaluated.entries) == 1:
        return {name: list(lines) for name in evaluated.entries if lines}
    groups = {name: [line for line in lines if line["kind"] == name] for name in evaluated.entries}
    return {name: group for name, group in groups.items() if group}


def _file(folder: Path, task: str) -> Path:
    return folder / FOLDER / f"samples_{quote(task, safe='')}.jsonl"


def _read(file: Path) -> Iterator[dict[str, Any]]:
    for record in readers.records_of_part(file):
        if record.problem:
            raise record.mistake(remedy="restore the file, or evaluate again")
        yield record.value


def _is_compared(lines: Sequence[Line]) -> bool:
    return any("log_likelihoods" in line for line in lines)


def _metric(measure: str, choices: bool, samples: int) -> tuple[str, str]:
    """Return the harness's name of a measure, and the filter that it is of."""
    if measure in ("accuracy", "accuracy_normalized"):
        return ("acc" if measure == "accuracy" else "acc_norm", _NONE) if choices else ("exact_match", _GREEDY)
    if measure == "sampled_accuracy":
        return f"avg@{samples}", _SAMPLED
    if measure.startswith(("pass@", "maj@")):
        return measure, _SAMPLED
    return measure.removeprefix("sampled_"), _SAMPLED if measure.startswith("sampled_") else _GREEDY


def _means(values: Values, metrics: Mapping[str, tuple[str, str]]) -> dict[str, float | str]:
    """Return mean and standard error of each measure over prompts; for what is not known the harness says N/A."""
    told: dict[str, float | str] = {}
    for measure, by_prompt in values.items():
        each, (metric, of) = list(by_prompt.values()), metrics[measure]
        told[f"{metric},{of}"] = sum(each) / len(each)
        error = standard_error(each)
        told[f"{metric}_stderr,{of}"] = "N/A" if error is None else error
    return told


def _told_group(alias: str, mean: Mapping[str, Any]) -> dict[str, Any]:
    names = dict(zip(MEANS, ("acc,none", "acc_norm,none", "acc,sampled")))
    return {"alias": alias, **{names[measure]: mean[measure] for measure in MEANS if measure in mean}}


def _rows(evaluated: Evaluated, line: Line, values: Values, document: tuple[int, Item]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a prompt: of its choices, or of its greedy completion and of its samples."""
    place, item = document
    prompt = item.prompt if isinstance(item.prompt, str) else json.dumps(item.prompt, ensure_ascii=False)
    doc = {"prompt" if isinstance(item.prompt, str) else "messages": item.prompt, "answer": item.answer}
    samples = line.get("sampled", 0)

    def row(of: str, asked_as: list[Any], said: list[Any], answers: list[Any], **more: Any) -> dict[str, Any]:
        names = {measure: _metric(measure, of == _NONE, samples) for measure in values}
        metrics = {
            metric: values[measure][asked(line)]
            for measure, (metric, kind) in names.items()
            if kind == of and asked(line) in values[measure]
        }
        whole = doc | more
        return {
            "doc_id": place,
            "doc": whole,
            "target": str(item.answer),
            "arguments": {f"gen_args_{n}": {"arg_0": one[0], "arg_1": one[1]} for n, one in enumerate(asked_as)},
            "resps": said,
            "filtered_resps": answers,
            "filter": of,
            "metrics": list(metrics),
            "doc_hash": _hash(json.dumps(whole, indent=2, ensure_ascii=False, default=str)),
            "prompt_hash": _hash(asked_as[0][0]),
            "target_hash": _hash(str(item.answer)),
            **metrics,
        }

    if "log_likelihoods" in line:
        texts = list(item.columns["choices"])
        likely = [[value, None] for value in line["log_likelihoods"].values()]  # whether greedy would say it: unknown
        asked_as = [[prompt.rstrip(), f" {text}"] for text in texts]
        yield row(_NONE, asked_as, [[one] for one in likely], likely, choices=texts)
        return
    yield row(_GREEDY, [[prompt, dict(evaluated.greedy)]], [[line["completion"]]], [line["said"]])
    if samples:
        answers = [answer for answer, _ in line["votes"]]
        yield row(_SAMPLED, [[prompt, dict(evaluated.sampled)]], [line["completions"]], [answers])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _config(evaluated: Evaluated, name: str) -> dict[str, Any]:
    """Return how a task was asked, under the names of a task's YAML in the harness."""
    entry = evaluated.entries[name]
    task = load_task(entry.task or name)
    told = {
        "task": name,
        "dataset_path": entry.hub or ("" if entry.source.inputs or entry.source.synthetic_rows else task.HUB),
        "dataset_kwargs": asdict(entry.source),
        "num_fewshot": 0,
        "metadata": {"scored_by": entry.task or name, "options": dict(entry.options), "limit": entry.limit},
    }
    if compared({name: entry}):
        return told | {"output_type": "multiple_choice"}
    sampled = {"sampled_kwargs": dict(evaluated.sampled)} if evaluated.samples else {}
    kwargs = {"generation_kwargs": dict(evaluated.greedy), **sampled, "repeats": max(1, evaluated.samples)}
    return told | {"output_type": "generate_until", **kwargs}


@cache
def _version(name: str) -> str:
    """Return what stands for a task's version: the digest of the code that scores, its own file or all of ours."""
    if theirs := code_digest(name):
        return theirs[:_DIGITS]
    folder = Path(__file__).parents[1]
    files = [file for place in ("tasks", "answers") for file in sorted((folder / place).glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:_DIGITS]
