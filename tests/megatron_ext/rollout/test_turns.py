"""Several turns: what a task replies stands in the sample, the model goes on from it, and nothing else changes."""

from math import isnan
from typing import Any

import pytest
import torch

from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rollout.engine import Engine
from megatron_ext.rollout.sequence import Answer, Request, Sequence, spans
from megatron_ext.rollout.settings import EngineConfig, Sampling
from tests.megatron_ext import tiny
from tests.megatron_ext.rollout.test_engine import CONFIGS, FAMILIES, PROMPTS, SMALL, STOP, full_logprobs

ENDS = ("h", "q")  # two of the tiny vocabulary's tokens, as `spell` writes them
SAMPLING = Sampling(max_tokens=24)


def spell(tokens: list[int]) -> str:
    return "".join(chr(97 + token) for token in tokens)


def tool(text: str) -> Answer:
    """Says up to five tokens, which depend on all that was said before; nothing after every third turn."""
    count = sum(text.count(end) for end in ENDS)
    return Answer(tuple(6 + (len(text) + 3 * i) % 12 for i in range(1 + len(text) % 5)) if count % 3 else ())


class Delayed:
    """Answers each turn after so many questions as its text's length says."""

    def __init__(self, answer: Any = tool, delay: int = 0):
        self.answer, self.delay, self.waiting, self.transcripts = answer, delay, [], []

    def ask(self, sequence: Sequence) -> None:
        self.transcripts.append(spell(sequence.completion))
        self.waiting.append([len(sequence.completion) % 4 * self.delay, sequence])

    def answers(self, wait: bool) -> list[tuple[Sequence, Answer]]:
        due = [one for one in self.waiting if one[0] <= 0]
        self.waiting = [[left - 1, sequence] for left, sequence in self.waiting if left > 0]
        return [(sequence, self.answer(spell(sequence.completion))) for _, sequence in due]


def requests(recorded: dict | None = None, samples: int = 3) -> list[Request]:
    recorded = recorded or {}
    return [
        Request(100 + i, prompt, samples, tuple(recorded.get((100 + i, n), ()) for n in range(samples)), turn_ends=ENDS)
        for i, prompt in enumerate(PROMPTS[:5])
    ]


def sampled(
    model: Any, wanted: list[Request], config: EngineConfig = SMALL, turns: Any = None, sampling: Sampling = SAMPLING,
    blocks: int | None = None, stop_ids: Any = (STOP,),
) -> dict[tuple[int, int], Sequence]:  # fmt: skip
    engine = Engine(model, config, 7, stop_ids, spell)
    if blocks:
        engine.runner.cache.blocks_in = lambda gib: blocks
    found = {(s.prefix.request.uid, s.sample): s for s in engine.generate(wanted, sampling, turns=turns or Delayed())}
    assert len(found) == sum(request.samples for request in wanted)
    scheduler = engine.scheduler
    assert scheduler.blocks.used == 0 and not (scheduler.prefixes or scheduler.parked or scheduler.answered)
    counts.update(engine.counts)
    return found


counts: dict[str, int] = {}


@pytest.fixture(params=FAMILIES)
def model(request, alone, tmp_path):
    return tiny.model(tiny.hf_folder(tmp_path / "hf", FAMILIES[request.param]), FAMILIES[request.param], ParallelPlan())


@pytest.fixture(params=["qwen2", *(pytest.param(name, marks=pytest.mark.soak) for name in ("gpt_oss", "nemotron_h"))])
def one_in_ci(request, alone, tmp_path):
    return tiny.model(tiny.hf_folder(tmp_path / "hf", FAMILIES[request.param]), FAMILIES[request.param], ParallelPlan())


@pytest.fixture
def qwen2(alone, tmp_path):
    return tiny.model(tiny.hf_folder(tmp_path / "hf"), tiny.DIMS, ParallelPlan())


def alike(a: Sequence, b: Sequence) -> None:
    near = next((i for i, margin in enumerate(a.margins) if margin < 1e-4), len(a.margins))
    assert a.completion[:near] == b.completion[:near]


def test_the_model_goes_on_from_replies_which_are_marked_and_counted(model):
    found = sampled(model, requests())
    replied = 0
    for sequence in found.values():
        own = torch.tensor([not isnan(value) for value in sequence.logprobs])
        assert len(sequence.logprobs) == len(sequence.completion) <= SAMPLING.max_tokens
        assert torch.allclose(torch.tensor(sequence.logprobs)[own], full_logprobs(model, sequence)[0][own], atol=1e-5)
        for span in spans(sequence.logprobs):
            if not span.own:
                replied += 1
                before = sequence.completion[: span.start]
                said = tool(spell(before)).tokens[: span.stop - span.start]
                assert (
                    spell(before)[-1] in (*ENDS, spell([STOP]))
                    and tuple(sequence.completion[span.start : span.stop]) == said
                )
    assert replied > 8


def test_samples_of_several_turns_are_the_same_in_any_batch_memory_and_delay(one_in_ci):
    expected = sampled(one_in_ci, requests())
    runs = [sampled(one_in_ci, requests(), config, Delayed(delay=delay)) for config, delay in zip(CONFIGS, (0, 1, 3))]
    runs.append(sampled(one_in_ci, requests(), blocks=16, turns=Delayed(delay=3)))
    assert counts["preemptions"] > 0
    for run in runs:
        for key, sequence in expected.items():
            alike(sequence, run[key])


def test_a_prefill_of_a_reply_shares_what_is_cached(qwen2):
    wanted = [Request(1, PROMPTS[4], 4, turn_ends=ENDS)]
    found = sampled(qwen2, wanted, EngineConfig(0.01, 4, 64, 512))
    # one that ends a sample is not computed
    turns = [span for s in found.values() for span in spans(s.logprobs)[:-1] if not span.own]
    said = sum(span.stop - span.start for span in turns)
    assert counts["prefilled"] == len(PROMPTS[4]) + said + len(turns)  # each with the token that ended the turn


def test_what_was_recorded_of_several_turns_is_gone_on_with_from_anywhere(one_in_ci):
    expected = sampled(one_in_ci, requests())
    for share in (0.2, 0.5, 0.9):
        recorded = {}
        for key, sequence in expected.items():
            cut = int(share * len(sequence.completion))
            waited = [span.start for span in spans(sequence.logprobs) if not span.own and span.start < cut < span.stop]
            cut = waited[0] if waited else cut  # a reply is recorded whole, or not at all
            recorded[key] = tuple(sequence.completion[:cut]), tuple(sequence.logprobs[:cut])
        found = sampled(one_in_ci, requests(recorded))
        for key, sequence in expected.items():
            assert found[key].completion == sequence.completion and found[key].finish == sequence.finish


def test_a_record_replies_as_the_task_did(qwen2):
    """What `logs --replay` draws again."""
    from megatron_ext.rl.journal import Entry
    from megatron_ext.rl.replay import AsRecorded

    for sampling in (SAMPLING, Sampling(max_tokens=24, max_turns=2)):
        for (uid, number), expected in sampled(qwen2, requests(), sampling=sampling).items():
            if number == 1:
                request = Request(uid, PROMPTS[uid - 100], 2, only=(1,), turn_ends=ENDS)
                record = AsRecorded(Entry(expected.completion, expected.logprobs, expected.finish))
                (found,) = Engine(qwen2, SMALL, 7, {STOP}, spell).generate([request], sampling, turns=record)
                alike(expected, found)
                assert found.finish == expected.finish


def test_how_a_sample_of_several_turns_ends(qwen2):
    def ends(answer: Any, **changes: Any) -> list[Sequence]:
        return list(
            sampled(
                qwen2, requests(), turns=Delayed(answer), sampling=Sampling(**{"max_tokens": 24, **changes})
            ).values()
        )

    spoken = lambda s: spell(s.completion)[-1] in ENDS  # noqa: E731
    over = ends(lambda text: Answer(None))
    assert all(
        (s.finish == "stop") == (spoken(s) or s.completion[-1] == STOP) and len(spans(s.logprobs)) == 1 for s in over
    )
    failed = ends(lambda text: Answer(None, "it broke"))
    assert {s.note for s in failed if s.finish == "abort"} == {"it broke"} and {s.finish for s in failed} <= {
        "abort",
        "length",
    }
    silent = ends(lambda text: Answer(()))  # nothing said ends a turn that the model ended by itself, and no other
    assert all((s.finish == "stop") == (s.completion[-1] == STOP) for s in silent) and any(spoken(s) for s in over)
    talking = ends(lambda text: Answer((7, 8)), max_tokens=40)
    assert any(STOP in s.completion[:-3] for s in talking)  # after an end token it may be answered too
    limited = ends(lambda text: Answer((7, 8)), max_turns=2)
    turns = [sum(span.own for span in spans(s.logprobs)) for s in limited]
    assert max(turns) == 2 and {s.finish for s in limited} == {"turns", "length"}
    assert all(s.finish == "length" or n == 2 for s, n in zip(limited, turns))
    long = ends(lambda text: Answer((7,) * 100))
    assert all(len(s.completion) == 24 and s.finish == "length" for s in long)


def test_a_stop_string_pauses_where_it_is_completed_and_not_again(qwen2):
    turns = Delayed(lambda text: Answer(()))
    found = sampled(qwen2, requests(), turns=turns, stop_ids=())
    asked = sum(spell(s.completion).count(end) for s in found.values() for end in ENDS)
    assert len(turns.transcripts) == asked > 20 and all(text[-1] in ENDS for text in turns.transcripts)
