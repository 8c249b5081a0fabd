"""One submitter a run: RUN/submit.lock names the process that submits, repairs or cancels right now."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from data_tools.base import durable
from data_tools.mistake import UserMistake, disk_problem
from jobs.artifacts.owner import Owner
from jobs.artifacts.run_folder import RunFolder


@contextlib.contextmanager
def submit_lock(run: RunFolder) -> Iterator[None]:
    """Hold the lock of a run; that of a process of this host that is dead is taken over.

    Raises:
        UserMistake: a living process holds it, or nobody can tell who does.
    """
    run.make()
    path = run.submit_lock
    me = Owner.me(0, 0)
    while not durable.create_file(path, me.record()):
        try:
            holder = Owner.read(path)
        except FileNotFoundError:
            continue
        if holder is None:
            raise UserMistake(f"{path} is torn: nobody knows who holds it; delete it if nobody is submitting")
        if not holder.is_dead(lambda _: False):
            raise UserMistake(
                f"{run.path}: process {holder.pid} on {holder.host} is submitting right now; "
                f"wait for it, or delete {path} if it is gone"
            )
        remove_lock_of(holder, path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def submit_lock_if_writable(run: RunFolder) -> Iterator[None]:
    """Hold the lock of a run, or none on a file system that takes no writes: nobody can submit there."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(submit_lock(run))
        except OSError as error:
            if disk_problem(error) is None:
                raise
        yield


def remove_lock_of(dead: Owner, path: Path) -> None:
    """Remove the lock of a dead submitter, and not that of a living one who removed it a moment earlier."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if Owner.read(aside) != dead:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()
