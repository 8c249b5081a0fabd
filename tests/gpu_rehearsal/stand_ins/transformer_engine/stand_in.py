"""What this package is: Transformer Engine 2.11 in plain torch, for tests on a machine without a GPU.

Names, parameters, assertions and the choice of an attention kernel are the release's, which
tests/gpu_rehearsal/test_sources.py compares with its wheel; what they compute is written anew, slowly and for the CPU.
Beyond that nothing is promised: no FP8, no fused weight gradients, no overlap of communication.
"""

from typing import NoReturn


def not_here(name: str) -> NoReturn:
    """Refuse what the rehearsal has by name only."""
    raise NotImplementedError(f"the stand-in for Transformer Engine has {name} by name only")
