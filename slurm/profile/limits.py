"""What of a phase's resources is too small to start, or more than the place has that it is to run at."""

from data_tools.mistake import Problem
from slurm.printed import format_minutes, parse_minutes
from slurm.profile.places import Place, gpus_of, items
from slurm.profile.schema import Resources

CHECK_OF = {"nodes": "P003", "gpus_per_node": "P005", "mem_gib": "P006"}
ONE_LINE = ("partition", "account", "qos", "reservation", "licenses", "constraint")


def limit_problems(wants: Resources, place: Place, where: str) -> list[Problem]:
    """Return each problem with its numbers and the nearest legal value; `where` is the place of the request."""
    problems: list[Problem] = []
    limit, at = place.limits, place.at

    def too_small(key: str, value: int | None, least: int) -> None:
        if value is not None and value < least:
            problems.append(Problem(f"{where}.{key}", f"{value} is too small; the least is {least}", "S001"))

    def above(key: str, value: int | None, most: int | None, unit: str) -> None:
        if value is not None and most is not None and value > most:
            message = f"{value} {unit}, but {at} has {most}; ask for at most {most}"
            problems.append(Problem(f"{where}.{key}", message, CHECK_OF[key]))

    too_small("nodes", wants.nodes, 1)
    too_small("gpus_per_node", wants.gpus_per_node, 0)
    too_small("cpus_per_task", wants.cpus_per_task, 1)
    too_small("ranks_per_node", wants.ranks_per_node, 1)
    too_small("mem_gib", wants.mem_gib, 1)
    too_small("time", wants.time_minutes, 1)
    above("nodes", wants.nodes, limit.max_nodes, "nodes")
    above("gpus_per_node", wants.gpus_per_node, limit.gpus_per_node, "GPUs a node")
    above("mem_gib", wants.mem_gib, limit.mem_gib, "GiB a node")
    ranks, cpus = wants.ranks_per_node, wants.cpus_per_task * wants.ranks_per_node
    if limit.cpus is not None and cpus > limit.cpus:
        most = limit.cpus // ranks
        remedy = f"at most {most} cpus_per_task" if most else f"at most {limit.cpus} ranks_per_node"
        message = f"{ranks} ranks of {wants.cpus_per_task} CPUs are {cpus} a node, but {at} has {limit.cpus}; {remedy}"
        problems.append(Problem(f"{where}.cpus_per_task", message, "P006"))
    longest = None if limit.max_time is None else parse_minutes(limit.max_time)
    if longest is not None and wants.time_minutes is not None and wants.time_minutes > longest:
        asked = format_minutes(wants.time_minutes)
        message = f"{asked} is longer than {at} allows; ask for at most {limit.max_time}"
        problems.append(Problem(f"{where}.time", message, "P002"))
    return problems + _words_problems(wants, place, where)


def _words_problems(wants: Resources, place: Place, where: str) -> list[Problem]:
    """Return what is wrong with what a request says in words: names that the place has not, and more than one line."""
    problems: list[Problem] = []
    limit, at = place.limits, place.at
    asked_type, has_type = gpus_of(wants.gres)[0], gpus_of(limit.gres)[0]
    if asked_type and limit.gres and asked_type != has_type:
        message = f"{at} has no gpu:{asked_type}, but {limit.gres}; ask for that"
        problems.append(Problem(f"{where}.gres", message, "P005"))
    has = {(name, kind): count for name, kind, count in items(limit.gres or "")}
    for name, kind, count in items(wants.gres or ""):  # what a node has beside its GPUs a profile need not say
        most = has.get((name, kind))
        if name != "gpu" and most is not None and count > most:
            message = f"{name}:{count}, but a node of {at} has {most}; ask for that"
            problems.append(Problem(f"{where}.gres", message, "P010"))
    for key in ONE_LINE:  # another line of the script would be another option
        if not (getattr(wants, key) or "").isprintable():
            message = f"{getattr(wants, key)!r} is no one line of plain text"
            problems.append(Problem(f"{where}.{key}", message, "S001"))
    for key in ("reservation", "licenses", "gres"):
        if getattr(wants, key) is not None and key in wants.extra_sbatch:
            message = f"{at} has it in extra_sbatch too, and one of them would be lost; say it as the partition's {key}"
            problems.append(Problem(f"{where}.{key}", message, "A001"))
    return problems
