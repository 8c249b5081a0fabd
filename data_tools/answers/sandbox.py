"""Programs that models write, run against tests: each in a sandbox of its own (bubblewrap), with its tests in another.

    verdict("def add(a, b): return a + b", tests=["assert add(1, 2) == 3"], calls=["add"])    # Verdict(True, "")

    the process of verifiers ── tests (bwrap) ══ a socket ══ the program (bwrap)

sandboxed.py is what runs in both, after confined.py. A program passes if its answers are right and it has all of them
given when its time ends. Whatever else it does is a failed sample, and ends with its sandbox: loops, forks,
allocations, sys.exit(0), what it prints, processes that outlive their parent. What a sandbox has:

    files      the system's (/usr, /lib, …) and Python's own, read-only; an empty /tmp of TMP_MIB in TMP_FILES files;
               nothing else, not even /proc
    network    none, and no process, socket or message queue of outside is seen
    user       as root, a user without a name, since limits of processes do not bind root; else the caller's, in a user
               namespace; no capability, and no way to get one
    calls      of the kernel, but those of syscalls.py: memory that counts for no process, namespaces, mounts, …
    limits     `Limits`; PROCESSES, so that these times the memory is the most that a program holds; sizes of files

No cgroup is needed, as jobs of Slurm have none that is theirs to divide. Where memory runs out all the same, the kernel
ends a program before anything else of the job (oom_score_adj).

Python is the one that runs this, without site-packages.
"""

import contextlib
import json
import math
import os
import platform
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from data_tools.answers import syscalls
from data_tools.answers.sandboxed import Connection, Gone

PROCESSES = 8  # of a sandbox, threads counted
TMP_MIB, TMP_FILES, FILE_MIB, OPEN_FILES = 64, 1024, 16, 64
_START_LIMIT_S = 60.0  # for a sandbox to stand, on a busy machine
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_REMEDY = "install bubblewrap (apt-get install bubblewrap) and allow user namespaces on every node that scores"
_NOBODY = "65534"
_FIRST_TO_GO = ("/bin/sh", "-c", 'echo 1000 >/proc/self/oom_score_adj; exec "$@"', "sh")


@dataclass(frozen=True)
class Limits:
    """Bounds a program: `time_s` from when its tests begin, `memory_gib` of each of its processes."""

    time_s: float = 6.0
    memory_gib: float = 1.0


@dataclass(frozen=True)
class Verdict:
    """Says whether a program passed, and `why` it did not. `passed` is None where its tests ask for what is not here: a
    package, a name that nobody defines, a function of theirs that is handed to the program."""

    passed: bool | None
    why: str = ""


class NoSandbox(Exception):
    """Raised with the reason where no sandbox stands: nothing is known of the program."""


def verdict(
    program: str, tests: Sequence[str], calls: Sequence[str], setup: str = "", limits: Limits = Limits()
) -> Verdict:
    """Return whether a program's answers pass all tests. Raise NoSandbox.

    `calls` are the names that tests take from the program, `setup` is code that defines whatever else they use. As root
    it is for one thread of a process at a time: others' programs would count as processes of the same user.
    """
    given = {"program": program, "setup": setup, "tests": list(tests), "calls": list(calls)}
    with contextlib.ExitStack() as stack:
        ours, result = _pair(stack)
        one, other = _pair(stack)
        stack.enter_context(_sandbox("tests", [one, result], limits))
        stack.enter_context(_sandbox("program", [other], limits))
        for theirs in (one, other, result):
            theirs.close()
        told = Connection(ours.detach())
        told.limit(_START_LIMIT_S)
        try:
            stands = told.receive()
        except Gone:
            raise NoSandbox("the sandbox of the tests did not begin") from None
        if not stands:
            raise NoSandbox("the sandbox of the program did not begin")
        told.limit(limits.time_s)
        try:
            told.send(given)
            found = told.receive()
        except Gone as gone:
            return Verdict(False, str(gone))
        return Verdict(found["passed"], found["why"])


def _pair(stack: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    one, other = socket.socketpair()
    stack.callback(one.close)
    stack.callback(other.close)
    return one, other


@contextlib.contextmanager
def _sandbox(role: str, ends: Sequence[socket.socket], limits: Limits) -> Iterator[subprocess.Popen]:
    """Start a sandbox with these ends of sockets. Whatever runs in it is over when this is."""
    numbers = [end.fileno() for end in ends]
    inside = [json.dumps(_limits(role, limits)), _text("sandboxed.py"), role, str(numbers[0]), str(numbers[-1])]
    process = subprocess.Popen(
        [*command(), *inside],
        env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **_libraries()},
        pass_fds=numbers,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _limits(role: str, limits: Limits) -> dict[str, Any]:
    second = _second_user(role)
    return {
        "AS": int(limits.memory_gib * 2**30), "CPU": math.ceil(limits.time_s) + 1, "FSIZE": FILE_MIB << 20,
        "NOFILE": OPEN_FILES, "SIGPENDING": OPEN_FILES, "MEMLOCK": 0, "MSGQUEUE": 0, "RTPRIO": 0, "NICE": 0,
        "CORE": 1,  # 0 would still start a handler of core dumps (core(5)), outside and as root
        "processes": PROCESSES, "uid": second, "others": 0 if second else _threads_of(os.getuid()),
        "files": TMP_FILES * ("--size" in command()), "filter": (syscalls.filter_for() or b"").hex(),
    }  # fmt: skip


def _second_user(role: str) -> int:
    """Return the number of a user that nobody else has, where this is root and there is one; else 0."""
    if os.getuid() != 0:
        return 0
    last = max(int(start) + int(size) for start, _, size in map(str.split, Path("/proc/self/uid_map").open()))
    half = min(last, 1 << 31) // 2
    return half + (2 * os.getpid() + (role == "tests")) % half if half > 1000 else 0


def _threads_of(user: int) -> int:
    """Return how many threads a user has: before Linux 5.14 a limit of processes counts those outside, too."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            total += len(os.listdir(folder / "task")) if folder.stat().st_uid == user else 0
    return total


@cache
def command() -> tuple[str, ...]:
    """Return the command that runs Python on confined.py in a sandbox; its arguments come after it.

    Raise NoSandbox where there is no bubblewrap, or no table of system calls.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise NoSandbox("there is no bubblewrap (bwrap) here")
    if syscalls.filter_for() is None:
        raise NoSandbox(f"it is not known which system calls to refuse on {platform.machine()}")
    known = subprocess.run([bwrap, "--help"], capture_output=True, text=True, check=False)
    has = f"{known.stdout}{known.stderr}".__contains__
    second = bool(_second_user(""))
    user = ["--cap-drop", "ALL"] if second else ["--unshare-user", "--uid", _NOBODY, "--gid", _NOBODY]
    private = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    tmp = ["--tmpfs", "/tmp", "--remount-ro", "/tmp"]  # one that cannot be bounded is not written to
    needed = ["SETUID", "SETGID"] if second else []
    if has("--size") and has("--perms") and (second or not os.stat(bwrap).st_mode & stat.S_ISUID):
        tmp = ["--perms", "1777", "--size", str(TMP_MIB << 20), "--tmpfs", "/tmp"]
        needed.append("SYS_ADMIN")  # confined.py gives /tmp its number of files, and then drops them all
    capabilities = [word for name in needed for word in ("--cap-add", f"CAP_{name}")]
    shown = [*_files(), *tmp, "--remount-ro", "/", "--chdir", "/tmp"]
    python = [_python(), "-S", "-s", "-P", "-c", _text("confined.py")]
    ends = ["--die-with-parent", "--new-session"]
    return (*_FIRST_TO_GO, bwrap, *user, *capabilities, *private, *ends, *shown, "--", *python)


@cache
def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


def _python() -> str:
    """Return the interpreter itself, whatever virtual environment this is."""
    return os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)


def _files() -> list[str]:
    """Return the arguments that show a sandbox the system's files and Python's, read-only."""
    shown = ["--ro-bind", "/usr", "/usr"]
    for name in _SYSTEM:
        path = Path("/") / name
        if path.is_symlink():
            shown += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            shown += ["--ro-bind", str(path), str(path)]
    shown += ["--dir", "/etc", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    # Not --dev, whose terminals take a user namespace more, in which /tmp could not be bounded.
    shown += ["--dir", "/dev"] + [word for path in _DEVICES for word in ("--dev-bind-try", path, path)]
    standard = [sys.base_prefix, sys.base_exec_prefix, sysconfig.get_path("stdlib"), os.path.dirname(_python())]
    libraries = [part for value in _libraries().values() for part in value.split(":") if part]
    for place in dict.fromkeys(map(os.path.realpath, [*standard, *libraries])):
        if Path(place).is_dir() and not place.startswith("/usr/") and place not in ("/", "/usr"):
            above = [str(folder) for folder in reversed(Path(place).parents[:-1])]  # open to all, unlike /root
            shown += [word for folder in above for word in ("--dir", folder)] + ["--ro-bind", place, place]
    return shown


def _libraries() -> dict[str, str]:
    """Return where the interpreter finds libraries that lie elsewhere: modules of clusters say so."""
    return {"LD_LIBRARY_PATH": os.environ["LD_LIBRARY_PATH"]} if os.environ.get("LD_LIBRARY_PATH") else {}


# -- whether there are sandboxes here ----------------------------------------------------------------------------------


@cache
def why_not() -> str:
    """Return why this machine has no sandbox, with the remedy; "" where it has one that bounds what it runs.

    It is tried, once a process, with a program that must pass and one that must be held back.
    """
    try:
        passed = verdict("def twice(x): return 2 * x", ["assert twice(2) == 4"], ["twice"])
        bombs = verdict(_FORKS, [f"assert forks() < {PROCESSES}"], ["forks"])
    except (NoSandbox, OSError) as error:
        return f"programs are run in sandboxes, and here is none: {error}{_tried()}; {_REMEDY}"
    for what, found in (("runs no program", passed), (f"holds no program to {PROCESSES} processes", bombs)):
        if not found.passed:
            return f"programs are run in sandboxes, and the one of this machine {what} ({found.why}); {_REMEDY}"
    return ""


_FORKS = """
import os, time
def forks():
    for number in range(64):
        try:
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
        except OSError:
            return number
    return 64
"""


def _tried() -> str:
    """Return what bubblewrap or confined.py itself says of a sandbox that does nothing."""
    with contextlib.suppress(NoSandbox, OSError, subprocess.TimeoutExpired):
        ask = [*command(), json.dumps(_limits("program", Limits())), "pass"]
        tried = subprocess.run(ask, capture_output=True, text=True, check=False, timeout=_START_LIMIT_S)
        return f" ({' '.join(tried.stderr.split())[-200:]})" if tried.returncode else ""
    return ""
