"""What of Transformer Engine knows no framework."""

from . import recipe

__all__ = ["recipe"]
