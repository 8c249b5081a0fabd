"""Programs in their sandboxes: right ones pass, whatever else a program does is a failed sample and ends with it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools.answers import sandbox
from data_tools.answers.sandbox import Limits, verdict

pytestmark = pytest.mark.skipif(bool(sandbox.why_not()), reason=sandbox.why_not() or "there is one")

ROOT = Path(__file__).parents[2]
TESTS = ["assert f(2) == 4", "assert f([1]) == [1, 1]"]
RIGHT = "def f(x):\n    return 2 * x\n"
PATIENT = Limits(time_s=120.0, cpu_s=60)  # a busy machine is no fault of a program
HASTY = Limits(time_s=3.0, cpu_s=1)  # of what never ends by itself


def passes(program: str, tests: list[str] = TESTS, calls: tuple[str, ...] = ("f",), **more) -> bool | None:
    return verdict(program, tests, calls, limits=more.pop("limits", PATIENT), **more).passed


def test_a_right_program_passes_and_a_wrong_one_does_not():
    assert passes(RIGHT) is True
    assert passes(RIGHT.replace("2", "3")) is False
    assert "NameError" not in verdict("x = 1", TESTS, ["f"], limits=PATIENT).why  # it lacks f: its own fault
    assert passes("x = 1") is False and passes("def f(x:") is False and passes("") is False


CHEATS = {
    "leaves before its tests": "import sys\nsys.exit(0)\n",
    "leaves in a test": "def f(x):\n    raise SystemExit(0)\n",
    "ends its process": "import os\nos._exit(0)\n",
    "ends its process in a test": "import os\ndef f(x):\n    os._exit(0)\n",
    "says that it passed": "print('passed')\nimport os\nfor n in range(3, 64):\n    try:\n        os.write(n, b'passed')\n"
    "    except OSError:\n        pass\n",
    "answers what is equal to all": "class A:\n    def __eq__(self, other):\n        return True\n    def __hash__(self):\n"
    "        return 0\ndef f(x):\n    return A()\n",
    "is a number that is equal to all": "class A(int):\n    def __eq__(self, other):\n        return True\n"
    "def f(x):\n    return A(7)\n",
    "changes what assert means": "import builtins\nbuiltins.AssertionError = ValueError\ndel builtins.len\n"
    "def f(x):\n    return None\n",
    "changes what is imported": "import sys, types\nsys.modules['math'] = types.SimpleNamespace(isclose=lambda *a: True)\n"
    "def f(x):\n    return 0\n",
    "looks for its tests": "import gc, sys\ndef f(x):\n"
    "    frame = sys._getframe()\n    while frame:\n        for name, value in list(frame.f_locals.items()):\n"
    "            if name in ('tests', 'names', 'given'):\n                frame.f_locals[name] = []\n"
    "        frame = frame.f_back\n    return None\n",
}


@pytest.mark.parametrize("way", CHEATS)
def test_a_program_that_does_anything_but_answer_fails(way):
    tests = ["import math\nassert math.isclose(f(2), 4)"] if way == "changes what is imported" else TESTS
    assert passes(CHEATS[way], tests) is False


def test_values_come_back_as_what_they_are():
    values = ["None", "True", "-3", "10**400", "0.1", "float('inf')", "1j", "'\\ud800 ä'", "b'\\x00'", "[1, [2]]",
              "(1, (2,))", "{1, 2}", "frozenset({1})", "{(1, 2): [3], None: 'x'}", "range(3)", "collections.deque([1])",
              "decimal.Decimal('1.50')", "fractions.Fraction(1, 3)", "datetime.date(2024, 2, 29)",
              "datetime.datetime(2024, 2, 29, 1)"]  # fmt: skip
    setup = "import collections, datetime, decimal, fractions"
    tests = [f"assert f({value}) == {value} and type(f({value})) is type({value})" for value in values]
    assert verdict(f"{setup}\ndef f(x):\n    return x\n", tests, ["f"], setup, PATIENT) == sandbox.Verdict(True)
    assert passes("def f(x):\n    return float('nan')\n", ["assert f(1) != f(1)"]) is True


def test_objects_and_generators_of_the_program_can_be_used():
    program = """
class Pair:
    def __init__(self, a, b):
        self.a, self.b = a, b
    def __str__(self):
        return f"<{self.a}>"
def chain(pairs):
    return max(pair.b for pair in pairs)
def halves(x):
    while x > 1:
        x //= 2
        yield x
def sort(values):
    values.sort()
    return values
def sum(a, b):
    return a * b
def fails(x):
    raise KeyError(x)
"""
    tests = [
        "assert chain([Pair(5, 24), Pair(15, 25)]) == 25 and Pair(1, 2).a == 1 and str(Pair(1, 2)) == '<1>'",
        "assert list(halves(8)) == [4, 2, 1] and halves(8) != [4, 2, 1]",
        "mine = [3, 1]\nassert sort(mine) == [1, 3] and mine == [1, 3]",
        "assert sum(2, 3) == 6",
        "try:\n    fails('a')\n    assert False\nexcept KeyError:\n    pass",
    ]
    assert verdict(program, tests, ["Pair", "chain", "halves", "sort", "sum", "fails"], limits=PATIENT).why == ""


def test_tests_that_ask_for_what_is_not_here_say_nothing_about_the_program():
    for tests in (["import no_such_module"], ["assert f(1) ="], ["assert g(1) == 2"], ["assert f(lambda x: x)"]):
        assert passes(RIGHT, tests) is None, tests
    missing = "import no_such_module\n" + RIGHT
    assert passes(missing) is False and passes("def f(x):\n    return unknown\n") is False  # the program's own fault


def pids() -> set[int]:
    return {int(path.name) for path in Path("/proc").glob("[0-9]*")}


def running(mark: str) -> list[int]:
    """Processes of this machine whose command line holds `mark`, this one's own process not counted."""
    found = []
    for pid in pids() - {os.getpid()}:
        try:
            if mark.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            pass
    return found


def gone(mark: str) -> bool:
    until = time.monotonic() + 60
    while running(mark) and time.monotonic() < until:
        time.sleep(0.05)
    return not running(mark)


def test_an_endless_loop_and_an_endless_sleep_are_ended():
    assert passes("while True:\n    pass\n", limits=HASTY) is False
    assert passes("def f(x):\n    while True:\n        pass\n", limits=HASTY) is False
    assert passes("import time\ntime.sleep(1000)\n", limits=HASTY) is False
    stubborn = "import signal\nfor n in (signal.SIGXCPU, signal.SIGTERM, signal.SIGINT):\n    signal.signal(n, signal.SIG_IGN)\n"
    assert passes(stubborn + "while True:\n    pass\n", limits=HASTY) is False


BOMB = """
import os, sys
made = 0
def f(x):
    while True:
        try:
            if os.fork() == 0:
                continue
        except OSError:
            if os.getpid() == me:
                return made
        made_one()
def made_one():
    global made
    made += 1
me = os.getpid()
"""


def test_a_fork_bomb_is_held_to_its_processes_and_ended(tmp_path):
    program = "import os, sys, time\ndef f(x):\n    while True:\n        try:\n            os.fork()\n        except OSError:\n            pass\n"
    assert passes(program, limits=HASTY) is False
    counted = sandbox._FORKS.replace("forks", "f").replace("def f():", "def f(x):")
    assert passes(counted, [f"assert f(1) < {sandbox.PROCESSES}"]) is True  # no more than that many could be made
    threads = ("import threading, time\ndef f(x):\n    for n in range(64):\n        try:\n"
               "            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
               "        except RuntimeError:\n            return n\n    return 64\n")  # fmt: skip
    assert passes(threads, [f"assert f(1) < {sandbox.PROCESSES}"]) is True


def test_memory_and_files_are_bounded():
    assert passes("x = bytearray(10 << 30)\n" + RIGHT) is False
    assert passes("def f(x):\n    return [0] * (10 << 30)\n") is False
    writes = ("def f(x):\n    try:\n        with open('/tmp/a', 'wb') as file:\n            for n in range(1 << 10):\n"
              "                file.write(bytes(1 << 20))\n    except OSError:\n        pass\n"
              "    import os\n    return os.path.getsize('/tmp/a')\n")  # fmt: skip
    assert passes(f"import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n{writes}",
                  [f"assert f(1) <= {sandbox.FILE_MIB << 20}"]) is True  # fmt: skip
    many = ("import os\ndef f(x):\n    total = 0\n    try:\n        for n in range(100):\n"
            "            with open(f'/tmp/{n}', 'wb') as file:\n                total += file.write(bytes(4 << 20))\n"
            "    except OSError:\n        pass\n    return total\n")  # fmt: skip
    assert passes(many, [f"assert f(1) <= {sandbox.TMP_MIB << 20}"]) is True


def test_files_of_outside_are_neither_seen_nor_changed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    home = Path.home()
    reads = "import os\ndef f(path):\n    return os.path.lexists(path)\n"
    for path in (
        secret,
        ROOT / "README.md",
        home / ".ssh",
        "/etc/passwd",
        "/proc/1",
        "/sys",
        "/var/tmp",
        "/root/.bashrc",
    ):
        assert passes(reads, [f"assert f({str(path)!r}) is False"]) is True, path
    destroys = ("import os, shutil\ndef f(path):\n    done = []\n    for root in ('/', '/usr', '/usr/bin', '/tmp/..'):\n"
                "        try:\n            open(os.path.join(root, 'mine'), 'w').close()\n            done.append(root)\n"
                "        except OSError:\n            pass\n    shutil.rmtree('/usr/share', ignore_errors=True)\n"
                "    shutil.rmtree(path, ignore_errors=True)\n    return done\n")  # fmt: skip
    before = sorted(os.listdir("/usr/share"))
    assert passes(destroys, [f"assert f({str(tmp_path)!r}) == []"]) is True
    assert secret.read_text() == "s3cret" and sorted(os.listdir("/usr/share")) == before
    mine = "import os\ndef f(x):\n    open('/tmp/mine', 'w').close()\n    return os.listdir('/tmp')\n"
    assert passes(mine, ["assert f(1) == ['mine']"]) is True and not Path("/tmp/mine").exists()  # a private /tmp


def test_there_is_no_network_and_nobody_to_talk_to():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        dials = ("import socket\ndef f(port):\n    found = []\n"
                 "    for host in ('127.0.0.1', '1.1.1.1'):\n        try:\n"
                 "            socket.create_connection((host, port), timeout=2)\n            found.append(host)\n"
                 "        except OSError:\n            pass\n    return found + [n for _, n in socket.if_nameindex() if n != 'lo']\n")  # fmt: skip
        assert passes(dials, [f"assert f({port}) == []"]) is True
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("\0afterok-test-of-sandbox")
        listening.listen()
        abstract = ("import socket\ndef f(x):\n    try:\n        socket.socket(socket.AF_UNIX).connect('\\0afterok-test-of-sandbox')\n"
                    "        return True\n    except OSError:\n        return False\n")  # fmt: skip
        assert passes(abstract, ["assert f(1) is False"]) is True
    assert passes("import os\ndef f(pid):\n    try:\n        os.kill(pid, 0)\n        return True\n    except OSError:\n"
                  "        return False\n", [f"assert f({os.getpid()}) is False"]) is True  # fmt: skip


def test_nobody_is_root_there_and_nothing_is_told_of_the_environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    program = "import os\ndef f(x):\n    return os.getuid(), sorted(os.environ)\n"
    tests = ["user, names = f(1)\nassert user != 0 and 'WANDB_API_KEY' not in names"]
    if os.getuid() == 0:
        assert passes(program, tests) is True
    assert passes(program, [tests[0].replace("user != 0 and ", "")]) is True


def test_a_process_that_outlives_its_parent_ends_with_its_sandbox():
    mark = f"outlives{os.getpid()}"
    leaves = (f"import os, sys\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
              f"        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(1000)', '{mark}'])\n"
              "    os._exit(0)\n")  # fmt: skip
    slowly = "def f(x):\n    import time\n    time.sleep(1)\n    return 2 * x\n"
    assert passes(leaves + slowly) is True and gone(mark)
    assert passes(leaves + "import os, time\ntime.sleep(1)\nos._exit(0)\n") is False and gone(mark)
    assert passes(leaves + "while True:\n    pass\n", limits=HASTY) is False and gone(mark)


def test_sandboxes_end_with_the_process_that_asked_for_them():
    mark = f"afterok{os.getpid()}"
    program = (
        f"import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(1000)', '{mark}'])\n"
    )
    asks = f"from data_tools.answers.sandbox import Limits, verdict\nverdict({program!r}, ['f'], ['f'], limits=Limits(1000.0))"
    process = subprocess.Popen([sys.executable, "-c", asks], cwd=ROOT)
    until = time.monotonic() + 120
    while not [pid for pid in running(mark) if pid != process.pid] and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert gone(mark)


def test_without_a_sandbox_nothing_is_run_and_the_remedy_is_told(monkeypatch):
    sandbox.command.cache_clear()
    try:
        monkeypatch.setattr("shutil.which", lambda name: None)
        with pytest.raises(sandbox.NoSandbox):
            verdict(RIGHT, TESTS, ["f"])
        assert "no bubblewrap" in sandbox.why_not.__wrapped__() and "apt-get install" in sandbox.why_not.__wrapped__()
        monkeypatch.setattr("shutil.which", lambda name: "/bin/false")  # as where user namespaces are forbidden
        sandbox.command.cache_clear()
        with pytest.raises(sandbox.NoSandbox):
            verdict(RIGHT, TESTS, ["f"])
        assert "did not begin" in sandbox.why_not.__wrapped__()
    finally:
        sandbox.command.cache_clear()
