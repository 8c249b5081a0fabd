"""What layers may be made of on a machine: its GPU, and which packages are installed. No torch.

At run time it is this machine, at plan time what the profile says of the GPUs and what is installed where plan runs.
"""

import importlib.util
import re
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from megatron_ext.versions import RELEASES

PINNED = [*RELEASES.values()][-1].partners  # of the newest megatron-core
HOPPER = 9, 0  # compute capability


@dataclass(frozen=True)
class Machine:
    """What layers may be made of: the GPU, and the releases that are installed ("" where a package is not)."""

    gpu: str = ""  # its name; "": a CPU
    capability: tuple[int, int] | None = None  # compute capability; None: not known, taken for Hopper's
    cudnn: int | None = None  # as torch has it, 91002 for 9.10.2; None: not known, taken for new enough
    transformer_engine: str = ""
    mamba_ssm: str = ""
    causal_conv1d: str = ""
    flash_attn: str = ""

    @property
    def arch(self) -> tuple[int, int]:
        return self.capability or HOPPER

    @property
    def packages(self) -> list[str]:
        """The packages that are installed, with their releases."""
        names = ("transformer_engine", "mamba_ssm", "causal_conv1d", "flash_attn")
        return [f"{name} {release}" for name in names if (release := getattr(self, name))]


def numbers(release: str) -> tuple[int, int]:
    """Return major and minor number of a release: "2.11.0+cu13" -> (2, 11)."""
    major, minor, *_ = release.split(".")
    return int(major), int(minor)


def all_numbers(release: str) -> tuple[int, ...]:
    """Return the numbers of a release, for comparison: "2.8.0.post2" -> (2, 8, 0, 2). A local part makes it later."""
    return tuple(map(int, re.findall(r"\d+", release)))


def spelled(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


@cache
def installed() -> Machine:
    """Return a machine without a GPU that has the packages which this Python finds."""
    return Machine(
        transformer_engine=_release("transformer_engine"),
        mamba_ssm=_release("mamba_ssm"),
        causal_conv1d=_release("causal_conv1d"),
        flash_attn=_release("flash_attn"),
    )


def _release(package: str) -> str:
    """Return the release of a package; where its metadata is missing, the one that we pin."""
    if importlib.util.find_spec(package) is None:
        return ""
    try:
        return version(package)
    except PackageNotFoundError:
        return getattr(PINNED, package)


@cache
def here() -> Machine:
    """Return this machine, for a rank whose device is ready (device.init_device). Imports torch."""
    from megatron_ext import device

    return replace(installed(), **device.machine())
