"""Whether a seal still speaks of what lies upstream: the one notion that plan, a worker's start and fan-in share.

A seal records the digest of each result it was made from. An element that follows its partner alone (aftercorr) records
the partner's; the whole phase then records one digest an element, taken from the elements' seals, so that it says the
same whoever merged them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_tools.base import durable
from jobs.artifacts.artifact import Artifact
from jobs.artifacts.hash_cache import HashCache
from jobs.artifacts.layout import set_aside_name
from jobs.artifacts.run_folder import FrozenPhase
from jobs.artifacts.seal import DamagedSeal, Seal, read_seal
from jobs.schema.pipeline import NEED_SEALS

COMPARED = (*NEED_SEALS, "afterany")  # needs whose results a seal records, where they were sealed


def partners(phase: FrozenPhase, phases: Mapping[str, FrozenPhase]) -> list[str]:
    """Return the needs of which each element reads its partner's part alone."""
    return [name for name, type_ in phase.needs.items() if type_ == "aftercorr" and phases[name].fans_in]


def other_results(seal: Seal, now: Mapping[str, str], index: int, paired: list[str]) -> list[str]:
    """Return the needs of which the seal, an element's or a whole phase's, records another result than is sealed `now`.

    `now` is {need: digest} as element `index` finds them. What a whole phase records of a `paired` need is compared at
    this element; seals of before recorded there what an element of no matter which number had read: nothing to compare.
    """
    names = []
    for name, digest in now.items():
        recorded = seal.upstream.get(name)
        if isinstance(recorded, list):
            recorded = recorded[index] if index < len(recorded) else None
        elif seal.is_whole and name in paired:
            continue
        if recorded != digest:
            names.append(name)
    return names


def whole_upstream(parts: list[Seal], paired: list[str]) -> dict[str, "str | list[str]"]:
    """Return what the seal of a whole phase records of its needs, by what its elements' seals say of theirs."""
    first = parts[0].upstream
    return {name: [part.upstream.get(name, "") for part in parts] if name in paired else first[name] for name in first}


# -- of a whole phase ---------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """What is remembered of an element's seal that stands: a plan may hear of a million."""

    digest: str
    has_sum: bool


@dataclass
class Survey:
    """What of a phase is sealed and stands, and what a submitter has to withdraw, so that it is sealed anew."""

    whole: Seal | None = None  # the phase's own seal, where that and all its elements' stand
    parts: dict[int, Part] = field(default_factory=dict)  # elements' seals that stand
    fallen: list[tuple[Path, str, str]] = field(default_factory=list)  # (seal, its SHA-256, altered or retired)
    reasons: list[str] = field(default_factory=list)  # why those fell, an element or the phase each

    def missing(self, phase: FrozenPhase) -> list[int]:
        """Return the elements that need a task; element 0 stands for an unfinished fan-in."""
        if self.whole is not None:
            return []
        return [i for i in range(phase.elements) if i not in self.parts] or [0] if phase.fans_in else [0]

    def withdraw(self, artifact: Artifact, submission: int) -> None:
        """Set aside what fell, but for seals that changed since the survey."""
        for path, seen, word in self.fallen:
            artifact.withdraw(path, seen, set_aside_name(path, word, submission))


class Surveyor:
    """Surveys the phases of one plan, each after those it needs."""

    def __init__(self, verify: bool, cache: HashCache):
        self.verify, self.cache = verify, cache

    def survey(
        self, artifact: Artifact, phase: FrozenPhase, now: Mapping[str, str], partners: Mapping[str, Mapping[int, Part]]
    ) -> Survey:
        """Return what stands of a phase whose needs are sealed as `now` says; of aftercorr needs, as `partners` does.

        Raises:
            DamagedSeal: the phase's own seal is damaged.
        """
        survey = Survey()
        whole, paired = read_seal(artifact.seal_path), list(partners)
        sealed = artifact.sealed_elements() if phase.fans_in else set()
        for index in range(phase.elements if phase.fans_in else 0):
            if index not in sealed:
                if whole is not None:
                    survey.reasons.append(f"{artifact.element_seal_path(index)} is gone")
                continue
            there = {name: parts[index].digest for name, parts in partners.items() if index in parts}
            place = artifact.element_seal_path(index)
            seal, why, word = self._element(place, index, {**now, **there}, paired)
            if seal is not None and not why:
                survey.parts[index] = Part(seal.digest, seal.has_sum)
            elif why:
                survey.reasons.append(f"element {index}: {why}" if seal else why)
                survey.fallen.append((place, durable.sha256_file(place), word))
        if whole is None:
            return survey
        if not survey.reasons:
            why, _ = self._why(whole, 0, now, paired)
            why = why or (_why_parts_differ(whole, survey.parts) if phase.fans_in else "")
            survey.reasons += [why] if why else []
        if survey.reasons:
            word = "altered" if next(whole.altered(self.verify, self.cache), None) else "retired"
            survey.fallen.append((whole.path, durable.sha256_file(whole.path), word))
        else:
            survey.whole = whole
        return survey

    def _element(
        self, path: Path, index: int, now: Mapping[str, str], paired: list[str]
    ) -> tuple[Seal | None, str, str]:
        """Return an element's seal, why it does not stand, and the word for that; (None, "", "") if none is."""
        try:
            seal = read_seal(path)
        except DamagedSeal as damage:
            return None, str(damage).partition(";")[0], "altered"
        return (seal, *self._why(seal, index, now, paired)) if seal else (None, "", "")

    def _why(self, seal: Seal, index: int, now: Mapping[str, str], paired: list[str]) -> tuple[str, str]:
        """Return why a seal does not stand, and the word for that; ("", "") where it does."""
        if line := next(seal.altered(self.verify, self.cache), None):
            return line, "altered"
        if names := other_results(seal, now, index, paired):
            return f"{names[0]} was sealed anew since", "retired"
        return "", ""


def _why_parts_differ(whole: Seal, parts: Mapping[int, Part]) -> str:
    """Return which element was sealed anew after all were merged; "" where none was."""
    other = [i for i, part in sorted(parts.items()) if (whole.parts or [])[i : i + 1] != [part.digest]]
    return f"element {other[0]} was sealed anew since" if other else ""
