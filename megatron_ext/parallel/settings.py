"""Which model a phase loads, in what precision and layers, and over which ranks: settings that all such phases share.

No torch: plans and checks read them too.
"""

from dataclasses import dataclass

from data_tools.base.declared import MODELS, setting
from megatron_ext.parallel.parts import BACKENDS, BASES
from megatron_ext.parallel.plan import ParallelPlan

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class ModelSettings:
    """A model folder and how its ranks hold it."""

    model: str = setting("", "model folder", example="${phases.imported.out}", needed=True, input=True, made_by=MODELS)
    dtype: str = setting("", 'type of the weights; "" keeps that of the model folder', choices=("", *DTYPES))
    backend: str = setting(
        "auto",
        "whose layers compute; auto: each part Transformer Engine's where it has what the model needs, else ours",
        choices=BACKENDS,
        keyed=False,
    )
    base: str = setting(
        "",
        'how the model below adapters is held, which is frozen: "" in `dtype`; mxfp4: its experts in the 4-bit blocks '
        "that they were imported from, which loses no bit",
        choices=BASES,
        keyed=False,
    )
    parallel: ParallelPlan = setting(ParallelPlan, "how ranks share the model and the work", keyed=False)
