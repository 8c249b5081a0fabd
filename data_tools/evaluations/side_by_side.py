"""Several evaluations side by side: tasks and measures as rows, each with its interval, and what was gained over the
first evaluation, prompt by prompt.

Only prompts that both asked are compared. What differs in how a task was asked is told, since the numbers then differ
for more reasons than the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.base.tables import ShownTable
from data_tools.evaluations import harness
from data_tools.evaluations.accuracy import MEANS, REWARDS, Values, difference, intervals_of, samples_of, values_of
from data_tools.evaluations.lines import RESULT, Line, lines_of
from data_tools.mistake import Problem, UserMistake
from data_tools.tasks.estimators import plus_or_minus, standard_error

_LABELS = {"accuracy": "greedy", "accuracy_normalized": "by characters", "sampled_accuracy": "sampled"}
Interval = tuple[float, float]


@dataclass(frozen=True)
class Gain:
    """Holds the mean of what each prompt that both asked gained, with its standard error and 95% interval."""

    value: float
    error: float | None  # None: of one prompt
    interval: Interval | None  # None: of a reward of one prompt
    prompts: int


@dataclass(frozen=True)
class Score:
    """Holds a measure of one evaluation: its mean over prompts, and what that gained over the first evaluation."""

    value: float
    interval: Interval | None
    prompts: int
    gain: Gain | None = None  # None: of the first, or no prompt was asked by both


@dataclass(frozen=True)
class Row:
    """Holds one measure of one task in every evaluation; None where it does not have it."""

    task: str
    measure: str
    scores: list[Score | None]

    @property
    def label(self) -> str:
        """Return the measure as people call it."""
        return _LABELS.get(self.measure, self.measure.replace("_", " "))


@dataclass(frozen=True)
class SideBySide:
    """Holds evaluations by name, the first of which the others are compared with."""

    names: list[str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def side_by_side(folders: Mapping[str, Path]) -> SideBySide:
    """Return what the evaluations in these folders say of each task. Raise UserMistake where one has damaged lines."""
    by_name = {name: _tasks(folder) for name, folder in folders.items()}
    tasks = list(dict.fromkeys(task for each in by_name.values() for task in each))
    rows = [row for task in tasks for row in _rows(task, [each.get(task, []) for each in by_name.values()])]
    return SideBySide(list(folders), rows, _notes(folders))


def _tasks(folder: Path) -> dict[str, list[Line]]:
    """Return the lines of each task of an evaluation; those of the rows of one task under that task's name."""
    lines, result = list(lines_of(str(folder), "phase").values()), durable.read_json(folder / RESULT)
    records = result.get("records", {}) if isinstance(result, dict) else None
    if not isinstance(records, dict):
        raise UserMistake(Problem(str(folder / RESULT), "is no result of an evaluation; evaluate again"))
    if len(records) == 1:
        return dict.fromkeys(records, lines)
    tasks: dict[str, list[Line]] = {}
    for line in lines:
        tasks.setdefault(str(line["kind"]), []).append(line)
    return tasks


def _rows(task: str, lines: Sequence[Sequence[Line]]) -> list[Row]:
    """Return the rows of a task, of which each evaluation has some lines or none."""
    values = [values_of(each) for each in lines]
    rows = []
    for measure in (*MEANS, *_at_k(values), *REWARDS):
        scores = [_score(measure, each, {}, samples_of(own)) for each, own in zip(values, lines)]
        gained = [_score(measure, each, values[0], samples_of(own)) for each, own in zip(values[1:], lines[1:])]
        if any(scores):
            rows.append(Row(task, measure, [scores[0], *gained]))
    return rows


def _at_k(values: Sequence[Values]) -> list[str]:
    """Return pass@k and maj@k for the largest k that all evaluations with samples have; none where that is 1, which
    says the same as the mean of the samples."""
    names = []
    for kind in ("pass@", "maj@"):
        largest = [
            max((int(name[len(kind) :]) for name in each if name.startswith(kind)), default=0) for each in values
        ]
        if (most := min((k for k in largest if k), default=0)) > 1:
            names.append(f"{kind}{most}")
    return names


def _score(measure: str, values: Values, first: Values, samples: int) -> Score | None:
    if not (by_prompt := values.get(measure)):
        return None
    interval = intervals_of({measure: by_prompt}, samples).get(measure)
    gains = difference(by_prompt, first.get(measure, {}))
    gain = None
    if gains:
        mean = sum(gains.values()) / len(gains)
        reach = intervals_of({measure: gains}, low=-1.0).get(measure)
        gain = Gain(mean, standard_error([*gains.values()]), reach, len(gains))
    return Score(sum(by_prompt.values()) / len(by_prompt), interval, len(by_prompt), gain)


def _notes(folders: Mapping[str, Path]) -> list[str]:
    """Return how tasks were asked differently than in the first evaluation that says so."""
    first_of: dict[str, tuple[str, dict[str, Any]]] = {}
    others: dict[tuple[str, str, str], list[str]] = {}  # (task, the first, what differs): evaluations
    for name, folder in folders.items():
        for task, config in harness.configs_of(folder).items():
            own = _settings(config)
            first, theirs = first_of.setdefault(task, (name, own))
            keys = [key for key in {**theirs, **own} if theirs.get(key) != own.get(key)]
            if told := ", ".join(f"{key} {own.get(key)} for {theirs.get(key)}" for key in keys):
                others.setdefault((task, first, told), []).append(name)
    return [
        f"{task} was asked otherwise in {', '.join(names)} than in {first}: {told}"
        for (task, first, told), names in others.items()
    ]


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a task's configuration, those of its mappings too, each by its own name."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= _settings(value) if isinstance(value, dict) else {name: value}
    return found


# -- for people -------------------------------------------------------------------------------------------------------


def table_of(found: SideBySide) -> ShownTable:
    """Return the evaluations for people: a share in percent, with its interval, and what was gained in points."""
    columns = ["task", "measure", *found.names]
    rows = [
        [row.task, row.label, *(_cell(score, row.measure in REWARDS) for score in row.scores)] for row in found.rows
    ]
    title = "Evaluations: value [95%] of n prompts; gain over the first by prompt, ± its standard error [95%]"
    return {"title": title, "columns": columns, "rows": rows}


def _cell(score: Score | None, is_reward: bool) -> str:
    if score is None:
        return ""
    scale, digits = (1, 3) if is_reward else (100, 1)

    def spelled(value: float, sign: str = "") -> str:
        return f"{scale * value:{sign}.{digits}f}"

    def within(interval: Interval | None, sign: str = "") -> str:
        return f" [{spelled(interval[0], sign)}, {spelled(interval[1], sign)}]" if interval else ""

    unit = "" if is_reward else "%"
    text = f"{spelled(score.value)}{unit}{within(score.interval)} of {score.prompts:,}"
    if score.gain is None:
        return text
    gain = score.gain
    text += f"; {spelled(gain.value, '+')}{plus_or_minus(gain.error, spelled)}{within(gain.interval, '+')}"
    return text if gain.prompts == score.prompts else f"{text} of {gain.prompts:,} that both asked"
