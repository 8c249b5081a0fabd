"""Programs in their sandboxes: right ones pass, whatever else a program does is a failed sample and ends with it."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools.answers import sandbox, sandboxed
from data_tools.answers.sandbox import Limits, verdict

pytestmark = pytest.mark.skipif(
    bool(sandbox.why_not()), reason="this machine has no sandbox (sandbox.why_not says why)"
)

ROOT = Path(__file__).parents[2]
TESTS = ["assert f(2) == 4", "assert f([1]) == [1, 1]"]
RIGHT = "def f(x):\n    return 2 * x\n"
PATIENT = Limits(time_s=120.0)  # a busy machine is no fault of a program
HASTY = Limits(time_s=2.0)  # of what never ends by itself
FOREVER = "while True:\n    pass\n"


def passes(program: str, tests: list[str] = TESTS, setup: str = "", limits: Limits = PATIENT) -> bool | None:
    return verdict(program, tests, ["f"], setup, limits).passed


def test_a_right_program_passes_and_a_wrong_one_does_not():
    assert passes(RIGHT) is True
    assert passes(RIGHT.replace("2", "3")) is False
    assert passes("x = 1") is False and passes("def f(x:") is False and passes("") is False  # without f: its own fault


CHEATS = {
    "leaves before its tests": "import sys\nsys.exit(0)",
    "leaves in a test": "def f(x):\n    raise SystemExit(0)",
    "ends its process": "import os\nos._exit(0)",
    "ends its process in a test": "import os\ndef f(x):\n    os._exit(0)",
    "says that it passed": """
print('passed')
import os
for number in range(3, 64):
    try:
        os.write(number, b'passed')
    except OSError:
        pass
""",
    "says that its sandbox did not begin": """
import json, os, struct, time
told = json.dumps({"raised": ["the sandbox did not begin"]}).encode()
for number in range(3, 64):
    try:
        os.write(number, struct.pack("!I", len(told)) + told)
    except OSError:
        pass
""",
    "answers what is equal to all": """
class A:
    def __eq__(self, other):
        return True
    def __hash__(self):
        return 0
def f(x):
    return A()
""",
    "is a number that is equal to all": """
class A(int):
    def __eq__(self, other):
        return True
def f(x):
    return A(7)
""",
    "changes what assert means": """
import builtins
builtins.AssertionError = ValueError
del builtins.len
def f(x):
    return None
""",
    "changes what is imported": """
import sys, types
sys.modules['math'] = types.SimpleNamespace(isclose=lambda *given: True)
def f(x):
    return 0
""",
    "looks for its tests": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for name in ('tests', 'names', 'given', 'asked'):
            frame.f_locals.get(name) and frame.f_locals[name].clear()
        frame = frame.f_back
    return None
""",
}


@pytest.mark.parametrize("way", CHEATS)
def test_a_program_that_does_anything_but_answer_fails(way):
    tests = ["import math\nassert math.isclose(f(2), 4)"] if way == "changes what is imported" else TESTS
    assert passes(CHEATS[way], tests) is False


@pytest.mark.parametrize("stands", [True, False])
def test_whether_both_sandboxes_stand_is_told_before_the_program_is_sent_and_its_time_begins(stands):
    (program, theirs), (asking, told) = socket.socketpair(), socket.socketpair()
    tests = sandboxed.Connection(asking.detach())
    tests.send({"program": "", "setup": "", "tests": [], "calls": []})
    if stands:
        program.sendall(b"\0\0\0\7" + b'"ready"')
    program.close()
    sandboxed.main("tests", str(theirs.detach()), str(told.detach()))
    assert tests.receive() is stands
    with pytest.raises(sandboxed.Gone) if not stands else contextlib.nullcontext():
        assert tests.receive()["passed"] is False  # whatever the program says


def test_a_test_that_catches_everything_does_not_pass_a_program_that_is_gone():
    for ends in ("os._exit(0)", "os.kill(os.getpid(), 9)"):
        program = f"import os\ndef f(x):\n    {ends}\n"
        assert passes(program, ["try:\n    f(1)\nexcept:\n    pass"]) is False, ends
    assert passes(RIGHT, ["try:\n    f(lambda: 1)\nexcept:\n    pass"]) is None


def test_values_come_back_as_what_they_are():
    values = ["None", "True", "-3", "10**400", "0.1", "float('inf')", "1j", "'\\ud800 ä'", "b'\\x00'", "[1, [2]]",
              "(1, (2,))", "{1, 2}", "frozenset({1})", "{(1, 2): [3], None: 'x'}", "range(3)", "collections.deque([1])",
              "decimal.Decimal('1.50')", "fractions.Fraction(1, 3)", "datetime.date(2024, 2, 29)",
              "datetime.datetime(2024, 2, 29, 1)", "datetime.timedelta(-1, 2, 3)", "datetime.time(1, 2, 3, 4)",
              "datetime.datetime(2024, 2, 29, 1, tzinfo=datetime.timezone.utc)", "bytearray(b'a')", "int", "...",
              "array.array('d', [0.1])", "{1: 2}.keys()", "{(1, 2): 3}.items()", "collections.Counter('aab')",
              "collections.OrderedDict(b=1, a=2)", "NotImplemented", "ValueError"]  # fmt: skip
    setup = "import array, collections, datetime, decimal, fractions"
    tests = [f"assert f({value}) == {value} and type(f({value})) is type({value})" for value in values]
    assert verdict(f"{setup}\ndef f(x):\n    return x\n", tests, ["f"], setup, PATIENT) == sandbox.Verdict(True)
    assert passes("def f(x):\n    return float('nan')\n", ["assert f(1) != f(1)"]) is True


ORDINARY = """
import asyncio, concurrent.futures, os, random, shutil, sqlite3, subprocess, sys, tempfile, threading, time
def f(x):
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, 'a'), 'w') as file:
            file.write('text')
        shutil.copy(file.name, file.name + 'b')
        with sqlite3.connect(file.name + 'c') as table:
            table.execute('create table t (a)')
            table.execute('insert into t values (3)')
        copied = open(file.name + 'b').read()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        squares = list(pool.map(lambda n: n * n, range(3)))
    told = subprocess.run([sys.executable, '-c', 'print(7)'], capture_output=True, text=True).stdout
    open('/dev/null', 'w').write(str(random.random()))
    bytes = os.urandom(4) + open('/dev/zero', 'rb').read(1)
    return copied, squares, told, asyncio.run(asyncio.sleep(0, 'slept')), len(bytes)
"""


def test_what_programs_do_in_the_ordinary_way_they_can_do():
    assert (
        verdict(ORDINARY, ["assert f(1) == ('text', [0, 1, 4], '7\\n', 'slept', 5)"], ["f"], limits=PATIENT).why == ""
    )


OBJECTS = """
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
def add(values):
    values.append(7)
def sum(a, b):
    return a * b
def fails(x):
    raise KeyError(x)
def is_a(x, kind):
    return isinstance(x, kind)
"""


def test_objects_and_generators_of_the_program_can_be_used():
    tests = [
        "assert chain([Pair(5, 24), Pair(15, 25)]) == 25 and Pair(1, 2).a == 1 and str(Pair(1, 2)) == '<1>'",
        "assert list(halves(8)) == [4, 2, 1] and halves(8) != [4, 2, 1]",
        "mine = [3, 1]\nassert sort(mine) == [1, 3] and mine == [1, 3]",
        "mine = [3, 1]\nassert sort(values=mine) == [1, 3] and mine == [1, 3]",
        "for mine in ([], bytearray(), array.array('b'), deque()):\n    add(mine)\n    assert list(mine) == [7]",
        "walk = halves(8)\nassert next(walk) == 4 and list(walk) == [2, 1] and next(walk, 0) == 0",
        "assert sum(2, 3) == 6",
        "first.b = Pair(1, [2])\nfirst.b.b[0] = 3\nassert first.b.a == 1 and chain([first.b]) == [2]",
        "assert is_a(3, int) and not is_a(3, str) and first.a == 7",
        "try:\n    fails('a')\n    assert False\nexcept KeyError:\n    pass",
    ]
    calls = ["Pair", "chain", "halves", "sort", "add", "sum", "fails", "is_a"]
    setup = "import array\nfrom collections import deque\nfirst = Pair(7, 8)"
    assert verdict(OBJECTS, tests, calls, setup=setup, limits=PATIENT).why == ""


def test_tests_that_ask_for_what_is_not_here_say_nothing_about_the_program():
    for test in ("import no_such_module", "assert f(1) =", "assert g(1) == 2", "assert f(lambda x: x)"):
        assert passes(RIGHT, [test]) is None, test
    for program in ("import no_such_module\n" + RIGHT, "def f(x):\n    return unknown\n"):
        assert passes(program) is False  # its own fault


def running(mark: str) -> list[int]:
    """Return the processes of this machine, but this one, whose command line holds `mark`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int(path.name) != os.getpid() and mark.encode() in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            pass
    return found


def gone(mark: str) -> bool:
    """Return whether such processes end; the kernel may take a moment to reap them."""
    until = time.monotonic() + 60
    while running(mark) and time.monotonic() < until:
        time.sleep(0.05)
    return not running(mark)


STUBBORN = """
import signal
for number in (signal.SIGXCPU, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
"""


@pytest.mark.parametrize("program", [
    FOREVER, "def f(x):\n    while True:\n        pass\n", "import time\ntime.sleep(1000)\n", STUBBORN + FOREVER,
])  # fmt: skip
def test_what_does_not_end_is_ended(program):
    assert passes(program, limits=HASTY) is False


DESTROYS = """
import os, shutil
def f(path):
    done = []
    for root in ('/', '/usr', '/usr/bin', '/tmp/..', '/dev', '/dev/shm'):
        try:
            open(os.path.join(root, 'mine'), 'w').close()
            done.append(root)
        except OSError:
            pass
    shutil.rmtree('/usr/share', ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)
    return done
"""
LISTS = "import os\ndef f(x):\n    open('/tmp/mine', 'w').close()\n    return os.listdir('/tmp')\n"
SEES = "import os\ndef f(path):\n    return os.path.lexists(path)\n"


def test_files_of_outside_are_neither_seen_nor_changed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    outside = [secret, ROOT / "README.md", Path.home() / ".bashrc", Path.home() / ".ssh", "/etc/passwd", "/proc/1"]
    assert passes(SEES, [f"assert f({str(path)!r}) is False" for path in outside]) is True
    before = sorted(os.listdir("/usr/share"))
    assert passes(DESTROYS, [f"assert f({str(tmp_path)!r}) == []"]) is True
    assert secret.read_text() == "s3cret" and sorted(os.listdir("/usr/share")) == before
    assert passes(LISTS, ["assert f(1) == ['mine']"]) is True and not Path("/tmp/mine").exists()  # a private /tmp


DIALS = """
import os, socket
def f(port, pid, name):
    found = []
    for family in range(2, 46):  # 40 would lead out of a virtual machine
        try:
            found.append(socket.socket(family, socket.SOCK_DGRAM).family)
        except OSError:
            pass
    for host in ('127.0.0.1', '1.1.1.1'):
        try:
            socket.create_connection((host, port), timeout=2)
            found.append(host)
        except OSError:
            pass
    try:
        socket.socket(socket.AF_UNIX).connect(name)
        found.append('abstract')
    except OSError:
        pass
    try:
        os.kill(pid, 0)
        found.append(pid)
    except OSError:
        pass
    return found
"""


def test_there_is_no_network_and_nobody_to_talk_to():
    name = f"\0afterok-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(name)
        listening.listen()
        tests = [f"assert f({server.getsockname()[1]}, {os.getpid()}, {name!r}) == []"]
        assert verdict(DIALS, tests, ["f"], limits=PATIENT).why == ""


TELLS = "import os\ndef f(x):\n    return os.getuid(), list(os.environ)\n"


def test_nobody_is_root_there_and_nothing_is_told_of_the_environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    tests = ["user, names = f(1)", "assert 'WANDB_API_KEY' not in names", "assert user != 0"]
    assert passes(TELLS, tests) is True


LEAVES = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(1000)', '{mark}'])
    os._exit(0)
time.sleep(1)
"""


def test_a_process_that_outlives_its_parent_ends_with_its_sandbox():
    mark = f"outlives{os.getpid()}"
    leaves = LEAVES.format(mark=mark)
    assert passes(leaves + RIGHT) is True and gone(mark)
    assert passes(leaves + "os._exit(0)\n") is False and gone(mark)
    assert passes(leaves + FOREVER, limits=HASTY) is False and gone(mark)


STAYS = "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(1000)', '{mark}'])\n"
ASKS = """
import sys
from data_tools.answers.sandbox import Limits, verdict
verdict(sys.stdin.read(), ['f'], ['f'], limits=Limits(1000.0))
"""


ASKED, NONE = ("Inh", "Prm", "Eff", "Amb"), "0" * 16


def test_a_sandbox_has_a_user_of_its_own_and_no_rights_and_ends_with_the_process_that_asked_for_it():
    mark = f"asked{os.getpid()}"
    process = subprocess.Popen([sys.executable, "-c", ASKS], cwd=ROOT, stdin=subprocess.PIPE, text=True)
    process.stdin.write(STAYS.format(mark=mark))
    process.stdin.close()
    until = time.monotonic() + 120
    while not running(mark) and time.monotonic() < until:
        time.sleep(0.05)
    (inside,) = running(mark)
    assert Path(f"/proc/{inside}/oom_score_adj").read_text() == "1000\n"  # out of memory: it goes before all others
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{inside}/status").read_text().splitlines())
    users = set(status["Uid"].split() + status["Gid"].split())
    assert status["Seccomp"] == "2" and status["NoNewPrivs"] == "1" and {status[f"Cap{x}"] for x in ASKED} == {NONE}
    if os.getuid() == 0:  # limits of processes do not bind root, in a namespace or out of it
        assert len(users) == 1 and min(map(int, users)) > 1000 and status["Groups"].strip() == ""
    process.kill()
    process.wait()
    assert gone(mark)


@pytest.fixture
def other_bwrap(monkeypatch):
    def become(path: str | None) -> None:
        monkeypatch.setattr("shutil.which", lambda name: path)
        sandbox.command.cache_clear()

    yield become
    sandbox.command.cache_clear()


@pytest.mark.parametrize("path, reason", [(None, "no bubblewrap"), ("/bin/false", "did not begin")])
def test_without_a_sandbox_nothing_is_run_and_the_remedy_is_told(other_bwrap, path, reason):
    other_bwrap(path)  # /bin/false: as where user namespaces are forbidden
    with pytest.raises(sandbox.NoSandbox, match=reason):
        verdict(RIGHT, TESTS, ["f"])
    told = sandbox.why_not.__wrapped__()
    assert reason in told and "apt-get install bubblewrap" in told


def test_a_sandbox_that_does_not_hold_its_programs_is_none(monkeypatch):
    own = sandbox._limits
    monkeypatch.setattr(sandbox, "_limits", lambda role, limits: own(role, limits) | {"processes": 1000})
    assert f"holds no program to {sandbox.PROCESSES} processes" in sandbox.why_not.__wrapped__()
