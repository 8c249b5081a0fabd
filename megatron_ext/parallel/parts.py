"""Whose layers a model is made of, part by part: ours over torch's kernels, or Transformer Engine's. No torch.

`backend: auto | torch | te` is turned into `Parts` here and nowhere else, from what is installed, what the GPU is, what
the model needs and how it lies on the ranks. Each part comes with the reason for its choice in one sentence.

auto    each part Transformer Engine's where it has all that the model needs on this GPU, else ours; on a CPU ours
te      every part Transformer Engine's; where one cannot be, the phase is refused (rules.py) rather than mixed
torch   every part ours

Mamba's kernels are mamba-ssm's where they can be, but for backend torch. The limits follow the sources of Transformer
Engine 2.11 (get_attention_backend, fused_attn.cpp, cublaslt_gemm.cu, context_parallel.py). None was seen on a GPU yet.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_ext.parallel.machine import HOPPER, PINNED, Machine, all_numbers, numbers, spelled
from megatron_ext.parallel.mamba_kernels import PACKAGES, mamba_kernels
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.parallel.shape import MAMBA, MOE, WINDOW, ModelShape

AUTO, TORCH, TE = "auto", "torch", "te"
BACKENDS = (AUTO, TORCH, TE)
VLLM, OPENAI = "vllm", "openai"
FOREIGN = (VLLM, OPENAI)  # of phases that sample: no layers of ours at all, but an engine that is not ours
MXFP4 = "mxfp4"
BASES = ("", MXFP4)

# The first Transformer Engine, and cuDNN, with a kernel for attention sinks over packed documents.
SINKS_SINCE = (2, 15), 91800
FUSED_CUDNN, FUSED_CUDNN_OF_BLACKWELL = 90600, 90700  # the first with packed documents, few KV heads (fused_attn.cpp)
FAULTY_CUDNN = 91000, 91001  # for which fused_attn.cpp has no kernel
CONSUMER_BLACKWELL, BLACKWELL, AMPERE = (12, 0), (10, 0), (8, 0)  # compute capabilities
FLASH_ATTN, FLASH_ATTN_OF_BLACKWELL = ("2.1.1", "2.8.3"), "2.7.3"  # oldest and newest that Transformer Engine takes
WIDE_FLASH_ATTN = AMPERE, HOPPER, BLACKWELL, CONSUMER_BLACKWELL  # the only ones with heads over 192


@dataclass(frozen=True)
class Parts:
    """Whose each part of a layer is: "torch" is ours, "mxfp4" ours over blocks of 4-bit floats, "te" Transformer
    Engine's, "mamba_ssm" those kernels."""

    attention: str = TORCH  # the core, between the projections
    linear: str = TORCH  # projections and MLPs; those of Mamba and of shared experts too
    norm: str = TORCH
    experts: str = TORCH
    mamba: str = TORCH  # kernels of convolution and recurrence

    @property
    def uses_te(self) -> bool:
        """Whether any part is Transformer Engine's."""
        return TE in (self.attention, self.linear, self.norm, self.experts)


OURS = Parts()


@dataclass(frozen=True)
class Needs:
    """All that a choice depends on. What is None or "" is not known, and nothing is refused for it."""

    machine: Machine | None = None
    shape: ModelShape | None = None
    plan: ParallelPlan | None = None
    dtype: str = ""  # of the weights
    base: str = ""  # "mxfp4": matrices of experts, which are frozen, are held as its blocks

    @property
    def gpu(self) -> Machine | None:
        """The machine where it is known to have a GPU."""
        return self.machine if self.machine and self.machine.gpu else None

    @property
    def release(self) -> str:
        """The release of Transformer Engine: the installed one, or that of setup.py's extra."""
        return (self.machine.transformer_engine if self.machine else "") or PINNED.transformer_engine

    @property
    def te(self) -> str:
        return f"Transformer Engine {spelled(numbers(self.release))}"

    @property
    def context_comm(self) -> str:
        """How context ranks meet; "" where there is one."""
        return self.plan.context_comm if self.plan and self.plan.context > 1 else ""


NOTHING_KNOWN = Needs()


@dataclass(frozen=True)
class Choice:
    """The parts, and why each is what it is."""

    parts: Parts
    reasons: dict[str, str]  # by name of a part; those that the model does not have are left out

    def lines(self) -> list[str]:
        """Return a line for each part: "attention: te (Transformer Engine 2.11)"."""
        return [f"{name}: {getattr(self.parts, name)} ({reason})" for name, reason in self.reasons.items()]

    def facts(self) -> dict[str, Any]:
        """Return {part: {"is", "why"}}."""
        return {name: {"is": getattr(self.parts, name), "why": reason} for name, reason in self.reasons.items()}


# ---------------------------------------------------------------- what Transformer Engine's parts cannot do

Limit = Callable[[Needs], str]  # why a part cannot be Transformer Engine's, "" where it can


def te_is_installed(n: Needs) -> str:
    missing = n.machine and not n.machine.transformer_engine
    return "Transformer Engine is not installed here (pip install 'afterok[gpu]')" if missing else ""


def te_has_no_kernel_for_packed_sinks(n: Needs) -> str:
    """get_attention_backend of 2.11 turns all three kernels off for a learnable softmax over packed documents."""
    if not n.shape or not n.shape.sinks:
        return ""
    cudnn = n.machine.cudnn if n.machine else None
    if numbers(n.release) >= SINKS_SINCE[0] and (cudnn or 0) >= SINKS_SINCE[1]:
        return ""
    since = f"{spelled(SINKS_SINCE[0])} with cuDNN 9.18 has"
    return f"{n.te} has no kernel for attention sinks over packed documents ({since})"


def te_has_no_ring_for_windows(n: Needs) -> str:
    """Refuse what attn_forward_func_with_cp of context_parallel.py refuses."""
    wrong = n.shape and WINDOW in n.shape.blocks and n.context_comm == "p2p"
    return "Transformer Engine's p2p ring has no sliding windows" if wrong else ""


def te_gathers_no_packs(n: Needs) -> str:
    """Refuse THD, as AttnFuncWithCPAndKVAllGather does; lifted by TransformerEngine #2829 (June 2026), after 2.11."""
    return f"{n.te} has no all_gather for packed documents" if n.context_comm == "all_gather" else ""


def te_exchanges_whole_kv_groups(n: Needs) -> str:
    """Want a tensor rank's KV groups to split over context ranks; our own attention repeats them."""
    if not n.shape or not n.shape.heads or n.plan is None or n.context_comm != "a2a":
        return ""
    groups = max(n.shape.kv_groups // n.plan.tensor, 1)
    uneven = f"a2a over context {n.plan.context} does not split the {groups} KV groups of a tensor rank evenly"
    return uneven if groups % n.plan.context else ""


def _lacks_flash_attn(n: Needs, machine: Machine) -> str:
    """Return how Transformer Engine does without flash-attn on a GPU, "" where it has it (backends.py, utils.py)."""
    least = FLASH_ATTN_OF_BLACKWELL if machine.arch >= BLACKWELL else FLASH_ATTN[0]
    if not machine.flash_attn or machine.arch < AMPERE or (n.shape and n.shape.sinks):  # which it does not know
        return "without flash-attn"
    if not all_numbers(least) <= all_numbers(machine.flash_attn) <= all_numbers(FLASH_ATTN[1]):
        return f"with flash-attn {machine.flash_attn}, of which it takes {least} to {FLASH_ATTN[1]}"
    if n.shape and n.shape.head_dim > 192 and machine.arch not in WIDE_FLASH_ATTN:
        return "with flash-attn, which has heads of at most 192 there"
    return ""


def _lacks_fused(n: Needs, machine: Machine, otherwise: str) -> str:
    """Return why cuDNN has no fused attention on a GPU, "" where it has. `otherwise` there is none but this."""
    head, arch = n.shape.head_dim if n.shape else 0, f"compute capability {spelled(machine.arch)}"
    if machine.arch < HOPPER or machine.arch == CONSUMER_BLACKWELL:
        return (
            f"{n.te} has fused attention over packed documents on Hopper and B200, not on {arch} {otherwise}".rstrip()
        )
    least = FUSED_CUDNN if machine.arch == HOPPER else FUSED_CUDNN_OF_BLACKWELL
    if machine.cudnn and (machine.cudnn < least or machine.cudnn in FAULTY_CUDNN):
        return f"fused attention over packed documents on {arch} needs flash-attn or another cuDNN than {machine.cudnn}"
    if head > 128 and machine.arch != HOPPER:
        return f"{n.te} has no fused attention for heads of {head} on {arch} {otherwise}".rstrip()
    return ""


def te_has_an_attention_kernel_here(n: Needs) -> str:
    """Want cuDNN's fused attention or flash-attn: the unfused attention takes memory with the square of a pack."""
    machine = n.gpu
    if machine is None:
        return ""
    if n.dtype == "float32":
        return f"{n.te} has no fused attention in float32, only one whose memory grows with the square of a pack"
    head = n.shape.head_dim if n.shape else 0
    if head % 8 or head > 256:
        return f"{n.te} has no fused attention for heads of {head}, only for multiples of 8 up to 256"
    lacks = _lacks_flash_attn(n, machine)
    return lacks and _lacks_fused(n, machine, lacks)


def kernel_is_missing(name: str, n: Needs) -> str:
    """Return why Transformer Engine's attention has not the kernel "flash", "fused" or "unfused", "" where it has."""
    if name == "unfused":
        return f"{n.te} has none over context ranks" if n.context_comm else ""
    if name == AUTO or n.gpu is None:
        return ""
    return _lacks_flash_attn(n, n.gpu) if name == "flash" else _lacks_fused(n, n.gpu, "")


def te_norms_have_weights(n: Needs) -> str:
    wrong = n.shape and not n.shape.learned_norms
    return "Transformer Engine has no norms without weights, as this model's are" if wrong else ""


def te_multiplies_float32_exactly(n: Needs) -> str:
    """Refuse TF32: cublaslt_gemm.cu takes CUBLAS_COMPUTE_32F_FAST_TF32 where all matrices are float32."""
    wrong = n.gpu and n.dtype == "float32"
    return "Transformer Engine multiplies float32 matrices as TF32, with 10 bits of mantissa" if wrong else ""


LIMITS: dict[str, tuple[Limit, ...]] = {  # by part, beside te_is_installed
    "attention": (
        te_has_no_kernel_for_packed_sinks,
        te_gathers_no_packs,
        te_has_no_ring_for_windows,
        te_exchanges_whole_kv_groups,
        te_has_an_attention_kernel_here,
    ),
    "linear": (te_multiplies_float32_exactly,),
    "norm": (te_norms_have_weights,),
    "experts": (te_multiplies_float32_exactly,),
}


def limit(part: str, n: Needs) -> str:
    """Return why `part` cannot be Transformer Engine's, "" where it can."""
    return next((said for one in (te_is_installed, *LIMITS[part]) if (said := one(n))), "")


# ---------------------------------------------------------------- the choice


def choose(backend: str, n: Needs) -> Choice:
    """Return the parts of `backend`, with experts over blocks where the base is MXFP4. For "te" they are Transformer
    Engine's even where `limit` says that they cannot be: such a phase is refused.
    """
    chosen = {part: _owner(backend, part, n) for part in LIMITS} | {"mamba": _mamba(backend, n)}
    absent = _absent(n.shape)
    return Choice(
        Parts(**{part: owner for part, (owner, _) in chosen.items()}),
        {part: reason for part, (_, reason) in chosen.items() if part not in absent},
    )


def _owner(backend: str, part: str, n: Needs) -> tuple[str, str]:
    if part == "experts" and n.base == MXFP4:
        return MXFP4, "base mxfp4: blocks are dequantised expert by expert"
    if backend == TORCH:
        return TORCH, "backend torch"
    if backend == TE:
        return TE, "backend te"
    if n.gpu is None:
        return TORCH, "no GPU" if n.machine else "nothing is known of the machine"
    said = limit(part, n)
    return (TORCH, said) if said else (TE, n.te)


def _mamba(backend: str, n: Needs) -> tuple[str, str]:
    """Return whose kernels Mamba's convolution and recurrence are, and why."""
    if backend == TORCH:
        return TORCH, "backend torch"
    if n.shape is None:
        return TORCH, "nothing is known of the model"
    plan, gpu = n.plan or ParallelPlan(), n.gpu
    kernels = mamba_kernels(
        n.shape,
        tensor=plan.tensor,
        context=plan.context,
        dtype=n.dtype,
        installed=[name for name in PACKAGES if gpu and getattr(gpu, name)],
        capability=gpu.arch if gpu else None,
    )
    return kernels.scan, kernels.reason


def _absent(shape: ModelShape | None) -> set[str]:
    """Return the parts that a model does not have."""
    if shape is None:
        return set()
    return ({"attention"} if not shape.heads else set()) | {
        part for part, block in (("experts", MOE), ("mamba", MAMBA)) if block not in shape.blocks
    }
