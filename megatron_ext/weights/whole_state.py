"""The state of an optimizer that every data rank holds whole (Muon's), as a checkpoint has it.

Its tensors have the shapes of the parameters and are cut as these are, so that any layout reads them. What of mcore's
would do so keeps the fp32 weights under another name than its distributed optimizer does; here both have STATES'.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor


def is_whole(optimizer: Any) -> bool:
    """Return whether a part of mcore's optimizer holds whole parameters, no ranges of them."""
    return not hasattr(optimizer, "gbuf_ranges")


def states(optimizer: Any, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the state of a parameter by its names; of a 16-bit one `param`, its fp32 values, besides."""
    main = getattr(parameter, "main_param", parameter)
    named = {name: value for name, value in optimizer.optimizer.state[main].items() if value is not None}
    return named if main is parameter else {"param": main, **named}


def held(optimizer: Any, holders: dict[torch.Tensor, ShardedBase]) -> Iterator[tuple[torch.Tensor, ShardedBase]]:
    """Yield each parameter that the optimizer trains, and how the checkpoint has it. Its state is there from now on."""
    optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    own = {id(parameter) for group in optimizer.optimizer.param_groups for parameter in group["params"]}
    for parameter, holder in holders.items():
        if id(getattr(parameter, "main_param", parameter)) in own:
            yield parameter, holder


def holders_of(weights: dict[str, Any]) -> dict[torch.Tensor, ShardedBase]:
    """Return how the checkpoint has each parameter of a sharded state of a model's part."""
    return {holder.data: holder for holder in nested_values(weights) if isinstance(holder, ShardedBase)}


def wanted(optimizer: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """Return what is to be loaded of the optimizer's state: by a number of the parameter, then by name."""
    return {
        str(number): {
            name: make_sharded_optimizer_tensor(holder, value, prefix=f"optimizer.state.{name}")
            for name, value in states(optimizer, parameter).items()
        }
        for number, (parameter, holder) in enumerate(held(optimizer, holders_of(weights)))
    }


@torch.no_grad()
def fill(optimizer: Any, weights: dict[str, Any], loaded: dict[str, Any], updates: int) -> None:
    """Give the optimizer what was loaded of `wanted`, and the count of updates where it keeps one."""
    for number, (parameter, _) in enumerate(held(optimizer, holders_of(weights))):
        for name, value in states(optimizer, parameter).items():
            value.copy_(loaded[str(number)][name])
    for group in optimizer.optimizer.param_groups:
        if "betas" in group:
            group["step"] = updates
