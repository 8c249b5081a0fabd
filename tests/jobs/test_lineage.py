"""A phase is told what its inputs were made of: every phase before it once, each after those that it needs."""

from types import SimpleNamespace
from typing import Any

from data_tools.base import durable
from jobs.artifacts.layout import ArtifactLayout
from jobs.artifacts.run_folder import RunFolder
from jobs.upstream import Upstream

NEEDS = {"data": [], "imported": [], "sft": ["data", "imported"], "grpo": ["sft", "data"], "exported": ["grpo"]}


def sealed(run: RunFolder, phase: str) -> None:
    key = f"key_of_{phase}"
    content: dict[str, Any] = {
        "format": 1, "phase": phase, "uses": phase, "key": key, "root": "work", "files": {}, "sealed_at": 1.0,
        "facts": {"headline": f"{phase} done"}, "environment": {"packages": {"torch": "2.13.0"}},
        "material": {"settings": {"lr": 1e-3}, "upstream": {need: f"key_of_{need}" for need in NEEDS[phase]}},
    }  # fmt: skip
    artifact = ArtifactLayout(run.artifact_folder(phase, key))
    artifact.folder.mkdir(parents=True)
    durable.write_checked(artifact.seal_path, content)


def test_lineage_has_every_phase_once_after_those_that_it_needs(tmp_path):
    run = RunFolder(tmp_path)
    for phase in NEEDS:
        sealed(run, phase)
    phases = {phase: SimpleNamespace(key=f"key_of_{phase}", needs={}) for phase in NEEDS}
    mine = SimpleNamespace(needs={"exported": "afterok"}, inputs={}, rehearsal=None)
    upstream = Upstream(run, phases, mine, 0)  # type: ignore[arg-type]
    upstream.seals = dict.fromkeys(["exported"])  # type: ignore[arg-type]
    told = upstream.lineage()
    names = [step["phase"] for step in told]
    assert sorted(names) == sorted(NEEDS)
    assert all(names.index(need) < names.index(phase) for phase, needs in NEEDS.items() for need in needs)
    assert told[-1] | {"digest": ""} == {
        "phase": "exported", "uses": "exported", "key": "key_of_exported", "sealed_at": 1.0, "digest": "",
        "headline": "exported done", "settings": {"lr": 1e-3}, "needs": ["grpo"], "packages": {"torch": "2.13.0"},
    }  # fmt: skip
    assert len({step["digest"] for step in told}) == len(NEEDS)
