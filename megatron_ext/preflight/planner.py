"""What a parallel plan costs before it runs: memory of a rank, FLOPs, step time; and the best plans for some GPUs.

Pure arithmetic on a `ModelShape`, milliseconds on a login node. Formulas and constants: reference/megatron.md 2.10 to
2.13. Memory and FLOPs are derived. Time is derived too, from FLOPs, bytes sent, and one published throughput for each
kind of model (calibration.py). Activations are those of fused kernels (Transformer Engine, flash attention).
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy

from megatron_ext.lora import settings as loras
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.parallel.calibration import (
    CALIBRATION_GPU,
    CHUNK_LOGITS,
    GIB,
    GPUS,
    LONG,
    NETWORK,
    PUBLISHED,
    RESERVE,
    Gpu,
)
from megatron_ext.parallel.plan import RECOMPUTES, ParallelPlan, Workload, divisors, padded_rows
from megatron_ext.parallel.rules import is_legal
from megatron_ext.parallel.shape import ATTENTION, MAMBA, MLP, MOE, WINDOW, ModelShape, Parameters, count_blocks


@dataclass(frozen=True)
class Documents:
    """The documents of an average pack. Sums of tokens, squared tokens, and pairs (query, key) within the window."""

    tokens: float
    squares: float
    window_pairs: float
    known: bool = True  # False: assumed to be one document as long as the pack

    @classmethod
    def of(cls, lengths: numpy.ndarray, packs: int, window: int) -> "Documents":
        """`lengths` int[documents] of all packs, in tokens."""
        lengths = lengths.astype(numpy.float64)
        inside = numpy.minimum(lengths, window) if window else lengths
        pairs = inside * lengths - inside * inside / 2
        return cls(*(float(total.sum()) / packs for total in (lengths, lengths**2, pairs)))

    @classmethod
    def one(cls, pack_length: int, window: int) -> "Documents":
        return replace(cls.of(numpy.array([pack_length]), 1, window), known=False)


@dataclass(frozen=True)
class Training:
    """A workload with what costs, not legality, depend on."""

    workload: Workload  # with shape, pack_length and global_batch
    documents: Documents
    supervised: float = 1.0  # share of tokens that reach the output layer
    dtype: str = "bfloat16"  # of the weights
    kv_tokens: int = 0  # rollouts: tokens that the KV cache of a model replica holds
    gpu: Gpu | None = None
    memory_gib: float | None = None  # of a GPU, where the profile says so
    gpus_per_node: int = 8
    offload: float = 0.0  # share of the optimizer's state in host memory
    lora: LoraConfig = field(default_factory=LoraConfig)  # rank 0: all parameters are trained

    @property
    def shape(self) -> ModelShape:
        return self.workload.shape

    @property
    def capacity(self) -> float | None:
        """Bytes of a GPU's memory."""
        gib = self.memory_gib or (self.gpu.memory_gib if self.gpu else None)
        return gib * GIB if gib else None


# ---------------------------------------------------------------- memory


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank, by component."""

    weights: float
    gradients: float  # fp32 sums
    optimizer: float  # Adam moments and, for 16-bit weights, the fp32 master, sharded (distributed optimizer)
    activations: float
    logits: float  # of one micro-batch, with their loss
    exchange: float  # tokens on their way to experts and back
    kv_cache: float
    reserve: float = RESERVE

    @property
    def state(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Stage:
    """What one pipeline rank holds, over all its virtual stages."""

    number: int
    last: bool
    layers: int
    blocks: Counter[str]
    parameters: Parameters  # on one of its ranks, padding of the vocabulary included


def stages(plan: ParallelPlan, shape: ModelShape) -> tuple[Stage, ...]:
    parts = tuple(plan.stage_layers(len(shape.layers)))
    return _stages(shape, parts, plan.pipeline, plan.tensor, plan.expert * plan.expert_tensor)


@lru_cache(maxsize=1024)  # a search asks for the same stages under many context degrees
def _stages(shape: ModelShape, parts: tuple[range, ...], pipeline: int, tensor: int, expert: int) -> tuple[Stage, ...]:
    vocabulary = padded_rows(shape.vocabulary, tensor) * shape.hidden
    found = []
    for number in range(pipeline):
        layers = [shape.layers[layer] for part in parts[number::pipeline] for layer in part]
        blocks = count_blocks(layers)
        whole = sum((shape.block_parameters[kind] * count for kind, count in blocks.items()), start=Parameters())
        first, last = number == 0, number == pipeline - 1
        matrices = int(first or last) if shape.tied else first + last
        parameters = Parameters(
            (whole.sharded + matrices * vocabulary) // tensor,
            whole.replicated + last * shape.hidden,
            whole.expert // expert,
        )
        found.append(Stage(number, last, len(layers), blocks, parameters))
    return tuple(found)


def block_activations(shape: ModelShape, kind: str, plan: ParallelPlan) -> float:
    """Bytes a token of one context rank that a block keeps for backward on a tensor rank (bf16)."""
    s, h = shape, shape.hidden
    outer = 4 * h / (plan.tensor if plan.sequence_parallel else 1)  # input of the norm, input of the first matrix
    projected = 2 * (s.mlp_matrices - 1) + 2  # bytes a column: gate and up, or up alone; the activation
    if kind in (ATTENTION, WINDOW):
        inner = 2 * s.qkv_rows + 2 * s.heads * s.head_dim + 4 * s.heads
    elif kind == MLP:
        inner = projected * s.ffn
    elif kind == MOE:
        routed = s.top_k * (2 * h * plan.expert_tensor + projected * s.expert_ffn)
        inner = routed + projected * s.shared_ffn + 8 * s.experts
    else:
        inner = 2 * s.mamba_projection + 6 * s.mamba_inner
    return outer + inner / plan.tensor


def layer_activations(plan: ParallelPlan, shape: ModelShape, stage: Stage) -> tuple[float, float]:
    """(bytes a token that a stage keeps from forward to backward, bytes a token at most needed on top in backward)."""
    bytes_of = {kind: block_activations(shape, kind, plan) for kind in stage.blocks}
    kept = 2 * shape.hidden / (plan.tensor if plan.sequence_parallel else 1)  # the input alone
    if plan.recompute == "full":
        here = [layer for layer in set(shape.layers) if set(layer) <= set(bytes_of)]
        return kept * stage.layers, max(sum(bytes_of[kind] for kind in layer) for layer in here)
    again = {MLP, MOE} & set(bytes_of) if plan.recompute == "selective" else set()
    stored = sum((kept if kind in again else bytes_of[kind]) * count for kind, count in stage.blocks.items())
    return stored, max((bytes_of[kind] for kind in again), default=0.0)


def in_flight(plan: ParallelPlan, stage: Stage, micro_batches: int) -> float:
    """Micro-batches whose activations a rank holds at once, in units of all its layers (1F1B; schedules.py:739)."""
    if plan.virtual == 1:
        return min(plan.pipeline - stage.number, micro_batches)
    chunks = (plan.pipeline - stage.number - 1) * 2 + (plan.virtual - 1) * plan.pipeline + 1
    return min(chunks, micro_batches * plan.virtual) / plan.virtual


def micro_batches(plan: ParallelPlan, w: Workload) -> int:
    """Micro-batches an update on each data-parallel rank."""
    return max((w.global_batch or 1) // (plan.data(w.ranks) * plan.micro_batch), 1)


def kv_bytes(plan: ParallelPlan, shape: ModelShape, stage: Stage) -> float:
    """Bytes of KV cache a token on one rank; Mamba states do not grow with tokens."""
    groups = max(shape.kv_groups / plan.tensor, 1)
    return (stage.blocks[ATTENTION] + stage.blocks[WINDOW]) * 2 * groups * shape.head_dim * 2


LOGIT_BYTES = 10  # a logit: 2 in bf16, 4 in fp32, 4 for its softmax and gradient


def loss_head_bytes(plan: ParallelPlan, shape: ModelShape, tokens: float, frozen: bool = False) -> float:
    """Bytes of the output layer and loss at their peak, `tokens` supervised tokens on the rank: a chunk of logits, the
    tokens' hidden states and their gradient in bf16, and unless the weight is `frozen` its gradient in fp32 and a
    chunk's part of it."""
    rows = padded_rows(shape.vocabulary, plan.tensor) / plan.tensor
    weight = 0 if frozen else 6 * rows * shape.hidden
    return LOGIT_BYTES * min(tokens * rows, CHUNK_LOGITS) + 4 * tokens * shape.hidden + weight


def trained(plan: ParallelPlan, t: Training, stage: Stage) -> Parameters:
    """Parameters with a gradient on one rank of a stage: all, or LoRA's."""
    if not t.lora.rank:
        return stage.parameters
    adapters = (loras.adapters(t.lora, t.shape, kind) * count for kind, count in stage.blocks.items())
    whole = sum(adapters, start=Parameters())
    expert = whole.expert // (plan.expert * plan.expert_tensor)
    return Parameters(whole.sharded // plan.tensor, whole.replicated, expert)


def stage_memory(plan: ParallelPlan, t: Training, stage: Stage) -> Memory:
    w, shape = t.workload, t.shape
    found = trained(plan, t, stage)
    dense, expert = found.sharded + found.replicated, found.expert
    weight, moments = (4, 8) if t.dtype == "float32" else (2, 12)
    tokens = w.pack_length * plan.micro_batch / plan.context
    held, on_top = layer_activations(plan, shape, stage)
    logits = 0.0
    if stage.last:
        logits = loss_head_bytes(plan, shape, tokens * t.supervised, frozen=t.lora.rank > 0)
        logits += 2 * tokens * shape.hidden * plan.sequence_parallel  # the head gathers all tokens
    sharing = plan.data(w.ranks) * plan.context  # ranks that share the optimizer's state of dense weights
    sent = 2 * 2 * shape.top_k * shape.hidden / plan.tensor if plan.expert > 1 else 0
    return Memory(
        weights=weight * (stage.parameters.total + (found.total if t.lora.rank else 0)),
        gradients=4 * (dense + expert),
        optimizer=moments * (1 - t.offload) * (dense / sharing + expert / plan.expert_data(w.ranks)),
        activations=tokens * (held * in_flight(plan, stage, micro_batches(plan, w)) + on_top),
        logits=logits,
        exchange=tokens * sent,
        kv_cache=t.kv_tokens * kv_bytes(plan, shape, stage),
    )


def memory(plan: ParallelPlan, t: Training) -> Memory:
    """Memory of the fullest rank."""
    return max((stage_memory(plan, t, stage) for stage in stages(plan, t.shape)), key=lambda found: found.total)


# ---------------------------------------------------------------- FLOPs


def linear_flops(shape: ModelShape, kind: str) -> float:
    """Forward FLOPs a token of one block, but for attention's pairs."""
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
    """Forward FLOPs of one block over an average pack: (of matrices, of attention's pairs)."""
    pairs = {ATTENTION: t.documents.squares / 2, WINDOW: t.documents.window_pairs}.get(kind, 0.0)
    linear = t.workload.pack_length * linear_flops(t.shape, kind)
    return linear, 4 * t.shape.heads * t.shape.head_dim * pairs


def output_flops(shape: ModelShape, tokens: float) -> float:
    return 2 * shape.hidden * shape.vocabulary * tokens


def matrix_passes(t: Training) -> int:
    """Products with a matrix in forward and backward: its output, the gradient of its input and, unless LoRA keeps it
    as it is, its own gradient."""
    return 2 if t.lora.rank else 3


def training_flops(t: Training) -> float:
    """Model FLOPs of forward and backward of an average pack (3 x forward; without recomputation and adapters)."""
    passes, found = matrix_passes(t), 0.0
    for kind, count in t.shape.blocks.items():
        matrices, attention = block_flops(t, kind)
        found += count * (passes * matrices + 3 * attention)
    return found + passes * output_flops(t.shape, t.supervised * t.workload.pack_length)


def cost_coefficients(shape: ModelShape) -> tuple[float, float]:
    """(a, b) of a L + b L^2, training FLOPs of a document of L tokens, for data_tools to balance packs with.

    The output layer is counted on every token. A windowed block is linear beyond its window, and counted so.
    """
    pairs = 3 * 4 * shape.heads * shape.head_dim
    linear = sum(linear_flops(shape, kind) * count for kind, count in shape.blocks.items())
    windows = pairs * shape.window * shape.blocks[WINDOW]
    return 3 * (linear + output_flops(shape, 1)) + windows, pairs / 2 * shape.blocks[ATTENTION]


# ---------------------------------------------------------------- time


@dataclass(frozen=True)
class Step:
    """A predicted update. Seconds; shares of the bf16 peak."""

    seconds: float
    compute: float
    communication: float  # not overlapped
    bubble: float  # pipeline ranks waiting
    tokens_per_s: float  # a GPU, padding included
    mfu: float
    hfu: float  # recomputation counted


def kind_of(shape: ModelShape) -> str:
    return "hybrid" if shape.blocks[MAMBA] else "moe" if shape.blocks[MOE] else "dense"


@lru_cache
def kernel_shares(kind: str) -> tuple[float, float]:
    """Shares of the bf16 peak that (matrices, attention's pairs) reach, so that two published throughputs come out."""
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
    again = {"none": (), "selective": (MLP, MOE), "full": stage.blocks}[plan.recompute]
    plain = matrix_passes(t)
    linear = plain * output_flops(t.shape, t.supervised * t.workload.pack_length) * stage.last
    model, hardware, pairs = linear, linear, 0.0
    for kind, count in stage.blocks.items():
        matrices, attention = (flops * count for flops in block_flops(t, kind))
        more = kind in again
        model += plain * matrices + 3 * attention
        hardware += (plain + more) * matrices + (3 + more) * attention
        linear += (plain + more) * matrices
        pairs += (3 + more) * attention
    share = plan.micro_batch / (plan.tensor * plan.context)
    linear_share, pair_share = kernel_shares(kind_of(t.shape))
    seconds = (linear / linear_share + pairs / pair_share) / (t.gpu.bf16_tflops * 1e12)
    return Work(model * share, hardware * share, seconds * share, communication(plan, t, stage))


def transfer(t: Training, sent: float, group: int, extent: int) -> float:
    """Seconds in which a rank exchanges `sent` bytes with a group that lies within `extent` neighbouring ranks."""
    return sent * (group - 1) / group / (t.gpu.link if extent <= t.gpus_per_node else NETWORK)


def communication(plan: ParallelPlan, t: Training, stage: Stage) -> float:
    """Seconds of a micro-batch's collectives, forward and backward, none of them overlapped."""
    s, blocks = t.shape, stage.blocks
    tokens = t.workload.pack_length * plan.micro_batch / plan.context  # of a context rank
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
    """Seconds of an update's reduce-scatter of fp32 gradients and all-gather of weights, not overlapped."""
    ranks, found = t.workload.ranks, trained(plan, t, stage)
    each = 4 + (4 if t.dtype == "float32" else 2)
    extent = ranks // plan.pipeline
    dense = transfer(t, (found.sharded + found.replicated) * each, plan.data(ranks) * plan.context, extent)
    return dense + transfer(t, found.expert * each, plan.expert_data(ranks), extent)


def step(plan: ParallelPlan, t: Training) -> Step:
    """The predicted update of a legal plan; `t.gpu` must be known."""
    number, parts = micro_batches(plan, t.workload), stages(plan, t.shape)
    work = [stage_work(plan, t, stage) for stage in parts]
    slowest = max(work, key=lambda one: one.compute + one.communication)
    reduce = max(gradient_seconds(plan, t, stage) for stage in parts)
    bubble = (plan.pipeline - 1) / plan.virtual * (slowest.compute + slowest.communication)
    seconds = number * (slowest.compute + slowest.communication) + bubble + reduce
    tokens = t.workload.pack_length * plan.micro_batch * number * plan.data(t.workload.ranks)
    peak = seconds * t.gpu.bf16_tflops * 1e12 * plan.pipeline
    return Step(
        seconds=seconds,
        compute=number * slowest.compute,
        communication=number * slowest.communication + reduce,
        bubble=bubble,
        tokens_per_s=tokens / seconds / t.workload.ranks,
        mfu=number * sum(one.model_flops for one in work) / peak,
        hfu=number * sum(one.hardware_flops for one in work) / peak,
    )


# ---------------------------------------------------------------- search


HEADROOM = 0.95  # share of a GPU that a plan we offer may fill: activation formulas are not calibrated yet


@dataclass(frozen=True)
class Candidate:
    plan: ParallelPlan
    memory: Memory
    step: Step | None  # None where the GPU is not known


def legal_plans(t: Training, base: ParallelPlan) -> Iterator[ParallelPlan]:
    """Every legal plan with the micro-batch and CP communication of `base`: stages even, tensor within a node, experts
    whole (ETP 1 is right almost always: reference/megatron.md 2.1, W4).
    """
    w, s = t.workload, t.shape
    degrees = divisors(w.ranks)
    tensors = [d for d in degrees if d <= t.gpus_per_node]
    experts = [d for d in degrees if s.experts and s.experts % d == 0] or [1]
    virtuals = (1,) if MAMBA in s.blocks else (1, 2)
    for tensor, pipeline, context in itertools.product(tensors, degrees, degrees):
        if w.ranks % (tensor * pipeline * context) or len(s.layers) % pipeline:
            continue
        for expert, virtual in itertools.product(experts, virtuals):
            plan = replace(
                base,
                tensor=tensor,
                sequence_parallel=tensor > 1,
                pipeline=pipeline,
                pipeline_layers=[],
                virtual=virtual,
                context=context,
                expert=expert,
                expert_tensor=1,
                recompute="none",
            )
            if is_legal(plan, w):
                yield plan


def search(t: Training, base: ParallelPlan) -> list[Candidate]:
    """Legal plans that fit the GPUs, the fastest first; each with the least recomputation that fits."""
    found = []
    for plan in legal_plans(t, base):
        for recompute in RECOMPUTES:
            tried = replace(plan, recompute=recompute)
            needs = memory(tried, t)
            fits = t.capacity is None or needs.total <= HEADROOM * t.capacity
            if fits and is_legal(tried, t.workload):
                found.append(Candidate(tried, needs, step(tried, t) if t.gpu else None))
                break
    return sorted(found, key=_rank)


def _rank(candidate: Candidate) -> tuple[float, int, float]:
    """The faster first; of those within about 1%, which is less than a prediction is worth, the one of fewer axes."""
    plan, seconds = candidate.plan, candidate.step.seconds if candidate.step else 1.0
    axes = sum(degree > 1 for degree in (plan.tensor, plan.pipeline, plan.virtual, plan.context, plan.expert))
    return round(100 * math.log(seconds)), axes, candidate.memory.total
