"""Division, and what this machine pretends to be: an H100 with cuDNN 9.18."""

from transformer_engine.stand_in import not_here

GPU, CUDNN = (9, 0), (9, 18, 0)


def ensure_divisibility(numerator, denominator):
    assert numerator % denominator == 0, f"{numerator} is not divisible by {denominator}"


def divide(numerator, denominator):
    ensure_divisibility(numerator, denominator)
    return numerator // denominator


def get_device_compute_capability():
    return GPU


def get_cudnn_version():
    return CUDNN


def is_bf16_available(return_reason=False):
    return (True, "") if return_reason else True


def make_weak_ref(x):
    not_here("make_weak_ref")
