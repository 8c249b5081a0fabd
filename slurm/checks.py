"""The one table of checks: what each asks of a profile, a cluster or a plan, and what becomes of one that fails.

`afterok plan` and `submit` refuse what fails a check, all findings at once, each with its id; `afterok profile verify`
names the same facts of a profile by the same ids. A finding may be waived by id (`--waive`, `waive` of a pipeline or a
profile) where it may turn out well all the same, and where the admin's policy lets it.

P partitions and nodes, Q accounts, QOS and queue, R what stops, starts and reserves, L licences, V maintenance,
F files, N network, E environment, H the hub's cache, D disk, A the profile itself, S what a phase asks for, I its
inputs, K its own settings, B the budget.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from data_tools.mistake import Problem, nearest

REFUSAL = "refusal"  # it cannot go well: Slurm would refuse it, never start it, or it would fail once it runs
WARNING = "warning"  # refused too, until it is waived: what was seen may change, or may not matter here
NOTE = "note"  # told, and nothing is refused


@dataclass(frozen=True)
class Check:
    """One check: what holds where it passes, and how much it weighs."""

    says: str
    severity: str = REFUSAL
    passes_by: bool = False  # a fact of this moment: no disagreement of a profile with its cluster
    beyond_slurm: bool = False  # Slurm knows nothing of it, and starts such a job, which fails by itself; of the others
    # tests/launchers/test_preflight.py shows what a real Slurm does: refuse it late, or take it and never start it


CHECKS: Mapping[str, Check] = {
    "P001": Check("the partition exists"),
    "P002": Check("the time limit is at most the partition's"),
    "P003": Check("the partition has that many nodes, and allows one job that many"),
    "P004": Check("an array may be that long"),
    "P005": Check("the nodes have these GPUs, by this name"),
    "P006": Check("the nodes have that many CPUs and that much memory"),
    "P007": Check("the partition lets the account, the QOS and the user's groups in"),
    "P008": Check("the partition is up", WARNING, passes_by=True),
    "P009": Check("the nodes have the features of the constraint"),
    "P010": Check("the nodes have the other generic resources"),
    "P011": Check("enough of the nodes that fit are neither down nor drained", WARNING, passes_by=True),
    "P012": Check("the partition takes jobs"),
    "Q001": Check("the QOS exists, and this user may have it"),
    "Q002": Check("this user may charge the account"),
    "Q003": Check("the QOS and the account allow one job that much"),
    "Q004": Check("this user may have that many more jobs in the queue"),
    "R001": Check("a job there may be requeued where the profile says so", WARNING),
    "R003": Check("a preempted job has as long to write a checkpoint as signal_lead_s says", NOTE),
    "R004": Check("the reservation exists, and lets this user in"),
    "R005": Check("the reservation lasts as long and has as many nodes as the job"),
    "L001": Check("the licence exists, as often"),
    "V001": Check("no maintenance and no other reservation is in the way of the time limit", WARNING, passes_by=True),
    "F001": Check("scratch and shared folders are the same on all nodes", beyond_slurm=True),
    "F002": Check("the node-local folder is there, and may be written", beyond_slurm=True),
    "F003": Check("the run lies where all nodes see it, under a name that Slurm can use"),
    "F004": Check("a container sees the inputs, secrets and folders that its phase reads", beyond_slurm=True),
    "F005": Check("the folders of logs can be made and written"),
    "N001": Check("the network interface and the HCA are there", beyond_slurm=True),
    "E001": Check("modules, setup and python of the role work, and the worker starts", beyond_slurm=True),
    "E002": Check(
        "the variables that jobs get of the submitter's environment are set, and none is a secret", beyond_slurm=True
    ),
    "H001": Check("the hub's datasets, models and tokenizers are in a cache on this machine", NOTE, beyond_slurm=True),
    "H002": Check("jobs look for the hub's files where they were found", WARNING, beyond_slurm=True),
    "D001": Check("the disk has room for what the phases will leave", WARNING, passes_by=True, beyond_slurm=True),
    "A001": Check("the profile sets nothing that afterok sets itself, and names what there is", beyond_slurm=True),
    "A002": Check("the admin's policy allows it", beyond_slurm=True),
    "S001": Check("role, partition, time and gres can be read, and sizes are not too small", beyond_slurm=True),
    "S002": Check("the time limit leaves a job that is asked to stop the time to do so", beyond_slurm=True),
    "I001": Check("the inputs are there", beyond_slurm=True),
    "K001": Check("the phase's own settings go together, and fit what it runs on", beyond_slurm=True),
    "K002": Check("elements that follow one another one by one are as many", beyond_slurm=True),
    "B001": Check("the time limits of all phases cost at most --budget", beyond_slurm=True),
}


def by_check(check: str, problems: Iterable[Problem]) -> list[Problem]:
    """Return problems as findings of a check; one that has a check already stays as it is."""
    return [problem if problem.check else replace(problem, check=check) for problem in problems]


def is_waivable(check: str) -> bool:
    """Return whether a finding may be waived: notes refuse nothing, and refusals stay."""
    return check in CHECKS and CHECKS[check].severity == WARNING


def waiver_problems(
    waived: Iterable[str], where: str, unwaivable: Collection[str] = (), reason: str = ""
) -> list[Problem]:
    """Return what is wrong with the ids of a list of waivers, of which `where` says who wrote it.

    Args:
        unwaivable: the ids that the admin's policy lets nobody waive, with its `reason`.
    """
    problems = []
    for check in waived:
        if check not in CHECKS:
            problems.append(Problem(where, f"there is no check {check!r}{nearest(check, list(CHECKS))}"))
        elif not is_waivable(check):
            weight = CHECKS[check].severity
            words = "a note refuses nothing" if weight == NOTE else "what it refuses could not go well"
            able = ", ".join(name for name in CHECKS if is_waivable(name))
            problems.append(
                Problem(where, f"{check} ({CHECKS[check].says}) cannot be waived: {words}; these can: {able}")
            )
        elif check in unwaivable:
            fact = f"the admin lets nobody waive {check} ({CHECKS[check].says})"
            problems.append(Problem(where, f"{reason.rstrip('. ')} ({fact})" if reason else fact, "A002"))
    return problems


def sort_out(
    problems: Iterable[Problem], waived: Collection[str]
) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """Return (what is refused, what is waived, what is only told) of all findings; one without a check is refused."""
    refused, let_go, told = list[Problem](), list[Problem](), list[Problem]()
    for problem in problems:
        severity = CHECKS[problem.check].severity if problem.check else REFUSAL
        if severity == NOTE:
            told.append(problem)
        elif severity == WARNING and problem.check in waived:
            let_go.append(problem)
        else:
            refused.append(problem)
    return refused, let_go, told


def finding(problem: Problem) -> dict[str, str]:
    """Return a finding as `--json` has it."""
    severity = CHECKS[problem.check].severity if problem.check else REFUSAL
    return {"check": problem.check, "severity": severity, "where": problem.where, "message": problem.message}
