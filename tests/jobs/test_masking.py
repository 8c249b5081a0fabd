"""What a rank, native code in it and its children print is masked, however it comes and however the rank ends."""

import random
import signal
import subprocess
import sys

import pytest

from jobs.masking import Masker

NAMES = {b"abcab": b"<1>", b"abcabxx": b"<2>", b"b": b"<3>", b"k\xc3\xa9y": b"<4>"}


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_is_masked_alike_however_it_is_cut(seed):
    dice = random.Random(seed)
    text = b"".join(dice.choice([*NAMES, b"a", b"abcabx", b"ab", b"x\n", b"k\xc3"]) for _ in range(40))
    cut, masker = b"", Masker(NAMES)
    whole = Masker(NAMES).feed(text, last=True)
    rest = text
    while rest:
        size = dice.randint(1, 6)
        cut, rest = cut + masker.feed(rest[:size]), rest[size:]
    assert cut + masker.feed(b"", last=True) == whole
    assert not any(secret in whole for secret in NAMES)


def test_what_cannot_become_a_secret_is_written_at_once():
    masker = Masker(NAMES)
    assert masker.feed(b"a line\n") == b"a line\n"
    assert masker.feed(b"xabc") == b"x" and masker.feed(b"d") == b"a<3>cd"


RANK = """
import ctypes, os, signal, subprocess, sys
from jobs.secrets import reveal
print("before", flush=True)
held = reveal({{"KEY": "file:{key}"}}, {{"TOKEN": "printed-once"}})
value = os.environ["KEY"].encode()
ctypes.CDLL(None).write(1, b"native " + value + b"\\n", 8 + len(value))
os.write(2, value[:3]); os.write(2, value[3:] + b" in two pieces\\n")
subprocess.run(["sh", "-c", 'echo "child $KEY $TOKEN"'], check=True)
print("last", value.decode())
{end}
"""
ENDS = {
    "returns": ("", 0),
    "raises": ("raise SystemExit(os.environ['KEY'])", 1),
    "leaves": ("sys.stdout.flush(); held.close_output(); os._exit(5)", 5),
    "is killed": ("sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
}


@pytest.mark.parametrize("end", ENDS)
def test_all_that_a_rank_and_its_children_print_is_masked_and_arrives(tmp_path, end):
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_text("planted-value\n")
    line, code = ENDS[end]
    command = [sys.executable, "-c", RANK.format(key=key, end=line)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert done.stdout == "before\nnative ***KEY***\nchild ***KEY*** ***TOKEN***\nlast ***KEY***\n"
    assert done.stderr == "***KEY*** in two pieces\n" + ("***KEY***\n" if end == "raises" else "")


def test_signals_of_the_rank_do_not_end_the_filter(tmp_path):
    code = (
        "import os, signal, time; from jobs.secrets import reveal; reveal({}, {'KEY': 'planted-value'})\n"
        "for number in (15, 12, 2): signal.signal(number, signal.SIG_IGN)\n"
        "os.killpg(0, 15); os.killpg(0, 12); os.killpg(0, 2); print('alive, with', os.environ['KEY'])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, start_new_session=True)
    assert (done.returncode, done.stdout) == (0, "alive, with ***KEY***\n"), done.stderr
