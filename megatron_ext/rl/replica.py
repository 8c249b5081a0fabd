"""The ranks that hold one copy of the model, among those that generate."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state


class Replica:
    """This rank's place among those that generate."""

    def __init__(self) -> None:
        self.group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.parts = parallel_state.get_model_parallel_group()  # the ranks that hold this replica's model
        self.speaks = self.parts.rank() == 0  # of ranks that make the same samples one writes, scores and replies

    def share(self, items: Sequence[int]) -> list[int]:
        """Return this replica's part of the items."""
        return list(items)[self.group.rank() :: self.group.size()]

    def gathered(self, own: list[Any]) -> list[Any]:
        """Return the lists of all replicas, joined."""
        parts: list[Any] = [None] * self.group.size()
        dist.all_gather_object(parts, own, group=self.group)
        return [item for part in parts for item in part]

    def from_speaker(self, value: Any) -> Any:
        """Return the value of this replica's rank that speaks."""
        box = [value]
        if self.parts.size() > 1:
            dist.broadcast_object_list(box, group=self.parts, group_src=0)
        return box[0]
