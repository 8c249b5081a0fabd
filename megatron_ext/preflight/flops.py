"""How many FLOPs an update takes and how long it lasts under a parallel plan: what a pack of any length costs.

FLOPs are derived from the model's shape and the documents of the packs: matrices cost by the token, attention by the
pair of tokens of one document, so a pack of 262,144 tokens in one document costs far more than the same tokens in many.
Time is derived too, from FLOPs, bytes sent, and one published throughput for each kind of model (calibration.py).
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy

from megatron_ext.parallel.calibration import CALIBRATION_GPU, GPUS, LONG, NETWORK, PUBLISHED
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.parallel.shape import ATTENTION, MAMBA, MLP, MOE, WINDOW, ModelShape
from megatron_ext.preflight.facts import Training
from megatron_ext.preflight.memory import Stage, micro_batches, stages, trained


def linear_flops(shape: ModelShape, kind: str) -> float:
    """Return the forward FLOPs of one block for each token, but for attention's pairs."""
    s, h = shape, shape.hidden
    each = 2 * s.mlp_matrices * h  # a column of an MLP
    if kind in (ATTENTION, WINDOW):
        return 2 * h * s.qkv_rows + 2 * s.heads * s.head_dim * h
    if kind == MLP:
        return each * s.ffn
    if kind == MOE:
        return each * (s.top_k * s.expert_ffn + s.shared_ffn) + 2 * h * s.experts
    return 2 * h * s.mamba_projection + 7 * s.mamba_inner * s.mamba_state + 2 * s.mamba_inner * h


def block_flops(t: Training, kind: str) -> tuple[float, float]:
    """Return the forward FLOPs of one block over an average pack: (of matrices, of attention's pairs)."""
    pairs = {ATTENTION: t.documents.squares / 2, WINDOW: t.documents.window_pairs}.get(kind, 0.0)
    linear = t.pack_length * linear_flops(t.known_shape, kind)
    return linear, 4 * t.known_shape.heads * t.known_shape.head_dim * pairs


def output_flops(shape: ModelShape, tokens: float) -> float:
    """Return the forward FLOPs of the output layer."""
    return 2 * shape.hidden * shape.vocabulary * tokens


def matrix_passes(t: Training) -> int:
    """Return how many products with a matrix forward and backward take.

    They make its output, the gradient of its input and, unless LoRA keeps it as it is, its own gradient.
    """
    return 2 if t.lora.rank else 3


def training_flops(t: Training) -> float:
    """Return the model FLOPs of forward and backward of an average pack (no recomputation, no adapters)."""
    passes, blocks = matrix_passes(t), 0.0
    for kind, count in t.known_shape.blocks.items():
        matrices, attention = block_flops(t, kind)
        blocks += count * (passes * matrices + 3 * attention)
    return blocks + passes * output_flops(t.known_shape, t.supervised * t.pack_length)


def cost_coefficients(shape: ModelShape) -> tuple[float, float]:
    """Return (a, b) of a L + b L^2, the training FLOPs of a document of L tokens, for data_tools to balance packs with.

    The output layer is counted on every token. A windowed block is linear beyond its window, and counted so.
    """
    pairs = 3 * 4 * shape.heads * shape.head_dim
    linear = sum(linear_flops(shape, kind) * count for kind, count in shape.blocks.items())
    windows = pairs * shape.window * shape.blocks[WINDOW]
    return 3 * (linear + output_flops(shape, 1)) + windows, pairs / 2 * shape.blocks[ATTENTION]


@dataclass(frozen=True)
class PredictedStep:
    """A predicted update: times in seconds, utilisation as shares of the bf16 peak."""

    seconds: float
    compute: float
    communication: float  # not overlapped
    bubble: float  # pipeline ranks waiting
    tokens_per_s: float  # a GPU, padding included
    mfu: float
    hfu: float  # recomputation counted


def kind_of(shape: ModelShape) -> str:
    """Return the row of PUBLISHED that a model is predicted with."""
    return "hybrid" if shape.blocks[MAMBA] else "moe" if shape.blocks[MOE] else "dense"


@lru_cache
def kernel_shares(kind: str) -> tuple[float, float]:
    """Return the shares of the bf16 peak that (matrices, attention's pairs) reach.

    They are those with which two published throughputs come out.
    """
    gpu = GPUS[CALIBRATION_GPU]
    rows = PUBLISHED[kind], LONG
    seconds = [1 / row.tokens_per_s - row.exchanged / gpu.link for row in rows]
    slowness = numpy.linalg.solve([[row.linear, row.pairs] for row in rows], seconds)  # seconds a FLOP
    linear, pairs = 1 / slowness / (gpu.bf16_tflops * 1e12)
    return float(linear), float(pairs)


@dataclass(frozen=True)
class Work:
    """One micro-batch on one rank of a stage, on average: FLOPs and seconds."""

    model_flops: float
    hardware_flops: float  # with recomputation
    compute: float
    communication: float


def stage_work(plan: ParallelPlan, t: Training, stage: Stage) -> Work:
    """Return the work of one micro-batch on one rank of a stage."""
    again = {"none": frozenset[str](), "selective": {MLP, MOE}, "full": stage.blocks.keys()}[plan.recompute]
    plain = matrix_passes(t)
    linear = plain * output_flops(t.known_shape, t.supervised * t.pack_length) * stage.last
    model, hardware, pairs = linear, linear, 0.0
    for kind, count in stage.blocks.items():
        matrices, attention = (flops * count for flops in block_flops(t, kind))
        more = kind in again
        model += plain * matrices + 3 * attention
        hardware += (plain + more) * matrices + (3 + more) * attention
        linear += (plain + more) * matrices
        pairs += (3 + more) * attention
    share = plan.micro_batch / (plan.tensor * plan.context)
    linear_share, pair_share = kernel_shares(kind_of(t.known_shape))
    seconds = (linear / linear_share + pairs / pair_share) / (t.speed.bf16_tflops * 1e12)
    return Work(model * share, hardware * share, seconds * share, communication(plan, t, stage))


def transfer(t: Training, sent: float, group: int, extent: int) -> float:
    """Return the seconds in which a rank exchanges `sent` bytes with a group that lies within `extent` neighbouring
    ranks.
    """
    return sent * (group - 1) / group / (t.speed.link if extent <= t.gpus_per_node else NETWORK)


def communication(plan: ParallelPlan, t: Training, stage: Stage) -> float:
    """Return the seconds of a micro-batch's collectives, forward and backward, none of them overlapped."""
    s, blocks = t.known_shape, stage.blocks
    tokens = t.pack_length * plan.micro_batch / plan.context  # of a context rank
    hidden = 2 * tokens * s.hidden  # bytes
    passes = 3 if plan.recompute == "none" else 4
    # Tensor: a block gathers its input and scatters its output; backward does both and gathers the input again.
    dense = sum(blocks.values()) - (0 if s.shared_ffn else blocks[MOE])
    seconds = transfer(t, passes * 2 * hidden * dense, plan.tensor, plan.tensor)
    # Context: keys and values of all ranks, or all-to-alls of heads; Mamba always the latter.
    gathered = 2 * s.kv_groups * s.head_dim * plan.context
    columns = (blocks[ATTENTION] + blocks[WINDOW]) * (
        s.qkv_rows + s.heads * s.head_dim if plan.context_comm == "a2a" else gathered
    ) + blocks[MAMBA] * (s.mamba_projection + s.mamba_inner)
    sent = passes * 2 * tokens * columns / plan.tensor
    seconds += transfer(t, sent, plan.context, plan.tensor * plan.context)
    # Experts: every token to its top k and back.
    routed = 2 * s.top_k * hidden / plan.tensor * blocks[MOE]
    seconds += transfer(t, (passes - 1) * routed, plan.expert, plan.expert_tensor * plan.expert)
    seconds += transfer(t, passes * routed, plan.expert_tensor, plan.expert_tensor)
    if plan.pipeline > 1:
        parts = plan.tensor if plan.sequence_parallel else 1
        seconds += 2 * plan.virtual * transfer(t, 2 * hidden / parts, 2, t.workload.ranks)
    return seconds


def gradient_seconds(plan: ParallelPlan, t: Training, stage: Stage) -> float:
    """Return the seconds of an update's reduce-scatter of fp32 gradients and all-gather of weights, not overlapped."""
    ranks, learned = t.workload.ranks, trained(plan, t, stage)
    each = 4 + (4 if t.dtype == "float32" else 2)
    extent = ranks // plan.pipeline
    dense = transfer(t, (learned.sharded + learned.replicated) * each, plan.data(ranks) * plan.context, extent)
    return dense + transfer(t, learned.expert * each, plan.expert_data(ranks), extent)


def step(plan: ParallelPlan, t: Training) -> PredictedStep:
    """Predict an update of a legal plan; `t.gpu` must be known."""
    number, parts = micro_batches(plan, t.workload), stages(plan, t.known_shape)
    work = [stage_work(plan, t, stage) for stage in parts]
    slowest = max(work, key=lambda share: share.compute + share.communication)
    reduce = max(gradient_seconds(plan, t, stage) for stage in parts)
    bubble = (plan.pipeline - 1) / plan.virtual * (slowest.compute + slowest.communication)
    seconds = number * (slowest.compute + slowest.communication) + bubble + reduce
    tokens = t.pack_length * plan.micro_batch * number * plan.data(t.workload.ranks)
    peak = seconds * t.speed.bf16_tflops * 1e12 * plan.pipeline
    return PredictedStep(
        seconds=seconds,
        compute=number * slowest.compute,
        communication=number * slowest.communication + reduce,
        bubble=bubble,
        tokens_per_s=tokens / seconds / t.workload.ranks,
        mfu=number * sum(share.model_flops for share in work) / peak,
        hfu=number * sum(share.hardware_flops for share in work) / peak,
    )
