"""A stand-in for causal-conv1d in plain torch: test_sources.py compares its names and parameters with 1.5.3."""

from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update

__version__ = "1.5.3.post1"
__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]
