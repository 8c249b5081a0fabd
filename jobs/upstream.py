"""What an element reads of the phases that it needs: their seals, their folders, and what became of them since."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.mistake import UserMistake
from jobs.artifacts import standing
from jobs.artifacts.hash_cache import HashCache
from jobs.artifacts.keys import content_digest
from jobs.artifacts.layout import ArtifactLayout
from jobs.artifacts.run_folder import FrozenPhase, RunFolder
from jobs.artifacts.seal import Seal, read_seal
from jobs.schema.pipeline import NEED_SEALS


class UpstreamNotSealed(Exception):
    """A phase this one needs has no seal, whatever Slurm thought of its job."""


class NotNeeded(Exception):
    """A phase whose failure this one was to follow is sealed, whatever became of its job."""


class Upstream:
    """The phases that one element of a phase needs, as `read` found them."""

    def __init__(self, run: RunFolder, phases: Mapping[str, FrozenPhase], phase: FrozenPhase, index: int):
        self.run, self.phases, self.phase, self.index = run, phases, phase, index
        self.paired = standing.partners(phase, phases)  # needs of which each element reads its partner's part alone
        self.seals: dict[str, Seal] = {}

    def read(self) -> None:
        """Read and verify the seals, and see that the inputs that no phase makes are those of the submission.

        Raises:
            UpstreamNotSealed: a seal is not there.
            NotNeeded: a phase is sealed whose failure this one was to follow.
            UserMistake: a sealed file or an input was altered.
        """
        cache = HashCache()
        for name, type_ in self.phase.needs.items():
            path = self.seal_path(name, self.index)
            seal = read_seal(path)
            if type_ == "afternotok" and seal is not None:
                raise NotNeeded(f"not needed: {name} is sealed")
            if type_ == "singleton" or (seal is None and type_ not in NEED_SEALS):
                continue
            if seal is None:
                raise UpstreamNotSealed(
                    f"needs {name}, which has no seal at {path}; see `afterok status {self.run.path}`"
                )
            if seal.is_rehearsal != bool(self.phase.rehearsal):
                raise UserMistake(f"{path} is of {'a rehearsal' if seal.is_rehearsal else 'a real run'}; submit again")
            seal.verify(cache=cache)
            self.seals[name] = seal
        for place, digest in self.phase.inputs.items():
            if not Path(place).exists():
                raise UserMistake(f"input {place} is gone since it was submitted; restore it and submit again")
            if content_digest(Path(place), cache) != digest:
                raise UserMistake(f"input {place} changed since it was submitted (sha256 {digest[:12]}…); submit again")

    def seal_path(self, name: str, index: int) -> Path:
        """Return the seal that element `index` reads of a phase it needs."""
        artifact = self.run.artifact(self.phases[name])
        return artifact.element_seal_path(index) if name in self.paired else artifact.seal_path

    @property
    def digests(self) -> dict[str, str]:
        """{need: digest} of the results that were read, as a seal records them."""
        return {name: seal.digest for name, seal in self.seals.items()}

    @property
    def folders(self) -> dict[str, str]:
        """{need: its folder}: the sealed one that was read, else the place of its artifact."""
        return {
            name: str(self.seals[name].folder if name in self.seals else self.run.artifact(self.phases[name]).folder)
            for name in self.phase.needs
        }

    def folders_of_all(self) -> dict[str, str]:
        """Return `folders` for the merging of all elements: of a partner it may be any element's, but always one's.

        Raises:
            UpstreamNotSealed: a partner's first element has no seal any more.
        """
        folders = self.folders
        for name in self.paired:
            partner = read_seal(self.seal_path(name, 0))
            if partner is None:
                raise UpstreamNotSealed(f"needs {name}, whose element 0 has no seal any more; submit again")
            folders[name] = str(partner.folder)
        return folders

    def lineage(self) -> list[dict[str, Any]]:
        """Return what the seals say of all phases that this one's inputs were made by, each after those it needs."""
        found: dict[Path, dict[str, Any]] = {}

        def visit(phase: str, key: str) -> None:
            path = ArtifactLayout(self.run.artifact_folder(phase, key)).seal_path
            if path in found:
                return
            seal = read_seal(path)
            if seal is None:  # retired since: what was read of it is told by those that read it
                return
            said, needs = seal.content, seal.content.get("material", {}).get("upstream", {})
            for need, its_key in needs.items():
                visit(need, its_key)
            found[path] = {
                **{name: said.get(name) for name in ("phase", "uses", "key", "sealed_at")},
                "digest": seal.digest,
                "headline": seal.facts.get("headline", ""),
                "settings": said.get("material", {}).get("settings", {}),
                "needs": list(needs),
                "packages": said.get("environment", {}).get("packages", {}),
            }

        for name in self.seals:
            visit(name, self.phases[name].key)
        return list(found.values())

    def is_outdated(self, seal: Seal) -> bool:
        """Return whether a seal of this element, or of the phase, speaks of other results than those that were read."""
        return bool(standing.other_results(seal, self.digests, self.index, self.paired))

    def is_current(self, index: int, part: Seal) -> bool:
        """Return whether the seal of element `index` speaks of the results that are sealed upstream now."""
        now = self.digests
        for name in self.paired:
            partner = read_seal(self.seal_path(name, index))
            if partner is None:
                return False
            now[name] = partner.digest
        return not standing.other_results(part, now, index, self.paired)
