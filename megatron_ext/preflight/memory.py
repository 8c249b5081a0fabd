"""How much memory a parallel plan needs on the fullest rank, before anything runs: weights, gradients, optimizer state,
activations, logits.

Pure arithmetic on a `ModelShape`, milliseconds on a login node; nothing was measured. Activations are those of flash
attention, and of fused gates where linear layers are Transformer Engine's. `afterok plan PIPELINE --parallel PHASE`
prints the result.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from megatron_ext.lora import settings as loras
from megatron_ext.parallel.calibration import CHUNK_LOGITS, RESERVE, TILE
from megatron_ext.parallel.parts import TE, choose
from megatron_ext.parallel.plan import DEGREES, ParallelPlan, Workload, padded_rows
from megatron_ext.parallel.rules import needs_of
from megatron_ext.parallel.shape import (
    ATTENTION,
    MAMBA,
    MLP,
    MOE,
    MXFP4_BLOCK,
    WINDOW,
    ModelShape,
    Parameters,
    count_blocks,
)
from megatron_ext.preflight.facts import Training

LOGIT_BYTES = 10  # a logit: 2 in bf16, 4 in fp32, 4 for its softmax and gradient
PACKED_BYTES = 1 / 2 + 1 / MXFP4_BLOCK  # a value of MXFP4: half a byte, and its share of a scale
# An element of the matrix that Muon updates, all in fp32: gathered twice, iterate twice, two squares, what was there.
MUON_WORK_BYTES = 28
TILE_BYTES = 10  # a value that is dequantised, beside it: 2 of its index, 2 in bf16, 4 in fp32, 2 in bf16 again


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank, by component."""

    weights: float
    gradients: float  # fp32 sums
    optimizer: float  # Adam moments and, for 16-bit weights, the fp32 master, sharded (distributed optimizer)
    activations: float
    logits: float  # of one micro-batch, with their loss
    exchange: float  # tokens on their way to experts and back
    kv_cache: float = 0.0  # of rollouts (rl/memory.py); recurrent states too
    reserve: float = RESERVE
    dequantised: float = 0.0  # the one expert's matrix that is multiplied with, where they are held as MXFP4

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
    """Return what each pipeline rank holds, the first rank first."""
    parts = tuple(plan.stage_layers(len(shape.layers)))
    return _stages(shape, parts, pipeline=plan.pipeline, tensor=plan.tensor, expert=plan.expert * plan.expert_tensor)


@lru_cache(maxsize=1024)  # a search asks for the same stages under many context degrees
def _stages(shape: ModelShape, parts: tuple[range, ...], pipeline: int, tensor: int, expert: int) -> tuple[Stage, ...]:
    vocabulary = padded_rows(shape.vocabulary, tensor) * shape.hidden
    held = []
    for number in range(pipeline):
        layers = [shape.layers[layer] for part in parts[number::pipeline] for layer in part]
        blocks = count_blocks(layers)
        whole = sum((shape.block_parameters[kind] * count for kind, count in blocks.items()), start=Parameters())
        first, last = number == 0, number == pipeline - 1
        matrices = int(first or last) if shape.tied else first + last
        parameters = Parameters(
            (whole.sharded + matrices * vocabulary) // tensor,
            whole.replicated + last * shape.hidden * shape.learned_norms,
            whole.expert // expert,
        )
        held.append(Stage(number, last, layers=len(layers), blocks=blocks, parameters=parameters))
    return tuple(held)


def block_activations(shape: ModelShape, kind: str, plan: ParallelPlan, fused: bool = True) -> float:
    """Return the bytes for each token of one context rank that a block keeps for backward on a tensor rank (bf16).

    `fused`: gate and activation are one function. Else each step keeps what it made: the activated gate, up with its
    offset, an expert's product before it is weighted, and what the model's own activation keeps besides.
    """
    s, h = shape, shape.hidden
    outer = 4 * h / (plan.tensor if plan.sequence_parallel else 1)  # input of the norm, input of the first matrix
    projected = 2 * (s.mlp_matrices - 1) + 2  # bytes a column: gate and up, or up alone; the activation
    steps = 0 if fused or not s.gated else 2 + s.activation_steps
    projected, weighted = projected + 2 * steps, 2 * (steps > 0)
    if kind in (ATTENTION, WINDOW):
        inner = 2 * s.qkv_rows + 2 * s.heads * s.head_dim + 4 * s.heads
    elif kind == MLP:
        inner = projected * s.ffn
    elif kind == MOE:
        routed = s.top_k * (2 * h * plan.expert_tensor + (projected + weighted) * s.expert_ffn)
        inner = routed + projected * s.shared_ffn + 8 * s.experts
    else:
        inner = 2 * s.mamba_projection + 6 * s.mamba_inner
    return outer + inner / plan.tensor


def fuses_gates(plan: ParallelPlan, w: Workload) -> bool:
    """Return whether MLPs and experts keep as little as fused functions do: as linear layers that are Transformer
    Engine's (decoder_spec.settings); so it is assumed where nothing is known of the machine.
    """
    return w.machine is None or choose(w.backend, needs_of(plan, w)).parts.linear == TE


def adapter_activations(t: Training, kind: str) -> int:
    """Return the bytes for each token that the adapters of a block keep for backward: what each A gives, in bf16."""
    if not t.lora.rank:
        return 0
    times = {loras.EXPERTS: t.known_shape.top_k}
    names = loras.chosen(t.lora, t.known_shape)
    reached = [one.target for one in loras.matrices(t.known_shape, kind) if one.target in names]
    return sum(2 * t.lora.rank * times.get(target, 1) for target in reached)


def layer_activations(plan: ParallelPlan, t: Training, stage: Stage) -> tuple[float, float]:
    """Return (bytes a token kept from forward to backward, bytes a token at most needed on top in backward)."""
    shape, fused = t.known_shape, fuses_gates(plan, t.workload)
    bytes_of = {
        kind: block_activations(shape, kind, plan, fused) + adapter_activations(t, kind) for kind in stage.blocks
    }
    kept = 2 * shape.hidden / (plan.tensor if plan.sequence_parallel else 1)  # the input alone
    if plan.recompute == "full":
        here = [layer for layer in set(shape.layers) if set(layer) <= set(bytes_of)]
        return kept * stage.layers, max(sum(bytes_of[kind] for kind in layer) for layer in here)
    again = {MLP, MOE} & set(bytes_of) if plan.recompute == "selective" else set()
    stored = sum((kept if kind in again else bytes_of[kind]) * count for kind, count in stage.blocks.items())
    return stored, max((bytes_of[kind] for kind in again), default=0.0)


def in_flight(plan: ParallelPlan, stage: Stage, micro_batches: int) -> float:
    """Return how many micro-batches' activations a rank holds at once, in units of all its layers.

    That of the schedule "one forward, one backward" (megatron/core/pipeline_parallel/schedules.py:739).
    """
    if plan.virtual == 1:
        return min(plan.pipeline - stage.number, micro_batches)
    chunks = (plan.pipeline - stage.number - 1) * 2 + (plan.virtual - 1) * plan.pipeline + 1
    return min(chunks, micro_batches * plan.virtual) / plan.virtual


def micro_batches(plan: ParallelPlan, w: Workload) -> int:
    """Return how many micro-batches an update has on each data-parallel rank."""
    return max((w.global_batch or 1) // (plan.data(w.ranks) * plan.micro_batch), 1)


def loss_head_bytes(plan: ParallelPlan, shape: ModelShape, tokens: float, frozen: bool = False) -> float:
    """Return the bytes of the output layer and loss at their peak, with `tokens` supervised tokens on the rank.

    They are a chunk of logits, the tokens' hidden states and their gradient in bf16, and unless the weight is `frozen`
    its gradient in fp32 and a chunk's part of it.
    """
    rows = padded_rows(shape.vocabulary, plan.tensor) / plan.tensor
    weight = 0 if frozen else 6 * rows * shape.hidden
    return LOGIT_BYTES * min(tokens * rows, CHUNK_LOGITS) + 4 * tokens * shape.hidden + weight


def trained(plan: ParallelPlan, t: Training, stage: Stage) -> Parameters:
    """Return the parameters with a gradient on one rank of a stage: all, or LoRA's."""
    if not t.lora.rank:
        return stage.parameters
    adapters = (loras.held(t.lora, t.known_shape, kind) * count for kind, count in stage.blocks.items())
    whole = sum(adapters, start=Parameters())
    expert = whole.expert // (plan.expert * plan.expert_tensor)
    return Parameters(whole.sharded // plan.tensor, whole.replicated, expert)


def packed_values(plan: ParallelPlan, w: Workload, stage: Stage) -> int:
    """Return how many values of experts a rank of a stage holds as MXFP4 blocks; 0 where the base is not held so."""
    s = w.shape
    if not w.base or s is None:
        return 0
    of_block = s.experts * s.mlp_matrices * s.hidden * s.expert_ffn
    return stage.blocks[MOE] * of_block // (plan.expert * plan.expert_tensor)


def weight_bytes(plan: ParallelPlan, t: Training, stage: Stage) -> float:
    """Return the bytes of the weights that one rank of a stage holds, adapters included."""
    weight = 4 if t.dtype == "float32" else 2
    adapters = trained(plan, t, stage).total if t.lora.rank else 0
    packed = packed_values(plan, t.workload, stage)
    return weight * (stage.parameters.total + adapters) - (weight - PACKED_BYTES) * packed


def dequantised_bytes(plan: ParallelPlan, t: Training, stage: Stage) -> float:
    """Return the bytes of the one expert's matrix that is multiplied with, and of its making, where a rank of a stage
    holds experts as MXFP4."""
    if not packed_values(plan, t.workload, stage):
        return 0.0
    shape, weight = t.known_shape, 4 if t.dtype == "float32" else 2
    largest = (shape.mlp_matrices - 1) * shape.expert_ffn * shape.hidden // plan.expert_tensor
    return weight * largest + TILE_BYTES * TILE


def exchange_bytes(plan: ParallelPlan, shape: ModelShape) -> float:
    """Return the bytes for each token that are on their way to experts of other ranks and back."""
    return 2 * 2 * shape.top_k * shape.hidden / plan.tensor if plan.expert > 1 else 0.0


def stage_memory(plan: ParallelPlan, t: Training, stage: Stage) -> Memory:
    """Return the memory of one rank of a stage."""
    w, shape = t.workload, t.known_shape
    learned = trained(plan, t, stage)
    dense, expert = learned.sharded + learned.replicated, learned.expert
    moments = 8 if t.dtype == "float32" else 12
    tokens = t.pack_length * plan.micro_batch / plan.context
    held, on_top = layer_activations(plan, t, stage)
    logits = 0.0
    if stage.last:
        logits = loss_head_bytes(plan, shape, tokens * t.supervised, frozen=t.lora.rank > 0)
        logits += 2 * tokens * shape.hidden * plan.sequence_parallel  # the head gathers all tokens
    sharing = plan.data(w.ranks) * plan.context  # ranks that share the optimizer's state of dense weights
    return Memory(
        weights=weight_bytes(plan, t, stage),
        gradients=4 * (dense + expert),
        optimizer=muon_bytes(plan, t, stage)
        if t.muon
        else moments * (1 - t.offload) * (dense / sharing + expert / plan.expert_data(w.ranks)),
        activations=tokens * (held * in_flight(plan, stage, micro_batches(plan, w)) + on_top),
        logits=logits,
        exchange=tokens * exchange_bytes(plan, shape),
        dequantised=dequantised_bytes(plan, t, stage),
    )


def muon_bytes(plan: ParallelPlan, t: Training, stage: Stage) -> float:
    """Return the bytes of Muon's state on a rank of a stage, which no other rank shares, and of its largest update.

    A matrix has one moment, embedding and output layer two, as all that is replicated is taken to have. The largest
    matrix is there whole, whatever the tensor ranks.
    """
    shape, held, master = t.known_shape, stage.parameters, 0 if t.dtype == "float32" else 4
    ends = (stage.number == 0) + stage.last
    vocabulary = padded_rows(shape.vocabulary, plan.tensor) * shape.hidden // plan.tensor
    of_adam = (min(ends, 1) if shape.tied else ends) * vocabulary + held.replicated
    return (8 + master) * of_adam + (4 + master) * (held.total - of_adam) + MUON_WORK_BYTES * largest_matrix(shape)


def largest_matrix(shape: ModelShape) -> int:
    """Return the elements of the largest matrix that Muon updates at once: gate and up are one, q, k and v three."""
    up = shape.mlp_matrices - 1
    widths = {
        ATTENTION: shape.heads * shape.head_dim,
        WINDOW: shape.heads * shape.head_dim,
        MLP: up * shape.ffn,
        MOE: up * max(shape.expert_ffn, shape.shared_ffn),
        MAMBA: shape.mamba_projection,
    }
    return shape.hidden * max(widths[kind] for kind in shape.blocks)


def memory(plan: ParallelPlan, t: Training) -> Memory:
    """Return the memory of the fullest rank."""
    return max((stage_memory(plan, t, stage) for stage in stages(plan, t.known_shape)), key=lambda needs: needs.total)


def divides(plan: ParallelPlan, w: Workload) -> bool:
    """Return whether memory can be reckoned at all; a plan may be illegal for other reasons."""
    if any(getattr(plan, name) < 1 for name in DEGREES) or w.ranks % plan.model or w.ranks % plan.expert_model:
        return False
    if w.shape is None:
        return False
    counts, layers = plan.pipeline_layers, len(w.shape.layers)
    if counts:
        return len(counts) == plan.stages and sum(counts) == layers and min(counts) > 0
    return layers % plan.stages == 0
