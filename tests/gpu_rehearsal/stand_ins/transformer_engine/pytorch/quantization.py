"""The state of low precision: off."""

import contextlib
from collections.abc import Iterator

from transformer_engine.stand_in import not_here


class FP8GlobalStateManager:
    """Says of every kind of FP8 that it is off."""

    @classmethod
    def is_fp8_enabled(cls):
        return False

    @classmethod
    def is_fp8_calibration(cls):
        return False

    @classmethod
    def with_fp8_parameters(cls):
        return False

    @classmethod
    def get_fp8_recipe(cls):
        not_here("get_fp8_recipe")


@contextlib.contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False) -> Iterator[None]:
    """Refuse to turn FP8 on."""
    if enabled:
        not_here("fp8_autocast")
    yield


@contextlib.contextmanager
def autocast(enabled=True, calibrating=False, recipe=None, amax_reduction_group=None, _graph=False) -> Iterator[None]:
    """Refuse to turn FP8 on."""
    if enabled:
        not_here("autocast")
    yield


@contextlib.contextmanager
def fp8_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=False) -> Iterator[None]:
    """Refuse weights in FP8."""
    if enabled:
        not_here("fp8_model_init")
    yield


@contextlib.contextmanager
def quantized_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=False) -> Iterator[None]:
    """Refuse weights in FP8."""
    if enabled:
        not_here("quantized_model_init")
    yield
