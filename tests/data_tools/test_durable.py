"""Durable writes on odd filesystems: without fsync of folders, without hard links, with answers that were lost."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from data_tools.base import durable
from data_tools.mistake import UserMistake, disk_problem


def test_a_filesystem_whose_folders_have_no_fsync_is_no_error(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(os.open("/proc", os.O_RDONLY))  # a real one
    durable.fsync_folder(Path("/proc"))
    real = os.fsync

    def refuses_folders(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOTSUP, "not supported")
        real(handle)

    monkeypatch.setattr(os, "fsync", refuses_folders)
    assert durable.create_file(tmp_path / "a", "a")
    durable.write_json(tmp_path / "b", 1)
    durable.fsync_tree(tmp_path)


def test_an_fsync_that_fails_for_a_reason_is_an_error(tmp_path, monkeypatch):
    def broken(handle):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError) as caught:
        durable.create_file(tmp_path / "a", "a")
    assert f"{tmp_path}/a" in disk_problem(caught.value) and list(tmp_path.iterdir()) == []


def test_a_filesystem_without_hard_links_is_refused_by_name(tmp_path, monkeypatch):
    def no_links(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(UserMistake, match="without hard links"):
        durable.create_file(tmp_path / "a", "a")
    assert list(tmp_path.iterdir()) == []


def test_a_link_whose_answer_was_lost_and_that_was_asked_again_is_ours(tmp_path, monkeypatch):
    """NFS repeats a request; the repetition finds the name there."""
    real = os.link

    def twice(source, target):
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert durable.create_file(tmp_path / "a", "a") is True
    monkeypatch.setattr(os, "link", real)
    assert durable.create_file(tmp_path / "a", "b") is False and (tmp_path / "a").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("write", [durable.write_json, durable.write_checked])
def test_numbers_of_arrays_are_numbers_of_json(write, tmp_path):
    """Facts of phases hold what sums of masks give: a seal that cannot be written comes after all the work."""
    write(tmp_path / "a", {"n": np.int64(3), "ok": np.bool_(True), "x": np.float32(0.5), "total": 1 + np.bool_(True)})
    found = durable.read_checked(tmp_path / "a")
    assert found == {"n": 3, "ok": True, "x": 0.5, "total": 2} and type(found["ok"]) is bool
    with pytest.raises(TypeError):
        write(tmp_path / "b", {"n": np.arange(3)})
