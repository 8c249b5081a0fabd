"""Which layouts were shown to compute what one process computes, for which models, under which megatron-core. No torch.

Measured by tests/megatron_ext/test_certify.py under each release, and written here by tests/megatron_ext/shown.py: the
largest relative difference of loss, gradient and loss after an update, of small models in fp32 on gloo ranks.
"""

from dataclasses import asdict

from megatron_ext import versions
from megatron_ext.parallel.plan import ParallelPlan

REFUSED, NOT_MEASURED = "refused", "-"

# Layout -> family -> for each release of versions.py, in order: the difference, "refused", or "-": not measured.
SHOWN: dict[str, dict[str, str]] = {}


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
