"""Secrets by reference: read where they are used, refused when others may read them, masked wherever we write."""

import os
import subprocess
import sys
import time

import pytest

from data_tools.mistake import UserMistake
from jobs import secrets
from jobs.artifacts.owner import process_start
from jobs.secrets import Secrets, read_values
from tests.command import ROOT, wait_for

VALUE = "pl4nted v@lue/with=signs"


def refused(reference, environment=None):
    with pytest.raises(UserMistake) as caught:
        read_values({"KEY": reference}, environment or {})
    line = str(caught.value)
    assert "\n" not in line and "KEY" in line and VALUE not in line
    return line


@pytest.fixture
def key(tmp_path):
    path = tmp_path / "key"
    path.write_text(VALUE + "\n")
    path.chmod(0o600)
    return path


def test_values_come_from_a_file_a_command_or_the_forwarded_environment(key, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = read_values(
        {"A": f"file:{key}", "B": "file:~/key", "C": f"cmd:tr a-z A-Z < {key}", "D": "env:E"}, {"E": "forwarded"}
    )
    assert found == {"A": VALUE, "B": VALUE, "C": VALUE.upper(), "D": "forwarded"}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_a_file_that_others_may_read_is_refused_with_the_chmod_line(key, mode):
    key.chmod(mode)
    line = refused(f"file:{key}")
    assert f"chmod 600 {key}" in line and f"{mode:o}" in line


def test_the_file_behind_a_link_is_the_one_whose_mode_counts(key, tmp_path):
    (tmp_path / "link").symlink_to(key)
    assert read_values({"A": f"file:{tmp_path}/link"}, {}) == {"A": VALUE}
    key.chmod(0o644)
    assert "chmod" in refused(f"file:{tmp_path}/link")


def test_what_is_missing_or_no_value_is_one_line(key, tmp_path):
    assert "No such file" in refused(f"file:{tmp_path}/nokey")
    assert "is not a file" in refused(f"file:{tmp_path}")
    os.mkfifo(tmp_path / "fifo", 0o600)
    assert "is not a file" in refused(f"file:{tmp_path}/fifo")  # and does not wait for a writer
    key.write_bytes(b"\n")
    assert "is empty" in refused(f"file:{key}")
    key.write_bytes(b"\xff\xfe" + VALUE.encode())
    assert "not UTF-8" in refused(f"file:{key}")
    key.write_text("a\0" + VALUE)
    assert "NUL" in refused(f"file:{key}")
    key.write_text(VALUE * 4000)
    assert "bytes" in refused(f"file:{key}")
    assert "export X" in refused("env:X")


def test_a_failing_command_is_one_line_without_what_it_said(key):
    assert "ended with exit code 3" in refused(f"cmd:cat {key} >&2; cat {key}; exit 3")
    assert "exit code 127" in refused("cmd:no-such-command-here")


def test_a_command_that_hangs_is_ended_with_its_children(monkeypatch, tmp_path):
    monkeypatch.setattr(secrets, "COMMAND_LIMIT_S", 0.3)
    began = time.monotonic()
    assert "did not end within 0.3 s" in refused(f"cmd:sleep 60 & echo $! > {tmp_path}/pid; wait")
    assert time.monotonic() - began < 60  # the sleep's own end
    pid = int((tmp_path / "pid").read_text())
    wait_for("its child to be gone", lambda: process_start(pid) is None)


def test_values_are_masked_in_every_spelling_and_never_shown_by_repr():
    held = Secrets(
        {"KEY": VALUE, "LONG": VALUE + "more", "PEM": 'first line of it\nsecond"line of it\n', "Q": 'it\'s\t"q"'}
    )
    text = f"{VALUE}more {VALUE!r} {VALUE} pl4nted%20v%40lue%2Fwith%3Dsigns first line of it; {held!r}"
    masked = held.mask(text)
    assert masked.startswith("***LONG*** '***KEY***' ***KEY*** ***KEY*** ***PEM***;") and "v@lue" not in masked
    assert repr('it\'s\t"q"') not in held.mask(repr('x it\'s\t"q"'))
    for facts in ({"a": [VALUE, 1, None]}, {VALUE: 1}, {"a": {"b": (f"x{VALUE}",)}}, [repr('it\'s\t"q"')[1:-1]]):
        with pytest.raises(UserMistake, match="facts.* would write down the value of the secret (KEY|Q)") as caught:
            held.refuse_in(facts, "facts")
        assert VALUE not in str(caught.value)
    held.refuse_in({"a": ["first line", 1, None], "loss": 0.5}, "facts")


def test_a_value_so_short_that_it_stands_in_texts_by_chance_is_refused(key):
    key.write_text("1\n")
    assert f"what file:{key} holds has 1 characters; a secret has 8 at the least" in refused(f"file:{key}")
    assert "7 characters" in refused("cmd:echo 1234567") and "1 characters" in refused("env:E", {"E": "e"})


@pytest.mark.parametrize("hard", ["unlimited", "0"])
def test_a_rank_with_secrets_that_aborts_leaves_no_core_file(key, tmp_path, hard):
    code = (
        f"import os; from jobs.secrets import reveal; reveal({{'KEY': 'file:{key}'}}, {{}})\n"
        "import resource; assert resource.getrlimit(resource.RLIMIT_CORE)[1] <= 1; os.abort()"
    )
    shell = f'ulimit -c {hard}; cd {tmp_path}; exec {sys.executable} -c "$0"'
    done = subprocess.run(["bash", "-c", shell, code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == -6, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"key"}


def test_a_revealed_value_does_not_show_in_the_process_list(key):
    code = (
        f"import sys; from jobs.secrets import reveal; reveal({{'KEY': 'file:{key}'}}, {{}}); import os, logging\n"
        "assert os.environ['KEY'].startswith('pl4'); print('value', os.environ['KEY'], flush=True)\n"
        "logging.warning(os.environ['KEY']); sys.stdin.read(); raise SystemExit(os.environ['KEY'])"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "value ***KEY***\n"
    seen = subprocess.run(["ps", "eww", "-p", str(child.pid)], capture_output=True, text=True).stdout
    assert "reveal" in seen and VALUE not in seen
    _, err = child.communicate("")
    assert "***KEY***" in err and VALUE not in err
