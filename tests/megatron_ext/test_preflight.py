"""What is known of a training before it queues, and what is refused."""

from dataclasses import replace

import numpy
import pytest

from data_tools.base import durable
from data_tools.packs import pack
from megatron_ext.entrypoints import grpo, import_hf, init_model, sft
from megatron_ext.models.qwen2.config import hf_config
from megatron_ext.parallel.calibration import GIB, GPUS
from megatron_ext.parallel.plan import ParallelPlan, Site, Workload
from megatron_ext.parallel.rules import is_legal
from megatron_ext.parallel.settings import ModelSettings
from megatron_ext.preflight import facts, refusals, search, tables
from megatron_ext.preflight.facts import Documents, Training
from megatron_ext.versions import planned
from tests.data_tools.test_pack import store_of
from tests.megatron_ext import tiny
from tests.megatron_ext.shapes import NANO


def test_what_upstream_phases_will_make_is_known_before_they_ran(tmp_path):
    """init_model -> import_hf -> sft and pack: heads, lengths and alignment are checked although no file is there."""
    checkpoint, model, packs = (str(tmp_path / name) for name in ("checkpoint", "model", "packs"))
    forecasts = {checkpoint: init_model.forecast(init_model.Config(heads=3, hidden=96, kv_groups=3))}
    forecasts[model] = import_hf.forecast(import_hf.Config(checkpoint), forecasts)
    forecasts[packs] = {"pack_length": 101, "align": 1}
    site = Site(2, forecasts=forecasts)
    plan = ParallelPlan(tensor=2, sequence_parallel=True)
    config = sft.Config(model=model, store="store", packs=packs, steps=1, parallel=plan)
    found = [problem.message for problem in sft.check(config, 2, site)]
    assert "2 does not split 3 heads and 3 KV groups evenly: use tensor 1" in found
    assert any(message.startswith("101 tokens do not divide by 2") for message in found)
    assert sft.forecast(config, site) == forecasts[model]  # a second fine-tuning behind it is checked too


@pytest.mark.parametrize("source, dtype, refused", [
    ("float16", "", True), ("bfloat16", "float16", True), ("float16", "bfloat16", False), ("float16", "float32", False),
    ("bfloat16", "", False), ("float32", "", False),
])  # fmt: skip
@pytest.mark.parametrize("phase", [sft, grpo])
def test_float16_is_not_trained_whoever_says_it(phase, source, dtype, refused, tmp_path):
    """Neither by the setting nor by the model folder, which is there already or only forecast."""
    said = hf_config(replace(tiny.DIMS, dtype=source))
    (tmp_path / "hf").mkdir()
    durable.write_json(tmp_path / "hf" / "config.json", said)
    for model, site in ((str(tmp_path), Site(1)), ("later", Site(1, forecasts={"later": {"hf_config": said}}))):
        found = [str(problem) for problem in phase.check(phase.Config(model=model, steps=1, dtype=dtype), 1, site)]
        assert refused == any(line.startswith("dtype: float16") and "set dtype: bfloat16" in line for line in found)


def test_the_documents_of_a_pack_plan_are_counted(tmp_path):
    model, out = tmp_path / "model", tmp_path / "packs"
    (model / "hf").mkdir(parents=True)
    durable.write_json(model / "hf" / "config.json", hf_config(tiny.DIMS))
    store = store_of(tmp_path / "store", [(20, 10), (10, 10), (30, 30), (4, 3)])
    out.mkdir()
    pack.pack(pack.Config(str(store), pack_length=64), out)
    training, problems = facts.prepare(ModelSettings(str(model), backend="torch"), str(out), 2, Site(1))
    assert problems == [] and training.dtype == "float32"
    assert training.workload.longest == 60 and training.workload.pack_length == 64
    lengths = numpy.array([30, 20, 60, 7])
    assert training.documents == Documents.of(lengths, packs=2, window=0)


def nano(ranks: int, length: int = 262_144) -> Training:
    workload = Workload(ranks, NANO, pack_length=length, align=4, global_batch=60)
    return Training(workload, Documents.one(length, 0), gpu=GPUS["h100"])


def test_openresearchers_plan_is_refused_with_its_memory_and_a_legal_one_offered():
    """TP 2, CP 2, EP 1, ETP 1 on 4 GPUs at 262,144 tokens: no room, and before 0.19 wrong expert gradients besides."""
    seed, site = ParallelPlan(tensor=2, context=2, sequence_parallel=True), Site(4, gpus_per_node=8, gpu="h100")
    found = [problem.message for problem in refusals.check(seed, nano(4), site)]
    wrong = any("gives wrong expert gradients without an error: use expert" in message for message in found)
    assert wrong is not planned().reduces_whole_experts
    assert found[-1].startswith("needs 499.9 GiB a GPU (state 258.6, activations 234.1, logits 3.3, other 4.0)")
    assert "and a GPU has 79.6: use " in found[-1] and "GPUs (" in found[-1]
    state = tables.report(seed, nano(4), site, searching=False)["facts"]["memory"]
    assert sum(state[name] for name in ("weights", "gradients", "optimizer")) == pytest.approx(258.5, abs=0.15)
    ranks, best = search.offer(seed, nano(4))
    assert is_legal(best.plan, Workload(ranks, NANO, 262_144, align=best.plan.document_unit(), global_batch=60))
    assert best.memory.total < GPUS["h100"].memory_gib * GIB


def test_a_running_rank_does_not_take_itself_for_a_cpu():
    """Experts split both ways need NCCL: refused where the profile has no GPUs, and not asked on the rank itself."""
    for gpus_per_node, gpus in ((None, None), (0, False), (8, True)):
        training, _ = facts.prepare(ModelSettings(backend="torch"), "", 1, Site(4, gpus_per_node=gpus_per_node))
        assert training.workload.gpus is gpus


def test_a_plan_that_fits_has_no_problem_and_an_unknown_gpu_refuses_nothing():
    fits = ParallelPlan(tensor=2, sequence_parallel=True, expert=8)
    work = replace(nano(8, 4096), workload=Workload(8, NANO, 4096, global_batch=64), gpu=GPUS["h200"])
    site = Site(8, gpus_per_node=8)
    refused_for_memory = [p for p in refusals.check(fits, work, site) if p.message.startswith("needs")]
    assert refused_for_memory == []
    huge = replace(work, gpu=None, workload=Workload(8, NANO, 2**20, global_batch=64))
    assert not [p for p in refusals.check(fits, huge, site) if p.message.startswith("needs")]
