"""What GRPO needs of a GPU: each component by hand and of real tensors, and what is refused for it."""

import contextlib
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_tools.tasks.mix import Entry, MixConfig
from megatron_ext.entrypoints import grpo
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.parallel.calibration import GIB, RESERVE, TILE
from megatron_ext.parallel.parts import OURS
from megatron_ext.parallel.plan import ParallelPlan, Site, Workload
from megatron_ext.parallel.shape import ATTENTION, MOE, WINDOW, ModelShape
from megatron_ext.preflight.facts import Documents, Training
from megatron_ext.preflight.memory import Memory, block_activations
from megatron_ext.rl import memory
from megatron_ext.rl.settings import Evaluation, GrpoSettings, Loss
from megatron_ext.rollout.memory import DRAWN_BYTES, FILTERED_BYTES
from megatron_ext.rollout.settings import EngineConfig, Sampling
from tests.megatron_ext import adapted, tiny
from tests.megatron_ext.shapes import GPT_OSS_20B, GPT_OSS_20B_CONFIG, NANO, QWEN_32B
from tests.megatron_ext.test_attention import forward

SMALL = ModelShape(
    layers=((WINDOW, MOE), (ATTENTION, MOE)), hidden=64, vocabulary=100, heads=4, kv_groups=2, head_dim=16, window=8,
    sinks=True, qkv_bias=True, attention_output_bias=True, experts=4, top_k=2, expert_ffn=32, expert_bias=True,
)  # fmt: skip
TOKENS = 64
LORA = LoraConfig(rank=2, alpha=4, targets=["all-linear", "experts"])
ON_ONE = Site(1, gpus_per_node=1)


def settings(**changes: Any) -> GrpoSettings:
    engine = EngineConfig(kv_gib=1.0, block_size=4, max_batch=6, token_budget=16)
    asked = dict(prompts=3, group=4, prompt_tokens=40, sampling=Sampling(max_tokens=30), row_tokens=50, engine=engine)
    return GrpoSettings(**asked | changes)


def training(shape: ModelShape, lora: LoraConfig | None = None, ranks: int = 1, **known: Any) -> Training:
    work = Workload(ranks, shape, backend="torch", dtype="bfloat16")
    return Training(work, Documents.one(1, shape.window), lora=lora or LoraConfig(), gpus_per_node=8, **known)


def test_each_component_is_what_counting_by_hand_gives():
    attention = 128 * 65 + 64 * 64 + 4 + 64 + 64  # q, k, v with biases; o; sinks; o's bias; norm
    experts = 4 * (3 * 64 * 32 + 2 * 32 + 64)
    parameters = 2 * (attention + 4 * 65 + experts + 64) + 2 * 100 * 64 + 64
    adapters = 2 * 2 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 4 * (64 + 64) + 4 * (32 + 64))
    packed = 2 * 4 * 3 * 64 * 32
    longest = 40 + 30 - 1  # of a row: longer than row_tokens
    kept_attention = 4 * 64 + 2 * 128 + 2 * 64 + 4 * 4 + 4 * 2 * 2  # with what four As give
    kept_experts = 4 * 64 + 2 * (2 * 64 + 6 * 32) + 8 * 4 + 2 * 2 * 2 * 2  # two As of two experts
    update = Memory(
        weights=2 * (parameters + adapters),
        gradients=4 * adapters,
        optimizer=12 * adapters,
        activations=longest * 2 * (kept_attention + kept_experts),
        logits=longest * (10 * 100 + 4 * 64),
        exchange=0,
    )
    blocks = 3 * 5 * (18 + 1) + 1  # of 70 tokens, for 4 samples and their prompt; and one that is nobody's
    rollouts = replace(
        update,
        activations=16 * (kept_attention + kept_experts),
        logits=28 * 6 * 100,
        kv_cache=blocks * 4 * 2 * (2 * 2 * 16) * 2,
    )
    assert update.reserve == RESERVE
    of_blocks = dict(weights=packed * 17 / 32 + 2 * (parameters - packed + adapters))
    of_blocks["dequantised"] = 2 * 64 * 64 + 10 * TILE
    assert memory.needs(settings(lora=LORA), training(SMALL, LORA)) == {
        "": {"update": update, "rollouts": rollouts},
        "mxfp4": {"update": replace(update, **of_blocks), "rollouts": replace(rollouts, **of_blocks)},
    }
    full = memory.needs(settings(lora=LORA, parallel=ParallelPlan(recompute="full")), training(SMALL, LORA))
    assert full[""]["update"].activations == longest * (2 * 2 * 64 + kept_attention + kept_experts)


def test_settings_change_the_component_that_they_are_about():
    def of(lora: LoraConfig | None = None, shape: ModelShape = SMALL, **changes: Any) -> dict[str, Memory]:
        return memory.of_base(settings(lora=lora or LoraConfig(), **changes), training(shape, lora), "")

    plain = of()
    assert of(offload=True)["rollouts"].state == plain["rollouts"].weights == plain["update"].weights
    assert of(offload=True)["update"] == plain["update"]
    # The KL term's model is a second one, unless it is the one below new adapters.
    assert of(loss=Loss(kl_beta=0.1))["update"].weights == 2 * plain["update"].weights
    assert of(LORA, loss=Loss(kl_beta=0.1)) == of(LORA)
    assert of(LORA, loss=Loss(kl_beta=0.1), reference="it")["update"].weights == (
        of(LORA)["update"].weights + plain["update"].weights
    )
    # Rows: of row_tokens, and no longer than all samples of an update.
    per_token = plain["update"].activations / 69
    assert of(row_tokens=200)["update"].activations == 200 * per_token
    assert of(row_tokens=2000)["update"].activations == 12 * 69 * per_token
    assert of(row_tokens=2000, minibatches=4)["update"].activations == 3 * 69 * per_token
    # Where nothing says how long a prompt is, its shortest; keys and values are all that there is room for then.
    open_end = of(prompt_tokens=0)
    assert open_end["update"].activations == 50 * per_token
    assert open_end["rollouts"].kv_cache == GIB
    assert of(sampling=Sampling(max_tokens=30, top_p=0.9))["rollouts"].logits == 45 * 6 * 100
    held_out = MixConfig({"a": Entry(), "b": Entry(evaluation_only=True)})
    evaluated = of(mix=held_out, evaluation=Evaluation(every=1, prompts=9, samples=7))["rollouts"].kv_cache
    assert evaluated == (9 * 8 * 19 + 1) * 4 * 2 * (2 * 2 * 16) * 2


@pytest.mark.parametrize("phase", ["update", "rollouts"])
def test_it_is_refused_one_byte_over_what_the_gpu_has(phase, monkeypatch):
    monkeypatch.setattr(memory, "_remedy", lambda *_: "")
    config = settings(lora=LORA) if phase == "rollouts" else settings(lora=LORA, engine=replace(settings().engine,
                                                                      max_batch=1), row_tokens=800)  # fmt: skip
    needed = memory.of_base(config, training(SMALL, LORA), "")
    assert max(needed, key=lambda name: needed[name].total) == phase
    total = needed[phase].total
    assert memory.check(config, training(SMALL, LORA, memory_gib=total / GIB), ON_ONE) == []
    (problem,) = memory.check(config, training(SMALL, LORA, memory_gib=(total - 1) / GIB), ON_ONE)
    assert problem.where == "parallel"
    assert {"update": "in an update", "rollouts": "while it samples"}[phase] in problem.message
    assert memory.check(config, training(SMALL, LORA, memory_gib=1e-3), Site(1, gpus_per_node=0)) == []
    assert memory.check(config, training(SMALL, LORA), ON_ONE) == []  # nobody knows the GPU's memory


CASES = {  # shape, adapters, prompts and group, max_tokens, kv_gib
    "gpt-oss": (GPT_OSS_20B, LoraConfig(4, 8.0, targets=["all-linear", "experts", "router"]), 4000, 16.0),
    "qwen": (QWEN_32B, LoraConfig(16), 12000, 20.0),
    "nemotron": (NANO, LoraConfig(), 8000, 8.0),
}


SITUATIONS = [  # GiB of a GPU, ranks, prompt_tokens, whether all is recomputed
    (24, 1, 1000, True), (44.7, 8, 0, False), (79.6, 1, 0, True), (79.6, 8, 1000, False), (140.4, 1, 1000, True),
]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_remedy_that_is_offered_makes_it_fit(name):
    shape, lora, tokens, gib = CASES[name]
    kinds = set()
    for capacity, ranks, prompt, full in SITUATIONS:
        plan = ParallelPlan(recompute="full" if full else "none", expert=ranks if shape.experts else 1)
        config = GrpoSettings(prompts=4, group=16, prompt_tokens=prompt, lora=lora, parallel=plan)
        config.sampling.max_tokens, config.engine.kv_gib = tokens, gib
        t, site = training(shape, lora, ranks, memory_gib=capacity), Site(ranks, gpus_per_node=8)
        problems = memory.check(config, t, site)
        if not problems:
            continue
        said = re.fullmatch(r"needs .*GiB a GPU .*, and a GPU has [\d.]+: (.*)", problems[0].message)[1]
        kinds.add(said.split()[0] if said.startswith("nothing") else "plan" if " GPUs (" in said else "settings")
        for changed, on in _followed(said, config, t):
            assert memory.check(changed, on, replace(site, ranks=on.workload.ranks)) == [], said
    assert kinds, "nothing was refused"


def _followed(said: str, config: GrpoSettings, t: Training):
    """Yield what each remedy of a message asks for."""
    plan = re.fullmatch(r"use (.*) on (\d+) GPUs \([\d.]+ GiB\)", said)
    if said.startswith("nothing fits"):
        return
    if plan:
        besides, _, degrees_ = plan[1].rpartition(" and ")
        config = _with(config, besides)
        words = [part.partition(" ") for part in degrees_.split(", ") if part != "all degrees 1"]
        degrees: dict[str, Any] = {word: int(value) if value.isdigit() else value for word, _, value in words}
        degrees["sequence_parallel"] = "sequence_parallel" in degrees
        on = replace(t, workload=replace(t.workload, ranks=int(plan[2]), base=config.base))
        yield replace(config, parallel=ParallelPlan(**degrees)), on
        return
    for choice in said.removeprefix("use ").split(" or "):
        changed = _with(config, re.fullmatch(r"(.*?)(?: together)? \([\d.]+ GiB\)", choice)[1])
        yield changed, replace(t, workload=replace(t.workload, base=changed.base))


def _with(config: GrpoSettings, words: str) -> GrpoSettings:
    """The config with "offload true, engine.kv_gib 1"."""
    for name, value in (word.split() for word in words.split(", ") if word):
        above, _, name = name.rpartition(".")
        read = {"true": True, "mxfp4": "mxfp4", "full": "full"}.get(value) or (float if name == "kv_gib" else int)(
            value
        )
        config = replace(
            config, **({above: replace(getattr(config, above), **{name: read})} if above else {name: read})
        )
    return config


def test_plan_refuses_gpt_oss_20b_on_48_gb_and_takes_it_with_its_experts_as_blocks():
    lora = LoraConfig(rank=4, alpha=8, targets=["all-linear", "experts", "router"])
    config = GrpoSettings(model="model", prompts=4, group=16, prompt_tokens=1000, lora=lora, row_tokens=8192,
                          parallel=ParallelPlan(recompute="full"), sampling=Sampling(max_tokens=4000))  # fmt: skip
    config.engine.kv_gib, config.engine.max_batch = 16, 64

    def found(gib: int, base: str) -> list[str]:
        forecasts = {"model": {"hf_config": GPT_OSS_20B_CONFIG}}
        site = Site(1, gpus_per_node=1, gpu_mem_gib=gib, forecasts=forecasts)
        return [one.message for one in grpo.check(replace(config, base=base), 1, site) if "GiB" in one.message]

    (refused,) = found(45, "")
    # The last digit is another where Transformer Engine, whose gates are fused, is not installed.
    assert re.match(r"needs 60\.[345] GiB a GPU while it samples \(state 39\.7, ", refused)
    assert re.search(r"and a GPU has 45\.0: use base mxfp4 \(34\.[345] GiB\)$", refused)
    assert found(45, "mxfp4") == found(80, "") == found(141, "") == []
    shown = grpo.parallel_report(config, Site(1, forecasts={"model": {"hf_config": GPT_OSS_20B_CONFIG}}), False)
    totals = {base: {phase: of["total"] for phase, of in each.items()} for base, each in
              shown["facts"]["memory_by_base"].items()}  # fmt: skip
    assert totals["bfloat16"] == pytest.approx({"update": 46.2, "rollouts": 60.3}, abs=0.05)
    assert totals["mxfp4"] == pytest.approx({"update": 20.1, "rollouts": 34.3}, abs=0.05)
    (table,) = [each for each in shown["tables"] if each["title"].startswith("memory")]
    phases = ("update", "rollouts")
    assert table["columns"] == ["GiB", *(f"{phase}, base {base}" for base in totals for phase in phases)]
    assert "set prompt_tokens" not in "".join(shown["notes"])
    assert "samples of 5,000 tokens at once" in "".join(shown["notes"])
    open_end = replace(config, prompt_tokens=0)
    forecasts = {"model": {"hf_config": GPT_OSS_20B_CONFIG}}
    (note,) = [
        n for n in grpo.parallel_report(open_end, Site(1, forecasts=forecasts), False)["notes"] if "set prompt_tok" in n
    ]
    assert note.startswith("a prompt may be of 127,072 tokens, and make a longer row than is counted")


def test_evaluations_in_the_loop_are_counted_without_what_offload_takes_away_and_it_is(tmp_path):
    from megatron_ext.rl.step import GrpoStep

    events: list[Any] = []

    @contextlib.contextmanager
    def offloaded(wanted: bool):
        events.append(wanted)
        yield
        events.append("back")

    asked = settings(offload=True, evaluation=Evaluation(every=1))
    step = GrpoStep(SimpleNamespace(offloaded=offloaded), None, asked, tmp_path, reference=None, spell=None,
                    evaluate=lambda done: events.append(done) or {})  # fmt: skip
    watch = SimpleNamespace(move=lambda: None)
    step._evaluate_if_due(SimpleNamespace(done=1, steps=3, metrics=[], watch=watch))
    assert events == [True, 1, "back"]


# ---------------------------------------------------------------- beside real tensors


def shape_of(dims: Any) -> ModelShape:
    return tiny.family(dims).config.shape(dims)


@pytest.mark.parametrize("name", ["qwen2", "gpt_oss", "nemotron_h", "nanochat"])
@pytest.mark.parametrize("adapted_too", [False, True])
def test_state_and_cache_are_as_large_as_the_tensors(name, adapted_too, alone, tmp_path):
    from megatron_ext.rollout.engine import Engine
    from megatron_ext.rollout.sequence import Request
    from megatron_ext.training.rows import micro_batch
    from megatron_ext.training.update import AdamW, Trainer

    dims = adapted.FAMILIES[name]
    model = tiny.model(tiny.hf_folder(tmp_path / "hf", dims), dims, ParallelPlan())
    lora = adapted.lora(dims) if adapted_too else LoraConfig()
    if adapted_too:
        adapted.attach(model, dims, lora)
    trainer = Trainer(model, ParallelPlan(), AdamW())
    trainer.step([micro_batch([tiny.pack([9, 7], seed=1)])], 1e-3)
    config = settings(lora=lora)
    on = replace(training(shape_of(dims), lora), dtype="float32")
    counted = memory.of_base(config, on, "")

    parameters = list(trainer.model[0].parameters())
    assert counted["update"].weights == sum(p.nbytes for p in parameters)
    assert counted["update"].gradients == sum(p.main_grad.nbytes for p in parameters if p.requires_grad)
    moments = [
        value
        for part in trainer.optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.dim()
    ]
    assert counted["update"].optimizer == sum(moment.nbytes for moment in moments)

    engine = Engine(trainer.model[0], config.engine, seed=0, stop_ids=())
    asked = [Request(k, tuple(range(1, 11)) * 4, config.group) for k in range(config.prompts)]
    blocks = engine._blocks(asked, config.sampling)
    cache = engine.runner.cache
    cache.allocate(len(blocks.references), 2 * config.engine.max_batch if cache.mixers else 0)
    held = [*cache.keys.values(), *cache.values.values(), *(part for state in cache.states.values() for part in state)]
    assert counted["rollouts"].kv_cache == sum(tensor.nbytes for tensor in held)


WIDTHS = (64, 128)
GATED = {
    "qwen2": lambda ffn: replace(tiny.DIMS, ffn=ffn),
    "qwen3_moe": lambda ffn: replace(tiny.KINDS["qwen3_moe"], dense=(False, False), expert_ffn=ffn),
    "gpt_oss": lambda ffn: replace(tiny.GPT_OSS_DIMS, ffn=ffn),
}


def kept(dims: Any) -> float:
    """The bytes a token that a forward pass keeps for backward, in bf16, weights left out."""
    stored: dict[int, torch.Tensor] = {}

    def store(tensor: torch.Tensor) -> torch.Tensor:
        stored[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    (model,) = tiny.family(dims).build(dims, ParallelPlan(), torch.bfloat16, OURS)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
        out = forward(model, tiny.pack([TOKENS], seed=0), torch.randint(3, 19, (1, TOKENS)))
    assert out[0].requires_grad
    return sum(t.untyped_storage().nbytes() for at, t in stored.items() if at not in weights) / TOKENS


@pytest.mark.parametrize("name", GATED)
def test_gates_and_experts_of_ours_keep_what_is_counted(name, alone):
    """What grows with their width is theirs: of each token, over all layers."""
    made = [GATED[name](width) for width in WIDTHS]
    counted = [
        sum(block_activations(shape, kind, ParallelPlan(), fused=False) * count for kind, count in shape.blocks.items())
        for shape in map(shape_of, made)
    ]
    assert kept(made[1]) - kept(made[0]) == pytest.approx(counted[1] - counted[0])


class Alive(TorchDispatchMode):
    """Tells the most bytes that tensors made inside had at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.made = 0, dict[int, tuple[StorageWeakRef, int]]()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for held, size in self.made.values() if not held.expired()))
        return out


@pytest.mark.parametrize(
    "sampling, each",
    [
        (Sampling(), DRAWN_BYTES),
        (Sampling(temperature=0.7), DRAWN_BYTES),
        (Sampling(temperature=0.0), DRAWN_BYTES),
        (Sampling(top_p=0.9, top_k=50), FILTERED_BYTES),
    ],
)
def test_drawing_takes_no_more_a_logit_than_is_counted(sampling, each):
    from megatron_ext.rollout.sampler import Vocabulary, draw

    samples, rows = 4, 50_000
    logits = torch.randn(samples, rows).bfloat16()
    with Alive() as alive:
        draw(logits, torch.rand(samples, dtype=torch.float64), sampling, Vocabulary())
    # Besides logits in bf16 twice, and the tables by which filters find a digit. The running sum casts its weights to
    # fp64 out of sight.
    tables = 3 * 8 * 2**11 / rows if sampling.is_filtered else 0
    assert 0.4 * each < 4 + alive.peak / samples / rows <= each + tables + 0.1
