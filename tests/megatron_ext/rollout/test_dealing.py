"""Samples are dealt to replicas: each once, evenly, and together with those that share its prompt."""

import random

import pytest

from megatron_ext.entrypoints import grpo
from megatron_ext.parallel.plan import ParallelPlan, Site
from megatron_ext.rl.settings import GrpoSettings
from megatron_ext.rollout.dealing import (
    REMEMBERED,
    Group,
    Lengths,
    Stretch,
    deal,
    idle_notes,
    most_prompts,
    most_samples,
)

CASES = [(2, 4, 4), (2, 4, 3), (1, 5, 4), (64, 16, 1024), (64, 16, 48), (64, 16, 8), (3, 4, 16), (5, 2, 1), (0, 2, 3)]


def groups_of(prompts: int, samples: int, prompt: float = 0.0, work: float = 8.0) -> list[Group]:
    return [Group(item, prompt, dict.fromkeys(range(samples), work)) for item in range(prompts)]


def counts(dealt: list[Stretch]) -> list[int]:
    return [sum(map(len, stretch.values())) for stretch in dealt]


def works(dealt: list[Stretch], groups: list[Group]) -> list[float]:
    by_item = {group.item: group for group in groups}
    return [
        sum(by_item[item].prompt + sum(by_item[item].samples[n] for n in numbers) for item, numbers in stretch.items())
        for stretch in dealt
    ]


@pytest.mark.parametrize("prompt", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("prompts, samples, replicas", CASES)
def test_each_sample_is_dealt_once_and_no_replica_waits_while_others_have_several(prompts, samples, replicas, prompt):
    dealt = deal(groups_of(prompts, samples, prompt), replicas)
    found = [(item, number) for stretch in dealt for item, numbers in stretch.items() for number in numbers]
    assert found == [(item, number) for item in range(prompts) for number in range(samples)]
    assert len(dealt) == replicas and sum(map(bool, dealt)) == min(replicas, prompts * samples)
    assert max(counts(dealt)) <= most_samples(prompts * samples, replicas)
    assert all(len(stretch) <= most_prompts(count, samples) for stretch, count in zip(dealt, counts(dealt)))
    assert sum(map(len, dealt)) <= max(0, prompts + replicas - 1)  # a prompt is cut where a stretch ends, nowhere else


@pytest.mark.parametrize("prompts, samples, replicas", CASES)
def test_equal_samples_are_dealt_evenly(prompts, samples, replicas):
    """And whole prompts stay whole where that is even."""
    dealt = deal(groups_of(prompts, samples), replicas)
    assert max(counts(dealt)) == -(-prompts * samples // replicas)
    if prompts and prompts % replicas == 0:
        assert sum(map(len, dealt)) == prompts


@pytest.mark.parametrize("seed", range(10))
def test_work_is_dealt_as_evenly_as_whole_samples_make_it(seed):
    """A stretch ends no further than a sample and a prompt from the mean; unequal lengths of up to a quarter keep below
    the most samples."""
    dice = random.Random(seed)
    replicas = dice.randint(1, 40)
    groups = [
        Group(item, dice.uniform(0, 5), {n: dice.uniform(90, 110) for n in range(16)})
        for item in range(dice.randint(1, 40))
    ]
    dealt = deal(groups, replicas)
    mean = sum(works(dealt, groups)) / replicas
    assert max(works(dealt, groups)) <= 1.02 * (mean + 115)


def test_the_work_of_a_prompt_counts_wherever_it_is_computed():
    long, short = Group(0, 100.0, {0: 1.0, 1: 1.0}), Group(1, 1.0, dict.fromkeys(range(5), 22.0))
    assert deal([long, short], 2) == [{0: [0, 1]}, {1: [0, 1, 2, 3, 4]}]


def test_no_replica_is_given_many_samples_because_they_are_short():
    """What they need of its memory is not known to be less: plan counts on it."""
    groups = [Group(0, 0.0, dict.fromkeys(range(4), 1000.0)), Group(1, 0.0, dict.fromkeys(range(60), 1.0))]
    assert max(counts(deal(groups, 4))) == most_samples(64, 4) == 20


def test_what_is_known_of_lengths_is_used_prompt_by_prompt():
    lengths = Lengths(100.0)
    assert lengths.expected("a") == 100 and lengths.expected("a", drawn=30) == 70
    lengths.hear("a", [10, 20])
    assert lengths.expected("a") == 15 and lengths.expected("b") == 15 and lengths.expected("a", drawn=40) == 1
    other = lengths.copy()
    other.hear("b", [45])
    assert other.expected("b") == 45 and other.expected("c") == 25 and lengths.expected("b") == 15
    lengths.hear("none", [])
    for number in range(REMEMBERED):
        lengths.hear(str(number), [1])
    assert len(lengths.known) == REMEMBERED and "a" not in lengths.known


def test_it_is_said_how_many_replicas_have_nothing_to_draw():
    assert idle_notes(64, 16, 1024) == []
    (note,) = idle_notes(2, 4, 1024)
    assert note.startswith("warning: replicas with nothing to draw: 1,016 of 1,024; a step has prompts 2 x group 4 = 8")
    config = GrpoSettings(model="unknown", prompts=2, group=4, parallel=ParallelPlan(tensor=2, context=2))
    notes = grpo.parallel_report(config, Site(40), searching=False)["notes"]
    assert any("nothing to draw: 12 of 20;" in note for note in notes)
