"""Numbers that predictions (megatron_ext/preflight) take from elsewhere: GPUs by data sheet, throughput as others
published it.

None of them was measured by us. The rows of `PUBLISHED` fix what share of the peak kernels reach (`preflight/flops.py`,
kernel_shares); the rest of a prediction is derived. To calibrate on a machine of your own, put its row in place of
ours.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A type of GPU."""

    memory_gib: float  # all that nvidia-smi shows
    bf16_tflops: float  # dense
    link: float  # NVLink, bytes/s a GPU in one direction
    capability: tuple[int, int]  # compute capability
    source: str


GPUS = {
    "a100": Gpu(80.0, 312.0, 300e9, (8, 0), "NVIDIA A100 80GB SXM data sheet"),
    "h100": Gpu(79.6, 989.0, 450e9, (9, 0), "NVIDIA H100 SXM data sheet"),
    "h200": Gpu(140.4, 989.0, 450e9, (9, 0), "NVIDIA H200 SXM data sheet"),
    "b200": Gpu(179.0, 2250.0, 900e9, (10, 0), "NVIDIA HGX B200 data sheet"),
}
NETWORK = 50e9  # bytes/s a GPU between nodes, one direction: one 400 Gb/s adapter a GPU
RESERVE = 4 * GIB  # CUDA context, NCCL buffers, workspaces: 3 to 6 GiB
CHUNK_LOGITS = 2**25  # that the loss head holds at a time on a rank (layers/loss_head.py)
TILE = 2**22  # values of a frozen expert that are dequantised at a time (layers/mxfp4.py)


@dataclass(frozen=True)
class Published:
    """Training throughput on one node of H100 in bf16, with FLOPs by our own count; `source` says where."""

    tokens_per_s: float  # a GPU
    linear: float  # FLOPs a token that do not grow with the document, as executed
    pairs: float  # those of attention's pairs
    exchanged: float  # bytes a token that a GPU sends to experts of other GPUs and back, forward and backward
    source: str


def _exchanged(expert: int, top_k: int, hidden: int, blocks: int) -> float:
    return 4 * 2 * top_k * hidden * blocks * (expert - 1) / expert


CALIBRATION_GPU = "h100"
PUBLISHED = {
    "dense": Published(  # LoRA: two thirds of the linear FLOPs, as frozen weights get no gradient
        2250, 191.9e9 * 2 / 3, 8.05e9, 0.0, "NeMo Automodel, Qwen2.5-32B LoRA, 4,096 tokens, 8 x H100"
    ),
    "moe": Published(
        13058, 21.7e9, 1.21e9, _exchanged(8, 4, 2880, 24), "NeMo Automodel, gpt-oss-20b, 4,096 tokens, 8 x H100, EP8"
    ),
    "hybrid": Published(
        16789, 19.6e9, 0.6e9, _exchanged(8, 6, 2688, 23), "NeMo Automodel, Nemotron-3-Nano, 4,096 tokens, 8 x H100, EP8"
    ),
}
# Nearly all of its time is attention, in a forward done twice: 4/3 of the model's FLOPs.
LONG = Published(101, 191.9e9 * 4 / 3, 3298e9 * 4 / 3, 0.0, "TRL #6845, Qwen3-32B, 1,048,576 tokens, 8 x H100")
