"""Files of a run and of a checkpoint, which have sums: what was altered is never read with another meaning. And the
verbs that look at a run name the file that is damaged, or go on without it."""

import contextlib
import dataclasses
import io
import random
import shutil

import pytest

from launchers import cli
from tests.doors.damage import damaged
from tests.doors.sweep import Door, Refused, check, counts
from tests.jobs.test_altered_files import KINDS, REFUSED
from tests.launchers.planted_run import failed

# An altered one of these is as good as none, or what was written first: test_altered_files.py says which.
OWN_RULES = ("hash cache", "ledger", "rollouts")


def ordered(value):
    """A meaning, whatever the order of its keys."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return ["mapping", *sorted(([key, ordered(item)] for key, item in value.items()), key=repr)]
    return [ordered(item) for item in value] if isinstance(value, (list, tuple)) else repr(value)


def once(data: bytes, draw: random.Random):
    """One damage: two could make an object with a sum look like one of before there were sums."""
    while True:
        how, found = damaged(data, draw)
        if " + " not in how:
            return how, found


@counts
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in OWN_RULES])
def test_files_with_a_sum(cases, kind, tmp_path, record):
    make, read = KINDS[kind]
    path = make(tmp_path)

    def read_file(data):
        path.write_bytes(data)
        return ordered(read(path))

    whole = path.read_bytes()
    check(
        Door(kind, [whole], read_file, None, refused=(*REFUSED, OSError), damage=once),
        max(20, cases // len(KINDS)),
        record,
    )


@counts
@pytest.mark.parametrize("verb", ["status", "why"])
def test_verbs_that_look_at_a_damaged_run(cases, verb, tmp_path, record, monkeypatch):
    planted = failed(tmp_path / "whole")
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file())
    texts = [str(name).encode() + b"\0" + (tmp_path / "whole" / name).read_bytes() for name in files]
    run = tmp_path / "run"
    shutil.copytree(planted.run.path, run)
    monkeypatch.setenv("COLUMNS", "200")

    def read(data):
        name, _, text = data.partition(b"\0")
        path = run / name.decode()
        whole = path.read_bytes()
        path.write_bytes(text)
        said, refused = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(refused):
                code = cli.main([verb, str(run)])
        finally:
            path.write_bytes(whole)
        if "Traceback" in refused.getvalue():
            raise AssertionError(refused.getvalue()[-600:])
        if code == 2:
            raise Refused(refused.getvalue().strip().splitlines()[-1])
        return "looked"

    def damage(data: bytes, draw: random.Random):
        name, _, text = data.partition(b"\0")
        how, text = damaged(text, draw) if text else ("nothing", text)
        return f"{name.decode()}: {how}", name + b"\0" + text

    check(Door(f"{verb} of a run", texts, read, lambda data: "any", damage=damage), max(30, cases // 5), record)
