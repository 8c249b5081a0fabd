"""Router replay: training sends each token to the experts that the rollout chose, also after a stop and over ranks."""

import json
from dataclasses import replace
from itertools import product

import numpy
import pytest
import torch

from megatron_ext.layers.router_replay import Routers
from megatron_ext.models.registry import unwrap
from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.parallel.shape import ModelShape
from megatron_ext.rl.rows import log_probs, rollout_rows, shares_of
from megatron_ext.rl.samples import Sample, batch_of
from megatron_ext.rl.settings import Advantage, Rewarding, check_routing
from megatron_ext.rollout.engine import Engine
from megatron_ext.rollout.sequence import Request
from megatron_ext.rollout.settings import EngineConfig, Sampling
from megatron_ext.training.update import AdamW, Trainer
from tests.megatron_ext import tiny
from tests.megatron_ext.rl import toy
from tests.megatron_ext.test_grpo import metrics, stop_and_go_on, texts, untimed

MANY = dict(experts=16, top_k=4)  # so that two of them are often as good
KINDS = {
    "qwen3_moe": replace(tiny.KINDS["qwen3_moe"], **MANY, dense=(False, False)),
    "gpt_oss": replace(tiny.GPT_OSS_DIMS, **MANY),
    "nemotron_h": tiny.hybrid("ME*E", **MANY),
}
REPLAYED = {"moe_enable_routing_replay": True}
SMALL = EngineConfig(kv_gib=0.01, block_size=4, max_batch=8, token_budget=32)  # samples lose their blocks and go on


def drawn(model, engine_config, prompts=6, group=4, tokens=40):
    engine = Engine(model, engine_config, 1, {5}, records_routing=True)
    random = numpy.random.default_rng(0)
    requests = [Request(k, tuple(random.integers(6, 19, 1 + k).tolist()), group) for k in range(prompts)]
    return [
        Sample(
            s.prefix.request.uid, s.sample, s.prefix.request.prompt, numpy.array(s.completion, numpy.int32),
            numpy.array(s.logprobs, numpy.float32), s.finish, reward=float(s.sample), routing=s.routing,
        )
        for s in engine.generate(requests, Sampling(max_tokens=tokens))
    ], engine.counts["preemptions"]  # fmt: skip


def batch(samples):
    rewarding = Rewarding(mask_truncated=False)
    return batch_of(samples, {s.item for s in samples}, Advantage(), rewarding, limit=40)


def took(model):
    """Return a list that gets, of each router's passes, which experts each token went to: bool [tokens, experts]."""
    seen = []
    for module in unwrap(model).modules():
        if getattr(module, "router_replay", None) is not None:
            module.register_forward_hook(lambda _, __, out: seen.append(out[1].clone()))
    return seen


def expected(routing, routers):
    """The same of rows [tokens, r]: a list by layer."""
    parts = torch.from_numpy(routing.astype(numpy.int64)).split(routers.top_k, dim=1)
    return [torch.zeros(len(routing), routers.experts, dtype=torch.bool).scatter_(1, part, True) for part in parts]


SHORT = [("gpt_oss", "full")]


@pytest.mark.parametrize("name, recompute", [
    pytest.param(*pair, marks=[] if pair in SHORT else [pytest.mark.soak]) for pair in product(KINDS, ("none", "full"))
])  # fmt: skip
def test_training_sends_tokens_where_the_rollout_did_and_its_log_probs_are_nearer(tmp_path, name, recompute):
    plan, of = ParallelPlan(recompute=recompute), KINDS[name]
    hf = tiny.hf_folder(tmp_path, of, seed=2)
    with ranks.started(plan):
        trainer = Trainer(tiny.parts(hf, of, plan, dtype=torch.bfloat16, options=REPLAYED), plan, AdamW())
        routers = Routers.of(trainer.model[0])
        samples, _ = drawn(trainer.model[0], SMALL)
        assert all(s.routed == (len(s.prompt) + s.length - 1, routers.width) for s in samples)
        shares = shares_of(batch(samples), plan, 64)
        mismatch = {}
        for replayed in (False, True):
            rows = shares.own_rows(1.0, True, routers if replayed else None)
            found = log_probs(trainer.model, rows)
            gaps = [(now - row.behaviour).double() for now, row in zip(found, rows)]
            mismatch[replayed] = (
                torch.cat([gap.exp() - 1 - gap for gap in gaps]).mean().item()
            )  # k3, as metrics have it
        seen, wanted = took(trainer.model[0]), []
        for row in rows:
            wanted += expected(row.routing.numpy(), routers) * (2 if recompute == "full" else 1)
        trainer.step(rows, 1e-3, lambda out, row: -(out[0] * row.advantage).sum())
    if name == "nemotron_h":  # whose rounding changes no choice here
        assert mismatch[True] <= mismatch[False], mismatch
    else:
        assert mismatch[True] < mismatch[False] / 4, mismatch
    assert len(seen) == len(wanted)
    assert sorted(map(_key, seen)) == sorted(map(_key, wanted))  # recomputation asks the last layer first
    print(f"{name}, recompute {recompute}: k3 {mismatch[False]:.2e} without, {mismatch[True]:.2e} with replay")


def _key(taken):
    return taken.numpy().tobytes()


def test_a_sample_that_lost_its_blocks_keeps_the_choice_that_its_log_probs_are_of(alone, tmp_path):
    of = KINDS["qwen3_moe"]
    model = tiny.parts(tiny.hf_folder(tmp_path, of, seed=2), of, ParallelPlan(), options=REPLAYED)[0]
    few = dict(prompts=3, group=3)
    tight, preempted = drawn(model, replace(SMALL, kv_gib=2e-5, max_batch=4), **few)
    roomy, none = drawn(model, EngineConfig(kv_gib=0.01), **few)
    assert preempted and not none
    by_key = {s.key: s for s in roomy}
    for sample in tight:
        assert sample.tokens.tolist() == by_key[sample.key].tokens.tolist()
        assert numpy.array_equal(numpy.sort(sample.routing), numpy.sort(by_key[sample.key].routing))  # fp32


def test_without_the_setting_nothing_is_recorded_and_rows_choose_for_themselves(alone, tmp_path):
    of = KINDS["qwen3_moe"]
    model = tiny.parts(tiny.hf_folder(tmp_path, of, seed=2), of, ParallelPlan())[0]
    sequences = list(Engine(model, SMALL, 1, {5}).generate([Request(0, (6, 7), 2)], Sampling(max_tokens=4)))
    assert all(sequence.routing is None for sequence in sequences)
    assert Routers.of(model).replays == ()
    sample = Sample(0, 0, (6,), numpy.array([7, 8], numpy.int32), numpy.zeros(2, numpy.float32), "stop", reward=1.0)
    other = replace(sample, number=1, reward=0.0)
    assert all(row.chosen is None for row in rollout_rows(batch([sample, other]), ParallelPlan(), 64, 1.0, True))


@pytest.mark.parametrize("known", [0, 1, 2])
def test_a_sample_whose_experts_are_not_all_recorded_is_not_trained_with_others(alone, known):
    recorded = numpy.zeros((known, 4), numpy.int16) if known else None
    tokens, logprobs = numpy.array([7, 8], numpy.int32), numpy.zeros(2, numpy.float32)
    samples = [Sample(0, k, (6,), tokens, logprobs, "stop", reward=float(k), routing=recorded) for k in (0, 1)]
    routers = Routers(("of layer 0", "of layer 1"), top_k=2, experts=4)
    shares = shares_of(batch(samples), ParallelPlan(), 64)
    if known == 2:  # of the last token no expert is asked
        (row,) = shares.own_rows(1.0, True, routers)
        assert not row.routing[:2].any()
        return
    with pytest.raises(ValueError, match=f"the experts of {known} of its 2 tokens are recorded"):
        shares.own_rows(1.0, True, routers)


@pytest.mark.parametrize("cell", ["EP2", pytest.param("DP2", marks=pytest.mark.soak)])
def test_a_replayed_run_stopped_in_mid_rollout_ends_as_the_uninterrupted_one_bit_for_bit(two_ranks, tmp_path, cell):
    """Samples and their routing come from the journal, and from the other rank."""
    hf, plan = (
        tiny.hf_folder(tmp_path / "hf", tiny.GPT_OSS_DIMS, seed=4),
        ParallelPlan(expert=2 if cell == "EP2" else 1),
    )
    arguments = dict(hf=hf, of=tiny.GPT_OSS_DIMS, plan=plan, steps=2, minibatches=2, refill_tries=1,
                     checkpoint_every=3, advantage=Advantage(scale="none"), routing_replay=True,
                     dealt=toy.to_the_last)  # fmt: skip
    whole = two_ranks.run(toy.trained, keep=tmp_path / "whole", **arguments)[0]
    found = stop_and_go_on(two_ranks, tmp_path / "cut", [9], **arguments)[0]
    assert found["digest"] == whole["digest"] and texts(tmp_path / "cut") == texts(tmp_path / "whole")
    assert untimed(metrics(tmp_path / "cut")) == untimed(metrics(tmp_path / "whole"))
    assert sum(line["samples_from_journal"] for line in metrics(tmp_path / "cut")) > 0
    lines = (tmp_path / "cut" / "rollouts").rglob("*.jsonl")
    assert any("routing" in json.loads(line) for path in lines for line in path.read_text().splitlines())


def test_it_is_refused_without_experts_and_where_rows_are_cut():
    dense = ModelShape(layers=(("attention", "mlp"),), hidden=32, vocabulary=19)
    config = toy.run_of(1, 0.1, routing_replay=True)
    assert ["no experts" in p.message for p in check_routing(config, dense)] == [True]
    cut = replace(config, parallel=ParallelPlan(tensor=2, sequence_parallel=True, pipeline=2, context=2))
    assert [p.message.split("parallel.")[1][:6] for p in check_routing(cut, replace(dense, experts=4))] == [
        "tensor", "pipeli", "contex",
    ]  # fmt: skip
    assert check_routing(config, replace(dense, experts=4)) == check_routing(toy.run_of(1, 0.1), dense) == []
