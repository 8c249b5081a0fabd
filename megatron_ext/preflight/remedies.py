"""Which settings make a phase fit its GPUs, in the words of the refusal: no torch."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from megatron_ext.parallel.calibration import GIB
from megatron_ext.parallel.settings import ModelSettings
from megatron_ext.preflight.facts import Training
from megatron_ext.preflight.search import HEADROOM, MemoryOf, offer_text

C = TypeVar("C", bound=ModelSettings)
Changes = Callable[[C], Iterator[tuple[str, str, C]]]  # of a config: setting, value, and the config with it


def limit(t: Training) -> float:
    """Return the bytes that what is offered may fill of a GPU."""
    return HEADROOM * (t.capacity or 0.0)


def told(config: C, t: Training, total_of: Callable[[C], float], changes: Changes[C]) -> str:
    """Return the words that name each setting that is enough, else all of them together; "" where these do not do.

    Args:
        total_of: the bytes on the fullest rank with a config.
    """
    most = limit(t)
    totals = [(name, value, total_of(other)) for name, value, other in changes(config)]
    enough = [f"{name} {value} ({total / GIB:.1f} GiB)" for name, value, total in totals if total <= most]
    if enough:
        return f"use {' or '.join(enough)}"
    changed, total, given = config, total_of(config), dict[str, str]()
    while total > most:
        others = ((name, value, other, total_of(other)) for name, value, other in changes(changed))
        better = next((one for one in others if one[3] < total), None)
        if better is None:
            return ""
        given[better[0]] = better[1]
        changed, total = better[2:]
    return f"use {', '.join(f'{name} {value}' for name, value in given.items())} together ({total / GIB:.1f} GiB)"


def plans(config: C, t: Training, of: Callable[[C], MemoryOf], lean: Changes[C]) -> str:
    """Return the words that offer a plan on as many GPUs or more: with the config as it is, or with all changes of
    `lean`, one upon the other, where these take fewer GPUs."""
    given = list(lean(config))
    words = ", ".join(f"{name} {value}" for name, value, _ in given)
    return offer_text(config.parallel, t, of(config), of(given[-1][2]) if given else None, words=words)
