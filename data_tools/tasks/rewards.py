"""Scores of completions, found by verifiers in processes of their own, so that none of them can harm a run.

    with Scorer(verifiers, workers=4, time_limit_s=10) as scorer:
        future = scorer.submit("gsm8k", item, completion, finish_reason)
        score = future.result()                 # Score(reward, parts, note)
        said = scorer.reply("gsm8k", item, transcript).result()      # Reply(text, note), in tasks of several turns

A verifier that raises, runs past its time limit, ends its process or gives anything but reward terms costs its own
sample only: the reward is None, which is not zero, and the note says why. A process that hung or ended is replaced.
The same holds for replies.
"""

import contextlib
import math
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal
from numbers import Real
from typing import Any

from data_tools.base import users_code
from data_tools.mistake import UserMistake
from data_tools.tasks.process import Ended, Process
from data_tools.tasks.task import Item, load_task, task_options

_NOTE = 200  # characters
NOT_SCORABLE = "not scorable"  # the note of a completion for which the task gave None
ABORTED = "aborted"
_LARGEST = 3.4028234663852886e38  # float32's, in which advantages are trained
_LONGEST_REPLY = 1 << 20  # characters; the run has to encode them


@dataclass(frozen=True)
class Score:
    """Represents what a completion is worth: `reward` is the weighted sum of `parts`, None where the completion could
    not be scored; `note` says why.

    `answer` is what the completion answers, for majority votes, where its task can tell.
    """

    reward: float | None
    parts: dict[str, float] = field(default_factory=dict)
    note: str = ""
    answer: str | None = None


@dataclass(frozen=True)
class Reply:
    """Says what a task answers to a turn; `text` None: it is over. A `note` says why the sample cannot go on."""

    text: str | None
    note: str = ""


@dataclass(frozen=True)
class Verifier:
    """Says which task scores, with which options.

    `weights` of reward terms go over the task's own; others count once.
    """

    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)


def score_of(terms: Any, weights: Mapping[str, float]) -> Score:
    """Return the score that a verifier's answer stands for, whatever it is.

    A number is one of Python's, or whatever holds exactly one without being a list: NumPy's scalars, a 0-d array or
    tensor.
    """
    if terms is None:
        return Score(None, {}, NOT_SCORABLE)
    if _number(terms) is not None:
        terms = {"reward": terms}
    if not isinstance(terms, Mapping):
        what = f"{len(terms)} values" if isinstance(terms, (list, tuple)) else f"a {type(terms).__name__}: {terms!r}"
        return Score(
            None, {}, f"the verifier gave {what}; one number, or a mapping of names to numbers, was expected"[:_NOTE]
        )
    parts: dict[str, float] = {}
    for name, value in terms.items():
        if value is None:
            continue
        number = _number(value)
        if number is None or not math.isfinite(number):
            return Score(None, parts, f"reward term {name!r} is {value!r}, not a finite number"[:_NOTE])
        parts[str(name)] = number
    if not parts:
        return Score(None, {}, NOT_SCORABLE)
    if missing := sorted(weights.keys() - {str(name) for name in terms}):
        told = ", ".join(parts)
        return Score(
            None, parts, f"the verifier gave no reward term {missing[0]!r}, which has a weight; it gave {told}"[:_NOTE]
        )
    reward = sum(weights.get(name, 1.0) * value for name, value in parts.items())
    if not abs(reward) <= _LARGEST:
        return Score(None, parts, f"the reward {reward:g} is beyond float32's range ({_LARGEST:.2g})")
    return Score(reward, parts)


def _number(value: Any) -> float | None:
    """Return the number that `value` is, None where it is none; inf for an integer that no float holds."""
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        value = value.item()
    if not isinstance(value, (Real, Decimal)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def is_failure(reward: float | None, note: str) -> bool:
    """Return whether a sample has no reward because its verifier failed, not because the task cannot score it."""
    return reward is None and note not in (NOT_SCORABLE, ABORTED)


def reply_of(text: Any) -> Reply:
    """Return the reply that a task's answer to a turn stands for, whatever it is."""
    if text is None:
        return Reply(None)
    if not isinstance(text, str):
        return Reply(None, f"the reply was a {type(text).__name__}: {text!r}; text was expected, or None"[:_NOTE])
    if len(text) > _LONGEST_REPLY:
        return Reply(None, f"the reply has {len(text):,} characters; {_LONGEST_REPLY:,} are the most")
    text.encode()  # half a surrogate pair is no text that a tokenizer takes
    return Reply(text)


def _failed(work: Any, note: str) -> "Score | Reply":
    """Return why a job has no answer, in the form that its kind of answer has."""
    return Reply(None, note[:_NOTE]) if work is not None and work[0] == "reply" else Score(None, {}, note[:_NOTE])


_CLOSED = "the scorer was closed"


class Scorer:
    """Runs `workers` processes that score. Raise UserMistake on entry when a task cannot be loaded in one of them."""

    def __init__(self, verifiers: Mapping[str, Verifier], workers: int = 2, time_limit_s: float = 10.0):
        self.verifiers, self.time_limit_s = dict(verifiers), time_limit_s
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._closed, self._closing = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(workers)]
        self._processes: set[_Process] = set()

    def __enter__(self) -> "Scorer":
        probe: Future = Future()
        self._jobs.put((None, probe))  # the first process to be up takes it
        for thread in self._threads:
            thread.start()
        try:
            if mistake := probe.result():
                raise UserMistake(mistake)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def submit(self, name: str, item: Item, completion: str, finish_reason: str = "stop") -> "Future[Score]":
        """Ask for the score of a completion. An aborted completion is not scorable; one cut off is scored as it
        stands."""
        if finish_reason == "abort":
            future: Future[Score] = Future()
            future.set_result(Score(None, {}, ABORTED))
            return future
        return self._asked("score", name, item, completion)

    def reply(self, name: str, item: Item, transcript: str) -> "Future[Reply]":
        """Return what the task `name` answers to the completion so far."""
        return self._asked("reply", name, item, transcript)

    def _asked(self, kind: str, name: str, item: Item, text: str) -> Future:
        if name not in self.verifiers:
            raise KeyError(name)
        future: Future = Future()
        with self._closing:  # nothing is asked that nobody answers
            if self._closed.is_set():
                raise ValueError("the scorer is closed")
            self._jobs.put(((kind, name, item, text), future))
        return future

    def close(self) -> None:
        """End the processes. Completions not scored by then are not scorable."""
        with self._closing:
            self._closed.set()
        for _ in self._threads:
            self._jobs.put(None)
        for process in list(self._processes):
            process.kill()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        with contextlib.suppress(queue.Empty):
            while True:
                if (job := self._jobs.get_nowait()) and job[1].set_running_or_notify_cancel():
                    job[1].set_result(_failed(job[0], _CLOSED))

    def _serve(self) -> None:
        """Serve one process and its successors, a job at a time."""
        process: _Process | None = None
        while (job := self._jobs.get()) is not None:
            work, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                closed = self._closed.is_set()
                process, answer = (process, _failed(work, _CLOSED)) if closed else self._ask(process, work)
            except Exception as error:  # no process can be started, a row that cannot be sent: who waits is told
                self._end(process)
                note = f"no verifier could be asked: {type(error).__name__}: {error}"
                process, answer = None, note if work is None else _failed(work, note)
            future.set_result(answer)
        self._end(process)

    def _ask(self, process: "_Process | None", work: Any) -> "tuple[_Process | None, Any]":
        """Return (the process to go on with, its answer); a `work` of None asks for the mistake it met when it
        began."""
        if process is None:
            process = _Process(self.verifiers)
            self._processes.add(process)
            if self._closed.is_set():  # close may not have seen it
                process.kill()
        mistake = process.mistake()
        if work is None and not mistake:
            return process, ""
        try:
            if mistake:
                raise Ended(mistake)
            return process, process.ask(work, self.time_limit_s)
        except Ended as ended:
            self._end(process)
            return None, mistake if work is None else _failed(work, str(ended))

    def _end(self, process: "_Process | None") -> None:
        if process:
            process.kill()
            self._processes.discard(process)


class _Process(Process):
    """Represents a process that has loaded the tasks of some verifiers."""

    def __init__(self, verifiers: Mapping[str, Verifier]):
        super().__init__("data_tools.tasks.rewards:begin", dict(verifiers))
        self._mistake: str | None = None

    def mistake(self) -> str:
        """Return why this process can score nothing, "" when it can; waits until it is up."""
        if self._mistake is None:
            try:
                self._mistake = str(self.begun())
            except Ended as ended:
                self._mistake = f"a process of verifiers did not begin: {ended}"
        return self._mistake

    def ask(self, work: Any, limit_s: float) -> "Score | Reply":
        """Return the answer. Raise Ended."""
        answer = self.answer(work, limit_s)
        try:
            return (_read_reply if work[0] == "reply" else _read_score)(answer)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise Ended("the verifier's process wrote what is no answer") from None


def _read_score(told: Any) -> Score:
    """Return the score that a process of verifiers told. Raise ValueError, TypeError or KeyError for what is none."""
    reward = None if told["reward"] is None else float(told["reward"])
    parts = {str(name): float(value) for name, value in told["parts"].items()}
    answer = told["answer"]
    if not isinstance(told["note"], str) or not (answer is None or isinstance(answer, str)):
        raise TypeError
    if not all(math.isfinite(value) for value in [*parts.values(), *([] if reward is None else [reward])]):
        raise ValueError
    return Score(reward, parts, told["note"], answer)


def _read_reply(told: Any) -> Reply:
    if not isinstance(told["note"], str):
        raise TypeError
    return replace(reply_of(told["text"]), note=told["note"]) if told["text"] is not None else Reply(None, told["note"])


# -- in the process of verifiers ---------------------------------------------------------------------------------------


def begin(verifiers: Mapping[str, Verifier]) -> "tuple[str, Callable[[Any], Any] | None]":
    """Return (the mistake met when the tasks were loaded, "" for none; what answers a request)."""
    try:
        tasks = {name: _Loaded(verifier) for name, verifier in verifiers.items()}
    except UserMistake as mistake:
        return str(mistake), None

    def answer(work: tuple[str, str, Item, str]) -> Any:
        kind, name, item, text = work
        return asdict(getattr(tasks[name], kind)(item, text))

    return "", answer


class _Loaded:
    def __init__(self, verifier: Verifier):
        self.task = load_task(verifier.task)
        self.options = task_options(self.task, verifier.options)
        self.weights = {**self.task.REWARDS, **verifier.weights}
        getattr(self.task, "warm_up", lambda: None)()

    def score(self, item: Item, completion: str) -> Score:
        try:
            score = score_of(self.task.rewards(item, completion, self.options), self.weights)
            answer = getattr(self.task, "final_answer", None)
            return replace(score, answer=answer(item, completion, self.options)) if answer else score
        except BaseException as error:  # SystemExit too: whatever a verifier does is about its sample only
            return Score(None, {}, _note_of(error))

    def reply(self, item: Item, transcript: str) -> Reply:
        try:
            return reply_of(self.task.reply(item, transcript, self.options))
        except BaseException as error:
            return Reply(None, _note_of(error))


def _note_of(error: BaseException) -> str:
    """Return what a task's code raised, and where in a user's own."""
    return f"{type(error).__name__}: {error}"[:_NOTE] + users_code.raised_at(error)
