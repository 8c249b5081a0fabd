"""What the rollouts' memory holds is known before there is a model, and is what the engine then finds."""

import pytest

from megatron_ext.entrypoints import evaluate, generate, grpo
from megatron_ext.models.registry import parse_config, read_config
from megatron_ext.parallel.plan import ParallelPlan, Site
from megatron_ext.rollout.engine import Engine
from megatron_ext.rollout.room import check_room, room, room_notes
from megatron_ext.rollout.settings import EngineConfig, RolloutSettings, Sampling
from tests.launchers.test_parallel_plan import QWEN_32B
from tests.megatron_ext import tiny
from tests.megatron_ext.rollout.test_engine import FAMILIES

SEED = EngineConfig(kv_gib=20, block_size=256, max_batch=32)


def shape(config: dict):
    family, dims, problems = parse_config(config, "config.json")
    assert not problems
    return family.config.shape(dims)


def test_the_seed_of_grpo_holds_54_samples_a_replica():
    """20 GiB at 32 KiB a token and GPU."""
    found = room(SEED, ParallelPlan(tensor=8), shape(QWEN_32B), "bfloat16", 12000)
    assert found.samples == 54 and (found.blocks + 1) * found.block_size == 655_360
    assert room_notes(found, SEED, 16) == [
        "rollouts: 20 GiB a rank hold 655,104 tokens of keys and values: "
        "54 samples of 12,000 tokens at once"]  # fmt: skip
    assert room(SEED, ParallelPlan(tensor=8, pipeline=2), shape(QWEN_32B), "bfloat16", 12000).samples == 108
    uneven = ParallelPlan(tensor=8, pipeline=2, pipeline_layers=[16, 48])
    assert room(SEED, uneven, shape(QWEN_32B), "bfloat16", 12000).samples == 72  # of the stage that has the most


def test_less_than_a_group_is_told_and_less_than_a_sample_refused():
    few = EngineConfig(kv_gib=2, block_size=256, max_batch=32)
    found = room(few, ParallelPlan(tensor=8), shape(QWEN_32B), "bfloat16", 12000)
    assert found.samples == 5
    assert "warning: that is fewer than a group of 16" in room_notes(found, few, 16)[1]
    assert "fewer than max_batch 32" in room_notes(found, few, 64)[1]
    asked = RolloutSettings(engine=EngineConfig(0.3, 256), parallel=ParallelPlan(tensor=8))
    [problem] = check_room(asked, shape(QWEN_32B), "bfloat16", new=11999)
    assert "0.3 GiB hold 9,472 tokens of keys and values, and one sample needs 12,288" in str(problem)


KINDS = {
    "grpo": (grpo, lambda new: dict(steps=1, sampling=Sampling(max_tokens=new)), "sampling.max_tokens"),
    "generate": (generate, lambda new: dict(sampling=Sampling(max_tokens=new)), "sampling.max_tokens"),
    "evaluate": (evaluate, lambda new: dict(max_new_tokens=new), "max_new_tokens"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_that_samples_is_asked_for_room_before_it_queues(kind):
    entrypoint, settings, where = KINDS[kind]
    site = Site(8, gpus_per_node=8, forecasts={"model": {"hf_config": QWEN_32B}})

    def found(gib: float, new: int) -> list[str]:
        config = entrypoint.Config(
            model="model", parallel=ParallelPlan(tensor=8), engine=EngineConfig(gib, 256), **settings(new)
        )
        return [problem.where for problem in entrypoint.check(config, 8, site)]

    positions = QWEN_32B["max_position_embeddings"]
    enough, little = found(20, 11_999), found(0.3, 11_999)
    assert "engine.kv_gib" not in enough and where not in enough
    assert "engine.kv_gib" in little and where not in little
    assert where not in found(20, positions - 1) and where in found(20, positions)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forecast_is_what_the_engine_finds(alone, tmp_path, family):
    hf = tiny.hf_folder(tmp_path / "hf", FAMILIES[family])
    model = tiny.model(hf, FAMILIES[family], ParallelPlan())
    config = EngineConfig(kv_gib=0.01, block_size=4)
    engine = Engine(model, config, 0, ())
    found, dims, _ = read_config(hf)
    assert room(
        config, ParallelPlan(), found.config.shape(dims), dims.dtype, 9
    ).blocks == engine.runner.cache.blocks_in(0.01)
