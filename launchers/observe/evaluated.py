"""Reads what an evaluation asked and what was answered, for `afterok inspect`: prompt by prompt, right or wrong.

The files of the harness have prompts and all samples of each task (data_tools/evaluations/harness.py). Where there are
none, as in the output of run_exported, there are the lines of data_tools/evaluations/lines.py.
"""

from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from typing import Any
from urllib.parse import unquote

from data_tools.base.declared import EVALUATIONS
from data_tools.base.printing import as_float
from data_tools.evaluations.harness import FOLDER
from data_tools.evaluations.lines import SAMPLES
from data_tools.mistake import UserMistake
from jobs.artifacts.run_folder import FrozenPhase, RunFolder
from launchers.observe.sampled import MOST_SAMPLES, Group, SampleLine, ShownSamples, cut, draw_start, lines_of_log
from launchers.observe.sealed import find_sealed

KINDS = EVALUATIONS  # of phases whose sealed folder is an evaluation's
_NAMED = "samples_"  # begins the name of a task's file


def inspect_evaluation(
    run: RunFolder, phase: FrozenPhase, *, step: int | None, count: int, seed: int, characters: int
) -> ShownSamples:
    """Return `count` prompts of each task of a sealed evaluation with what was answered; another `seed` draws others.

    Raises:
        UserMistake: it is not sealed, or a step was asked for.
    """
    if step is not None:
        raise UserMistake(f"--step {step}: {phase.name} is a {phase.uses} phase, which has no steps")
    folder, notes, groups = find_sealed(run, phase.name)[1].folder, list[str](), list[Group]()
    files = sorted((folder / FOLDER).glob(f"{_NAMED}*.jsonl"))
    first = 1 if seed else 0  # a draw begins within a prompt's rows, which it leaves out
    for file in files:
        task = unquote(file.stem.removeprefix(_NAMED))
        rows = groupby(lines_of_log(file, notes, draw_start(file, seed), _is_row), key=lambda row: row["doc_id"])
        groups += [_of_rows(task, list(each), characters) for _, each in islice(rows, first, first + count)]
    file = folder / FOLDER if files else folder / SAMPLES
    if not files:
        lines = lines_of_log(file, notes, draw_start(file, seed), _is_line)
        groups += [_of_line(line, characters) for line in islice(lines, first, first + count)]
    if count and not groups:
        notes.append(f"{file} has no samples" + (" from there to its end; take another --seed" if seed else ""))
    return ShownSamples(phase.name, phase.uses, str(file), step=None, steps=[], groups=groups, notes=notes)


def _is_row(value: Any) -> bool:
    """Return whether a value is a row of the harness, whose parts are of the kinds that are shown."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("doc"), dict)
        and all(isinstance(value.get(name), list) and value[name] for name in ("resps", "filtered_resps"))
        and all(isinstance(each, list) for each in value["resps"])
        and {"doc_id", "filter"} <= value.keys()
    )


def _is_line(value: Any) -> bool:
    return isinstance(value, dict) and {"prompt", "completion"} <= value.keys()


def _of_rows(task: str, rows: list[dict[str, Any]], characters: int) -> Group:
    """Return the group of one prompt: its choices, or its greedy completion and then its samples."""
    doc = rows[0]["doc"]
    told = list(_told(rows))
    return Group(
        item=rows[0]["doc_id"],
        task=task,
        name=f"{rows[0]['doc_id']}, wanted {cut(str(doc.get('answer')), characters)}",
        prompt=cut(doc.get("prompt", doc.get("messages")), characters),
        samples=[_line(number, cut(text, characters), note) for number, (text, note) in enumerate(told[:MOST_SAMPLES])],
        left_out=max(0, len(told) - MOST_SAMPLES),
    )


def _told(rows: list[dict[str, Any]]) -> Iterator[tuple[Any, str]]:
    """Yield (text, what is said of it) of each choice, completion and sample of a prompt."""
    for row in rows:
        said, answers = row["resps"], row["filtered_resps"]
        if isinstance(row["doc"].get("choices"), list):
            for text, likely in zip(row["doc"]["choices"], said):
                yield text, f"log-likelihood {likely[0][0]:.4g}" if _is_likelihood(likely) else ""
        elif row["filter"] == "greedy":
            yield said[0][0] if said[0] else "", f"greedy, {_verdict(row)}{_answer(answers[0])}"
        else:
            given = answers[0] if isinstance(answers[0], list) else []
            for text, answer in zip(said[0], given):
                yield text, f"sampled{_answer(answer)}"


def _is_likelihood(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], list) and isinstance(value[0][0], float)


def _verdict(row: Mapping[str, Any]) -> str:
    """Return "right" or "wrong" of a greedy answer, or its measures where they are more than that."""
    if isinstance(correct := row.get("exact_match"), (int, float)):
        return "right" if correct == 1 else "wrong"
    measured = {name: row[name] for name in row.get("metrics", []) if isinstance(row.get(name), (int, float))}
    return ", ".join(f"{name} {value:.4g}" for name, value in measured.items()) or "not judged"


def _answer(answer: Any) -> str:
    return f", answers {cut(str(answer), 60)}" if answer not in (None, "") else ""


def _of_line(line: Mapping[str, Any], characters: int) -> Group:
    """Return the group of a prompt whose greedy completion alone has its text."""
    correct = line.get("correct")
    note = "not judged" if correct is None else "right" if correct else "wrong"
    note += f", {line.get('sampled_correct', 0)} of {line['sampled']} samples right" if line.get("sampled") else ""
    sample = _line(0, cut(line["completion"], characters), f"greedy, {note}{_answer(line.get('said'))}", line)
    name = str(line.get("prompt_id", line["prompt"]))
    wanted = f", wanted {cut(str(line['answer']), characters)}" if line.get("answer") is not None else ""
    task = str(line.get("kind") or "")
    return Group(name, task, cut(name, 60) + wanted, prompt=cut(line["prompt"], characters), samples=[sample])


def _line(number: int, completion: str, note: str, of: Mapping[str, Any] = {}) -> SampleLine:
    reward = of.get("reward")
    return SampleLine(
        number=number,
        completion=completion,
        reward=as_float(reward) if isinstance(reward, (int, float)) else None,
        advantage=None,
        masked="",
        tokens=0,
        finish=str(of.get("finish") or ""),
        answer="",
        parts={},
        note=note,
        mean_difference=None,
        largest_difference=None,
    )
