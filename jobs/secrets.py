"""Secrets by reference: a profile names where a value lies, the worker reads it on its node, nothing writes it down.

    file:PATH     a file of the user's that nobody else may read
    cmd:COMMAND   what a shell command prints
    env:NAME      a variable forwarded by sbatch. Slurm keeps it in the controller's state directory: no secret

Values go into the environment of the rank that reads them, by setenv(3), which does not show in /proc/PID/environ or
`ps e`; a child process that the phase starts inherits them, and there they do show (to the same user). What the rank
and its children print (jobs/masking.py), and messages about it, have the values masked; facts that hold one are
refused, and no core file is written. A command runs once an element: rank 0 hands what it printed to the others over
their store, which nobody else can enter, and which forgets it then.
"""

import json
import os
import resource
import signal
import stat
import subprocess
import urllib.parse
from collections.abc import Mapping, MutableMapping
from typing import Any

from data_tools.base.inside import expanded
from data_tools.mistake import UserMistake
from jobs.masking import MaskedOutput

COMMAND_LIMIT_S = 60.0
FILE_LIMIT = 1 << 16  # bytes; a larger file is no key
OTHERS = stat.S_IRWXG | stat.S_IRWXO
SHORTEST = 8  # characters: what is shorter stands in texts that are none of it
WHOLE_LINES = 8  # characters from which one line of a secret of several lines is masked on its own


class Secrets:
    """The values a rank holds, by variable. `mask` takes them out of a text."""

    def __init__(self, values: Mapping[str, str]):
        self._values = dict(values)
        spelled = [(text, name) for name, value in self._values.items() for text in _spellings(value)]
        # the longest first: a value that is part of another one must not leave the rest of it
        self._spelled = sorted(spelled, key=lambda pair: -len(pair[0]))
        self._output: MaskedOutput | None = None

    def __repr__(self) -> str:
        return f"Secrets({', '.join(self._values)})"  # never a value, in no traceback

    def put_into(self, environment: MutableMapping[str, str]) -> None:
        """Write the values into an environment."""
        environment.update(self._values)

    def mask(self, text: str) -> str:
        """Return a text with each value replaced by ***NAME***."""
        for value, name in self._spelled:
            text = text.replace(value, _shown(name))
        return text

    def refuse_in(self, value: Any, where: str) -> None:
        """Raise UserMistake where plain data, as JSON has it, holds a secret in a text.

        Such data are written down and read by machines: a mask would be a wrong value.
        """
        if isinstance(value, str):
            for text, name in self._spelled:
                if text in value:
                    raise UserMistake(
                        f"{where} would write down the value of the secret {name}; have the phase leave it "
                        "out of what it returns"
                    )
        elif isinstance(value, dict):
            for key, item in value.items():
                self.refuse_in(key, where)
                self.refuse_in(item, f"{where}.{self.mask(str(key))}")
        elif isinstance(value, (list, tuple)):
            for item in value:
                self.refuse_in(item, where)

    def mask_output(self) -> None:
        """Mask what this process and its children print from now on."""
        if self._values:
            self._output = MaskedOutput((value, _shown(name)) for value, name in self._spelled)

    def close_output(self) -> None:
        """Have everything printed written; before an exit that runs no exit handlers."""
        if self._output is not None:
            self._output.close()


def _shown(name: str) -> str:
    return f"***{name}***"


def _spellings(value: str) -> set[str]:
    """Return how a value may stand in a text: as it is, escaped by repr, JSON or a URL, or one long line of it."""
    lines = [line for line in value.splitlines() if len(line) >= WHOLE_LINES]
    return {
        value,
        repr(value)[1:-1],
        json.dumps(value)[1:-1],
        urllib.parse.quote(value, safe=""),
        urllib.parse.quote(value),
        *lines,
    }


def commands_among(references: Mapping[str, str]) -> dict[str, str]:
    """Return the references that are commands, {variable: cmd:COMMAND}."""
    return {name: reference for name, reference in references.items() if reference.startswith("cmd:")}


def read_values(references: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the values of {variable: reference}. Raises UserMistake, which never holds a value."""
    return {name: _value(name, reference, environment) for name, reference in references.items()}


def reveal(references: Mapping[str, str], printed: Mapping[str, str]) -> Secrets:
    """Read the secrets into this process's environment, and mask them in what it prints from now on.

    `printed`: values of commands that rank 0 ran for all.
    """
    if references:
        forbid_core_files()
    unread = {name: reference for name, reference in references.items() if name not in printed}
    secrets = Secrets(read_values(unread, os.environ) | dict(printed))
    secrets.mask_output()
    secrets.put_into(os.environ)
    return secrets


def forbid_core_files() -> None:
    """Have no core file written of this process and its children: it would hold the secrets.

    A limit of 0 does not stop a core that is piped to a program; of 1 byte the kernel takes it for both (core(5),
    do_coredump in fs/coredump.c).
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    limit = 1 if hard == resource.RLIM_INFINITY else min(1, hard)
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))


def _value(name: str, reference: str, environment: Mapping[str, str]) -> str:
    """Return the value of one reference. Raises UserMistake where it cannot be read or is no secret."""
    kind, _, where = reference.partition(":")
    read = {"file": _file, "cmd": _command}.get(kind)
    data = read(name, where) if read else environment.get(where, "").encode()
    try:
        value = data.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise UserMistake(f"secret {name}: what {reference} holds is not UTF-8 text") from None
    if not value:
        remedy = f"export {where} before you submit" if kind == "env" else "write the value there"
        raise UserMistake(f"secret {name}: {reference} is empty; {remedy}")
    if len(value) < SHORTEST:
        raise UserMistake(
            f"secret {name}: what {reference} holds has {len(value)} characters; a secret has {SHORTEST} "
            "at the least, for its value is masked wherever it stands in a log"
        )
    if "\0" in value:
        raise UserMistake(f"secret {name}: what {reference} holds has a NUL byte, which no variable can")
    return value


def _file(name: str, where: str) -> bytes:
    """Return what a file of the user's, which nobody else can read, holds."""
    path = expanded(where)
    host = os.uname().nodename
    try:
        # Not blocking: a FIFO of that name must not hang the job. The mode is that of what was opened.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UserMistake(
            f"secret {name}: {path} on {host}: {error.strerror}; write the value there and `chmod 600 {path}`"
        ) from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise UserMistake(f"secret {name}: {path} is not a file")
        if status.st_mode & OTHERS:
            raise UserMistake(
                f"secret {name}: {path} can be read by others (mode {stat.S_IMODE(status.st_mode):o}): chmod 600 {path}"
            )
        if status.st_size > FILE_LIMIT:
            raise UserMistake(f"secret {name}: {path} has {status.st_size:,} bytes; the most is {FILE_LIMIT:,}")
        return os.read(handle, FILE_LIMIT)
    finally:
        os.close(handle)


def _command(name: str, command: str) -> bytes:
    """Return what a command prints. What it says on stderr is not shown: it may hold the value (`set -x`)."""
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=COMMAND_LIMIT_S)
    except subprocess.TimeoutExpired:
        ending = f"did not end within {COMMAND_LIMIT_S:g} s"
    else:
        if process.returncode == 0:
            return out
        ending = f"ended with exit code {process.returncode}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    raise UserMistake(f"secret {name}: `{command}` on {os.uname().nodename} {ending}; run it there by hand to see why")
