"""The Hugging Face folder of a model folder, made once and shared by a phase's elements.

    KEEP/exported/DIGEST         the folder, whole: it gets this name by one rename
    KEEP/exported/DIGEST.lock    touched by who makes it; others wait, and take over one that is not touched any more
    KEEP/exported/DIGEST.UNIQUE  half a folder, touched like the lock; who makes the folder deletes those of the dead

An adapter is merged into the weights. The tokenizer stays where it is: token ids go in and come out.
"""

import contextlib
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.base import durable
from data_tools.mistake import Problem, UserMistake

if TYPE_CHECKING:
    from megatron_ext.model_folders.model_folder import ModelFolder

EXPORTED = "exported"
POLL_S = 1.0
DEAD_S = 300.0  # a lock that nobody touched for so long, as the waiting process saw it
TOUCH_S = 10.0


def exported(folder: "ModelFolder", dtype: str, keep: Path) -> Path:
    """Return the Hugging Face folder of the model, made unless it is there; `dtype` "" keeps that of the weights."""
    config = durable.sha256_file(folder.hf / "config.json")
    named = durable.canonical_json([folder.weights_digest, dtype, config])
    target = keep / EXPORTED / durable.sha256_bytes(named)[:16]
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_suffix(".lock")
    who = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}\n"
    while not target.is_dir():
        if not durable.create_file(lock, who):
            _wait(lock, target)
            continue
        try:
            if not target.is_dir():
                _make(folder, dtype, target, lock)
        finally:
            with contextlib.suppress(OSError):
                if lock.read_text() == who:  # and not that of one who took this one for dead
                    lock.unlink()
    return target


def forget(keep: Path) -> None:
    """Delete what was exported for a phase that is over."""
    shutil.rmtree(keep / EXPORTED, ignore_errors=True)


def _wait(lock: Path, target: Path) -> None:
    """Return once the lock is gone, or was taken away here since nobody touched it."""
    seen, since = _touched(lock), time.monotonic()
    while lock.exists() and not target.is_dir():
        time.sleep(POLL_S)
        if (now := _touched(lock)) != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > DEAD_S:
            lock.unlink(missing_ok=True)


def _touched(lock: Path) -> int:
    try:
        return lock.stat().st_mtime_ns
    except OSError:
        return 0


def _make(folder: "ModelFolder", dtype: str, target: Path, lock: Path) -> None:
    """Export into a folder of this process, and give it its name. Two who make the same by mistake do no harm."""
    _forget_halves(target, lock)
    own = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
    own.mkdir()
    try:
        with _touching(own, lock):
            _fill(folder, dtype, own)
        os.rename(own, target)
    except OSError:
        if not target.is_dir() and own.is_dir():
            raise  # and otherwise another one's is there, or took this one for dead and makes it
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _fill(folder: "ModelFolder", dtype: str, own: Path) -> None:
    """Export into a folder of this process, durably."""
    from megatron_ext.model_folders import merge, model_folder
    from megatron_ext.weights import convert

    model_folder.copy_hf_files(folder.hf, own)
    base = convert.base_ledger(folder.hf)
    rules = folder.family.mapping.rules(folder.dims, base["hf"])
    changes = merge.changes(folder)
    convert.export_share(folder.weights, rules, base, own, dtype=dtype, index=0, count=1, changes=changes)
    ledger = convert.finish_export([own], own, {"family": folder.family.name, "source": str(folder.path)})
    if ledger["weights_digest"] != folder.base_digest:
        raise UserMistake(Problem(str(folder.path), "its weights were changed; make the folder again"))
    durable.fsync_tree(own)


@contextlib.contextmanager
def _touching(*paths: Path) -> Iterator[None]:
    """Touch these from time to time, while a large file is written, read for its digest, or made durable."""
    over = threading.Event()

    def touch() -> None:
        while not over.wait(TOUCH_S):
            for path in paths:
                with contextlib.suppress(OSError):
                    os.utime(path)  # no lock that another took away is made anew

    thread = threading.Thread(target=touch, daemon=True, name="export-touch")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _forget_halves(target: Path, lock: Path) -> None:
    """Delete what killed processes left of the same folder: each half is as large as the model.

    All times are the file system's own: the lock was made just now.
    """
    for half in target.parent.glob(f"{target.name}.*"):
        with contextlib.suppress(OSError):
            now = lock.stat().st_mtime
            if half.is_dir() and now - half.stat().st_mtime > DEAD_S / 2:
                shutil.rmtree(half, ignore_errors=True)
