"""The releases of megatron-core that run here, and all that differs between them, in one table.

A move to another megatron-core begins with a row here. setup.py takes the newest that the Python allows: 0.16.1 is the
last for 3.11. Which releases of NVIDIA's other packages go with it, its extra `gpu` asks for: tests/gpu_rehearsal has
stand-ins with the parameters and assertions of these releases, and reads them from the releases' sources. No torch.
"""

import functools
import importlib
import importlib.util
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_tools.mistake import UserMistake

_VERSION = re.compile(  # of package_info.py
    r"""^MAJOR = (\d+)\s+MINOR = (\d+)\s+PATCH = (\d+)\s+PRE_RELEASE = ['"](.*)['"]""", re.MULTILINE
)


@dataclass(frozen=True)
class Partners:
    """Releases by the names under which the package index has them."""

    transformer_engine: str
    mamba_ssm: str
    causal_conv1d: str
    flash_attn: str  # not in the extra: rollouts use it where it is installed


@dataclass(frozen=True)
class Release:
    """What is another in one release of megatron-core than in others. Names are dotted, and lie below megatron.core."""

    partners: Partners
    split_tensor: str = "ssm.gated_delta_net._split_tensor_factory"  # mamba_mixer's own, importable without Triton
    hybrid_model: str = "models.mamba.MambaModel"
    hybrid_pattern: str = "hybrid_override_pattern"  # the argument that says the kinds of a hybrid model's blocks
    mamba_norm_has_epsilon: bool = False  # MambaLayer passes its norm the configuration's
    reduces_whole_experts: bool = False  # their gradients over tensor ranks, without expert ranks too
    has_muon: bool = False  # beside the release of emerging-optimizers that training/muon.py names
    needs_triton: str = ""  # the module that imports Triton whether it is there or not


_PARTNERS = Partners(
    transformer_engine="2.11.0", mamba_ssm="2.2.6.post3", causal_conv1d="1.5.3.post1", flash_attn="2.8.3"
)
RELEASES = {
    "0.16.1": Release(_PARTNERS),
    "0.17.1": Release(_PARTNERS, hybrid_pattern="hybrid_layer_pattern"),
    "0.18.2": Release(
        _PARTNERS,
        hybrid_model="models.hybrid.hybrid_model.HybridModel",
        hybrid_pattern="hybrid_layer_pattern",
        has_muon=True,
        needs_triton="transformer.moe.paged_stash",
    ),
    "0.19.2": Release(
        _PARTNERS,
        split_tensor="ssm.utils._split_tensor_factory",
        hybrid_model="models.hybrid.hybrid_model.HybridModel",
        hybrid_pattern="hybrid_layer_pattern",
        mamba_norm_has_epsilon=True,
        reduces_whole_experts=True,
        has_muon=True,
        needs_triton="transformer.moe.ops.paged_stash",
    ),
}


@functools.cache
def installed() -> str:
    """Return the version of megatron-core that is installed, "none" where none is."""
    try:
        return version("megatron-core")
    except PackageNotFoundError:
        return "none"


def release() -> Release:
    """Return the row of the megatron-core that is installed. Raises UserMistake where it has none."""
    found = installed()
    if found not in RELEASES:
        raise UserMistake(
            f"megatron-core {found} is installed, and {', '.join(RELEASES)} are known to megatron_ext/versions.py: "
            "pip install -c constraints.txt megatron-core"
        )
    return RELEASES[found]


def check_imported() -> None:
    """Refuse another megatron-core than the installed one before it is imported: a clone of Megatron-LM on PYTHONPATH
    has no metadata, and goes before. Raises UserMistake.
    """
    found = importlib.util.find_spec("megatron.core")  # runs nothing of it: `megatron` is a namespace
    if found is None or found.origin is None:
        raise UserMistake(f"megatron-core {installed()} is installed, and there is no module megatron.core: install it")
    folder = Path(found.origin).parent
    said = _VERSION.search((folder / "package_info.py").read_text()) if (folder / "package_info.py").is_file() else None
    told = ".".join(said.groups()[:3]) + said[4] if said else "of no version"
    if told != installed():
        raise UserMistake(
            f"import finds megatron-core {told} in {folder}, and {installed()} is installed: take {folder.parents[1]} "
            "off PYTHONPATH, or put a folder there into which a release was unpacked whole"
        )


def planned() -> Release:
    """Return the row of the megatron-core that is installed where a plan is made; where it has none, the oldest's."""
    return RELEASES.get(installed(), RELEASES["0.16.1"])


def split_tensor(*arguments: Any) -> Any:
    """Return megatron-core's factory of a checkpoint's tensor that is cut into named parts (mamba_mixer.py)."""
    return named(release().split_tensor)(*arguments)


def named(path: str) -> Any:
    """Return what lies at the dotted `path` below megatron.core."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"megatron.core.{module}"), name)
