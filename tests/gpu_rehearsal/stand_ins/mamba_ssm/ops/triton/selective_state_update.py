"""One step of the recurrence, for decoding."""

import torch
import torch.nn.functional as F


def selective_state_update(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None
):
    """Return y like x [batch, heads, dim]; `state` [batch, heads, dim, dstate] goes on in place."""
    if state_batch_indices is not None or state.dim() != 4 or any(y is None for y in (D, z, dt_bias)):
        raise NotImplementedError("the stand-in for mamba-ssm takes heads with all their parts")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (state, x, dt, A, B, C)):
        raise NotImplementedError("the stand-in for mamba-ssm: the release has no gradient here")
    _, nheads, dim, dstate = state.shape
    batch = x.shape[0]
    assert x.shape == (batch, nheads, dim)
    assert dt.shape == x.shape
    assert A.shape == (nheads, dim, dstate)
    ngroups = B.shape[1]
    assert nheads % ngroups == 0, "nheads must be divisible by ngroups"
    assert B.shape == (batch, ngroups, dstate)
    assert C.shape == B.shape
    assert D.shape == (nheads, dim)
    assert z.shape == x.shape
    assert dt_bias.shape == (nheads, dim)
    step = dt.float() + dt_bias.float()
    step = F.softplus(step) if dt_softplus else step
    into, out_of = (y.float().repeat_interleave(nheads // ngroups, 1)[:, :, None] for y in (B, C))
    decayed = state.float() * torch.exp(step[..., None] * A.float())
    state.copy_(decayed + (step * x.float())[..., None] * into)
    y = (state.float() * out_of).sum(-1) + x.float() * D.float()
    return (y * F.silu(z.float())).to(x.dtype)
