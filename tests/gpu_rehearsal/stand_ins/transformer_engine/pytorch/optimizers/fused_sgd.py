"""FusedSGD: a name only."""

import torch
from torch.optim.optimizer import required

from transformer_engine.stand_in import not_here


class FusedSGD(torch.optim.Optimizer):
    def __init__(
        self,
        params,
        lr=required,
        momentum=0.0,
        dampening=0.0,
        weight_decay=0.0,
        nesterov=False,
        *,
        wd_after_momentum=False,
        materialize_master_grads=True,
        set_grad_none=None,
    ):
        not_here("FusedSGD")
