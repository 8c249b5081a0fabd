"""Mamba's decays and steps in fp32, whatever the type of the model."""

from typing import Any

import torch


class ExactDecays(torch.nn.Module):
    """What a Mamba mixer of any backend has before its other base: decays that stay fp32 where the model is cast to
    bf16. A checkpoint that has A_log, D and dt_bias in fp32 keeps them."""

    EXACT = ("A_log", "D", "dt_bias")

    def widen_decays(self) -> None:
        """Make them at least fp32: mcore makes dt_bias in the type of the parameters."""
        for name in self.EXACT:
            parameter = getattr(self, name)
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> "ExactDecays":
        exact = {name: getattr(self, name).data for name in self.EXACT}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            parameter = getattr(self, name)
            parameter.data = value.to(parameter.device)
        return self
