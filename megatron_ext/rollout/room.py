"""How many samples the memory for keys and values holds, told before anything runs. No torch."""

from dataclasses import dataclass

from data_tools.mistake import Problem
from megatron_ext.parallel.calibration import GIB
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.parallel.shape import ATTENTION, WINDOW, ModelShape, count_blocks
from megatron_ext.rollout.settings import EngineConfig, RolloutSettings

BYTES = {"float32": 4, "bfloat16": 2}  # of a key's or value's element


@dataclass(frozen=True)
class Room:
    """What the memory of rollouts holds, on the rank that holds the fewest blocks; every rank uses as many."""

    blocks: int
    block_size: int
    tokens: int

    @property
    def each(self) -> int:
        """Blocks of one sample of the greatest length."""
        return -(-self.tokens // self.block_size)

    @property
    def samples(self) -> int:
        """How many samples of the greatest length are there at once; one is not run without a spare block."""
        return self.blocks // self.each if self.blocks > self.each else 0


def block_bytes(attentions: int, block_size: int, groups: int, head_dim: int, element: int) -> int:
    """Return the bytes of a block of keys and values in `attentions` layers, with `groups` heads of them on a rank."""
    return 2 * max(1, attentions) * block_size * groups * head_dim * element


def blocks_in(gib: float, size: int) -> int:
    """Return how many blocks of `size` bytes so much memory holds, besides the one that is nobody's."""
    return int(gib * GIB) // size - 1


def room(config: EngineConfig, plan: ParallelPlan, shape: ModelShape, dtype: str, tokens: int) -> Room:
    """Return the room for samples of `tokens` tokens at most, on the stage with the most attention layers."""
    stages = plan.stage_layers(len(shape.layers))
    counts = (count_blocks(shape.layers[stage.start : stage.stop]) for stage in stages)
    most = max(count[ATTENTION] + count[WINDOW] for count in counts)
    groups, element = max(1, shape.kv_groups // plan.tensor), BYTES.get(dtype, BYTES["bfloat16"])
    size = block_bytes(most, config.block_size, groups, head_dim=max(1, shape.head_dim), element=element)
    return Room(max(0, blocks_in(config.kv_gib, size)), config.block_size, tokens)


def check_room(
    config: RolloutSettings, shape: ModelShape | None, dtype: str, new: int, where: str = "sampling.max_tokens"
) -> list[Problem]:
    """Refuse `new` tokens a sample for which memory or the model's positions have no room, where the model is known."""
    if shape is None:
        return []
    found = room(config.engine, config.parallel, shape, dtype=dtype, tokens=1 + new)
    problems = [] if found.samples else [too_small(config.engine, found.blocks, found.each + 1)]
    return problems + check_positions(shape, new, where)


def check_positions(shape: ModelShape | None, new: int, where: str = "sampling.max_tokens") -> list[Problem]:
    """Refuse `new` tokens a sample for which the model's positions have no room, where the model is known."""
    if shape is None or not 0 < shape.max_positions <= new:
        return []
    said = f"{new:,} new ones leave no room for a prompt in the model's {shape.max_positions:,} positions"
    return [Problem(where, f"{said}: give fewer")]


def too_small(config: EngineConfig, blocks: int, needed: int) -> Problem:
    """Return the problem of memory that holds so many blocks where one sample needs more."""
    held, wanted = (number * config.block_size for number in (blocks, needed))
    message = f"{config.kv_gib:g} GiB hold {held:,} tokens of keys and values, and one sample needs {wanted:,}"
    return Problem("engine.kv_gib", f"{message}; give more, or lower max_tokens")


def room_notes(found: Room, config: EngineConfig, group: int) -> list[str]:
    """Return what `plan --parallel` says of the room."""
    held = f"{config.kv_gib:g} GiB a rank hold {found.blocks * found.block_size:,} tokens of keys and values"
    notes = [f"rollouts: {held}: {found.samples} samples of {found.tokens:,} tokens at once"]
    if found.samples < min(group, config.max_batch):
        what = f"a group of {group}" if group <= config.max_batch else f"max_batch {config.max_batch}"
        remedy = "where samples grow long, some give their memory back and are computed again"
        notes.append(f"warning: that is fewer than {what}: {remedy}")
    return notes
