"""What a partition or the whole cluster would refuse: a time too short, arrays too long, too many jobs in the queue.

What can be helped is: elements share array tasks, and a phase that can go on from a checkpoint becomes a chain of
links. The rest is a problem that `plan` tells before anything is sent.
"""

from bisect import bisect_left
from collections.abc import Collection, Iterable

from data_tools.base.indices import Indices
from data_tools.mistake import Problem
from jobs.artifacts.run_folder import FrozenPhase, RunFolder
from jobs.schema.pipeline import Phase
from launchers.planning.chain import links_needed
from launchers.planning.ledger import Ledger
from launchers.planning.plan import RUNS, PlannedPhase
from slurm.detect import Cluster, can_requeue
from slurm.printed import ENDED_STATES, SubmitLimit, format_indices, format_minutes
from slurm.profile.check import check as check_request
from slurm.profile.check import contact_note
from slurm.profile.resolve import least_minutes, with_defaults
from slurm.profile.resolve import resolve as resolve_request
from slurm.profile.schema import DEFAULT_ROLE, Profile, Request, Resources

ARRAY_TEXT = 4094  # characters that Slurm takes of the list of an array's tasks (22.05 was seen to refuse 4,099)


def resources_of(profile: Profile, phase: Phase, where: str) -> tuple[Resources, list[Problem]]:
    """Return what a phase gets of a cluster, and what of its request no partition has.

    Where there are problems, the resources are those of the default role: they let the other checks go on.
    """
    request = with_defaults(profile, phase.uses, phase.resources)
    problems = check_request(profile, request, where)
    return resolve_request(profile, Request(DEFAULT_ROLE) if problems else request), problems


def seconds_of_a_link(cluster: Cluster, phase: Phase, resources: Resources) -> int | None:
    """Return the time in seconds of a phase's job until it is asked to stop, which may be less than none.

    None of a phase that cannot stop and go on, or whose job has no limit.
    """
    if cluster.kind != "slurm" or not phase.kind.can_stop or not (minutes := least_minutes(resources)):
        return None
    return 60 * minutes - cluster.profile.signal_lead_s


def why_time_is_too_short(cluster: Cluster, phase: Phase, resources: Resources) -> str:
    """Return why a phase that can stop would be over before it could; "" where it would not be."""
    link_s = seconds_of_a_link(cluster, phase, resources)
    if link_s is None or link_s > 0:
        return ""
    lead_s, least = cluster.profile.signal_lead_s, format_minutes(least_minutes(resources) or 0)
    return (
        f"{least} is over before the signal to stop, which comes {lead_s} s before "
        f"the limit (the profile's signal_lead_s); ask for at least {format_minutes(lead_s // 60 + 1)}"
    )


def links_of(cluster: Cluster, run: RunFolder, phase: Phase, frozen: FrozenPhase, resources: Resources) -> int:
    """Return the links of a phase that can stop and go on, where its job may not be requeued; 0: no chain.

    An array's elements are no chains: one that was stopped is sent again by the next submit.
    """
    link_s = seconds_of_a_link(cluster, phase, resources)
    if link_s is None or phase.array is not None or can_requeue(cluster, resources.partition):
        return 0
    return links_needed(frozen, run.outcomes(phase.name), link_s)


def share_array_tasks(cluster: Cluster, phases: dict[str, PlannedPhase]) -> None:
    """Have elements share array tasks where a phase has more elements than an array may have.

    Partners (aftercorr) get the same number a task, so that a task can wait for its partner's.
    """
    limit = cluster.profile.max_array_size
    if cluster.kind != "slurm" or not limit:
        return
    for planned in phases.values():
        planned.frozen.batch = -(-planned.frozen.elements // limit)
    _share_with_partners(phases)


def _share_with_partners(phases: dict[str, PlannedPhase]) -> None:
    pairs = [
        (planned.frozen, phases[name].frozen)
        for planned in phases.values()
        for name, type_ in planned.frozen.needs.items()
        if type_ == "aftercorr"
    ]
    for _ in pairs:  # as often as the longest chain of partners could need
        for phase, partner in pairs:
            phase.batch = partner.batch = max(phase.batch, partner.batch)


def array_text(frozen: FrozenPhase, elements: Iterable[int]) -> str:
    """Return the tasks of a phase that do these elements as sbatch's --array spells them, "0-3,7%2"."""
    tasks = ((first // frozen.batch, (end - 1) // frozen.batch + 1) for first, end in Indices.of(elements).spans)
    return format_indices(Indices.of_spans(tasks)) + (f"%{frozen.throttle}" if frozen.throttle else "")


def fit_array_text(cluster: Cluster, phases: dict[str, PlannedPhase]) -> None:
    """Have more elements share a task where those that are missing lie so scattered that Slurm refuses their list."""
    arrays = [planned for planned in phases.values() if planned.action in RUNS and planned.frozen.array is not None]
    while cluster.kind == "slurm":
        # A range of elements never becomes two of tasks, and of twice as many a task no more gaps are left.
        long = [planned for planned in arrays if len(array_text(planned.frozen, planned.missing)) > ARRAY_TEXT]
        if not long:
            return
        for planned in long:
            planned.frozen.batch *= 2
        _share_with_partners(phases)


def fit_submit_limit(cluster: Cluster, run: RunFolder, phases: Collection[PlannedPhase]) -> list[Problem]:
    """Have more elements share a task where the user may not have all tasks of the pipeline in the queue at once.

    Returns a problem where even one task a phase is too many.
    """
    runs = [planned for planned in phases if planned.action in RUNS]
    if cluster.kind != "slurm" or not runs or cluster.unasked:
        return []
    limit = _submit_limit(cluster, {planned.resources.qos or "" for planned in runs})
    if limit is None:
        return []
    own = {entry.job for entry in Ledger(run.ledger).own_jobs()}
    others = sum(
        row.state not in ENDED_STATES for row in cluster.slurm.queue() if (row.array_job_id or row.job_id) not in own
    )

    def tasks(factor: int) -> int:
        """Return the tasks of all phases with at least `factor` elements a task."""
        return sum(
            planned.frozen.links or len({i // max(planned.frozen.batch, factor) for i in planned.missing})
            for planned in runs
        )

    factors = range(1, max(planned.frozen.elements for planned in runs) + 1)
    smallest = bisect_left(factors, True, key=lambda factor: tasks(factor) <= limit.jobs - others)
    if smallest == len(factors):
        message = (
            f"these {len(runs)} phases are {tasks(factors[-1])} jobs at the least, "
            f"and {limit.of} allows {limit.jobs} in the queue, array elements counted, of which "
            f"{others} are other jobs of yours; wait for those to end, or submit fewer phases at "
            f"once{contact_note(cluster.profile)}"
        )
        return [Problem("", message, "Q004")]
    for planned in runs:
        if planned.frozen.array is not None:
            planned.frozen.batch = max(planned.frozen.batch, factors[smallest])
    return []


def _submit_limit(cluster: Cluster, qos: set[str]) -> SubmitLimit | None:
    """Return how many jobs the user may have in the queue: what the profile says, else Slurm's accounting."""
    said = cluster.profile.max_submit_jobs
    if said is not None:
        return SubmitLimit(said, f"profile {cluster.profile.meta.name} (max_submit_jobs)")
    return cluster.slurm.submit_limit(qos)
