"""Recipes of low precision: names only. megatron-core derives a class from one of them at import."""

from enum import Enum

from transformer_engine.stand_in import not_here


class Format(Enum):
    """Formats of 8 and 4 bits: (largest number forward, backward)."""

    E2M1 = (6, 6)
    E4M3 = (448, 448)
    E5M2 = (57344, 57344)
    HYBRID = (448, 57344)


class Recipe:
    """Refuses to be made."""

    def __init__(self, *_, **__):
        not_here(type(self).__name__)


class DelayedScaling(Recipe):
    pass


class Float8CurrentScaling(Recipe):
    pass


class MXFP8BlockScaling(Recipe):
    pass


class Float8BlockScaling(Recipe):
    pass


class NVFP4BlockScaling(Recipe):
    pass


class CustomRecipe(Recipe):
    pass
