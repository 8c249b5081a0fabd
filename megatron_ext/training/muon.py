"""Muon: its settings, what it needs, and what of megatron-core's settings they are. No torch.

Muon takes the decaying mean of a matrix's gradient and makes all its singular values about 1, by a few steps of Newton
and Schulz (Jordan 2024, kellerjordan.github.io/posts/muon). It trains the matrices of the layers; embedding, output
layer and all that is no matrix stay AdamW's. The q, k and v of a layer are three matrices, gate and up of an MLP are
one. With tensor parallelism each rank gathers the whole matrix and computes the same as one rank would alone. Every
data rank holds the whole state: megatron-core's distributed optimizer cuts matrices, which Muon cannot use.
"""

import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from data_tools.base.declared import setting
from data_tools.mistake import Problem
from megatron_ext import versions
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.parallel.shape import ModelShape
from megatron_ext.training.options import Engine

MUON = "muon"
OPTIMIZERS = ("", MUON)
SCALES = ("spectral", "unit_rms_norm", "shape_scaling")  # emerging_optimizers.get_muon_scale_factor
PRECISIONS = ("medium", "high", "highest")  # torch.set_float32_matmul_precision
NEEDS = "emerging-optimizers"
PINNED = "0.3.0"  # the index has others of that name, which were not read


@dataclass
class Muon:
    """Settings of Muon. All at their defaults they are in no key (`__bool__`): `optimizer` says that it is Muon."""

    momentum: float = setting(0.95, "Muon's decay of the mean gradient", least=0, below=1)
    nesterov: bool = setting(True, "an update looks one step ahead along the mean gradient")
    iterations: int = setting(5, "steps of Newton and Schulz", unit="steps", least=1)
    scale: str = setting(
        "spectral",
        "what an update is multiplied with: spectral is the root of the matrix's longer side",
        choices=SCALES,
    )
    scale_factor: float = setting(
        0.2,
        "multiplies that; at 0.2 with spectral an update is as large as one of AdamW's, and lr is for both",
        above=0,
    )
    precision: str = setting(
        "medium", "of the iteration's products: medium is bfloat16, high TF32, highest fp32", choices=PRECISIONS
    )

    def __bool__(self) -> bool:
        """Return whether anything is set."""
        return self != Muon()


def optimizer_fields(muon: Muon) -> dict[str, Any]:
    """Return the fields of megatron-core's OptimizerConfig that say the same."""
    return dict(
        muon_momentum=muon.momentum,
        muon_nesterov=muon.nesterov,
        muon_num_ns_steps=muon.iterations,
        muon_scale_mode=muon.scale,
        muon_extra_scale_factor=muon.scale_factor,
        muon_fp32_matmul_prec=muon.precision,
        muon_split_qkv=True,
        muon_tp_mode="duplicated",  # the default makes each tensor rank's part orthogonal by itself
    )


def missing() -> str:
    """Return what of Muon's needs is not installed here and what to do, "" where all is there."""
    release = versions.installed()
    having = [name for name, row in versions.RELEASES.items() if row.has_muon]
    try:
        found = version(NEEDS)
    except PackageNotFoundError:
        found = "none"
    if release in having and found == PINNED:
        return ""
    python = ".".join(map(str, sys.version_info[:2]))
    return (
        f"needs {NEEDS} {PINNED} and megatron-core {' or '.join(having)}, which are for Python 3.12 and later; here "
        f"are {NEEDS} {found} and megatron-core {release}, on Python {python}: pip install "
        f"megatron-core=={having[-1]} {NEEDS}=={PINNED}, with a Python that takes them, or leave optimizer out"
    )


def check(
    optimizer: str,
    muon: Muon,
    *,
    lora: LoraConfig,
    plan: ParallelPlan,
    shape: ModelShape | None,
    engine: Engine | None = None,
    offload: bool = False,
) -> list[Problem]:
    """Refuse Muon where it is not installed or was not shown, and settings of it without it.

    `engine`: of a supervised training. `offload`: whether GRPO keeps the state elsewhere while it samples.
    """
    if optimizer != MUON:
        said = "is set, and optimizer is not muon: say optimizer: muon, or leave it out"
        return [Problem("muon", said)] if muon else []
    problems = [Problem("optimizer", f"muon {told}")] if (told := missing()) else []
    if lora.rank:
        problems.append(
            Problem("optimizer", "muon does not go with lora, whose factors are no weights of their own: leave one out")
        )
    if shape is not None and 0 < shape.kv_groups < plan.tensor:
        cut = f"cuts the {shape.kv_groups} KV groups, and muon would take q, k and v for one matrix"
        problems.append(Problem("parallel.tensor", f"{plan.tensor} {cut}: use {shape.kv_groups} or less"))
    shared = "shares out the state, of which muon needs whole matrices: use"
    if engine and engine.overlap_param_gather:
        problems.append(Problem("engine.overlap_param_gather", f"{shared} false"))
    if engine and engine.offload_optimizer:
        problems.append(Problem("engine.offload_optimizer", f"{engine.offload_optimizer} {shared} 0"))
    if offload:
        problems.append(Problem("offload", "was not shown with optimizer muon: use false"))
    return problems
