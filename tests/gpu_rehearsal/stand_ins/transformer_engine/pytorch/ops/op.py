"""What all operations share: an extra state, which is empty but under FP8."""

import torch

from transformer_engine.stand_in import not_here


class FusibleOperation(torch.nn.Module):
    pass


class BasicOperation(FusibleOperation):
    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        if state is None or state.numel() == 0:
            return
        not_here("FP8's state")
