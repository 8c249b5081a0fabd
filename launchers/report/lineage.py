"""Tells what each result was made of: digests of inputs, of the results that were read, and of what was sealed."""

from dataclasses import dataclass, field

from jobs.artifacts.run_folder import FrozenPhase, RunFolder
from jobs.artifacts.seal import Seal

SHORT = 12  # characters of a digest that are shown
FILES = 8  # of a seal, the largest that are named


@dataclass(frozen=True)
class Read:
    """A result that a phase read: of which phase, its digest, and whether that is what is sealed there now."""

    phase: str
    digest: str
    is_current: bool


@dataclass(frozen=True)
class Link:
    """One phase in the chain from inputs to exports."""

    phase: str
    uses: str
    key: str
    digest: str  # of its seal; "" of one that is not sealed
    inputs: dict[str, str]  # file or folder outside the run -> SHA-256
    read: list[Read] = field(default_factory=list)
    files: int = 0
    size: int = 0  # bytes
    named: dict[str, str] = field(default_factory=dict)  # some files -> SHA-256
    weights: str = ""  # digest of the model's weights, where the phase has one
    packages: dict[str, str] = field(default_factory=dict)  # it was made with -> version
    is_result: bool = False  # nothing in the run reads it


def lineage_of(run: RunFolder, phases: dict[str, FrozenPhase]) -> list[Link]:
    """Return the phases in their order, each with what it read and what it made."""
    seals = {name: run.whole_seal(name, phase.key) for name, phase in phases.items()}
    needed = {need for phase in phases.values() for need in phase.needs}
    return [_link(phase, seals, is_result=name not in needed) for name, phase in phases.items()]


def _link(phase: FrozenPhase, seals: dict[str, Seal | None], is_result: bool) -> Link:
    seal = seals[phase.name]
    inputs = {place: digest[:SHORT] for place, digest in phase.inputs.items()}
    if seal is None:
        return Link(phase.name, phase.uses, phase.key, digest="", inputs=inputs, is_result=is_result)
    files = seal.content["files"]
    largest = sorted(files, key=lambda name: -files[name]["size"])[:FILES]
    packages = seal.content.get("environment", {}).get("packages", {})
    return Link(
        phase=phase.name,
        uses=phase.uses,
        key=phase.key,
        digest=seal.digest[:SHORT],
        inputs=inputs,
        read=[_read(need, said, seals.get(need)) for need, said in seal.upstream.items()],
        files=len(files),
        size=sum(entry["size"] for entry in files.values()),
        named={name: files[name]["sha256"][:SHORT] for name in largest},
        weights=str(seal.facts.get("weights_digest", ""))[:SHORT],
        packages=packages if isinstance(packages, dict) else {},
        is_result=is_result,
    )


def _read(need: str, said: object, seal: Seal | None) -> Read:
    """Return what a seal says of a result that it read: one digest, or of an aftercorr need one an element."""
    if isinstance(said, str):
        return Read(need, said[:SHORT], is_current=seal is not None and seal.digest == said)
    digests = list(said.values()) if isinstance(said, dict) else list(said) if isinstance(said, list) else []
    shown = ", ".join(str(each)[:SHORT] for each in digests[:2]) + (" …" if len(digests) > 2 else "")
    return Read(need, shown, is_current=seal is not None and digests == (seal.parts or []))
