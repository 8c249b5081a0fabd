"""What a submission has to do: a pure function of the plan and of the jobs that are under way already.

A waiting job keeps its place in the queue: where what it waits on changed, or its settings did, it is rewired. One
whose script would be another now is replaced, since no key holds what it asks Slurm for; one that has begun stays.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from data_tools.base.indices import Indices
from data_tools.mistake import UserMistake
from launchers.backends.contract import request_of
from launchers.planning.plan import Plan, PlannedPhase
from launchers.submission.journal import Journal
from launchers.submission.live import LiveJob
from launchers.submission.steps import Cancel, Rewire, Step, Submit


@dataclass(frozen=True)
class Queue:
    """What is under way of a run, as the back end tells it."""

    live: Mapping[str, LiveJob]  # phase -> its newest job that waits or runs
    differs: Mapping[str, str]  # phase with a live job -> how the job that would be sent of it now differs; "" if not
    can_rewire: bool  # whether a job that waits can be changed


def decide(plan: Plan, queue: Queue, fresh: Mapping[str, Sequence[int]], name_of: Callable[[str], str]) -> Journal:
    """Return the steps that bring a run to its plan.

    Args:
        plan: what is to run.
        queue: what is under way.
        fresh: {phase: elements} that get a new job whatever is under way of them; no elements: the missing ones.
        name_of: gives the new job of a phase a name that no other job has.

    Raises:
        UserMistake: a job is running with other settings, and nobody asked to replace it.
    """
    decider = _Decider(plan, queue, fresh, name_of)
    for planned in plan.to_run:
        decider.decide_phase(planned)
    steps: list[Step] = [*decider.steps, *decider.cancels] if decider.steps else []
    return Journal(steps, decider.kept, decider.not_applied)


@dataclass
class _Decider:
    """Decides phase by phase, each after those it needs; what was decided before tells what a phase waits on."""

    plan: Plan
    queue: Queue
    fresh: Mapping[str, Sequence[int]]
    name_of: Callable[[str], str]
    steps: list[Step] = field(default_factory=list)
    cancels: list[Step] = field(default_factory=list)  # come last, when what replaces them is in the queue
    not_applied: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)  # phase -> its earlier job that dependents wait on
    new: set[str] = field(default_factory=set)  # phases that get a new job
    batches: dict[str, int] = field(default_factory=dict)  # elements per task of the jobs to wait on; 0: they differ

    def decide_phase(self, planned: PlannedPhase) -> None:
        """Keep, rewire, replace or add to what is under way of a phase."""
        name, frozen, live = planned.name, planned.frozen, self.queue.live.get(planned.name)
        if live is not None and name in self.fresh:
            elements = self.fresh[name] or planned.missing
            self._cancel_elements(planned, live, elements)
            self._submit(planned, elements, self._needs(planned, frozen.batch), frozen.links)
            return
        if live is not None:
            replaced = bool(self.queue.differs[name]) and live.waits and self.queue.can_rewire
            needs = self._needs(planned, frozen.batch if replaced else live.entry.batch)
            if self._keep(planned, live, needs, replaced):
                self._add_to_kept(planned, live, needs)
                return
        else:
            needs = self._needs(planned, frozen.batch)
        self._submit(planned, self.fresh.get(name) or planned.missing, needs, frozen.links)

    def _needs(self, planned: PlannedPhase, batch: int) -> dict[str, str]:
        """Return {phase: dependency type} that a job of this phase, with `batch` elements a task, has to wait on.

        Partners whose tasks hold other elements wait for each other's whole jobs. What must never run at the same time
        does not, whoever was sent first: a new job also waits for one that is to follow it and has begun.
        """
        runs = {phase.name for phase in self.plan.to_run}
        needs = {
            name: "afterok" if type_ == "aftercorr" and self.batches.get(name, batch) != batch else type_
            for name, type_ in planned.frozen.needs.items()
            if name in runs
        }
        live = self.queue.live
        return needs | {
            later.name: "singleton"
            for later in self.plan.phases
            if later.frozen.needs.get(planned.name) == "singleton" and later.name in live and not live[later.name].waits
        }

    def _keep(self, planned: PlannedPhase, live: LiveJob, needs: dict[str, str], replaced: bool) -> bool:
        """Rewire the live job of a phase, leave it as it is, or cancel it; return whether it stays.

        Raises:
            UserMistake: it has other settings than the plan, and nobody asked for a new attempt.
        """
        entry, differs = live.entry, self.queue.differs[planned.name]
        same_key = entry.key == planned.frozen.key
        would_do = same_key or (live.waits and (self.fresh or live.dead_elements))
        # A job that waits has to carry just the elements that are to run now.
        fits = Indices.of(planned.missing) == Indices.of(entry.elements) or not live.waits
        if self.queue.can_rewire and not differs and fits and would_do:
            self._rewire(planned, live, needs)
            return True
        if same_key and not replaced:
            if differs:
                self.not_applied.append(
                    f"{planned.name}: job {entry.job} has begun and keeps what it was sent with ({differs} "
                    f"is not applied); `afterok resubmit {self.plan.run.path} {planned.name}` with the same "
                    "overrides replaces it"
                )
            return True
        if not same_key and not self.fresh:
            raise UserMistake(
                f"{planned.name}: job {entry.job} is still active with other settings; wait for it, "
                f"or `afterok cancel {self.plan.run.path} {planned.name}` first"
            )
        self.cancels.append(Cancel(planned.name, entry.job))
        return False

    def _rewire(self, planned: PlannedPhase, live: LiveJob, needs: dict[str, str]) -> None:
        """Have a waiting job wait on the right ones, where it does not already."""
        entry, key = live.entry, planned.frozen.key
        if not live.waits:
            # Some elements ran already: only those that can never start any more are repaired, each behind its partner.
            tasks = sorted({index // entry.batch for index in live.dead_elements})
            self.steps += [Rewire(phase=planned.name, key=key, job=entry.job, needs=needs, only=task) for task in tasks]
            return
        waits = {phase: self.kept[phase] for phase in needs if phase in self.kept}
        changed = any(phase in self.new for phase in needs) or waits != entry.waits
        if changed or entry.key != key or live.dead_elements:
            self.steps.append(Rewire(phase=planned.name, key=key, job=entry.job, needs=needs))

    def _add_to_kept(self, planned: PlannedPhase, live: LiveJob, needs: dict[str, str]) -> None:
        """Submit what a job that stays leaves open: elements that it does not carry, links that its chain lacks."""
        entry, frozen = live.entry, planned.frozen
        self.kept[planned.name] = entry.awaited
        self.batches[planned.name] = entry.batch
        elements: Sequence[int] = Indices.of(planned.missing) - live.elements
        can_grow = entry.key == frozen.key and self.queue.can_rewire
        links = max(0, frozen.links - live.links_left) if can_grow else 0
        if links and not live.waits:  # a chain that proved too short goes on behind its last link
            elements, needs = planned.missing, needs | {planned.name: "singleton"}
        if elements:
            self._submit(planned, elements, needs, links)

    def _cancel_elements(self, planned: PlannedPhase, live: LiveJob, elements: Sequence[int]) -> None:
        """Cancel a live job of which `elements` are sent anew, or those of its tasks that carry them."""
        entry, anew = live.entry, Indices.of(elements)
        if not live.elements - anew:
            self.cancels.append(Cancel(planned.name, entry.job))
            return
        tasks = sorted({i // entry.batch for i in anew & live.elements})
        self.cancels += [Cancel(planned.name, f"{entry.job}_{task}") for task in tasks]
        self.kept[planned.name] = entry.awaited

    def _submit(self, planned: PlannedPhase, elements: Sequence[int], needs: dict[str, str], links: int) -> None:
        name, frozen = planned.name, planned.frozen
        self.steps.append(
            Submit(
                phase=name,
                key=frozen.key,
                name=self.name_of(name),
                elements=elements,
                is_array=frozen.array is not None,
                needs=needs,
                request=request_of(planned),
                batch=frozen.batch,
                links=links,
            )
        )
        self.new.add(name)
        self.batches[name] = frozen.batch if self.batches.get(name, frozen.batch) == frozen.batch else 0
