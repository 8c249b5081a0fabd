"""The same samples under every layout that training has."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rollout.engine import Engine
from megatron_ext.rollout.sequence import Answer, Request, Sequence
from megatron_ext.rollout.settings import Sampling
from tests.megatron_ext import tiny
from tests.megatron_ext.rollout.test_engine import FAMILIES, SMALL, STOP, requests

Found = dict[tuple[int, int], tuple[list[int], list[float], list[float]]]


def sampled(hf: Path, family: str, plan: ParallelPlan, max_batch: int = SMALL.max_batch) -> Found:
    """Completion, log-probs and margins of each sample this rank's replica makes: its share of the prompts."""
    with ranks.started(plan):
        from megatron.core import parallel_state

        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        model = tiny.model(hf, FAMILIES[family], plan)
        engine = Engine(model, replace(SMALL, max_batch=max_batch), seed=7, stop_ids={STOP})
        mine = requests()[rank::size]
        found = {
            (s.prefix.request.uid, s.sample): (s.completion, s.logprobs, s.margins)
            for s in engine.generate(mine, Sampling(max_tokens=9, top_p=0.95))
        }
        assert len(found) == sum(request.samples for request in mine)
        return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: tiny.hf_folder(tmp_path_factory.mktemp(name), of, seed=4) for name, of in FAMILIES.items()}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, Found]:
    return {name: sampled(hf, name, ParallelPlan()) for name, hf in folders.items()}


def same(found: list[Found], expected: Found) -> None:
    for key, (tokens, logprobs, margins) in expected.items():
        owners = [part[key] for part in found if key in part]
        assert owners
        near = next((i for i, margin in enumerate(margins) if margin < 1e-4), len(margins))
        for owner in owners:
            assert owner[0][:near] == tokens[:near]
            assert owner[1][:near] == pytest.approx(logprobs[:near], abs=1e-5)


SOAK = pytest.mark.soak
TWO = [
    pytest.param("qwen2", ParallelPlan(tensor=2), marks=SOAK),
    ("qwen2", ParallelPlan(tensor=2, sequence_parallel=True)),
    ("qwen2", ParallelPlan(pipeline=2)),
    ("qwen2", ParallelPlan()),  # two replicas
    ("gpt_oss", ParallelPlan(tensor=2, sequence_parallel=True)),
    ("gpt_oss", ParallelPlan(expert=2)),
    pytest.param("gpt_oss", ParallelPlan(pipeline=2), marks=SOAK),
    ("nemotron_h", ParallelPlan(tensor=2, sequence_parallel=True)),
    pytest.param("nemotron_h", ParallelPlan(expert=2), marks=SOAK),
    ("nemotron_h", ParallelPlan(pipeline=2)),
]


@pytest.mark.parametrize("family, plan", TWO)
def test_two_ranks_draw_the_samples_of_one(two_ranks, folders, expected, family, plan):
    same(two_ranks.run(sampled, hf=folders[family], family=family, plan=plan), expected[family])


def test_a_pass_over_nothing_leaves_recurrent_states_alone(two_ranks, folders, expected):
    """It is made for other ranks' experts, here where a prompt waits in the first slot for its next sample to begin."""
    found = two_ranks.run(
        sampled, hf=folders["nemotron_h"], family="nemotron_h", plan=ParallelPlan(expert=2), max_batch=1
    )
    same(found, expected["nemotron_h"])


class Slow:
    """Answers after a dozen questions; counts those where the engine had nothing else to do."""

    def __init__(self) -> None:
        self.asked, self.calls, self.waits = [], 0, 0

    def ask(self, sequence: Sequence) -> None:
        self.asked.append(sequence)

    def answers(self, wait: bool) -> list[tuple[Sequence, Answer]]:
        self.calls, self.waits = self.calls + 1, self.waits + wait
        return [(self.asked.pop(), Answer(None)) for _ in list(self.asked) if self.calls >= 12]


def waited(hf: Path, longest: tuple[int, int]) -> tuple[int, int]:
    """Questions, and those that were waited for, of replicas whose sample has so many tokens: all one turn, or one
    token that ends it."""
    plan = ParallelPlan(expert=2)
    with ranks.started(plan):
        from megatron.core import parallel_state

        most, turns = longest[parallel_state.get_data_parallel_rank()], Slow()
        model = tiny.model(hf, FAMILIES["gpt_oss"], plan)
        engine = Engine(model, SMALL, 7, stop_ids=range(100) if most == 1 else (), detokenize=str)
        request = Request(1, (3, 4), turn_ends=() if most == 1 else None)
        list(engine.generate([request], Sampling(max_tokens=40 if most == 1 else most), turns=turns))
        return turns.calls, turns.waits


def test_a_replica_that_waits_for_a_reply_does_not_hold_up_those_that_share_its_experts(two_ranks, folders):
    assert two_ranks.run(waited, hf=folders["gpt_oss"], longest=(30, 1)) == [(0, 0), (12, 0)]
    (_, one), (_, other) = two_ranks.run(waited, hf=folders["gpt_oss"], longest=(1, 1))
    assert one == other > 6


FOUR = [
    ("qwen2", ParallelPlan(tensor=2, pipeline=2)),
    ("qwen2", ParallelPlan(tensor=2)),  # with two replicas
    ("gpt_oss", ParallelPlan(tensor=2, sequence_parallel=True, expert=2)),
    ("nemotron_h", ParallelPlan(pipeline=2, expert=2)),
]


@pytest.mark.soak
@pytest.mark.parametrize("family, plan", FOUR)
def test_four_ranks_draw_the_samples_of_one(four_ranks, folders, expected, family, plan):
    same(four_ranks.run(sampled, hf=folders[family], family=family, plan=plan), expected[family])
