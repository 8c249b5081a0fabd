"""What a user did wrong, as one line that names the values and the remedy.

Every package raises and returns these two; the command line and the worker turn them into exit code 2
without a traceback.
"""

import difflib
import errno
from collections.abc import Sequence
from dataclasses import dataclass

EXIT_MISTAKE = 2
_BREAKS = {ord("\n"): "\\n", ord("\r"): "\\r"}  # of a file's name, in a line


@dataclass(frozen=True)
class Problem:
    """Represents one violated rule. `where` is the place the user can edit: a file and a dotted key, or a file and
    line. `check` is the id of the check that found it (slurm/checks.py), by which some can be waived."""

    where: str
    message: str
    check: str = ""

    def __str__(self) -> str:
        where = self.where if self.where.isprintable() else self.where.translate(_BREAKS)
        told = f"{where}: {self.message}" if where else self.message
        return f"{told} [{self.check}]" if self.check else told


class UserMistake(Exception):
    """Raised for wrong input. Carries all problems found at once; `str()` gives one line a problem."""

    exit_code = EXIT_MISTAKE

    def __init__(self, problems: "str | Problem | list[Problem]"):
        if isinstance(problems, str):
            problems = [Problem("", problems)]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems: list[Problem] = problems
        super().__init__("\n".join(map(str, problems)))


def nearest(word: str, known: Sequence[str]) -> str:
    """Return ' (did you mean X? known: ...)' for an error about an unknown word."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return f" ({hint}known: {', '.join(known)})"


# What a filesystem refuses, and what its user can do; other OSErrors are bugs and keep their traceback. The last ones
# are of paths that lead to something else than was meant, whoever asks for them.
_DISK = {
    errno.ENOSPC: "no space is left there; free some (`df -h` shows the filesystem), then submit again",
    errno.EDQUOT: "your disk quota there is used up; free some space, then submit again",
    errno.EROFS: "the filesystem is read-only; have it mounted writable, or work in another folder (--run DIR)",
    errno.EACCES: "permission denied; have the folder's owner allow it, or work in another folder (--run DIR)",
    errno.EPERM: "the filesystem does not permit it; work in another folder (--run DIR)",
    errno.EIO: "the filesystem reports an input/output error; submit again once it is well",
    errno.ESTALE: "the filesystem lost the file (stale file handle); submit again once it is well",
    errno.ENOTDIR: "a file is there where this path has a folder; correct the path",
    errno.EISDIR: "that is a folder, where a file is wanted; correct the path",
    errno.ELOOP: "its links lead round in a circle; correct the path, or the links",
    errno.ENAMETOOLONG: "the path, or a name in it, is longer than the filesystem takes; give a shorter one",
    errno.ENXIO: "that is a socket or a device, where a file is wanted; correct the path",
}
_LONGEST = 300  # characters of a path that are said


def disk_problem(error: BaseException, folder: object = "") -> str | None:
    """Return one line for a full, read-only, forbidden or failing filesystem, and for a path that leads to something
    else than was meant; None for any other error.

    `folder` is named where the error itself names no file.
    """
    if not isinstance(error, OSError) or error.errno not in _DISK:
        return None
    path = str(error.filename2 or error.filename or folder or "a file").translate(_BREAKS)
    return f"{path if len(path) <= _LONGEST else path[:_LONGEST] + '…'}: {_DISK[error.errno]}"
