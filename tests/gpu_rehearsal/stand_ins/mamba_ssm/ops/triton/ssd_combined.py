"""Mamba-2's recurrence, token by token."""

import torch
import torch.nn.functional as F
from causal_conv1d import causal_conv1d_fn


def _mamba_chunk_scan_combined_fwd(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
):
    """Return y [batch, T, heads, headdim]. A new number in seq_idx [batch, T] begins with an empty state."""
    _check_shapes(x, dt, A, B, C, D, z, seq_idx)
    if initial_states is not None or cu_seqlens is not None or dt_limit != (0.0, float("inf")):
        raise NotImplementedError("the stand-in for mamba-ssm keeps no states")
    batch, seqlen, nheads, headdim = x.shape
    ngroups, dstate = B.shape[2:]
    step = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    step = F.softplus(step) if dt_softplus else step
    into, out_of = (y.float().repeat_interleave(nheads // ngroups, 2) for y in (B, C))
    wide, state, outs = x.float(), x.new_zeros(batch, nheads, headdim, dstate, dtype=torch.float32), []
    for t in range(seqlen):
        if t and seq_idx is not None:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1]).view(-1, 1, 1, 1)
        decay = torch.exp(step[:, t] * A.float())[..., None, None]
        state = decay * state + torch.einsum("bh,bhp,bhn->bhpn", step[:, t], wide[:, t], into[:, t])
        outs.append(torch.einsum("bhpn,bhn->bhp", state, out_of[:, t]))
    y = torch.stack(outs, 1)
    if D is not None:
        y = y + wide * (D.float() if D.dim() == 2 else D.float()[:, None])
    return (y if z is None else y * F.silu(z.float())).to(x.dtype)


def _check_shapes(x, dt, A, B, C, D, z, seq_idx):
    batch, seqlen, nheads, headdim = x.shape
    _, _, ngroups, dstate = B.shape
    assert nheads % ngroups == 0
    assert B.shape == (batch, seqlen, ngroups, dstate)
    assert x.shape == (batch, seqlen, nheads, headdim)
    assert dt.shape == (batch, seqlen, nheads)
    assert A.shape == (nheads,)
    assert C.shape == B.shape
    if z is not None:
        assert z.shape == x.shape
    if D is not None:
        assert D.shape == (nheads, headdim) or D.shape == (nheads,)
    if seq_idx is not None:
        assert seq_idx.shape == (batch, seqlen)


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
):
    if return_varlen_states:
        assert cu_seqlens is not None, "cu_seqlens must be provided if return_varlen_states is True"
    if return_final_states or return_varlen_states:
        raise NotImplementedError("the stand-in for mamba-ssm keeps no states")
    return _mamba_chunk_scan_combined_fwd(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
    )


def mamba_split_conv1d_scan_combined(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    initial_states=None,
    seq_idx=None,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-6,
    outproj_weight=None,
    outproj_bias=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
):
    """Convolve, scan and gate zxbcdt [batch, T, z | x B C | dt] -> [batch, T, heads * headdim]."""
    assert activation in [None, "silu", "swish"]
    if any(value is not None for value in (initial_states, rmsnorm_weight, outproj_weight)) or return_final_states:
        raise NotImplementedError("the stand-in for mamba-ssm has no states and fuses neither norm nor output")
    assert outproj_bias is None
    if D.dim() == 1:
        assert headdim is not None
        (nheads,) = D.shape
    else:
        nheads, headdim = D.shape
    batch, seqlen, _ = zxbcdt.shape
    dim = nheads * headdim
    assert nheads % ngroups == 0
    dstate = (conv1d_weight.shape[0] - dim) // ngroups // 2
    d_nonssm = (zxbcdt.shape[-1] - 2 * dim - 2 * ngroups * dstate - nheads) // 2
    assert d_nonssm >= 0
    assert zxbcdt.shape == (batch, seqlen, 2 * d_nonssm + 2 * dim + 2 * ngroups * dstate + nheads)
    assert dt_bias.shape == (nheads,)
    assert A.shape == (nheads,)
    if d_nonssm:
        raise NotImplementedError("the stand-in for mamba-ssm has no MLP beside the recurrence")
    z, xBC, dt = torch.split(zxbcdt, [dim, dim + ngroups * dstate * 2, nheads], dim=-1)
    mixed = causal_conv1d_fn(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation)
    x, B, C = mixed.transpose(1, 2).split([dim, ngroups * dstate, ngroups * dstate], -1)
    out = _mamba_chunk_scan_combined_fwd(
        x.unflatten(-1, (nheads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, dstate)),
        C.unflatten(-1, (ngroups, dstate)),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (nheads, headdim)),
        dt_bias=dt_bias,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
    )
    return out.flatten(2)
