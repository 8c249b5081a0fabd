"""Which releases of NVIDIA's packages go with a megatron-core: those that its layers were read and rehearsed with.

setup.py's extra `gpu` asks for the same. tests/gpu_rehearsal has stand-ins with the parameters and assertions of these
releases, and reads them from the releases' sources. A move to another megatron-core begins with a row here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Partners:
    """Releases by the names under which the package index has them."""

    transformer_engine: str
    mamba_ssm: str
    causal_conv1d: str
    flash_attn: str  # not in the extra: rollouts use it where it is installed


PARTNERS = {  # by release of megatron-core
    "0.16.1": Partners(
        transformer_engine="2.11.0", mamba_ssm="2.2.6.post3", causal_conv1d="1.5.3.post1", flash_attn="2.8.3"
    ),
}
