"""How an element ended is written down once, by the rank that knew first."""

import os
from functools import partial
from types import SimpleNamespace

import pytest

from data_tools.mistake import UserMistake
from jobs.artifacts.owner import Owner
from jobs.artifacts.run_folder import RunFolder
from jobs.last_word import LastWord
from jobs.ranks import Rank
from jobs.retry import EXIT_LEASE_HELD, EXIT_MISTAKE, EXIT_SEALED
from jobs.secrets import Secrets
from jobs.worker import Worker, nothing_to_run
from tests.jobs.test_altered_files import PHASE


def test_of_many_ranks_that_fail_alike_few_write_how_it_ended(tmp_path, monkeypatch):
    """That all wrote and synced a file of their own would be thousands at the same moment."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    synced, fsync, run = [], os.fsync, RunFolder(tmp_path / "run")

    def counted(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", counted)
    for rank in range(200):
        word = LastWord(run, PHASE, element=0, owner=Owner.me(1, 0), rank=Rank(rank, 0, 200), started=0.0)
        word.say(EXIT_MISTAKE, f"rank {rank} cannot")
    (outcome,) = run.outcomes(PHASE.name)
    assert outcome.message == "rank 0 cannot" and outcome.state == "mistake"
    assert len([path for path in synced if not os.path.isdir(path)]) == 1


def worker(rank: int, said: list) -> Worker:
    """A rank of an element that does nothing but end; `said` gets (rank, exit code) of what it writes down."""
    made = Worker.__new__(Worker)
    made.rank, made.phase, made.index, made.secrets = Rank(rank, rank, 3), PHASE, 0, Secrets({})
    made.heard, made.reached, made.lease = False, (None, None), None
    made.last_word = SimpleNamespace(say=lambda code, *_: said.append((rank, code)))
    return made


@pytest.mark.parametrize("code", [EXIT_LEASE_HELD, EXIT_SEALED])
def test_what_rank_zero_told_all_only_it_writes_down(code):
    said: list = []
    for rank in (2, 1, 0):
        made = worker(rank, said)
        made._work = partial(made._leave, SimpleNamespace(goodbye=lambda: None), code, "as rank 0 said")
        assert made.work() == code
    assert said == [(0, code)]


def test_what_a_rank_met_by_itself_it_writes_down(monkeypatch):
    def left(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", left)
    said: list = []
    made = worker(2, said)
    made._work = lambda: (_ for _ in ()).throw(UserMistake("no such file"))
    with pytest.raises(SystemExit):
        made.work()
    assert said == [(2, EXIT_MISTAKE)]


def test_rank_zero_writes_why_nothing_runs_before_it_tells_the_others():
    """The first of them that exits ends the job, rank 0 too."""
    said: list = []
    made = worker(0, said)
    made._begin = lambda: nothing_to_run(EXIT_MISTAKE, "an input is gone")
    assert made._begin_or_say()["exit"] == EXIT_MISTAKE and said == [(0, EXIT_MISTAKE)]
