"""Adam for machines without Transformer Engine and Apex, CPU or GPU."""

import inspect
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """Adam with the state layout of Apex's and Transformer Engine's FusedAdam: the step count sits in the group.

    mcore's distributed optimizer cannot load a checkpoint of torch.optim.AdamW (it looks for group["step"]:
    optimizer/distrib_optimizer.py:641,940). With this class it can, and CPU and GPU checkpoints have one format.
    The update is AdamW (Loshchilov & Hutter, arXiv 1711.05101) with decoupled decay, or Adam with L2 where
    `adam_w_mode` is off.
    """

    # As torch wraps them, they would import torch._dynamo: half a second of each rank's start.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        capturable: bool = False,  # as a CUDA graph; said by megatron-core from 0.17 on
        **unsupported: Any,
    ):
        if capturable:
            unsupported["capturable"] = capturable
        if unsupported:
            raise NotImplementedError(f"this FusedAdam has no {sorted(unsupported)}")
        super().__init__(
            params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay)
        )
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # None; torch's own gives what a closure returns
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not group["params"]:
                continue
            # The count advances on a rank without gradients too: all ranks must save the same groups.
            group["step"] = group.get("step", 0) + 1
            if not params:
                continue
            beta1, beta2 = group["betas"]
            correction1 = correction2 = 1.0
            if group["bias_correction"]:
                correction1, correction2 = 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            grads = [p.grad for p in params]
            first = [self.state[p]["exp_avg"] for p in params]
            second = [self.state[p]["exp_avg_sq"] for p in params]
            if group["weight_decay"]:
                if self.adam_w_mode:
                    torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                else:
                    grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
            torch._foreach_lerp_(first, grads, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
            root = torch._foreach_sqrt(second)
            torch._foreach_div_(root, correction2**0.5)
            torch._foreach_add_(root, group["eps"])
            torch._foreach_addcdiv_(params, first, root, -group["lr"] / correction1)
