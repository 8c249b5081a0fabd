"""What a program in a sandbox can have: so many processes, so much memory by whatever way, so many and large files."""

import pytest

from data_tools.answers import sandbox
from data_tools.answers.sandbox import Limits, verdict
from tests.data_tools.test_sandbox import HASTY, RIGHT, passes

pytestmark = pytest.mark.skipif(
    bool(sandbox.why_not()), reason="this machine has no sandbox (sandbox.why_not says why)"
)

FORKS_ON = """
import os
def f(x):
    while True:
        try:
            os.fork()
        except OSError:
            pass
"""
THREADS = """
import threading, time
def f(x):
    for number in range(64):
        try:
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        except RuntimeError:
            return number
    return 64
"""


def test_a_fork_bomb_is_held_to_its_processes_and_ended():
    assert passes(FORKS_ON, limits=HASTY) is False
    forks = sandbox._FORKS.replace("def forks():", "def f(x):")
    for program in (forks, THREADS):
        assert passes(program, [f"assert f(1) < {sandbox.PROCESSES}"]) is True  # no more than that many could be made


LARGE = """
import os, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def f(count, size):
    for number in range(count):
        try:
            with open(f'/tmp/{number}', 'wb', buffering=0) as file:
                for _ in range(size):
                    file.write(bytes(1 << 20))
        except OSError:
            pass
    return sum(os.path.getsize(f'/tmp/{name}') for name in os.listdir('/tmp'))
"""


def test_memory_and_files_are_bounded():
    assert passes("x = bytearray(10 << 30)\n" + RIGHT) is False
    assert passes("def f(x):\n    return [0] * (10 << 30)\n") is False
    assert passes(LARGE, [f"assert f(1, 100) <= {sandbox.FILE_MIB << 20}"]) is True
    assert passes(LARGE, [f"assert f(100, 4) <= {sandbox.TMP_MIB << 20}"]) is True


WAYS = """
import ctypes, fcntl, mmap, os, socket, struct
c = ctypes.CDLL(None, use_errno=True)
MIB, kept = 1 << 20, []
def held(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), 'refused')
    return result
def heap():
    kept.append(bytearray(8 * MIB))
    return 8 * MIB
def anonymous(flags=mmap.MAP_SHARED):
    kept.append(mmap.mmap(-1, 8 * MIB, flags=flags))
    kept[-1][::4096] = bytes(2048)
    return 8 * MIB
def mapped_files():
    file = os.open(f'/tmp/{len(kept)}', os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(file, 0, 8 * MIB)
    kept.append(mmap.mmap(file, 8 * MIB))
    os.close(file)
    return 8 * MIB
def files():
    with open(f'/tmp/{len(os.listdir("/tmp"))}', 'wb', buffering=0) as file:
        for _ in range(8):
            file.write(bytes(MIB))
    return 8 * MIB
def empty_files():  # a KiB of the kernel's memory each
    for _ in range(1024):
        os.close(os.open(f'/tmp/{len(kept)}', os.O_CREAT))
        kept.append(None)
    return MIB
def links():
    open('/tmp/one', 'w').close()
    for _ in range(1024):
        os.link('/tmp/one', f'/tmp/{len(kept)}')
        kept.append(None)
    return MIB
def without_name():
    file = os.memfd_create('x')
    return os.write(file, bytes(8 * MIB))
def system_v():
    kept.append(held(c.shmget(0, 8 * MIB, 0o1600)))
    return 8 * MIB
def messages():
    held(c.msgsnd(held(c.msgget(0, 0o1600)), ctypes.create_string_buffer(b'1' * 8200), 8192, 0))
    return 8192
def semaphores():
    held(c.semget(0, 250, 0o1600))
    return 250 * 64
def dev_shm():
    with open(f'/dev/shm/{len(kept)}', 'wb', buffering=0) as file:
        return file.write(bytes(MIB))
def pipes():
    ends = os.pipe()
    kept.append(ends)
    fcntl.fcntl(ends[1], 1031, MIB)
    os.set_blocking(ends[1], False)
    return os.write(ends[1], bytes(MIB))
def lent_to_pipes():
    ends, page = os.pipe(), mmap.mmap(-1, 2 * MIB)
    kept.append(ends)
    lent = (ctypes.c_size_t * 2)(ctypes.addressof(ctypes.c_char.from_buffer(page)), 4096)
    held(c.vmsplice(ends[1], lent, 1, 0))
    return 2 * MIB
def sockets():
    one, other = socket.socketpair()
    kept.append((one.detach(), other.detach()))
    one = socket.socket(fileno=os.dup(kept[-1][0]))
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 28)
    one.setblocking(False)
    return one.send(bytes(4 * MIB))
def backlog():  # what waits in a queue, sent by sockets that are closed
    there = socket.socket(socket.AF_UNIX)
    name = chr(0) + str(len(kept))
    there.bind(name)
    there.listen(4096)
    kept.append(there)
    total = 0
    for _ in range(64):
        one = socket.socket(socket.AF_UNIX)
        one.connect(name)
        total += one.send(bytes(1 << 16))
        one.close()
    return total
def locks():  # 192 bytes of the kernel's memory each, of a file that is closed
    c.mmap.restype = ctypes.c_void_p
    file = os.open('/usr/bin/env', os.O_RDONLY)
    for place in range(1024):
        fcntl.fcntl(file, 37, struct.pack('hhqqi', fcntl.F_RDLCK, 0, 2 * place, 1, 0))
    c.mmap(None, 4096, 1, 2, file, 0)
    os.close(file)
    return 192 * 1024
def rules():
    one = held(c.syscall(444, struct.pack('QQQ', 0, 3, 0), 16, 0))
    for port in range(1 << 16):
        held(c.syscall(445, one, 2, struct.pack('QQ', 1, port), 0))
    return 64 << 16
def locked():
    held(c.mlockall(2))
    return anonymous()
def f(way):
    total = 0
    while total < 10 << 30:
        try:
            total += globals()[way]()
        except (OSError, MemoryError):
            break
    kept.clear()
    return total
"""


@pytest.mark.parametrize("way, most_mib", [
    ("heap", 128), ("anonymous", 128), ("mapped_files", 64), ("files", 64), ("empty_files", 0), ("links", 0),
    ("without_name", 0), ("system_v", 0), ("messages", 0), ("semaphores", 0), ("dev_shm", 0), ("pipes", 32),
    ("lent_to_pipes", 0), ("sockets", 0), ("locked", 0), ("backlog", 0), ("locks", 0), ("rules", 0),
])  # fmt: skip
def test_there_is_no_way_to_ten_gigabytes(way, most_mib):
    """What is 0 is refused at once: a file's entry, a segment, a queue, larger buffers of a socket."""
    found = verdict(WAYS, [f"assert f({way!r}) <= {most_mib << 20}"], ["f"], limits=Limits(120.0, memory_gib=0.125))
    assert found.why == ""


ALL_TOGETHER = """
import mmap, os
def f(size):
    gains, kept = os.pipe(), []
    while True:
        try:
            if os.fork() == 0:
                break
        except OSError:
            os.close(gains[1])
            with open(gains[0], 'rb') as file:
                return len(file.read()) * size
    try:
        while True:
            kept.append(mmap.mmap(-1, size))
            kept[-1][::4096] = bytes(size // 4096)
            os.write(gains[1], b'x')
    finally:
        os._exit(0)
"""


def test_all_processes_together_hold_no_more_than_they_may_each():
    most = int(sandbox.PROCESSES * 2**27)
    found = verdict(ALL_TOGETHER, [f"assert 0 < f(1 << 22) < {most}"], ["f"], limits=Limits(120.0, memory_gib=0.125))
    assert found.why == ""
