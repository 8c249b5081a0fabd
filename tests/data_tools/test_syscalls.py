"""The filter of system calls: its table beside the kernel's headers, its instructions run here, and asked in a sandbox.

What programs gain from a call that slips through is in test_sandbox.py.
"""

import errno
import platform
import re
import struct
from pathlib import Path

import pytest

from data_tools.answers import sandbox, syscalls
from data_tools.answers.sandbox import Limits, verdict

HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}
MACHINES = list(HEADERS)
ALLOWED, KILLED = 0, -1
NEW = {"NEWNS": 1 << 17, "NEWCGROUP": 1 << 25, "NEWUTS": 1 << 26, "NEWIPC": 1 << 27, "NEWUSER": 1 << 28,
       "NEWPID": 1 << 29, "NEWNET": 1 << 30}  # of linux/sched.h  # fmt: skip


def answer(machine: str, number: int, first: int = 0, second: int = 0, architecture: int = 0) -> int:
    """Return the error number that the filter gives a call, ALLOWED or KILLED: classic BPF, interpreted."""
    code = list(struct.iter_unpack("=HBBI", syscalls.filter_for(machine) or b""))
    data = struct.pack("<iIQ6Q", number, architecture or syscalls._ARCHITECTURES[machine], 0, first, second, *[0] * 4)
    place, value = 0, 0
    while True:
        kind, holds, fails, given = code[place]
        place += 1
        if kind == 0x20:
            [value] = struct.unpack_from("<I", data, given)
        elif kind == 0x06:
            return {0x7FFF0000: ALLOWED, 0x80000000: KILLED}.get(given, given & 0xFFFF)
        else:
            unsigned = value & 0xFFFFFFFF
            right = {0x15: unsigned == given, 0x25: unsigned > given, 0x45: bool(unsigned & given)}[kind]
            place += holds if right else fails


@pytest.mark.parametrize("machine", MACHINES)
def test_exactly_what_the_table_names_is_refused_and_all_that_came_later(machine):
    own = MACHINES.index(machine)
    refused = {numbers[own] for numbers in syscalls.REFUSED.values()} - {None}
    for number in range(syscalls.LAST + 1):
        wanted = errno.EPERM if number in refused else errno.ENOSYS if number == syscalls.CLONE3 else ALLOWED
        if number not in (syscalls.SOCKET[own], syscalls.SOCKETPAIR[own]):
            assert answer(machine, number) == wanted, number
    for number in (syscalls.LAST + 1, 462, 1000, 0x40000000 + 39, 0x40000000 + 520, 0xFFFFFFFF - (1 << 32)):
        assert answer(machine, number) == errno.ENOSYS, number
    for foreign in (0x40000003, 0xC0000015, syscalls._ARCHITECTURES[MACHINES[1 - own]]):  # 32 bits, ppc64le, the other
        assert answer(machine, 0, architecture=foreign) == KILLED


@pytest.mark.parametrize("machine", MACHINES)
def test_processes_are_made_without_namespaces_and_sockets_without_a_network(machine):
    own = MACHINES.index(machine)
    clone = syscalls.CLONE[own]
    assert (
        answer(machine, clone, 17) == answer(machine, clone, 0x01200011) == answer(machine, clone, 0x3D0F00) == ALLOWED
    )
    assert all(answer(machine, clone, flag | 17) == errno.EPERM for flag in NEW.values())
    assert answer(machine, clone, 1 << 28 | 1 << 40) == errno.EPERM
    for command in range(2048):
        wanted = errno.EPERM if command in syscalls.COMMANDS.values() else ALLOWED
        assert answer(machine, syscalls.FCNTL[own], 3, command) == wanted, command
    for call in (syscalls.SOCKET[own], syscalls.SOCKETPAIR[own]):
        assert answer(machine, call, 1) == ALLOWED
        assert all(answer(machine, call, family) == errno.EAFNOSUPPORT for family in (0, *range(2, 64)))


@pytest.mark.parametrize("machine", MACHINES)
def test_the_tables_numbers_are_those_of_the_kernels_headers(machine):
    if not Path(HEADERS[machine]).is_file():
        return  # linux-libc-dev is not there
    lines = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\s*$", Path(HEADERS[machine]).read_text(), re.MULTILINE)
    theirs, own = {name: int(number) for name, number in lines}, MACHINES.index(machine)
    calls = {**syscalls.REFUSED, "clone": syscalls.CLONE, "socket": syscalls.SOCKET, "socketpair": syscalls.SOCKETPAIR}
    calls |= {"clone3": (syscalls.CLONE3, syscalls.CLONE3), "fcntl": syscalls.FCNTL}
    assert {name: numbers[own] for name, numbers in calls.items()} == {name: theirs.get(name) for name in calls}


ASKS = """
import ctypes, os
c = ctypes.CDLL(None, use_errno=True)
def f(numbers, *given):
    found = []
    for number in numbers:
        ctypes.set_errno(0)
        if c.syscall(ctypes.c_long(number), *map(ctypes.c_long, given or (0,) * 6)) == 0 and given:
            os._exit(0)  # a child
        found.append(ctypes.get_errno())
    return found
"""


@pytest.mark.skipif(bool(sandbox.why_not()), reason="this machine has no sandbox (sandbox.why_not says why)")
def test_the_kernel_refuses_a_program_what_the_table_names():
    own = MACHINES.index(platform.machine())
    numbers = [numbers[own] for numbers in syscalls.REFUSED.values() if numbers[own] is not None]
    clone = syscalls.CLONE[own]
    tests = [
        f"assert f({numbers}) == [{errno.EPERM}] * {len(numbers)}",
        f"assert f([{syscalls.CLONE3}, 451, 470, {0x40000000 + 39}]) == [{errno.ENOSYS}] * 4",
        *(f"assert f([{clone}], {flag | 17}, 0, 0, 0, 0) == [{errno.EPERM}], {name!r}" for name, flag in NEW.items()),
        f"assert f([{clone}], 17, 0, 0, 0, 0) == [0]",
        f"assert [f([{syscalls.SOCKET[own]}], x, 1, 0) for x in range(2, 46)] == [[{errno.EAFNOSUPPORT}]] * 44",
    ]
    assert verdict(ASKS, tests, ["f"], limits=Limits(time_s=120.0)).why == ""


FOREIGN = """
import ctypes, mmap
def f(x):
    code = mmap.mmap(-1, 4096, prot=7)
    code.write(bytes.fromhex('b814000000cd80c3'))  # getpid, as 32 bits ask for it
    return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
"""


@pytest.mark.skipif(bool(sandbox.why_not()), reason="this machine has no sandbox (sandbox.why_not says why)")
def test_a_program_that_asks_by_another_architectures_numbers_is_killed():
    if platform.machine() != "x86_64":
        return  # the machine code is x86_64's
    found = verdict(FOREIGN, ["assert f(1) > 0"], ["f"], limits=Limits(time_s=120.0))
    assert not found.passed and found.why == "the program ended its process"
