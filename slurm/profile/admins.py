"""Which files are an admin's: only in these does a profile's policy count.

An admin is root, and whom the file `admins` beside our own profiles names, one uid a line: whoever installs afterok for
others writes it there. It is a rule among people who share a cluster, no wall: a user may still call sbatch.
"""

import os
import stat
from pathlib import Path

ROOT_UID = 0
ADMINS_FILE = Path(__file__).parents[1] / "profiles" / "admins"


def admin_uids() -> set[int]:
    """Return the uids whose files are an admin's."""
    named = ADMINS_FILE.read_text().split() if ADMINS_FILE.is_file() else []
    return {ROOT_UID, *(int(word) for word in named if word.isdigit())}


def why_no_admins(file: Path) -> str:
    """Return why a file is not an admin's, "" where it is: it and all folders above must be, and closed to others.

    A link counts as what it points to, and the folders on the way to it count too.
    """
    uids = admin_uids()
    for path in _on_the_way(file):
        try:
            found = os.lstat(path)
        except OSError as error:
            return f"{path}: {error.strerror}"
        if found.st_uid not in uids:
            return f"{path} belongs to uid {found.st_uid}, which is no admin's"
        if not stat.S_ISLNK(found.st_mode) and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"others may write {path} (mode {stat.S_IMODE(found.st_mode):o})"
    return ""


def _on_the_way(file: Path) -> list[Path]:
    """Return the file, as it is called and as it really lies, with all folders above."""
    called, real = Path(os.path.abspath(file)), file.resolve()
    return list(dict.fromkeys([called, *called.parents, real, *real.parents]))
