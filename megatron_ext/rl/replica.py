"""The ranks that hold one copy of the model, among those that generate, and what such replicas tell one another."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.device import device
from megatron_ext.rl.samples import Key, Sample


class Replica:
    """This rank's place among those that generate: its replica's `number` of `count`."""

    def __init__(self) -> None:
        self.group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.number, self.count = self.group.rank(), self.group.size()
        self.parts = parallel_state.get_model_parallel_group()  # the ranks that hold this replica's model
        self.speaks = self.parts.rank() == 0  # of ranks that make the same samples one writes, scores and replies

    def gathered(self, own: list[Any]) -> list[Any]:
        """Return the lists of all replicas, joined."""
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, own, group=self.group)
        return [item for part in parts for item in part]

    def from_speaker(self, value: Any) -> Any:
        """Return the value of this replica's rank that speaks."""
        box = [value]
        if self.parts.size() > 1:
            dist.broadcast_object_list(box, group=self.parts, group_src=0)
        return box[0]

    def wanted(self, samples: Iterable[Sample], trained: Sequence[set[Key]], written: bool) -> list[set[Key]]:
        """Return which of these samples' tokens each replica needs: what its data-parallel rank trains, `trained` by
        rank; and all of them, where they are `written`, the replica whose rank 0 writes.
        """
        context = parallel_state.get_context_parallel_world_size()  # mcore counts context ranks first
        assert self.number // context == parallel_state.get_data_parallel_rank()
        wanted = [set(trained[number // context]) if trained else set() for number in range(self.count)]
        if written and dist.get_process_group_ranks(self.group)[0] == 0:
            wanted[0] = {sample.key for sample in samples}
        return wanted

    def bring(self, samples: Iterable[Sample], wanted: Sequence[set[Key]]) -> None:
        """Give each replica the tokens and log-probs of the samples that it wants, by number: from who made them.

        Every rank names the same samples in one order, and the same wishes. A sample costs 8 bytes a token, once, and
        with routing 2 an expert of each layer more.
        """
        samples = list(samples)
        sent = [
            [s for s in samples if s.replica == self.number and s.key in keys] if number != self.number else []
            for number, keys in enumerate(wanted)
        ]
        come: list[list[Sample]] = [[] for _ in wanted]
        for sample in samples:
            if sample.replica != self.number and sample.key in wanted[self.number]:
                come[sample.replica].append(sample)
        if self.count == 1:
            return
        columns = [s.sent() for each in sent for s in each]
        out = torch.from_numpy(np.concatenate([np.empty(0, np.int32), *columns])).to(device())
        sizes = [[sum(s.sent_size for s in each) for each in side] for side in (sent, come)]
        box = torch.empty(sum(sizes[1]), dtype=torch.int32, device=device())
        dist.all_to_all_single(box, out, output_split_sizes=sizes[1], input_split_sizes=sizes[0], group=self.group)
        flat, at = box.cpu().numpy(), 0
        for sample in (s for each in come for s in each):
            end = at + sample.sent_size
            sample.receive(flat[at:end])
            at = end
