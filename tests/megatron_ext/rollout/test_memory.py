"""What generate and evaluate need of a GPU, and what is refused for it; what kinds do with each parallel setting."""

import dataclasses
import re
from dataclasses import replace
from typing import Any

import pytest

from data_tools.mistake import Problem
from data_tools.tasks.mix import Entry, MixConfig
from jobs import kind
from megatron_ext.entrypoints import evaluate, generate, grpo, sft
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.models.qwen2.config import hf_config
from megatron_ext.parallel import rules
from megatron_ext.parallel.calibration import RESERVE, TILE
from megatron_ext.parallel.plan import ParallelPlan, Site
from megatron_ext.preflight.memory import Memory
from megatron_ext.rl.settings import GrpoSettings, Loss
from megatron_ext.rollout import memory
from megatron_ext.rollout.settings import EngineConfig, Sampling
from tests.megatron_ext import tiny
from tests.megatron_ext.rl.test_memory import LORA, SMALL, _with, training
from tests.megatron_ext.shapes import GPT_OSS_20B_CONFIG, NANO, QWEN_32B

MIX = MixConfig({"sums": Entry("calculator")})
CHOICES = MixConfig({"questions": Entry("mmlu", options={"answered_by": "likelihood"})})
ADAPTER = {"lora": dict(rank=4, alpha=8.0, targets=["all-linear", "experts", "router"])}
KNOWN = {"model": {"hf_config": GPT_OSS_20B_CONFIG}, "adapted": {"hf_config": GPT_OSS_20B_CONFIG, "adapter": ADAPTER}}


def on_gpus(gib: int, ranks: int = 1, forecasts: dict[str, Any] = KNOWN) -> Site:
    return Site(ranks, gpus_per_node=8, gpu_mem_gib=gib, forecasts=forecasts)


def for_memory(problems: list[Problem]) -> list[str]:
    return [problem.message for problem in problems if problem.message.startswith("needs")]


def test_each_component_is_what_counting_by_hand_gives():
    config = generate.Config(
        mix=MIX, samples=4, chunk=3, prompt_tokens=40, sampling=Sampling(max_tokens=30),
        engine=EngineConfig(kv_gib=1.0, block_size=4, max_batch=6, token_budget=16),
    )  # fmt: skip
    attention = 128 * 65 + 64 * 64 + 4 + 64 + 64
    experts = 4 * (3 * 64 * 32 + 2 * 32 + 64)
    parameters = 2 * (attention + 4 * 65 + experts + 64) + 2 * 100 * 64 + 64
    adapters = 2 * 2 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 4 * (64 + 64) + 4 * (32 + 64))
    a_layer = 4 * 64 + 2 * 128 + 2 * 64 + 4 * 4 + 4 * 64 + 2 * (2 * 64 + 6 * 32) + 8 * 4
    sampled = Memory(
        weights=2 * parameters, gradients=0, optimizer=0, activations=16 * a_layer, logits=28 * 6 * 100, exchange=0,
        kv_cache=(3 * 5 * 19 + 1) * 4 * 2 * (2 * 2 * 16) * 2,
    )  # fmt: skip
    assert sampled.reserve == RESERVE
    work = memory.Forward((generate.draws_of(config),))
    assert memory.needs(config, work, training(SMALL)) == {"samples": sampled}
    with_adapter = memory.needs(replace(config, base="mxfp4"), work, training(SMALL, LORA))["samples"]
    packed = 2 * 4 * 3 * 64 * 32
    assert with_adapter.weights == packed * 17 / 32 + 2 * (parameters - packed + adapters)
    assert with_adapter.dequantised == 2 * 64 * 64 + 10 * TILE and with_adapter.state == with_adapter.weights
    # Choices are compared in rows of token_budget tokens, without keys and values.
    both = memory.needs(config, replace(work, compares=True), training(SMALL))
    compared = replace(sampled, logits=16 * (10 * 100 + 4 * 64), kv_cache=0)
    assert both == {"samples": sampled, "likelihoods": compared}
    # No more is counted than there is to sample: two prompts, of which each has one sample.
    few = replace(config, chunk=2, samples=1, engine=replace(config.engine, max_batch=900, token_budget=10**6))
    drawn = memory.needs(few, memory.Forward((generate.draws_of(few),)), training(SMALL))["samples"]
    assert drawn.logits == 28 * 2 * 100 and drawn.activations == (2 + 2) * 70 * a_layer


def test_prompts_are_counted_as_far_as_the_entries_limit_them():
    def asked(**changes: Any) -> tuple[tuple[int, int], ...]:
        return generate.draws_of(generate.Config(**{"mix": MIX, "samples": 4, "chunk": 50} | changes)).asked

    limited = {name: Entry("calculator", limit=limit) for name, limit in (("a", 7), ("b", 9))}
    assert asked() == asked(mix=MixConfig({**limited, "c": Entry("calculator")})) == ((50, 4),)
    assert asked(mix=MixConfig(limited)) == ((16, 4),)
    assert asked(mix=MixConfig(limited, environments="file")) == ((50, 4),)
    work = evaluate._work(evaluate.Config(mix=MixConfig({**limited, **CHOICES.entries}), samples=3))
    assert work.compares and [draws.asked for draws in work.draws] == [((16, 1),), ((16, 3),)]
    assert evaluate._work(evaluate.Config(mix=CHOICES)) == memory.Forward((), compares=True)


def kinds(**settings: Any) -> dict[str, Any]:
    """Both kinds, with a completion of so many tokens; the check of each is its own."""
    new = settings.pop("new", 4000)
    return {
        "generate": (generate, generate.Config(mix=MIX, sampling=Sampling(max_tokens=new), **settings)),
        "evaluate": (evaluate, evaluate.Config(mix=MIX, max_new_tokens=new, **settings)),
        "choices": (evaluate, evaluate.Config(mix=CHOICES, max_new_tokens=new, **settings)),
    }


@pytest.mark.parametrize("name", ["generate", "evaluate", "choices"])
def test_plan_refuses_it_one_gpu_too_small_and_takes_what_the_refusal_offers(name):
    """gpt-oss-20b over GPUs of 16 to 80 GB, whatever the engine may use."""
    engines = (
        EngineConfig(),
        EngineConfig(kv_gib=70),
        EngineConfig(kv_gib=2, max_batch=4096, token_budget=4096),
        EngineConfig(token_budget=2**18),
    )
    refused = 0
    for gib, ranks, model in ((15, 1, "adapted"), (22, 2, "model"), (45, 1, "adapted"), (80, 1, "model")):
        for engine in engines:
            entrypoint, config = kinds(model=model, engine=engine, prompt_tokens=1000)[name]
            site = on_gpus(gib, ranks)
            for said in for_memory(entrypoint.check(config, ranks, site)):
                refused += 1
                remedy = re.fullmatch(r"needs .*GiB a GPU while it .*, and a GPU has [\d.]+: use (.*)", said)
                assert remedy, said
                for choice in remedy[1].split(" or "):
                    plan = re.fullmatch(r"(.*) on (\d+) GPUs \([\d.]+ GiB\)", choice)
                    if not plan:
                        mended, on = _with(config, re.sub(r"(?: together)? \([\d.]+ GiB\)$", "", choice)), ranks
                    else:
                        besides, _, degrees = plan[1].rpartition(" and ")
                        words = dict(part.split() for part in degrees.split(", ") if " " in part and "all" not in part)
                        parallel = ParallelPlan(**{word: int(value) for word, value in words.items()},
                                                sequence_parallel="sequence_parallel" in degrees)  # fmt: skip
                        mended, on = replace(_with(config, besides), parallel=parallel), int(plan[2])
                    assert not for_memory(entrypoint.check(mended, on, replace(site, ranks=on, nodes=-(-on // 8)))), (
                        said
                    )
    assert refused > 4


def test_the_edge_is_what_it_needs_and_nothing_is_refused_where_that_is_not_known():
    for name, (entrypoint, config) in kinds(model="model").items():
        (said,) = for_memory(entrypoint.check(config, 1, on_gpus(30)))
        assert {"choices": "while it compares choices"}.get(name, "while it samples") in said
        needed = float(re.match(r"needs ([\d.]+) ", said)[1])
        assert for_memory(entrypoint.check(config, 1, on_gpus(int(needed))))
        assert not for_memory(entrypoint.check(config, 1, on_gpus(int(needed) + 1)))
        for site in (on_gpus(30, forecasts={}), replace(on_gpus(30), gpus_per_node=None), Site(1, gpus_per_node=0),
                     replace(on_gpus(30), gpu_mem_gib=None)):  # fmt: skip
            assert not for_memory(entrypoint.check(config, 1, site))


# ---------------------------------------------------------------- what GRPO's check let through, and refused wrongly


def test_the_kl_terms_model_is_counted_as_large_as_it_is():
    shapes = {"small": hf_config(replace(tiny.DIMS, heads=4)), "model": GPT_OSS_20B_CONFIG}
    site = on_gpus(80, forecasts={name: {"hf_config": config} for name, config in shapes.items()})
    config = GrpoSettings(model="small", mix=MIX, prompts=1, group=2, prompt_tokens=9, sampling=Sampling(max_tokens=9),
                          loss=Loss(kl_beta=0.1), row_tokens=64)  # fmt: skip
    config.engine.kv_gib = 0.1
    assert not for_memory(grpo.check(config, 1, site)) and not for_memory(grpo.check(config, 1, on_gpus(30)))
    larger = replace(config, reference="model")
    (said,) = for_memory(grpo.check(larger, 1, replace(site, gpu_mem_gib=30)))
    assert re.match(r"needs 4\d\.\d GiB a GPU .*state 39", said)
    assert not for_memory(grpo.check(replace(larger, loss=Loss()), 1, replace(site, gpu_mem_gib=30)))
    plan = ParallelPlan(tensor=2)
    messages = [one.message for one in grpo.check(replace(larger, parallel=plan), 2, replace(site, ranks=2))]
    assert any(
        said.startswith("the KL term's model, model: a model with experts trains at tensor 2") for said in messages
    )


def test_no_more_samples_are_counted_than_a_step_has():
    """A pass of 4,096 samples has logits of 21 GiB; a step of 32 samples has none of these."""
    config = GrpoSettings(model="model", mix=MIX, prompts=2, group=16, prompt_tokens=100, lora=LoraConfig(4),
                          sampling=Sampling(max_tokens=100), parallel=ParallelPlan(recompute="full"),
                          engine=EngineConfig(max_batch=4096, token_budget=10**6))  # fmt: skip
    assert not for_memory(grpo.check(config, 1, on_gpus(50)))
    assert for_memory(grpo.check(replace(config, prompts=256), 1, on_gpus(50)))


def test_a_base_in_blocks_is_not_offered_to_a_backend_that_has_none():
    t = training(SMALL, LORA)
    assert memory.bases(ParallelPlan(), t) == ["", "mxfp4"]
    assert memory.bases(ParallelPlan(), replace(t, workload=replace(t.workload, backend="te"))) == [""]


def test_ranks_that_would_share_a_gpu_are_refused_by_every_kind_with_a_model():
    site = Site(4, nodes=2, gpus_per_node=1, gpu_mem_gib=80)
    configs = [(sft, sft.Config(steps=1)), (grpo, grpo.Config(mix=MIX)), *kinds().values()]
    for entrypoint, config in configs:
        messages = [one.message for one in entrypoint.check(config, 4, site)]
        said = (
            "2 ranks of a node have 1 GPU, and each needs its own: set resources.gpus_per_node 2, or ranks_per_node 1"
        )
        assert said in messages
        assert said not in [one.message for one in entrypoint.check(config, 4, replace(site, gpus_per_node=2))]


@pytest.mark.parametrize(
    "plan, ranks, shape",
    [
        (ParallelPlan(tensor=3), 3, QWEN_32B),
        (ParallelPlan(pipeline=5), 5, QWEN_32B),
        (ParallelPlan(pipeline=2, pipeline_layers=[1, 2]), 2, QWEN_32B),
        (ParallelPlan(expert=3), 3, NANO),
        (ParallelPlan(expert=2), 2, QWEN_32B),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_where_nothing_is_trained_too(plan, ranks, shape):
    asked = replace(training(shape, ranks=ranks).workload, pack_length=None)
    assert rules.check_forward(plan, asked) == rules.check(plan, asked) != []


@pytest.mark.parametrize("counts", [[24], [12, 6, 6], [10, 10], [24, 0]])
def test_stages_that_are_listed_wrongly_are_refused_without_a_traceback(counts):
    plan = ParallelPlan(pipeline=2, pipeline_layers=counts, recompute="full")
    config = GrpoSettings(model="model", mix=MIX, parallel=plan, prompt_tokens=9)
    assert grpo.check(config, 2, on_gpus(80, 2)) and grpo.parallel_report(config, on_gpus(80, 2), False)
    for entrypoint, other in kinds(model="model", parallel=replace(plan, recompute="none")).values():
        assert entrypoint.check(other, 2, on_gpus(80, 2))


# ---------------------------------------------------------------- each setting is used, or refused by name

PLAN = {  # a value of each that is legal by itself, and where it needs others these
    "tensor": dict(tensor=2),
    "sequence_parallel": dict(tensor=2, sequence_parallel=True),
    "pipeline": dict(pipeline=2),
    "virtual": dict(pipeline=2, virtual=2),
    "pipeline_layers": dict(pipeline=2, pipeline_layers=[1, 3]),
    "context": dict(context=2),
    "context_comm": dict(context=2, context_comm="a2a"),
    "expert": dict(expert=2),
    "expert_tensor": dict(tensor=2, expert_tensor=2, sequence_parallel=True),
    "micro_batch": dict(micro_batch=2),
    "recompute": dict(recompute="full"),
}
REFUSED = {  # the others are used
    "sft": set(),
    "grpo": {"virtual", "micro_batch"},
    "generate": {"virtual", "micro_batch", "recompute", "context_comm"},
    "evaluate": {"virtual", "micro_batch", "recompute", "context_comm"},
}


def test_every_kind_uses_each_parallel_setting_or_refuses_it_by_name():
    assert set(PLAN) == {field.name for field in dataclasses.fields(ParallelPlan)}
    found = {name: kind.find_kind(name).config for name in kind.kind_names()}
    with_plans = {name: of for name, of in found.items() if "parallel" in {f.name for f in dataclasses.fields(of)}}
    assert set(with_plans) == set(REFUSED)
    checks = {"sft": sft, "grpo": grpo, "generate": generate, "evaluate": evaluate}
    for name, config in with_plans.items():
        settings = dict(steps=1) if name == "sft" else dict(mix=MIX)
        for setting, values in PLAN.items():
            problems = checks[name].check(config(**settings, parallel=ParallelPlan(**values)), 2)
            own = [one for one in problems if one.where == f"parallel.{setting}"]
            assert bool(own) == (setting in REFUSED[name]), (name, setting, problems)
            assert all("use " in one.message for one in own)
    compares = evaluate.Config(mix=CHOICES, parallel=ParallelPlan(**PLAN["context_comm"]))
    assert not [one for one in evaluate.check(compares, 2) if one.where == "parallel.context_comm"]
