"""What writers told of their files: the same as reading them gives, and believed only where nothing is newer."""

import hashlib
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.base import digests


def written(path: Path, *parts: bytes) -> list[digests.Part]:
    """Write a file part by part, the last first, as processes do that do not wait for each other."""
    told, start = [], sum(map(len, parts))
    for part in reversed(parts):
        start -= len(part)
        writer = digests.PartWriter(path, start)
        for at in range(0, len(part), 3):
            writer.write(part[at : at + 3])
        writer.close()
        told.append(writer.part())
    return told[::-1]


@given(parts=st.lists(st.binary(max_size=20), min_size=1, max_size=5))
def test_what_writers_told_is_what_reading_gives(parts):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f"
        told = written(path, *parts)
        assert path.read_bytes() == b"".join(parts)
        assert told == [(len(part), hashlib.sha256(part).hexdigest()) for part in parts]
        assert digests.sha256(path, [len(part) for part in parts]) == digests.whole(told)
        assert digests.sha256(path) == hashlib.sha256(b"".join(parts)).hexdigest()
        start = 0
        for part, each in zip(parts, told):
            assert digests.part_of(path, start, len(part)) == each
            start += len(part)
        changed = bytearray(b"".join(parts))
        for at in range(len(changed)):
            changed[at] ^= 1
            path.write_bytes(changed)
            assert digests.sha256(path, [len(part) for part in parts]) != digests.whole(told)
            changed[at] ^= 1


def test_a_file_of_one_part_goes_by_its_plain_sha256(tmp_path):
    assert digests.whole(written(tmp_path / "f", b"abc")) == hashlib.sha256(b"abc").hexdigest()


@pytest.fixture
def told(tmp_path) -> Path:
    weights = tmp_path / "out" / "weights"
    weights.mkdir(parents=True)
    digests.write(weights, {name: written(weights / name, b"one", b"two") for name in ("a", "b")})
    return weights


def test_a_file_that_became_newer_or_another_size_has_to_be_read(told):
    assert set(digests.told_below(told.parent)) == {"weights/a", "weights/b"}
    later = (told / digests.DIGESTS).stat().st_mtime_ns + 1
    os.utime(told / "a", ns=(later, later))
    assert set(digests.told_below(told.parent)) == {"weights/b"}
    times = (told / "b").stat()
    (told / "b").write_bytes(b"more than it was")
    os.utime(told / "b", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digests.told_below(told.parent) == {}


def test_a_node_whose_clock_is_ahead_is_believed_too(tmp_path):
    parts = written(tmp_path / "a", b"one")
    ahead = (tmp_path / "a").stat().st_mtime_ns + 3600 * 10**9
    os.utime(tmp_path / "a", ns=(ahead, ahead))
    digests.write(tmp_path, {"a": parts})
    assert set(digests.told_below(tmp_path)) == {"a"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": [["x", 1]]}}',
                                  '{"files": {"../../x": [[3, ""]]}}', '{"files": {"gone": [[3, ""]]}}'])  # fmt: skip
def test_what_is_no_file_of_digests_is_as_good_as_none(told, text):
    (told / digests.DIGESTS).write_text(text)
    assert digests.told_below(told.parent) == {}


def test_an_edited_digest_is_not_believed(told):
    path = told / digests.DIGESTS
    path.write_text(path.read_text().replace("3", "4", 1))
    assert digests.told_below(told.parent) == {}


def test_the_same_bytes_are_told_of_in_the_same_words_whenever_they_were_written(told, tmp_path):
    """Else a phase that ran again would look changed to those that read it."""
    again = tmp_path / "again"
    again.mkdir()
    digests.write(again, {name: written(again / name, b"one", b"two") for name in ("a", "b")})
    assert (again / digests.DIGESTS).read_bytes() == (told / digests.DIGESTS).read_bytes()


def test_writers_who_told_other_bytes_than_there_are_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="has 3 bytes, and those who wrote it told 4"):
        digests.write(tmp_path, {"a": [*written(tmp_path / "a", b"one"), (1, "")]})


def test_what_a_seal_says_is_forgotten_beside_it_and_nothing_else_is(told, tmp_path):
    for place in ("theirs", "torn"):
        (tmp_path / place).mkdir()
    (tmp_path / "theirs" / digests.DIGESTS).write_text('{"files": {}}')
    (tmp_path / "torn" / digests.DIGESTS).write_bytes((told / digests.DIGESTS).read_bytes()[:-9])
    digests.forget(tmp_path)
    assert {path.parent.name for path in tmp_path.rglob(digests.DIGESTS)} == {"theirs", "torn"}
    assert {path.name for path in told.iterdir()} == {"a", "b"}
