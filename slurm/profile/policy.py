"""What an admin's policy forbids: changed locked keys, values beyond bounds, jobs without account or allowed QOS.

The words are the admin's own where the policy has some.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from data_tools.mistake import Problem, nearest
from slurm.checks import CHECKS
from slurm.printed import format_minutes, parse_minutes
from slurm.profile.layers import Layer, Merged, leaves, merge
from slurm.profile.places import gpus_of, items
from slurm.profile.resolve import least_minutes
from slurm.profile.schema import Bound, Policy, Profile, Request, Resources
from slurm.profile.typed import NOTHING, is_place

RUNTIME, IMAGES = "container.runtime", "container.images"
OF_A_PHASE = "resources."  # how the bound of what a phase gets begins
# What of a phase's request a locked role or partition keeps it from saying; sizes are bounded, not locked.
PLACES = ("partition", "account", "qos", "reservation", "licenses", "constraint", "gres")
TIMES = ("time", "max_time", "time_minutes", "time-min", "time_min")
OF_RESOURCES = tuple("time" if key == "time_minutes" else key for key in Resources.__annotations__
                     if key != "extra_sbatch")  # fmt: skip

Values = dict[str, Any]  # dotted key -> value


def policy_problems(layers: list[Layer], merged: Merged, policy: Policy) -> list[Problem]:
    """Return what is wrong with a policy, and what of a profile it forbids."""
    admins_layers = [layer for layer in layers if layer.is_admins]
    *others, last = [layer for layer in admins_layers if "policy" in layer.values] or [Layer("", {})]
    problems = [*_misplaced(layers, others, last)]
    if policy.locked or policy.bounds:
        problems += _out_of_reach(layers)
    file = merged.culprit("policy")
    for key in policy.locked:
        if not is_place(key.split(".")):
            problems.append(Problem(f"{file}: policy.locked.{key}", "no place of a profile"))
    for key, bound in policy.bounds.items():
        problems += _bound_problems(key, bound, f"{file}: policy.bounds.{key}")
    for check in policy.unwaivable:
        if check not in CHECKS:  # the one that is meant would stay waivable
            words = f"there is no check {check!r}{nearest(check, list(CHECKS))}"
            problems.append(Problem(f"{file}: policy.unwaivable", words))
    # An admin's file that has nothing to do with the policy's was chosen by the user: its values are the user's.
    chain = [layer for layer in admins_layers if layer.file in (last.file, *last.below) or last.file in layer.below]
    admins = leaves(merge(chain).values)
    now = leaves(merged.values)
    return problems or [*_changed(admins, now, merged, policy), *_beyond(admins, now, merged, policy)]


def _misplaced(layers: list[Layer], others: list[Layer], last: Layer) -> Iterator[Problem]:
    """Yield the policies of users' files, and those of `others` that the admin's one that comes last would replace."""
    for layer in layers:
        if "policy" in layer.values and not layer.is_admins:
            why = f"counts only in an admin's file: {layer.why_not}; mend that, or take it out"
            yield Problem(f"{layer.file}: policy", why)
    for other in others:
        if other.file not in last.below:
            why = f"{last.file} has another, and does not extend this file; leave one of them out"
            yield Problem(f"{other.file}: policy", why)


def _out_of_reach(layers: list[Layer]) -> Iterator[Problem]:
    """Yield the names of users' roles and partitions that a dotted key cannot mean."""
    for layer in layers:
        for key in () if layer.is_admins else ("roles", "partitions"):
            for name in layer.values.get(key) or ():
                if "." in name:
                    yield Problem(
                        f"{layer.file}: {key}.{name}", "the policy's keys are dotted and would miss it; call it other"
                    )


def _bound_problems(key: str, bound: Bound, where: str) -> Iterator[Problem]:
    """Yield what keeps a bound from counting, or every value from being legal (min above max)."""
    if key.startswith(OF_A_PHASE):
        if key.removeprefix(OF_A_PHASE) not in OF_RESOURCES:
            yield Problem(where, f"a phase gets nothing of this name; known: {', '.join(OF_RESOURCES)}")
    elif not is_place(key.split(".")):
        also = f"; of what a phase gets, write {OF_A_PHASE}{key}" if key in OF_RESOURCES else ""
        yield Problem(where, f"no place of a profile{also}")
    if key.rpartition(".")[2] == "gres" and (bound.min is not None or bound.max is not None):
        words = 'gres is no number: say choices, such as ["gpu:a100", "nvme:1"], or bound resources.gpus_per_node'
        yield Problem(where, words)
    if bound.min is None and bound.max is None and not bound.choices:
        yield Problem(where, "bounds nothing: say min, max or choices")
    numbers = {}
    for name in ("min", "max"):
        try:
            if (said := getattr(bound, name)) is not None:
                numbers[name] = _number(key, said)
        except ValueError as error:
            yield Problem(f"{where}.{name}", str(error))
    if len(numbers) == 2 and numbers["min"] > numbers["max"]:
        yield Problem(where, f"no value is legal: min {bound.min} is more than max {bound.max}")


def _changed(admins: Values, now: Values, merged: Merged, policy: Policy) -> Iterator[Problem]:
    """Yield the locked keys that are not what the admin's own files make of them."""
    for key in dict.fromkeys([*now, *admins]):
        locked = locked_by(policy, key)
        if locked is None or now.get(key) == admins.get(key):
            continue
        stays = f"it stays {admins[key]!r}" if key in admins else "it stays unset"
        yield Problem(
            f"{merged.culprit(key)}: {key}", _said(policy.locked[locked], f"locked by the admin; {stays}"), "A002"
        )


def locked_by(policy: Policy, key: str) -> str | None:
    """Return the entry of `locked` that a dotted key falls under, None where it is free."""
    bears = key == RUNTIME  # without a runtime no image would be taken
    return next((e for e in policy.locked if _falls_under(key, e) or (bears and e.startswith(IMAGES))), None)


def _falls_under(key: str, entry: str) -> bool:
    """Return whether a key is of an entry of the policy.

    A role's environment, which replaces, is of `env` too, and what `extra_sbatch` has is of the key that says the same.
    """
    parts, wanted = key.split("."), entry.split(".")
    if parts[0] == "roles" and parts[2:3] == ["env"] and wanted[0] == "env":
        parts = parts[2:]
    if parts[0] == "partitions" and parts[2:3] == ["extra_sbatch"] and wanted[2:3] != ["extra_sbatch"]:
        parts = [*parts[:2], *parts[3:]]
    return len(parts) >= len(wanted) and all(map(fnmatchcase, parts, wanted))


def _beyond(admins: Values, now: Values, merged: Merged, policy: Policy) -> Iterator[Problem]:
    """Yield the values of a profile that are beyond a bound, and those that were taken away from under one."""
    for key in dict.fromkeys([*now, *admins, *policy.bounds]):  # these: a default of ours may be beyond, too
        value, theirs = now.get(key, None if key in admins else _default(key)), admins.get(key)
        for entry, bound in policy.bounds.items():
            if entry.startswith(OF_A_PHASE) or not _falls_under(key, entry):
                continue
            why = beyond(key, value, bound)
            if _is_nothing(value) and not _is_nothing(theirs):
                why = _said(bound.reason, f"the admin bounds it, and says {theirs!r}; say a value, or leave it")
            if why:
                yield Problem(f"{merged.culprit(key) or merged.culprit('policy')}: {key}", why, "A002")


def _default(key: str) -> Any:
    """Return the single value that a profile has at a dotted key of which nobody says anything, None for none."""
    value: Any = Profile()
    for part in key.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, int | str) else None


def _is_nothing(value: Any) -> bool:
    return value is None or value in NOTHING


def _number(key: str, text: Any) -> int:
    """Return a value as it is compared: of a time its minutes. Raise ValueError where there is no such number."""
    if isinstance(text, int):
        return text
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is no number")
    if key.rpartition(".")[2] in TIMES:
        return parse_minutes(text)
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is no integer") from None


def beyond(key: str, value: Any, bound: Bound) -> str:
    """Return why a value is beyond a bound, "" where it is not."""
    if _is_nothing(value):
        return ""

    def number(text: Any) -> int:
        return _number(key, text)

    def shown(text: Any) -> str:
        return format_minutes(number(text)) if key.rpartition(".")[2] in TIMES else str(text)

    if bound.choices and not _is_among(key, str(value), bound.choices):
        return _said(bound.reason, f"{value!r} is not among {', '.join(bound.choices)}")
    try:
        if bound.max is not None and number(value) > number(bound.max):
            return _said(bound.reason, f"{shown(value)} is more than the admin allows; at most {bound.max}")
        if bound.min is not None and number(value) < number(bound.min):
            return _said(bound.reason, f"{shown(value)} is less than the admin allows; at least {bound.min}")
    except ValueError:
        return _said(bound.reason, f"{value!r} cannot be compared with the admin's bound")
    return ""


def _is_among(key: str, value: str, choices: list[str]) -> bool:
    """Return whether a value is one of the choices; of gres whether each item is, by name, type or count too."""
    if key.rpartition(".")[2] != "gres":
        return value in choices
    try:
        spelled = [(name, f"{name}:{kind}", f"{name}:{kind}:{count}" if kind else f"{name}:{count}")
                   for name, kind, count in items(value)]  # fmt: skip
    except ValueError:
        return value in choices
    return value in choices or all(set(forms) & set(choices) for forms in spelled)


def forbidden(profile: Profile, request: Request, wants: Resources, where: str) -> Iterator[Problem]:
    """Yield what the policy forbids of a phase's request, and of the resources that come of it.

    `where` is the place of the request's resources, such as "tiny.yaml: sft.resources".
    """
    policy = profile.policy
    yield from _beyond_a_bound(profile, wants, where)
    yield from _said_against_a_lock(profile, request, wants, where)
    if profile.kind == "slurm" and policy.require_account and not wants.account:
        words = "no account is said; say account in the phase's resources, or in a profile of yours"
        yield Problem(f"{where}.account", _said(policy.reason, words), "A002")
    if policy.allowed_qos and wants.qos and wants.qos not in policy.allowed_qos:
        words = f"QOS {wants.qos!r} is not among {', '.join(policy.allowed_qos)}"
        yield Problem(f"{where}.qos", _said(policy.reason, words), "A002")


def _beyond_a_bound(profile: Profile, wants: Resources, where: str) -> Iterator[Problem]:
    """Yield what of a phase's resources is beyond a bound, or may come out beyond one: nothing said, or too little."""
    bounds = profile.policy.bounds
    for key in vars(wants):
        place = "time" if key == "time_minutes" else key
        bound = bounds.get(f"{OF_A_PHASE}{place}")
        if bound and (why := beyond(key, getattr(wants, key), bound)):
            yield Problem(f"{where}.{place}", why, "A002")
    if profile.kind != "slurm":
        return
    longest, kinds = bounds.get(f"{OF_A_PHASE}time"), bounds.get(f"{OF_A_PHASE}gres")
    least = least_minutes(wants)
    if longest and least != wants.time_minutes and (why := beyond("time", least, longest)):
        yield Problem(f"{where}.time", f"{why}, and the partition's extra_sbatch has time-min", "A002")
    if longest and longest.max is not None and wants.time_minutes is None:
        words = f"no time is said, and the admin allows at most {longest.max}; say one"
        yield Problem(f"{where}.time", _said(longest.reason, words), "A002")
    if kinds and kinds.choices and wants.gpus_per_node and not gpus_of(wants.gres)[1] and "gpu" not in kinds.choices:
        words = f"GPUs of any name are not among {', '.join(kinds.choices)}; say gres"
        yield Problem(f"{where}.gpus_per_node", _said(kinds.reason, words), "A002")


def _said_against_a_lock(profile: Profile, request: Request, wants: Resources, where: str) -> Iterator[Problem]:
    """Yield what a phase says of a place locked in its role, and what phase or role say of one in their partition.

    A role whose own place is locked may differ from its partition: the admin says both.
    """
    policy, role = profile.policy, profile.roles[wants.role]
    partition = profile.partitions.get(wants.partition or "")
    for key in PLACES:
        asked, of_role = getattr(request, key), getattr(role, key)
        entry, has = locked_by(policy, f"roles.{wants.role}.{key}"), of_role
        said = asked
        if key == "partition" and role.partitions:  # which of several it is, the phase may say
            entry = entry or locked_by(policy, f"roles.{wants.role}.partitions")
            has = asked if asked in role.partitions else " or ".join(role.partitions)
        if entry is None and key not in ("partition", "gres"):  # a partition's gres is the name of its GPUs
            entry, has = locked_by(policy, f"partitions.{wants.partition}.{key}"), getattr(partition, key, None)
            said = of_role if asked is None else asked
        if said is not None and entry is not None and said != has:
            stays = f"locked by the admin; it stays {'unset' if has is None else repr(has)}"
            yield Problem(f"{where}.{key}", _said(policy.locked[entry], stays), "A002")


def _said(words: str, fact: str) -> str:
    """Return the fact, with the admin's words first where there are some."""
    return f"{words.rstrip('. ')} ({fact})" if words else fact
