"""A verifier may do anything: it costs its own sample, and nothing else."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from data_tools.mistake import UserMistake
from data_tools.tasks.rewards import Reply, Score, Scorer, Verifier, _Process, is_failure, score_of
from data_tools.tasks.task import Item
from jobs.artifacts.owner import process_start

HERE = "tests.data_tools.tasks.verifiers"
ITEM = Item.of("?", "4")
BAD = Verifier(f"{HERE}:misbehave")
UNSCORABLE = {
    "raise": "ValueError: no such answer",
    "exit": "SystemExit: 3",
    "sleep": "time limit of 2 s",
    "spin": "time limit of 2 s",
    "die": "ended its process (signal SIGKILL)",
    "ignore": "ended its process (exit code 0)",
    "nan": "'reward' is nan, not a finite number",
    "inf": "'reward' is inf",
    "text": "gave a str: '0.5'; one number",
    "three": "gave 3 values; one number",
    "nothing": "not scorable",
    "nan term": "'b' is nan",
    "text term": "'a' is '1'",
    "no terms": "not scorable",
}


def test_a_verifier_that_misbehaves_costs_that_sample_only():
    with Scorer({"bad": BAD}, workers=1, time_limit_s=2.0) as scorer:
        futures = {}
        for completion in UNSCORABLE:
            futures[completion] = scorer.submit("bad", ITEM, completion), scorer.submit("bad", ITEM, "good")
        for completion, (bad, good) in futures.items():
            assert good.result() == Score(1.0, {"reward": 1.0}), completion
            score = bad.result()
            assert score.reward is None and UNSCORABLE[completion] in score.note, (completion, score)


FAILED = {
    "raise": "ValueError: no such tool (verifiers.py:",  # the line of the user's code that raised it
    "sleep": "time limit of 2 s",
    "die": "ended its process (signal SIGKILL)",
    "number": "the reply was a int: 3; text was expected",
    "huge": "has 2,097,152 characters; 1,048,576 are the most",
    "half": "UnicodeEncodeError",
}


def test_a_reply_that_fails_costs_that_sample_only():
    with Scorer({"tool": Verifier(f"{HERE}")}, workers=1, time_limit_s=2.0) as scorer:
        for transcript, note in FAILED.items():
            bad, good = (scorer.reply("tool", ITEM, text) for text in (transcript, "how long?"))
            assert bad.result().text is None and note in bad.result().note, transcript
            assert good.result() == Reply("9 letters") and scorer.submit("tool", ITEM, "abc").result().reward == 3.0
        assert scorer.reply("tool", ITEM, "over").result() == Reply(None)


HOSTILE = {
    "closes": "closed its process's connection",
    "half an answer": "time limit of 2 s",
    "a pickle": "wrote what is no answer",
    "an answer of before": "wrote what is no answer",
    "takes memory": "MemoryError",
    "long": "bytes; 4,194,304 are the most",
    "stops": "time limit of 2 s",
    "leaves and hangs": "time limit of 2 s",
    "leaves and dies": "ended its process (exit code 1)",
    "leaves and stops its supervisor": "time limit of 2 s",
    "leaves and kills its supervisor": "ended its process (",
    "a huge number": "wrote what is no answer",
}


def scored(scorer: Scorer, completion: str) -> Score:
    """Ask until there is a reward: on a busy machine even an honest verdict may take longer than the limit."""
    for _ in range(20):
        score = scorer.submit("bad", ITEM, completion).result(timeout=60)
        if score.reward is not None:
            return score
    return score


def test_a_hostile_verifier_runs_nothing_in_the_run_hangs_nobody_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Scorer({"bad": Verifier(f"{HERE}:hostile")}, workers=1, time_limit_s=2.0) as scorer:
        assert scored(scorer, "leaves").reward == 1.0
        for completion, note in HOSTILE.items():
            score = scorer.submit("bad", ITEM, completion).result(timeout=60)
            assert score.reward is None and note in score.note, (completion, score)
            assert scored(scorer, "good").reward == 1.0, completion
    left = [int(pid) for pid in (tmp_path / "left").read_text().split()]
    assert len(left) >= 5 and not [pid for pid in left if process_start(pid) is not None]
    assert not (tmp_path / "unpickled").exists()


def test_a_command_that_a_verifier_starts_has_no_connection_to_the_run():
    with Scorer({"bad": Verifier(f"{HERE}:hostile")}, workers=1) as scorer:
        assert scorer.submit("bad", ITEM, "sockets of a command").result(timeout=60).reward == 0.0


def test_whoever_waits_is_told_where_no_verifier_can_be_asked(monkeypatch):
    """No process can be started, a row cannot be sent, whoever asked gave up: nobody waits for ever."""
    with Scorer({"a": Verifier(f"{HERE}:length")}, workers=1) as scorer:
        score = scorer.submit("a", Item.of("?", None, {"column": lambda: 0}), "abc").result(timeout=60)
        assert score.reward is None and "no verifier could be asked" in score.note
        futures = [scorer.submit("a", ITEM, "abc") for _ in range(50)]
        futures[-1].cancel()
        assert scorer.submit("a", ITEM, "abc").result(timeout=60).reward == 3.0

    def no_process(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    with pytest.raises(UserMistake, match="Resource temporarily unavailable"), Scorer({"a": BAD}, workers=1):
        pass


def test_verifiers_see_of_the_environment_what_is_named(monkeypatch):
    monkeypatch.setenv("A_SECRET", "value")
    monkeypatch.setenv("NAMED", "value")
    for named, seen in (("", 0.0), ("NAMED, X", 1.0)):
        monkeypatch.setenv("AFTEROK_VERIFIER_ENV", named)
        with Scorer({"bad": Verifier(f"{HERE}:hostile")}, workers=1) as scorer:
            parts = scorer.submit("bad", ITEM, "looks").result().parts
        assert parts == {"A_SECRET": 0.0, "NAMED": seen, "PATH": 1.0}


def test_terms_are_weighted_and_kept():
    with Scorer({"a": Verifier(f"{HERE}:misbehave", weights={"b": 4.0})}, workers=1) as scorer:
        assert scorer.submit("a", ITEM, "terms").result() == Score(3.0, {"a": 1.0, "b": 0.5})
    assert score_of(True, {}) == Score(1.0, {"reward": 1.0})
    assert score_of({"a": 2, "b": None}, {"b": 3.0}) == Score(2.0, {"a": 2.0})
    missing = score_of({"a": 2}, {"b": 3.0})
    assert missing.reward is None and "no reward term 'b', which has a weight; it gave a" in missing.note


def numbers() -> dict[str, tuple[Any, float]]:
    """What a verifier may give for a number, and which one it is."""
    import numpy
    import torch

    return {
        "bool": (True, 1.0), "int": (3, 3.0), "float": (0.5, 0.5), "Fraction": (Fraction(1, 4), 0.25),
        "Decimal": (Decimal("0.1"), 0.1), "np.bool": (numpy.bool_(True), 1.0), "np.float64": (numpy.float64(0.1), 0.1),
        "np.float32": (numpy.float32(0.5), 0.5), "np.int8": (numpy.int8(-2), -2.0), "np.uint64": (numpy.uint64(7), 7.0),
        "array": (numpy.array(0.25), 0.25), "array of bool": (numpy.array(False), 0.0),
        "tensor": (torch.tensor(0.75), 0.75), "tensor of bool": (torch.tensor(True), 1.0),
        "bfloat16": (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        "with gradient": (torch.ones((), requires_grad=True), 1.0),
    }  # fmt: skip


def no_numbers() -> list[Any]:
    import numpy
    import torch

    return ["0.5", b"1", [1.0], (1.0,), {1.0}, 1j, numpy.array([1.0]), numpy.array("1"), numpy.complex64(1),
            torch.ones(1), torch.tensor(1j), object(), numpy.nan, numpy.float32("inf"), torch.tensor(float("nan")),
            10**400, 1e308, -1e39, Decimal("NaN")]  # fmt: skip


def test_whatever_is_one_finite_number_is_a_reward_and_nothing_else():
    for name, (value, number) in numbers().items():
        for terms in (value, {"a": value}):
            score = score_of(terms, {})
            assert score.reward == number and type(score.reward) in (float, int) and not score.note, name
    for value in no_numbers():
        for terms in (value, {"a": value}):
            score = score_of(terms, {})
            assert score.reward is None and is_failure(score.reward, score.note), value
    assert "the reward 1e+308 is beyond float32's range" in score_of(1e308, {}).note
    assert "the reward inf is beyond" in score_of({"a": 1e300}, {"a": 1e300}).note
    assert not is_failure(None, score_of(None, {}).note) and not is_failure(0.0, "")


def test_a_completion_that_was_aborted_is_not_scorable_and_one_cut_off_is_scored():
    with Scorer({"a": Verifier(f"{HERE}:length")}, workers=1) as scorer:
        assert scorer.submit("a", ITEM, "abc", "abort").result() == Score(None, {}, "aborted")
        assert scorer.submit("a", ITEM, "abc", "length").result().reward == 3.0


def test_a_killed_process_is_replaced_and_closing_leaves_none(tmp_path):
    with Scorer({"a": Verifier(f"{HERE}:length")}, workers=2) as scorer:
        assert [scorer.submit("a", ITEM, "x" * n).result().reward for n in range(4)] == [0, 1, 2, 3]
        for process in list(scorer._processes):
            process._process.kill()
        later = [scorer.submit("a", ITEM, "x" * n).result() for n in range(6)]
        scored = [score.reward for score in later if score.reward is not None]
        assert len(scored) >= 4 and all("SIGKILL" in score.note for score in later if score.reward is None)
        while (score := scorer.submit("a", ITEM, "x").result()).reward is None:  # the last of those that were killed
            assert "SIGKILL" in score.note
        pids = [process._process.pid for process in scorer._processes]
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_closing_answers_what_is_waiting():
    scorer = Scorer({"bad": BAD}, workers=1, time_limit_s=60)
    with scorer:
        futures = [scorer.submit("bad", ITEM, "sleep") for _ in range(3)]
    assert [future.result(timeout=30).reward for future in futures] == [None] * 3
    with pytest.raises(ValueError, match="closed"):
        scorer.submit("bad", ITEM, "good")


def test_a_process_is_ended_once_whoever_comes_first():
    """The thread it serves and the one that closes the scorer end it at the same moment."""
    for _ in range(40):
        process, start = _Process({}), threading.Barrier(8)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _, start=start, process=process: (start.wait(), process.kill()), range(8)))
        with pytest.raises(ProcessLookupError):
            os.kill(process._process.pid, 0)


def test_verifiers_die_with_the_run_even_while_they_hang(tmp_path):
    """The run is killed, as kill -9 does, while a verifier spins in C."""
    program = f"""
import os, sys
from data_tools.tasks.rewards import Scorer, Verifier
from data_tools.tasks.task import Item
scorer = Scorer({{"bad": Verifier("{HERE}:misbehave")}}, workers=1, time_limit_s=600).__enter__()
scorer.submit("bad", Item.of("?"), "spin")
print(*[process._process.pid for process in scorer._processes], flush=True)
sys.stdin.read()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    pid = int(run.stdout.readline())
    run.kill()
    run.wait()
    for _ in range(600):
        try:
            if open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] == "Z":
                break
        except FileNotFoundError:
            break
        time.sleep(0.05)
    else:
        os.kill(pid, 9)
        raise AssertionError("the verifier outlived its run")


def test_no_process_of_verifiers_imports_torch():
    verifiers = {"torch": Verifier(f"{HERE}:torch_imported"), "calculator": Verifier("calculator")}
    with Scorer(verifiers, workers=1) as scorer:
        assert scorer.submit("calculator", Item.of("48/2=", "24"), "24").result().reward == 1.0
        assert scorer.submit("torch", ITEM, "").result().reward == 0.0


def test_a_task_that_cannot_be_loaded_is_refused_at_once():
    for task, message in (("nowhere:f", "module 'nowhere' cannot be imported"),
                          (f"{HERE}:absent", "has no function 'absent'"),
                          ("calculatr", "did you mean calculator")):  # fmt: skip
        with pytest.raises(UserMistake, match=message), Scorer({"a": Verifier(task)}, workers=1):
            pass
