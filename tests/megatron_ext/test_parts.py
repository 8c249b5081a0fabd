"""Backend auto, te and torch: whose each part of a layer is, on which machine, for which model, and why."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_ext.entrypoints import evaluate, generate, grpo, sft
from megatron_ext.parallel import parts
from megatron_ext.parallel.calibration import GPUS
from megatron_ext.parallel.machine import PINNED, Machine, numbers
from megatron_ext.parallel.parts import LIMITS, OURS, Needs, Parts, choose, kernel_is_missing
from megatron_ext.parallel.plan import ParallelPlan, Site, Workload
from megatron_ext.parallel.rules import OF_PARTS, check, check_forward
from megatron_ext.parallel.shape import ModelShape
from megatron_ext.preflight import facts, memory
from megatron_ext.preflight.facts import Documents, Training
from megatron_ext.training import options
from megatron_ext.training.options import Engine
from tests.megatron_ext import tiny
from tests.megatron_ext.shapes import GPT_OSS_20B, NANO, QWEN_32B

INSTALLED = dict(transformer_engine="2.11.0", mamba_ssm="2.2.6.post3", causal_conv1d="1.5.3.post1")
CPU = Machine()
H100 = Machine("NVIDIA H100", (9, 0), 91002, **INSTALLED)
H100_ALONE = Machine("NVIDIA H100", (9, 0), 91002)  # nothing but torch
H100_FLASH = replace(H100, flash_attn="2.8.3")
H100_TE_LATER = replace(H100, transformer_engine="2.15.0", cudnn=91801)
A100 = replace(H100, gpu="NVIDIA A100", capability=(8, 0))
A100_FLASH = replace(A100, flash_attn="2.8.3")
B200 = replace(H100, gpu="NVIDIA B200", capability=(10, 0))
RTX = replace(H100, gpu="RTX PRO 6000", capability=(12, 0))

NANOCHAT = replace(QWEN_32B, learned_norms=False)
WIDE_HEADS = replace(QWEN_32B, head_dim=256)
ODD_HEADS = replace(QWEN_32B, head_dim=100)

TE, SSM = Parts("te", "te", "te", "te"), "mamba_ssm"
OWN_ATTENTION, OWN_NORM = replace(TE, attention="torch"), replace(TE, norm="torch")
HYBRID = replace(TE, mamba=SSM)  # mamba-ssm's kernels too


def cp(comm: str, size: int = 2, **others: int) -> ParallelPlan:
    return ParallelPlan(context=size, context_comm=comm, **others)


# machine, model, plan, dtype: the parts that auto chooses, and a word of the reason for attention's (or another's)
TABLE = {
    "a CPU": (CPU, QWEN_32B, None, "", OURS, "attention", "no GPU"),
    "a CPU with Transformer Engine": (replace(CPU, **INSTALLED), NANO, None, "", OURS, "mamba", "no GPU"),
    "nothing known": (None, QWEN_32B, None, "", OURS, "attention", "nothing is known"),
    "a GPU alone": (H100_ALONE, NANO, None, "bfloat16", OURS, "linear", "not installed"),
    "dense": (H100, QWEN_32B, None, "bfloat16", TE, "attention", "Transformer Engine 2.11"),
    "hybrid": (H100, NANO, None, "bfloat16", HYBRID, "mamba", "mamba-ssm"),
    "hybrid without mamba_ssm": (replace(H100, mamba_ssm=""), NANO, None, "bfloat16", TE, "mamba", "mamba-ssm is not"),
    "hybrid in float32": (H100, NANO, None, "float32", Parts(norm="te"), "mamba", "TF32"),
    "sinks": (H100, GPT_OSS_20B, None, "bfloat16", OWN_ATTENTION, "attention", "no kernel"),
    "sinks, later release": (H100_TE_LATER, GPT_OSS_20B, None, "bfloat16", TE, "attention", "2.15"),
    "sinks, later release, cuDNN not": (replace(H100_TE_LATER, cudnn=91002), GPT_OSS_20B, None, "bfloat16",
                                        OWN_ATTENTION, "attention", "cuDNN 9.18"),
    "norms without weights": (H100, NANOCHAT, None, "bfloat16", OWN_NORM, "norm", "weights"),
    "A100": (A100, QWEN_32B, None, "bfloat16", OWN_ATTENTION, "attention", "8.0 without flash"),
    "A100 with flash-attn": (A100_FLASH, QWEN_32B, None, "bfloat16", TE, "attention", "Transformer Engine"),
    "B200": (B200, QWEN_32B, None, "bfloat16", TE, "attention", "Transformer Engine 2.11"),
    "consumer Blackwell": (RTX, QWEN_32B, None, "bfloat16", OWN_ATTENTION, "attention", "12.0"),
    "old cuDNN": (replace(H100, cudnn=90500), QWEN_32B, None, "bfloat16", OWN_ATTENTION,
                  "attention", "cuDNN than 90500"),
    "faulty cuDNN": (replace(B200, cudnn=91000), QWEN_32B, None, "bfloat16", OWN_ATTENTION, "attention", "91000"),
    "B200 with Hopper's cuDNN": (replace(B200, cudnn=90600), QWEN_32B, None, "bfloat16", OWN_ATTENTION, "attention",
                                 "90600"),
    "sinks, later release, A100": (replace(H100_TE_LATER, capability=(8, 0), flash_attn="2.8.3"), GPT_OSS_20B, None,
                                   "bfloat16", OWN_ATTENTION, "attention", "8.0"),
    "heads of 256 on Hopper": (H100, WIDE_HEADS, None, "bfloat16", TE, "attention", "Transformer Engine 2.11"),
    "heads of 256 on Blackwell": (B200, WIDE_HEADS, None, "bfloat16", OWN_ATTENTION, "attention",
                                  "heads of 256"),
    "heads of 100": (H100_FLASH, ODD_HEADS, None, "bfloat16", OWN_ATTENTION, "attention",
                     "multiples of 8"),
    "float32": (H100_FLASH, QWEN_32B, None, "float32", Parts(norm="te"), "linear", "TF32"),
    "p2p": (H100, QWEN_32B, cp("p2p"), "bfloat16", TE, "attention", "Transformer Engine 2.11"),
    "all_gather": (H100, QWEN_32B, cp("all_gather"), "bfloat16", OWN_ATTENTION, "attention",
                   "no all_gather"),
    "a2a": (H100, QWEN_32B, cp("a2a"), "bfloat16", TE, "attention", "Transformer Engine 2.11"),
    "a2a, KV groups do not split": (H100, NANO, cp("a2a", 4), "bfloat16", replace(OWN_ATTENTION, mamba=SSM),
                                    "attention", "KV groups"),
    "windows under p2p": (H100_TE_LATER, GPT_OSS_20B, cp("p2p"), "bfloat16", OWN_ATTENTION,
                          "attention", "no sliding windows"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_auto_chooses_each_part_and_says_why(case):
    machine, shape, plan, dtype, chosen, part, word = TABLE[case]
    choice = choose("auto", Needs(machine, shape, plan, dtype))
    assert choice.parts == chosen
    assert word in choice.reasons[part], choice.reasons
    assert all(reason and "\n" not in reason for reason in choice.reasons.values())


def test_every_limit_decides_some_case():
    """Without any one of them, a case of the table comes out otherwise."""

    def table() -> dict[str, Parts]:
        return {case: choose("auto", Needs(*TABLE[case][:4])).parts for case in TABLE}

    whole = table()
    assert whole == {case: row[4] for case, row in TABLE.items()}
    for part, limits in LIMITS.items():
        for taken in limits:
            LIMITS[part] = tuple(one for one in limits if one is not taken)
            try:
                assert table() != whole, taken.__name__
            finally:
                LIMITS[part] = limits


def test_torch_is_all_ours_and_te_all_transformer_engines():
    for machine in (None, CPU, H100, A100):
        for shape in (None, QWEN_32B, GPT_OSS_20B, NANO, NANOCHAT):
            needs = Needs(machine, shape, cp("all_gather"), "float32")
            assert choose("torch", needs).parts == OURS
            assert replace(choose("te", needs).parts, mamba="torch") == TE


def test_parts_that_a_model_does_not_have_are_not_spoken_of():
    assert list(choose("auto", Needs(H100, QWEN_32B)).reasons) == ["attention", "linear", "norm"]
    assert list(choose("auto", Needs(H100, NANO)).reasons) == ["attention", "linear", "norm", "experts", "mamba"]
    only_mamba = replace(NANO, layers=(("mamba",),), heads=0)
    assert list(choose("auto", Needs(H100, only_mamba)).reasons) == ["linear", "norm", "mamba"]


# What te would have to mix is refused, each with a remedy; auto never is, but for a plan that only te can carry out.
REFUSED = {
    "sinks": (H100, GPT_OSS_20B, ParallelPlan(expert=2), "bfloat16", "no kernel", "use backend auto"),
    "norms without weights": (H100, NANOCHAT, ParallelPlan(), "bfloat16", "norms without weights", "use backend auto"),
    "A100": (A100, QWEN_32B, ParallelPlan(), "bfloat16", "8.0 without flash-attn", "use backend auto"),
    "float32": (H100, QWEN_32B, ParallelPlan(), "float32", "square of a pack", "use backend auto"),
    "all_gather": (H100, QWEN_32B, cp("all_gather"), "bfloat16", "no all_gather", "use context_comm p2p"),
    "not installed": (H100_ALONE, QWEN_32B, ParallelPlan(), "bfloat16", "not installed", "use backend auto"),
    "a CPU": (CPU, QWEN_32B, ParallelPlan(), "bfloat16", "not installed", "use backend auto"),
}


@pytest.mark.parametrize("checked", [check, check_forward])
@pytest.mark.parametrize("case", REFUSED)
def test_te_refuses_to_be_mixed_in_one_line_with_a_remedy(case, checked):
    machine, shape, plan, dtype, said, remedy = REFUSED[case]
    asked = Workload(2, shape, backend="te", machine=machine, dtype=dtype)
    first = checked(plan, asked)[0]
    assert said in first.message and first.message.endswith(remedy) and "\n" not in first.message
    assert first.where == ("backend" if "backend" in remedy else "parallel.context_comm")
    assert checked(plan, replace(asked, backend="auto")) == [] == checked(plan, replace(asked, backend="torch"))


def test_auto_refuses_the_ring_where_attention_is_ours():
    asked = Workload(2, QWEN_32B, backend="auto", dtype="bfloat16")
    assert check(cp("p2p"), replace(asked, machine=H100)) == []
    for machine, why in ((CPU, "no GPU"), (A100, "8.0"), (H100_ALONE, "not installed")):
        (problem,) = check(cp("p2p"), replace(asked, machine=machine))
        assert why in problem.message and problem.message.endswith("use context_comm all_gather")
    assert check(cp("p2p"), asked) == []  # a phase about to start asks again when its device is ready


def test_a_phase_that_trains_nothing_is_asked_no_more_than_before():
    """Of the model's shape it is asked what its layers are made of, and nothing of its training."""
    plan = ParallelPlan(tensor=2)
    asked = Workload(2, NANO, backend="auto", machine=H100, dtype="bfloat16")
    assert check(plan, asked) and check_forward(plan, asked) == []
    assert check_forward(ParallelPlan(tensor=3), asked)[0].message.startswith("2 ranks do not divide")


def test_every_limit_is_a_rule_of_te():
    of_limits = {parts.te_is_installed, *(one for limits in LIMITS.values() for one in limits)}
    names = {one.broken.__name__ for one in OF_PARTS}
    ours = {"te_runs_on_gpus", "context_communication_is_known_to_attention", "base_has_blocks", "base_is_held_by_ours"}
    assert names == {one.__name__ for one in of_limits} | ours


def test_types_of_gpus_have_their_compute_capability():
    assert {name: gpu.capability for name, gpu in GPUS.items()} == {
        "a100": (8, 0), "h100": (9, 0), "h200": (9, 0), "b200": (10, 0),
    }  # fmt: skip


@pytest.mark.parametrize("release, found", [("2.11.0", (2, 11)), ("2.15.0.dev0+abc", (2, 15)), ("2.9", (2, 9))])
def test_releases_are_compared_by_number(release, found):
    assert numbers(release) == found


# ---------------------------------------------------------------- phases, before and when they start

H100_SITE = Site(2, gpus_per_node=2, gpu="h100")
PHASES = {
    "sft": (sft, dict(store="s", packs="p", steps=1)),
    "grpo": (grpo, dict(steps=1)),
    "evaluate": (evaluate, {}),
    "generate": (generate, {}),
}


def site_with(of: Any, site: Site = H100_SITE) -> Site:
    """A site whose folder "model" will be a model of these dimensions."""
    return replace(site, forecasts={"model": {"hf_config": tiny.family(of).config.hf_config(of)}})


REFUSED_MODELS = {"no kernel for attention sinks": tiny.GPT_OSS_DIMS, "norms without weights": tiny.NANOCHAT_DIMS}


@pytest.mark.parametrize("said", REFUSED_MODELS)
@pytest.mark.parametrize("name", PHASES)
def test_every_kind_of_phase_refuses_te_where_a_part_cannot_be(name, said):
    entrypoint, settings = PHASES[name]
    site = site_with(replace(REFUSED_MODELS[said], dtype="bfloat16"))

    def found(backend: str) -> list[str]:
        config = entrypoint.Config(model="model", backend=backend, parallel=ParallelPlan(expert=2), **settings)
        return [str(problem) for problem in entrypoint.check(config, 2, site) if problem.where == "backend"]

    assert len(found("te")) == 1 and said in found("te")[0] and found("te")[0].endswith("use backend auto")
    assert found("auto") == [] == found("torch")


def test_plan_takes_the_gpu_from_the_profile_and_says_what_it_assumes(monkeypatch):
    monkeypatch.setattr(facts, "installed", Machine)
    machine, assumed = facts.planned_machine("auto", H100_SITE)
    assert machine == Machine("h100", (9, 0)) and "none of these" in assumed[-1]
    machine, assumed = facts.planned_machine("te", Site(2, gpus_per_node=2))
    assert machine == Machine("a GPU", transformer_engine=PINNED.transformer_engine)
    assert len(assumed) == 3 and "taken for an H100" in assumed[0] and "taken to be there" in assumed[1]
    monkeypatch.setattr(facts, "installed", lambda: Machine(transformer_engine="2.11.0"))
    assert facts.planned_machine("te", H100_SITE)[1] == [
        "nodes have the packages that are installed here: transformer_engine 2.11.0"
    ]
    assert facts.planned_machine("te", Site(2, gpus_per_node=0)) == (Machine(transformer_engine="2.11.0"), [])
    assert facts.planned_machine("te", Site(2)) == (None, [])


def test_memory_follows_the_linear_layers():
    """Ours keep the activated gate and a copy of up, 2 bytes a column each; models without a gate keep the same."""

    def activations(shape: ModelShape, machine: Machine | None) -> float:
        workload = Workload(8, shape, pack_length=4096, global_batch=8, backend="auto", machine=machine)
        training = Training(workload, Documents.one(4096, 0))
        return memory.memory(ParallelPlan(tensor=8, sequence_parallel=True), training).activations

    more = activations(QWEN_32B, H100_ALONE) - activations(QWEN_32B, H100)
    assert more == 4096 * 64 * 4 * QWEN_32B.ffn / 8
    assert activations(QWEN_32B, None) == activations(QWEN_32B, H100)
    assert activations(NANO, H100_ALONE) == activations(NANO, H100)


FLASH = {  # machine, head size: whether Transformer Engine takes its flash-attn (backends.py, get_attention_backend)
    "the newest": (A100_FLASH, 128, True),
    "an old one": (replace(A100_FLASH, flash_attn="2.1.1"), 128, True),
    "a later build": (replace(A100_FLASH, flash_attn="2.8.3.post1"), 128, False),
    "a local build": (replace(A100_FLASH, flash_attn="2.8.3+cu12torch2.8"), 128, False),
    "a newer one": (replace(A100_FLASH, flash_attn="2.9.0"), 128, False),
    "too old": (replace(A100_FLASH, flash_attn="2.0.9"), 128, False),
    "too old for Blackwell": (replace(B200, flash_attn="2.7.2.post1"), 192, False),
    "Blackwell": (replace(B200, flash_attn="2.7.4.post1"), 256, True),
    "wide heads": (A100_FLASH, 256, True),
    "wide heads on a smaller chip": (replace(A100_FLASH, capability=(8, 9)), 256, False),
    "none": (A100, 128, False),
}


@pytest.mark.parametrize("name", FLASH)
def test_only_flash_attn_that_transformer_engine_takes_counts(name):
    machine, head, taken = FLASH[name]
    needs = Needs(machine, replace(QWEN_32B, head_dim=head), None, "bfloat16")
    assert (choose("auto", needs).parts.attention == "te") is taken
    assert (kernel_is_missing("flash", needs) == "") is taken


@pytest.mark.parametrize(
    "machine, kernel, word",
    [
        (H100, "flash", "without flash-attn"),
        (H100, "fused", ""),
        (H100_FLASH, "flash", ""),
        (A100_FLASH, "flash", ""),
        (A100_FLASH, "fused", "not on compute capability 8.0): use auto"),
        (A100_FLASH, "auto", ""),
        (A100_FLASH, "unfused", ""),
    ],
)
def test_a_kernel_that_is_asked_for_by_name_is_there_or_refused(machine, kernel, word):
    problems = options.check(Engine(attention=kernel), TE, Needs(machine, QWEN_32B, None, "bfloat16"))
    assert [word in str(problem) for problem in problems] == ([True] if word else [])


def test_unfused_attention_is_refused_over_context_ranks():
    (problem,) = options.check(Engine(attention="unfused"), TE, Needs(H100, QWEN_32B, cp("p2p"), "bfloat16"))
    assert "context ranks" in str(problem)
