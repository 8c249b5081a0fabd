"""How far apart two fp32 computations of one thing may end: derived from float64, not from what one machine gave.

Rounding depends on the order in which sums are taken, hence on the processor's vector width and the library. What one
order makes of it is measured where the test runs: the difference of the oracle in fp32 from itself in float64. Another
order errs about as much. MARGIN is for the largest of several hundred such differences against the largest of others.
"""

import copy

import torch

MARGIN = 8.0


@torch.no_grad()
def logits_bound(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Return the largest difference from `model`'s logits of `ids` [1, T] that fp32 rounding explains."""
    double = copy.deepcopy(model).double()
    for module in double.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"  # the grouped kernel knows no float64
    return bound(model(ids).logits[0], double(ids).logits[0])


def bound(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return how far from `found` (fp32) another order of summation may end, where `exact` is its value in float64.

    At the least one rounding of the largest value, for sums that happen to be exact.
    """
    unit = torch.finfo(torch.float32).eps * exact.abs().max().item()
    return MARGIN * max((found.double() - exact.double()).abs().max().item(), unit)
