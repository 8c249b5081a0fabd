"""Keys, leases and seals: one of many wins, nothing sealed changes, a dead owner is replaced, a live one is not."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

import jobs.artifacts.artifact
from data_tools.mistake import UserMistake
from jobs.artifacts.artifact import Artifact, LeaseHeld, Sealed
from jobs.artifacts.hash_cache import HashCache
from jobs.artifacts.keys import content_digest, key_of
from jobs.artifacts.layout import FINISH
from jobs.artifacts.owner import Owner
from jobs.artifacts.seal import read_seal


def nobody_ended(job):
    return False


def fill_and_seal(artifact, index, owner, text="x", **record):
    lease = artifact.acquire(index, owner, nobody_ended)
    (lease.folder / "f.txt").write_text(text)
    return lease, artifact.seal(lease, {"key": "k", "upstream": {}, **record})


def dead_owner(attempt, restart=0):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    owner = replace(Owner.me(attempt, restart), pid=child.pid, started=1)
    child.wait()
    return owner


def test_a_key_depends_on_every_part_of_its_material_and_on_nothing_else():
    material = {"settings": {"a": 1, "b": [1.5, None]}, "upstream": {"x": "k"}}
    assert key_of(material) == key_of(json.loads(json.dumps(material)))
    assert key_of({"upstream": {"x": "k"}, "settings": {"b": [1.5, None], "a": 1}}) == key_of(material)
    assert key_of(material) != key_of({**material, "upstream": {"x": "l"}})


def test_a_seal_names_every_file_and_is_the_last_thing_written(tmp_path):
    artifact = Artifact(tmp_path / "KEY")
    lease, won = fill_and_seal(artifact, 0, Owner.me(1, 0), "hello")
    seal = read_seal(artifact.seal_path)
    assert won and seal.folder == lease.folder
    assert seal.content["files"]["f.txt"]["size"] == 5
    assert list(seal.altered(rehash=True)) == []


@pytest.mark.parametrize("harm, word", [
    (lambda path: path.write_text("jello"), "was changed"), (lambda path: path.unlink(), "is missing"),
    (lambda path: path.write_text("hello, longer"), "was changed"),
])  # fmt: skip
def test_an_altered_sealed_file_is_named(tmp_path, harm, word):
    artifact = Artifact(tmp_path / "KEY")
    lease, _ = fill_and_seal(artifact, 0, Owner.me(1, 0), "hello")
    harm(lease.folder / "f.txt")
    with pytest.raises(UserMistake, match=word) as caught:
        read_seal(artifact.seal_path).verify()
    assert str(lease.folder / "f.txt") in str(caught.value)


def test_a_touched_but_equal_file_is_still_the_sealed_one(tmp_path):
    artifact = Artifact(tmp_path / "KEY")
    lease, _ = fill_and_seal(artifact, 0, Owner.me(1, 0))
    os.utime(lease.folder / "f.txt", (1, 1))
    read_seal(artifact.seal_path).verify()


def test_a_truncated_seal_is_no_seal_but_a_named_mistake(tmp_path):
    artifact = Artifact(tmp_path / "KEY")
    fill_and_seal(artifact, 0, Owner.me(1, 0))
    artifact.seal_path.write_bytes(artifact.seal_path.read_bytes()[:40])
    with pytest.raises(UserMistake, match="is not a seal"):
        read_seal(artifact.seal_path)


def test_a_live_owner_keeps_its_lease_and_a_dead_one_loses_it(tmp_path):
    artifact = Artifact(tmp_path / "KEY")
    artifact.acquire(0, dead_owner(1), nobody_ended)
    second = artifact.acquire(0, Owner.me(1, 0), nobody_ended)
    assert second.path.name.endswith("g1")
    with pytest.raises(LeaseHeld, match=str(os.getpid())):
        artifact.acquire(0, Owner.me(1, 0), nobody_ended)


def test_an_owner_on_another_host_is_dead_only_when_slurm_says_so(tmp_path):
    artifact = Artifact(tmp_path / "KEY")
    artifact.acquire(0, replace(Owner.me(1, 0, "77"), host="elsewhere", pid=1), nobody_ended)
    with pytest.raises(LeaseHeld, match="elsewhere"):
        artifact.acquire(0, Owner.me(1, 0), nobody_ended)
    artifact.acquire(0, Owner.me(1, 0), lambda job: job == "77")


def test_a_higher_attempt_takes_over_and_the_late_twin_cannot_seal(tmp_path):
    artifact = Artifact(tmp_path / "KEY")
    late = artifact.acquire(0, Owner.me(1, 0), nobody_ended)
    (late.folder / "f.txt").write_text("late")
    new, won = fill_and_seal(artifact, 0, Owner.me(2, 0), "new")
    assert won and new.folder != late.folder
    before = artifact.seal_path.read_bytes()
    assert artifact.seal(late, {"key": "k"}) is False
    assert artifact.seal_path.read_bytes() == before
    assert (read_seal(artifact.seal_path).folder / "f.txt").read_text() == "new"
    with pytest.raises(Sealed):
        artifact.acquire(0, Owner.me(3, 0), nobody_ended)


def test_an_older_attempt_never_takes_over_a_newer_one(tmp_path):
    artifact = Artifact(tmp_path / "KEY")
    artifact.acquire(0, Owner.me(2, 0), nobody_ended)
    with pytest.raises(LeaseHeld, match="attempt 2"):
        artifact.acquire(0, Owner.me(1, 3), nobody_ended)


def _race(folder, barrier, wins):
    artifact = Artifact(folder)
    barrier.wait()
    try:
        lease = artifact.acquire(0, Owner.me(1, 0), nobody_ended)
    except (LeaseHeld, Sealed):
        wins.put("lost lease")
        return
    (lease.folder / "f.txt").write_text(str(os.getpid()))
    wins.put("sealed" if artifact.seal(lease, {"key": "k"}) else "lost seal")


def test_of_many_simultaneous_twins_exactly_one_seals(tmp_path):
    for round_ in range(5):
        context = multiprocessing.get_context("fork")
        barrier, wins = context.Barrier(6), context.Queue()
        twins = [context.Process(target=_race, args=(tmp_path / f"K{round_}", barrier, wins)) for _ in range(6)]
        [twin.start() for twin in twins]
        results = [wins.get(timeout=30) for _ in twins]
        [twin.join() for twin in twins]
        assert results.count("sealed") == 1, results


def test_elements_fan_in_once_and_missing_ones_are_known(tmp_path):
    artifact = Artifact(tmp_path / "KEY", elements=3, fans_in=True)
    for index in (2, 0):
        fill_and_seal(artifact, index, Owner.me(1, 0))
    assert artifact.sealed_elements() == {0, 2} and not artifact.all_are_sealed()
    fill_and_seal(artifact, 1, Owner.me(1, 0))
    assert artifact.all_are_sealed() and not artifact.seal_path.exists()
    fill_and_seal(artifact, FINISH, Owner.me(1, 0))
    assert artifact.seal_path.exists()


def test_a_seal_over_other_results_is_set_aside_by_an_owner_of_a_later_submission_alone(tmp_path):
    artifact = Artifact(tmp_path / "KEY")
    fill_and_seal(artifact, 0, Owner.me(2, 0), upstream={"a": "old"}, submission=2)
    before = artifact.seal_path.read_bytes()
    for attempt, restart, outdated in ((1, 0, True), (2, 0, True), (2, 7, True), (3, 0, False)):
        with pytest.raises(Sealed):
            artifact.acquire(0, Owner.me(attempt, restart), nobody_ended, lambda seal, told=outdated: told)
    assert artifact.seal_path.read_bytes() == before
    artifact.acquire(0, Owner.me(3, 0), nobody_ended, lambda seal: seal.upstream != {"a": "new"})
    assert not artifact.seal_path.exists()
    assert artifact.seal_path.with_name("seal.json.retired.a3").read_bytes() == before


def test_an_owner_that_was_replaced_sets_no_newer_seal_aside(tmp_path, monkeypatch):
    """It saw an outdated seal, slept, and would now take away that of the owner who came after it."""
    artifact = Artifact(tmp_path / "KEY")
    fill_and_seal(artifact, 0, Owner.me(1, 0), upstream={"a": "old"}, submission=1)
    outdated, aside = lambda seal: seal.upstream != {"a": "new"}, artifact._set_aside

    def late(path, lease, owner):
        monkeypatch.setattr(artifact, "_set_aside", aside)
        newest = artifact.acquire(0, Owner.me(3, 0), nobody_ended, outdated)
        assert artifact.seal(newest, {"key": "k", "upstream": {"a": "new"}, "submission": 3})
        aside(path, lease, owner)

    monkeypatch.setattr(artifact, "_set_aside", late)
    with pytest.raises(LeaseHeld, match="a newer attempt took it"):
        artifact.acquire(0, Owner.me(2, 0), nobody_ended, outdated)
    assert read_seal(artifact.seal_path).submission == 3


def test_the_digest_of_a_seal_speaks_of_bytes_not_of_times(tmp_path):
    digests = set()
    for attempt in (1, 2):
        artifact = Artifact(tmp_path / str(attempt))
        fill_and_seal(artifact, 0, Owner.me(attempt, 0), "same")
        digests.add(read_seal(artifact.seal_path).digest)
    assert len(digests) == 1


LARGE = "x" * (HashCache.SMALL + 1)


def test_reading_a_large_file_is_told_of_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(HashCache, "LARGE", HashCache.SMALL + 1)
    for name, size in (("large", HashCache.SMALL + 1), ("less", HashCache.SMALL)):
        (tmp_path / name).write_bytes(b"1" * size)
    for _ in range(2):
        for name in ("large", "less"):
            content_digest(tmp_path / name, HashCache(tmp_path / "cache"))
    told = capsys.readouterr()
    assert told.err == f"afterok: reading {tmp_path / 'large'} (1.0 MiB) for its SHA-256, which is remembered\n"
    assert not told.out


@pytest.mark.parametrize("size", [3, HashCache.SMALL + 1])
def test_inputs_enter_by_content_and_the_cache_sees_every_change(tmp_path, size):
    cache = HashCache(tmp_path / "cache")
    file = tmp_path / "in" / "a.txt"
    file.parent.mkdir()
    file.write_text("1" * size)
    first = content_digest(file, cache)
    assert content_digest(file, HashCache(tmp_path / "cache")) == first == hashlib.sha256(b"1" * size).hexdigest()
    file.write_text("2" * size)
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))
    assert content_digest(file, cache) != first
    folder = content_digest(file.parent, cache)
    file.rename(file.with_name("renamed.txt"))
    assert content_digest(file.parent, cache) != folder


def test_what_lies_behind_a_link_is_part_of_a_folder(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("in/a", "in/sub/b", "other/c"):
        (tmp_path / name).write_text("1")
    cache = HashCache(tmp_path / "cache")
    plain = content_digest(tmp_path / "in", cache)
    lines = [f"{name} {hashlib.sha256(b'1').hexdigest()}" for name in ("a", "sub/b")]
    assert plain == hashlib.sha256("\n".join(lines).encode()).hexdigest()  # as ever
    (tmp_path / "in" / "sub" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "sub" / "self").symlink_to(tmp_path / "in" / "sub")
    assert content_digest(tmp_path / "in", cache) == plain  # they lead on without end
    (tmp_path / "in" / "link").symlink_to(tmp_path / "other")
    linked = content_digest(tmp_path / "in", cache)
    assert content_digest(tmp_path / "in", cache, follow=False) == plain
    (tmp_path / "other" / "c").write_text("2")
    assert len({plain, linked, content_digest(tmp_path / "in", cache)}) == 3


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_a_file_that_goes_away_while_its_folder_is_hashed_is_no_traceback(tmp_path, monkeypatch, error):
    (tmp_path / "model.safetensors.incomplete").write_text("1")

    def gone(self, path):
        raise error(2, "is gone", str(path))

    monkeypatch.setattr(HashCache, "sha256", gone)
    for place in (tmp_path, tmp_path / "model.safetensors.incomplete"):
        with pytest.raises(
            UserMistake, match=r"cannot be read as it stands \(.*\.incomplete: is gone\); wait for what"
        ):
            content_digest(place, HashCache(tmp_path / "cache"))


def test_the_hash_cache_keeps_large_files_only_each_by_itself_and_forgets_old_ones(tmp_path, monkeypatch):
    cache = HashCache(tmp_path / "cache")
    for name, text in (("small", "x"), ("one", LARGE), ("two", LARGE)):
        (tmp_path / name).write_text(text)
        cache.sha256(tmp_path / name)
    entries = sorted((tmp_path / "cache").rglob("*.json"))
    assert {json.loads(entry.read_text())["path"] for entry in entries} == {
        str(tmp_path / "one"),
        str(tmp_path / "two"),
    }
    old = entries[0].with_name("old.json")
    old.write_text("{}")
    os.utime(old, (1, 1))
    entries[0].unlink()
    for name in ("one", "two"):
        cache.sha256(tmp_path / name)
    assert sorted((tmp_path / "cache").rglob("*.json")) == entries
    monkeypatch.setattr("data_tools.base.durable.sha256_file", lambda path: pytest.fail("hashed again"))
    cache.sha256(tmp_path / "two")


def test_an_owner_that_is_replaced_while_it_hashes_can_no_longer_seal(tmp_path, monkeypatch):
    """The takeover sweeps its folder: a seal linked after that would name nothing."""
    artifact = Artifact(tmp_path / "KEY")
    late = artifact.acquire(0, Owner.me(1, 0), nobody_ended)
    (late.folder / "f.txt").write_text("late")
    real_manifest, taken = jobs.artifacts.artifact.manifest, []

    def slow_manifest(*of):
        found = real_manifest(*of)
        if not taken:
            taken.append(artifact.acquire(0, Owner.me(2, 0), nobody_ended))
            artifact.sweep(taken[0])
        return found

    monkeypatch.setattr(jobs.artifacts.artifact, "manifest", slow_manifest)
    assert artifact.seal(late, {"key": "k"}) is False
    assert not artifact.seal_path.exists() and not late.folder.exists()
    (taken[0].folder / "f.txt").write_text("new")
    assert artifact.seal(taken[0], {"key": "k"})
    assert list(read_seal(artifact.seal_path).altered(rehash=True)) == []


def test_an_owner_that_seals_while_it_is_replaced_stays_sealed(tmp_path, monkeypatch):
    artifact = Artifact(tmp_path / "KEY")
    late = artifact.acquire(0, Owner.me(1, 0), nobody_ended)
    (late.folder / "f.txt").write_text("late")
    monkeypatch.setattr(artifact, "still_mine", lambda lease: True)  # it looked before the newer lease was there
    real_revoke = artifact._revoke

    def revoke(element, name):
        assert artifact.seal(late, {"key": "k"})
        real_revoke(element, name)

    monkeypatch.setattr(artifact, "_revoke", revoke)
    with pytest.raises(Sealed):
        artifact.acquire(0, Owner.me(2, 0), nobody_ended)
    assert list(read_seal(artifact.seal_path).altered(rehash=True)) == []


def test_an_owner_that_was_replaced_sweeps_nothing_of_the_newer_one(tmp_path):
    artifact = Artifact(tmp_path / "KEY")
    late = artifact.acquire(0, Owner.me(1, 0), nobody_ended)
    newer = artifact.acquire(0, Owner.me(1, 1), nobody_ended)
    artifact.sweep(late)
    assert newer.folder.exists()
    artifact.sweep(newer)
    assert not late.folder.exists() and newer.folder.exists()


def _seal_while_taken_over(folder, start):
    artifact = Artifact(folder)
    lease = artifact.acquire(0, Owner.me(1, 0), nobody_ended)
    (lease.folder / "f.txt").write_text("first")
    start.wait()
    artifact.seal(lease, {"key": "k"})


def test_a_takeover_at_any_moment_of_a_seal_leaves_one_whole_seal(tmp_path):
    context = multiprocessing.get_context("fork")
    for round_ in range(40):
        artifact, start = Artifact(tmp_path / str(round_)), context.Event()
        first = context.Process(target=_seal_while_taken_over, args=(artifact.folder, start))
        first.start()
        while not list(artifact.folder.glob("work/*/f.txt")):
            time.sleep(0.001)
        start.set()
        time.sleep(0.0003 * (round_ % 20))
        try:
            lease = artifact.acquire(0, Owner.me(2, 0), nobody_ended)
            artifact.sweep(lease)
            (lease.folder / "f.txt").write_text("second")
            artifact.seal(lease, {"key": "k"})
        except Sealed:
            pass
        first.join()
        read_seal(artifact.seal_path).verify(rehash=True)


def test_a_pid_means_nothing_in_another_pid_namespace(tmp_path):
    """Containers may share the host's name and have pids of their own."""
    owner = replace(Owner.me(1, 0), pid=2**22 + 1, namespace="pid:[1]")
    assert not owner.is_dead(nobody_ended)
    assert replace(owner, namespace=Owner.me(1, 0).namespace).is_dead(nobody_ended)


@pytest.mark.parametrize("torn", [b"", b'{"attempt":1,"rest', b"\0" * 80, b"[]", b'{"attempt":1}', b"\xff\xfe"])
def test_a_torn_lease_still_orders_owners_by_its_name(tmp_path, torn):
    artifact = Artifact(tmp_path / "KEY")
    lease = artifact.acquire(0, Owner.me(2, 0), nobody_ended)
    lease.path.write_bytes(torn)
    with pytest.raises(LeaseHeld, match="attempt 2"):
        artifact.acquire(0, Owner.me(1, 7), nobody_ended)
    with pytest.raises(LeaseHeld, match=f"{lease.path} is torn"):
        artifact.acquire(0, Owner.me(2, 0), nobody_ended)
    _, won = fill_and_seal(artifact, 0, Owner.me(3, 0))
    assert won


@pytest.mark.parametrize("torn", ["", "[]", "null", '{"/x": [1', '{"root": "work/x", "files": {"f": {}}, "key": "k"}'])
def test_a_torn_seal_or_hash_cache_is_no_traceback(tmp_path, torn):
    (tmp_path / "seal.json").write_text(torn)
    with pytest.raises(UserMistake, match="is not a seal"):
        read_seal(tmp_path / "seal.json")
    (tmp_path / "in.txt").write_text(LARGE)
    digest = HashCache(tmp_path / "cache").sha256(tmp_path / "in.txt")
    for entry in (tmp_path / "cache").rglob("*.json"):
        entry.write_text(torn)
    assert HashCache(tmp_path / "cache").sha256(tmp_path / "in.txt") == digest
    assert HashCache(tmp_path / "seal.json").sha256(tmp_path / "in.txt") == digest  # no folder can be made there


def test_files_of_a_copied_run_are_hashed_once(tmp_path, monkeypatch):
    artifact = Artifact(tmp_path / "KEY")
    lease, _ = fill_and_seal(artifact, 0, Owner.me(1, 0), LARGE)
    os.utime(lease.folder / "f.txt", (1, 1))
    cache = HashCache(tmp_path / "cache")
    assert list(read_seal(artifact.seal_path).altered(cache=cache)) == []
    monkeypatch.setattr("data_tools.base.durable.sha256_file", lambda path: pytest.fail("hashed again"))
    assert list(read_seal(artifact.seal_path).altered(cache=cache)) == []
