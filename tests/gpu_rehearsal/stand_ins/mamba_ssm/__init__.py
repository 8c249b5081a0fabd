"""A stand-in for mamba-ssm in plain torch: test_sources.py compares its names, parameters and assertions with 2.2.6."""

__version__ = "2.2.6.post3"
