"""Makes a plan: a pure look at pipeline, run folder and cluster, which writes nothing.

Of each phase its inputs are read, its key made and its own rules checked; reasons.py then says whether it runs, and
limits.py what the cluster would refuse. All problems are collected and raised together.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from data_tools.base import durable
from data_tools.base.inside import expanded
from data_tools.mistake import Problem, UserMistake, nearest
from data_tools.records.hub import is_hub_name
from data_tools.records.inputs import matching
from jobs.artifacts import standing
from jobs.artifacts.hash_cache import HashCache
from jobs.artifacts.keys import content_digest, key_of
from jobs.artifacts.run_folder import FrozenPhase, RunFolder, path_problem
from jobs.artifacts.seal import Seal
from jobs.kind import (
    Placement,
    inputs,
    keyed_settings,
    kind_names,
    shares_of_parts,
    user_code,
    user_modules,
    wrong_makers,
)
from jobs.schema.pipeline import Phase, Pipeline
from jobs.schema.references import references, substitute
from launchers.planning import held, limits, rehearsal
from launchers.planning.hours import over_budget, planned_seconds
from launchers.planning.ledger import Ledger
from launchers.planning.plan import RUNS, Plan, PlannedPhase
from launchers.planning.preflight import Job, preflight
from launchers.planning.reasons import Reasoner
from launchers.planning.snapshot import code_digests, code_of, find_code, users_code_digest
from slurm import exported
from slurm.checks import by_check, sort_out, waiver_problems
from slurm.detect import Cluster
from slurm.options import own_setting_problems
from slurm.profile.check import forwarding_problems, kept_secret, unreachable_secrets
from slurm.profile.environments import environment_of, environments, python_here, why_not_shared
from slurm.profile.images import COMMA_PARTS_MOUNTS, image_of, unseen
from slurm.profile.schema import Mail, Profile, Resources

MATERIAL_FORMAT = 1  # raised when the meaning of a key changes


def default_run_folder(pipeline: Pipeline, run: Path | None) -> RunFolder:
    """Return the folder `run`, or runs/NAME of the pipeline where none is given; runs/NAME.rehearsal of a rehearsal."""
    name = f"{pipeline.name}.rehearsal" if pipeline.rehearsed else pipeline.name
    return RunFolder((run or Path("runs") / name).absolute())


def make_plan(
    pipeline: Pipeline,
    run: RunFolder,
    cluster: Cluster,
    verify: bool = False,
    again: str = "",
    budget: float | None = None,
) -> Plan:
    """Return the plan of a pipeline on a cluster; the phase `again` runs whatever is sealed of it.

    With `verify` every sealed file is hashed, not only compared by size and time. `budget` are GPU-hours.

    Raises:
        UserMistake: every violated rule of phases, profile and inputs at once, and sealed files that were altered.
    """
    if problem := path_problem(run.path, cluster.kind == "slurm"):
        raise UserMistake(Problem("", problem, "F003"))
    return _Planner(pipeline=pipeline, run=run, cluster=cluster, verify=verify, again=again).plan(budget)


class ParallelTable(TypedDict):
    """A table of a parallel plan, to be printed."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


@dataclass
class ParallelReport:
    """What one phase's parallel plan costs, and what of the phase `plan` refuses."""

    phase: str
    facts: dict[str, Any]  # for --json; which they are, the phase's kind says
    tables: list[ParallelTable]
    notes: list[str]
    problems: list[Problem]


def report_parallel(pipeline: Pipeline, run: RunFolder, cluster: Cluster, name: str, searching: bool) -> ParallelReport:
    """Return memory, rank grid, predicted step and other plans of the phase `name`, whether it is refused or not.

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
    """Plans the phases of a pipeline, each after those it needs, and collects the problems."""

    def __init__(self, pipeline: Pipeline, run: RunFolder, cluster: Cluster, verify: bool, again: str = ""):
        self.pipeline, self.run, self.cluster, self.verify, self.again = pipeline, run, cluster, verify, again
        self.cache = HashCache()
        self.problems: list[Problem] = []
        self.code = find_code(root for p in pipeline.phases.values() for root in user_code(p.uses, p.config))
        self.digests = code_digests(self.code)
        self.planned: dict[str, PlannedPhase] = {}
        self.seals: dict[str, Seal] = {}  # of the phases that are reused
        self.checked: dict[str, tuple[Any, Placement]] = {}  # phase -> (its Config, where it runs), as it was checked
        self.forecasts: dict[str, dict[str, Any]] = {}  # phase -> what its folder will hold
        self.datasets: dict[str, list[str]] = {}  # phase -> what it reads of the hub's cache
        self.costs: dict[str, dict[str, float]] = {}  # phase -> what is known of time and disk (jobs/kind.py)
        self.fits: dict[str, bool] = {}  # phase -> whether its profile has the resources that it asks for
        self.remarks: list[str] = []
        self.not_asked: list[str] = []
        self.reasoner = Reasoner(
            pipeline=pipeline,
            run=run,
            code=self.code,
            digests=self.digests,
            planned=self.planned,
            seals=self.seals,
            surveyor=standing.Surveyor(verify, self.cache),
            again=again,
        )

    def survey(self) -> None:
        """Plan each phase for itself."""
        for phase in self.pipeline.phases.values():
            self.planned[phase.name] = self._phase(phase)
        needed = {need for planned in self.planned.values() for need in planned.frozen.needs}
        for planned in self.planned.values():
            planned.last = planned.name not in needed

    def plan(self, budget: float | None) -> Plan:
        """Return the plan. Raises UserMistake with all problems."""
        if other := Ledger(self.run.ledger).other_cluster(self.pipeline.cluster, self.cluster.slurm_name):
            raise UserMistake(other)
        if other := rehearsal.why_not_mixed(self.pipeline, self.run):
            raise UserMistake(other)
        self.remarks += rehearsal.remarks(self.pipeline) + held.remarks(self.pipeline, self.run)
        if left_out := self.pipeline.left_out:
            self.remarks.append(f"left out, since `when` is false: {', '.join(left_out)}")
        if self.cluster.kind == "local" and self.cluster.profile.mail != Mail():
            self.remarks.append("mail: Slurm sends it, and local processes have no Slurm: none is sent")
        profile = self.cluster.profile
        file = self.cluster.profile_file or profile.meta.name
        self.problems += by_check("A001", [*own_setting_problems(profile, file), *_unknown_kinds(profile, file)])
        if not self.cluster.unasked and (why := why_not_shared(profile, self.run.path)):
            self.problems.append(Problem("", why, "F003"))
        self.survey()
        limits.share_array_tasks(self.cluster, self.planned)
        self.problems += limits.fit_submit_limit(self.cluster, self.run, self.planned.values())
        limits.fit_array_text(self.cluster, self.planned)
        forwarded = {name for _, env in environments(profile) for name in env.forward}
        typed = os.environ.get(exported.VARIABLE, "")
        given = exported.unknown(typed, self.pipeline.declared, forwarded)
        given += kept_secret(profile, self.pipeline.declared, f"{self.pipeline.source}: variables")
        self.problems += by_check("E002", [*forwarding_problems(profile, os.environ), *given])
        report = preflight(self.cluster, self.run, [self._job(name) for name in self.planned], self.costs)
        hours = {name: planned.gpu_hours for name, planned in self.planned.items() if planned.action in RUNS}
        found = [*self.problems, *report.problems, *over_budget(hours, budget)]
        refused, waived, told = sort_out(found, {*self.pipeline.waive, *profile.waive})
        if refused := [*self._waivers(file), *refused]:
            raise UserMistake(refused)
        return Plan(
            told=told,
            waived=waived,
            not_asked=report.not_asked + self.not_asked,
            pipeline=self.pipeline,
            run=self.run,
            cluster=self.cluster,
            phases=list(self.planned.values()),
            verified=self.verify,
            again=self.again,
            budget=budget,
            remarks=self.remarks,
        )

    def _waivers(self, file: str) -> list[Problem]:
        """Return what is wrong with the ids that pipeline, command line and profile (`file`) waive."""
        profile, policy = self.cluster.profile, self.cluster.profile.policy
        return [
            *waiver_problems(self.pipeline.waive, "waive", policy.unwaivable, policy.reason),
            *waiver_problems(profile.waive, f"{file}: waive", policy.unwaivable, policy.reason),
        ]

    def _job(self, name: str) -> Job:
        """Return a phase as preflight sees it."""
        phase = self.pipeline.phases[name]
        where = f"{self.pipeline.source}: phases.{name}.resources"
        return Job(phase, self.planned[name], where, fits=self.fits[name], datasets=self.datasets[name])

    def _phase(self, phase: Phase) -> PlannedPhase:
        where = f"{self.pipeline.source}: phases.{phase.name}.resources"
        resources, problems = limits.resources_of(self.cluster.profile, phase, where)
        self.problems += problems
        self.fits[phase.name] = not problems
        image = self._image(phase, resources.role)
        frozen = self._frozen(phase, image)
        self._check(phase, frozen, resources)
        self._check_partners(phase, frozen)
        secrets = phase.kind.secrets(self.checked[phase.name][0])
        if image:
            self._check_container(phase, resources.role, frozen, secrets)
        if why := limits.why_time_is_too_short(self.cluster, phase, resources):
            self._problem(phase, "resources.time", why, "S002")
        frozen.ranks_per_node, frozen.nodes = resources.ranks_per_node, resources.nodes
        frozen.gpus_per_node, frozen.role = resources.gpus_per_node, resources.role
        frozen.rehearsal = rehearsal.of_phase(self.pipeline, phase, resources, self.costs[phase.name])
        frozen.links = limits.links_of(
            cluster=self.cluster, run=self.run, phase=phase, frozen=frozen, resources=resources
        )
        planned = PlannedPhase(frozen, resources, phase.resources.role, "run")
        planned.planned_s, planned.planned_by = planned_seconds(self.run, frozen, self.costs[phase.name])
        self.reasoner.decide(planned)
        if planned.action in RUNS:
            for why in unreachable_secrets(self.cluster.profile, resources.role, secrets, os.environ):
                self._problem(phase, "with", why, "E002")
        return planned

    def _image(self, phase: Phase, role: str) -> dict[str, str]:
        """Return a role's image with the digest of its file or folder, {} for none.

        Of what only a registry has there is no digest: the name, best one with a digest, is all that is known.
        """
        name = image_of(self.cluster.profile, role)
        if not name:
            return {}
        path = Path(name)
        if path.is_absolute() and not path.exists():
            self.remarks.append(
                f"{phase.name}: its image {name} is not seen from here; its seal will have the name alone"
            )
        if not path.is_absolute() or not path.exists():
            return {"name": name}
        return {"name": name, "sha256": content_digest(path, self.cache, follow=False)}

    def _check_container(self, phase: Phase, role: str, frozen: FrozenPhase, own: dict[str, str]) -> None:
        """Refuse inputs and files of secrets that the container of a phase does not see, and a run it cannot mount."""
        profile, remedy = self.cluster.profile, "add it to the profile's container.mounts, under the same name"
        kept = (own | environment_of(profile, role).secrets).values()
        secrets = [str(expanded(text[5:])) for text in kept if text.startswith("file:")]
        for key, paths in (("with", list(frozen.inputs)), ("resources.role", secrets)):
            what = "the secret's file " if key != "with" else ""
            for hidden in unseen(profile, role, run=self.run.path, paths=paths):
                message = f"{what}{hidden} is not mounted in the container of role {role}; {remedy}"
                self._problem(phase, key, message, "F004")
        if "," in str(self.run.path) and (runtime := profile.container.runtime) in COMMA_PARTS_MOUNTS:
            message = f"its container mounts {self.run.path}, and {runtime} takes what is behind the comma for another"
            self._problem(phase, "resources", f"{message}; choose another folder with --run DIR", "F004")

    def _inputs(self, phase: Phase) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Return the inputs that no phase makes: ({config key: digests in order}, {absolute path: digest}).

        Those that do not exist are problems.
        """
        digests: dict[str, list[str]] = {}
        files: dict[str, str] = {}
        for key, entry, kind in inputs(phase.kind.config, phase.config):
            if references(entry):
                digests.setdefault(key, []).append(str(entry))  # the upstream's key stands for it
                continue
            path = expanded(entry).absolute()
            if path.exists():
                files[str(path)] = content_digest(path, self.cache)
                digests.setdefault(key, []).append(files[str(path)])
            elif found := matching(str(path)):  # as if each stood there
                files |= {str(file): content_digest(file, self.cache) for file in found}
                digests.setdefault(key, []).extend(files[str(file)] for file in found)
            elif kind == "hub" and is_hub_name(str(entry)):
                digests.setdefault(key, []).append(f"hub:{entry}")
            elif self.cluster.unasked:
                self.not_asked.append(f"{phase.name}: what is in {entry}, which this machine has not")
                digests.setdefault(key, []).append(f"unseen:{entry}")
            else:
                or_name = ", and not a hub name (org/name)" if kind == "hub" else ""
                self._problem(
                    phase, f"with.{key}", f"{entry!r}: no such file or folder{or_name} (looked for {path})", "I001"
                )
        return digests, files

    def _frozen(self, phase: Phase, image: dict[str, str]) -> FrozenPhase:
        """Return the phase with its key, as a submission would freeze it; its place on the cluster is not known yet.

        An image is to a phase what code is, an environment that is not meant to change results: it is recorded and a
        change is told, and only `on_code_change: rerun` makes it, as the code, part of the key.
        """
        digests, files = self._inputs(phase)
        settings = keyed_settings(phase.kind.config, phase.config)
        for key, values in digests.items():
            _write_dotted(settings, key, values)
        material: dict[str, Any] = {
            "format": MATERIAL_FORMAT,
            "uses": phase.uses,
            "settings": settings,
            "array": phase.array,
            "upstream": {
                need.phase: self.planned[need.phase].frozen.key for need in phase.needs if need.type != "singleton"
            },
        }
        if modules := user_modules(phase.config):  # what scores is part of the result; keys without it are as ever
            material["modules"] = {module: users_code_digest(module, self.code, self.digests) for module in modules}
        material |= rehearsal.MARK if self.pipeline.rehearsed else {}
        if self.pipeline.on_code_change == "rerun":
            code = {name: self.digests[name] for name in code_of(phase.uses, phase.config, self.code.files)}
            material["code"] = durable.sha256_bytes(durable.canonical_json(code))
            if image:
                material["image"] = image.get("sha256", image["name"])
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
            image=image,
        )

    def _check(self, phase: Phase, frozen: FrozenPhase, resources: Resources) -> None:
        """Check the phase's own rules, on a config whose references read as the upstream's folder, sealed or not."""
        folders = {}
        for name in frozen.needs:
            seal = self.seals.get(name)
            up = self.planned[name].frozen
            folders[name] = str(seal.folder if seal else self.run.artifact(up).folder)
        config = substitute(phase.config, folders)
        paired = standing.partners(frozen, {name: each.frozen for name, each in self.planned.items()})
        placement = Placement(
            ranks=resources.ranks_per_node * resources.nodes,
            nodes=resources.nodes,
            gpus_per_node=resources.gpus_per_node,
            gpu=resources.gpu or "",
            gpu_mem_gib=resources.gpu_mem_gib,
            environment=environment_of(self.cluster.profile, resources.role).set,
            python="" if self.cluster.unasked else python_here(self.cluster.profile, resources.role),
            elements=phase.elements,
            values=tuple(phase.array) if isinstance(phase.array, list) else (),
            partners={folders[name]: self.planned[name].frozen.elements for name in paired},
            forecasts={folder: self.forecasts[name] for name, folder in folders.items()},
        )
        uses = {name: each.uses for name, each in self.pipeline.phases.items()}
        problems = [*wrong_makers(phase.kind, phase.config, uses), *shares_of_parts(phase.kind, phase.config, paired)]
        problems += phase.kind.check(config, placement)
        for problem in problems:
            if self.cluster.unasked and problem.where.endswith(".inputs"):  # files, or the hub's cache, of there
                self.not_asked.append(f"{phase.name}: with.{problem}")
                continue
            self._problem(phase, f"with.{problem.where}" if problem.where else "with", problem.message, "K001")
        self.checked[phase.name] = config, placement
        self.forecasts[phase.name] = phase.kind.forecast(config, placement)
        self.datasets[phase.name] = [] if problems else phase.kind.datasets(config)
        self.costs[phase.name] = {} if problems else phase.kind.costs(config, placement)
        self.remarks += [f"{phase.name}: {remark}" for remark in phase.kind.remarks(config, placement)]

    def _check_partners(self, phase: Phase, frozen: FrozenPhase) -> None:
        """Refuse a phase with more elements than a partner that they are to follow one by one."""
        for name in standing.partners(frozen, {name: before.frozen for name, before in self.planned.items()}):
            if frozen.elements > (others := self.planned[name].frozen.elements):
                self._problem(
                    phase,
                    f"needs.{name}",
                    f"aftercorr has each element follow its partner, and {phase.name} "
                    f"has {frozen.elements} elements, {name} {others}: say afterok, or give both as many",
                    "K002",
                )

    def _problem(self, phase: Phase, key: str, message: str, check: str) -> None:
        """Note a problem of one of a phase's keys in the pipeline file, and the check that found it."""
        self.problems.append(Problem(f"{self.pipeline.source}: phases.{phase.name}.{key}", message, check))


def _unknown_kinds(profile: Profile, file: str) -> list[Problem]:
    """Return a problem for each phase kind of a profile that afterok does not have; a user's own are not looked for."""
    return [
        Problem(f"{file}: phases.{name}", f"no phase kind {name!r}{nearest(name, kind_names())}")
        for name in profile.phases
        if name not in kind_names() and "." not in name
    ]


def _absolute_inputs(phase: Phase, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the existing paths of input fields absolute, since the worker runs in another folder,
    and the files of patterns in their place, since more may match by then."""
    fields = {key for key, _, _ in inputs(phase.kind.config, phase.config)}

    def absolute(entry: Any) -> list[Any]:
        path = expanded(str(entry))
        if references(entry) or not (path.exists() or matching(str(path))):
            return [entry]
        return [str(file.absolute()) for file in ([path] if path.exists() else matching(str(path)))]

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: walk(item, f"{key}.{name}" if key else name) for name, item in value.items()}
        if key not in fields or not value:
            return value
        if isinstance(value, list):
            return [path for entry in value for path in absolute(entry)]
        return absolute(value)[0] if len(absolute(value)) == 1 else value

    return walk(settings, "")


def _write_dotted(settings: dict[str, Any], key: str, value: Any) -> None:
    """Write a value where its dotted key says; names of entries may hold dots, too."""
    for name, below in settings.items():
        if isinstance(below, dict) and key.startswith(f"{name}."):
            return _write_dotted(below, key[len(name) + 1 :], value)
    settings[key] = value
