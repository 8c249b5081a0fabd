"""Which layouts were shown to compute what one process computes, for which models, under which megatron-core. No torch.

Measured by tests/megatron_ext/test_certify.py under each release, and written here by tests/megatron_ext/shown.py: the
largest relative difference of loss, gradient and loss after an update, of small models in fp32 on gloo ranks.
"""

from dataclasses import asdict

from megatron_ext import versions
from megatron_ext.parallel.plan import ParallelPlan

REFUSED, NOT_MEASURED = "refused", "-"

# Layout -> family -> for each release of versions.py, in order: the difference, "refused", or "-": not measured.
SHOWN: dict[str, dict[str, str]] = {
    "2 ranks": {
        "qwen2": "1e-07 1e-07 1e-07 1e-07",
        "gpt_oss": "1e-07 1e-07 1e-07 1e-07",
        "nemotron_h": "1e-07 1e-07 1e-07 1e-07",
        "qwen3_moe": "2e-07 2e-07 2e-07 2e-07",
    },
    "2 ranks, tensor 2": {
        "qwen2": "4e-06 4e-06 4e-06 4e-06",
        "gpt_oss": "refused refused refused refused",
        "nemotron_h": "refused refused refused refused",
        "qwen3_moe": "refused refused refused refused",
    },
    "2 ranks, tensor 2, sequence_parallel": {
        "qwen2": "4e-06 4e-06 4e-06 4e-06",
        "gpt_oss": "refused refused refused 4e-06",
        "nemotron_h": "refused refused refused 2e-06",
        "qwen3_moe": "refused refused refused 3e-06",
    },
    "2 ranks, pipeline 2": {
        "qwen2": "1e-07 1e-07 1e-07 1e-07",
        "gpt_oss": "6e-08 6e-08 6e-08 6e-08",
        "nemotron_h": "0e+00 0e+00 0e+00 0e+00",
        "qwen3_moe": "0e+00 0e+00 0e+00 0e+00",
    },
    "2 ranks, pipeline 2, pipeline_layers [1, 3]": {
        "qwen2": "1e-07 1e-07 1e-07 1e-07",
        "gpt_oss": "0e+00 0e+00 0e+00 0e+00",
        "nemotron_h": "0e+00 0e+00 0e+00 0e+00",
        "qwen3_moe": "0e+00 0e+00 0e+00 0e+00",
    },
    "2 ranks, pipeline 2, virtual 2": {
        "qwen2": "1e-07 1e-07 1e-07 1e-07",
        "gpt_oss": "1e-08 1e-08 1e-08 1e-08",
        "nemotron_h": "refused refused refused refused",
        "qwen3_moe": "0e+00 0e+00 0e+00 0e+00",
    },
    "2 ranks, context 2": {
        "qwen2": "6e-07 6e-07 6e-07 6e-07",
        "gpt_oss": "6e-06 6e-06 6e-06 6e-06",
        "nemotron_h": "1e-06 1e-06 1e-06 1e-06",
        "qwen3_moe": "7e-07 7e-07 7e-07 7e-07",
    },
    "2 ranks, context 2, context_comm a2a": {
        "qwen2": "3e-07 3e-07 3e-07 3e-07",
        "gpt_oss": "4e-07 4e-07 4e-07 4e-07",
        "nemotron_h": "9e-07 9e-07 9e-07 9e-07",
        "qwen3_moe": "8e-07 8e-07 8e-07 8e-07",
    },
    "2 ranks, expert 2": {
        "qwen2": "refused refused refused refused",
        "gpt_oss": "4e-07 4e-07 4e-07 4e-07",
        "nemotron_h": "2e-07 2e-07 2e-07 2e-07",
        "qwen3_moe": "5e-07 5e-07 5e-07 5e-07",
    },
    "2 ranks, tensor 2, sequence_parallel, expert_tensor 2": {
        "qwen2": "refused refused refused refused",
        "gpt_oss": "refused refused refused refused",
        "nemotron_h": "1e-06 1e-06 1e-06 1e-06",
        "qwen3_moe": "2e-06 2e-06 2e-06 2e-06",
    },
    "2 ranks, tensor 2, sequence_parallel, expert 2": {
        "qwen2": "refused refused refused refused",
        "gpt_oss": "4e-06 4e-06 4e-06 4e-06",
        "nemotron_h": "2e-06 2e-06 2e-06 2e-06",
        "qwen3_moe": "2e-06 2e-06 2e-06 2e-06",
    },
    "2 ranks, micro_batch 2": {
        "qwen2": "4e-07 4e-07 4e-07 4e-07",
        "gpt_oss": "5e-07 5e-07 5e-07 5e-07",
        "nemotron_h": "6e-07 6e-07 6e-07 6e-07",
        "qwen3_moe": "7e-07 7e-07 7e-07 7e-07",
    },
    "2 ranks, tensor 2, sequence_parallel, recompute selective": {
        "qwen2": "4e-06 4e-06 4e-06 4e-06",
        "gpt_oss": "refused refused refused 4e-06",
        "nemotron_h": "refused refused refused 2e-06",
        "qwen3_moe": "refused refused refused 3e-06",
    },
    "2 ranks, context 2, recompute full": {
        "qwen2": "6e-07 6e-07 6e-07 6e-07",
        "gpt_oss": "6e-06 6e-06 6e-06 6e-06",
        "nemotron_h": "1e-06 1e-06 1e-06 1e-06",
        "qwen3_moe": "7e-07 7e-07 7e-07 7e-07",
    },
    "2 ranks, expert 2, recompute selective": {
        "qwen2": "refused refused refused refused",
        "gpt_oss": "4e-07 4e-07 4e-07 4e-07",
        "nemotron_h": "2e-07 2e-07 2e-07 2e-07",
        "qwen3_moe": "5e-07 5e-07 5e-07 5e-07",
    },
    "4 ranks, pipeline 2, context 2": {
        "qwen2": "6e-07 6e-07 6e-07 6e-07",
        "gpt_oss": "6e-06 6e-06 6e-06 6e-06",
        "nemotron_h": "1e-06 1e-06 1e-06 1e-06",
        "qwen3_moe": "7e-07 7e-07 7e-07 7e-07",
    },
    "4 ranks, pipeline 2, expert 2": {
        "qwen2": "refused refused refused refused",
        "gpt_oss": "4e-07 4e-07 4e-07 4e-07",
        "nemotron_h": "2e-07 2e-07 2e-07 2e-07",
        "qwen3_moe": "5e-07 5e-07 5e-07 5e-07",
    },
    "4 ranks, tensor 2, sequence_parallel, context 2, expert 4": {
        "qwen2": "refused refused refused refused",
        "gpt_oss": "5e-06 5e-06 5e-06 5e-06",
        "nemotron_h": "2e-06 2e-06 2e-06 2e-06",
        "qwen3_moe": "2e-06 2e-06 2e-06 2e-06",
    },
}


def layout(plan: ParallelPlan, ranks: int) -> str:
    """Return the name of a layout: its ranks and all that is not the default, such as "2 ranks, pipeline 2"."""
    plain = asdict(ParallelPlan())
    degrees = {name: value for name, value in asdict(plan).items() if value != plain[name]}
    said = [name if value is True else f"{name} {value}" for name, value in degrees.items()]
    return ", ".join([f"{ranks} ranks", *said])


def of(layout_name: str, family: str) -> dict[str, str]:
    """Return by release what was measured of a layout of `layout`, or "refused"; {} where nothing was measured."""
    values = SHOWN.get(layout_name, {}).get(family, "").split()
    return {release: value for release, value in zip(versions.RELEASES, values) if value != NOT_MEASURED}
