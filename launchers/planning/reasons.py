"""Why a phase is reused or runs again: what makes a phase rerun is answered here.

A phase is reused where its key is sealed in this run, what was sealed is unaltered, and the results it was made from
are those sealed now. It runs, or runs again, where

* nothing is sealed under its key: it never ran, or the key is another one since a setting, an input, an upstream key,
  a user's task, or (with `on_code_change: rerun`) the code changed;
* a sealed file, or the seal itself, is altered or gone;
* a phase that it needs was sealed anew with other results, or runs again in this very plan;
* somebody asked for it (`afterok resubmit RUN PHASE --again`).

It is skipped where it follows the failure of a phase that is sealed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_tools.mistake import UserMistake
from jobs.artifacts import standing
from jobs.artifacts.layout import checkpoints_of
from jobs.artifacts.run_folder import FrozenPhase, RunFolder
from jobs.artifacts.seal import Seal
from jobs.schema.pipeline import NEED_SEALS, Pipeline
from launchers.planning.ledger import Ledger
from launchers.planning.plan import RUNS, PlannedPhase
from launchers.planning.snapshot import Code, code_changes

ASKED = 100  # elements of a phase whose ends are read; of more elements that of the first
LONGEST = 160  # characters of what an attempt said last
SHOWN = 3  # seals of one phase that do not stand, or files that changed: so many are named


@dataclass
class Reasoner:
    """Decides of each phase of a plan, after those it needs, whether it is reused or runs, and says why."""

    pipeline: Pipeline
    run: RunFolder
    code: Code
    digests: Mapping[str, str]  # of the files of `code`
    planned: dict[str, PlannedPhase]  # the phases decided so far
    seals: dict[str, Seal]  # of those that are reused
    surveyor: standing.Surveyor
    again: str = ""  # a phase that runs anew though it is sealed

    def decide(self, planned: PlannedPhase) -> None:
        """Write into a phase what becomes of it, why, and which of its elements run."""
        frozen = planned.frozen
        if frozen.name == self.again:
            planned.action, planned.reasons = "rerun", ["asked for anew"]
            planned.missing = planned.anew = list(range(frozen.elements))
            return
        survey = planned.survey = self._what_stands(frozen)
        affected = self._affected(frozen)
        stands = survey.parts if frozen.fans_in else [0] if survey.whole else []
        # A result that is to be sealed anew may turn out the same: its element then finds its seal good, and ends.
        again = {i for elements in affected.values() for i in elements}
        planned.anew = [i for i in range(frozen.elements) if i in again or i not in stands]
        planned.missing = planned.anew or survey.missing(frozen)
        planned.conditional = any(
            type_ == "afternotok" or (type_ in NEED_SEALS and self.planned[name].conditional)
            for name, type_ in frozen.needs.items()
        )
        if why := self._why_not_needed(planned):
            planned.action, planned.reasons = "skip", [f"not needed: {why}"]
        elif survey.whole is not None and not planned.missing:
            self._reuse(planned, survey.whole)
        elif survey.whole is not None:
            planned.action, planned.reasons = "rerun", [f"because of {name}, which runs again" for name in affected]
        elif survey.reasons:
            more = len(survey.reasons) - SHOWN
            planned.action = "rerun"
            planned.reasons = survey.reasons[:SHOWN] + ([f"and {more} more"] if more > 0 else [])
        else:
            self._run_unsealed(planned)

    def _why_not_needed(self, planned: PlannedPhase) -> str:
        """Return why a phase without a seal never has to run; "" where it may have to."""
        survey = planned.survey
        if survey.whole is not None or survey.fallen or not planned.conditional:
            return ""
        phases = {name: before.frozen for name, before in self.planned.items()} | {planned.name: planned.frozen}
        return self.run.not_needed(phases, planned.name)

    def _reuse(self, planned: PlannedPhase, seal: Seal) -> None:
        planned.action, planned.reasons = "reuse", ["sealed, same key and upstream"]
        if not (seal.has_sum and all(part.has_sum for part in planned.survey.parts.values())):
            planned.reasons.append("no sum: written before")
        planned.code_changed = self._code_changes(seal, planned.name)
        was, now = seal.content.get("image", {}), planned.frozen.image
        known = all("sha256" in image for image in (was, now))
        if was.get("name") != now.get("name") or (known and was != now):
            planned.code_changed.append(f"image {_image(was)} → {_image(now)}")
        self.seals[planned.name] = seal

    def _run_unsealed(self, planned: PlannedPhase) -> None:
        """Say why a phase runs whose key has no seal, or not those of all elements."""
        frozen, survey = planned.frozen, planned.survey
        before = self.run.seals(frozen.name)
        if before:
            planned.action, planned.reasons = "rerun", self._differences(before[-1], frozen)
        elif survey.parts:
            planned.reasons = [f"{len(survey.parts)} of {frozen.elements} elements are sealed"]
        elif any(checkpoints_of(self.run.artifact(frozen).folder)):
            planned.reasons = ["not sealed yet; goes on from its newest checkpoint", *attempted(self.run, frozen)]
        else:
            planned.reasons = attempted(self.run, frozen, "not sealed: ") or ["never ran in this run"]

    def _what_stands(self, frozen: FrozenPhase) -> standing.Survey:
        """Return what is sealed of a phase under its key and speaks of the results that are sealed upstream now."""
        phases = {name: before.frozen for name, before in self.planned.items()}
        paired = standing.partners(frozen, phases)
        now = {
            name: self.seals[name].digest
            for name, type_ in frozen.needs.items()
            if type_ in standing.COMPARED and name in self.seals and name not in paired
        }
        partners = {name: self.planned[name].survey.parts for name in paired}
        return self.surveyor.survey(self.run.artifact(frozen), frozen, now, partners)

    def _affected(self, frozen: FrozenPhase) -> dict[str, list[int]]:
        """Return {need: elements that may find other results in it than before, once this plan has run}."""
        affected = {}
        for name, type_ in frozen.needs.items():
            upstream = self.planned[name]
            if type_ not in standing.COMPARED or upstream.action not in RUNS:
                continue
            if type_ == "aftercorr" and upstream.frozen.fans_in:
                elements = [i for i in upstream.anew if i < frozen.elements]
            else:
                elements = list(range(frozen.elements))
            if elements:
                affected[name] = elements
        return affected

    def _differences(self, seal: Seal, frozen: FrozenPhase) -> list[str]:
        """Return why the key differs from that of the last sealed one, in the user's own words."""
        old, new = seal.content["material"], frozen.material
        reasons = []
        if old.get("uses") != new["uses"]:
            reasons.append(f"uses {old.get('uses')} → {new['uses']}")
        read = self._inputs_of(seal, frozen.name), frozen.inputs
        reasons += changed_settings(frozen.name, old.get("settings", {}), new["settings"], read)
        if old.get("array") != new["array"]:
            reasons.append(f"{frozen.name}.array {old.get('array')} → {new['array']}")
        for name in sorted(old.get("upstream", {}).keys() | new["upstream"].keys()):
            if old.get("upstream", {}).get(name) != new["upstream"].get(name):
                reasons.append(f"because of {name}")
        before, now = old.get("modules", {}), new.get("modules", {})
        reasons += [
            f"code of {name} changed" if name in before else f"the code of {name} is part of the key now"
            for name in now
            if before.get(name) != now[name]
        ]
        if old.get("code") != new.get("code"):
            files = self._code_changes(seal, frozen.name)
            reasons.append(f"code changed: {', '.join(files[:SHOWN])}{' …' if len(files) > SHOWN else ''}")
        if old.get("image") != new.get("image"):
            reasons.append(f"image {_image(seal.content.get('image'))} → {_image(frozen.image)}")
        return reasons or ["its key differs from the last sealed one"]

    def _inputs_of(self, seal: Seal, name: str) -> dict[str, str]:
        """Return the files that a sealed phase read, by the plan of its submission; {} where that is not there."""
        try:
            phase = self.run.frozen(seal.content["submission"]).get(name)
        except (OSError, UserMistake):
            return {}
        return phase.inputs if phase is not None and phase.key == seal.content["key"] else {}

    def _code_changes(self, seal: Seal, name: str) -> list[str]:
        """Return the files of a phase's code that changed since the submission that sealed it."""
        phase = self.pipeline.phases[name]
        sealed_code = self.run.code_folder(seal.content["submission"])
        return code_changes(
            sealed_code=sealed_code, uses=phase.uses, config=phase.config, code=self.code, digests=self.digests
        )


_ENDS = {"failed": "failed", "mistake": "failed", "stopped": "was stopped"}  # an outcome's state, in words


def attempted(run: RunFolder, frozen: FrozenPhase, before: str = "") -> list[str]:
    """Return how the newest attempt at an unsealed phase ended (`before` begins the line), and which of its settings
    have changed since; nothing where there was none."""
    ledger = Ledger(run.ledger)
    newest = next((entry for entry in reversed(ledger.jobs()) if entry.phase == frozen.name), None)
    if newest is None:
        return []
    number = newest.submission
    outcomes = run.outcomes(frozen.name, number, None if frozen.elements <= ASKED else newest.elements[0])
    ended = next((outcome for outcome in reversed(outcomes) if outcome.state in _ENDS), None)
    cancelled = {job for event in ledger.events() if event["event"] == "cancel" for job in event["jobs"]}
    if ended is not None:
        message = " ".join(ended.message.split())
        said = f"{_ENDS[ended.state]} ({message[:LONGEST]}{' …' * (len(message) > LONGEST)})"
    else:
        said = "was cancelled" if newest.job in cancelled else "has not said how it ended"
    try:
        then = run.frozen(number).get(frozen.name)
    except (OSError, UserMistake):
        then = None
    changed = []
    if then is not None and then.key != frozen.key:
        old, new = then.material.get("settings", {}), frozen.material["settings"]
        changed = changed_settings(frozen.name, old, new, (then.inputs, frozen.inputs))
    more = [f"and {len(changed) - SHOWN} more settings"] if len(changed) > SHOWN else []
    return [f"{before}attempt {number} {said}", *changed[:SHOWN], *more]


Inputs = Mapping[str, str]  # external file or folder -> SHA-256


def changed_settings(
    phase: str, old: dict[str, Any], new: dict[str, Any], files: tuple[Inputs, Inputs] = ({}, {})
) -> list[str]:
    """Return one line a setting of a phase that differs between two keys' materials, in the user's own words.

    In a key an input stands as the digests of its content; `files`, the inputs before and now, tell which file that is.
    """
    before, now = _flatten(old), _flatten(new)
    lines = []
    for key in sorted(before.keys() | now.keys()):
        was, is_ = before.get(key), now.get(key)
        if was != is_:
            told = _changed_files(was, is_, files) if _are_digests(was) and _are_digests(is_) else ""
            lines.append(f"{phase}.with.{key}{told or f' {_show(was)} → {_show(is_)}'}")
    return lines


def _are_digests(value: Any) -> bool:
    """Return whether a value of a key's material is an input's: digests, or what stands for what is not here."""
    if not isinstance(value, list):
        return value is None or value == ""
    return all(isinstance(each, str) for each in value)


def _read_of(digests: Any, files: Inputs) -> dict[str, str] | None:
    """Return the files that have these digests; None where one of them is no file's."""
    wanted = set(digests or ())
    found = {path: digest for path, digest in files.items() if digest in wanted}
    return found if set(found.values()) == wanted else None


def _changed_files(was: Any, now: Any, files: tuple[Inputs, Inputs]) -> str:
    """Return which files of an input changed, came or went; "" where that is not known."""
    old, new = (_read_of(digests, known) for digests, known in zip((was, now), files))
    if old is None or new is None or not (old or new):
        return ""
    said = []
    for words, paths in (
        ("changed", [path for path in new if path in old and new[path] != old[path]]),
        ("is new", [path for path in new if path not in old]),
        ("is left out", [path for path in old if path not in new]),
    ):
        more = f" (and {len(paths) - SHOWN} more)" if len(paths) > SHOWN else ""
        said += [f"{', '.join(paths[:SHOWN])}{more} {words}"] if paths else []
    return f": {'; '.join(said) or 'the files are in another order'}"


def _image(image: dict[str, str] | None) -> str:
    """Return an image's name with the beginning of its digest, where it has one; "none" for no container."""
    if not image:
        return "none"
    return f"{image['name']} ({image['sha256'][:12]})" if "sha256" in image else image["name"]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: value} of nested settings."""
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= _flatten(item, f"{prefix}{key}.")
    return out


def _show(value: Any) -> str:
    """Return a value as text of at most 40 characters."""
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "…"
