"""What an admin's policy forbids: changed locked keys, values beyond bounds, jobs without account or allowed QOS.

The words are the admin's own where the policy has some.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from data_tools.mistake import Problem
from slurm.printed import format_minutes, parse_minutes
from slurm.profile.layers import Layer, Merged, leaves, merge
from slurm.profile.schema import Bound, Policy, Profile, Request, Resources
from slurm.profile.typed import is_place

OF_A_PHASE = "resources."  # how the bound of what a phase gets begins
# What of a phase's request a locked role or partition keeps it from saying; sizes are bounded, not locked.
PLACES = ("partition", "account", "qos", "reservation", "licenses", "constraint", "gres")
TIMES = ("time", "max_time", "time_minutes")


def policy_problems(layers: list[Layer], merged: Merged, policy: Policy) -> list[Problem]:
    """Return what is wrong with a policy, and what of a profile it forbids."""
    problems = [
        Problem(f"{layer.file}: policy", f"counts only in an admin's file: {layer.why_not}; take it out")
        for layer in layers
        if "policy" in layer.values and not layer.is_admins
    ]
    file = merged.culprit("policy")
    for key in policy.locked:
        if not is_place(key.split(".")):
            problems.append(Problem(f"{file}: policy.locked.{key}", "no place of a profile"))
    for key in policy.bounds:
        if not is_place(key.split(".")) and key.removeprefix(OF_A_PHASE) not in (*Resources.__annotations__, "time"):
            problems.append(Problem(f"{file}: policy.bounds.{key}", "no place of a profile, and none of resources"))
    return problems or [*_changed(layers, merged, policy), *_beyond(merged, policy)]


def _changed(layers: list[Layer], merged: Merged, policy: Policy) -> Iterator[Problem]:
    """Yield the locked keys that are not what the admin's own files make of them."""
    admins = leaves(merge([layer for layer in layers if layer.is_admins]).values)
    now = leaves(merged.values)
    for key in dict.fromkeys([*now, *admins]):
        locked = locked_by(policy, key)
        if locked is None or now.get(key) == admins.get(key):
            continue
        stays = f"it stays {admins[key]!r}" if key in admins else "it stays unset"
        yield Problem(f"{merged.culprit(key)}: {key}", _said(policy.locked[locked], f"locked by the admin; {stays}"))


def locked_by(policy: Policy, key: str) -> str | None:
    """Return the entry of `locked` that a dotted key falls under, None where it is free."""
    return next((entry for entry in policy.locked if _falls_under(key, entry)), None)


def _falls_under(key: str, entry: str) -> bool:
    parts, wanted = key.split("."), entry.split(".")
    return len(parts) >= len(wanted) and all(map(fnmatchcase, parts, wanted))


def _beyond(merged: Merged, policy: Policy) -> Iterator[Problem]:
    """Yield the values of a profile that are beyond a bound."""
    for key, value in leaves(merged.values).items():
        for entry, bound in policy.bounds.items():
            if not entry.startswith(OF_A_PHASE) and _falls_under(key, entry) and (why := beyond(key, value, bound)):
                yield Problem(f"{merged.culprit(key)}: {key}", why)


def beyond(key: str, value: Any, bound: Bound) -> str:
    """Return why a value is beyond a bound, "" where it is not."""
    if value is None or value in ("", "null", "~"):
        return ""
    as_time = key.rpartition(".")[2] in TIMES

    def number(text: Any) -> int:
        return text if isinstance(text, int) else parse_minutes(text) if as_time else int(text)

    def shown(text: Any) -> str:
        return format_minutes(number(text)) if as_time else str(text)

    if bound.choices and str(value) not in bound.choices:
        return _said(bound.reason, f"{value!r} is not among {', '.join(bound.choices)}")
    try:
        if bound.max is not None and number(value) > number(bound.max):
            return _said(bound.reason, f"{shown(value)} is more than the admin allows; at most {bound.max}")
        if bound.min is not None and number(value) < number(bound.min):
            return _said(bound.reason, f"{shown(value)} is less than the admin allows; at least {bound.min}")
    except ValueError:
        return _said(bound.reason, f"{value!r} cannot be compared with the admin's bound")
    return ""


def forbidden(profile: Profile, request: Request, wants: Resources, where: str) -> Iterator[Problem]:
    """Yield what the policy forbids of a phase's request, and of the resources that come of it.

    `where` is the place of the request's resources, such as "tiny.yaml: sft.resources".
    """
    policy = profile.policy
    for key in vars(wants):
        place = "time" if key == "time_minutes" else key
        bound = policy.bounds.get(f"{OF_A_PHASE}{place}")
        if bound and (why := beyond(key, getattr(wants, key), bound)):
            yield Problem(f"{where}.{place}", why)
    yield from _said_against_a_lock(profile, request, wants, where)
    if profile.kind == "slurm" and policy.require_account and not wants.account:
        words = "no account is said; say account in the phase's resources, or in a profile of yours"
        yield Problem(f"{where}.account", _said(policy.reason, words))
    if policy.allowed_qos and wants.qos and wants.qos not in policy.allowed_qos:
        words = f"QOS {wants.qos!r} is not among {', '.join(policy.allowed_qos)}"
        yield Problem(f"{where}.qos", _said(policy.reason, words))


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
        if entry is None and key not in ("partition", "gres"):  # a partition's gres is the name of its GPUs
            entry, has = locked_by(policy, f"partitions.{wants.partition}.{key}"), getattr(partition, key, None)
            said = of_role if asked is None else asked
        if said is not None and entry is not None and said != has:
            stays = f"locked by the admin; it stays {'unset' if has is None else repr(has)}"
            yield Problem(f"{where}.{key}", _said(policy.locked[entry], stays))


def _said(words: str, fact: str) -> str:
    """Return the fact, with the admin's words first where there are some."""
    return f"{words.rstrip('. ')} ({fact})" if words else fact
