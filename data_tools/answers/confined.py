"""Bounds a process of a sandbox, and then runs a text in it. Python in the sandbox is given this file as its program.

    python -c TEXT-OF-THIS-FILE BOUNDS TEXT ARGUMENTS...

When TEXT begins, the process has no capability and can get none, is another user where BOUNDS name one, and its system
calls are filtered. This file imports the standard library alone, as sandboxes see no other.
"""

import ctypes
import json
import os
import resource
import struct
import sys
from collections.abc import Mapping
from typing import Any

_LIMITS = ("AS", "CPU", "FSIZE", "NOFILE", "SIGPENDING", "CORE", "MEMLOCK", "MSGQUEUE", "RTPRIO", "NICE")
_REMOUNT = 32 | 2 | 4  # MS_REMOUNT, MS_NOSUID and MS_NODEV, as bubblewrap mounts it
_SECCOMP, _NO_NEW_PRIVILEGES, _AMBIENT = (22, 2), (38, 1, 0, 0, 0), (47, 4, 0, 0, 0)  # of prctl
_CAPABILITIES = 0x20080522  # version 3 of their structs


def confine(bounds: Mapping[str, Any]) -> None:
    """Bound this process and what it starts. Raise OSError where that cannot be done."""
    if bounds["files"]:
        _ask("mount", b"tmpfs", b"/tmp", None, _REMOUNT, b"nr_inodes=%d" % bounds["files"])
    for name in _LIMITS:
        _lower(getattr(resource, f"RLIMIT_{name}"), bounds[name])
    if bounds["uid"]:
        os.setgroups([])
        os.setresgid(bounds["uid"], bounds["uid"], bounds["uid"])
        os.setresuid(bounds["uid"], bounds["uid"], bounds["uid"])
    _ask("prctl", *_AMBIENT)
    _ask("capset", struct.pack("=Ii", _CAPABILITIES, 0), bytes(24))
    for most in (bounds["processes"], bounds["processes"] + bounds["others"]):
        resource.setrlimit(resource.RLIMIT_NPROC, (_bounded(resource.RLIMIT_NPROC, most), _hard(resource.RLIMIT_NPROC)))
        if _can_fork():
            break  # before Linux 5.14 the user's processes outside count, too
    _lower(resource.RLIMIT_NPROC, resource.getrlimit(resource.RLIMIT_NPROC)[0])
    code = bytes.fromhex(bounds["filter"])
    instructions = ctypes.create_string_buffer(code, len(code))
    _ask("prctl", *_NO_NEW_PRIVILEGES)
    _ask("prctl", *_SECCOMP, struct.pack("HP", len(code) // 8, ctypes.addressof(instructions)))


def _ask(call: str, *given: int | bytes | None) -> None:
    """Make a call of the C library."""
    of_c = ctypes.CDLL(None, use_errno=True)
    if getattr(of_c, call)(*(ctypes.c_ulong(value) if isinstance(value, int) else value for value in given)):
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")


def _can_fork() -> bool:
    try:
        child = os.fork()
    except OSError:
        return False
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return True


def _hard(which: int) -> int:
    return resource.getrlimit(which)[1]


def _bounded(which: int, value: int) -> int:
    hard = _hard(which)
    return value if hard == resource.RLIM_INFINITY else min(value, hard)


def _lower(which: int, value: int) -> None:
    resource.setrlimit(which, (_bounded(which, value),) * 2)


if __name__ == "__main__":
    confine(json.loads(sys.argv[1]))
    text, sys.argv[1:] = sys.argv[2], sys.argv[3:]
    exec(compile(text, "sandboxed", "exec"), {"__name__": "__main__"})
