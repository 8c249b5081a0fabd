"""What the rollouts' memory holds is known before there is a model, and is what the engine then finds."""

import pytest

from megatron_ext.models.registry import parse_config, read_config
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rollout.engine import Engine
from megatron_ext.rollout.room import check_room, room, room_notes
from megatron_ext.rollout.settings import EngineConfig
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
    assert found.samples == 5 and check_room(found, few) == []
    assert "warning: that is fewer than a group of 16" in room_notes(found, few, 16)[1]
    assert "fewer than max_batch 32" in room_notes(found, few, 64)[1]
    none = room(EngineConfig(0.3, 256), ParallelPlan(tensor=8), shape(QWEN_32B), "bfloat16", 12000)
    [problem] = check_room(none, EngineConfig(0.3, 256))
    assert "0.3 GiB hold 9,472 tokens of keys and values, and one sample needs 12,288" in str(problem)


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
