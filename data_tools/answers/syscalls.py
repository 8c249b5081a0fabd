"""What a program in a sandbox may not ask of the kernel, as a seccomp filter: no dependency, three dozen lines of BPF.

Three kinds of calls are refused: those that get memory which counts for no process (no RLIMIT_AS bounds it), those that
lead out (namespaces, mounts, other processes, the network), and those that slow the whole machine. A call that came to
Linux after this table, or of another architecture's numbers, is refused too.
"""

import errno
import platform
import socket
import struct

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
LAST = 450  # the newest call that was looked at, of Linux 5.17
REFUSED: dict[str, tuple[int, int | None]] = {  # numbers of x86_64 and aarch64
    # memory of no process: System V's and POSIX' shared things, files without a name, rings, keys, watched inodes,
    # whole huge pages that a pipe holds by one of their bytes, buffers of sockets (net.core.wmem_max of a cluster),
    # what waits at a named socket, sent by those that are closed since (listen(4096): hundreds of MiB), rules
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180), "memfd_create": (319, 279), "memfd_secret": (447, 447), "vmsplice": (278, 75),
    "splice": (275, 76), "tee": (276, 77), "sendfile": (40, 71),
    "io_setup": (206, 0), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "inotify_init": (253, None), "inotify_init1": (294, 26),
    "fanotify_init": (300, 262), "setsockopt": (54, 208),
    "bind": (49, 200), "listen": (50, 201), "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
    # ways out
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438), "kcmp": (312, 272),
    # what others feel: all disks flushed, where memory lies, how programs are loaded
    "sync": (162, 81), "syncfs": (306, 267), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "move_pages": (279, 239), "migrate_pages": (256, 238), "mbind": (237, 235), "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450), "personality": (135, 92), "modify_ldt": (154, None),
}  # fmt: skip
CLONE3 = 435  # on both; its flags cannot be read here: C libraries fall back on clone, where it is unknown
CLONE, SOCKET, SOCKETPAIR = (56, 220), (41, 198), (53, 199)
NAMESPACES = 0x7E020000  # CLONE_NEW*, of clone
FCNTL = (72, 25)
# of fcntl: locks of open files, which a mapping holds when the file is closed, so that OPEN_FILES does not bound them;
# leases and notices, for which other processes have to wait
COMMANDS = {"F_OFD_SETLK": 37, "F_OFD_SETLKW": 38, "F_SETLEASE": 1024, "F_NOTIFY": 1026}

_NUMBER, _ARCHITECTURE, _FIRST, _SECOND = 0, 4, 16, 24  # bytes of struct seccomp_data; low halves of arguments
_LOAD, _EQUAL, _ABOVE, _HAS, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000


def filter_for(machine: str = platform.machine()) -> bytes | None:
    """Return the filter, instructions of classic BPF of 8 bytes each; None for a machine that the table lacks."""
    if machine not in _ARCHITECTURES:
        return None
    own = list(_ARCHITECTURES).index(machine)
    code = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, _ARCHITECTURES[machine]), (_RETURN, 0, 0, _KILL)]
    code += [(_LOAD, 0, 0, _NUMBER), (_ABOVE, 0, 1, LAST), _error(errno.ENOSYS)]  # x32's numbers are above it, too
    code += [(_EQUAL, 0, 1, CLONE3), _error(errno.ENOSYS)]
    for numbers in REFUSED.values():
        if (number := numbers[own]) is not None:
            code += [(_EQUAL, 0, 1, number), _error(errno.EPERM)]
    # of the others some values of an argument; a test says how many steps to go on where it holds, and where not
    unix_alone = [(_EQUAL, 1, 0, int(socket.AF_UNIX))]
    for numbers, argument, tests, why in (
        (CLONE, _FIRST, [(_HAS, 0, 1, NAMESPACES)], errno.EPERM),
        (SOCKET, _FIRST, unix_alone, errno.EAFNOSUPPORT),
        (SOCKETPAIR, _FIRST, unix_alone, errno.EAFNOSUPPORT),
        (FCNTL, _SECOND, [(_EQUAL, 0, 1, command) for command in COMMANDS.values()], errno.EPERM),
    ):
        asked = [(_LOAD, 0, 0, argument), *(step for test in tests for step in (test, _error(why)))]
        asked += [(_RETURN, 0, 0, _ALLOW)]
        code += [(_EQUAL, 0, len(asked), numbers[own]), *asked]
    code += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *step) for step in code)


def _error(number: int) -> tuple[int, int, int, int]:
    return (_RETURN, 0, 0, _ERROR | number)
