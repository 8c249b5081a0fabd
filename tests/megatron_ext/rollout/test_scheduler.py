"""The scheduler without a model: nothing leaks, nobody starves, a prompt is computed once."""

import heapq
from collections.abc import Collection, Mapping
from types import MappingProxyType

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.rollout.blocks import BlockManager
from megatron_ext.rollout.scheduler import EngineStep, Scheduler
from megatron_ext.rollout.sequence import Prefix, Request, Sequence, uniforms
from megatron_ext.rollout.settings import EngineConfig

NO_REPLIES: Mapping[int, list[int]] = MappingProxyType({})


def check(scheduler: Scheduler, step: EngineStep, config: EngineConfig) -> None:
    """Every token of a step has a place of its own; shared blocks are only read."""
    blocks = scheduler.blocks
    assert step.tokens <= config.token_budget and len(scheduler.running) <= config.max_batch
    holders = [*scheduler.running, *scheduler.parked, *scheduler.answered, *scheduler.prefixes]
    held = [block for holder in holders for block in holder.blocks]
    assert [held.count(block) for block in range(len(blocks.references))] == blocks.references
    written = [(owner.blocks[at // blocks.size], at % blocks.size) for owner, at in (
        [(s, s.cached) for s in step.decodes]
        + [(p.owner, at) for p in step.pieces for at in range(p.start, p.stop)]
    )]  # fmt: skip
    assert len(set(written)) == len(written)
    assert all(blocks.references[block] == 1 for block, _ in written)


def drawing(scheduler: Scheduler, step: EngineStep, known: set[Prefix]) -> list[Sequence]:
    """The samples that draw a token in a step; `known` gets the prefixes that it computes."""
    begun = [s for s in step.begun if len(s.tokens) == s.prompt_length]
    assert all(s.prefix in known for s in begun)
    known |= set(scheduler.computed(step))
    whole = [p.owner for p in step.pieces if not isinstance(p.owner, Prefix) and p.stop == len(p.owner.tokens)]
    return begun + step.decodes + whole


def play(
    config: EngineConfig, blocks: int, requests: list[Request], lengths: list[int], aborted: Collection[int] = (),
    slots: int = 0, replies: Mapping[int, list[int]] = NO_REPLIES,
) -> tuple[Scheduler, int]:  # fmt: skip
    """Run to the end: sample i ends after lengths[i] new tokens, or is aborted after half of them. (scheduler, steps).

    With replies[i] = [n, tokens, steps] sample i waits after n new tokens, so many steps, for a reply of so many
    tokens.
    """
    scheduler = Scheduler(config, BlockManager(blocks, config.block_size), slots)
    added = scheduler.add(requests, max(lengths))
    number = {id(sequence): i for i, sequence in enumerate(added)}
    known: set[Prefix] = set()
    steps = 0
    asked: dict[int, int] = {}
    while scheduler.has_work:
        for i in [i for i, since in asked.items() if since + replies[i][2] <= steps]:
            added[i].tokens += [2] * min(replies[i][1], lengths[i] - len(added[i].completion) - 1)
            scheduler.answer(added[i])
            del asked[i]
        step = scheduler.plan()
        assert not step.is_empty or scheduler.parked
        check(scheduler, step, config)
        steps += 1
        for sequence in drawing(scheduler, step, known):
            assert sequence.cached == len(sequence.tokens)
            sequence.tokens.append(1)
            i = number[id(sequence)]
            if i in replies and len(sequence.completion) == replies[i][0] < lengths[i]:
                scheduler.park(sequence)
                asked[i] = steps
            elif i in aborted and len(sequence.completion) >= lengths[i] / 2:
                scheduler.finish(sequence, "abort")
            elif len(sequence.completion) == lengths[i]:
                scheduler.finish(sequence, "stop")
        assert steps < 100_000
    assert scheduler.blocks.used == 0 and not scheduler.prefixes and len(scheduler.free_slots) == slots
    assert all(sequence.finish for sequence in added)
    return scheduler, steps


shapes = st.tuples(st.integers(1, 20), st.integers(1, 5))


@settings(max_examples=60)
@given(st.lists(shapes, min_size=1, max_size=12), st.integers(1, 8), st.integers(1, 9), st.integers(0, 30), st.data())
def test_every_sample_ends_whatever_the_memory(groups, size, batch, spare, data):
    config = EngineConfig(block_size=size, max_batch=batch, token_budget=batch + data.draw(st.integers(0, 9)))
    requests = [Request(i, (1,) * length, samples) for i, (length, samples) in enumerate(groups)]
    count = sum(samples for _, samples in groups)
    lengths = data.draw(st.lists(st.integers(1, 25), min_size=count, max_size=count))
    least = -(-(max(length for length, _ in groups) + max(lengths)) // size) + 1
    aborted = set(data.draw(st.lists(st.integers(0, count - 1), max_size=3)))
    some = st.tuples(st.integers(1, 12), st.integers(0, 12), st.integers(0, 9))
    replies = (
        data.draw(st.dictionaries(st.integers(0, count - 1), some, max_size=count)) if data.draw(st.booleans()) else {}
    )
    play(config, least + spare, requests, lengths, aborted, data.draw(st.sampled_from([0, 2 * batch])), replies)


def test_replies_that_have_no_room_take_it_from_the_sample_that_came_last():
    config = EngineConfig(block_size=2, max_batch=2, token_budget=8)
    requests = [Request(i, (1,)) for i in range(2)]
    scheduler, _ = play(config, 8, requests, [12, 12], replies={0: [6, 5, 0], 1: [6, 5, 0]})
    assert scheduler.preemptions > 0


@pytest.mark.parametrize("slots", [0, 4])
def test_samples_that_wait_for_replies_keep_nobody_from_beginning(slots):
    """12 samples, 2 at a time, each waiting 200 steps for a reply: they wait side by side, with states or without."""
    config = EngineConfig(block_size=4, max_batch=2, token_budget=16)
    requests = [Request(i, (1,) * 5) for i in range(12)]
    _, steps = play(config, 200, requests, [8] * 12, slots=slots, replies={i: [3, 2, 200] for i in range(12)})
    assert steps < 300


def test_ten_thousand_requests_with_aborts_leak_no_block():
    random = numpy.random.default_rng(0)
    requests = [Request(i, (1,) * int(n), 4) for i, n in enumerate(random.integers(1, 60, 2500))]
    lengths = random.integers(1, 40, 10_000).tolist()
    aborted = set(random.choice(10_000, 1500, replace=False).tolist())
    config = EngineConfig(block_size=16, max_batch=48, token_budget=256)
    scheduler, steps = play(config, 80, requests, lengths, aborted)
    assert scheduler.preemptions > 0


def test_places_are_filled_at_once_and_prompts_computed_once():
    random = numpy.random.default_rng(1)
    requests = [Request(i, (1,) * int(n), 8) for i, n in enumerate(random.integers(40, 140, 16))]
    lengths = numpy.clip(random.lognormal(4, 0.7, 128), 4, 300).astype(int).tolist()
    config = EngineConfig(block_size=32, max_batch=32, token_budget=256)
    scheduler, steps = play(config, 2000, requests, lengths)
    places = [0] * 32  # when each is free again, if a sample took it at once and a prompt cost nothing
    for length in lengths:
        heapq.heapreplace(places, places[0] + length)
    assert steps <= max(places) * 1.05


def test_noise_is_a_function_of_its_address():
    whole = uniforms(3, 11, 2, 0, 512)
    assert numpy.array_equal(uniforms(3, 11, 2, 256, 128), whole[256:384])
    others = [uniforms(*key, 0, 512) for key in ((4, 11, 2), (3, 12, 2), (3, 11, 3))]
    assert all(abs(numpy.corrcoef(whole, other)[0, 1]) < 0.2 for other in others)
    assert 0 <= whole.min() and whole.max() < 1 and abs(whole.mean() - 0.5) < 0.05
