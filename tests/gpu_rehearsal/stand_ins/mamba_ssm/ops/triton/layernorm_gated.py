"""A norm over groups of channels."""

import torch
import torch.nn.functional as F


def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    """Normalise each group of the last dimension in fp32; the gate silu(z) multiplies after or before."""
    if z is not None:
        assert z.shape == x.shape
    assert x.shape[-1] % (group_size or x.shape[-1]) == 0
    assert weight.shape == x.shape[-1:]
    y = x.float() if z is None or norm_before_gate else x.float() * F.silu(z.float())
    grouped = y.unflatten(-1, (-1, group_size or x.shape[-1]))
    y = (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.float()
    if bias is not None:
        y = y + bias.float()
    return (y * F.silu(z.float()) if z is not None and norm_before_gate else y).to(x.dtype)


class RMSNorm(torch.nn.Module):
    def __init__(self, hidden_size, eps=1e-5, group_size=None, norm_before_gate=True, device=None, dtype=None):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self):
        torch.nn.init.ones_(self.weight)

    def forward(self, x, z=None):
        return rmsnorm_fn(
            x,
            self.weight,
            self.bias,
            z=z,
            eps=self.eps,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
        )
