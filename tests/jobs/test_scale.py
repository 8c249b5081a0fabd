"""What an element costs does not grow with the elements of its phase: what it asks of the filesystem is counted."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_tools.base import durable
from jobs.artifacts.artifact import ASKED_FIRST, Artifact
from jobs.artifacts.layout import GROUP, LeaseName
from jobs.artifacts.owner import Owner
from jobs.artifacts.run_folder import FrozenPhase
from jobs.sealing import Sealer
from jobs.secrets import Secrets
from jobs.worker import restart_count
from launchers.backends.restart import Life, judge
from tests.launchers.planted_run import PlantedRun

SIZES = (2 * GROUP, 4 * GROUP)
OWN = GROUP + GROUP // 2  # the element that is looked at: its group of a thousand is full at both sizes


class Count:
    """Counts what this process asks of the filesystem while `counting`."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.counting = False

    def audited(self, event: str, args: tuple[Any, ...]) -> None:
        if self.counting and event in ("open", "os.listdir", "os.scandir"):
            self.counts["opens"] += 1

    def of(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            self.counts[name] += (len(result) if name == "names" else 1) if self.counting else 0
            return result

        return counted

    def __call__(self, work: Callable[[], Any]) -> Counter[str]:
        """Return the counts of some work."""
        self.counts.clear()
        self.counting = True
        try:
            work()
        finally:
            self.counting = False
        return Counter(self.counts)


COUNT = Count()
sys.addaudithook(COUNT.audited)  # one cannot be taken away again


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Iterator[Count]:
    for name, function in (("stats", "stat"), ("stats", "lstat"), ("names", "listdir")):
        monkeypatch.setattr(os, function, COUNT.of(name, getattr(os, function)))
    yield COUNT


def half_sealed(folder: Path, elements: int) -> Artifact:
    """Plant what the other elements of a phase leave: leases and work folders of all, seals of every second one."""
    artifact, owner = Artifact(folder, elements, fans_in=True), LeaseName(1, 0, 0)
    for index in {*range(elements)} - {OWN}:
        for path in (artifact.lease_path(index, owner), artifact.work_folder(index, owner)):
            if index % GROUP == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    artifact.seals_folder.mkdir()
    for index in range(0, elements, 2):
        os.close(os.open(artifact.element_seal_path(index), os.O_CREAT | os.O_WRONLY)) if index != OWN else None
    return artifact


def life_of_an_element(artifact: Artifact) -> None:
    owner = Owner.me(1, restart_count(artifact, OWN, 1))
    lease = artifact.acquire(OWN, owner, lambda job: False)
    artifact.sweep(lease)
    (lease.folder / "rows").write_text("1")
    assert artifact.seal(lease, {"key": "k", "upstream": {}})
    assert not artifact.all_are_sealed()


def test_an_element_starts_and_is_sealed_at_the_same_cost_among_any_number(tmp_path: Path, count: Count) -> None:
    life_of_an_element(Artifact(tmp_path / "first", SIZES[0], fans_in=True))  # what a process reads once
    planted = [half_sealed(tmp_path / str(size), size) for size in SIZES]
    small, large = (count(lambda artifact=artifact: life_of_an_element(artifact)) for artifact in planted)
    assert small["opens"] == large["opens"]
    assert abs(small["stats"] - large["stats"]) <= ASKED_FIRST
    groups = (SIZES[1] - SIZES[0]) // GROUP  # folders of leases or of work, each listed a few times
    assert large["names"] - small["names"] <= 10 * groups and small["names"] > GROUP


def test_what_was_leased_and_made_before_there_were_groups_is_found(tmp_path: Path) -> None:
    artifact, owner = Artifact(tmp_path / "KEY", SIZES[0], fans_in=True), LeaseName(1, 0, 0)
    for folder in ("leases", "work", "sealing"):
        (artifact.folder / folder).mkdir(parents=True)
    (artifact.folder / "leases" / f"{OWN}.{owner}").write_text(Owner.me(1, 0).record())
    old = artifact.folder / "work" / f"{OWN}.{owner}"
    sealing = artifact.folder / "sealing" / f"{OWN}.{owner}.0123abcd"
    old.mkdir(), sealing.mkdir()
    assert list(artifact.leases(OWN)) == [owner]
    lease = artifact.acquire(OWN, Owner.me(2, 0), lambda job: False)
    artifact.sweep(lease)
    assert not old.exists() and not sealing.exists()  # the older owner cannot seal any more
    assert lease.folder.parent.name == lease.path.parent.name == lease.sealing.parent.name == f"{OWN // GROUP}k"
    assert artifact.leases(OWN).keys() == {owner, LeaseName(2, 0, 0)} and not artifact.leases(OWN % GROUP)


@pytest.mark.parametrize("work", ["outcomes", "judge"])
def test_an_element_that_failed_reads_its_own_outcomes_alone(tmp_path: Path, count: Count, work: str) -> None:
    opens = []
    for elements in (20, 60):
        planted = PlantedRun(tmp_path / f"{work}{elements}", {"p": "materialize"}, elements)
        for element in range(elements):
            planted.life("p", 1, 2, "failed", element=element, message="ValueError: x")
        phase, run = planted.phases["p"], planted.run
        if work == "judge":
            life = Life(run, phase, index=7, attempt=1, script=1, restart=0)
            opens.append(count(lambda life=life: judge(life, 1, on_slurm=False))["opens"])
        else:
            opens.append(count(lambda run=run: run.outcomes("p", element=7))["opens"])
            assert [outcome.element for outcome in run.outcomes("p", element=7)] == [7]
    assert opens[0] == opens[1]


def test_the_values_of_an_array_stand_in_the_plan_of_a_submission_once(tmp_path: Path) -> None:
    planted = PlantedRun(tmp_path, {"p": "materialize"}, 3)
    phase = planted.phases["p"]
    phase.array = ["first", "second", "third"]
    phase.material = {"settings": {}, "array": phase.array}
    planted.run.freeze(1, "planted", [phase])
    assert planted.run.plan_path(1).read_text().count("second") == 1
    assert planted.run.frozen(1)["p"] == phase


def test_the_values_of_an_array_stand_in_the_seal_of_the_phase_alone() -> None:
    def record(values: int, whole: bool) -> str:
        array = list(range(values))
        phase = SimpleNamespace(
            **dict.fromkeys(vars(FrozenPhase)["__annotations__"], ""),
            ranks=1,
        )
        phase.material, phase.array = {"settings": {}, "array": array}, array
        sealer = Sealer(
            artifact=SimpleNamespace(fans_in=True), phase=phase, kind=None, upstream=SimpleNamespace(digests={}),
            owner=Owner.me(1, 0), started=0.0, says_ended=lambda job: False, reveal=lambda: Secrets({}),
        )  # fmt: skip
        return durable.canonical_json(sealer._record({}, whole))

    assert len(record(10, whole=False)) == len(record(1000, whole=False))
    assert '"array":[0,1,2' in record(10, whole=True)
