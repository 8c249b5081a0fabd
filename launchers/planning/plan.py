"""What would run, what is reused, and why: a pure look at pipeline, run folder and cluster; writes nothing.

reuse   the key is sealed in this run, upstream digests agree
run     never sealed here (or some elements are missing)
rerun   sealed before under other settings, inputs or upstream results; the reasons say which
skip    not sealed and not needed: it follows the failure of a phase that is sealed
"""

import dataclasses
import os
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.mistake import Problem, UserMistake, nearest
from jobs.artifacts import standing
from jobs.artifacts.artifact import HashCache, Seal, content_digest, key_of
from jobs.artifacts.run_folder import FrozenPhase, RunFolder, path_problem
from jobs.kind import Placement, inputs, keyed_settings, user_code, user_modules
from jobs.schema.pipeline import DEFAULT_ROLE, NEED_SEALS, Phase, Pipeline, references, substitute
from launchers.planning.chain import links_needed
from launchers.planning.ledger import Ledger
from launchers.planning.snapshot import code_changes, code_digests, code_of, find_code, users_code_digest
from slurm.detect import Cluster, can_requeue
from slurm.options import own_setting_problems
from slurm.printed import ENDED_STATES, SubmitLimit, format_minutes
from slurm.profile.check import check as check_request
from slurm.profile.check import contact_note, forwarding_notes, forwarding_problems
from slurm.profile.resolve import resolve as resolve_request
from slurm.profile.schema import Request, Resources

RUNS = ("run", "rerun")
REASONS = 3  # seals of one phase that do not stand: so many are named
MATERIAL_FORMAT = 1  # raised when the meaning of a key changes


@dataclass
class PlannedPhase:
    frozen: FrozenPhase
    resources: Resources
    role: str
    action: str  # reuse, run, rerun, skip
    reasons: list[str] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)  # elements to run
    anew: list[int] = field(default_factory=list)  # of those, the ones that may be sealed with other results
    code_changed: list[str] = field(default_factory=list)
    survey: standing.Survey = field(default_factory=standing.Survey)  # what of it stands
    conditional: bool = False  # may turn out not to be needed, and its job has to go then

    @property
    def name(self) -> str:
        return self.frozen.name


@dataclass
class Plan:
    pipeline: Pipeline
    run: RunFolder
    cluster: Cluster
    phases: list[PlannedPhase]
    verified: bool = False  # whether every sealed file was hashed
    again: str = ""  # a phase that runs anew though it is sealed

    @property
    def to_run(self) -> list[PlannedPhase]:
        return [phase for phase in self.phases if phase.action in RUNS]

    @property
    def notes(self) -> list[str]:
        """What leaves the submitter's environment: names, and a warning for what is called a secret there."""
        return forwarding_notes(self.cluster.profile, os.environ)

    def as_json(self) -> dict[str, Any]:
        return {
            "notes": self.notes,
            "pipeline": self.pipeline.name,
            "run": str(self.run.path),
            "cluster": self.cluster.name,
            "profile": self.cluster.as_json(),
            "phases": [
                {
                    "phase": p.name,
                    "uses": p.frozen.uses,
                    "key": p.frozen.key,
                    "action": p.action,
                    "reasons": p.reasons,
                    "elements": p.frozen.elements,
                    "missing": p.missing,
                    "links": p.frozen.links,
                    "role": p.role,
                    "resources": dataclasses.asdict(p.resources),
                    "code_changed": p.code_changed,
                }
                for p in self.phases
            ],
        }


def default_run_folder(pipeline: Pipeline, run: Path | None) -> RunFolder:
    return RunFolder((run or Path("runs") / pipeline.name).absolute())


def make_plan(pipeline: Pipeline, run: RunFolder, cluster: Cluster, verify: bool = False, again: str = "") -> Plan:
    """The plan of a pipeline on a cluster; the phase `again` runs whatever is sealed of it.

    Raises:
        UserMistake: every violated rule of phases, profile and inputs at once, and sealed files that were altered.
    """
    if problem := path_problem(run.path, cluster.kind == "slurm"):
        raise UserMistake(problem)
    return _Planner(pipeline, run, cluster, verify, again).plan()


@dataclass
class ParallelReport:
    """What one phase's parallel plan costs, and what of the phase `plan` refuses."""

    phase: str
    facts: dict[str, Any]
    tables: list[dict[str, Any]]
    notes: list[str]
    problems: list[Problem]


def report_parallel(pipeline: Pipeline, run: RunFolder, cluster: Cluster, name: str, searching: bool) -> ParallelReport:
    """Memory, rank grid, predicted step and other plans of the phase `name`; refused or not.

    Raises:
        UserMistake: no such phase, or one that has no parallel plan.
    """
    phase = pipeline.phases.get(name)
    if phase is None:
        raise UserMistake(f"{pipeline.source} has no phase {name!r}{nearest(name, list(pipeline.phases))}")
    planner = _Planner(pipeline, run, cluster, verify=False)
    planner.survey()
    report = phase.kind.parallel_report(*planner.checked[name], searching)
    if report is None:
        raise UserMistake(f"phase {name} uses {phase.uses}, which has no parallel plan; training phases have")
    place = f"{pipeline.source}: phases.{name}."
    return ParallelReport(name, **report, problems=[p for p in planner.problems if p.where.startswith(place)])


class _Planner:
    def __init__(self, pipeline: Pipeline, run: RunFolder, cluster: Cluster, verify: bool, again: str = ""):
        self.pipeline, self.run, self.cluster, self.verify, self.again = pipeline, run, cluster, verify, again
        self.cache = HashCache()
        self.problems: list[Problem] = []
        self.found = find_code(root for p in pipeline.phases.values() for root in user_code(p.uses, p.config))
        self.code = code_digests(self.found)
        self.planned: dict[str, PlannedPhase] = {}
        self.seals: dict[str, Seal] = {}
        self.checked: dict[str, tuple[Any, Placement]] = {}
        self.forecasts: dict[str, dict[str, Any]] = {}

    def survey(self) -> None:
        for phase in self.pipeline.phases.values():
            self.planned[phase.name] = self._phase(phase)

    def plan(self) -> Plan:
        if other := Ledger(self.run.ledger).other_cluster(self.pipeline.cluster, self.cluster.slurm_name):
            raise UserMistake(other)
        profile = self.cluster.profile
        self.problems += own_setting_problems(profile, self.cluster.profile_file or profile.meta.name)
        self.survey()
        self._batch()
        self._fit_submit_limit()
        self.problems += forwarding_problems(self.cluster.profile, os.environ)
        if self.problems:
            raise UserMistake(self.problems)
        return Plan(self.pipeline, self.run, self.cluster, list(self.planned.values()), self.verify, self.again)

    def _phase(self, phase: Phase) -> PlannedPhase:
        digests, files = self._inputs(phase)
        frozen = self._frozen(phase, digests, files)
        resources = self._resources(phase, frozen)
        self._check(phase, frozen, resources)
        self._check_partners(phase, frozen)
        frozen.ranks_per_node, frozen.nodes = resources.ranks_per_node, resources.nodes
        frozen.gpus_per_node = resources.gpus_per_node
        frozen.links = self._links(phase, frozen, resources)
        planned = PlannedPhase(frozen, resources, phase.resources.role, "run")
        self._decide(planned)
        return planned

    def _links(self, phase: Phase, frozen: FrozenPhase, resources: Resources) -> int:
        """Links of a phase that can stop and go on, where its job may not be requeued; 0: no chain.

        An array's elements are no chains: one that was stopped is sent again by the next submit.
        """
        if self.cluster.kind != "slurm" or not phase.kind.can_stop or not resources.time_minutes:
            return 0
        link_s = 60 * resources.time_minutes - self.cluster.profile.signal_lead_s
        if link_s <= 0:
            self._problem(
                phase,
                "resources.time",
                f"{format_minutes(resources.time_minutes)} is over before the signal to stop, "
                f"which comes {self.cluster.profile.signal_lead_s} s before the limit (the profile's "
                "signal_lead_s); ask for at least "
                f"{format_minutes(self.cluster.profile.signal_lead_s // 60 + 1)}",
            )
        if phase.array is not None or can_requeue(self.cluster, resources.partition):
            return 0
        return links_needed(frozen, self.run.outcomes(phase.name), link_s)

    def _batch(self) -> None:
        """Elements per array task where a phase has more elements than an array may have; aftercorr partners share it."""
        limit = self.cluster.profile.max_array_size
        if self.cluster.kind != "slurm" or not limit:
            return
        for planned in self.planned.values():
            planned.frozen.batch = -(-planned.frozen.elements // limit)
        pairs = [
            (planned.frozen, self.planned[name].frozen)
            for planned in self.planned.values()
            for name, type_ in planned.frozen.needs.items()
            if type_ == "aftercorr"
        ]
        for _ in pairs:  # as often as the longest chain of partners could need
            for one, other in pairs:
                one.batch = other.batch = max(one.batch, other.batch)

    def _fit_submit_limit(self) -> None:
        """More elements a task where the user may not have all tasks of the pipeline in the queue at once."""
        runs = [planned for planned in self.planned.values() if planned.action in RUNS]
        if self.cluster.kind != "slurm" or not runs:
            return
        limit = self._submit_limit({planned.resources.qos or "" for planned in runs})
        if limit is None:
            return
        mine = {entry.job for entry in Ledger(self.run.ledger).own_jobs()}
        others = sum(
            row.state not in ENDED_STATES
            for row in self.cluster.slurm.queue()
            if (row.array_job_id or row.job_id) not in mine
        )

        def tasks(factor: int) -> int:
            return sum(
                planned.frozen.links or len({i // max(planned.frozen.batch, factor) for i in planned.missing})
                for planned in runs
            )

        factors = range(1, max(planned.frozen.elements for planned in runs) + 1)
        found = bisect_left(factors, True, key=lambda factor: tasks(factor) <= limit.jobs - others)
        if found == len(factors):
            self.problems.append(
                Problem(
                    "",
                    f"these {len(runs)} phases are {tasks(factors[-1])} jobs at the least, "
                    f"and {limit.of} allows {limit.jobs} in the queue, array elements counted, of which "
                    f"{others} are other jobs of yours; wait for those to end, or submit fewer phases at "
                    f"once{contact_note(self.cluster.profile)}",
                )
            )
            return
        for planned in runs:
            if planned.frozen.array is not None:
                planned.frozen.batch = max(planned.frozen.batch, factors[found])

    def _submit_limit(self, qos: set[str]) -> SubmitLimit | None:
        said = self.cluster.profile.max_submit_jobs
        if said is not None:
            return SubmitLimit(said, f"profile {self.cluster.profile.meta.name} (max_submit_jobs)")
        return self.cluster.slurm.submit_limit(qos)

    def _inputs(self, phase: Phase) -> tuple[dict[str, list[str]], dict[str, str]]:
        """External inputs: ({config key: digests in order}, {absolute path: digest}); missing ones are problems."""
        digests: dict[str, list[str]] = {}
        files: dict[str, str] = {}
        for key, entry, kind in inputs(phase.kind.config, phase.config):
            if references(entry):
                digests.setdefault(key, []).append(str(entry))  # the upstream's key stands for it
                continue
            path = Path(entry).expanduser().absolute()
            if path.exists():
                files[str(path)] = content_digest(path, self.cache)
                digests.setdefault(key, []).append(files[str(path)])
            elif kind == "hub" and is_hub_name(str(entry)):
                digests.setdefault(key, []).append(f"hub:{entry}")
            else:
                what = (
                    "no such file or folder, and not a hub name (org/name)"
                    if kind == "hub"
                    else "no such file or folder"
                )
                self._problem(phase, f"with.{key}", f"{entry!r}: {what} (looked for {path})")
        return digests, files

    def _frozen(self, phase: Phase, digests: dict[str, list[str]], files: dict[str, str]) -> FrozenPhase:
        settings = keyed_settings(phase.kind.config, phase.config)
        for key, values in digests.items():
            _write_dotted(settings, key, values)
        material = {
            "format": MATERIAL_FORMAT,
            "uses": phase.uses,
            "settings": settings,
            "array": phase.array,
            "upstream": {
                need.phase: self.planned[need.phase].frozen.key for need in phase.needs if need.type != "singleton"
            },
        }
        if modules := user_modules(phase.config):  # what scores is part of the result; keys without it are as ever
            material["modules"] = {module: users_code_digest(module, self.found, self.code) for module in modules}
        if self.pipeline.on_code_change == "rerun":
            code = {name: self.code[name] for name in code_of(phase.uses, phase.config, self.found.files)}
            material["code"] = durable.sha256_bytes(durable.canonical_json(code))
        return FrozenPhase(
            name=phase.name,
            uses=phase.uses,
            key=key_of(material),
            material=material,
            settings=_absolute_inputs(phase, phase.settings),
            array=phase.array,
            elements=phase.elements,
            fans_in=phase.kind.can_split,
            needs={need.phase: need.type for need in phase.needs},
            inputs=files,
            ranks_per_node=1,
            nodes=1,
            gpus_per_node=0,
            throttle=phase.throttle,
        )

    def _resources(self, phase: Phase, frozen: FrozenPhase) -> Resources:
        where = f"{self.pipeline.source}: phases.{phase.name}.resources"
        problems = check_request(self.cluster.profile, phase.resources, where)
        self.problems += problems
        return resolve_request(self.cluster.profile, Request(DEFAULT_ROLE) if problems else phase.resources)

    def _check(self, phase: Phase, frozen: FrozenPhase, resources: Resources) -> None:
        """The phase's own rules, on a config whose references read as the upstream's folder (sealed or to come)."""
        folders = {}
        for name in frozen.needs:
            seal = self.seals.get(name)
            up = self.planned[name].frozen
            folders[name] = str(seal.folder if seal else self.run.artifact(up).folder)
        config = substitute(phase.config, folders)
        placement = Placement(
            ranks=resources.ranks_per_node * resources.nodes,
            nodes=resources.nodes,
            gpus_per_node=resources.gpus_per_node,
            gpu=resources.gpu or "",
            gpu_mem_gib=resources.gpu_mem_gib,
            environment=self.cluster.profile.env.set,
            elements=phase.elements,
            forecasts={folder: self.forecasts[name] for name, folder in folders.items()},
        )
        for problem in phase.kind.check(config, placement):
            self._problem(phase, f"with.{problem.where}" if problem.where else "with", problem.message)
        self.checked[phase.name] = config, placement
        self.forecasts[phase.name] = phase.kind.forecast(config, placement)

    def _check_partners(self, phase: Phase, frozen: FrozenPhase) -> None:
        for name in standing.partners(frozen, {name: before.frozen for name, before in self.planned.items()}):
            if frozen.elements > (others := self.planned[name].frozen.elements):
                self._problem(
                    phase,
                    f"needs.{name}",
                    f"aftercorr has each element follow its partner, and {phase.name} "
                    f"has {frozen.elements} elements, {name} {others}: say afterok, or give both as many",
                )

    def _decide(self, planned: PlannedPhase) -> None:
        frozen = planned.frozen
        if frozen.name == self.again:
            planned.action, planned.reasons = "rerun", ["asked for anew"]
            planned.missing = planned.anew = list(range(frozen.elements))
            return
        survey = planned.survey = self._what_stands(frozen)
        # A result that is to be sealed anew may turn out the same: its element then finds its seal good, and ends.
        affected = {name: elements for name in frozen.needs if (elements := self._affected(frozen, name))}
        again = {i for elements in affected.values() for i in elements}
        stands = survey.parts if frozen.fans_in else [0] if survey.whole else []
        planned.anew = [i for i in range(frozen.elements) if i in again or i not in stands]
        planned.missing = planned.anew or survey.missing(frozen)
        planned.conditional = any(
            type_ == "afternotok" or (type_ in NEED_SEALS and self.planned[name].conditional)
            for name, type_ in frozen.needs.items()
        )
        if survey.whole is None and not survey.fallen and planned.conditional:
            phases = {name: before.frozen for name, before in self.planned.items()} | {frozen.name: frozen}
            if why := self.run.not_needed(phases, frozen.name):
                planned.action, planned.reasons = "skip", [f"not needed: {why}"]
                return
        if survey.whole is not None and not planned.missing:
            planned.action = "reuse"
            planned.reasons = ["sealed, same key and upstream"]
            if not all(seal.has_sum for seal in (survey.whole, *survey.parts.values())):
                planned.reasons.append("no sum: written before")
            planned.code_changed = self._code_changes(survey.whole, frozen.name)
            self.seals[frozen.name] = survey.whole
        elif survey.whole is not None:
            planned.action = "rerun"
            planned.reasons = [f"because of {name}, which runs again" for name in affected]
        elif survey.reasons:
            planned.action = "rerun"
            planned.reasons = survey.reasons[:REASONS]
            if len(survey.reasons) > REASONS:
                planned.reasons.append(f"and {len(survey.reasons) - REASONS} more")
        else:
            self._decide_unsealed(planned)

    def _decide_unsealed(self, planned: PlannedPhase) -> None:
        frozen, survey = planned.frozen, planned.survey
        before = self.run.seals(frozen.name)
        if before:
            planned.action = "rerun"
            planned.reasons = self._differences(before[-1], frozen)
        elif survey.parts:
            planned.reasons = [f"{len(survey.parts)} of {frozen.elements} elements are sealed"]
        elif any((self.run.artifact(frozen).folder / "checkpoints").glob("step_*")):
            planned.reasons = ["not sealed yet; goes on from its newest checkpoint"]
        else:
            planned.reasons = ["never ran in this run"]

    def _what_stands(self, frozen: FrozenPhase) -> standing.Survey:
        phases = {name: before.frozen for name, before in self.planned.items()}
        paired = standing.partners(frozen, phases)
        now = {
            name: self.seals[name].digest
            for name, type_ in frozen.needs.items()
            if type_ in standing.COMPARED and name in self.seals and name not in paired
        }
        partners = {name: self.planned[name].survey.parts for name in paired}
        surveyor = standing.Surveyor(self.verify, self.cache)
        return surveyor.survey(self.run.artifact(frozen), frozen, now, partners)

    def _affected(self, frozen: FrozenPhase, name: str) -> list[int]:
        """Return the elements that may find other results in `name` than before once this plan has run."""
        upstream, type_ = self.planned[name], frozen.needs[name]
        if type_ not in standing.COMPARED or upstream.action not in RUNS:
            return []
        if type_ == "aftercorr" and upstream.frozen.fans_in:
            return [i for i in upstream.anew if i < frozen.elements]
        return list(range(frozen.elements))

    def _differences(self, seal: Seal, frozen: FrozenPhase) -> list[str]:
        """Why the key differs from that of the last sealed one, in the user's own words."""
        old, new = seal.content["material"], frozen.material
        reasons = []
        if old.get("uses") != new["uses"]:
            reasons.append(f"uses {old.get('uses')} → {new['uses']}")
        reasons += changed_settings(frozen.name, old.get("settings", {}), new["settings"])
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
            reasons.append(f"code changed: {', '.join(files[:3])}{' …' if len(files) > 3 else ''}")
        return reasons or ["its key differs from the last sealed one"]

    def _code_changes(self, seal: Seal, name: str) -> list[str]:
        phase = self.pipeline.phases[name]
        sealed_by = self.run.submission_folder(seal.content["submission"])
        return code_changes(sealed_by, phase.uses, phase.config, self.found, self.code)

    def _problem(self, phase: Phase, key: str, message: str) -> None:
        self.problems.append(Problem(f"{self.pipeline.source}: phases.{phase.name}.{key}", message))


def changed_settings(phase: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return one line a setting of a phase that differs between two keys' materials, in the user's own words."""
    before, now = _flatten(old), _flatten(new)
    return [
        f"{phase}.with.{key} {_show(before.get(key))} → {_show(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def is_hub_name(text: str) -> bool:
    """org/name, without the look of a path."""
    parts = text.split("/")
    return len(parts) == 2 and all(parts) and not text.startswith((".", "~", "/"))


def _absolute_inputs(phase: Phase, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the existing paths of input fields absolute: the worker runs in another folder."""
    fields = {key for key, _, _ in inputs(phase.kind.config, phase.config)}

    def absolute(entry: Any) -> Any:
        path = Path(str(entry)).expanduser()
        return str(path.absolute()) if not references(entry) and path.exists() else entry

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: walk(item, f"{key}.{name}" if key else name) for name, item in value.items()}
        if key not in fields or not value:
            return value
        return [absolute(entry) for entry in value] if isinstance(value, list) else absolute(value)

    return walk(settings, "")


def _write_dotted(settings: dict[str, Any], key: str, value: Any) -> None:
    """Write a value where its dotted key says; names of entries may hold dots, too."""
    for name, below in settings.items():
        if isinstance(below, dict) and key.startswith(f"{name}."):
            return _write_dotted(below, key[len(name) + 1 :], value)
    settings[key] = value


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= _flatten(item, f"{prefix}{key}.")
    return out


def _show(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "…"
