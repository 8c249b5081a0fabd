"""A rank's random states in a checkpoint: only the same layout of ranks can restore them."""

import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random as mcore_random

from data_tools.base.inside import inside
from data_tools.mistake import Problem, UserMistake
from megatron_ext.files import pickles
from megatron_ext.parallel.plan import ParallelPlan


def layout_name(plan: ParallelPlan) -> str:
    """Name the assignment of RNG streams to ranks: only the same one can restore them."""
    degrees = f"tp{plan.tensor}_pp{plan.pipeline}_cp{plan.context}_ep{plan.expert}_etp{plan.expert_tensor}"
    return f"world{dist.get_world_size()}_{degrees}"


def stored() -> bytes:
    """Return the states of this rank, as torch.save writes them."""
    states = {
        "torch": torch.get_rng_state(),
        "device": mcore_random._get_cuda_rng_state(),
        "tracker": {name: _plain(stream) for name, stream in mcore_random.get_cuda_rng_tracker().get_states().items()},
    }
    file = io.BytesIO()
    torch.save(states, file)
    return file.getvalue()


def _plain(state: torch.Tensor | torch.Generator) -> torch.Tensor:
    """Return a random state as a tensor; trackers that CUDA graphs may use keep generators."""
    return state.get_state() if isinstance(state, torch.Generator) else state


def read(folder: Path, name: str, start: int, size: int | None) -> dict[str, Any]:
    """Read what `stored` gave, `size` bytes (None: all) from `start` on in a file of a step. UserMistake where it is
    not of that kind.
    """
    try:
        return pickles.load_part(inside(folder, name), start, size)
    except (pickles.Refused, OSError) as error:
        raise UserMistake(Problem(str(folder / name), f"are no random states of ours: {error}")) from None


def restore(state: dict[str, Any]) -> None:
    """Put this rank's generators where `read` says they were."""
    torch.set_rng_state(state["torch"])
    mcore_random._set_cuda_rng_state(state["device"])
    tracker = mcore_random.get_cuda_rng_tracker()
    own, saved = tracker.get_states(), dict(state["tracker"])
    for name in saved:
        if isinstance(own.get(name), torch.Generator):  # which graphs hold on to: it stays the same object
            own[name].set_state(saved[name])
            saved[name] = own[name]
    tracker.set_states(saved)
