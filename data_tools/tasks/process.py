"""One process of verifiers: what the run sees of it (`Process`), and what happens in it (`serve`).

    the run ── a pair of sockets ─────────────────────┐
       └── supervisor (adopts what verifiers leave) ── the process of verifiers ── whatever verifiers start

Requests are pickles, for the process trusts the run. Answers are JSON of a bounded size that repeats the request's
token, for the run does not trust the process: it unpickles nothing, waits for no more than its time limit, and believes
no answer that was sent before it asked. When the process ends or is ended, so does everything it started.

Verifiers have limits of memory (AFTEROK_VERIFIER_GIB on top of what the tasks took to load; 0: none) and of processes,
and of the run's environment only the variables in `KEPT` and those that AFTEROK_VERIFIER_ENV names, with commas: no
secret, unless it is named there.
"""

import contextlib
import ctypes
import json
import os
import pickle
import re
import resource
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from data_tools.mistake import UserMistake

START_LIMIT_S = 300.0  # for a process to import its tasks from a slow shared filesystem
LONGEST_ANSWER = 4 << 20  # bytes
LEAVE_S = 5.0  # for a supervisor to end what is below it
_MARK = "AFTEROK_VERIFIERS_OF"  # in the environment of all that is below one supervisor
MEMORY_GIB, MEMORY_VARIABLE, ENVIRONMENT_VARIABLE = 4.0, "AFTEROK_VERIFIER_GIB", "AFTEROK_VERIFIER_ENV"
MORE_PROCESSES = 512  # of the user's, over those there are when verifiers begin; root has no such limit
KEPT = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "XDG_CACHE_HOME",
        "LD_LIBRARY_PATH", "SSL_CERT_FILE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE",
        "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONHASHSEED", "PYTHONSAFEPATH", "PYTHONDONTWRITEBYTECODE",
        "PYTHONPYCACHEPREFIX",
         "OPENBLAS_CORETYPE",
        MEMORY_VARIABLE, ENVIRONMENT_VARIABLE)  # fmt: skip
_END = signal.SIGRTMIN + 3  # asks a supervisor to end; no signal that Slurm sends to all of a step
_PDEATHSIG, _SUBREAPER = 1, 36  # PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER of linux/prctl.h
_TOKEN = 16  # bytes
_prctl = ctypes.CDLL(None).prctl


class Ended(Exception):
    """Raised with the reason why a process gives no answer and is of no more use."""


def memory_gib(said: str | None = None) -> float:
    """Return how much memory verifiers may take, in GiB; 0 for no limit.

    Raise UserMistake where the variable, or what it would be (`said`), holds no such number.
    """
    text = said or os.environ.get(MEMORY_VARIABLE) or str(MEMORY_GIB)
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]*)?", text):
        raise UserMistake(
            f"variable {MEMORY_VARIABLE}: {text!r:.40} is no number of GiB, such as 4 or 0.5; 0: no limit"
        )
    return float(text)


def _environment() -> dict[str, str]:
    named = filter(None, os.environ.get(ENVIRONMENT_VARIABLE, "").split(","))
    kept = {name: os.environ[name] for name in (*KEPT, *map(str.strip, named)) if name in os.environ}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


class Process:
    """Represents a process of verifiers, seen from the run's side. Its first answer says what it met when it began."""

    def __init__(self, begin: str, argument: Any):
        """Start it: `begin`, "module:function", makes of the `argument` the function that answers requests there."""
        memory_gib()  # said here, and not by a traceback there
        self._socket, theirs = socket.socketpair()
        command = [
            sys.executable,
            "-c",
            "from data_tools.tasks.process import serve; serve()",
            str(theirs.fileno()),
            begin,
        ]
        self._mark = secrets.token_hex(_TOKEN)
        self._process = subprocess.Popen(
            command,
            env=_environment() | {_MARK: self._mark},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            process_group=0,
        )
        theirs.close()
        self._killing, self._killed = threading.Lock(), False
        with contextlib.suppress(Ended):  # it ended; what is received says so
            self._send(argument, START_LIMIT_S)

    def begun(self) -> Any:
        """Return its first answer. Raise Ended."""
        return self._receive(b"", time.monotonic() + START_LIMIT_S, START_LIMIT_S)

    def answer(self, request: Any, limit_s: float) -> Any:
        """Return its answer to a request, plain data as JSON has it. Raise Ended."""
        token = secrets.token_bytes(_TOKEN)
        until = time.monotonic() + limit_s
        with contextlib.suppress(Ended):
            self._send((token, request), limit_s)
        return self._receive(token, until, limit_s)

    def _send(self, message: Any, limit_s: float) -> None:
        data = pickle.dumps(message)
        try:
            self._socket.settimeout(limit_s)
            self._socket.sendall(struct.pack("!Q", len(data)) + data)
        except OSError as error:
            raise Ended(str(error)) from None

    def _receive(self, token: bytes, until: float, limit_s: float) -> Any:
        head = self._exactly(len(token) + 4, until, limit_s)
        size = int.from_bytes(head[-4:], "big")
        if head[:-4] != token:
            raise Ended("the verifier's process wrote what is no answer")
        if size > LONGEST_ANSWER:
            raise Ended(f"the verifier's answer has {size:,} bytes; {LONGEST_ANSWER:,} are the most")
        try:
            return json.loads(self._exactly(size, until, limit_s))
        except (ValueError, RecursionError):
            raise Ended("the verifier's process wrote what is no answer") from None

    def _exactly(self, size: int, until: float, limit_s: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                self._socket.settimeout(max(1e-3, until - time.monotonic()))
                more = self._socket.recv(size - len(data))
            except TimeoutError:
                raise Ended(f"the verifier ran past its time limit of {limit_s:g} s") from None
            except OSError:
                more = b""
            if not more:
                raise Ended(self._ending())
            data += more
        return bytes(data)

    def _ending(self) -> str:
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "the verifier closed its process's connection"
        by = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"the verifier ended its process ({by})"

    def kill(self) -> None:
        """End it with whatever its verifiers started. The thread it serves and the one that closes may come at once."""
        with self._killing:
            if self._killed:  # a number that was reaped may become somebody else's
                return
            self._killed = True
            if self._process.poll() is None:
                self._process.send_signal(_END)
                self._process.send_signal(signal.SIGCONT)  # a verifier may have stopped it
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(LEAVE_S)
            if self._process.poll() != 0:  # it was killed, or cannot end what is below it
                _end_marked(f"{_MARK}={self._mark}".encode())
                self._process.kill()
                self._process.wait()
            with contextlib.suppress(ProcessLookupError, PermissionError):  # of a supervisor that was killed
                os.killpg(self._process.pid, signal.SIGKILL)


def _end_marked(mark: bytes) -> None:
    """Kill the processes that began with `mark` in their environment, until there are none."""
    until = time.monotonic() + LEAVE_S  # a process that cannot be killed is its file system's
    while time.monotonic() < until:
        found = [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if _is_marked(folder, mark)]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _is_marked(process: Path, mark: bytes) -> bool:
    try:
        return mark in (process / "environ").read_bytes().split(b"\0")  # empty where it ended and is not reaped
    except OSError:
        return False


# -- in the process ---------------------------------------------------------------------------------------------------


def serve() -> None:
    """Answer what the run sends, until it is gone; as a child of a supervisor."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)  # a command that a verifier starts reads no later request
    _supervise(connection)
    # The parent is the supervisor. Even in the middle of a verifier that never returns.
    _prctl(_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the run's to answer
    module, _, function = sys.argv[2].partition(":")
    begin: Callable[[Any], tuple[Any, Callable[[Any], Any] | None]] = getattr(
        __import__(module, fromlist=[function]), function
    )
    first, answer = begin(_read(connection))
    _write(connection, b"", first)
    if answer is None:
        return
    _limit()
    while (asked := _read(connection)) is not None:
        token, request = asked
        _write(connection, token, answer(request))


def _read(connection: socket.socket) -> Any:
    """Return the next message, None once the run is gone."""
    with connection.makefile("rb", buffering=0) as file:
        data = bytearray()
        size = 8
        while len(data) < size:
            more = file.read(min(size - len(data), 1 << 20))
            if not more:
                return None
            data += more
            if len(data) == 8:
                size = 8 + int.from_bytes(data[:8], "big")
    return pickle.loads(data[8:])


def _write(connection: socket.socket, token: bytes, answer: Any) -> None:
    data = json.dumps(answer, allow_nan=False).encode()
    connection.sendall(token + struct.pack("!I", len(data)) + data)


def _limit() -> None:
    """Bound memory and processes, from what the tasks took to load."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if (gib := memory_gib()) > 0:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _lower(resource.RLIMIT_AS, pages * resource.getpagesize() + int(gib * 2**30))
    mine = sum(_threads(folder) for folder in Path("/proc").glob("[0-9]*"))
    _lower(resource.RLIMIT_NPROC, mine + MORE_PROCESSES)


def _threads(process: Path) -> int:
    """Return how many threads a process of this user has; 0 for others' and for one that ended."""
    try:
        return len(os.listdir(process / "task")) if process.stat().st_uid == os.getuid() else 0
    except OSError:
        return 0


def _lower(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def _supervise(connection: socket.socket) -> None:
    """Return in a child of this process, which itself stays to adopt and to end what the child leaves behind."""
    _prctl(_SUBREAPER, 1)
    _prctl(_PDEATHSIG, _END)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.pthread_sigmask(signal.SIG_BLOCK, {_END})
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {_END})
        return
    connection.close()
    signal.signal(_END, lambda *_: _leave(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {_END})
    while True:
        ended, status = os.wait()
        if ended == child:
            _leave(os.waitstatus_to_exitcode(status))


def _leave(code: int) -> NoReturn:
    """End everything below this process, then the process, as the verifiers' ended."""
    with contextlib.suppress(ChildProcessError):
        while True:  # what a killed one leaves becomes a child of ours
            for pid in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.001)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(code)


def _children() -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.append(int(folder.name))
    return found
