"""An element's seal, and the merging of all elements into the phase's: what rank 0 does once the work is done."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jobs.artifacts import standing
from jobs.artifacts.artifact import Artifact, Lease, LeaseHeld, Sealed
from jobs.artifacts.consolidate import consolidate, forget_journals
from jobs.artifacts.layout import FINISH
from jobs.artifacts.owner import Owner
from jobs.artifacts.run_folder import FrozenPhase
from jobs.artifacts.seal import Seal, linked, read_seal
from jobs.kind import PhaseKind
from jobs.schema.references import substitute
from jobs.schema.typed import typed_config
from jobs.secrets import Secrets
from jobs.task import Task, forget_progress
from jobs.upstream import Upstream


class TakenOver(Exception):
    """A newer owner took the element over and has not sealed it yet."""


@dataclass
class Told:
    """Some facts of the elements, as the phase's seal tells them: each value once, in the order of the elements."""

    names: tuple[str, ...]
    values: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, facts: dict[str, Any]) -> None:
        """Hear the facts of one element."""
        for name in self.names:
            if name in facts and facts[name] not in self.values.setdefault(name, []):
                self.values[name].append(facts[name])

    def facts(self) -> dict[str, Any]:
        """Return the facts by name: the value, or where elements differ the list of all."""
        return {name: values[0] if len(values) == 1 else values for name, values in self.values.items()}


@dataclass
class Sealer:
    """Seals what one owner made of one element, and merges the elements where it is the last."""

    artifact: Artifact
    phase: FrozenPhase
    kind: PhaseKind
    upstream: Upstream
    owner: Owner
    started: float  # when the work began, seconds since the epoch
    says_ended: Callable[[str], bool]  # whether the job of that id has ended, for certain
    reveal: Callable[[], Secrets]  # puts the secrets into this process's environment, where they are not yet

    def seal(self, lease: Lease | None, facts: dict[str, Any]) -> str:
        """Seal the element under a lease, merge where all are sealed, and return what became of it.

        Without a lease the element is sealed already, and only the merging is left.

        Raises:
            TakenOver: a newer owner works on the element.
        """
        if lease is not None and not self.artifact.seal(lease, self._record(facts, whole=False)):
            return self._lost_to_twin()
        if self.phase.elements > 1:
            keep = self.artifact.keep_folder(self.upstream.index, self.phase.elements)
            forget_journals(self.phase, keep)
            forget_progress(keep, self.upstream.index)
        if self.artifact.fans_in and self.artifact.all_are_sealed():
            self._fan_in()
        if self.artifact.seal_path.exists():
            self.upstream.run.link_latest(self.phase.name)
        return "sealed"

    def _lost_to_twin(self) -> str:
        """Say that a twin sealed first; where there is no seal, a newer owner took over and the work is not done."""
        own = self.artifact.element_seal_path(self.upstream.index)
        if self.artifact.seal_path.exists() or (self.artifact.fans_in and own.exists()):
            return "a twin sealed first"
        raise TakenOver

    def _fan_in(self) -> None:
        """Merge the elements into the phase's seal: what it says is the same whichever of them comes last."""
        parts, told = [], Told(self.kind.of_elements)
        for index in range(self.phase.elements):
            part = read_seal(self.artifact.element_seal_path(index))
            # A seal of an earlier submission over other results: the element's task in this one is to come.
            if part is None or not (part.submission >= self.owner.attempt or self.upstream.is_current(index, part)):
                print(f"{self.phase.name}[{index}] is to be sealed anew, then all are merged")
                return
            told.add(part.facts)
            parts.append(part.without_what_is_not_merged())
        digests = [part.digest for part in parts]
        try:
            lease = self.artifact.acquire(FINISH, self.owner, self.says_ended, lambda seal: seal.parts != digests)
        except (Sealed, LeaseHeld):
            return  # another element's task finishes, or has finished
        try:
            self._merge(lease, parts, told.facts())
        except Exception:
            if self.artifact.still_mine(lease):
                raise
            print(f"{self.phase.name}: a newer attempt merges the elements")  # and has swept our folder

    def _merge(self, lease: Lease, parts: list[Seal], told: dict[str, Any]) -> None:
        self.artifact.sweep(lease)
        for part in parts:
            part.verify()
        config = typed_config(self.kind, substitute(self.phase.own_settings, self.upstream.folders_of_all()))
        self.reveal()
        task = Task(
            phase=self.phase.name,
            index=0,
            count=self.phase.elements,
            value=None,
            out=lease.folder,
            keep=self.artifact.folder,
            rank=0,
            world_size=1,
        )
        facts = told | (self.kind.finish([part.folder for part in parts], config, task) or {})
        upstream = standing.whole_upstream(parts, self.upstream.paired)
        record = {**self._record(facts, whole=True), "parts": [part.digest for part in parts], "upstream": upstream}
        if self.artifact.seal(lease, record, linked(lease.folder, parts)):
            owners = {index: (part.submission, part.content.get("restart", 0)) for index, part in enumerate(parts)}
            consolidate(self.upstream.run, self.phase, self.owner.attempt, owners)

    def _record(self, facts: dict[str, Any], whole: bool) -> dict[str, Any]:
        """Return what a seal says of this owner's work, on an element or on the `whole` phase.

        Raises UserMistake where the facts hold a secret.
        """
        self.reveal().refuse_in(facts, f"{self.phase.name}: facts")
        material = self.phase.material
        if self.artifact.fans_in and not whole:  # the values of all elements stand in the phase's seal alone
            material = {name: value for name, value in material.items() if name != "array"}
        return {
            "phase": self.phase.name,
            "uses": self.phase.uses,
            "key": self.phase.key,
            "material": material,
            "submission": self.owner.attempt,
            "restart": self.owner.restart,
            "job": self.owner.job,
            "upstream": self.upstream.digests,
            "ranks": self.phase.ranks,
            "started_at": self.started,
            "facts": facts,
            **({"image": self.phase.image} if self.phase.image else {}),
            **({"rehearsal": self.phase.rehearsal} if self.phase.rehearsal else {}),
        }
