"""A seal reads and syncs no file that its writers hashed and synced: a model of terabytes is sealed by its digests."""

import os
from pathlib import Path

import pytest

from data_tools.base import digests, durable
from jobs.artifacts.artifact import Artifact
from jobs.artifacts.hash_cache import HashCache
from jobs.artifacts.layout import FINISH
from jobs.artifacts.owner import Owner
from jobs.artifacts.seal import Seal, linked, read_seal
from tests.data_tools.test_digests import written

NODES, PARTS = 40, (b"the first rank's", b"the second rank's")


class Counted:
    """The files that were read or synced since the last look."""

    def __init__(self, monkeypatch):
        self.read: list[Path] = []
        self.synced: list[Path] = []
        whole, fsync, parts_of = durable.sha256_file, os.fsync, digests.parts_of
        monkeypatch.setattr(durable, "sha256_file", lambda path: self.read.append(Path(path)) or whole(path))
        monkeypatch.setattr(digests, "parts_of", lambda path, sizes: self.read.append(path) or parts_of(path, sizes))
        monkeypatch.setattr(os, "fsync", lambda handle: self.synced.append(self.path(handle)) or fsync(handle))

    @staticmethod
    def path(handle: int) -> Path:
        return Path(os.readlink(f"/proc/self/fd/{handle}"))


def fill(weights: Path) -> dict[str, list[digests.Part]]:
    weights.mkdir()
    (weights.parent / "model.json").write_text("{}")
    return {f"__{node}_0.distcp": written(weights / f"__{node}_0.distcp", *PARTS) for node in range(NODES)}


@pytest.fixture
def artifact(tmp_path) -> Artifact:
    return Artifact(tmp_path / "KEY")


def sealed(artifact: Artifact, counted: Counted, tell: bool = True) -> tuple[Seal, list[str], list[str]]:
    """The seal of a model's folder, which of its weights were read for it, and which synced."""
    lease = artifact.acquire(0, Owner.me(1, 0), lambda job: False)
    told = fill(lease.folder / "weights")
    if tell:
        digests.write(lease.folder / "weights", told)
    counted.read.clear(), counted.synced.clear()
    assert artifact.seal(lease, {"key": "k"})
    seal = read_seal(artifact.seal_path)
    assert seal is not None and len(seal.content["files"]) == NODES + 1 + tell
    of_weights = [[p.name for p in paths if p.suffix == ".distcp"] for paths in (counted.read, counted.synced)]
    return seal, *of_weights


def test_sealing_reads_and_syncs_no_byte_that_its_writers_told(artifact, monkeypatch):
    seal, read, synced = sealed(artifact, Counted(monkeypatch))
    assert read == [] and synced == []
    assert list(seal.altered(rehash=True)) == []


def test_what_nobody_told_is_read_and_synced_once(artifact, monkeypatch):
    _, read, synced = sealed(artifact, Counted(monkeypatch), tell=False)
    assert len(read) == len(synced) == NODES


def test_a_changed_byte_of_any_part_is_found_by_who_verifies(artifact, monkeypatch):
    seal, _, _ = sealed(artifact, Counted(monkeypatch))
    file = seal.folder / "weights" / "__7_0.distcp"
    data = file.read_bytes()
    for at in (0, len(PARTS[0]), len(data) - 1):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        (line,) = seal.altered()
        assert "__7_0.distcp was changed after it was sealed" in line
    file.write_bytes(data)
    assert list(seal.altered()) == []


def test_the_parts_of_a_copied_run_are_hashed_once(artifact, monkeypatch, tmp_path):
    counted = Counted(monkeypatch)
    monkeypatch.setattr(HashCache, "SMALL", 0)
    seal, _, _ = sealed(artifact, counted)
    os.utime(seal.folder / "weights" / "__7_0.distcp", (1, 1))
    cache = HashCache(tmp_path / "cache")
    counted.read.clear()
    for _ in range(2):
        assert list(seal.altered(cache=cache)) == []
    assert [path.name for path in counted.read] == ["__7_0.distcp"]


@pytest.mark.parametrize("parts", [7, ["16", 17], [-1, 34], [1.5]])
def test_parts_that_are_no_lengths_are_no_seal(artifact, monkeypatch, parts):
    seal, _, _ = sealed(artifact, Counted(monkeypatch))
    seal.content["files"]["weights/__7_0.distcp"]["parts"] = parts
    durable.write_checked(artifact.seal_path, {k: v for k, v in seal.content.items() if k != durable.SUM})
    with pytest.raises(Exception, match="for the parts of its file 'weights/__7_0.distcp'"):
        read_seal(artifact.seal_path)


def test_what_elements_sealed_is_not_read_again_where_the_whole_links_to_it(tmp_path, monkeypatch):
    """Unless it was changed since: an exported model is merged from the files of its elements."""
    counted, artifact = Counted(monkeypatch), Artifact(tmp_path / "KEY", elements=3, fans_in=True)
    seals = []
    for index in range(3):
        lease = artifact.acquire(index, Owner.me(1, 0), lambda job: False)
        (lease.folder / f"{index}.safetensors").write_text(f"weights {index}")
        assert artifact.seal(lease, {"key": "k"})
        seals.append(read_seal(artifact.element_seal_path(index)))
    lease = artifact.acquire(FINISH, Owner.me(1, 0), lambda job: False)
    for index, seal in enumerate(seals):
        os.link(seal.folder / f"{index}.safetensors", lease.folder / f"{index}.safetensors")
    (lease.folder / "1.safetensors").write_text("weights, changed")
    (lease.folder / "own.json").write_text("{}")
    counted.read.clear(), counted.synced.clear()
    assert artifact.seal(lease, {"key": "k"}, linked(lease.folder, seals))
    assert sorted(path.name for path in counted.read) == ["1.safetensors", "own.json"]
    assert {path.name for path in counted.synced if path.suffix} >= {"1.safetensors", "own.json"}
    assert not {"0.safetensors", "2.safetensors"} & {path.name for path in counted.synced}
    whole = read_seal(artifact.seal_path)
    assert whole is not None and list(whole.altered(rehash=True)) == []


def test_an_elements_seal_has_in_it_what_its_writers_told_and_their_file_goes(tmp_path, monkeypatch):
    counted, artifact = Counted(monkeypatch), Artifact(tmp_path / "KEY", elements=2, fans_in=True)
    lease = artifact.acquire(0, Owner.me(1, 0), lambda job: False)
    digests.write(lease.folder / "weights", fill(lease.folder / "weights"))
    counted.read.clear()
    assert artifact.seal(lease, {"key": "k"})
    seal = read_seal(artifact.element_seal_path(0))
    assert [path.name for path in counted.read] == ["model.json"]
    assert seal is not None and list(seal.altered(rehash=True)) == [] and len(seal.content["files"]) == NODES + 1
    assert not list(seal.folder.rglob(digests.DIGESTS))
