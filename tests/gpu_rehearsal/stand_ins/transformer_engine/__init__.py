"""A stand-in for Transformer Engine: stand_in.py says what it is."""

from . import common, pytorch

__version__ = "2.11.0"
__all__ = ["common", "pytorch"]
