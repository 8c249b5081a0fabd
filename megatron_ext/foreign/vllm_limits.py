"""What backend vllm is refused for before anything runs. No torch, and no vLLM: plan may run where there is none."""

from data_tools.mistake import Problem
from megatron_ext.parallel.plan import Site
from megatron_ext.parallel.shape import ModelShape
from megatron_ext.rollout.settings import SamplingSettings


def check(
    config: SamplingSettings, site: Site, shape: ModelShape | None, *, stop_strings: list[str], compares: bool
) -> list[Problem]:
    """Return what is wrong with a phase's settings for vLLM, as far as it is known."""
    return []
