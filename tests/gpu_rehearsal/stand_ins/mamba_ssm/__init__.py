"""A stand-in for mamba-ssm in plain torch: test_sources.py compares its names, parameters and assertions with 2.2.6."""

__version__ = "2.2.6.post3"

# The release imports its models here, and these two names of transformers 4 (utils/generation.py, line 14).
raise ImportError("cannot import name 'GreedySearchDecoderOnlyOutput' from 'transformers.generation'")
