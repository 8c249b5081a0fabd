"""The cells of the table "parallel equals serial": layouts by name, and a small model of each family.

A family joins with a line in FAMILIES; its dimensions should split over 4 ranks wherever the family allows it.
"""

from dataclasses import dataclass, replace
from typing import Any

from megatron_ext.parallel.plan import ParallelPlan
from tests.megatron_ext import tiny

FAMILIES: dict[str, Any] = {
    "qwen2": replace(tiny.DIMS, layers=4),
    "qwen3 untied": replace(tiny.DIMS, layers=4, tied=False, kind="qwen3"),
    "nanochat": replace(tiny.NANOCHAT_DIMS, layers=4),
    "gpt_oss": replace(tiny.GPT_OSS_DIMS, sliding=(True, False) * 2),
    "nemotron_h": tiny.hybrid("ME*-"),
    "nemotron_h dense": tiny.hybrid("M*-M"),
    **{kind: tiny.of_layers(of, 4) for kind, of in tiny.KINDS.items()},
    # Where positions turn nothing, a key's bias has hardly a gradient but rounding, of which Adam makes whole steps.
    **{kind: tiny.of_layers(replace(tiny.KINDS[kind], attention_bias=False), 4) for kind in ("glm4", "glm4_moe")},
}


@dataclass(frozen=True)
class Cell:
    """One layout on `ranks` ranks. `whole`: one document fills each row, instead of many."""

    name: str
    ranks: int
    plan: ParallelPlan
    whole: bool = False
    soak: bool = False


def _cell(name: str, ranks: int, whole: bool = False, soak: bool = False, **degrees: Any) -> Cell:
    return Cell(name, ranks, ParallelPlan(**degrees), whole, soak)


SP = dict(sequence_parallel=True)
A2A = dict(context_comm="a2a")

CELLS = [
    _cell("DP2", 2),
    _cell("TP2", 2, soak=True, tensor=2),
    _cell("TP2 SP", 2, tensor=2, **SP),
    _cell("PP2", 2, pipeline=2),
    _cell("PP2, 1 + 3 layers", 2, soak=True, pipeline=2, pipeline_layers=[1, 3]),
    _cell("PP2 interleaved", 2, pipeline=2, virtual=2),
    _cell("CP2 all-gather", 2, soak=True, whole=True, context=2),
    _cell("CP2 all-to-all", 2, soak=True, whole=True, context=2, **A2A),
    _cell("packed CP2 all-gather", 2, context=2),
    _cell("packed CP2 all-to-all", 2, context=2, **A2A),
    _cell("EP2", 2, expert=2),
    _cell("TP2 ETP2 SP", 2, tensor=2, expert_tensor=2, **SP),
    _cell("TP2 EP2 SP", 2, tensor=2, expert=2, **SP),
    _cell("DP2, joined packs", 2, micro_batch=2, soak=True),
    _cell("TP2 SP, recompute selective", 2, tensor=2, recompute="selective", soak=True, **SP),
    _cell("CP2, recompute full", 2, context=2, recompute="full", soak=True),
    _cell("EP2, recompute selective", 2, expert=2, recompute="selective", soak=True),
    # combinations on four ranks
    _cell("TP2 SP x CP2", 4, tensor=2, context=2, **SP, soak=True),
    _cell("TP2 SP x CP2 all-to-all", 4, tensor=2, context=2, **SP, **A2A, soak=True),
    _cell("PP2 x CP2", 4, pipeline=2, context=2),
    _cell("PP2 interleaved x TP2 SP", 4, soak=True, pipeline=2, virtual=2, tensor=2, **SP),
    _cell("PP2 interleaved x CP2 all-to-all", 4, pipeline=2, virtual=2, context=2, **A2A, soak=True),
    _cell("TP2 x DP2", 4, soak=True, tensor=2),
    _cell("PP2 x DP2", 4, pipeline=2, soak=True),
    _cell("CP2 x DP2", 4, context=2, soak=True),
    _cell("TP4 SP", 4, tensor=4, **SP, soak=True),
    _cell("CP4 all-to-all", 4, context=4, **A2A, soak=True),
    _cell("CP4 all-gather", 4, context=4, soak=True),
    _cell("PP4", 4, pipeline=4, soak=True),
    _cell("EP4", 4, expert=4, soak=True),
    _cell("EP2 x CP2", 4, expert=2, context=2, soak=True),
    _cell("EP2 x PP2", 4, expert=2, pipeline=2),
    _cell("EP2 x PP2 interleaved", 4, expert=2, pipeline=2, virtual=2, soak=True),
    _cell("EP2 x DP2", 4, expert=2, soak=True),
    _cell("TP2 SP x EP4", 4, tensor=2, expert=4, **SP, soak=True),
    _cell("TP2 SP x CP2 x EP4", 4, tensor=2, context=2, expert=4, **SP),
    _cell("TP2 SP x PP2 x EP2", 4, tensor=2, pipeline=2, expert=2, **SP, soak=True),
    _cell("TP2 SP x ETP2 x DP2", 4, tensor=2, expert_tensor=2, **SP, soak=True),
    _cell("TP2 SP x ETP2 x EP2", 4, tensor=2, expert_tensor=2, expert=2, **SP, soak=True),
]
