"""Which kernels compute Mamba-2: torch's, or those of mamba-ssm and causal-conv1d. No torch here: plans read it too.

What the pinned releases (megatron_ext/versions.py) take was read in their sources; none of it has run on a GPU yet.
"""

from collections.abc import Collection
from typing import NamedTuple

from megatron_ext.parallel.shape import MAMBA, ModelShape

PACKAGES = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d"}  # what is imported: what is installed
LEAST_CAPABILITY = (8, 0)  # the first that multiplies bfloat16
DTYPES = ("bfloat16", "float16")
LARGEST = 256  # elements of a head or its state: kernels hold a whole head's in one block
CHANNELS = 8  # causal_conv1d.cpp: channels and strides of rows with documents are multiples of it
WIDTHS = range(2, 5)  # causal_conv1d.cpp: tokens that a convolution may see


class MambaKernels(NamedTuple):
    """Names the kernels of Mamba layers, and says in a sentence why these."""

    scan: str  # "torch" or "mamba_ssm"
    convolution: str  # "torch" or "causal_conv1d"
    reason: str


def mamba_kernels(
    shape: ModelShape,
    *,
    tensor: int = 1,
    context: int = 1,
    dtype: str,
    installed: Collection[str],
    capability: tuple[int, int] | None,
) -> MambaKernels:
    """Choose the kernels for the heads of one of `tensor` x `context` ranks.

    `dtype` is that of the parameters ("bfloat16"), `installed` the modules that can be imported ("mamba_ssm"),
    `capability` the compute capability of the GPU, None without one.
    """
    if why := _why_torch(shape, dtype, installed, capability):
        return MambaKernels("torch", "torch", why)
    channels = channels_of(shape, tensor, context)
    if why := why_torch_convolution(channels, shape.mamba_conv):
        return MambaKernels("mamba_ssm", "torch", f"mamba-ssm scans, and torch convolves: {why}")
    return MambaKernels("mamba_ssm", "causal_conv1d", "mamba-ssm and causal-conv1d have kernels for it")


def _why_torch(shape: ModelShape, dtype: str, installed: Collection[str], capability: tuple[int, int] | None) -> str:
    """Return why mamba-ssm's kernels do not fit, "" where they do."""
    if MAMBA not in shape.blocks:
        return "the model has no Mamba layer"
    if capability is None:
        return "there is no GPU"
    if capability < LEAST_CAPABILITY:
        least, own = (".".join(map(str, version)) for version in (LEAST_CAPABILITY, capability))
        return f"the GPU has compute capability {own}, and mamba-ssm's kernels need {least}"
    if absent := [name for module, name in PACKAGES.items() if module not in installed]:
        return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed"
    if dtype not in DTYPES:
        return f"mamba-ssm's kernels would round factors of {dtype} to TF32, which has 10 bits of mantissa"
    if max(shape.mamba_head_dim, shape.mamba_state) > LARGEST:
        return (
            f"heads of {shape.mamba_head_dim} with states of {shape.mamba_state} are larger than the {LARGEST} "
            "that mamba-ssm's kernels hold in a block"
        )
    return ""


def channels_of(shape: ModelShape, tensor: int = 1, context: int = 1) -> int:
    """Return how many channels a rank convolves: x of its heads, B and C of the groups that these use."""
    heads = shape.mamba_heads // (tensor * context)
    groups = max(1, shape.mamba_groups // (tensor * context))
    return heads * shape.mamba_head_dim + 2 * groups * shape.mamba_state


def why_torch_convolution(channels: int, width: int) -> str:
    """Return why causal-conv1d does not take so many channels with documents, "" where it does."""
    if channels % CHANNELS:
        return f"causal-conv1d takes a multiple of {CHANNELS} channels a rank, and there are {channels}"
    if width not in WIDTHS:
        return f"causal-conv1d looks back from {WIDTHS[0]} to {WIDTHS[-1]} tokens, and the model's convolution {width}"
    return ""
